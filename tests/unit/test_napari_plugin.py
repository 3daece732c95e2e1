"""Layers of napari as scans, prompts and labels, without napari."""

import ast
import importlib
import re
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import yaml
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.napari_plugin import files
from samgraft.finetune.napari_plugin.layer_prompts import prompts_of_layers
from samgraft.finetune.napari_plugin.scan_layers import (
    METADATA,
    image_layer,
    masks_of_layer,
    open_scan,
    placement,
    scan_of_layer,
    segmentation_layers,
)
from samgraft.finetune.prediction.loaded_model import ReadScan, Segmentation
from samgraft.finetune.prediction.prediction_files import NativeMasks
from samgraft.finetune.prompting.prompt_file import slice_prompts
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.orientation import affine_of_axes
from samgraft.shared.scans.readers.nifti import scan_of_array
from samgraft.shared.scans.volume import Modality, volume_from_scan

ROOT = Path(__file__).resolve().parents[2]
TO_VIEWER = np.array([[0, 0, 1], [0, -1, 0], [-1, 0, 0]])
"""RAS+ to superior, posterior, left."""
CLASSES = ClassTable(ids=(1, 4), names=("core", "rim"))


class Unit:
    """Unit of napari that is no length, as its default."""

    def __rmul__(self, _):
        return SimpleNamespace(check=lambda _: False)


class Metre(Unit):
    def __rmul__(self, _):
        return SimpleNamespace(check=lambda _: True, to=lambda _: SimpleNamespace(magnitude=1000.0))


class FakeLayer:
    """The attributes of a napari layer that the plugin reads."""

    def __init__(self, data, *, name="layer", turned=None, unit=None, rgb=False, **arguments):
        self.data, self.name, self.rgb, self.multiscale = data, name, rgb, False
        self.ndim = arguments.pop("ndim", None) or np.ndim(data) - rgb
        self.scale = np.asarray(arguments.get("scale", np.ones(self.ndim)), dtype=float)
        self.translate = np.asarray(arguments.get("translate", np.zeros(self.ndim)), dtype=float)
        self.matrix = np.diag(self.scale) if turned is None else turned
        self.metadata = arguments.get("metadata", {})
        self.units = [unit or Unit()] * self.ndim
        self.features = arguments.get("features", {})
        self.shape_type = arguments.get("shape_type", [])

    def data_to_world(self, coordinates):
        return tuple(self.matrix @ coordinates + self.translate)

    def world_to_data(self, coordinates):
        return tuple(np.linalg.inv(self.matrix) @ (np.asarray(coordinates) - self.translate))


def points_layer(data, **arguments):
    layer = FakeLayer(data, name="points", ndim=len(data[0]), **arguments)
    layer.symbol = ["disc"] * len(data)
    return layer


def read(codes="PSR", shape=(5, 6, 7), spacing=(1.0, 1.5, 2.0), origin=(3.0, -4.0, 5.0), seed=0):
    affine = affine_of_axes(codes, spacing)
    affine[:3, 3] = origin
    values = np.random.default_rng(seed).integers(0, 999, shape).astype(np.int16)
    return ReadScan.in_memory(scan_of_array(values, affine, where="scan"), name="scan")


def opened_layer(scan):
    opened = open_scan(scan)
    data, arguments, kind = image_layer(opened, name="scan")
    assert kind == "image"
    return opened, FakeLayer(data, **arguments)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "PSR", "IRA", "ALI"])
def test_image_layer__every_voxel_is_at_its_place_in_the_patient(codes):
    scan = read(codes)
    opened, layer = opened_layer(scan)
    for ijk in [(0, 0, 0), (4, 0, 0), (1, 2, 3), (4, 5, 6)]:
        abc = np.asarray(ijk)[list(opened.order)]
        assert layer.data[tuple(abc)] == scan.raw.array_ijk[ijk]
        world = TO_VIEWER @ (scan.raw.affine @ [*ijk, 1])[:3]
        assert np.allclose(layer.data_to_world(abc), world)


