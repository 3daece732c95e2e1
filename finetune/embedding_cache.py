"""Embeddings of training slices on disk, for training that leaves the encoder as it is.

The encoder runs once per slice and augmented variant; every later epoch reads. A cache belongs to exactly one encoder,
store, list of slices, augmentation and set of sizes: their hash is its folder's name, so that another one is another
cache and none is ever stale.

    FOLDER/<key>/facts.json       what the key is made of
                 embeddings.bin   records of one size: (C, h, w) in half precision, times a power of two
                 labels.bin       label ids (S, S), deflated
                 index.jsonl      one line per record: exponent, sizes and crc32c of both
                 complete.json    sha256 of the index, written last

A run that was stopped while filling goes on where it stood. Every record is verified at every read.

Shape letters: C, h, w = channels and grid of an embedding; S = side of the encoder's input; N = slices of a batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.files import file_sha256, write_json, write_text
from torch import Tensor

log = logging.getLogger(__name__)

SCHEMA = 1
FACTS, EMBEDDINGS, LABELS, INDEX, COMPLETE = (
    "facts.json",
    "embeddings.bin",
    "labels.bin",
    "index.jsonl",
    "complete.json",
)
LABEL_BYTES_PER_PIXEL = 0.05
"""Allowance for deflated labels in the count of disk; label maps are mostly one value."""


class CacheType(Enum):
    """Number format on disk, 2 bytes each."""

    FP16 = "fp16"
    """11 significant bits; the power of two keeps large values in range."""
    BF16 = "bf16"
    """8 significant bits, as the encoder computes under bf16."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Embeddings computed once; only with ``adapter.scope=decoder``."""

    variants: int = 0
    """Augmented variants of every training slice, each embedded once; 0 runs the encoder at every step. A few are
    enough for few slices: each epoch draws among them."""
    dtype: CacheType = CacheType.FP16
    """Number format on disk."""
    folder: str | None = None
    """Where caches lie; null is ``NAME.embeddings`` beside the store. Runs that differ in the decoder share one."""
    validation_mb: int = 2048
    """Memory for embeddings of validation slices, which are the same in every round; 0 computes them anew."""

    def __post_init__(self) -> None:
        if self.variants < 0 or self.validation_mb < 0:
            raise ValueError(
                f"cache.variants and cache.validation_mb must not be negative, got {self.variants} and "
                f"{self.validation_mb}."
            )


@dataclass(frozen=True, kw_only=True)
class RecordShape:
    """What one record holds."""

    embedding_Chw: tuple[int, int, int]
    image_size: int
    dtype: CacheType

    @property
    def embedding_bytes(self) -> int:
        """Bytes of one embedding."""
        return 2 * int(np.prod(self.embedding_Chw))

    @property
    def expected_bytes(self) -> int:
        """Bytes of one record on disk, about."""
        return self.embedding_bytes + int(LABEL_BYTES_PER_PIXEL * self.image_size**2) + 64


