"""A finished model that segments one scan at a time, from a path, a nibabel image or an array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import SpatialImage
from samgraft.finetune.prediction.predict import segment_examined
from samgraft.finetune.prediction.prediction_files import NativeMasks, write_nifti, write_seg_nrrd
from samgraft.finetune.prediction.prediction_inputs import find_inputs
from samgraft.finetune.prediction.predictor import OnSlices, Predictor
from samgraft.finetune.prompting.prompt_file import PromptFile, read_prompts, slice_prompts
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.files import move
from samgraft.shared.scans.case import SourceCase, note_unused_frame, read_case
from samgraft.shared.scans.orientation import affine_of_axes
from samgraft.shared.scans.readers.nifti import nifti_form_codes, scan_of_array, scan_of_image
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.volume import RawScan
from samgraft.shared.store.examine import BuildSettings, examine_scan

WRITERS = {".nii.gz": write_nifti, ".seg.nrrd": write_seg_nrrd}
"""Function that writes a segmentation, by the end of the file name."""


@dataclass(frozen=True, kw_only=True)
class ReadScan:
    """Scan in memory with its name for messages."""

    case: SourceCase
    raw: RawScan
    form_codes: tuple[int, int] = (1, 1)
    """NIfTI (qform_code, sform_code) of the scan's file, (1, 1) for other formats."""

    @classmethod
    def in_memory(cls, raw: RawScan, *, name: str) -> ReadScan:
        """Return a scan that was not read from a file."""
        # Nothing is read from these files. The checks need a name for their messages only.
        files = ScanFiles(format=ScanFormat.NIFTI, paths=(), name=name)
        return cls(case=SourceCase(name=name, patient_key=name, scan=files), raw=raw)


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Segmentation on the grid of the scan that was given."""

    masks: NativeMasks
    notes: tuple[str, ...]
    """Notes on how the scan and the prompts were read."""

    @property
    def labels(self) -> npt.NDArray[Any]:
        """Label ids on the axes of the scan. 0 is background, and overlapping classes are bits."""
        return self.masks.labels_ijk

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """Map from voxel (i, j, k) to RAS+ mm, 4x4."""
        return self.masks.affine

    @property
    def classes(self) -> dict[str, int]:
        """Label id of each class by name."""
        return dict(zip(self.masks.classes.names, self.masks.classes.ids, strict=True))

    @property
    def voxels(self) -> dict[str, int]:
        """Number of voxels of each class by name."""
        return self.masks.count_voxels()

    def save(self, path: Path | str) -> Path:
        """Write the segmentation as ``.nii.gz`` or ``.seg.nrrd``, replacing an earlier file.

        Raises:
            UsageError: If the name ends otherwise, or overlapping classes are written as ``.nii.gz``.
            StorageError: If the file cannot be written.
        """
        path = Path(path)
        end = next((end for end in WRITERS if path.name.endswith(end)), None)
        if end is None:
            raise UsageError(f"the name of a segmentation must end with {' or '.join(WRITERS)}, got {path.name!r}.")
        if end == ".nii.gz" and self.masks.classes.is_overlapping:
            raise UsageError("a NIfTI label map cannot contain overlapping classes. Save them as .seg.nrrd.")
        # An interrupted save must leave an earlier file as it was.
        draft = path.with_name(f".partial-{path.name}")
        try:
            WRITERS[end](draft, self.masks)
            move(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        return path


class LoadedModel:
    """Finished run or release that segments scans.

    Args:
        predictor: Model that segments volumes.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    @property
    def classes(self) -> dict[str, int]:
        """Label id of each class by name."""
        table = self.predictor.classes
        return dict(zip(table.names, table.ids, strict=True))

    @property
    def modality(self) -> str:
        """Modality of the training scans."""
        return self.predictor.modality.value

    def predict(
        self,
        scan: Any,
        *,
        spacing: Sequence[float] | None = None,
        axes: str | None = None,
        prompts: Path | str | None = None,
        frame: int | None = None,
        allow_gaps: bool = False,
        nan_policy: str = "refuse",
    ) -> Segmentation:
        """Segment one scan with the checks of ``samgraft predict``.

        Args:
            scan: Path of a scan file or DICOM series, a nibabel image, or a three-dimensional array in native units
                (Hounsfield units for CT).
            spacing: Size of a voxel in mm along each axis of an array.
            axes: Direction in which each axis of an array grows, such as ``RAS`` for nibabel's canonical order or
                ``SPL`` for SimpleITK's arrays of an axial scan.
            prompts: YAML or JSON file with boxes and points; None segments automatically.
            frame: Index of the volume of a 4D scan.
            allow_gaps: Accept missing DICOM slices.
            nan_policy: ``refuse``, or ``zero`` to replace NaN and Inf by 0.

        Raises:
            UsageError: If the arguments or prompts do not fit the scan or the model.
            DataError: If the scan is not one readable scan.
            NumericalError: If the model gives NaN or Inf.
        """
        # Brings zarr, which a loaded model without a scan does not need.
        from samgraft.shared.store.from_data import progress_bar

        if nan_policy not in ("refuse", "zero"):
            raise UsageError(f"nan_policy must be refuse or zero, got {nan_policy!r}.")
        self.predictor.check_mode(prompted=prompts is not None)
        read = _read(scan, spacing=spacing, axes=axes, frame=frame, allow_gaps=allow_gaps)
        file = read_prompts(Path(prompts), self.predictor.classes) if prompts is not None else None
        with progress_bar("segmenting") as on_slices:
            return segment_scan(
                self.predictor, read, prompts=file, zero_non_finite=nan_policy == "zero", on_slices=on_slices
            )


