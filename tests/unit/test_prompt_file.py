"""Prompts files: strict reading, and positions that do not depend on the orientation of the scan."""

import json
import re

import numpy as np
import pytest
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.prompting.prompt_file import Frame, read_prompts, slice_prompts
from samgraft.shared.errors import UsageError
from samgraft.shared.scans.orientation import Plane, to_plane

CLASSES = ClassTable(ids=(1, 4), names=("core", "rim"))
GOOD = """
version: 1
coordinates: voxel
prompts:
  - {case: a.nii.gz, class: core, box: [[10, 12, 3], [4, 20, 6]]}
  - {case: a.nii.gz, class: 4, points: [[5, 6, 3], [7, 8, 3], [1, 1, 0]], labels: [1, 0, 1]}
"""
AFFINES = {
    "RAS": np.diag([2.0, 1.0, 3.0, 1.0]),
    "LPS": np.diag([-2.0, -1.0, 3.0, 1.0]),
    "LAI": np.diag([-2.0, 1.0, -3.0, 1.0]),
    "PSR": np.array([[0, 0, 3.0, -4], [-2.0, 0, 0, 9], [0, 1.0, 0, 2], [0, 0, 0, 1]]),
    "SLA": np.array([[0, -1.0, 0, 5], [0, 0, 3.0, 1], [2.0, 0, 0, -7], [0, 0, 0, 1]]),
    "IPL": np.array([[0, 0, -3.0, 1], [0, -1.0, 0, 1], [-2.0, 0, 0, 0], [0, 0, 0, 1]]),
}


HEAD = "version: 1\ncoordinates: voxel\nprompts:\n"


def write(tmp_path, text, name="prompts.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_read_prompts__yaml_and_json_are_equal(tmp_path):
    file = read_prompts(write(tmp_path, GOOD), CLASSES)
    assert file.frame is Frame.VOXEL
    box, points = file.with_scan_names(["a.nii.gz", "b.nii.gz"]).for_case("a.nii.gz")
    assert (box.channel, points.channel) == (0, 1)
    assert points.labels == (1, 0, 1)
    values = {
        "version": 1,
        "coordinates": "voxel",
        "prompts": [
            {"case": "a.nii.gz", "class": "core", "box": [[10, 12, 3], [4, 20, 6]]},
            {"case": "a.nii.gz", "class": 4, "points": [[5, 6, 3], [7, 8, 3], [1, 1, 0]], "labels": [1, 0, 1]},
        ],
    }
    same = read_prompts(write(tmp_path, json.dumps(values), "prompts.json"), CLASSES)
    assert np.array_equal(same.prompts[0].corners, box.corners)
    assert same.prompts[1].labels == points.labels


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("version: 1", "version: 2"), "version: 1, got 2"),
        (("coordinates: voxel", "coordinates: mm"), "one of voxel, ras_mm, lps_mm, got 'mm'"),
        (("coordinates: voxel", "coordinate: voxel"), "got 'coordinate'"),
        (("class: core", "class: kernel"), r"core \(1\), rim \(4\), got 'kernel'"),
        (("class: core, ", ""), "got None"),
        (("class: 4", "class: true"), "got True"),
        (("class: 4", "class: 2"), "got 2"),
        (("box: [[10, 12, 3], [4, 20, 6]]", "bbox: [[10, 12, 3], [4, 20, 6]]"), "got 'bbox'"),
        (("box: [[10, 12, 3], [4, 20, 6]]", "box: [10, 12, 4, 20]"), "2 triples of numbers"),
        (("box: [[10, 12, 3], [4, 20, 6]]", "box: [[10, 12, 3], [4, 20, x]]"), "2 triples of numbers"),
        (("box: [[10, 12, 3], [4, 20, 6]]", "box: [[10, 12, 3], [4, 20, .inf]]"), "2 triples of numbers"),
        ((", box: [[10, 12, 3], [4, 20, 6]]", ""), "box or points"),
        (("labels: [1, 0, 1]", "labels: [1, 0]"), "labels must be 3 times"),
        (("labels: [1, 0, 1]", "labels: [1, 0, 2]"), "labels must be 3 times"),
        (("case: a.nii.gz, class: core", "case: 7, class: core"), "case must be a name"),
        (("prompts:\n", "prompts: []\nversion: 1\n#"), "duplicate key|plain YAML"),
        ((GOOD, "- 1\n"), "keys and values"),
        (("version: 1", "version: true"), "got True"),
        (("[10, 12, 3]", '["10", "12", "3"]'), "2 triples of numbers"),
        (("[10, 12, 3]", "[true, 12, 3]"), "2 triples of numbers"),
        (("[10, 12, 3]", f"[1{'0' * 400}, 12, 3]"), "are finite"),
        (("points: [[5, 6, 3], [7, 8, 3], [1, 1, 0]], labels: [1, 0, 1]", "points: []"), "a list of triples"),
        (("points: [[5, 6, 3], [7, 8, 3], [1, 1, 0]]", "points: [[5, 6], [7, 8], [1, 1]]"), "a list of triples"),
        (("labels: [1, 0, 1]", "labels: [1, 0, -1]"), "labels must be 3 times"),
        (("labels: [1, 0, 1]", "labels: [1, 0, true]"), "labels must be 3 times"),
        ((GOOD, "version: 1\ncoordinates: voxel\nprompts: []\n"), "list of 1 to"),
        ((GOOD, "version: !!python/object/apply:os.getcwd []\n"), "plain YAML"),
    ],
)
def test_read_prompts__bad_file_is_refused(tmp_path, change, text):
    with pytest.raises(UsageError, match=text):
        read_prompts(write(tmp_path, GOOD.replace(*change)), CLASSES)


