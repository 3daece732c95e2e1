"""Reading of foreign weights files without running their code or relying on the sizes they claim.

The first bytes of a file decide what it is, never its name. Everything that allocates memory is checked against the
real size of the file first. ``torch.load`` is only called with ``weights_only=True``, after a scan of its pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickletools
import shlex
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import file_sha256

MAX_TENSORS = 8192
MAX_PICKLE_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 64 * 2**20
MAX_DEPTH = 16
"""Nesting of dictionaries up to which tensors are searched."""
ZIP_MAGIC = b"PK\x03\x04"
_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
}  # fmt: skip

# torch.save writes these names for tensors. Every other name in a pickle belongs to a foreign object.
_PLAIN_GLOBALS = frozenset({"collections.OrderedDict", "torch.Size", "torch.storage.UntypedStorage"})
_PLAIN_PREFIXES = ("torch._utils._rebuild_", "torch.serialization._get_layout")
_BUILTIN_MODULES = frozenset({"builtins", "__builtin__"})
# Types without side effects. They occur in whole pickled modules, beside no code at all.
_HARMLESS_BUILTINS = frozenset(
    {"set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bool", "str", "bytes", "bytearray"}
    | {"slice", "range", "object"}
)
# In a pickle, objects of these modules have no other purpose than to run something.
_CODE_MODULES = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "runpy", "shutil", "socket", "pty", "platform", "commands", "importlib"}
    | {"ctypes", "webbrowser", "timeit", "code", "pdb", "asyncio", "multiprocessing", "threading", "functools"}
    | {"operator", "types"}
)
_FOREIGN_MAGIC = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file it points to (run `git lfs pull`)"),
    (b"\x80\x02\x8a", "a file in the old format of PyTorch < 1.6, which has no sizes to check (re-save it)"),
    (b"\x80", "a bare pickle, which could run code"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"7z\xbc\xaf", "a 7z archive (unpack it first)"),
    (b"\x08\x07\x12", "an ONNX model"),
    (b"\x08\x08\x12", "an ONNX model"),
    (b"%PDF", "a PDF"),
)


@dataclass(kw_only=True)
class RawFile:
    """Content of a weights file before its layout is recognised."""

    name: str
    content: dict[Any, Any]
    """Tensors and plain values, possibly nested."""
    sha256: str
    metadata: dict[str, str] = field(default_factory=dict)
    """Strings of a safetensors header."""


def read_raw_weights(path: Path) -> RawFile:
    """Read one weights file.

    Raises:
        WeightsError: If it is no weights file, is damaged, claims wrong sizes, or contains more than tensors.
    """
    size, head = _read_head(path)
    _check_kind(head, size, name=path.name)
    metadata: dict[str, str] = {}
    if head.startswith(ZIP_MAGIC):
        with _open_zip(path, size) as archive:
            check_pickle(_read_pickle(archive, size, name=path.name), path=path)
        content = _load_zip(path)
    else:
        content, metadata = _read_safetensors(path, size)
    return RawFile(name=path.name, content=content, sha256=file_sha256(path), metadata=metadata)


def read_shards(index: Path) -> RawFile:
    """Read the files that a transformers index (``*.index.json``) lists, as one file.

    Raises:
        WeightsError: If the index is damaged, a file is missing, or tensors are missing or listed twice.
    """
    try:
        weight_map = json.loads(index.read_bytes()[:MAX_HEADER_BYTES])["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise WeightsError("the index of a sharded model is damaged (no weight_map).", where=index.name) from err
    if any(Path(name).name != name for name in names) or not 0 < len(names) <= MAX_TENSORS:
        raise WeightsError("the index of a sharded model lists files outside of its folder.", where=index.name)
    shards = [read_raw_weights(index.with_name(name)) for name in names]
    content: dict[Any, Any] = {}
    for shard in shards:
        if repeated := sorted(map(str, content.keys() & shard.content.keys())):
            raise WeightsError(f"tensor {repeated[0]} is in two files of a sharded model.", where=shard.name)
        content |= shard.content
    if missing := sorted(set(weight_map) - {str(key) for key in content}):
        raise WeightsError(
            f"{len(missing)} of {len(weight_map)} tensors of a sharded model are missing ({missing[0]}, ...). Copy the "
            "whole folder again.",
            where=index.name,
        )
    # Names are left out: the same shards under other names are the same weights.
    digests = "".join(shard.sha256 for shard in shards)
    return RawFile(name=index.name, content=content, sha256=hashlib.sha256(digests.encode()).hexdigest())


def read_tensors_only(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file that also contains foreign objects, without running any of its code.

    Every foreign class is replaced by ``_Inert``, which keeps nothing and does nothing.

    Raises:
        WeightsError: As ``read_raw_weights``, but not for foreign objects.
    """
    size, head = _read_head(path)
    _check_kind(head, size, name=path.name)
    if not head.startswith(ZIP_MAGIC):
        return dict(iterate_tensors(read_raw_weights(path).content))
    with _open_zip(path, size) as archive:
        pickled = _read_pickle(archive, size, name=path.name)
    foreign = foreign_globals(pickled)
    _refuse_code(foreign, name=path.name)
    # torch accepts a class under any name, so the unpickler finds a harmless class in place of each foreign one.
    inert: list[Any] = [(type(_Inert.__name__, (_Inert,), {}), name) for name in foreign]
    with torch.serialization.safe_globals(inert):
        return dict(iterate_tensors(_load_zip(path)))


