"""Stacks of pictures by their names, and voxel sizes of ImageJ and OME."""

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from samgraft.shared.errors import DataError
from samgraft.shared.scans.discovery import SourceOptions
from samgraft.shared.scans.names import group_slices
from samgraft.shared.scans.readers.images import inspect_pictures, read_image_stack
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import examine_cases
from samgraft.shared.store.examine import BuildSettings
from store_factory import make_scan

IMAGE, LABEL = make_scan(shape_zyx=(6, 24, 20))
SETTINGS = BuildSettings(modality=Modality.MRI, salt="")


def write_stack(root, names, volume=IMAGE):
    for name, slice_HW in zip(names, volume, strict=False):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(slice_HW.astype(np.uint16)).save(path)


def numbered(pattern):
    return [pattern.format(z) for z in range(len(IMAGE))]


def examine(root):
    found = discover(root)
    return found, examine_cases(found.cases, settings=SETTINGS, label_names=found.label_names)


@pytest.mark.parametrize(
    ("texts", "groups"),
    [
        (["s0", "s1", "s2"], [[0, 1, 2]]),
        (["s2", "s10", "s1"], [[2, 0, 1]]),
        (["p1_s0", "p1_s1", "p2_s0", "p2_s1"], [[0, 1], [2, 3]]),
        (["patient1_s4", "patient2_s7"], [[0], [1]]),
        (["t1_0", "t1_1", "t2_0", "t2_1"], [[0, 1], [2, 3]]),
        (["1200_1", "1201_2", "1201_3"], [[0, 1, 2]]),
        (["s1of9", "s2of9"], [[0, 1]]),
        (["s1", "s2", "preview"], [[0, 1], [2]]),
    ],
)
def test_group_slices__numbers_in_names_separate_stacks(texts, groups):
    assert [list(group.members) for group in group_slices(texts)] == groups


def test_plain_cases__two_patients_in_one_folder_are_two_stacks(tmp_path):
    other = make_scan(shape_zyx=(6, 24, 20), seed=5)
    for patient, (image, label) in (("p1", (IMAGE, LABEL)), ("p2", other)):
        write_stack(tmp_path / "images", numbered(patient + "_s{:03d}"), image)
        write_stack(tmp_path / "masks", numbered(patient + "_s{:03d}"), label)
    found, report = examine(tmp_path)
    assert len({case.patient_key for case in found.cases}) == 2
    assert {record.label_voxels[1] for record in report.records} == {int(LABEL.sum()), int(other[1].sum())}
    assert any("separated by their names" in note for note in found.notes)


def test_plain_cases__masks_of_several_classes_in_one_folder_are_classes(tmp_path):
    write_stack(tmp_path / "images", numbered("{:03d}"))
    write_stack(tmp_path / "masks", numbered("liver_seg_{:03d}"), LABEL)
    write_stack(tmp_path / "masks", numbered("spleen_seg_{:03d}"), LABEL * 0)
    found, report = examine(tmp_path)
    assert found.label_names == {1: "liver", 2: "spleen"}
    assert report.records[0].label_voxels == {1: int(LABEL.sum())}


def test_plain_cases__numbered_masks_of_one_slice_are_merged(tmp_path):
    write_stack(tmp_path, numbered("s_{:03d}"))
    write_stack(tmp_path, numbered("s_{:03d}_mask_1"), LABEL)
    write_stack(tmp_path, numbered("s_{:03d}_mask_2"), np.roll(LABEL, 9, axis=1) * (1 - LABEL))
    _, report = examine(tmp_path)
    expected = np.maximum(LABEL, np.roll(LABEL, 9, axis=1))
    assert report.records[0].label_voxels == {1: int(expected.sum())}


def test_plain_cases__masks_numbered_otherwise_than_their_slices_are_refused(tmp_path):
    write_stack(tmp_path / "images", numbered("{}"))
    write_stack(tmp_path / "masks", [str(z + 1) for z in range(6)], LABEL)
    _, report = examine(tmp_path)
    assert "must have the same numbers (got 0 and 1)" in report.refused["images"]


def test_plain_cases__names_without_numbers_are_no_stack(tmp_path):
    write_stack(tmp_path, ["alpha", "beta", "gamma"])
    _, report = examine(tmp_path)
    assert "no numbers that order them" in report.refused["."]
    assert len(discover(tmp_path, SourceOptions(pictures_are_scans=True)).cases) == 3


