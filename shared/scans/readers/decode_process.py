"""Compressed DICOM pixels, decoded in a separate process with limits.

Decoders are C code, and crafted files have crashed them. The process has a memory limit, writes no file, is killed when
it takes too long, and ends with its parent. One process serves all files of its parent; after a crash the next file
gets a new one.

``python -m samgraft.shared.scans.readers.decode_process`` runs that process. It reads requests from its input (8 bytes
of length, then a DICOM file) and writes to its output (status, 8 bytes of length, then pixels or a message).

Source: security reports on GDCM's RLE and fragment code and on OpenJPEG, in which opening a file was enough.
"""

# concurrent.futures.ProcessPoolExecutor does not give these guarantees. It cannot end a worker that hangs, one crash
# breaks the whole pool, and it unpickles what the worker returns, which gives code that took over a decoder a way into
# this process. The messages below hold a JSON header and raw numbers, which can be checked.

from __future__ import annotations

import atexit
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

MAX_MEMORY_BYTES = 8 * 2**30
MAX_PIXEL_BYTES = 2 * 2**30
"""Limit of the decoded pixels of one file. A whole-body CT of 2,000 slices needs half of it."""
TIMEOUT_S = 120.0
"""Time limit per file, in seconds. A 2 GiB multi-frame file takes a third of it."""
COMMAND = (sys.executable, "-m", "samgraft.shared.scans.readers.decode_process")
_LENGTH = struct.Struct("<Q")
_OK, _FAILED = b"+", b"-"


class DecoderError(Exception):
    """Failure of a decoder, with a message for the user."""


class DecodeProcess:
    """Decoder that may crash, hang or allocate without harm to its owner. It is not thread-safe."""

    def __init__(self, command: Sequence[str] = COMMAND, *, timeout_s: float = TIMEOUT_S) -> None:
        self._command = list(command)
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes) -> npt.NDArray[Any]:
        """Return the pixels of a DICOM file, in the form of pydicom's ``pixel_array``.

        Raises:
            DecoderError: If they cannot be decoded, the decoder crashed or took too long.
        """
        process = self._running()
        assert process.stdin is not None
        deadline = time.monotonic() + self._timeout_s
        try:
            process.stdin.write(_LENGTH.pack(len(data)))
            process.stdin.write(data)
            process.stdin.flush()
            status = self._receive(1, deadline)
            (size,) = _LENGTH.unpack(self._receive(_LENGTH.size, deadline))
            if size > MAX_PIXEL_BYTES + 4096:
                raise DecoderError("the decoder returned more pixels than the limit")
            reply = self._receive(size, deadline)
        except (OSError, DecoderError) as err:
            self.close()
            if isinstance(err, DecoderError):
                raise
            raise DecoderError(self._exit_text(process)) from err
        if status != _OK:
            raise DecoderError(reply.decode("utf-8", "replace"))
        return _unpack(reply)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # the rest of a request that could not be sent
                pass

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        return self._process

    def _receive(self, size: int, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        parts: list[bytes] = []
        while size > 0:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise DecoderError(f"the decoder took longer than {self._timeout_s:g} s and was ended")
            part = os.read(descriptor, min(size, 1 << 20))
            if not part:
                raise DecoderError(self._exit_text(self._process))
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    @staticmethod
    def _exit_text(process: subprocess.Popen[bytes]) -> str:
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder stopped responding"
        return f"the decoder crashed ({f'signal {-code}' if code < 0 else f'exit code {code}'})"


_shared: DecodeProcess | None = None


def shared_process() -> DecodeProcess:
    """Return the decoder of this process, and start it at the first use."""
    global _shared
    if _shared is None:
        _shared = DecodeProcess()
        atexit.register(_shared.close)
    return _shared


def _unpack(reply: bytes) -> npt.NDArray[Any]:
    """Check and convert the decoder's output, because a crafted file may have taken over the process."""
    try:
        head, _, body = reply.partition(b"\n")
        about = json.loads(head)
        dtype, shape = np.dtype(str(about["dtype"])), tuple(int(n) for n in about["shape"])
        if dtype.kind not in "iufb" or min(shape, default=0) < 1:
            raise ValueError("pixels must be numbers")
        return np.frombuffer(body, dtype=dtype).reshape(shape).copy()
    except (ValueError, KeyError, TypeError) as err:
        raise DecoderError("the decoder's output is not a picture") from err


def _serve() -> None:
    requests, output = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Decoders print to stdout and stderr; their text must not get between the pixels.
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import pydicom.pixels.decoders  # before the limits, because it maps large libraries  # noqa: F401

    _limit()
    while len(head := requests.read(_LENGTH.size)) == _LENGTH.size:
        (size,) = _LENGTH.unpack(head)
        _decode_one(requests.read(size), output)


def _decode_one(data: bytes, output: IO[bytes]) -> None:
    import io
    import warnings

    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = np.ascontiguousarray(pydicom.dcmread(io.BytesIO(data)).pixel_array)
        head = json.dumps({"dtype": pixels.dtype.str, "shape": pixels.shape}).encode() + b"\n"
        parts: list[Any] = [_OK, _LENGTH.pack(len(head) + pixels.nbytes), head, pixels.data.cast("B")]
    except MemoryError:
        message = f"it needs more than {MAX_MEMORY_BYTES // 2**30} GiB of memory".encode()
        parts = [_FAILED, _LENGTH.pack(len(message)), message]
    except Exception as err:  # decoders raise many types; each means that the file cannot be used
        message = (str(err).splitlines() or [type(err).__name__])[0].encode()
        parts = [_FAILED, _LENGTH.pack(len(message)), message]
    for part in parts:
        output.write(part)
    output.flush()


def _limit() -> None:
    import resource

    for kind, limit in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (ValueError, OSError):  # not every system has every limit; the parent's time limit remains
            continue


if __name__ == "__main__":
    _serve()
