"""Rules for DICOM: which files form a series, whether they form a straight stack, and what stored values mean."""

import gzip

import numpy as np
import pydicom
import pytest
from dicom_factory import ENHANCED_MR, new_dataset, save, set_pixels, write_segmentation, write_series
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from samgraft.finetune.prediction.prediction_inputs import find_inputs
from samgraft.shared.errors import DataError
from samgraft.shared.scans.header_check import check_headers
from samgraft.shared.scans.readers.dicom import read_dicom_series
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import examine_cases
from samgraft.shared.store.examine import BuildSettings
from store_factory import make_scan

IMAGE, LABEL = make_scan(shape_zyx=(6, 24, 20))
SETTINGS = BuildSettings(modality=Modality.MRI, salt="")


def rewrite(paths, change):
    """Change every file of a series; ``change`` gets the dataset and its number along the slices."""
    for path in paths:
        ds = pydicom.dcmread(path)
        change(ds, round(float(ds.ImagePositionPatient[2]) / 3))
        ds.save_as(path)
    return paths


def examine(folder):
    return examine_cases(discover(folder).cases, settings=SETTINGS)


def refused_by_build_and_doctor(folder):
    """Return the only reason of a build, after a check that the header check finds it too."""
    (reason,) = examine(folder).refused.values()
    (from_header,) = check_headers(folder).refused
    assert reason.startswith(from_header)
    return reason


# What is one series --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tags",
    [
        {"PatientID": "P2"},
        {"StudyInstanceUID": "1.2.4"},
        {"FrameOfReferenceUID": "1.9"},
        {"SeriesInstanceUID": "1.2.9"},
    ],
)
def test_group_dicom__each_identifier_separates_series(tmp_path, tags):
    write_series(tmp_path / "a", IMAGE)
    for path in write_series(tmp_path / "b", IMAGE + 1, **tags):
        path.rename(tmp_path / "a" / f"b-{path.name}")
    (tmp_path / "b").rmdir()
    assert [len(case.scan.paths) for case in discover(tmp_path).cases] == [6, 6]


def test_group_dicom__series_without_uid_are_separated_by_folder(tmp_path):
    for name in ("a", "b"):
        write_series(tmp_path / name, IMAGE, SeriesInstanceUID="")
    assert [len(case.scan.paths) for case in discover(tmp_path).cases] == [6, 6]


@pytest.mark.parametrize("angle", [0.005, 0.0151, 0.7])
def test_group_dicom__noise_in_the_orientation_does_not_split_a_series(tmp_path, angle):
    def turn(ds, number):
        a = angle + 2e-5 * (-1) ** number
        ds.ImageOrientationPatient = [np.cos(a), np.sin(a), 0, -np.sin(a), np.cos(a), 0]

    rewrite(write_series(tmp_path, IMAGE), turn)
    (record,) = examine(tmp_path).records
    assert record.shape_zyx[0] == 6


def write_enhanced_files(folder, volume):
    """Write one enhanced file with one frame per slice."""
    for z, pixels in enumerate(volume):
        position, orientation, measures = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, 3 * z]
        orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        measures.PixelSpacing, measures.SliceThickness = [1, 1], 3
        frame, shared = Dataset(), Dataset()
        frame.PlanePositionSequence = Sequence([position])
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
        ds = new_dataset(sop_class=ENHANCED_MR)
        ds.PerFrameFunctionalGroupsSequence = Sequence([frame])
        ds.SharedFunctionalGroupsSequence = Sequence([shared])
        set_pixels(ds, pixels[None])
        save(ds, folder / f"{z}.dcm")


def test_group_dicom__enhanced_files_with_one_frame_each_are_one_series(tmp_path):
    write_enhanced_files(tmp_path, IMAGE)
    (case,) = discover(tmp_path).cases
    np.testing.assert_array_equal(read_dicom_series(case.scan.paths, where="x").array_ijk, IMAGE.T)


def test_plain_cases__placeholder_ids_give_way_to_folders(tmp_path):
    for number, patient in enumerate(("ANON", "", "anonymous")):
        write_series(tmp_path / "train" / f"P{number}", IMAGE + number, PatientID=patient)
    found = discover(tmp_path)
    assert sorted(case.patient_key for case in found.cases) == ["P0", "P1", "P2"]
    assert any("3 DICOM series have no patient id or a placeholder" in note for note in found.notes)