def test_plain_cases__missing_slices_are_noted(tmp_path):
    write_stack(tmp_path / "p", ["1", "2", "3", "7", "8"])
    found, _ = examine(tmp_path)
    assert "1 stack of pictures lacks slices by their numbers, e.g. p" in found.notes


# Voxel sizes ---------------------------------------------------------------------------------------------------------


def write_tiff_volume(path, description, *, pixels_per_unit=None, volume=IMAGE):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270] = description
    if pixels_per_unit is not None:
        info[282], info[283], info[296] = *(TiffImagePlugin.IFDRational(n) for n in pixels_per_unit), 1
    first, *others = [Image.fromarray(page.astype(np.uint16)) for page in volume]
    first.save(path, save_all=True, append_images=others, tiffinfo=info)
    return path


def spacing_of(path):
    scan = read_image_stack([path], where="a")
    return np.abs(np.diag(scan.affine)[:3])[::-1], scan.notes


IMAGEJ = "ImageJ=1.54f\nimages=6\nslices=6\nunit={}\nspacing={}\n"
OME = (
    '<?xml version="1.0"?><OME xmlns="x"><Image ID="I"><Pixels ID="P" SizeC="1" SizeT="1" SizeZ="6" {}/></Image></OME>'
)


@pytest.mark.parametrize(
    ("description", "pixels_per_unit", "expected"),
    [
        (IMAGEJ.format("mm", 2.5), (2, 4), (2.5, 0.25, 0.5)),
        (IMAGEJ.format("cm", 0.3), (10, 20), (3, 0.5, 1)),
        (IMAGEJ.format("\\u00B5m", 200.0), (0.01, 0.02), (0.2, 0.05, 0.1)),
        (OME.format('PhysicalSizeX="500" PhysicalSizeY="250" PhysicalSizeZ="2000"'), None, (2, 0.25, 0.5)),
        (
            OME.format('PhysicalSizeX="0.5" PhysicalSizeXUnit="mm" PhysicalSizeY="250" PhysicalSizeYUnit="&#181;m"'),
            None,
            (1, 0.25, 0.5),
        ),
    ],
)
def test_read_image_stack__sizes_of_imagej_and_ome_are_read(tmp_path, description, pixels_per_unit, expected):
    path = write_tiff_volume(tmp_path / "a.tif", description, pixels_per_unit=pixels_per_unit)
    sizes, notes = spacing_of(path)
    np.testing.assert_allclose(sizes, expected, rtol=1e-6)
    assert notes == ("spacing taken from the TIFF header",)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (IMAGEJ.format("furlong", 1), "unit of the TIFF header is not known"),
        (IMAGEJ.format("um", 1), "voxel sizes must lie in"),
        (OME.format('PhysicalSizeX="wide" PhysicalSizeY="1"'), "voxel sizes in the TIFF header are damaged"),
        (OME.replace('SizeZ="6"', 'SizeZ="9"').format(""), "announces 9 slices, 6 can be read"),
        (OME.format("").replace("</Image>", '<Pixels ID="Q"/></Image>'), "must hold one image, got 2"),
    ],
)
def test_read_image_stack__unusable_sizes_are_refused(tmp_path, description, message):
    path = write_tiff_volume(tmp_path / "a.tif", description, pixels_per_unit=(2, 2))
    with pytest.raises(DataError, match=message):
        spacing_of(path)
    if "voxel sizes must lie" not in message:
        with pytest.raises(DataError, match=message):
            inspect_pictures([path], where="a")


def test_read_image_stack__printer_resolution_is_no_voxel_size_and_spacing_file_counts_first(tmp_path):
    plain = write_tiff_volume(tmp_path / "a.tif", "made by a scanner", pixels_per_unit=(72, 72))
    assert spacing_of(plain)[1] == ("no spacing.json: spacing taken as 1 mm",)
    (tmp_path / "spacing.json").write_text('{"spacing_mm": [4, 1, 1]}')
    path = write_tiff_volume(tmp_path / "b.tif", IMAGEJ.format("mm", 2.5), pixels_per_unit=(2, 2))
    np.testing.assert_allclose(spacing_of(path)[0], (4, 1, 1))


def test_read_image_stack__slices_of_several_sizes_are_refused(tmp_path):
    for number, size in enumerate((1, 2)):
        path = tmp_path / f"{number}.tif"
        write_tiff_volume(path, IMAGEJ.replace("6", "1").format("mm", 1), pixels_per_unit=(size, 1), volume=IMAGE[:1])
    with pytest.raises(DataError, match="must have one spacing, got 2"):
        read_image_stack(sorted(tmp_path.iterdir()), where="a")
