"""Atomic writing of a release folder, with load-back check, privacy gate and checksums."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samgraft.shared.errors import StorageError
from samgraft.shared.files import file_sha256, move
from samgraft.shared.release.formats import Artefact, Format
from samgraft.shared.release.load_back import Checked, load_back
from samgraft.shared.release.privacy import refuse_findings, scan_folder
from samgraft.shared.release.subject import Subject, expected_outputs, make_probe
from torch import Tensor

log = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Content of a release folder and how it is checked."""

    subject: Subject
    formats: Sequence[Format]
    write_texts: Callable[[Path, Sequence[Artefact]], None]
    """Function that writes card.json, README.md and similar files. It runs last, so it may hash the weights."""
    clients_module: str
    """Module that is run in a fresh process to load the artefacts back."""
    identifiers: Collection[str] = ()
    """Strings that must not occur in any file, such as pseudonyms of patients."""
    extra_outputs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    """Function from the probe to further expected outputs, for the clients of one stage."""


def build_release(out: Path, contents: Contents) -> list[Checked]:
    """Write and check a release atomically.

    Raises:
        StorageError: If ``out`` exists.
        WeightsError: If an artefact does not load back with equal outputs.
        DataError: If the privacy gate finds anything.
    """
    refuse_existing(out)
    # Every step works in a hidden folder, so that a failure or a crash never leaves an unchecked release.
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        artefacts: list[Artefact] = []
        for number, format_ in enumerate(contents.formats, start=1):
            log.info("writing %s (%d of %d) ...", format_.name, number, len(contents.formats))
            artefacts += format_.write(contents.subject, partial)
        contents.write_texts(partial, artefacts)
        log.info("loading %d files and folders back in a fresh process ...", len(artefacts))
        checked = _check(partial, artefacts, contents)
        refuse_findings(scan_folder(partial, known=contents.identifiers))
        # Last, because the checksums cover every other file.
        write_checksums(partial)
        move(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checked


def refuse_existing(out: Path) -> None:
    """Refuse an output folder that already exists.

    Raises:
        StorageError: If it exists.
    """
    if out.exists():
        raise StorageError(
            "the release folder already exists. Choose another --out or remove it.", where=out.name, kept="its files"
        )


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS`` of every file for ``sha256sum -c``."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _check(partial: Path, artefacts: Sequence[Artefact], contents: Contents) -> list[Checked]:
    probe = make_probe(contents.subject)
    expected = expected_outputs(contents.subject, probe)
    if contents.extra_outputs is not None:
        expected |= contents.extra_outputs(probe)
    return load_back(partial, artefacts, probe=probe, expected=expected, module=contents.clients_module)
