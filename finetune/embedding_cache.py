"""Embeddings of training slices on disk, for runs in which the encoder does not train.

The encoder runs once per slice and augmented variant, and later epochs read the result. A cache belongs to exactly one
encoder, store, list of slices, augmentation and set of sizes. The hash of these facts is the name of its folder, so a
cache is never out of date: other facts have another folder.

    FOLDER/<key>/facts.json       facts of which the key is the hash
                 embeddings.bin   records of equal size in half precision, divided by a power of two: the embedding
                                  (C, h, w) and after it the finer maps, if the mask decoder reads any
                 labels.bin       label ids (S, S), compressed with zlib
                 index.jsonl      one line per record with the exponent and the sizes and crc32c of both files
                 complete.json    sha256 of the index, written last

A run that was stopped while filling resumes after the last whole record. Every record is verified at every read.

Shape letters: C, h, w = channels and grid of an embedding; S = side of the encoder's input; N = slices of a batch.
"""

# Why not zarr, which the slice store uses: the decoder reads one record per sample, and a read of zarr 3.1 with crc32c
# takes 3.1 ms of CPU time against 0.27 ms here at 256 px, and 9.1 against 4.2 ms at 1024 px. A sharded array also loses
# up to one shard at a kill, and a missing chunk reads as zeros.

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pydantic.dataclasses
import torch
from samgraft.shared.config import NonNegativeInt
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.files import file_sha256, write_json, write_text
from torch import Tensor

SCHEMA = 1
FACTS, EMBEDDINGS, LABELS, INDEX, COMPLETE = (
    "facts.json",
    "embeddings.bin",
    "labels.bin",
    "index.jsonl",
    "complete.json",
)
LABEL_BYTES_PER_PIXEL = 0.05
"""Estimated size of compressed labels, which are mostly one value."""

IndexLine = tuple[int, int, int, int, int]
"""Exponent, crc32c of the embedding, then offset, length and crc32c of the label."""


class CacheType(Enum):
    """Number format of embeddings on disk, 2 bytes per number."""

    FP16 = "fp16"
    """Format with 11 significant bits. The power of two keeps large values in range."""
    BF16 = "bf16"
    """Format with 8 significant bits, in which the encoder computes under bf16."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Cache of embeddings, for ``adapter.scope=decoder`` only."""

    variants: NonNegativeInt = 0
    """Augmented variants of every training slice, each embedded once. 0 runs the encoder at every step. A few variants
    are enough for few slices: each epoch draws among them."""
    dtype: CacheType = CacheType.FP16
    """Number format on disk."""
    folder: str | None = None
    """Folder of all caches. null is ``NAME.embeddings`` next to the store. Runs with different decoders share a
    cache."""
    validation_mb: NonNegativeInt = 2048
    """Memory in MiB for embeddings of validation slices, which are equal in every round. 0 computes them each time."""


@dataclass(frozen=True, kw_only=True)
class RecordShape:
    """Sizes and number format of one record."""

    maps: tuple[tuple[int, int, int], ...]
    """Shapes (C, h, w) of the embedding and of the finer maps after it."""
    image_size: int
    dtype: CacheType

    @property
    def map_sizes(self) -> list[int]:
        """Number of values of every map."""
        return [math.prod(one) for one in self.maps]

    @property
    def embedding_bytes(self) -> int:
        """Size of one record's maps in bytes."""
        return 2 * sum(self.map_sizes)

    @property
    def expected_bytes(self) -> int:
        """Estimated size of one record on disk in bytes."""
        return self.embedding_bytes + int(LABEL_BYTES_PER_PIXEL * self.image_size**2) + 64


