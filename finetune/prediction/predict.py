"""Prediction of masks for a list of scans, in the scans' own geometry.

Finished scans are verified and skipped. Results of a scan appear when all of them are written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.inference import check_planes
from samgraft.finetune.prediction.dicom_seg_file import write_dicom_seg
from samgraft.finetune.prediction.prediction_files import (
    LABEL_LIST,
    NativeMasks,
    write_label_list,
    write_nifti,
    write_seg_nrrd,
)
from samgraft.finetune.prediction.prediction_inputs import InputScan, make_unique
from samgraft.finetune.prediction.predictor import OnSlices, Predictor
from samgraft.finetune.prompting.prompt_file import PromptFile, SlicePrompt, slice_prompts
from samgraft.shared.errors import DataError, SamgraftError, StorageError
from samgraft.shared.files import file_sha256, move, write_text
from samgraft.shared.scans.orientation import to_native
from samgraft.shared.scans.readers.nifti import nifti_form_codes
from samgraft.shared.scans.readers.scan import ScanFormat
from samgraft.shared.store.examine import BuildSettings, Examined, examine_case

log = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the record next to the masks of a scan."""
ENDINGS = {"nifti": ".nii.gz", "nrrd": ".seg.nrrd", "dicom-seg": ".dcm"}
"""End of the file name by format."""


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Settings that change the files of a mask."""

    formats: tuple[str, ...] = ("nifti", "nrrd", "dicom-seg")
    """Formats among ``ENDINGS``. For dicom-seg the input must be DICOM."""
    zero_non_finite: bool = False
    """True replaces NaN and Inf by 0 instead of refusing them."""


@dataclass(kw_only=True)
class PredictReport:
    """Result of every scan, by name."""

    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Scans finished before, with equal scan, model and settings and all files intact."""
    unprompted: list[str] = field(default_factory=list)
    """Scans without a prompt in the prompts file."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reason of every scan that could not be segmented."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of segmented scans by the reader's notes on them."""


class _FileInTheWay(StorageError):
    """File with the name of a result that another program or person wrote."""


class ScanProgress(Protocol):
    """Display of progress on the command line."""

    def begin(self, number: int, total: int, name: str) -> OnSlices | None:
        """Show that a scan begins and return a callback for its slices."""

    def end(self, name: str, text: str) -> None:
        """Show the result of a scan."""


def predict_scans(
    predictor: Predictor,
    scans: Sequence[InputScan],
    out: Path,
    *,
    settings: PredictSettings,
    prompts: PromptFile | None = None,
    progress: ScanProgress | None = None,
) -> PredictReport:
    """Segment scans one by one into a folder.

    A scan that cannot be segmented is reported and the next one follows.

    Args:
        predictor: Model.
        scans: Scans from ``find_inputs``.
        out: Folder for the results. Files that this command did not write are never overwritten.
        settings: Formats and the treatment of NaN and Inf.
        prompts: Prompts; None segments automatically.
        progress: Display of progress.

    Raises:
        UsageError: If the prompts do not fit the scans.
        StorageError: If a file would be overwritten that this command did not write, or cannot be written.
    """
    if prompts is not None:
        prompts = prompts.with_scan_names([scan.name for scan in scans])
    if out.exists() and not out.is_dir():
        raise StorageError("--out must be a folder, got a file.", where=out.name, kept="that file")
    out.mkdir(parents=True, exist_ok=True)
    report = PredictReport()
    if not predictor.classes.is_overlapping:
        _write_label_list(out, predictor)
    for number, scan in enumerate(scans, start=1):
        if prompts is not None and not prompts.for_case(scan.name):
            report.unprompted.append(scan.name)
            continue
        on_slices = progress.begin(number, len(scans), scan.name) if progress else None
        start = time.monotonic()
        try:
            record = _predict_one(predictor, scan, out, settings, prompts, on_slices)
        except SamgraftError as error:
            if not _concerns_one_scan(error) or len(scans) == 1:
                raise
            report.refused[scan.name] = error.what
            text = f"refused: {error.what}"
        else:
            (report.written if record else report.skipped).append(scan.name)
            text = "finished before, verified"
            if record is not None:
                report.notes.update(record["notes"])
                counts = ", ".join(f"{name} {voxels}" for name, voxels in record["voxels"].items())
                text = f"voxels {counts}; {time.monotonic() - start:.1f} s"
        if progress:
            progress.end(scan.name, text)
    return report


