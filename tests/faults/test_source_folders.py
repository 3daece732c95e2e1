"""Folders of scans as labs keep them, with unusual paths, labels, lists and layouts."""

import dataclasses
import json
import os
import socket
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_factory import write_segmentation, write_series
from PIL import Image
from samgraft.shared.cli import main
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.scans.discovery import SourceOptions
from samgraft.shared.scans.file_index import index_files
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import CasesRefused, build_store, examine_cases
from samgraft.shared.store.examine import BuildSettings, examine_case
from samgraft.shared.store.store import SliceStore
from store_factory import make_scan, write_nifti

IMAGE, LABEL = make_scan(shape_zyx=(6, 24, 20))
SETTINGS = BuildSettings(modality=Modality.MRI, salt="")


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def build(source, out, options=None, **build_options):
    found = discover(source, options)
    return build_store(
        found.cases,
        out=out,
        settings=SETTINGS,
        label_names=found.label_names,
        intensity=IntensityPreset(),
        **build_options,
    )


def only_label(source, options=None):
    found = discover(source, options)
    assert len(found.cases) == 1
    examined = examine_case(found.cases[0], SETTINGS)
    return examined.labels[examined.record.plane], found


# Paths and files ---------------------------------------------------------------------------------------------------


def test_build_store__unwritable_output_is_refused_before_reading(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    (tmp_path / "file").write_text("x")
    with pytest.raises((StorageError, UsageError)) as caught:
        build(tmp_path / "in", tmp_path / "file" / "s.zarr")
    assert caught.value.exit_code in (2, 5)


def test_build_store__source_folder_is_left_unchanged(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii.gz", IMAGE)
    write_series(tmp_path / "in" / "dicom", IMAGE)
    before = snapshot(tmp_path / "in")
    build(tmp_path / "in", tmp_path / "out" / "s.zarr")
    assert snapshot(tmp_path / "in") == before


@pytest.mark.parametrize("name", ["with space", "dä ta", "患者 1", "quo'te\"s", "-leading", "new\nline", "[brackets]*"])
def test_build_store__unusual_paths_work(tmp_path, name):
    write_nifti(tmp_path / name / "scans" / f"{name}.nii.gz", IMAGE)
    report = build(tmp_path / name / "scans", tmp_path / name / "s.zarr")
    assert SliceStore.open(report.path).series[0].shape_zyx == (6, 24, 20)


def test_build_store__too_long_path_is_refused(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    with pytest.raises(StorageError, match="too long"):
        build(tmp_path / "in", tmp_path / ("x" * 300) / "s.zarr")


def test_discover__symlink_loop_is_counted_once(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    (tmp_path / "in" / "b").mkdir()
    (tmp_path / "in" / "b" / "loop").symlink_to(tmp_path / "in")
    found = discover(tmp_path / "in")
    assert len(found.cases) == 1
    assert found.left_out["folder reached twice through a link (a loop or a copy)"] == 1


def test_discover__link_out_of_the_folder_is_followed_and_counted(tmp_path):
    write_nifti(tmp_path / "elsewhere" / "a.nii", IMAGE)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "broken").symlink_to(tmp_path / "nowhere")
    found = discover(tmp_path / "in")
    assert len(found.cases) == 1
    assert found.left_out["note: link that leaves the folder, followed for reading"] == 1
    assert found.left_out["broken link"] == 1


def test_summarise__equal_content_is_reported_as_duplicate(tmp_path):
    from samgraft.shared.store.build_report import summarise

    path = write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    os.link(path, tmp_path / "in" / "b.nii")
    found = discover(tmp_path / "in")
    values = summarise(found, examine_cases(found.cases, settings=SETTINGS))
    assert values["duplicates"] == [["a.nii", "b.nii"]]


def test_discover__names_that_differ_in_case_are_noted(tmp_path):
    write_nifti(tmp_path / "A.nii", IMAGE)
    write_nifti(tmp_path / "a.nii", IMAGE + 1)
    assert "differ only in upper and lower case" in " ".join(discover(tmp_path).notes)


def test_discover__plain_and_compressed_copy_is_refused(tmp_path):
    write_nifti(tmp_path / "A.nii", IMAGE)
    write_nifti(tmp_path / "A.nii.gz", IMAGE + 1)
    write_nifti(tmp_path / "B.nii", IMAGE)
    report = examine_cases(discover(tmp_path).cases, settings=SETTINGS)
    assert set(report.refused) == {"A.nii", "A.nii.gz"}
    assert "A.nii and A.nii.gz are both there, which is ambiguous" in report.refused["A.nii"]


def test_build_store__vanished_file_is_refused_by_name(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    write_nifti(tmp_path / "in" / "b.nii", IMAGE)
    found = discover(tmp_path / "in")
    (tmp_path / "in" / "a.nii").unlink()
    with pytest.raises(CasesRefused, match=r"1 of 2 cases are refused(?s:.*)a\.nii: the file vanished"):
        build_store(
            found.cases,
            out=tmp_path / "s.zarr",
            settings=SETTINGS,
            label_names=None,
            intensity=IntensityPreset(),
        )


def test_store_check__changed_source_is_reported(tmp_path, capsys):
    path = write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    out = tmp_path / "s.zarr"
    assert main(["store", "build", str(tmp_path / "in"), "--out", str(out), "--workers", "1"]) == 0
    assert main(["store", "check", str(out), "--source", str(tmp_path / "in"), "--workers", "1"]) == 0
    write_nifti(path, IMAGE + 1)
    assert main(["store", "check", str(out), "--source", str(tmp_path / "in"), "--workers", "1"]) == 3
    assert "the source has changed since the store was built" in capsys.readouterr().err


@pytest.mark.timeout(20)
def test_discover__pipes_and_sockets_are_not_opened(tmp_path):
    source = tmp_path / "in"
    write_nifti(source / "good.nii.gz", IMAGE)
    (source / "empty.nii.gz").touch()
    (source / "folder.nii.gz").mkdir()
    os.mkfifo(source / "pipe.nii.gz")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(source / "socket.nii"))
    found = discover(source)
    listener.close()
    assert found.left_out["pipe, socket or device (not opened)"] == 2
    report = examine_cases(found.cases, settings=SETTINGS)
    assert report.refused == {"empty.nii.gz": "the file is empty (0 bytes). Copy it again from its origin."}
    assert len(report.records) == 1


def nnunet(folder, **values):
    write_nifti(folder / "imagesTr" / "a_0000.nii.gz", IMAGE)
    write_nifti(folder / "labelsTr" / "a.nii.gz", LABEL)
    facts = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "core": 1}, "file_ending": ".nii.gz", **values}
    (folder / "dataset.json").write_text(json.dumps(facts))


def bids(folder):
    write_nifti(folder / "sub-1" / "anat" / "sub-1_T1w.nii.gz", IMAGE)
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "a", "BIDSVersion": "1.8.0"}))


