"""Random mixtures of formats, layouts and faults, in which no file is lost without a trace."""

import gzip
import json
import tempfile
import zlib
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
from dicom_factory import new_dataset, save, write_enhanced, write_segmentation, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from samgraft.shared.errors import DataError
from samgraft.shared.scans.header_check import check_headers
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import examine_cases
from samgraft.shared.store.examine import BuildSettings, examine_case
from store_factory import make_scan

SimpleITK = pytest.importorskip("SimpleITK", reason="the second reader is a development dependency")

SHAPE = (4, 18, 16)
SETTINGS = BuildSettings(modality=Modality.MRI, salt="")
FORMATS = ("nii", "nii.gz", "nrrd", "npy", "png", "tif", "dicom", "enhanced")
FAULTS = ("none", "none", "cut", "emptied", "text", "pixel changed")
LABEL_NAMES = ("", "{0}_seg", "masks/{0}", "{0}_mask_1", "segmentation_{0}", "liver_nothing")
EXTRAS = (
    *(".hidden", "archive.tar.gz", "table.csv", "notes.gz", "broken", "pointer.nii.gz", "._copy.nii.gz", "x.mha"),
    *("case.nii.gz.part", "scan.zip", "report.dcm", "annex"),
)
LAYOUTS = ("nnU-Net", "nnU-Net 1", "Decathlon", "MONAI list", "BIDS")