def _predict_one(
    predictor: Predictor,
    scan: InputScan,
    out: Path,
    settings: PredictSettings,
    prompts: PromptFile | None,
    on_slices: OnSlices | None,
) -> dict[str, Any] | None:
    """Segment a scan and return its record, or None if it was finished before."""
    build = BuildSettings(
        modality=predictor.modality, salt="", zero_non_finite=settings.zero_non_finite, accept_burned_in=True
    )
    # The checks of `store build` on geometry, missing slices and values apply here too. Burned-in text is accepted,
    # because only masks are written.
    examined = examine_case(scan.case, build)
    stem = out / scan.out_stem
    formats = [name for name in settings.formats if name != "dicom-seg" or scan.is_dicom]
    names = file_names(stem.name, formats, predictor.classes)
    expected = _identity(predictor, examined, settings, prompts, formats, scan.case.scan.frame)
    if is_finished(stem, expected):
        return None
    _refuse_to_overwrite(stem, names)
    record = examined.record
    notes = list(record.notes)
    placed = _slice_prompts(prompts, scan, examined, notes)
    masks = segment_examined(
        predictor,
        examined,
        name=scan.name,
        prompts=placed,
        form_codes=_form_codes(scan),
        on_slices=on_slices,
    )
    values = {**expected, "input": scan.name, "voxels": masks.count_voxels(), "notes": notes}
    with _written_together(stem) as folder:
        for name in formats:
            _write(name, folder, stem.name, masks, scan, predictor, prompted=prompts is not None)
        files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        text = json.dumps({**values, "files": files}, indent=2, sort_keys=True) + "\n"
        # The record marks a finished scan, so it is moved last.
        _record_path(folder / stem.name).write_text(text, encoding="utf-8")
    return values


def segment_examined(
    predictor: Predictor,
    examined: Examined,
    *,
    name: str,
    prompts: Sequence[SlicePrompt] | None = None,
    form_codes: tuple[int, int] = (1, 1),
    on_slices: OnSlices | None = None,
) -> NativeMasks:
    """Segment a scan that passed its checks, on the scan's own grid.

    Raises:
        DataError: If the model segments in several planes and the scan has only one.
    """
    record = examined.record
    if prompts is None:
        check_planes(record, predictor.model.task.inference(), name=name)
    labels_zyx = predictor(examined.images[record.plane], prompts=prompts, stats=record.stats, on_slices=on_slices)
    return NativeMasks(
        labels_ijk=to_native(labels_zyx, record.grid, record.plane),
        affine=np.asarray(record.grid.affine, dtype=np.float64),
        classes=predictor.classes,
        form_codes=form_codes,
    )


def _form_codes(scan: InputScan) -> tuple[int, int]:
    files = scan.case.scan
    return nifti_form_codes(files.paths[0], where=files.name) if files.format == ScanFormat.NIFTI else (1, 1)


def is_finished(stem: Path, expected: dict[str, Any]) -> bool:
    """Return True if a scan's masks exist, are intact, and were made from equal scan, model and settings."""
    try:
        record = json.loads(_record_path(stem).read_text(encoding="utf-8"))
        files = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # A scan is repeated when anything that its masks depend on has changed, above all the weights under an old name.
    if any(record.get(key) != value for key, value in expected.items()):
        return False
    paths = {stem.with_name(name): digest for name, digest in files.items()}
    return all(path.is_file() and file_sha256(path) == digest for path, digest in paths.items())