def decathlon(folder):
    write_nifti(folder / "imagesTr" / "a.nii.gz", IMAGE)
    write_nifti(folder / "labelsTr" / "a.nii.gz", LABEL)
    listed = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    (folder / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "core"}, "training": listed}))


@pytest.mark.parametrize("write", [nnunet, bids, decathlon])
def test_discover__folder_of_data_sets_is_refused_with_their_names(tmp_path, write):
    """Every data set would count as one patient."""
    write(tmp_path / "raw" / "Dataset002_Heart")
    nnunet(tmp_path / "raw" / "Dataset001_Head")
    with pytest.raises(DataError, match=r"2 data sets below it \(Dataset001_Head, Dataset002_Heart\)"):
        discover(tmp_path / "raw")
    assert len(discover(tmp_path / "raw" / "Dataset001_Head").cases) == 1


def test_discover__folder_of_patients_with_other_json_files_is_plain(tmp_path):
    write_nifti(tmp_path / "P1" / "t1.nii.gz", IMAGE)
    (tmp_path / "P1" / "dataset.json").write_text(json.dumps({"scanner": "a"}))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "dataset_description.json").write_text("{}")
    found = discover(tmp_path)
    assert (found.layout, len(found.cases)) == ("plain folder", 1)


@pytest.mark.slow
def test_index_files__twenty_thousand_files_take_less_than_a_minute(tmp_path):
    for number in range(20_000):
        (tmp_path / f"{number:05d}.nii.gz").touch()
    start = time.perf_counter()
    assert len(index_files(tmp_path).files) == 20_000
    assert time.perf_counter() - start < 60