class _Inert:
    """Replacement of any foreign class while tensors are read."""

    def __new__(cls, *_: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def iterate_tensors(content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (dotted name, tensor) of nested dictionaries and lists."""
    if isinstance(content, torch.Tensor):
        yield prefix, content
    elif depth < MAX_DEPTH:
        items: Any = ()
        if isinstance(content, Mapping):
            items = content.items()
        elif isinstance(content, list | tuple):
            items = enumerate(content)
        for key, value in items:
            yield from iterate_tensors(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def check_pickle(pickled: bytes, *, path: Path) -> None:
    """Refuse a pickle that names anything but tensors. Nothing in it is run.

    Raises:
        WeightsError: With the kind of content: code, a whole module, or other objects.
    """
    foreign, name = foreign_globals(pickled), path.name
    _refuse_code(foreign, name=name)
    if any(g.startswith("torch.nn.") for g in foreign):
        outermost = next(g for g in pickle_globals(pickled) if not _is_plain(g))
        raise WeightsError(
            f"the file contains a whole pickled module ({outermost}), which only its own program can load. Load it "
            "there, and save its tensors: torch.save(module.state_dict(), FILE).",
            where=name,
        )
    if foreign:
        raise WeightsError(
            f"the file contains foreign objects ({', '.join(foreign[:6])}), expected tensors and plain values only. "
            "Nothing in it was run.",
            where=name,
            next_command=f"samgraft inspect {shlex.quote(str(path))} --save-tensors "
            f"{shlex.quote(f'{path.stem}.safetensors')}",
        )


def foreign_globals(pickled: bytes) -> list[str]:
    """Return the names in a pickle that are not part of how PyTorch stores tensors."""
    return sorted({name for name in pickle_globals(pickled) if not _is_plain(name)})


def pickle_globals(pickled: bytes) -> Iterator[str]:
    """Yield the dotted names of all objects that a pickle would import, from its opcodes alone."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in {"GLOBAL", "INST"}:
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)
            # Names may also be stored once and fetched by number, so the memo is followed as well.
            elif opcode.name in {"MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"} and strings:
                memo[len(memo) if argument is None else int(str(argument))] = strings[-1]
            elif opcode.name in {"BINGET", "LONG_BINGET", "GET"} and int(str(argument)) in memo:
                strings.append(memo[int(str(argument))])
    except Exception as err:
        raise WeightsError("weights file is damaged: its table of names cannot be read.") from err


def _is_plain(name: str) -> bool:
    if name in _PLAIN_GLOBALS or name.startswith(_PLAIN_PREFIXES):
        return True
    module, _, attribute = name.rpartition(".")
    return module == "torch" and (
        attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype)
    )