class EmbeddingCache:
    """One folder of embeddings. It can be pickled, because every process opens the files itself."""

    def __init__(self, folder: Path, shape: RecordShape, *, num_records: int, facts: Mapping[str, Any]) -> None:
        self.key = _sha256_of(facts)
        self.path = folder / self.key[:16]
        self.shape = shape
        self.num_records = num_records
        self.facts = dict(facts)
        self._index: list[IndexLine] | None = None

    @property
    def is_complete(self) -> bool:
        """True when every record is written."""
        return (self.path / COMPLETE).is_file()

    def check_disk(self) -> int:
        """Return the number of bytes that are still to be written, and check that they are free.

        Raises:
            StorageError: If the disk has less free space.
        """
        missing = self.num_records - len(_read_index(self.path / INDEX))
        need = missing * self.shape.expected_bytes
        # The folder may not exist yet; its nearest existing parent is on the same disk.
        place = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        if need > free:
            raise StorageError(
                f"the embedding cache needs {need / 1e9:.2f} GB for {missing} embeddings, but only "
                f"{free / 1e9:.2f} GB are free. Use fewer cache.variants, or another cache.folder.",
                where=self.path.parent.name,
                kept="the embeddings that are cached",
            )
        return need

    def fill(self, batches: Callable[[int], Iterator[tuple[ImageFeatures, Tensor]]]) -> None:
        """Compute and write the missing records.

        Args:
            batches: Function of the first missing record that yields features of N slices and labels (N, S, S) in the
                order of the records, up to the last one.

        Raises:
            DataError: If a file on disk does not match its index.
        """
        if self.is_complete:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / FACTS, self.facts)
        first, label_end = self._cut_partial_records()
        with (
            (self.path / EMBEDDINGS).open("ab") as embeddings,
            (self.path / LABELS).open("ab") as labels,
            (self.path / INDEX).open("a", encoding="utf-8") as index,
        ):
            count = first
            for features, labels_NSS in batches(first) if first < self.num_records else ():
                lines = []
                for *maps, label in zip(features.embeddings, *features.high_res, labels_NSS, strict=True):
                    record, exponent = _encode(maps, self.shape)
                    packed = zlib.compress(label.cpu().numpy().astype(np.int32).tobytes(), 1)
                    embeddings.write(record)
                    labels.write(packed)
                    lines.append([exponent, _crc(record), label_end, len(packed), _crc(packed)])
                    label_end += len(packed)
                # The index is written after the data: a kill in between leaves data without a line, which is cut off
                # at the next start. The other order would leave lines without data.
                embeddings.flush()
                labels.flush()
                index.writelines(json.dumps(line) + "\n" for line in lines)
                index.flush()
                count += len(lines)
        if count != self.num_records:
            raise DataError(
                f"the embedding cache is incomplete (got {count} records, expected {self.num_records}).",
                where=self.path.name,
            )
        digest = file_sha256(self.path / INDEX)
        write_text(self.path / COMPLETE, json.dumps({"index_sha256": digest, "records": count}) + "\n")

    def read(self, record: int) -> tuple[list[Tensor], Tensor]:
        """Return the maps (C, h, w) of one record in float32 and its label ids (S, S) int64.

        Raises:
            DataError: If the record's checksum differs.
        """
        exponent, crc, offset, length, label_crc = self._verified_index()[record]
        size = self.shape.embedding_bytes
        stored = _read_at(self.path / EMBEDDINGS, record * size, size)
        packed = _read_at(self.path / LABELS, offset, length)
        if _crc(stored) != crc or _crc(packed) != label_crc:
            raise DataError(
                f"record {record} of the embedding cache is damaged (its checksum differs). Delete the folder "
                f"{self.path.name}: it is computed again.",
                where=self.path.parent.name,
                kept="the run's training states",
            )
        side = self.shape.image_size
        label = np.frombuffer(zlib.decompress(packed), dtype=np.int32).reshape(side, side)
        return _decode(stored, exponent, self.shape), torch.from_numpy(label.astype(np.int64))

    def _verified_index(self) -> list[IndexLine]:
        if self._index is None:
            if not self.is_complete:
                raise DataError("the embedding cache is read before it is complete.", where=self.path.name)
            facts = json.loads((self.path / FACTS).read_text(encoding="utf-8"))
            complete = json.loads((self.path / COMPLETE).read_text(encoding="utf-8"))
            digest = file_sha256(self.path / INDEX)
            size = (self.path / EMBEDDINGS).stat().st_size
            if complete["index_sha256"] != digest or size != self.num_records * self.shape.embedding_bytes:
                raise DataError(
                    "the embedding cache is damaged: its index or its size differs from what was written. Delete the "
                    "folder: it is computed again.",
                    where=self.path.name,
                )
            lines = _read_index(self.path / INDEX)
            if _sha256_of(facts) != self.key or len(lines) != self.num_records:
                raise DataError(
                    "the embedding cache belongs to another encoder, store or settings. Delete the folder: it is "
                    "computed again.",
                    where=self.path.name,
                )
            self._index = lines
        return self._index

    def _cut_partial_records(self) -> tuple[int, int]:
        """Cut off data after the last indexed record. Return the number of records and the end of the labels."""
        lines = _read_index(self.path / INDEX)
        label_end = lines[-1][2] + lines[-1][3] if lines else 0
        for name, size in ((EMBEDDINGS, len(lines) * self.shape.embedding_bytes), (LABELS, label_end)):
            path = self.path / name
            present = path.stat().st_size if path.is_file() else 0
            if present < size:
                raise DataError(
                    f"{name} is shorter than the {len(lines)} records of its index. Delete the folder: it is computed "
                    "again.",
                    where=self.path.name,
                )
            if present > size:
                with path.open("r+b") as file:
                    file.truncate(size)
        text = "".join(json.dumps(list(line)) + "\n" for line in lines)
        write_text(self.path / INDEX, text)
        return len(lines), label_end

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the index, which each process reads itself."""
        return {**self.__dict__, "_index": None}


class EmbeddingMemory:
    """Embeddings of repeated batches in memory, by the content of the batch, up to a number of bytes."""

    def __init__(self, *, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._kept: dict[str, ImageFeatures] = {}
        self._bytes = 0

    def lookup(self, images_N1SS: Tensor, embed: Callable[[Tensor], ImageFeatures]) -> ImageFeatures:
        """Return the features of a batch, computed only the first time."""
        key = hashlib.sha256(images_N1SS.cpu().contiguous().numpy().tobytes()).hexdigest()
        # Whole batches only. The same slice in a batch of another size may differ in the last bits, and a resumed run
        # must compute exactly what the first run computed.
        if key in self._kept:
            return self._kept[key].map(lambda one: one.to(images_N1SS.device))
        features = embed(images_N1SS)
        size = sum(one.numel() * one.element_size() for one in (features.embeddings, *features.high_res))
        if self._bytes + size <= self.limit_bytes:
            self._kept[key] = features.map(lambda one: one.detach().cpu().clone())
            self._bytes += size
        return features


def _encode(maps: Sequence[Tensor], shape: RecordShape) -> tuple[bytes, int]:
    if (found := tuple(tuple(one.shape) for one in maps)) != shape.maps:
        raise ValueError(f"an embedding must have shapes {shape.maps}, got {found}.")
    values = torch.cat([one.detach().cpu().float().flatten() for one in maps])
    largest = float(values.abs().max())
    if not np.isfinite(largest):
        raise DataError("an embedding has NaN or Inf: the encoder's weights or the slice are damaged.")
    # Division by a power of two is exact. It brings the largest value just below 2**14, far from fp16's limit 65504.
    exponent = int(np.frexp(largest)[1]) - 14 if largest > 0 else 0
    scaled = torch.ldexp(values, torch.tensor(-exponent))
    stored = scaled.to(torch.float16 if shape.dtype is CacheType.FP16 else torch.bfloat16)
    return stored.contiguous().view(torch.int16).numpy().tobytes(), exponent


def _decode(stored: bytes, exponent: int, shape: RecordShape) -> list[Tensor]:
    raw: npt.NDArray[np.int16] = np.frombuffer(stored, dtype=np.int16).copy()
    half = torch.from_numpy(raw).view(torch.float16 if shape.dtype is CacheType.FP16 else torch.bfloat16)
    values = torch.ldexp(half.float(), torch.tensor(exponent))
    return [one.view(size) for one, size in zip(values.split(shape.map_sizes), shape.maps, strict=True)]


def _read_index(path: Path) -> list[IndexLine]:
    """Return the lines of an index up to the last whole one. None without a file."""
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
