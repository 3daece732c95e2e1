"""Rules for names and folders: what is a label, whose label it is, which scans are one patient, what is left out."""

import json
import lzma
import tarfile

import nibabel as nib
import numpy as np
import pytest
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.case import is_label_map
from samgraft.shared.scans.discovery import SourceOptions, parse_label_map
from samgraft.shared.scans.names import is_placeholder_id, patient_of_stem
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import examine_cases
from samgraft.shared.store.build_report import summarise
from samgraft.shared.store.examine import BuildSettings
from store_factory import make_scan, write_nifti

IMAGE, LABEL = make_scan(shape_zyx=(6, 24, 20))
SETTINGS = BuildSettings(modality=Modality.MRI, salt="")


def write(root, *names, array=None):
    """Write one scan or label per name, each with its own voxels."""
    for number, name in enumerate(names):
        is_label = any(
            word in name.lower() for word in ("seg", "mask", "label", "gt", "annot", "contour", "truth", "roi")
        )
        volume = array if array is not None else LABEL if is_label else make_scan(shape_zyx=(6, 24, 20), seed=number)[0]
        write_nifti(root / name, volume)
    return root


def pairs(root, options=None):
    found = discover(root, options)
    return {
        case.name: sorted(str(p.relative_to(root)) for la in case.labels for p in la.scan.paths) for case in found.cases
    }


def examine(root, options=None):
    found = discover(root, options)
    return examine_cases(found.cases, settings=SETTINGS, label_names=found.label_names)


# Pairs of images and labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("case_1/imaging.nii.gz", ["case_1/segmentation.nii.gz"]),
        ("volume-0.nii", ["segmentation-0.nii"]),
        ("imgs/a.nii.gz", ["gts/a.nii.gz"]),
        ("x.nii.gz", ["x_mask.nii.gz", "x_mask_1.nii.gz"]),
        ("x.nii.gz", ["x_GT.nii.gz"]),
        ("P1/img.nii.gz", ["P1/contours.nii.gz"]),
        ("images_train/1.nii.gz", ["labels_train/1.nii.gz"]),
        ("imagesTr/1.nii.gz", ["train_labels/1.nii.gz"]),
        ("images/vol0.nii.gz", ["masks/vol0.nii.gz"]),
        ("images/image_7.nii.gz", ["masks/image_7.nii.gz"]),
        ("segmentation_study/P1/image.nii", ["segmentation_study/P1/label.nii"]),
        ("img/img0001.nii.gz", ["label/label0001.nii.gz"]),
        ("Task1-2_Training_Input/x_7.nii.gz", ["Task1_Training_GroundTruth/x_7_segmentation.nii.gz"]),
        ("P1/images/slices.nii", ["P1/binary_masks/slices.nii"]),
        ("train/images/1.nii.gz", ["train/masks/1.nii.gz"]),
        ("images/train/1.nii.gz", ["annotations/train/1.nii.gz"]),
        ("imagesTr/c_01.nii.gz", ["labelsTr/c_01_seg.nii.gz"]),
        ("scans/1_image.nii.gz", ["ground_truth/1_groundtruth.nii.gz"]),
        ("case_image_01.nii", ["case_label_01.nii"]),
        ("01_ct.nii.gz", ["01.seg.nii.gz"]),
        ("data/p1.nii", ["manual_segmentations/p1.nii"]),
        ("images/p1.nii", ["masks/Liver/p1.nii", "masks/spleen/p1.nii"]),
        ("train/images/p1.nii", ["train/masks/liver/p1.nii"]),
        ("T1/001.nii", ["GT/001.nii"]),
    ],
)
def test_discover__label_of_any_naming_scheme_meets_its_image(tmp_path, image, labels):
    write(tmp_path, image, *labels)
    assert pairs(tmp_path) == {image: sorted(labels)}


