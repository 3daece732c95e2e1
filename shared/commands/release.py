"""The command ``samgraft release``, which writes checked weights with card and checksums."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from samgraft.shared.cli import Command, keywords
from samgraft.shared.errors import ExitCode, UsageError
from samgraft.shared.runs.other_folder import MODEL_RESULT, refuse_other_folder
from samgraft.shared.runs.result import ENCODER_FILE

log = logging.getLogger(__name__)

FORMATS = ("sam", "transformers", "peft", "onnx", "monai")
RESULT_OF_STAGE = {"model": MODEL_RESULT, "encoder": ENCODER_FILE}
"""File of a finished run, by the entry point that releases it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run of stage 1 (encoder) or stage 2 (model)")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--license", metavar="LICENCE", help="licence of the release, e.g. cc-by-4.0; there is no default"
    )
    parser.add_argument(
        "--format",
        dest="formats",
        help=f"comma-separated list of {', '.join(FORMATS)}; default all that apply (sam is always written)",
    )
    parser.add_argument(
        "--data-statement",
        metavar="STATEMENT",
        help="a sentence for the card on origin, consent and de-identification of the scans",
    )
    parser.add_argument(
        "--known-identifiers",
        type=Path,
        help="text file with one original id or name per line, none of which may occur in the release",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the finished release to this repository of the Hugging Face Hub (a new one is private)",
    )
    parser.add_argument(
        "--force", action="store_true", help="release a model that segments hardly anything or did not improve"
    )
    parser.add_argument(
        "--continuable",
        action="store_true",
        help="stage 1: add decoder, teacher and optimizer, so that others can continue; prints a membership audit",
    )


@dataclass(frozen=True, kw_only=True)
class ReleaseResult:
    """Checked release of a run."""

    path: Path
    """Folder of the release."""
    files: tuple[str, ...]
    """Files and folders that were loaded back with equal outputs."""
    left_out: tuple[str, ...]
    """One line per format that does not apply, with the reason."""

    @property
    def report(self) -> Path:
        """Path of the card that people read."""
        return self.path / "README.md"


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    release(**keywords(arguments))
    return int(ExitCode.OK)


def release(
    run: Path | str,
    *,
    out: Path | str,
    license: str | None = None,
    formats: Sequence[str] | str | None = None,
    data_statement: str | None = None,
    known_identifiers: Path | str | None = None,
    push: str | None = None,
    force: bool = False,
    continuable: bool = False,
) -> ReleaseResult:
    """Write checked weights with card and checksums from a finished run of either stage.

    Args:
        run: Finished run of stage 1 (encoder) or stage 2 (model).
        out: Folder to create.
        license: Licence of the release, such as ``cc-by-4.0``. There is no default.
        formats: Formats, as a list or separated by commas; None writes all that apply.
        data_statement: Sentence for the card on origin, consent and de-identification of the scans.
        known_identifiers: Text file with one original id or name per line, none of which may occur in the release.
        push: Repository ``OWNER/NAME`` of the Hugging Face Hub to upload to; a new one is private.
        force: Release a model that segments hardly anything or did not improve.
        continuable: Add decoder, teacher and optimizer of stage 1, so that others can continue.

    Raises:
        SamgraftError: If the run is not finished, a file does not load back, or the privacy gate finds anything.
    """
    from samgraft.shared.release.push import check_repository, push_release
    from samgraft.shared.release.request import Released, ReleaseRequest

    path, folder = Path(run), Path(out)
    if push:
        check_repository(push)
    request = ReleaseRequest(
        run=path,
        out=folder,
        licence=license,
        formats=_names(formats) if isinstance(formats, str) else tuple(formats) if formats else None,
        statement=data_statement,
        identifiers=_identifiers(Path(known_identifiers) if known_identifiers else None),
        continuable=continuable,
        force=force,
    )
    released: Released = _releaser(path)(request)
    for file in released.checked:
        outputs = ", ".join(file.outputs)
        log.info("%s: loaded back by %s; %s differ by %.1e", file.path, file.loaded_by, outputs, file.max_difference)
    for line in released.left_out:
        log.info("%s", line)
    log.info("privacy gate: every byte searched, nothing found")
    log.info("released: %s (sha256sum -c SHA256SUMS verifies it)", folder)
    log.info("  next     samgraft inspect %s", shlex.quote(str(folder)))
    if push:
        log.info("uploaded: %s", push_release(folder, push))
    # Without the tensors and reports of the check, which nobody needs after it has passed.
    return ReleaseResult(
        path=folder, files=tuple(file.path for file in released.checked), left_out=tuple(released.left_out)
    )


def _releaser(path: Path) -> Any:
    """Return the release function of the stage that the run folder belongs to."""
    for stage, result in RESULT_OF_STAGE.items():
        if (path / result).is_file():
            [point] = entry_points(group="samgraft.releases", name=stage)
            return point.load()
    raise refuse_other_folder(path, expected="a finished run")


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else None


def _identifiers(path: Path | None) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"--known-identifiers must be a text file that can be read ({reason}).", where=str(path)
        ) from err
    identifiers = tuple(line.strip() for line in lines if line.strip())
    if path and not identifiers:
        raise UsageError("--known-identifiers must list one id or name per line, the file is empty.", where=str(path))
    return identifiers


COMMAND = Command(help="checked weights, card and checksums from a run", add_arguments=add_arguments, run=run)