def segment_scan(
    predictor: Predictor,
    read: ReadScan,
    *,
    prompts: PromptFile | None = None,
    zero_non_finite: bool = False,
    on_slices: OnSlices | None = None,
) -> Segmentation:
    """Check a scan in memory and segment it.

    Args:
        predictor: Model.
        read: Scan with its name.
        prompts: Boxes and points; None segments automatically.
        zero_non_finite: Replace NaN and Inf by 0 instead of refusing them.
        on_slices: Called after every batch of slices.

    Raises:
        UsageError: If the prompts do not fit the scan or the model.
        DataError: If the scan does not pass the checks of ``samgraft predict``.
        NumericalError: If the model gives NaN or Inf.
    """
    predictor.check_mode(prompted=prompts is not None)
    build = BuildSettings(modality=predictor.modality, salt="", zero_non_finite=zero_non_finite, accept_burned_in=True)
    examined = examine_scan(read.raw, read.case, build)
    record, notes = examined.record, list(examined.record.notes)
    # Prompts are placed in the slices that the model sees, which are in another order than the file.
    placed = None
    if prompts is not None:
        file = prompts.with_scan_names([read.case.name])
        placed = slice_prompts(
            file.for_case(read.case.name),
            file.frame,
            native_affine=np.asarray(record.grid.affine, dtype=np.float64),
            affine=record.affine,
            shape_zyx=record.shape_zyx,
            on_note=notes.append,
        )
    masks = segment_examined(
        predictor,
        examined,
        name=read.case.name,
        prompts=placed,
        form_codes=read.form_codes,
        on_slices=on_slices,
    )
    return Segmentation(masks=masks, notes=tuple(notes))


def _read(
    scan: Any, *, spacing: Sequence[float] | None, axes: str | None, frame: int | None, allow_gaps: bool
) -> ReadScan:
    is_array = isinstance(scan, np.ndarray)
    if not is_array and (spacing is not None or axes is not None):
        raise UsageError("spacing and axes describe an array, other scans have their own. Leave them out.")
    if isinstance(scan, str | Path):
        return read_one_scan(Path(scan), frame=frame, allow_gaps=allow_gaps)
    name = "the array" if is_array else "the image"
    if is_array:
        if axes is None or spacing is None:
            raise UsageError(
                "an array has no orientation of its own. Give spacing=(mm, mm, mm) and axes, the direction in which "
                'each axis grows, e.g. axes="RAS".'
            )
        raw = scan_of_array(scan, affine_of_axes(axes, spacing), where=name, frame=frame)
    elif isinstance(scan, SpatialImage):
        raw = scan_of_image(scan, where=name, frame=frame)
    else:
        raise UsageError(f"a scan must be a path, a nibabel image or an array, got {type(scan).__name__}.")
    return ReadScan.in_memory(note_unused_frame(raw, frame), name=name)


def read_one_scan(path: Path, *, frame: int | None = None, allow_gaps: bool = False) -> ReadScan:
    """Read the only scan of a file or folder.

    Raises:
        DataError: If there is no scan, there are several, or it cannot be read.
    """
    if not path.exists():
        raise DataError("the scan does not exist.", where=path.name)
    scans = find_inputs(path, frame=frame, allow_gaps=allow_gaps).scans
    if len(scans) != 1:
        raise DataError(
            f"a path must contain one scan, got {len(scans)}. Give the path of one, or use samgraft predict for a "
            "folder.",
            where=path.name,
        )
    case = scans[0].case
    # Viewers place a NIfTI file by its codes, so that the mask needs those of its scan.
    is_nifti = case.scan.format == ScanFormat.NIFTI
    codes = nifti_form_codes(case.scan.paths[0], where=case.scan.name) if is_nifti else (1, 1)
    return ReadScan(case=case, raw=read_case(case), form_codes=codes)