def test_discover__same_numbers_in_train_and_test_are_not_mixed_up(tmp_path):
    write(tmp_path, "imagesTr/001.nii.gz", "imagesTs/001.nii.gz", "labelsTr/001.nii.gz", "labelsTs/001.nii.gz")
    assert pairs(tmp_path) == {f"images{part}/001.nii.gz": [f"labels{part}/001.nii.gz"] for part in ("Tr", "Ts")}
    assert len({case.patient_key for case in discover(tmp_path).cases}) == 2


def test_discover__one_file_per_class_beside_the_only_image(tmp_path):
    write(tmp_path / "p1" / "segmentations", "liver.nii.gz", "spleen.nii.gz", array=LABEL * 6)
    write_nifti(tmp_path / "p1" / "segmentations" / "spleen.nii.gz", LABEL * 0)
    write(tmp_path, "p1/ct.nii.gz")
    found = discover(tmp_path)
    assert found.label_names == {1: "liver", 2: "spleen"}
    (record,) = examine(tmp_path).records
    assert record.label_voxels == {1: int(LABEL.sum())}


def test_discover__label_of_a_case_belongs_to_all_its_channels(tmp_path):
    names = [f"BRA_1_{channel}.nii.gz" for channel in ("t1", "t1ce", "flair")]
    write(tmp_path, *names, "BRA_1_seg.nii.gz", "BRA_10_t1.nii.gz")
    found = pairs(tmp_path)
    assert {name: found[name] for name in names} == {name: ["BRA_1_seg.nii.gz"] for name in names}
    assert found["BRA_10_t1.nii.gz"] == []
    assert "1 label belongs to several images each (channels of one case)" in discover(tmp_path).notes


def test_discover__ambiguous_label_is_listed_and_not_guessed(tmp_path):
    write(tmp_path, "p1/a.nii", "p1/b.nii", "p1/c_seg.nii")
    found = discover(tmp_path)
    assert found.labels_without_image == ["p1/c_seg.nii"]


def test_read_label__ids_beside_one_class_per_file_are_refused(tmp_path):
    write(tmp_path, "a.nii", "a_seg_liver.nii", "b.nii", "b_seg.nii")
    assert list(examine(tmp_path).refused) == ["b.nii"]
    options = SourceOptions(label_map={1: 2})
    assert not examine(tmp_path, options).refused
    assert discover(tmp_path, options).label_names == {1: "liver", 2: "label 2"}


# Masks among scans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 255, 0.5, -1])
def test_examine_cases__label_map_without_a_telling_name_is_refused_as_scan(tmp_path, factor):
    write(tmp_path, "a.nii")
    write_nifti(tmp_path / "a_liver.nii", (LABEL * np.float32(factor)))
    assert "looks like a label map (2 values" in examine(tmp_path).refused["a_liver.nii"]
    (tmp_path / "list.csv").write_text("image\na.nii\na_liver.nii\n")
    assert not examine(tmp_path / "list.csv").refused


def test_is_label_map__areas_of_few_values_and_no_scan():
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.repeat(rng.integers(0, 130, (8, 8, 4)), 6, axis=0), 6, axis=1)
    assert is_label_map(blocks)
    assert is_label_map(blocks.astype(np.float32))
    noisy = np.clip(rng.normal(90, 20, (48, 48, 4)), 0, 255).astype(np.uint8)
    noisy[:12] = 0
    assert not is_label_map(noisy)
    assert not is_label_map(IMAGE)
    assert not is_label_map(np.zeros((4, 4, 4)))


def test_read_label__scan_in_a_label_folder_is_refused(tmp_path):
    write(tmp_path, "images/a.nii")
    write_nifti(tmp_path / "labels" / "a.nii", make_scan(shape_zyx=(6, 24, 20), seed=3)[0])
    assert "label looks like a scan" in examine(tmp_path).refused["images/a.nii"]


# Patients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "patient"),
    [
        ("patient001_frame01", "patient001"),
        ("patient001_frame_12", "patient001"),
        ("P01_T1_pre", "P01"),
        ("P01-ses-02", "P01"),
        ("sub_7_time3_0001", "sub_7"),
        ("20587080_left_cc", "20587080"),
        ("BRA_001", "BRA_001"),
        ("frame_01", "frame_01"),
        ("hippocampus", "hippocampus"),
    ],
)
def test_patient_of_stem__frames_time_points_contrasts_and_sides_are_removed(stem, patient):
    assert patient_of_stem(stem) == patient


