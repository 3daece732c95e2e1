"""Reading foreign weights files without running their code or trusting their sizes.

A file is told by its first bytes, never by its name. Everything that allocates memory is checked against the file's
real size first; ``torch.load`` is only ever called with ``weights_only=True``, after its pickle has been scanned.
"""

from __future__ import annotations

import json
import math
import pickletools
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
_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
# What torch.save writes for tensors; everything else in a pickle is a foreign object.
_PLAIN_GLOBALS = frozenset({"collections.OrderedDict", "torch.Size", "torch.storage.UntypedStorage"})
_PLAIN_PREFIXES = ("torch._utils._rebuild_", "torch.serialization._get_layout")


# Named in a pickle, these have no other purpose than to run something.
_CODE_MODULES = frozenset(
    {
        "os",
        "posix",
        "nt",
        "sys",
        "subprocess",
        "builtins",
        "__builtin__",
        "runpy",
        "shutil",
        "socket",
        "pty",
        "platform",
    }
    | {"commands", "importlib", "ctypes", "webbrowser", "timeit", "code", "pdb", "asyncio", "multiprocessing"}
    | {"threading", "functools", "operator", "types"}
)


@dataclass(kw_only=True)
class RawFile:
    """Everything in a file, before its layout is understood."""

    name: str
    container: str
    """torch-zip or safetensors."""
    content: dict[Any, Any]
    """Tensors and plain values, possibly nested."""
    sha256: str
    metadata: dict[str, str] = field(default_factory=dict)
    """Strings of a safetensors header."""


def read_file(path: Path) -> RawFile:
    """Read one weights file.

    Raises:
        WeightsError: If it is no weights file, is damaged, lies about its sizes, or holds more than tensors.
    """
    size, head = _size_and_head(path)
    refuse_foreign(head, size, name=path.name)
    if head.startswith(b"PK\x03\x04"):
        content = _read_torch_zip(path, size)
        return RawFile(name=path.name, container="torch-zip", content=content, sha256=file_sha256(path))
    content, metadata = _read_safetensors(path, size)
    digest = file_sha256(path)
    return RawFile(name=path.name, container="safetensors", content=content, sha256=digest, metadata=metadata)


def _size_and_head(path: Path) -> tuple[int, bytes]:
    if ":/" in str(path):
        raise WeightsError("weights must be a local file, got an address. Download it first.", where=str(path))
    if not path.is_file():
        raise WeightsError("weights must be an existing file or run folder, and there is none.", where=str(path))
    size = path.stat().st_size
    with path.open("rb") as stream:
        return size, stream.read(512)


def refuse_foreign(head: bytes, size: int, *, name: str) -> None:
    """Refuse, by its first bytes, what is no PyTorch or safetensors file."""
    text = head.lstrip().lower()
    if size == 0:
        raise WeightsError("weights file is empty (0 bytes): the download or copy failed. Fetch it again.", where=name)
    if _begins_like_safetensors(head, size):
        # Its first byte is part of a length, and is that of a pickle in one file of thirty.
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
    """True for a length that fits into the file, then JSON. Eight bytes of anything else make a far larger number."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


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


def _read_torch_zip(path: Path, size: int) -> dict[Any, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            refuse_foreign_objects(_torch_pickle(archive, size, name=path.name), name=path.name)
    except zipfile.BadZipFile as err:
        raise _damaged_zip(size, name=path.name) from err
    return _load_checked(path, size)


def _damaged_zip(size: int, *, name: str) -> WeightsError:
    return WeightsError(
        f"weights file is damaged or incomplete ({size} bytes, its table of contents is missing). Fetch it again.",
        where=name,
    )


def _load_checked(path: Path, size: int) -> dict[Any, Any]:
    with zipfile.ZipFile(path) as archive:
        record_bytes = [info.file_size for info in archive.infolist() if "/data/" in info.filename]
    try:
        # Streams, because torch.load chooses a reader by the ending of a path. First without data: shapes and storages
        # on the meta device allocate nothing and can be checked.
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
            f"weights file cannot be read: {type(err).__name__}: {first[:160]}", where=path.name
        ) from err
    return content if isinstance(content, dict) else {"": content}


def _torch_pickle(archive: zipfile.ZipFile, size: int, *, name: str) -> bytes:
    infos = archive.infolist()
    if len(infos) > MAX_TENSORS + 64:
        raise WeightsError(
            f"weights must hold at most {MAX_TENSORS} tensors, got {len(infos)} zip members.", where=name
        )
    names = [info.filename for info in infos]
    if any(n.startswith(("/", "\\")) or ".." in Path(n).parts for n in names):
        raise WeightsError(
            "weights file has zip members with paths outside of it. Refused, nothing was extracted.", where=name
        )
    if sum(info.file_size for info in infos) > size or any(i.compress_type != zipfile.ZIP_STORED for i in infos):
        raise WeightsError(
            "weights file claims more data than it holds, or is compressed (torch.save stores plain).", where=name
        )
    pickles = [info for info in infos if info.filename.endswith("/data.pkl") and info.filename.count("/") == 1]
    if any("/code/" in f"/{n}" or n.endswith("constants.pkl") for n in names):
        raise WeightsError(
            "weights must be plain tensors, got a TorchScript program. Save its state_dict instead.", where=name
        )
    if len(pickles) != 1:
        raise WeightsError("weights must be a file written by torch.save, got another zip archive.", where=name)
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise WeightsError(
            f"weights' table of names must be at most {MAX_PICKLE_BYTES} bytes, got {pickles[0].file_size}.", where=name
        )
    return archive.read(pickles[0])


def read_tensors_only(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file that also holds foreign objects, without running any of its code.

    Every foreign class is replaced by ``_Inert``, which keeps nothing and does nothing.

    Raises:
        WeightsError: As ``read_file``, foreign objects excepted.
    """
    size, head = _size_and_head(path)
    refuse_foreign(head, size, name=path.name)
    if not head.startswith(b"PK\x03\x04"):
        return dict(iterate_tensors(read_file(path).content))
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = _torch_pickle(archive, size, name=path.name)
            refuse_foreign_objects(pickled, name=path.name, code_only=True)
            foreign = foreign_globals(pickled)
    except zipfile.BadZipFile as err:
        raise _damaged_zip(size, name=path.name) from err
    inert: list[Any] = [(type(_Inert.__name__, (_Inert,), {}), name) for name in foreign]
    with torch.serialization.safe_globals(inert):
        return dict(iterate_tensors(_load_checked(path, size)))


