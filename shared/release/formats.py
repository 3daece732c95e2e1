"""The definition of a release format, and the formats ``sam`` and ``transformers``.

Every format writes files and names for each the client that must load it back (``clients.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samgraft.shared.errors import UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.release.subject import Subject
from samgraft.shared.weights.sam2_format import to_sam2
from samgraft.shared.weights.save import write_pth
from samgraft.shared.weights.transformers_format import save_transformers, save_transformers_encoder

SAM_NAMES = ("sam.safetensors", "sam.pth")
SAM2_FILE = "sam2.pt"
SAM2_NAMES = ("sam.safetensors", SAM2_FILE)
ENCODER_NAMES = ("encoder.safetensors", "encoder.pth")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A file or folder of a release, and the client that loads it back."""

    path: str
    """Path inside the release folder."""
    client: str
    """Key of ``clients.CLIENTS`` or of the clients of a stage."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the client. They must be values that JSON can express."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One file format of released weights."""

    name: str
    """Name in ``--format``."""
    why_not: Callable[[Subject], str | None]
    """Function that returns the reason why a model cannot have the format, or None if it can."""
    write: Callable[[Subject, Path], list[Artefact]]
    """Function that writes the files into a release folder."""


def choose_formats(
    formats: Sequence[Format], wanted: Sequence[str] | None, subject: Subject
) -> tuple[list[Format], list[str]]:
    """Return the formats to write, and a line for each that is left out.

    Args:
        formats: Every format of this stage. ``sam`` comes first and is always written.
        wanted: Names from ``--format``. None selects all that apply.
        subject: Weights to release.

    Raises:
        UsageError: If a name is unknown, or a format that was requested by name cannot be written.
    """
    known = {f.name: f for f in formats}
    if unknown := [name for name in wanted or () if name not in known]:
        raise UsageError(f"--format has an unknown name (got {', '.join(unknown)}, expected {', '.join(known)}).")
    chosen, lines = [], []
    for format_ in formats:
        if wanted is not None and format_.name not in wanted and format_.name != "sam":
            continue
        reason = format_.why_not(subject)
        if reason is None:
            chosen.append(format_)
        elif wanted is not None and format_.name in wanted:
            # A format that was requested by name must not be missing from the release without an error.
            raise UsageError(
                f"format {format_.name} cannot be written: {reason}",
                kept="the run; nothing was released",
                next_command=f"leave {format_.name} out of --format",
            )
        else:
            lines.append(f"{format_.name}: left out, {reason}")
    return chosen, lines


def _write_sam(subject: Subject, folder: Path) -> list[Artefact]:
    if subject.is_whole and subject.spec.decoder == "sam2":
        return _write_sam2(subject, folder)
    names = SAM_NAMES if subject.is_whole else ENCODER_NAMES
    write_tensors(folder / names[0], subject.tensors)
    # torch stores the file's name in the archive, so the file must get its final name at once.
    write_pth(folder / names[1], subject.tensors)
    statistics = {"pixel_mean": list(subject.spec.pixel_mean), "pixel_std": list(subject.spec.pixel_std)}
    return [Artefact(path=name, client="segment_anything", options=statistics) for name in names]


def _write_sam2(subject: Subject, folder: Path) -> list[Artefact]:
    """Write a whole SAM 2 under samgraft's names, and as the package ``sam2`` reads it."""
    tensors = {**subject.tensors, **subject.memory}
    write_tensors(folder / SAM2_NAMES[0], tensors)
    write_pth(folder / SAM2_NAMES[1], to_sam2(tensors), key="model")
    return [Artefact(path=name, client="sam2") for name in SAM2_NAMES]


def _why_not_transformers(subject: Subject) -> str | None:
    if "transformers" in subject.spec.release_formats:
        return None
    return f"transformers' SamModel cannot express {subject.spec.arch}; sam.safetensors contains it."


def _write_transformers(subject: Subject, folder: Path) -> list[Artefact]:
    save = save_transformers if subject.is_whole else save_transformers_encoder
    save(subject.tensors, folder / "transformers", subject.spec, image_size=subject.image_size)
    return [Artefact(path="transformers", client="transformers", options={"encoder": not subject.is_whole})]


SAM_FORMAT = Format(name="sam", why_not=lambda subject: None, write=_write_sam)
TRANSFORMERS_FORMAT = Format(name="transformers", why_not=_why_not_transformers, write=_write_transformers)