@pytest.mark.parametrize(
    ("names", "num_patients"),
    [
        (["train/P01/a.nii", "train/P02/a.nii", "test/P03/a.nii"], 3),
        (["P01_t1.nii", "P01_t2.nii", "P02_t1.nii"], 2),
        (["T1/P01.nii", "T2/P01.nii", "T1/P02.nii"], 2),
        (["T1/001.nii", "T2/001.nii", "T1/002.nii"], 2),
        (["train/T1/001.nii", "train/T2/001.nii", "test/T1/001.nii"], 2),
        (["images/fold_0/P01/a.nii", "images/fold_1/P01/b.nii"], 1),
        (["a.nii", "b.nii"], 2),
    ],
)
def test_plain_cases__patients_by_folder_or_name(tmp_path, names, num_patients):
    write(tmp_path, *names)
    assert len({case.patient_key for case in discover(tmp_path).cases}) == num_patients


@pytest.mark.parametrize("layout", ["nnunet", "msd", "csv"])
def test_discover__frames_of_one_patient_are_merged_with_a_note_in_every_layout(tmp_path, layout):
    cases = [f"patient00{p}_frame{f:02d}" for p in (1, 2) for f in (1, 12)]
    suffix = "_0000" if layout == "nnunet" else ""
    write(tmp_path, *[f"imagesTr/{case}{suffix}.nii.gz" for case in cases])
    values = {"channel_names": {"0": "cine"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    if layout == "msd":
        values = {"labels": {}, "training": [f"imagesTr/{case}.nii.gz" for case in cases]}
    if layout == "csv":
        (tmp_path / "list.csv").write_text("image\n" + "\n".join(f"imagesTr/{case}.nii.gz" for case in cases))
    else:
        (tmp_path / "dataset.json").write_text(json.dumps(values))
    found = discover(tmp_path / "list.csv" if layout == "csv" else tmp_path)
    assert len(found.cases) == 4
    assert len({case.patient_key for case in found.cases}) == 2
    assert any("4 scans count as 2 patients" in note for note in found.notes)


@pytest.mark.parametrize("text", ["", " ", "ANON", "Anonymous", "000000", "xxxx", "De-identified", "N/A"])
def test_is_placeholder_id__words_of_anonymisers(text):
    assert is_placeholder_id(text)
    assert not is_placeholder_id(f"{text}P7")


# Files that no reader takes ------------------------------------------------------------------------------------------


def test_discover__files_that_are_no_scans_are_counted_in_every_layout(tmp_path):
    for layout in ("plain", "nnunet", "bids", "msd"):
        root = tmp_path / layout
        folder, name = {
            "plain": ("a", "x.nii.gz"), "nnunet": ("imagesTr", "x_0000.nii.gz"),
            "bids": ("sub-01/anat", "sub-01_T1w.nii.gz"), "msd": ("imagesTr", "x.nii.gz"),
        }[layout]  # fmt: skip
        write(root, f"{folder}/{name}")
        (root / folder / f"._{name}").write_bytes(b"\x00\x05\x16\x07" + b"\0" * 160)
        missing = name.replace("x", "y").replace("sub-01", "sub-02")
        (root / folder / missing).symlink_to("../.git/annex/objects/none.nii.gz")
        pointer = name.replace("x", "z").replace("sub-01", "sub-03")
        (root / folder / pointer).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        if layout == "nnunet":
            (root / "dataset.json").write_text('{"channel_names": {"0": "MRI"}, "labels": {"background": 0}}')
        if layout == "msd":
            listed = [f"imagesTr/{n}" for n in (name, missing, pointer)]
            (root / "dataset.json").write_text(json.dumps({"labels": {}, "training": listed}))
        found = discover(root)
        assert len(found.cases) == 1, layout
        assert found.left_out["broken link"] == 1, layout
        assert found.left_out["git-lfs or git-annex pointer without content (download it)"] == 1, layout
        if layout != "msd":  # a list names its files, so others are not searched
            assert found.left_out["hidden file or folder"] == 1, layout


def test_discover__archives_and_other_gzip_files_are_counted(tmp_path):
    write(tmp_path, "a.nii")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.nii")
    import gzip

    (tmp_path / "log.gz").write_bytes(gzip.compress(b"text " * 200))
    (tmp_path / "no-suffix").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    (tmp_path / "c.xz").write_bytes(lzma.compress(b"text"))
    found = discover(tmp_path)
    assert sorted(case.name for case in found.cases) == ["a.nii", "no-suffix"]
    assert sum(found.left_out.values()) == 3
    assert found.left_out["archive (.tar.gz) is not read: convert it"] == 1


# Layouts with a list of files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"background": 0, "tumor": 1}, {1: "tumor"}),
        (["background", "tumor"], {1: "tumor"}),
        ({"0": "background", "1": "tumor"}, {1: "tumor"}),
        (None, None),
    ],
)
def test_msd_cases__monai_lists_are_read(tmp_path, labels, names):
    write(tmp_path, "imagesTr/c.nii.gz", "imagesTr/d.nii.gz", "labelsTr/c.nii.gz")
    entry = {"image": ["imagesTr/c.nii.gz", "imagesTr/d.nii.gz"], "label": "labelsTr/c.nii.gz", "fold": 0}
    values = {"training": [entry]} | ({} if labels is None else {"labels": labels})
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    found = discover(tmp_path)
    assert [len(case.labels) for case in found.cases] == [1, 1]
    assert found.label_names == names