def test_with_scan_names__unknown_or_missing_case_is_refused(tmp_path):
    file = read_prompts(write(tmp_path, GOOD), CLASSES)
    with pytest.raises(UsageError, match=r"name a scan, got 'a\.nii\.gz' for 1 scan\. Write .* such as b"):
        file.with_scan_names(["b.nii.gz"])
    nameless = read_prompts(write(tmp_path, GOOD.replace("case: a.nii.gz, ", "")), CLASSES)
    assert len(nameless.with_scan_names(["b.nii.gz"]).for_case("b.nii.gz")) == 2
    with pytest.raises(UsageError, match="must name its case"):
        nameless.with_scan_names(["a", "b"])
    with pytest.raises(UsageError, match="does not exist"):
        read_prompts(tmp_path / "gone.yaml", CLASSES)


@pytest.mark.parametrize(
    ("case", "names", "expected"),
    [
        ("a", ["a.nii.gz", "b.nii.gz"], "a.nii.gz"),
        ("P1/t1", ["P1/t1.nrrd", "P2/t1.nrrd"], "P1/t1.nrrd"),
        ("a", ["a", "a.nii"], "a"),
        ("a.nii", ["a.nii", "a.nii.gz"], "a.nii"),
        ("series 1.2", ["series 1.2", "series 1"], "series 1.2"),
        ("a", ["a.nii", "a.nrrd"], "fits 2 scans (a.nii, a.nrrd). Write the name with its ending"),
        ("series 1", ["series 1.2"], "must name a scan, got 'series 1'"),
        ("t1", ["P1/t1.nrrd"], "must name a scan, got 't1'"),
    ],
)
def test_with_scan_names__ending_may_be_left_out(tmp_path, case, names, expected):
    text = HEAD + f"  - {{case: {case}, class: core, points: [[3, 4, 5]]}}\n"
    file = read_prompts(write(tmp_path, text), CLASSES)
    if expected in names:
        assert [bool(file.with_scan_names(names).for_case(name)) for name in names] == [n == expected for n in names]
    else:
        with pytest.raises(UsageError, match=re.escape(expected)):
            file.with_scan_names(names)


def placed(tmp_path, affine, shape, text, plane=Plane.AXIAL, **options):
    file = read_prompts(write(tmp_path, text), CLASSES)
    image, sliced_affine = to_plane(np.zeros(shape, dtype=np.uint8), affine, plane)
    return slice_prompts(
        file.prompts, file.frame, native_affine=affine, affine=sliced_affine, shape_zyx=image.shape, **options
    )


LPS = np.diag([-1.0, -1.0, 3.0, 1.0])
"""Orientation in which voxels of the file and pixels of the slices have equal numbers."""