# Labels and lists --------------------------------------------------------------------------------------------------


def pair(folder, label, name="a", **options):
    write_nifti(folder / f"{name}.nii.gz", IMAGE)
    return write_nifti(folder / f"{name}_label.nii.gz", label, **options)


def test_map_ids__unexpected_ids_come_with_a_suggested_map(tmp_path):
    pair(tmp_path / "in", (LABEL * 4).astype(np.uint8))
    options = SourceOptions(label_names={1: "tumour"})
    with pytest.raises(CasesRefused, match=r"among \[1\], got \[4\] too. Try --label-map 4=0"):
        build(tmp_path / "in", tmp_path / "s.zarr", options)
    label, _ = only_label(tmp_path / "in", SourceOptions(label_map={4: 1}))
    np.testing.assert_array_equal(label, LABEL)
    with pytest.raises(DataError, match=r"among \[5\], got \[4\] too. Try --label-map 4=0"):
        only_label(tmp_path / "in", SourceOptions(label_map={5: 1}))


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (0.999, "whole numbers, got values up to 0.001"),
        (0.6, "whole numbers"),
        (-1.0, r"0\.\.65535, got -1"),
        (70000.0, r"0\.\.65535"),
    ],
)
def test_read_label__values_that_are_no_ids_are_refused(tmp_path, factor, message):
    pair(tmp_path, LABEL.astype(np.float32) * factor)
    with pytest.raises(DataError, match=message):
        only_label(tmp_path)
    if factor == 0.999:  # never cut to 0: rounded on request
        label, _ = only_label(tmp_path, SourceOptions(round_labels=True))
        np.testing.assert_array_equal(label, LABEL)


def test_read_label__255_is_kept_and_nan_is_refused(tmp_path):
    pair(tmp_path / "a", LABEL * 255)
    label, _ = only_label(tmp_path / "a")
    assert set(np.unique(label)) == {0, 255}
    pair(tmp_path / "b", np.where(LABEL, np.nan, 0).astype(np.float32))
    with pytest.raises(DataError, match="finite"):
        only_label(tmp_path / "b")


def test_summarise__empty_labels_are_counted_and_kept(tmp_path):
    from samgraft.shared.store.build_report import summarise

    pair(tmp_path, LABEL, name="a")
    pair(tmp_path, LABEL * 0, name="b")
    found = discover(tmp_path)
    values = summarise(found, examine_cases(found.cases, settings=SETTINGS))
    assert (values["num_labelled"], values["num_empty_labels"], values["num_series"]) == (2, 1, 2)


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.array([[-1, 0, 0, 0.5], [0, -1, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1.0]]), r"0\.5 mm apart"),
        (np.diag([1.0, -1, 5, 1]), "orientations LPS and RPS"),
        (np.diag([-1.0, -1, 5.1, 1]), r"0\.5 mm apart"),
    ],
)
def test_read_label__another_grid_is_refused(tmp_path, affine, message):
    pair(tmp_path, LABEL, affine=affine)
    with pytest.raises(DataError, match=message):
        only_label(tmp_path)


def test_read_label__another_shape_is_refused(tmp_path):
    pair(tmp_path, LABEL[:5])
    with pytest.raises(DataError, match="shapes differ"):
        only_label(tmp_path)