def test_msd_cases__a_file_per_channel_is_read_once(tmp_path):
    write(tmp_path, "a_0.nii", "a_1.nii")
    values = {"modality": {"0": "T1", "1": "T2"}, "training": [{"image": ["a_0.nii", "a_1.nii"]}]}
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    assert [case.name for case in discover(tmp_path).cases] == ["a_0", "a_1"]
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": "CT", "training": ["a_0.nii"]}))
    assert [case.name for case in discover(tmp_path).cases] == ["a_0"]


def test_msd_cases__equal_names_in_two_folders_get_the_name_of_the_folder(tmp_path):
    write(tmp_path, "imagesTr/001.nii", "imagesTs/001.nii")
    values = {"labels": {}, "training": ["imagesTr/001.nii"], "test": ["imagesTs/001.nii"]}
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    assert [case.name for case in discover(tmp_path).cases] == ["imagesTr/001", "imagesTs/001"]


def test_nnunet_cases__ignore_label_is_no_class_and_can_be_dropped(tmp_path):
    write(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    labels = {"background": 0, "tumour": 1, "ignore": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": labels}))
    found = discover(tmp_path)
    assert found.label_names == {1: "tumour"}
    assert [label.ignore_id for case in found.cases for label in case.labels] == [2]
    found = discover(tmp_path, SourceOptions(label_map=parse_label_map("1=1,2=0")))
    assert found.label_names == {1: "tumour"}


@pytest.mark.parametrize(
    "values",
    [
        {"training": {"image": "a"}},
        {"training": [{"label": "a.nii"}]},
        {"training": [3]},
        {"training": [{"image": {"ct": "a.nii"}}]},
        {"training": [], "labels": 3},
        {"training": [], "labels": {"a": "b"}},
        {"training": [{"image": "a.nii", "label": ["b.nii", "c.nii"]}]},
    ],
)
def test_msd_cases__malformed_lists_are_refused_with_their_file(tmp_path, values):
    write(tmp_path, "a.nii")
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(DataError) as caught:
        discover(tmp_path)
    assert "dataset.json" in str(caught.value.where) or "no scan was found" in caught.value.what


def test_detect_layout__nnunet_version_1_lists_names_without_channels(tmp_path):
    write(tmp_path, "imagesTr/hip_1_0000.nii.gz", "labelsTr/hip_1.nii.gz")
    entry = {"image": "./imagesTr/hip_1.nii.gz", "label": "./labelsTr/hip_1.nii.gz"}
    values = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "hip"}, "training": [entry], "test": []}
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    found = discover(tmp_path)
    assert found.layout == "nnU-Net raw"
    assert [(case.name, len(case.labels)) for case in found.cases] == [("hip_1_0000", 1)]