def test_image_layer__oblique_scan_keeps_its_middle_and_spacing():
    scan = read("LPS")
    angle = np.radians(20)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = replace(scan, raw=replace(scan.raw, affine=turn @ scan.raw.affine))
    placed = placement(open_scan(oblique))
    middle = (np.asarray(scan.raw.array_ijk.shape) - 1) / 2
    assert np.allclose(placed["scale"], [2.0, 1.5, 1.0])
    assert np.allclose(
        placed["scale"] * middle[::-1] + placed["translate"],
        TO_VIEWER @ (oblique.raw.affine @ [*middle, 1])[:3],
    )


def test_scan_of_layer__has_the_grid_of_the_file_and_the_voxels_of_the_layer():
    scan = read()
    _, layer = opened_layer(scan)
    layer.data = layer.data * 2
    found = scan_of_layer(layer, axes="").scan
    assert np.array_equal(found.raw.array_ijk, scan.raw.array_ijk * 2)
    assert np.array_equal(found.raw.affine, scan.raw.affine)
    assert found.case == scan.case


def test_scan_of_layer__of_another_reader_needs_axes():
    layer = FakeLayer(np.zeros((3, 4, 5)), scale=(3, 2, 1), translate=(1, 2, 3))
    with pytest.raises(UsageError, match="not opened by samgraft and has no orientation"):
        scan_of_layer(layer, axes=" ")
    affine = scan_of_layer(layer, axes="SPL").scan.raw.affine
    # Index (a, b, c) is c mm to the left, 2 b mm to the back and 3 a mm up, from the layer's own origin.
    assert np.allclose(affine @ [1, 1, 1, 1], [-(1 + 3), -(2 + 2), 3 + 1, 1])
    in_metres = FakeLayer(np.zeros((3, 4, 5)), scale=(0.003, 0.002, 0.001), unit=Metre())
    assert np.allclose(scan_of_layer(in_metres, axes="SPL").scan.raw.affine, affine_of_axes("SPL", (3, 2, 1)))


def test_scan_of_layer__cropped_copy_is_not_on_the_grid_of_the_file():
    _, layer = opened_layer(read())
    layer.data = layer.data[1:]
    with pytest.raises(UsageError, match="has no orientation"):
        scan_of_layer(layer, axes="")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (FakeLayer(np.zeros((2, 3, 4, 5))), r"three axes, or two for a picture, got shape \(2, 3, 4, 5\)"),
        (FakeLayer(np.arange(60).reshape(4, 5, 3), rgb=True), "must be gray, got color"),
        (FakeLayer(np.zeros((3, 4, 5)), turned=np.array([[1, 0.1, 0], [-0.1, 1, 0], [0, 0, 1]])), "is rotated"),
    ],
)
def test_scan_of_layer__that_is_no_scan_is_refused(layer, message):
    with pytest.raises(DataError, match=message):
        scan_of_layer(layer, axes="SPL")


def test_picture__labels_and_prompts_have_two_axes():
    layer = FakeLayer(np.arange(20.0).reshape(4, 5), scale=(2, 2))
    opened = scan_of_layer(layer, axes="SPL")
    assert opened.scan.raw.array_ijk.shape == (1, 4, 5)
    labels = np.zeros((1, 4, 5), np.int32)
    labels[0, 2, 3] = 4
    [(data, _, _)] = segmentation_layers(segmentation_of(labels, opened), opened, name="p", placed={})
    assert data[2, 3] == 4
    [prompt] = prompts_of_layers([points_layer([(4.0, 6.0)])], layer, opened, classes=CLASSES, class_name="rim").prompts
    assert (prompt.points.tolist(), prompt.channel) == ([[0, 2, 3]], 1)


def segmentation_of(labels_ijk, opened, classes=CLASSES):
    masks = NativeMasks(labels_ijk=labels_ijk, affine=opened.scan.raw.affine, classes=classes)
    return Segmentation(masks=masks, notes=())


def test_segmentation_layers__have_names_colours_and_the_place_of_the_image():
    scan = read()
    opened, layer = opened_layer(scan)
    labels = np.zeros((5, 6, 7), np.int32)
    labels[1, 2, 3] = 4
    [(data, arguments, kind)] = segmentation_layers(
        segmentation_of(labels, opened), opened, name="scan", placed={"scale": layer.scale}
    )
    assert kind == "labels"
    assert np.array_equal(opened.to_file(data), labels)
    assert arguments["features"] == {"index": [0, 1, 4], "class": ["background", "core", "rim"]}
    assert np.array_equal(arguments["scale"], layer.scale)
    assert len({arguments["colormap"][key] for key in (0, 1, 4)}) == 3