def test_read_label__another_orientation_is_refused(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", IMAGE)
    flipped = nib.Nifti1Image(LABEL.T[::-1], np.array([[1, 0, 0, -19], [0, -1, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1.0]]))
    nib.save(flipped, tmp_path / "a_label.nii.gz")
    with pytest.raises(DataError, match="one grid"):
        only_label(tmp_path)


def test_read_label__files_per_class_are_merged_and_conflicts_refused(tmp_path):
    half = LABEL.copy()
    half[3:] = 0
    write_nifti(tmp_path / "a.nii.gz", IMAGE)
    write_nifti(tmp_path / "a_seg_core.nii.gz", half * 255)
    write_nifti(tmp_path / "a_seg_edema.nii.gz", LABEL - half)
    label, found = only_label(tmp_path)
    assert found.label_names == {1: "core", 2: "edema"}
    np.testing.assert_array_equal(label, half + 2 * (LABEL - half))
    write_nifti(tmp_path / "a_seg_edema.nii.gz", LABEL)
    with pytest.raises(DataError, match=rf"{int(half.sum())} voxels are claimed by two labels \(1 and 2\)"):
        only_label(tmp_path)


def test_discover__labels_and_images_without_partner_are_listed(tmp_path):
    pair(tmp_path, LABEL, name="both")
    write_nifti(tmp_path / "alone.nii.gz", IMAGE)
    write_nifti(tmp_path / "orphan_label.nii.gz", LABEL)
    write_nifti(tmp_path / "both_seg.nii.gz", LABEL)
    found = discover(tmp_path)
    assert [case.name for case in found.cases] == ["alone.nii.gz", "both.nii.gz"]
    assert found.images_without_label == ["alone.nii.gz"]
    assert found.labels_without_image == ["orphan_label.nii.gz"]
    assert any("1 scan has several labels" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ('image,label,patient\na b.nii,"l,1.nii",p1\n\nc.nii,,p2\n', "utf-8-sig"),
        ("IMAGE\tLabel\tPatient\r\na b.nii\tl,1.nii\tp1\r\nc.nii\t\tp2\r\n", "utf-8"),
        ('a b.nii;"l,1.nii";p1\nc.nii;;p2\n', "utf-8"),
    ],
)
def test_csv_cases__every_dialect_is_read(tmp_path, text, encoding):
    write_nifti(tmp_path / "a b.nii", IMAGE)
    write_nifti(tmp_path / "c.nii", IMAGE + 1)
    write_nifti(tmp_path / "l,1.nii", LABEL)
    (tmp_path / "list.csv").write_text(text, encoding=encoding, newline="")
    found = discover(tmp_path / "list.csv")
    assert [(c.name, c.patient_key, len(c.labels)) for c in found.cases] == [("a b.nii", "p1", 1), ("c.nii", "p2", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image\na.nii,extra,cells\n", "line 2 has 3 cells for 1 columns"),
        ('image\n"a.nii\n', "line 2 is not CSV"),
        ("image,patient\n,p\n", "line 2 has no image"),
    ],
)
def test_csv_cases__errors_have_line_numbers(tmp_path, text, message):
    write_nifti(tmp_path / "a.nii", IMAGE)
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        discover(tmp_path / "list.csv")


def test_csv_cases__missing_file_refuses_its_line_only(tmp_path):
    write_nifti(tmp_path / "a.nii", IMAGE)
    write_nifti(tmp_path / "d.nii", IMAGE)
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "list.csv").write_text("image,label\na.nii,\nc.nii,\nb.txt,\nd.nii,none.nii\n")
    found = discover(tmp_path / "list.csv")
    assert [case.refusal for case in found.cases] == [
        None,
        "line 4: b.txt is not of a known format.",
        "line 3: c.nii is not there.",
        "line 5: none.nii is not there.",
    ]


# Layouts ------------------------------------------------------------------------------------------------------------


