"""Prompts files: strict, and in the right place whatever the orientation of the scan."""

import json

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


def write(tmp_path, text, name="prompts.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_file__reads_yaml_and_json_alike(tmp_path):
    file = read_prompts(write(tmp_path, GOOD), CLASSES)
    assert file.frame is Frame.VOXEL
    box, points = file.for_case("a.nii.gz", is_only=False)
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
        ((GOOD, "version: 1\ncoordinates: voxel\nprompts: []\n"), "list of 1 to"),
        ((GOOD, "version: !!python/object/apply:os.getcwd []\n"), "plain YAML"),
    ],
)
def test_file__bad_ones_are_refused(tmp_path, change, text):
    with pytest.raises(UsageError, match=text):
        read_prompts(write(tmp_path, GOOD.replace(*change)), CLASSES)


def test_file__cases_must_exist(tmp_path):
    file = read_prompts(write(tmp_path, GOOD), CLASSES)
    file.refuse_strangers(["a.nii.gz", "b.nii.gz"])
    with pytest.raises(UsageError, match=r"got 'a\.nii\.gz'; there are b"):
        file.refuse_strangers(["b.nii.gz"])
    nameless = read_prompts(write(tmp_path, GOOD.replace("case: a.nii.gz, ", "")), CLASSES)
    nameless.refuse_strangers(["b.nii.gz"])
    assert len(nameless.for_case("b.nii.gz", is_only=True)) == 2
    with pytest.raises(UsageError, match="must name its case"):
        nameless.refuse_strangers(["a", "b"])
    with pytest.raises(UsageError, match="does not exist"):
        read_prompts(tmp_path / "gone.yaml", CLASSES)


def placed(tmp_path, affine, shape, text, plane=Plane.AXIAL):
    file = read_prompts(write(tmp_path, text), CLASSES)
    image, sliced_affine = to_plane(np.zeros(shape, dtype=np.uint8), affine, plane)
    return slice_prompts(file.prompts, file.frame, native_affine=affine, affine=sliced_affine, shape_zyx=image.shape)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("frame", ["voxel", "ras_mm", "lps_mm"])
def test_marker_voxel__is_found_in_every_orientation(tmp_path, name, frame):
    """A voxel set in the file, pointed at in the file's terms, is the pixel that the prompt names in its slice."""
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


def test_box__covers_its_slices_and_joins_points_of_its_entry(tmp_path):
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


def test_outside__is_refused_with_where(tmp_path):
    text = "version: 1\ncoordinates: voxel\nprompts:\n  - {class: core, points: [[3, 4, 9]]}\n"
    with pytest.raises(UsageError, match="inside the scan of 10 x 12 x 9 voxels") as refusal:
        placed(tmp_path, np.diag([-1.0, -1.0, 3.0, 1.0]), (10, 12, 9), text)
    assert refusal.value.where == "prompts.yaml, prompt 1"