def _refuse_code(foreign: list[str], *, name: str) -> None:
    code = []
    for path in foreign:
        module, _, attribute = path.partition(".")
        if module in _CODE_MODULES or (module in _BUILTIN_MODULES and attribute not in _HARMLESS_BUILTINS):
            code.append(path)
    if code:
        raise WeightsError(
            f"weights file contains code to run on loading ({', '.join(code[:6])}). It was not loaded.", where=name
        )


def _read_head(path: Path) -> tuple[int, bytes]:
    if ":/" in str(path):
        raise WeightsError("weights must be a local file, got an address. Download it first.", where=str(path))
    if not path.is_file():
        raise WeightsError("weights must be an existing file or run folder, and there is none.", where=str(path))
    size = path.stat().st_size
    with path.open("rb") as stream:
        return size, stream.read(512)


def _check_kind(head: bytes, size: int, *, name: str) -> None:
    """Refuse a file whose first bytes are neither PyTorch's nor those of safetensors."""
    text = head.lstrip().lower()
    if size == 0:
        raise WeightsError("weights file is empty (0 bytes): the download or copy failed. Fetch it again.", where=name)
    # The first byte of a safetensors file is part of a length and equals that of a pickle in one file of thirty.
    if _begins_like_safetensors(head, size):
        return
    for magic, kind in _FOREIGN_MAGIC:
        if head.startswith(magic):
            raise WeightsError(f"weights must be a PyTorch .pth or safetensors file, got {kind}.", where=name)
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            "weights must be a PyTorch .pth or safetensors file, got a web page. Download the file itself.", where=name
        )
    if head[257:262] == b"ustar":
        raise WeightsError(
            "weights are in the old tar format of PyTorch < 1.0, which cannot be read safely. Re-save them with a "
            "current PyTorch.",
            where=name,
        )


