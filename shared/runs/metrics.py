"""Metrics of every step in ``metrics.jsonl`` and in TensorBoard event files.

Both are in step order, without a gap or a duplicate step after a resume.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import struct
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from samgraft.shared.files import move, write_text
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger(__name__)

TORN_CHUNK_BYTES = 1 << 16
"""Size in bytes of the pieces in which the end of the last complete line is searched."""


class MetricsLog:
    """Append-only file with one line per step.

    A line is ``{"step": N, ...}``, in which floats keep every bit.

    A log that cannot be written (disk full) causes one warning and does not end the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False
        self._last: dict[str, Any] | None = None
        """Last line that ``truncate_after`` kept. The next write may replace it."""

    def append(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one line."""
        self.append_many([{"step": step, **values}])

    def append_many(self, lines: list[dict[str, Any]]) -> None:
        """Append several lines in one write.

        The first line replaces the line of the same step that ``truncate_after`` kept.
        """
        if not lines:
            return
        last, self._last = self._last, None
        try:
            if last is not None and lines[0]["step"] == last["step"]:
                # The whole file is rewritten only if an interrupted task has added values to its last line.
                if _text(lines[:1]) != _text([last]):
                    before = [line for line in self.read() if line["step"] < last["step"]]
                    write_text(self.path, _text([*before, lines[0]]))
                lines = lines[1:]
            with self.path.open("a+b") as file:
                _cut_torn_end(file)
                file.write(_text(lines).encode())
        except OSError as err:
            if not self._warned:
                log.warning("%s cannot be written (%s): training continues without it.", self.path.name, err.strerror)
            self._warned = True

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the lines, without a last line that was cut off by a kill."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line

    def truncate_after(self, step: int) -> dict[str, Any] | None:
        """Delete the lines of steps after ``step``, which are written again.

        Returns:
            The line of ``step``, if there is one. It stays in the file until the next write replaces it.
        """
        if not self.path.exists():
            return None
        lines = [line for line in self.read() if line["step"] <= step]
        write_text(self.path, _text(lines))
        # It is not removed here, because a kill may come before it is written again.
        self._last = next((line for line in lines if line["step"] == step), None)
        return self._last


def curves_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, array[float]]:
    """Return the values of every metric of some lines, in the order of the lines."""
    curves: dict[str, array[float]] = {}
    add_to_curves(curves, lines)
    return curves


def add_to_curves(curves: dict[str, array[float]], lines: Iterable[Mapping[str, Any]]) -> None:
    """Append the values of further lines to curves."""
    for line in lines:
        for name, value in line.items():
            if name != "step":
                curves.setdefault(name, array("d")).append(float(value))


def _text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _cut_torn_end(file: BinaryIO) -> None:
    """Remove an incomplete last line, e.g. after a full disk."""
    # Otherwise the next line would continue it, and both would be unreadable.
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - TORN_CHUNK_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


FILE_NAME = re.compile(r"^events\.out\.tfevents\.(\d{10})\.samgraft$")


class TensorBoardFile:
    """Writer of scalars and images for TensorBoard.

    A resumed run rewrites the earlier events without the steps that are computed again. A folder that cannot be written
    causes one warning and does not end the run.
    """

    # The library's own writer puts host name and process id into the file name, and only marks repeated steps.

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: io.BufferedWriter | None = None
        self._records: RecordWriter | None = None
        self._warned = False

    def start(self, *, after_step: int) -> None:
        """Open a new file with the events of earlier sessions up to ``after_step``."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            older = sorted(p for p in self.folder.iterdir() if FILE_NAME.match(p.name))
            number = int(FILE_NAME.match(older[-1].name)[1]) + 1 if older else 1  # type: ignore[index]
            # A running TensorBoard continues with the file whose name sorts last.
            path = self.folder / f"events.out.tfevents.{number:010d}.samgraft"
            draft = path.with_name(f".{path.name}.tmp")
            self._file = draft.open("wb")
            self._records = RecordWriter(self._file)
            self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            for old in older:
                for event in _read_events(old):
                    if event.HasField("summary") and event.step <= after_step:
                        self._records.write(event.SerializeToString())
            # A kill before this rename leaves the older files as they were.
            self._records.flush()
            move(draft, path)
            for old in older:
                old.unlink()
        except OSError as err:
            self._give_up(err)

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of one step."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=float(v)) for tag, v in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def add_image(self, step: int, tag: str, image_HWC: npt.NDArray[np.uint8]) -> None:
        """Write one image, (H, W, 3) or (H, W) in 0..255."""
        buffer = io.BytesIO()
        Image.fromarray(image_HWC).save(buffer, format="PNG")
        content = Summary.Image(
            height=image_HWC.shape[0],
            width=image_HWC.shape[1],
            colorspace=3 if image_HWC.ndim == 3 else 1,
            encoded_image_string=buffer.getvalue(),
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=content)])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Write everything to the operating system."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as err:
                self._give_up(err)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._file is not None:
            self._file.close()
        self._file = self._records = None

    def _write(self, event: Event) -> None:
        if self._records is None:
            return
        try:
            self._records.write(event.SerializeToString())
        except OSError as err:
            self._give_up(err)

    def _give_up(self, err: OSError) -> None:
        if not self._warned:
            log.warning("TensorBoard events cannot be written (%s): training continues without them.", err.strerror)
        self._warned = True
        self._file = self._records = None


def _read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a file up to the place where a kill cut it off."""
    data = path.read_bytes()
    # A record has 8 bytes of length, 4 of checksum, the event and 4 of checksum.
    position = 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        end = position + 12 + length
        if end + 4 > len(data):
            return
        yield Event.FromString(data[position + 12 : end])
        position = end + 4
