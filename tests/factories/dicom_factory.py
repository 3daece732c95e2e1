"""Synthetic DICOM files for tests, as classic series, enhanced multi-frame files and segmentations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR_CLASS = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
SEG_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"
AXIAL = [1, 0, 0, 0, 1, 0]


def new_dataset(*, sop_class=MR_CLASS, **tags) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    ds.PatientID, ds.Modality = "P1", "MR"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    ds.PatientIdentityRemoved = "YES"
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def set_pixels(ds: FileDataset, pixels: np.ndarray, *, photometric="MONOCHROME2", bits=16) -> None:
    color = photometric in ("RGB", "YBR_FULL")
    frames = pixels.ndim - (1 if color else 0) == 3
    ds.Rows, ds.Columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    if frames:
        ds.NumberOfFrames = len(pixels)
    ds.SamplesPerPixel = 3 if color else 1
    if color:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    ds.BitsStored = min(bits, ds.BitsAllocated)
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes() + (b"\0" if pixels.nbytes % 2 else b"")


def save(ds: FileDataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def write_slice(path: Path, pixels: np.ndarray, *, z: float, spacing=(1.0, 1.0), photometric="MONOCHROME2", **tags):
    ds = (
        new_dataset(
            ImagePositionPatient=[0, 0, z],
            ImageOrientationPatient=AXIAL,
            PixelSpacing=list(spacing),
            SliceThickness=3.0,
            InstanceNumber=1,
            **tags,
        )
        if "ImagePositionPatient" not in tags
        else new_dataset(
            PixelSpacing=list(spacing),
            SliceThickness=3.0,
            InstanceNumber=1,
            **{"ImageOrientationPatient": AXIAL, **tags},
        )
    )
    set_pixels(ds, pixels, photometric=photometric)
    return save(ds, path)


def write_series(folder: Path, volume: np.ndarray, *, step=3.0, **tags) -> list[Path]:
    """Write (Z, H, W) as one file per slice, in an order of names that is not the order of slices."""
    names = np.random.default_rng(0).permutation(len(volume))
    return [write_slice(folder / f"IM{names[z]:04d}", volume[z], z=z * step, **tags) for z in range(len(volume))]


def _frame_group(z: float, *, slope=None, segment=None) -> Dataset:
    group = Dataset()
    position = Dataset()
    position.ImagePositionPatient = [0, 0, z]
    group.PlanePositionSequence = Sequence([position])
    if slope is not None:
        value = Dataset()
        value.RescaleSlope, value.RescaleIntercept = slope, 0
        group.PixelValueTransformationSequence = Sequence([value])
    if segment is not None:
        identification = Dataset()
        identification.ReferencedSegmentNumber = segment
        group.SegmentIdentificationSequence = Sequence([identification])
    return group


def _shared_group(spacing=(1.0, 1.0)) -> Dataset:
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(spacing), 3.0
    orientation.ImageOrientationPatient = AXIAL
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    return shared


def write_enhanced(path: Path, volume: np.ndarray, *, slopes=None, step=3.0) -> Path:
    ds = new_dataset(sop_class=ENHANCED_MR)
    order = np.random.default_rng(1).permutation(len(volume))
    set_pixels(ds, volume[order])
    ds.SharedFunctionalGroupsSequence = Sequence([_shared_group()])
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [_frame_group(float(z) * step, slope=None if slopes is None else slopes[z]) for z in order]
    )
    return save(ds, path)


def write_segmentation(path: Path, labels: dict[str, np.ndarray], *, step=3.0, shift=0.0, series_uid="1.2.3.4") -> Path:
    """Write boolean volumes (Z, H, W) by segment name, without empty slices as in real files."""
    ds = new_dataset(sop_class=SEG_CLASS, Modality="SEG", SeriesInstanceUID="9.9.9", SegmentationType="BINARY")
    reference = Dataset()
    reference.SeriesInstanceUID = series_uid
    ds.ReferencedSeriesSequence = Sequence([reference])
    segments, groups, frames = [], [], []
    for number, (name, label) in enumerate(labels.items(), start=1):
        segment = Dataset()
        segment.SegmentNumber, segment.SegmentLabel = number, name
        segments.append(segment)
        for z in np.flatnonzero(label.any(axis=(1, 2))):
            groups.append(_frame_group(float(z) * step + shift, segment=number))
            frames.append(label[z])
    ds.SegmentSequence = Sequence(segments)
    ds.SharedFunctionalGroupsSequence = Sequence([_shared_group()])
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    set_pixels(ds, np.stack(frames).astype(np.uint8))
    ds.BitsAllocated = ds.BitsStored = 1
    ds.HighBit = 0
    ds.PixelData = np.packbits(np.stack(frames).astype(np.uint8).ravel(), bitorder="little").tobytes()
    if len(ds.PixelData) % 2:
        ds.PixelData += b"\0"
    return save(ds, path)