def write_volume(folder: Path, name: str, kind: str, volume: np.ndarray, flips: tuple[int, int, int]) -> None:
    """Write (Z, H, W) in one format; ``flips`` are the signs of the voxel axes for formats with an orientation."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{kind}"
    directions = np.diag(np.array([-1.0, -1.0, 3.0]) * flips)
    stored = volume.T[tuple(slice(None, None, sign) for sign in flips)]
    origin = np.where(np.array(flips) < 0, -directions.sum(axis=0) * (np.array(volume.T.shape) - 1), 0)
    if kind in ("nii", "nii.gz"):
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = directions, origin
        nib.save(nib.Nifti1Image(stored, affine), path)
    elif kind == "nrrd":
        header = {"space": "right-anterior-superior", "space directions": directions, "space origin": origin}
        nrrd.write(str(path), stored, header)
    elif kind == "npy":
        np.save(path, volume)
    elif kind == "png":
        for z, slice_HW in enumerate(volume):
            # 16 bits, as labels may have them too
            Image.fromarray(slice_HW.astype(np.uint16)).save(folder / f"{name}_{z:02d}.png")
    elif kind == "tif":
        first, *others = [Image.fromarray(page.astype(np.uint16)) for page in volume]
        first.save(path, save_all=True, append_images=others)
    elif kind == "dicom":
        write_series(folder, volume, PatientID=folder.name, SeriesInstanceUID=dicom_uid(folder))
    else:
        write_enhanced(folder / f"{name}.dcm", volume)


def dicom_uid(folder: Path) -> str:
    return f"1.2.{zlib.crc32(folder.name.encode())}"


def damage(path: Path, fault: str) -> None:
    data = path.read_bytes()
    if fault == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "emptied":
        path.write_bytes(b"")
    elif fault == "text":
        path.write_text("<html>not found</html>" * 40)
    elif fault == "pixel changed" and path.suffix in (".nii", ".npy"):  # not compressed: another valid file
        path.write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])


def write_extra(root: Path, name: str) -> None:
    if name == "broken":
        (root / "broken.nii.gz").symlink_to("nowhere.nii.gz")
    elif name == "annex":
        (root / "annex.nii.gz").symlink_to(".git/annex/objects/none.nii.gz")
    elif name == "report.dcm":  # a structured report has no pixels
        save(new_dataset(sop_class="1.2.840.10008.5.1.4.1.1.88.22"), root / name)
    elif name == "pointer.nii.gz":
        (root / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    elif name == "notes.gz":
        (root / name).write_bytes(gzip.compress(b"text" * 300))
    else:
        (root / name).write_bytes(b"\x00\x05\x16\x07" * 60)


def independent_volume(paths: tuple[Path, ...]) -> np.ndarray:
    """Read a scan as axial slices with other libraries than the readers use."""
    suffix = paths[0].suffix
    if suffix == ".npy":
        return np.load(paths[0])
    if suffix == ".png":
        return np.stack([SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))) for path in sorted(paths)])
    if suffix == ".tif" or (suffix in (".nii", ".gz", ".nrrd")):
        image = SimpleITK.ReadImage(str(paths[0]))
        return SimpleITK.GetArrayFromImage(image if suffix == ".tif" else SimpleITK.DICOMOrient(image, "LPS"))
    if suffix == ".dcm":
        image = SimpleITK.ReadImage(str(paths[0]))
        return SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(image, "LPS"))
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(paths[0].parent))
    assert set(names) == {str(path) for path in paths}
    return SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(SimpleITK.ReadImage(names), "LPS"))


ITEM = st.tuples(
    st.sampled_from(FORMATS),
    st.sampled_from(FAULTS),
    st.sampled_from(LABEL_NAMES),
    st.tuples(*[st.sampled_from([1, -1])] * 3),
    st.sampled_from(["", "train/", "images/"]),
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(items=st.lists(ITEM, min_size=1, max_size=4), extras=st.lists(st.sampled_from(EXTRAS), unique=True, max_size=4))
def test_discover__every_file_is_stored_with_equal_voxels_or_named(items, extras):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, (kind, fault, label_name, flips, parent) in enumerate(items):
            image, label = make_scan(shape_zyx=SHAPE, seed=number)
            place = root / parent / f"P{number}"
            write_volume(place, f"case{number}", kind, image, flips)
            scan_files = sorted(place.iterdir())
            if label_name and kind in ("nii", "nii.gz", "nrrd", "npy", "png"):
                target = place / label_name.format(f"case{number}")
                write_volume(target.parent, target.name, kind, label, flips)
            elif label_name and kind == "dicom":
                write_segmentation(place / "seg.dcm", {"lesion": label.astype(bool)}, series_uid=dicom_uid(place))
            damage(scan_files[number % len(scan_files)], fault)
        for name in extras:
            write_extra(root, name)
        check_accounting(root)


LISTED_ITEM = st.tuples(
    st.sampled_from(["none", "none", "none", "cut", "emptied", "text"]),
    st.sampled_from(["label", "label", "no label", "two labels", "unlisted"]),
    st.integers(1, 2),
)


def write_layout(root: Path, layout: str, items) -> None:
    """Write cases of (fault, label, number of channels) in a layout that names its files."""
    entries = []
    for number, (fault, role, num_channels) in enumerate(items):
        case = f"c{number:03d}"
        image, label = make_scan(shape_zyx=SHAPE, seed=number)
        is_bids = layout == "BIDS"
        folder = root / f"sub-{case}" / "anat" if is_bids else root / "imagesTr"
        endings = ["_T1w", "_T2w"] if is_bids else ["_0000", "_0001"]
        names = [f"{'sub-' if is_bids else ''}{case}{ending}" for ending in endings[:num_channels]]
        for name in names:
            write_volume(folder, name, "nii", image, (1, 1, 1))
        damage(folder / f"{names[0]}.nii", fault)
        label_folder = root / "derivatives" / "x" / f"sub-{case}" if is_bids else root / "labelsTr"
        labels = {"no label": [], "two labels": ["a", "b"]}.get(role, [""])
        for which in labels:
            middle = f"_desc-{which}" if which else ""
            name = f"sub-{case}{middle}_mask" if is_bids else f"{case}{which}"
            write_volume(label_folder, name, "nii", label, (1, 1, 1))
        if role != "unlisted":
            entry = {"image": [f"imagesTr/{name}.nii" for name in names]}
            entries.append(entry | ({"label": f"labelsTr/{case}.nii"} if role == "label" else {}))
    tables = {
        "nnU-Net": {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "lesion": 1}},
        "nnU-Net 1": {"labels": {"0": "background", "1": "lesion"}, "training": [{"image": "imagesTr/c000.nii"}]},
        "Decathlon": {"training": [{**e, "image": e["image"][0]} for e in entries]},
        "MONAI list": {"training": entries, "validation": entries[:1]},
    }
    file = root / ("dataset_description.json" if layout == "BIDS" else "dataset.json")
    file.write_text(json.dumps(tables.get(layout, {})))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS),
    items=st.lists(LISTED_ITEM, min_size=1, max_size=4),
    extras=st.lists(st.sampled_from(EXTRAS), unique=True, max_size=4),
)
def test_discover__files_of_every_layout_are_stored_or_named(layout, items, extras):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_layout(root, layout, items)
        for name in extras:
            write_extra(root if layout == "BIDS" else root / "imagesTr", name)
        check_accounting(root)


def labels_without_image(root: Path, found) -> set[Path]:
    """Return the files that the report lists as labels without image, by path, name or case."""
    listed = set(found.labels_without_image)
    # Stacks of pictures are listed by their folder.
    stacks = {name.rpartition(" ")[0] for name in listed if " " in name}
    return {
        path
        for path in root.rglob("*")
        if path.is_file()
        and (
            not listed.isdisjoint({path.relative_to(root).as_posix(), path.name})
            or (path.parent.name == "labelsTr" and path.stem in listed)
            or path.parent.relative_to(root).as_posix() in stacks
        )
    }


def check_accounting(root: Path) -> None:
    """Assert that every file below a folder is in a stored series, in a refused case, or counted."""
    try:
        found = discover(root)
    except DataError as err:
        if "no scan was found" not in err.what:
            raise
        return
    report = examine_cases(found.cases, settings=SETTINGS, label_names=found.label_names)
    headers = check_headers(root)
    assert headers.num_scans == len(found.cases)
    assert sum(headers.refused.values()) <= len(report.refused)  # a build also finds damaged pixels
    names = {case.name for case in found.cases}
    assert {result.name for result in report.results} == names
    in_cases = {path for case in found.cases for path in case.scan.paths}
    in_labels = {path for case in found.cases for label in case.labels for path in label.scan.paths}
    on_disk = {path for path in root.rglob("*") if path.is_symlink() or path.is_file()}
    unpaired = labels_without_image(root, found)
    rest = on_disk - in_cases - in_labels - unpaired
    counted = sum(n for reason, n in found.left_out.items() if not reason.startswith("note:"))
    assert counted == len(rest), (found.left_out, sorted(rest))
    assert unpaired <= on_disk
    for case in found.cases:
        if case.name in report.refused:
            assert report.refused[case.name]
            continue
        examined = examine_case(case, SETTINGS)
        expected = independent_volume(case.scan.paths)
        np.testing.assert_array_equal(examined.images[examined.record.plane], expected)