class _Inert:
    """Stands in for any foreign class while tensors are taken out of a file."""

    def __new__(cls, *_: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def refuse_foreign_objects(pickled: bytes, *, name: str, code_only: bool = False) -> None:
    """Refuse a pickle that names anything but tensors (or, ``code_only``, that would run code); nothing is run."""
    foreign = foreign_globals(pickled)
    code = [g for g in foreign if g.split(".", 1)[0] in _CODE_MODULES]
    if code:
        raise WeightsError(
            f"weights file contains code to run on loading ({', '.join(code[:6])}). Refused: not loaded, nothing run.",
            where=name,
        )
    if foreign and not code_only:
        raise WeightsError(
            f"weights must hold tensors and plain values only, got foreign objects ({', '.join(foreign[:6])}). "
            "Refused, nothing in the file was run.",
            where=name,
            next_command=f"samgraft inspect {name} --save-tensors {Path(name).stem}.safetensors",
        )


def foreign_globals(pickled: bytes) -> list[str]:
    """Return the names in a pickle that are not part of how PyTorch stores tensors."""
    return sorted({name for name in pickle_globals(pickled) if not _is_plain(name)})


def _is_plain(name: str) -> bool:
    if name in _PLAIN_GLOBALS or name.startswith(_PLAIN_PREFIXES):
        return True
    module, _, attribute = name.rpartition(".")
    return module == "torch" and (
        attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype)
    )


def pickle_globals(pickled: bytes) -> Iterator[str]:
    """Yield the dotted names of all objects that a pickle would import, by reading its opcodes only."""
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
            elif opcode.name in {"MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"} and strings:
                memo[len(memo) if argument is None else int(str(argument))] = strings[-1]
            elif opcode.name in {"BINGET", "LONG_BINGET", "GET"} and int(str(argument)) in memo:
                strings.append(memo[int(str(argument))])
    except Exception as err:
        raise WeightsError("weights file is damaged: its table of names cannot be read.") from err


def _check_plan(plan: Any, record_bytes: list[int], *, name: str) -> None:
    tensors = list(iterate_tensors(plan))
    if len(tensors) > MAX_TENSORS:
        raise WeightsError(f"weights must hold at most {MAX_TENSORS} tensors, got {len(tensors)}.", where=name)
    available = max(record_bytes, default=0)
    for key, tensor in tensors:
        reach = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (reach + 1) * tensor.element_size() if tensor.numel() else 0
        if needed > available or tensor.numel() * tensor.element_size() > available:
            raise WeightsError(f"tensor {key} claims shape {list(tensor.shape)}, more than the file holds.", where=name)


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
        raise WeightsError(f"safetensors file cannot be read: {err}", where=path.name) from err


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _check_header(header: Any, data_bytes: int, *, name: str) -> dict[str, str]:
    if not isinstance(header, dict):
        raise WeightsError("safetensors header must be an object.", where=name)
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise WeightsError(f"weights must hold at most {MAX_TENSORS} tensors, got {len(header)}.", where=name)
    end = 0
    for key, entry in header.items():
        try:
            width, (start, stop) = _DTYPE_BYTES[entry["dtype"]], entry["data_offsets"]
            needed = math.prod(_size(n) for n in entry["shape"]) * width
        except (KeyError, TypeError, ValueError) as err:
            raise WeightsError(f"safetensors entry {key[:80]!r} is malformed.", where=name) from err
        if stop - start != needed or stop > data_bytes or start < 0:
            raise WeightsError(
                f"tensor {key[:80]} claims shape {entry['shape']}, and the file is incomplete or lies: it holds "
                f"{data_bytes} bytes of data.",
                where=name,
            )
        end = max(end, stop)
    if end != data_bytes:
        raise WeightsError(
            f"safetensors file must hold {end} bytes of data, got {data_bytes}: cut off or padded.", where=name
        )
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