def test_segmentation_layers__of_overlapping_classes_are_one_per_class():
    opened, _ = opened_layer(read())
    classes = ClassTable.of_regions({"whole": [1, 2], "part": [2]})
    labels = np.zeros((5, 6, 7), np.int32)
    labels[0, 0, :2] = [3, 1]
    layers = segmentation_layers(segmentation_of(labels, opened, classes), opened, name="scan", placed={})
    assert [arguments["name"] for _, arguments, _ in layers] == ["scan whole", "scan part"]
    assert [int(data.sum()) for data, _, _ in layers] == [2, 1]


# --- prompts ----------------------------------------------------------------------------------------------------------


def placed_prompts(file, scan):
    volume = volume_from_scan(scan.raw, modality=Modality.MRI, where="scan")
    return slice_prompts(
        file.prompts, file.frame, native_affine=scan.raw.affine, affine=volume.affine, shape_zyx=volume.array_zyx.shape
    )


def test_prompts__points_are_those_of_the_voxels_that_were_clicked():
    scan = read("PSR", shape=(20, 12, 16))
    opened, layer = opened_layer(scan)
    clicked = [(3, 2, 4), (5, 2, 6), (9, 7, 1)]
    world = [layer.data_to_world(np.asarray(ijk)[list(opened.order)]) for ijk in clicked]
    features = {"class": ["core", "core", "rim"], "inside": ["yes", "no", "yes"]}
    file = prompts_of_layers(
        [points_layer(world, features=features)], layer, opened, classes=CLASSES, class_name="core"
    )
    core, rim = file.prompts
    assert np.allclose(core.points, clicked[:2])
    assert (core.channel, core.labels, rim.channel) == (0, (1, 0), 1)
    assert np.allclose(rim.points, clicked[2:])
    # The axial slices of the model run along j, whose index grows upwards.
    assert [one.slice_index for one in placed_prompts(file, scan)] == [2, 7]


def shapes_layer(boxes, **arguments):
    kinds = arguments.pop("shape_type", ["rectangle"] * len(boxes))
    return FakeLayer([np.asarray(box, float) for box in boxes], name="boxes", ndim=3, shape_type=kinds, **arguments)


def corners_in_world(layer, opened, corners):
    return [layer.data_to_world(np.asarray(ijk, float)[list(opened.order)]) for ijk in corners]


def test_prompts__boxes_contain_the_voxels_that_were_framed():
    scan = read("PSR", shape=(20, 12, 16))
    opened, layer = opened_layer(scan)
    box = corners_in_world(layer, opened, [(3, 2, 4), (3, 2, 9), (8, 2, 9), (8, 2, 4)])
    file = prompts_of_layers([shapes_layer([box])], layer, opened, classes=CLASSES, class_name="rim")
    [prompt] = file.prompts
    assert np.allclose(prompt.corners, [(3, 2, 4), (8, 2, 9)])
    [placed] = placed_prompts(file, scan)
    x0, y0, x1, y1 = placed.box
    assert (placed.slice_index, placed.channel, x1 - x0, y1 - y0) == (2, 1, 5, 5)


def test_prompts__that_the_model_cannot_use_are_refused():
    opened, layer = opened_layer(read("PSR", shape=(20, 12, 16)))
    coronal = corners_in_world(layer, opened, [(3, 2, 4), (3, 9, 9)])
    flat = corners_in_world(layer, opened, [(3, 2, 4), (8, 2, 9)])

    def refuse(layers, message, **changes):
        with pytest.raises(UsageError, match=message):
            prompts_of_layers(layers, layer, opened, **{"classes": CLASSES, "class_name": "rim", **changes})

    refuse([shapes_layer([coronal])], "in one slice of the axial plane, in which the model segments, got .* 7 of them")
    refuse([shapes_layer([flat], shape_type=["ellipse"])], r"must be a rectangle \(got ellipse\)")
    refuse([shapes_layer([flat], features={"class": ["edge"]})], "must be one of the model's, core, rim, got 'edge'")
    refuse([points_layer([(1.0, 2.0)])], "prompts must have the 3 axes of the scan, got 2")
    refuse([], "there is no prompt")