def test_plain_cases__equal_ids_in_several_folders_are_noted(tmp_path):
    for number in range(2):
        write_series(tmp_path / f"P{number}", IMAGE, StudyInstanceUID=f"1.{number}")
    found = discover(tmp_path)
    assert len({case.patient_key for case in found.cases}) == 1
    assert any("all 2 DICOM series have one patient id" in note for note in found.notes)


# Segmentations -------------------------------------------------------------------------------------------------------


def unreferenced(path):
    ds = pydicom.dcmread(path)
    del ds.ReferencedSeriesSequence
    ds.save_as(path)


def test_plain_cases__segmentation_without_reference_meets_the_only_series_of_its_study(tmp_path):
    write_series(tmp_path / "a", IMAGE)
    write_series(tmp_path / "b", IMAGE, PatientID="P2", StudyInstanceUID="7.7")
    unreferenced(write_segmentation(tmp_path / "seg.dcm", {"tumour": LABEL.astype(bool)}))
    assert [len(case.labels) for case in discover(tmp_path).cases] == [1, 0]


def test_plain_cases__segmentation_that_fits_two_series_is_listed(tmp_path):
    write_series(tmp_path / "a", IMAGE)
    write_series(tmp_path / "b", IMAGE, SeriesInstanceUID="1.2.3.9")
    unreferenced(write_segmentation(tmp_path / "seg.dcm", {"tumour": LABEL.astype(bool)}))
    found = discover(tmp_path)
    assert found.labels_without_image == ["seg.dcm"]
    assert not any(case.labels for case in found.cases)


# Geometry of the stack -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [(2, 3), (1,), (5,)])
def test_stack_planes__slice_shifted_sideways_is_refused(tmp_path, slices):
    def shift(ds, number):
        if number in slices:
            ds.ImagePositionPatient = [20, 0, 3 * number]

    rewrite(write_series(tmp_path, IMAGE), shift)
    assert "one straight stack" in refused_by_build_and_doctor(tmp_path)


def test_stack_planes__rounded_positions_are_accepted(tmp_path):
    def jitter(ds, number):
        ds.ImagePositionPatient = [0.005 * (-1) ** number, 0, 3 * number]

    rewrite(write_series(tmp_path, IMAGE), jitter)
    assert len(examine(tmp_path).records) == 1


def test_read_dicom_series__missing_positions_are_named_as_the_cause(tmp_path):
    def remove(ds, number):
        ds.SliceLocation = 3.0 * number
        del ds.ImagePositionPatient

    rewrite(write_series(tmp_path, IMAGE), remove)
    assert "6 of 6 have no ImagePositionPatient" in refused_by_build_and_doctor(tmp_path)


def test_discover__file_without_preamble_is_counted_with_the_cause(tmp_path):
    write_series(tmp_path / "good", IMAGE)
    (tmp_path / "old.dcm").write_bytes(b"\x08\x00\x05\x00\x0a\x00\x00\x00ISO_IR 100" + b"\0" * 200)
    assert any("without the preamble" in reason for reason in discover(tmp_path).left_out)


@pytest.mark.parametrize(("name", "kind"), [("a.dcm.gz", "DICOM"), ("a.dcm", "DICOM"), ("a.nrrd.gz", "NRRD")])
def test_discover__compressed_scan_is_named_with_the_way_out(tmp_path, name, kind):
    """Only NIfTI is read from gzip, whatever the file is called."""
    first, *_ = write_series(tmp_path / "good", IMAGE)
    plain = first.read_bytes() if kind == "DICOM" else b"NRRD0004\n"
    (tmp_path / name).write_bytes(gzip.compress(plain))
    reason = f"{kind} inside gzip (decompress it, for example with gunzip)"
    assert discover(tmp_path).left_out[reason] == 1
    with pytest.raises(DataError, match=rf"the file is {kind} inside gzip .*gunzip"):
        find_inputs(tmp_path / name)


