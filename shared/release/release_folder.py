"""A release folder: written beside its place, loaded back, searched, summed, and only then given its name."""

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
    """What goes into a folder beside the formats."""

    subject: Subject
    formats: Sequence[Format]
    write_texts: Callable[[Path, Sequence[Artefact]], None]
    """Writes card.json, README.md and the like, after the formats: it may hash their files."""
    clients_module: str
    """Module whose ``main`` loads the artefacts back."""
    identifiers: Collection[str] = ()
    """Strings that must occur nowhere, such as pseudonyms of patients."""
    extra_outputs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    """Given the probe, further expected outputs for a stage's own clients."""


def build_release(out: Path, contents: Contents) -> list[Checked]:
    """Write a release; it appears whole, checked and clean, or not at all.

    Raises:
        StorageError: If ``out`` exists.
        WeightsError: If an artefact does not load back with equal outputs.
        DataError: If the privacy gate finds anything.
    """
    refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        artefacts: list[Artefact] = []
        for format_ in contents.formats:
            log.info("writing %s ...", format_.name)
            artefacts += format_.write(contents.subject, partial)
        contents.write_texts(partial, artefacts)
        log.info("loading %d artefacts back in a fresh process ...", len(artefacts))
        checked = _check(partial, artefacts, contents)
        refuse_findings(scan_folder(partial, known=contents.identifiers))
        write_checksums(partial)
        move(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checked


def refuse_existing(out: Path) -> None:
    """Refuse a folder that is there already, before anything costly is done."""
    if out.exists():
        raise StorageError("the release folder must not exist yet.", where=out.name, kept="what is in it")


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS`` over every file, as ``sha256sum -c`` reads it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _check(partial: Path, artefacts: Sequence[Artefact], contents: Contents) -> list[Checked]:
    probe = make_probe(contents.subject)
    expected = expected_outputs(contents.subject, probe)
    if contents.extra_outputs is not None:
        expected |= contents.extra_outputs(probe)
    return load_back(partial, artefacts, probe=probe, expected=expected, module=contents.clients_module)