# --- files ------------------------------------------------------------------------------------------------------------


def write_scan(path, scan):
    nib.save(nib.Nifti1Image(scan.raw.array_ijk, scan.raw.affine), path)


def test_save_labels__corrected_layer_is_on_the_grid_of_the_file(tmp_path):
    scan = read()
    write_scan(tmp_path / "scan.nii.gz", scan)
    [(_, arguments, kind)] = files.scan_reader(str(tmp_path / "scan.nii.gz"))(str(tmp_path / "scan.nii.gz"))
    assert (kind, arguments["name"]) == ("image", "scan")
    opened = arguments["metadata"][METADATA]
    [(labels, of_labels, _)] = segmentation_layers(
        segmentation_of(np.ones((5, 6, 7), np.int32), opened), opened, name="scan", placed={}
    )
    labels[opened.to_layer(np.arange(210).reshape(5, 6, 7)) == 100] = 9  # painted
    assert files.save_labels(str(tmp_path / "scan_label.nii.gz"), labels, of_labels) == [
        str(tmp_path / "scan_label.nii.gz")
    ]
    saved = nib.load(tmp_path / "scan_label.nii.gz")
    expected = np.ones(210, int)
    expected[100] = 9
    assert np.array_equal(np.asarray(saved.dataobj).ravel(), expected)
    assert np.allclose(saved.affine, scan.raw.affine)
    assert masks_of_layer(labels, of_labels).classes.names == ("core", "rim", "label 9")
    # Opened again it is a labels layer, which can be corrected and saved again.
    [(again, of_again, kind)] = files.read_scan_layers(str(tmp_path / "scan_label.nii.gz"))
    assert kind == "labels"
    assert np.array_equal(again, labels)
    assert masks_of_layer(again, of_again).classes.ids == (1, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, _: (data[1:], {"name": "x"}), "has no scan of its own"),
        (lambda data, arguments: (data[1:], arguments), "has no scan of its own"),
        (lambda data, arguments: (data - 1, arguments), "must not be negative, got -1"),
    ],
)
def test_save_labels__that_belong_to_no_scan_are_refused(change, message):
    opened, _ = opened_layer(read())
    [(data, arguments, _)] = segmentation_layers(
        segmentation_of(np.zeros((5, 6, 7), np.int32), opened), opened, name="scan", placed={}
    )
    with pytest.raises(UsageError, match=message):
        masks_of_layer(*change(data, arguments))


def test_reader__message_names_no_option_of_a_command(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
    with pytest.raises(DataError, match="got 4D with 2 volumes") as refused:
        files.read_scan_layers(str(tmp_path / "scan.nii.gz"))
    assert "--" not in str(refused.value)


def test_reader__several_paths_are_left_to_napari():
    assert files.scan_reader(["a.nii", "b.nii"]) is None


# --- manifest ---------------------------------------------------------------------------------------------------------


def manifest():
    return yaml.safe_load((ROOT / "finetune" / "napari_plugin" / "napari.yaml").read_text())


def test_manifest__is_found_by_its_entry_point_and_valid():
    npe2 = pytest.importorskip("npe2", reason="npe2 is a development dependency")
    [point] = entry_points(group="napari.manifest", name="samgraft")
    assert point.value == "samgraft.finetune.napari_plugin:napari.yaml"
    found = npe2.PluginManifest.from_file(ROOT / "finetune" / "napari_plugin" / "napari.yaml")
    assert found.name == "samgraft"
    assert found.contributions.widgets
    assert found.contributions.readers
    assert found.contributions.writers


def test_manifest__functions_exist():
    for command in manifest()["contributions"]["commands"]:
        module, name = command["python_name"].split(":")
        if module.endswith(".widget"):  # imports napari, which is optional
            source = (ROOT / Path(*module.split(".")[1:])).with_suffix(".py").read_text()
            assert re.search(rf"^class {name}\(", source, flags=re.MULTILINE)
        else:
            assert callable(getattr(importlib.import_module(module), name))


def test_napari__is_imported_by_the_widget_alone():
    importing = set()
    for top in ("api", "finetune", "shared", "ssl"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] in {"napari", "magicgui", "superqt", "qtpy"} for name in names):
                    importing.add(path.name)
    assert importing == {"widget.py"}