class EmbeddingCache:
    """One folder of embeddings; picklable, every process opens its own files."""

    def __init__(self, folder: Path, shape: RecordShape, *, num_records: int, facts: Mapping[str, Any]) -> None:
        self.key = _sha256_of(facts)
        self.path = folder / self.key[:16]
        self.shape = shape
        self.num_records = num_records
        self.facts = dict(facts)
        self._index: list[tuple[int, int, int, int, int]] | None = None

    @property
    def is_complete(self) -> bool:
        """True once every record is there."""
        return (self.path / COMPLETE).is_file()

    def check_disk(self) -> int:
        """Count the bytes that are still missing and refuse to start without them.

        Raises:
            StorageError: If less is free.
        """
        done = 0 if not self.path.is_dir() else len(_read_lines(self.path / INDEX))
        need = (self.num_records - done) * self.shape.expected_bytes
        place = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        if need > free:
            raise StorageError(
                f"the embedding cache needs {need / 1e9:.2f} GB for {self.num_records - done} embeddings, but only "
                f"{free / 1e9:.2f} GB are free. Use fewer cache.variants, or another cache.folder.",
                where=self.path.parent.name,
                kept="what was cached already",
            )
        return need

    def fill(self, batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]) -> None:
        """Compute what is missing.

        Args:
            batches: Given the first record that is missing, yields embeddings (N, C, h, w) and labels (N, S, S) in the
                order of the records, to the last one.

        Raises:
            DataError: If a file on disk is not what its index says.
        """
        if self.is_complete:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / FACTS, self.facts)
        first, label_end = self._trim()
        with (
            (self.path / EMBEDDINGS).open("ab") as embeddings,
            (self.path / LABELS).open("ab") as labels,
            (self.path / INDEX).open("a", encoding="utf-8") as index,
        ):
            count = first
            for embeddings_NChw, labels_NSS in batches(first) if first < self.num_records else ():
                lines = []
                for embedding, label in zip(embeddings_NChw, labels_NSS, strict=True):
                    record, exponent = _encode(embedding, self.shape)
                    packed = zlib.compress(label.cpu().numpy().astype(np.int32).tobytes(), 1)
                    embeddings.write(record)
                    labels.write(packed)
                    lines.append([exponent, _crc(record), label_end, len(packed), _crc(packed)])
                    label_end += len(packed)
                for file in (embeddings, labels):  # before the lines that vouch for them
                    file.flush()
                index.writelines(json.dumps(line) + "\n" for line in lines)
                index.flush()
                count += len(lines)
        if count != self.num_records:
            raise DataError(
                f"the embedding cache must get {self.num_records} records, got {count}.", where=self.path.name
            )
        digest = file_sha256(self.path / INDEX)
        write_text(self.path / COMPLETE, json.dumps({"index_sha256": digest, "records": count}) + "\n")

    def read(self, record: int) -> tuple[Tensor, Tensor]:
        """Return one embedding (C, h, w) in float32 and its label ids (S, S) int64.

        Raises:
            DataError: If the record's checksum differs.
        """
        exponent, crc, offset, length, label_crc = self._lines()[record]
        size = self.shape.embedding_bytes
        stored = _read_at(self.path / EMBEDDINGS, record * size, size)
        packed = _read_at(self.path / LABELS, offset, length)
        if _crc(stored) != crc or _crc(packed) != label_crc:
            raise DataError(
                f"record {record} of the embedding cache must have the checksum of its index, and has not. The disk "
                f"or a program changed it: delete the folder {self.path.name}, it is computed again.",
                where=self.path.parent.name,
                kept="the run's training states",
            )
        side = self.shape.image_size
        label = np.frombuffer(zlib.decompress(packed), dtype=np.int32).reshape(side, side)
        return _decode(stored, exponent, self.shape), torch.from_numpy(label.astype(np.int64))

    def _lines(self) -> list[tuple[int, int, int, int, int]]:
        if self._index is None:
            mark = self.path / COMPLETE
            if not mark.is_file():
                raise DataError("the embedding cache must be complete before it is read.", where=self.path.name)
            facts = json.loads((self.path / FACTS).read_text(encoding="utf-8"))
            digest = file_sha256(self.path / INDEX)
            lines = _read_lines(self.path / INDEX)
            whole = (self.path / EMBEDDINGS).stat().st_size == self.num_records * self.shape.embedding_bytes
            if json.loads(mark.read_text(encoding="utf-8"))["index_sha256"] != digest or not whole:
                raise DataError(
                    "the embedding cache must be whole, its index or size is not what was written. Delete the folder, "
                    "it is computed again.",
                    where=self.path.name,
                )
            if _sha256_of(facts) != self.key or len(lines) != self.num_records:
                raise DataError(
                    "the embedding cache must belong to this encoder, store and settings, and does not. Delete the "
                    "folder, it is computed again.",
                    where=self.path.name,
                )
            self._index = lines
        return self._index

    def _trim(self) -> tuple[int, int]:
        """Cut what a kill left half written; return the first missing record and the end of the labels."""
        lines = _read_lines(self.path / INDEX)
        label_end = lines[-1][2] + lines[-1][3] if lines else 0
        for name, size in ((EMBEDDINGS, len(lines) * self.shape.embedding_bytes), (LABELS, label_end)):
            path = self.path / name
            present = path.stat().st_size if path.is_file() else 0
            if present < size:
                raise DataError(
                    f"{name} must hold the {len(lines)} records of its index, and is shorter. Delete the folder.",
                    where=self.path.name,
                )
            if present > size:
                with path.open("r+b") as file:
                    file.truncate(size)
        text = "".join(json.dumps(list(line)) + "\n" for line in lines)
        (self.path / INDEX).write_text(text, encoding="utf-8")
        return len(lines), label_end

    def __getstate__(self) -> dict[str, Any]:
        """Leave the index to each process."""
        return {**self.__dict__, "_index": None}


class EmbeddingMemory:
    """Embeddings of batches that come again, by their content, up to a number of bytes."""

    def __init__(self, *, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0

    def lookup(self, images_N1SS: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the embeddings of a batch, computed only if it was not seen before."""
        key = hashlib.sha256(images_N1SS.cpu().contiguous().numpy().tobytes()).hexdigest()
        # Whole batches only: a batch of another size may differ in the last bits, and a resumed run must not.
        if key in self._kept:
            return self._kept[key].to(images_N1SS.device)
        embeddings = embed(images_N1SS)
        size = embeddings.numel() * embeddings.element_size()
        if self._bytes + size <= self.limit_bytes:
            self._kept[key] = embeddings.detach().cpu().clone()
            self._bytes += size
        return embeddings


def _encode(embedding_Chw: Tensor, shape: RecordShape) -> tuple[bytes, int]:
    if tuple(embedding_Chw.shape) != shape.embedding_Chw:
        raise ValueError(f"an embedding must have shape {shape.embedding_Chw}, got {tuple(embedding_Chw.shape)}.")
    values = embedding_Chw.detach().cpu().float()
    largest = float(values.abs().max())
    if not np.isfinite(largest):
        raise DataError("embeddings must be finite, got NaN or Inf: the encoder's weights or the slice are damaged.")
    # A power of two changes no digit; it brings the largest value to just below 2**14, far from fp16's 65504.
    exponent = int(np.frexp(largest)[1]) - 14 if largest > 0 else 0
    scaled = torch.ldexp(values, torch.tensor(-exponent))
    stored = scaled.to(torch.float16 if shape.dtype is CacheType.FP16 else torch.bfloat16)
    return stored.contiguous().view(torch.int16).numpy().tobytes(), exponent


def _decode(stored: bytes, exponent: int, shape: RecordShape) -> Tensor:
    raw: npt.NDArray[np.int16] = np.frombuffer(stored, dtype=np.int16).reshape(shape.embedding_Chw).copy()
    half = torch.from_numpy(raw).view(torch.float16 if shape.dtype is CacheType.FP16 else torch.bfloat16)
    return torch.ldexp(half.float(), torch.tensor(exponent))


def _read_lines(path: Path) -> list[tuple[int, int, int, int, int]]:
    """Read the index up to the last whole line."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [(int(a), int(b), int(c), int(d), int(e)) for a, b, c, d, e in map(json.loads, lines)]


def _read_at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _crc(data: bytes) -> int:
    return int(google_crc32c.value(data))


def _sha256_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