def _identity(
    predictor: Predictor,
    examined: Examined,
    settings: PredictSettings,
    prompts: PromptFile | None,
    formats: Sequence[str],
    frame: int | None,
) -> dict[str, Any]:
    """Return everything that the masks depend on."""
    return {
        "schema": SCHEMA,
        "source_sha256": examined.record.source_sha256,
        "weights_sha256": predictor.model.card.weights_sha256,
        "class_ids": list(predictor.classes.ids),
        "class_names": list(predictor.classes.names),
        "precision": "bf16" if predictor.is_bf16 else "fp32",
        "flips": predictor.flips,
        "postprocessing": {str(label): steps for label, steps in predictor.postprocessing.steps.items()},
        "zero_non_finite": settings.zero_non_finite,
        "prompts_sha256": prompts.sha256 if prompts else None,
        "formats": list(formats),
        # The file is the same for all its volumes.
        **({} if frame is None else {"frame": frame}),
    }


def _slice_prompts(
    prompts: PromptFile | None, scan: InputScan, examined: Examined, notes: list[str]
) -> list[SlicePrompt] | None:
    if prompts is None:
        return None

    def add_note(text: str) -> None:
        notes.append(text)
        log.warning("%s: %s", scan.name, text)

    record = examined.record
    return slice_prompts(
        prompts.for_case(scan.name),
        prompts.frame,
        native_affine=np.asarray(record.grid.affine, dtype=np.float64),
        affine=record.affine,
        shape_zyx=record.shape_zyx,
        on_note=add_note,
    )


def file_names(stem: str, formats: Sequence[str], classes: ClassTable) -> list[str]:
    """Return the names of a scan's files, with a NIfTI file for each overlapping class."""
    names = []
    for name in formats:
        parts = [""]
        if name == "nifti" and classes.is_overlapping:
            # "tumour core" and "tumour-core" would have one name, and the second mask would replace the first.
            slugs = [re.sub(r"[^\w]+", "_", one).strip("_") or "class" for one in classes.names]
            parts = [f"-{slug}" for slug in make_unique(slugs)]
        names += [f"{stem}{part}{ENDINGS[name]}" for part in parts]
    return names


def _write(
    name: str, folder: Path, stem: str, masks: NativeMasks, scan: InputScan, predictor: Predictor, *, prompted: bool
) -> None:
    names = file_names(stem, [name], masks.classes)
    if name == "nifti" and masks.classes.is_overlapping:
        for channel, one in enumerate(names):
            write_nifti(folder / one, masks.single(channel))
    elif name == "nifti":
        write_nifti(folder / names[0], masks)
    elif name == "nrrd":
        write_seg_nrrd(folder / names[0], masks)
    else:
        write_dicom_seg(
            folder / names[0],
            masks,
            scan.case.scan.paths,
            model_name=model_name(predictor.model.folder),
            weights_sha256=predictor.model.card.weights_sha256 or "",
            prompted=prompted,
        )


def model_name(folder: Path) -> str:
    """Return the name of a run or release."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


@contextmanager
def _written_together(stem: Path) -> Iterator[Path]:
    """Yield a folder whose files are moved to their places when all are written, the record last."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    folder = stem.with_name(f".{hashlib.sha256(stem.name.encode()).hexdigest()[:12]}.partial-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        record = _record_path(folder / stem.name)
        # This record without hashes marks the files as written by this command, in case the moves are interrupted.
        # The scan does not count as finished then, and its files may be overwritten.
        write_text(_record_path(stem), json.dumps({"schema": SCHEMA, "unfinished": True}) + "\n")
        for path in sorted(folder.iterdir(), key=lambda path: path == record):
            move(path, stem.with_name(path.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _record_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.samgraft.json")


def _refuse_to_overwrite(stem: Path, names: Sequence[str]) -> None:
    # A file that this command did not write may be a manual segmentation.
    if _record_path(stem).is_file():
        return
    for path in (stem.with_name(name) for name in names):
        if path.exists():
            raise _FileInTheWay(
                "a file of this name exists and was not written by `samgraft predict`. Choose another --out.",
                where=path.name,
                kept="that file",
            )


def _write_label_list(out: Path, predictor: Predictor) -> None:
    draft = out / f".{LABEL_LIST}.{os.getpid()}"  # several processes may predict into one folder
    write_label_list(draft, predictor.classes)
    move(draft, out / LABEL_LIST)


def _concerns_one_scan(error: SamgraftError) -> bool:
    """Return True for errors that other scans do not have, unlike a full disk or a stop."""
    return isinstance(error, DataError | _FileInTheWay)