def bids(tmp_path, *labels, image="sub-01_T1w.nii.gz"):
    (tmp_path / "dataset_description.json").write_text("{}")
    write(tmp_path / "sub-01" / "anat", image)
    write(tmp_path / "derivatives" / "x" / "sub-01" / "anat", *labels, array=LABEL)
    (case,) = discover(tmp_path).cases
    return case, [path.name for label in case.labels for path in label.scan.paths]


def test_bids_cases__masks_of_several_things_need_a_choice(tmp_path):
    case, _ = bids(tmp_path, "sub-01_desc-brain_mask.nii.gz", "sub-01_desc-lesion_mask.nii.gz")
    assert "Choose with --label-desc lesion" in case.refusal
    found = discover(tmp_path, SourceOptions(label_desc="lesion"))
    assert [path.name for label in found.cases[0].labels for path in label.scan.paths] == [
        "sub-01_desc-lesion_mask.nii.gz"
    ]
    assert found.left_out["label of another --label-desc"] == 1
    with pytest.raises(UsageError, match="--label-desc must be among brain, lesion, got tumour"):
        discover(tmp_path, SourceOptions(label_desc="tumour"))


def test_bids_cases__brain_mask_of_one_subject_and_lesion_mask_of_another_are_not_one_class(tmp_path):
    (tmp_path / "dataset_description.json").write_text("{}")
    for subject, name in (("01", "brain"), ("02", "lesion")):
        write(tmp_path / f"sub-{subject}" / "anat", f"sub-{subject}_T1w.nii.gz")
        folder = tmp_path / "derivatives" / "x" / f"sub-{subject}" / "anat"
        write(folder, f"sub-{subject}_desc-{name}_mask.nii.gz", array=LABEL)
    assert all("show several things (desc-brain, desc-lesion)" in r for r in examine(tmp_path).refused.values())
    assert set(examine(tmp_path, SourceOptions(label_desc="lesion")).refused) == set()


def test_bids_cases__mask_with_a_label_goes_before_others(tmp_path):
    case, chosen = bids(tmp_path, "sub-01_desc-brain_mask.nii.gz", "sub-01_label-lesion_mask.nii.gz")
    assert chosen == ["sub-01_label-lesion_mask.nii.gz"]
    assert case.refusal is None


def test_bids_cases__dseg_goes_before_mask(tmp_path):
    _, chosen = bids(tmp_path, "sub-01_desc-a_mask.nii.gz", "sub-01_desc-z_dseg.nii.gz")
    assert chosen == ["sub-01_desc-z_dseg.nii.gz"]


def test_bids_cases__masks_of_named_labels_are_classes(tmp_path):
    case, chosen = bids(tmp_path, "sub-01_label-core_mask.nii.gz", "sub-01_label-edema_mask.nii.gz")
    assert len(chosen) == 2
    assert [label.class_id for label in case.labels] == [1, 2]
    assert discover(tmp_path).label_names == {1: "core", 2: "edema"}


def test_bids_cases__name_of_the_image_inside_the_label_chooses_it(tmp_path):
    for name in ("sub-01_T1w", "sub-01_T2w", "sub-02_T1w"):
        write(tmp_path, f"{name[:6]}/anat/{name}.nii.gz")
    write(tmp_path, "derivatives/x/sub-01/anat/sub-01_T2w_label-core_mask.nii.gz")
    labelled = {case.name: len(case.labels) for case in discover(tmp_path).cases}
    assert labelled == {"sub-01_T1w": 0, "sub-01_T2w": 1, "sub-02_T1w": 0}