def test_slice_prompts__box_in_millimetres_of_an_oblique_scan_is_the_hull_of_its_corners(tmp_path):
    """Voxel axes are turned by 45 degrees, and a step of a voxel is 3 mm along both axes of the world.

    The corners (0, 0), (6, 0), (0, 6) and (6, 6) mm are the voxels (0, 0), (1, -1), (1, 1) and (2, 0) from the voxel
    (4, 5), so that two opposite corners alone would give a box of one row.
    """
    oblique = np.array([[3.0, 3.0, 0, 0], [3.0, -3.0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    x, y, _ = oblique[:3, :3] @ [4, 5, 0]
    text = f"coordinates: ras_mm\nprompts:\n  - {{class: core, box: [[{x}, {y}, 2], [{x + 6}, {y + 6}, 2]]}}\n"
    [prompt] = slice_prompts(
        read_prompts(write(tmp_path, f"version: 1\n{text}"), CLASSES).prompts,
        Frame.RAS_MM,
        native_affine=oblique,
        affine=oblique,
        shape_zyx=(4, 12, 10),
    )
    assert (prompt.slice_index, prompt.box) == (2, (4.0, 4.0, 6.0, 6.0))


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("frame", ["voxel", "ras_mm", "lps_mm"])
def test_slice_prompts__marker_voxel_is_found_in_every_orientation(tmp_path, name, frame):
    """A voxel in the file's coordinates becomes the same voxel as pixel of its slice."""
    affine, shape, voxel = AFFINES[name], (9, 11, 13), (2, 7, 4)
    marked = np.zeros(shape, dtype=np.uint8)
    marked[voxel] = 1
    sliced, _ = to_plane(marked, affine, Plane.AXIAL)
    world = affine[:3, :3] @ np.array(voxel) + affine[:3, 3]
    numbers = {"voxel": list(voxel), "ras_mm": world.tolist(), "lps_mm": (world * [-1, -1, 1]).tolist()}[frame]
    text = f"version: 1\ncoordinates: {frame}\nprompts:\n  - {{class: core, points: [{numbers}]}}\n"
    (prompt,) = placed(tmp_path, affine, shape, text)
    ((x, y),) = prompt.points
    assert sliced[prompt.slice_index, round(y), round(x)] == 1
    box = f"version: 1\ncoordinates: {frame}\nprompts:\n  - {{class: core, box: [{numbers}, {numbers}]}}\n"
    (prompt,) = placed(tmp_path, affine, shape, box)
    assert prompt.box == (x, y, x, y)


def test_slice_prompts__box_covers_its_slices_and_joins_points_of_its_entry(tmp_path):
    text = """
version: 1
coordinates: voxel
prompts:
  - {class: core, box: [[6, 8, 4], [2, 3, 7]], points: [[3, 4, 5]]}
"""
    prompts = placed(tmp_path, np.diag([-1.0, -1.0, 3.0, 1.0]), (10, 12, 9), text)
    assert [p.slice_index for p in prompts] == [4, 5, 6, 7]
    assert {p.box for p in prompts} == {(2.0, 3.0, 6.0, 8.0)}
    assert [len(p.points) for p in prompts] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("entry", "got"),
    [
        ("points: [[3, 4, 5], [3, 4, 9]]", "got [3.0, 4.0, 9.0], which is column 3, row 4 of slice 9"),
        ("box: [[3, 4, 5], [10, 4, 5]]", "got [[3.0, 4.0, 5.0], [10.0, 4.0, 5.0]], which is column 10"),
        ("points: [[1.0e+308, 1.0e+308, 5]]", "got [1e+308, 1e+308, 5.0]"),
    ],
)
def test_slice_prompts__place_outside_is_refused_as_it_is_written(tmp_path, entry, got):
    oblique = LPS @ np.array([[3, -3, 0, 0], [3, 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with np.errstate(all="ignore"), pytest.raises(UsageError, match="be inside the scan of 10 x 12 x 9") as refusal:
        placed(tmp_path, oblique if "308" in entry else LPS, (10, 12, 9), f"{HEAD}  - {{class: core, {entry}}}\n")
    assert got in refusal.value.what
    assert refusal.value.where == "prompts.yaml, prompt 1"


@pytest.mark.parametrize(
    ("corners", "slices", "box"),
    [
        ("[[2, 3, 0.5], [6, 8, 1.5]]", [1], (2, 3, 6, 8)),
        ("[[1.5, 2.5, 3.5], [6.5, 8.5, 5.5]]", [4, 5], (2, 3, 6, 8)),
        ("[[2, 3, 4], [6, 8, 6]]", [4, 5, 6], (2, 3, 6, 8)),
        ("[[2.2, 3, 4.2], [2.4, 8, 4.3]]", [4], (2, 3, 2, 8)),
        ("[[-0.5, -0.5, -0.5], [9.5, 11.5, 8.5]]", list(range(9)), (0, 0, 9, 11)),
        ("[[9.2, 0, 8.5], [9.5, 0, 8.5]]", [8], (9, 0, 9, 0)),
    ],
)
def test_slice_prompts__box_contains_voxels_whose_centres_are_inside(tmp_path, corners, slices, box):
    """Half-voxel borders are the borders of voxels: 0.5 to 1.5 is voxel 1 and nothing else."""
    prompts = placed(tmp_path, LPS, (10, 12, 9), HEAD + f"  - {{class: core, box: {corners}}}\n")
    assert [p.slice_index for p in prompts] == slices
    assert {p.box for p in prompts} == {box}


@pytest.mark.parametrize(
    "corners", ["[[0, 0, 0], [10, 12, 9]]", "[[-0.6, 0, 0], [3, 3, 3]]", "[[0, 0, 8.6], [1, 1, 2]]"]
)
def test_slice_prompts__box_beyond_the_border_voxels_is_refused(tmp_path, corners):
    with pytest.raises(UsageError, match="a box must be inside"):
        placed(tmp_path, LPS, (10, 12, 9), HEAD + f"  - {{class: core, box: {corners}}}\n")


def test_slice_prompts__point_between_slices_is_in_the_higher_one(tmp_path):
    text = HEAD + "  - {class: core, points: [[3, 4, 0.5], [3, 4, 2.5], [3, 4, 3.4], [3, 4, 8.5], [3, 4, -0.5]]}\n"
    prompts = placed(tmp_path, LPS, (10, 12, 9), text)
    assert [p.slice_index for p in prompts] == [0, 1, 3, 8]
    assert len(prompts[2].points) == 2


def test_slice_prompts__negative_points_join_the_other_prompts_of_their_class(tmp_path):
    """An entry of negative points takes area away from box and points, in its slice and class only."""
    text = HEAD + (
        "  - {class: core, box: [[2, 3, 4], [6, 8, 5]]}\n"
        "  - {class: core, points: [[3, 3, 4]]}\n"
        "  - {class: rim, points: [[8, 8, 4]]}\n"
        "  - {class: core, points: [[5, 6, 4]], labels: [0]}\n"
    )
    prompts = placed(tmp_path, LPS, (10, 12, 9), text)
    assert [(p.slice_index, p.channel, p.box is not None, p.points, p.labels) for p in prompts] == [
        (4, 0, True, ((5.0, 6.0),), (0,)),
        (4, 0, False, ((3.0, 3.0), (5.0, 6.0)), (1, 0)),
        (4, 1, False, ((8.0, 8.0),), (1,)),
        (5, 0, True, (), ()),
    ]


def test_slice_prompts__only_negative_points_give_a_note_and_no_prompt(tmp_path):
    notes = []
    text = HEAD + "  - {class: core, points: [[3, 3, 2], [4, 4, 2], [5, 5, 3], [5, 5, 4]], labels: [0, 0, 1, 0]}\n"
    prompts = placed(tmp_path, LPS, (10, 12, 9), text, on_note=notes.append)
    assert [(p.slice_index, p.labels) for p in prompts] == [(3, (1,))]
    assert [note.split(",")[0] for note in notes] == [f"slice {n} has only negative points" for n in (2, 4)]


def test_slice_prompts__point_with_both_labels_is_refused(tmp_path):
    text = HEAD + ("  - {class: core, points: [[3, 3, 2]]}\n  - {class: core, points: [[3, 3, 2]], labels: [0]}\n")
    with pytest.raises(UsageError, match="both labels for column 3, row 3 of slice 2") as refusal:
        placed(tmp_path, LPS, (10, 12, 9), text)
    assert refusal.value.where == "prompts.yaml, prompt 2"