def test_nnunet_cases__channels_labels_and_names_are_read(tmp_path):
    for case in ("BRA_001", "BRA_002"):
        for channel in (0, 1):
            write_nifti(tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz", IMAGE + channel)
        write_nifti(tmp_path / "labelsTr" / f"{case}.nii.gz", LABEL)
    write_nifti(tmp_path / "imagesTs" / "BRA_003_0000.nii.gz", IMAGE)
    write_nifti(tmp_path / "labelsTr" / "BRA_009.nii.gz", LABEL)
    info = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    found = discover(tmp_path)
    assert found.layout == "nnU-Net raw"
    assert found.label_names == {1: "tumour"}
    assert len(found.cases) == 5
    assert len({case.patient_key for case in found.cases}) == 3
    assert sum(bool(case.labels) for case in found.cases) == 4
    assert found.labels_without_image == ["BRA_009"]
    (tmp_path / "dataset.json").write_text(json.dumps({**info, "labels": {"a": [1, 2]}}))
    with pytest.raises(DataError, match="region-based"):
        discover(tmp_path)


def test_msd_cases__channels_become_series(tmp_path):
    stack = np.stack([IMAGE.T, IMAGE.T + 1], axis=3)
    (tmp_path / "imagesTr").mkdir()
    nib.save(nib.Nifti1Image(stack, np.diag([-1, -1, 5, 1])), tmp_path / "imagesTr" / "a.nii.gz")
    write_nifti(tmp_path / "labelsTr" / "a.nii.gz", LABEL)
    entry = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    info = {
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"0": "background", "1": "x"},
        "training": [entry],
        "test": [],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    found = discover(tmp_path)
    assert [case.name for case in found.cases] == ["a_0000", "a_0001"]
    second = examine_case(found.cases[1], SETTINGS)
    np.testing.assert_array_equal(second.images[second.record.plane], IMAGE + 1)
    np.testing.assert_array_equal(second.labels[second.record.plane], LABEL)
    info["training"] = [{"image": "../../etc/passwd"}]
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="leaves the data set"):
        discover(tmp_path)


def test_bids_cases__sessions_and_derivatives_are_read(tmp_path):
    (tmp_path / "dataset_description.json").write_text("{}")
    for session in ("1", "2"):
        anat = tmp_path / "sub-01" / f"ses-{session}" / "anat"
        write_nifti(anat / f"sub-01_ses-{session}_T1w.nii.gz", IMAGE)
    write_nifti(tmp_path / "sub-01" / "ses-1" / "func" / "sub-01_ses-1_bold.nii.gz", IMAGE)
    derived = tmp_path / "derivatives" / "manual" / "sub-01" / "ses-1" / "anat"
    write_nifti(derived / "sub-01_ses-1_space-T1w_desc-manual_dseg.nii.gz", LABEL)
    (tmp_path / "derivatives" / "manual" / "x_dseg.tsv").write_text("index\tname\n0\tbackground\n1\ttumour\n")
    found = discover(tmp_path)
    assert found.layout == "BIDS"
    assert [(c.name, c.patient_key, c.study_key, len(c.labels)) for c in found.cases] == [
        ("sub-01_ses-1_T1w", "sub-01", "ses-1", 1),
        ("sub-01_ses-2_T1w", "sub-01", "ses-2", 0),
    ]
    assert found.label_names == {1: "tumour"}
    assert found.left_out["BIDS image that is not anatomical"] == 1


def test_plain_cases__patients_come_from_folder_or_pattern(tmp_path):
    for name in ("p1/a.nii", "p1/b.nii", "p2/a.nii"):
        write_nifti(tmp_path / name, IMAGE)
    assert [c.patient_key for c in discover(tmp_path).cases] == ["p1", "p1", "p2"]
    options = SourceOptions(patient_pattern=r"/(\w)\.nii", site_pattern="^(p.)")
    assert [(c.patient_key, c.site_key) for c in discover(tmp_path, options).cases] == [
        ("a", "p1"),
        ("b", "p1"),
        ("a", "p2"),
    ]
    with pytest.raises(DataError, match="--patient-pattern must match every scan"):
        discover(tmp_path, SourceOptions(patient_pattern="(zzz)"))
    for bad, message in (("(", "regular expression"), ("abc", "one group")):
        with pytest.raises(UsageError, match=message):
            discover(tmp_path, SourceOptions(patient_pattern=bad))