def _begins_like_safetensors(head: bytes, size: int) -> bool:
    # A length that fits into the file, then JSON. Eight bytes of anything else make a far larger number.
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _open_zip(path: Path, size: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as err:
        raise WeightsError(
            f"weights file is damaged or incomplete ({size} bytes, its table of contents is missing). Fetch it again.",
            where=path.name,
        ) from err


def _read_pickle(archive: zipfile.ZipFile, size: int, *, name: str) -> bytes:
    infos = archive.infolist()
    if len(infos) > MAX_TENSORS + 64:
        raise WeightsError(
            f"weights must contain at most {MAX_TENSORS} tensors, got {len(infos)} zip members.", where=name
        )
    names = [info.filename for info in infos]
    if any(n.startswith(("/", "\\")) or ".." in Path(n).parts for n in names):
        raise WeightsError("weights file has zip members with paths outside of it. Nothing was extracted.", where=name)
    # Before the sizes, because torch compresses the code of such a program.
    if any("/code/" in f"/{n}" or n.endswith("constants.pkl") for n in names):
        raise WeightsError(
            "weights must be plain tensors, got a TorchScript program. Save its state_dict instead.", where=name
        )
    # A compressed member could unpack to any size.
    if sum(info.file_size for info in infos) > size or any(i.compress_type != zipfile.ZIP_STORED for i in infos):
        raise WeightsError(
            "weights file claims more data than it contains, or is compressed (torch.save stores plain).", where=name
        )
    pickles = [info for info in infos if info.filename.endswith("/data.pkl") and info.filename.count("/") == 1]
    if len(pickles) != 1:
        raise WeightsError("weights must be a file written by torch.save, got another zip archive.", where=name)
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise WeightsError(
            f"weights' table of names must be at most {MAX_PICKLE_BYTES} bytes, got {pickles[0].file_size}.", where=name
        )
    try:
        return archive.read(pickles[0])
    except zipfile.BadZipFile as err:
        raise WeightsError("weights file is damaged (wrong checksum). Fetch it again.", where=name) from err


def _load_zip(path: Path) -> dict[Any, Any]:
    with zipfile.ZipFile(path) as archive:
        record_bytes = [info.file_size for info in archive.infolist() if "/data/" in info.filename]
    try:
        # Streams, because torch.load chooses a reader by the ending of a path. The first pass is without data: shapes
        # and storages on the meta device allocate nothing and can be checked.
        with path.open("rb") as stream:
            plan = torch.load(stream, map_location="meta", weights_only=True)
        _check_plan(plan, record_bytes, name=path.name)
        with path.open("rb") as stream:
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as err:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
        first = (str(err).splitlines() or [""])[0]
        raise WeightsError(
            f"weights file cannot be read ({type(err).__name__}: {first[:160]}).", where=path.name
        ) from err
    return content if isinstance(content, dict) else {"": content}


def _check_plan(plan: Any, record_bytes: list[int], *, name: str) -> None:
    tensors = list(iterate_tensors(plan))
    if len(tensors) > MAX_TENSORS:
        raise WeightsError(f"weights must contain at most {MAX_TENSORS} tensors, got {len(tensors)}.", where=name)
    # Storages are shared between tensors, so each tensor is compared with the largest one.
    available = max(record_bytes, default=0)
    for key, tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise WeightsError(
                f"tensor {key} is sparse or quantized, expected a dense one. Convert it first.", where=name
            )
        # Offset of the last element. Strides of 0 would make a tensor of any shape out of one number.
        reach = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (reach + 1) * tensor.element_size() if tensor.numel() else 0
        if needed > available or tensor.numel() * tensor.element_size() > available:
            raise WeightsError(
                f"tensor {key} claims shape {list(tensor.shape)}, more than the file contains.", where=name
            )


def _read_safetensors(path: Path, size: int) -> tuple[dict[Any, Any], dict[str, str]]:
    with path.open("rb") as stream:
        length_bytes = stream.read(8)
        if len(length_bytes) < 8:
            raise WeightsError(f"weights file is incomplete ({size} bytes). Fetch it again.", where=path.name)
        (length,) = struct.unpack("<Q", length_bytes)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise WeightsError(
                "weights must be a PyTorch .pth or safetensors file; the content is neither, or is cut off.",
                where=path.name,
            )
        header_bytes = stream.read(length)
    try:
        header = json.loads(header_bytes)
    except ValueError as err:
        raise WeightsError(
            "weights must be a PyTorch .pth or safetensors file; the content is neither.", where=path.name
        ) from err
    metadata = _check_header(header, size - 8 - length, name=path.name)
    try:
        return dict(load_file(path)), metadata
    except Exception as err:
        raise WeightsError(f"safetensors file cannot be read ({err}).", where=path.name) from err


def _check_header(header: Any, data_bytes: int, *, name: str) -> dict[str, str]:
    if not isinstance(header, dict):
        raise WeightsError("safetensors header must be an object.", where=name)
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise WeightsError(f"weights must contain at most {MAX_TENSORS} tensors, got {len(header)}.", where=name)
    # Holes or a tail would be data that no check has seen.
    end = 0
    for key, entry in header.items():
        try:
            width, (start, stop) = _DTYPE_BYTES[entry["dtype"]], entry["data_offsets"]
            needed = math.prod(_read_side(n) for n in entry["shape"]) * width
            is_right = start >= 0 and stop - start == needed and stop <= data_bytes
        except (KeyError, TypeError, ValueError) as err:
            raise WeightsError(f"safetensors entry {key[:80]!r} is malformed.", where=name) from err
        if not is_right:
            raise WeightsError(
                f"tensor {key[:80]} claims shape {entry['shape']}, but the file is incomplete or wrong ({data_bytes} "
                "bytes of data).",
                where=name,
            )
        end = max(end, stop)
    if end != data_bytes:
        raise WeightsError(
            f"safetensors file must contain {end} bytes of data, got {data_bytes}: cut off or padded.", where=name
        )
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _read_side(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value