def test_bids_cases__mask_of_another_program_beside_the_image_is_no_scan(tmp_path):
    write(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w_seg.nii.gz")
    refused = examine(tmp_path).refused
    assert list(refused) == ["sub-01_T1w_seg"]
    assert "looks like a label map" in refused["sub-01_T1w_seg"]


@pytest.mark.parametrize("names", [("desc-a_mask", "desc-b_mask"), ("desc-a_dseg", "desc-b_dseg")])
def test_bids_cases__two_labels_without_a_rule_refuse_the_image(tmp_path, names):
    case, _ = bids(tmp_path, *[f"sub-01_{name}.nii.gz" for name in names])
    report = examine_cases([case], settings=SETTINGS)
    assert "the image has 2 labels" in report.refused[case.name]


# Advice that can be followed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "given"), [(-1, "-1=0,1=1"), (70001, "1=1,70001=2")])
def test_map_ids__suggested_map_works(tmp_path, value, given):
    label = LABEL.astype(np.int32)
    label[0, 0, :5] = value
    write(tmp_path, "a.nii")
    write_nifti(tmp_path / "a_seg.nii", label)
    assert f"--label-map{'=' if given[0] == '-' else ' '}{given}" in examine(tmp_path).refused["a.nii"]
    report = examine(tmp_path, SourceOptions(label_map=parse_label_map(given)))
    assert not report.refused


# One patient under several names, one file in several entries -------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "num_patients"),
    [
        (("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000"), 2),
        (("OAS1_0001_MR1", "OAS1_0001_MR2", "OAS1_0002_MR1"), 2),
        (("P01_20190101", "P01_20200101", "P02_20190101"), 2),
        (("case_00001", "case_00002"), 2),
        (("1.2.3.4.0001", "1.2.3.4.0002"), 2),
        (("P01", "p01"), 1),
        (("R001/sub-a", "R001/sub-b"), 2),
    ],
)
def test_discover__folders_of_one_patient_are_merged(tmp_path, folders, num_patients):
    write(tmp_path, *[f"{folder}/t1.nii.gz" for folder in folders])
    found = discover(tmp_path)
    assert len({case.patient_key for case in found.cases}) == num_patients
    is_merged = num_patients < len(folders)
    assert any("count as" in note for note in found.notes) == is_merged


def test_discover__folders_with_many_numbered_scans_are_noted(tmp_path):
    write(tmp_path, *[f"{kind}/{kind}_{n}x.nii.gz" for kind in ("benign", "malignant") for n in range(4)])
    assert any("more than three numbered names, e.g. benign" in note for note in discover(tmp_path).notes)