def test_plain_cases__pictures_are_a_stack_or_single_scans(tmp_path):
    for z in range(6):
        for kind, array in (("images", IMAGE.astype(np.uint16)), ("labels", LABEL)):
            path = tmp_path / kind / "p1" / f"s{z}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array[z]).save(path)
    label, _ = only_label(tmp_path)
    np.testing.assert_array_equal(label, LABEL)
    single = discover(tmp_path, SourceOptions(pictures_are_scans=True))
    assert len(single.cases) == 6
    assert all(len(case.labels) == 1 for case in single.cases)


def test_plain_cases__dicom_segmentation_becomes_the_label(tmp_path):
    write_series(tmp_path, IMAGE)
    half = LABEL.copy().astype(bool)
    half[3:] = False
    write_segmentation(tmp_path / "seg.dcm", {"tumour": LABEL.astype(bool) & ~half, "core": half})
    label, found = only_label(tmp_path)
    assert found.label_names == {1: "core", 2: "tumour"}
    np.testing.assert_array_equal(label, np.where(half, 1, LABEL * 2))


def test_read_dicom_seg__shifted_or_overlapping_segments_are_refused(tmp_path):
    write_series(tmp_path, IMAGE)
    write_segmentation(tmp_path / "seg.dcm", {"tumour": LABEL.astype(bool)}, shift=1.5)
    with pytest.raises(DataError, match="lie on the scan's grid"):
        only_label(tmp_path)
    write_segmentation(tmp_path / "seg.dcm", {"a": LABEL.astype(bool), "b": LABEL.astype(bool)})
    with pytest.raises(DataError, match="claimed by two segments"):
        only_label(tmp_path)


def test_examine_case__dicom_nifti_and_pictures_give_the_same_slices(tmp_path):
    image, _ = make_scan(shape_zyx=(20, 32, 28))
    write_series(tmp_path / "dicom", image, step=3.0)
    write_nifti(tmp_path / "nifti" / "a.nii.gz", image, spacing_mm=(3, 1, 1))
    # The same scan as another program stores it: mirrored axes, other order.
    mirrored = np.ascontiguousarray(image[::-1, :, ::-1].transpose(1, 2, 0))
    affine = np.array([[0, 1.0, 0, -27], [-1.0, 0, 0, 0], [0, 0, -3.0, 57], [0, 0, 0, 1]])
    (tmp_path / "other").mkdir()
    nib.save(nib.Nifti1Image(mirrored, affine), tmp_path / "other" / "a.nii.gz")
    (tmp_path / "png").mkdir()
    for z in range(20):
        Image.fromarray(image[z].astype(np.uint16)).save(tmp_path / "png" / f"slice_{z}.png")
    (tmp_path / "png" / "spacing.json").write_text('{"spacing_mm": [3, 1, 1]}')
    records = []
    for kind in ("dicom", "nifti", "other", "png"):
        examined = examine_case(discover(tmp_path / kind).cases[0], SETTINGS)
        np.testing.assert_array_equal(examined.images[examined.record.plane], image)
        np.testing.assert_allclose(examined.record.spacing_mm, (3, 1, 1), rtol=1e-6)
        records.append(examined.record)
    assert len({record.content_sha256 for record in records}) == 1
    assert {dataclasses.replace(r.stats) for r in records} == {records[0].stats}


def test_discover__folder_without_scans_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        discover(tmp_path / "none")
    (tmp_path / "a.mha").write_text("x")
    with pytest.raises(DataError, match=r"no scan was found(?s:.*)MetaImage"):
        discover(tmp_path)


@pytest.mark.skipif(
    not os.environ.get("SAMGRAFT_MSD_HIPPOCAMPUS"),
    reason="SAMGRAFT_MSD_HIPPOCAMPUS does not name a folder with the Decathlon's Task04 (fetch it from its origin)",
)
def test_discover__decathlon_hippocampus_needs_no_manual_step(tmp_path):
    found = discover(Path(os.environ["SAMGRAFT_MSD_HIPPOCAMPUS"]))
    assert found.label_names == {1: "Anterior", 2: "Posterior"}
    report = examine_cases(found.cases[:20], settings=SETTINGS, label_names=found.label_names)
    assert not report.refused
    assert all(set(record.label_voxels) == {1, 2} for record in report.records)