def test_discover__damaged_file_is_refused_by_name_and_not_left_out(tmp_path):
    path = write_series(tmp_path / "good", IMAGE)[0]
    (tmp_path / "bad.dcm").write_bytes(path.read_bytes()[:140] + b"\xff" * 30)
    report = examine(tmp_path)
    assert len(report.records) == 1
    assert len(report.refused) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"1.5\\1.5", b"1,5\\1,5", "PixelSpacing must hold numbers"),
        (b"1.5\\1.5", b"nan\\1.5", "PixelSpacing must"),
        (b"1.5\\1.5", b"1.5    ", "PixelSpacing must be 2 finite numbers"),
    ],
)
def test_read_dicom_series__unreadable_numbers_refuse_this_series_only(tmp_path, old, new, message):
    write_series(tmp_path / "good", IMAGE, SeriesInstanceUID="1.7")
    for path in write_series(tmp_path / "bad", IMAGE, spacing=(1.5, 1.5)):
        path.write_bytes(path.read_bytes().replace(old, new))
    assert message in refused_by_build_and_doctor(tmp_path)
    assert len(examine(tmp_path).records) == 1


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
def test_read_dicom_series__impossible_orientation_refuses_this_series_only(tmp_path, orientation):
    write_series(tmp_path / "good", IMAGE, SeriesInstanceUID="1.7")
    rewrite(write_series(tmp_path / "bad", IMAGE), lambda ds, _: setattr(ds, "ImageOrientationPatient", orientation))
    assert "ImageOrientationPatient must be" in refused_by_build_and_doctor(tmp_path)
    assert len(examine(tmp_path).records) == 1


# Meaning of stored values --------------------------------------------------------------------------------------------


def read_one(tmp_path, stored, **tags):
    ds = new_dataset(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])
    set_pixels(ds, stored, photometric=tags.pop("photometric", "MONOCHROME2"), bits=tags.pop("bits", 16))
    for name, value in tags.items():
        setattr(ds, name, value)
    return read_dicom_series([save(ds, tmp_path / "x.dcm")], where="x")


STORED = np.arange(24 * 20, dtype=np.uint16).reshape(24, 20)


@pytest.mark.parametrize(("modality", "inverted"), [("CT", False), ("PT", False), ("DX", True), ("MG", True)])
def test_native_values__monochrome1_inverts_display_values_only(tmp_path, modality, inverted):
    scan = read_one(
        tmp_path, STORED, photometric="MONOCHROME1", bits=12, Modality=modality, RescaleSlope=1, RescaleIntercept=-1024
    )
    assert scan.array_ijk[0, 0, 0] == (4095 - 1024 if inverted else -1024)
    assert any("MONOCHROME1" in note for note in scan.notes)


def lut(values, first=0):
    item = Dataset()
    item.LUTDescriptor = [len(values), first, 16]
    item.add_new(0x00283006, "OW", np.asarray(values, dtype="<u2").tobytes())
    item.ModalityLUTType = "US"
    return Sequence([item])


def test_native_values__modality_lut_is_applied(tmp_path):
    table = (np.arange(480, dtype=np.int64) ** 2 // 8).tolist()
    scan = read_one(tmp_path, STORED, ModalityLUTSequence=lut(table))
    np.testing.assert_array_equal(scan.array_ijk[:, :, 0].T.ravel(), table)


def test_native_values__only_real_world_map_is_applied(tmp_path):
    item = Dataset()
    item.RealWorldValueSlope, item.RealWorldValueIntercept = 0.5, -10.0
    scan = read_one(tmp_path, STORED, RealWorldValueMappingSequence=Sequence([item]))
    np.testing.assert_allclose(scan.array_ijk[:, :, 0].T, STORED * 0.5 - 10)
    assert "real-world value map applied" in scan.notes
    both = read_one(
        tmp_path, STORED, RealWorldValueMappingSequence=Sequence([item]), RescaleSlope=2, RescaleIntercept=0
    )
    np.testing.assert_array_equal(both.array_ijk[:, :, 0].T, STORED * 2)
    choice = read_one(tmp_path, STORED, RealWorldValueMappingSequence=Sequence([item, item]))
    np.testing.assert_array_equal(choice.array_ijk[:, :, 0].T, STORED)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_native_values__overlay_bits_are_dropped(tmp_path, dtype):
    values = (STORED.astype(np.int64) - (240 if dtype is np.int16 else 0)).astype(dtype)
    stored = values & dtype(0x0FFF) | dtype(0x4000)
    scan = read_one(tmp_path, stored, bits=12)
    np.testing.assert_array_equal(scan.array_ijk[:, :, 0].T, values)


def test_check_pixel_header__mosaic_is_refused(tmp_path):
    with pytest.raises(DataError, match="mosaic"):
        read_one(tmp_path, STORED, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
    assert "mosaic" in refused_by_build_and_doctor(tmp_path)