def test_msd_cases__files_of_one_entry_are_one_patient(tmp_path):
    write(tmp_path, "imagesTr/t1x.nii.gz", "imagesTr/other.nii.gz", "imagesTr/unlisted.nii.gz")
    entry = {"image": ["imagesTr/t1x.nii.gz", "imagesTr/other.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry]}))
    found = discover(tmp_path)
    assert [case.patient_key for case in found.cases] == ["t1x", "t1x"]
    assert found.left_out["scan that dataset.json does not list"] == 1


def test_discover__image_listed_twice_is_read_once_or_refused(tmp_path):
    write(tmp_path, "a.nii.gz", "b.nii.gz", "a_seg.nii.gz")
    table = tmp_path / "list.csv"
    table.write_text("image,label,patient\na.nii.gz,a_seg.nii.gz,X\n./a.nii.gz,,X\nb.nii.gz,,Y\nb.nii.gz,,Z\n")
    found = discover(table)
    assert {case.name: len(case.labels) for case in found.cases} == {"a.nii.gz": 1, "b.nii.gz": 0}
    assert found.left_out["note: image listed more than once, read once"] == 2
    report = examine_cases(found.cases, settings=SETTINGS)
    assert report.refused == {
        "b.nii.gz": "the image is listed 2 times with different labels or patients. Keep one entry."
    }


def test_bids_cases__plain_and_compressed_copy_are_refused_by_name(tmp_path):
    (tmp_path / "dataset_description.json").write_text("{}")
    write(tmp_path / "sub-01" / "anat", "sub-01_T1w.nii", "sub-01_T1w.nii.gz")
    refused = examine(tmp_path).refused
    assert sorted(refused) == ["anat/sub-01_T1w.nii", "anat/sub-01_T1w.nii.gz"]


def test_discover__label_of_several_patients_is_noted(tmp_path):
    write(tmp_path, "a.nii.gz", "b.nii.gz", "x_seg.nii.gz")
    (tmp_path / "list.csv").write_text("image,label\na.nii.gz,x_seg.nii.gz\nb.nii.gz,x_seg.nii.gz\n")
    assert (
        "1 label belongs to scans of several patients each, e.g. x_seg.nii.gz" in discover(tmp_path / "list.csv").notes
    )


@pytest.mark.parametrize(
    ("header", "meant"), [("image,mask", "label"), ("image,subject_id", "patient"), ("image,image", "there once")]
)
def test_csv_cases__column_that_may_be_needed_is_refused(tmp_path, header, meant):
    write(tmp_path, "a.nii.gz")
    (tmp_path / "list.csv").write_text(f"{header}\na.nii.gz,a.nii.gz\n")
    with pytest.raises(DataError, match=meant):
        discover(tmp_path / "list.csv")


def test_csv_cases__other_columns_are_noted(tmp_path):
    write(tmp_path, "a.nii.gz")
    (tmp_path / "list.csv").write_text("image,age\na.nii.gz,31\n")
    assert "columns of the list that are not used: age" in discover(tmp_path / "list.csv").notes


@pytest.mark.parametrize("ending", [".part", "~", ".bak", ".orig"])
def test_discover__backup_copies_are_left_out(tmp_path, ending):
    write(tmp_path, "a.nii.gz", "b.nii.gz")
    (tmp_path / "b.nii.gz").rename(tmp_path / f"b.nii.gz{ending}")
    found = discover(tmp_path)
    assert [case.name for case in found.cases] == ["a.nii.gz"]
    assert found.left_out["backup or unfinished copy"] == 1


def test_discover__a_file_is_not_its_folder(tmp_path):
    write(tmp_path, "a.nii.gz", "b.nii.gz", "a_seg.nii.gz")
    (case,) = discover(tmp_path / "a.nii.gz").cases
    assert (case.name, len(case.labels)) == ("a.nii.gz", 1)


# Ids of named classes -----------------------------------------------------------------------------------------------


def test_class_ids__ids_of_other_labels_stay_free(tmp_path):
    write(tmp_path, "P1/ct.nii.gz", "P2/ct.nii.gz", "P2/seg.nii.gz")
    write(tmp_path, "P1/segmentations/liver.nii.gz", array=LABEL)
    assert "--label-map 1=1,2=2" in examine(tmp_path).refused["P2/ct.nii.gz"]
    options = SourceOptions(label_map=parse_label_map("1=1"))
    assert discover(tmp_path, options).label_names == {1: "label 1", 2: "liver"}
    assert [sorted(record.label_voxels) for record in examine(tmp_path, options).records] == [[2], [1]]


def test_class_ids__names_of_the_user_decide(tmp_path):
    write(tmp_path, "P1/ct.nii.gz")
    write(tmp_path, "P1/segmentations/liver.nii.gz", "P1/segmentations/spleen.nii.gz", array=LABEL * 0)
    names = {7: "liver", 3: "spleen"}
    (case,) = discover(tmp_path, SourceOptions(label_names=names)).cases
    assert {label.scan.name: label.class_id for label in case.labels} == {"liver.nii.gz": 7, "spleen.nii.gz": 3}
    with pytest.raises(UsageError, match="--label-names must have the classes that files name, spleen is missing"):
        discover(tmp_path, SourceOptions(label_names={1: "liver"}))


def test_class_ids__case_is_no_part_of_a_class(tmp_path):
    for number in ("1", "2"):
        stem = f"Training/sub-r{number}/anat/sub-r{number}_ses-1"
        write(tmp_path, f"{stem}_T1w.nii.gz")
        write(tmp_path, f"{stem}_label-L_desc-T1lesion_mask.nii.gz", array=LABEL)
    found = discover(tmp_path)
    assert found.label_names == {1: "L_desc_T1lesion"}


@pytest.mark.parametrize(("factor", "message"), [(1e300, "must fit float32"), (2**40, "must fit 32 bits")])
def test_to_storable_dtype__values_that_would_change_are_refused(tmp_path, factor, message):
    np.save(tmp_path / "a.npy", IMAGE.astype(np.float64 if isinstance(factor, float) else np.int64) * factor)
    assert message in examine(tmp_path).refused["a.npy"]


def test_summarise__masks_of_1_and_255_are_noted(tmp_path):
    for name, factor in (("a", 1), ("b", 255)):
        write(tmp_path, f"{name}.nii.gz")
        write(tmp_path, f"{name}_seg.nii.gz", array=LABEL * factor)
    found = discover(tmp_path)
    notes = summarise(found, examine(tmp_path))["source_notes"]
    assert "some labels hold only id 255 and others only 1: --label-map joins them" in notes
    report = examine(tmp_path, SourceOptions(label_map=parse_label_map("1=1,255=1")))
    assert {tuple(record.label_voxels) for record in report.records} == {(1,)}


@pytest.mark.parametrize("word", ["prob", "softmax", "uncertainty", "probability_map"])
def test_plain_cases__map_computed_from_a_scan_is_left_out_and_counted(tmp_path, word):
    write(tmp_path, "P01.nii.gz", "P02.nii.gz", f"P01_{word}.nii.gz", f"maps/{word}/P02.nii.gz")
    found = discover(tmp_path)
    assert [case.name for case in found.cases] == ["P01.nii.gz", "P02.nii.gz"]
    assert found.left_out["map computed from a scan, by its name (probability, uncertainty, ...)"] == 2


def test_plain_cases__scan_with_such_a_word_and_no_origin_is_a_scan(tmp_path):
    write(tmp_path, "P01_prob.nii.gz", "P02.nii.gz", "entropy study/P03.nii.gz")
    assert len(discover(tmp_path).cases) == 3


def test_plain_cases__accents_of_macos_and_of_other_systems_are_one_name(tmp_path):
    write(tmp_path, "Mu\u0308ller.nii.gz", "M\u00fcller_seg.nii.gz")
    assert pairs(tmp_path) == {"Mu\u0308ller.nii.gz": ["M\u00fcller_seg.nii.gz"]}


def test_label__volume_per_class_is_refused_with_and_without_a_frame(tmp_path):
    write(tmp_path, "P1.nii.gz")
    affine = nib.load(tmp_path / "P1.nii.gz").affine
    classes = np.stack([LABEL, 1 - LABEL], axis=-1).transpose(2, 1, 0, 3)
    nib.save(nib.Nifti1Image(classes, affine), tmp_path / "P1_seg.nii.gz")
    for frame in (None, 0):
        report = examine_cases(discover(tmp_path, SourceOptions(frame=frame)).cases, settings=SETTINGS)
        assert "must have one too, got 2. Write its classes as ids" in report.refused["P1.nii.gz"]


def test_label__frame_of_a_scan_in_time_is_that_of_its_label(tmp_path):
    affine = np.diag([-1.0, -1, 5, 1])
    for name, first in (("P1.nii.gz", IMAGE), ("P1_seg.nii.gz", 0 * LABEL)):
        second = LABEL if "seg" in name else IMAGE + 7
        volumes = np.stack([first, second], axis=-1).transpose(2, 1, 0, 3)
        nib.save(nib.Nifti1Image(volumes, affine), tmp_path / name)
    report = examine_cases(discover(tmp_path, SourceOptions(frame=1)).cases, settings=SETTINGS)
    assert [record.label_voxels for record in report.records] == [{1: int(LABEL.sum())}]


def test_index__dicom_of_an_old_form_is_named(tmp_path):
    write(tmp_path, "P1.nii.gz")
    (tmp_path / "IM1").write_bytes(b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" + bytes(400))
    found = discover(tmp_path)
    assert [reason for reason in found.left_out if "dcmconv" in reason] != []
