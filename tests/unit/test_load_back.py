"""The load-back check of a release refuses files that are almost right."""

import json

import pytest
import torch
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from release_factory import finished_model
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.release.monai_bundle import expected_slices, monai_format
from samgraft.finetune.release.release_clients import monai_client
from samgraft.shared.errors import WeightsError
from samgraft.shared.release import load_back
from samgraft.shared.release.clients import CLIENTS
from samgraft.shared.release.formats import SAM_FORMAT, Artefact
from samgraft.shared.release.subject import Subject, expected_outputs, make_probe


def subject_of(spec, size):
    return Subject(tensors=make_sam(spec, image_size=size).state_dict(), spec=spec, image_size=size)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    return read_model(finished_model(root, tiny_vit_t_spec(), image_size=64, num_classes=2))


def after_orientation(transform):
    def change(config):
        config["preprocessing"]["transforms"].insert(3, {"keys": "image", **transform})

    return change


def without(name):
    def change(config):
        transforms = config["preprocessing"]["transforms"]
        config["preprocessing"]["transforms"] = [t for t in transforms if name not in t["_target_"]]

    return change


def other_percentiles(config):
    [transform] = [t for t in config["preprocessing"]["transforms"] if "NormaliseIntensityd" in t["_target_"]]
    transform["preset"] = {**transform["preset"], "lower_percentile": 5.0, "upper_percentile": 80.0}


def exchanged_ids(config):
    config["postprocessing"]["transforms"][1]["target_labels"] = [0, 5, 3]


def not_on_the_grid_of_the_file(config):
    config["postprocessing"]["transforms"].pop(2)


def mirrored_mask(config):
    config["postprocessing"]["transforms"].insert(
        2, {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: x.flip(1)"}
    )


def write_bundle(model, folder, change):
    sam = model.segmenter.sam
    subject = Subject(tensors=sam.state_dict(), spec=sam.image_encoder.spec, image_size=64)
    folder.mkdir()
    [artefact] = monai_format(model).write(subject, folder)
    file = folder / "monai" / "configs" / "inference.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return artefact, make_probe(subject)


BUNDLES = {
    "unchanged": (lambda config: None, None),
    "mirrored": (after_orientation({"_target_": "Flipd", "spatial_axis": 0}), "slices differ"),
    "upside down": (after_orientation({"_target_": "Flipd", "spatial_axis": 1}), "slices differ"),
    "slices in reverse": (after_orientation({"_target_": "Flipd", "spatial_axis": 2}), "slices differ"),
    "shifted by one slice": (
        after_orientation({"_target_": "Lambdad", "func": "$lambda x: torch.roll(x, 1, -1)"}),
        "slices differ",
    ),
    "rescaled": (
        lambda config: config["preprocessing"]["transforms"].append(
            {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: 0.9 * x"}
        ),
        "slices differ",
    ),
    "not reoriented": (without("DisplayOrientationd"), "slices"),
    "normalised in another way": (other_percentiles, "slices differ"),
    "exchanged class ids": (exchanged_ids, "mask differs"),
    "mirrored mask": (mirrored_mask, "mask differs"),
}


@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.filterwarnings("ignore")  # MONAI's own
def test_load_back__changed_bundle_is_refused(model, tmp_path, name):
    pytest.importorskip("jsonschema")
    change, message = BUNDLES[name]
    artefact, probe = write_bundle(model, tmp_path / "release", change)
    folder = tmp_path / "release"
    outputs, loaded_by = monai_client(folder / "monai", probe, {})
    expected = expected_slices(model, probe)
    assert len(expected["mask"].unique()) == 3  # a mask of one class could hide a change
    if message is None:
        assert load_back._compare(artefact, loaded_by, outputs, expected).outputs == ("mask", "slices")
    else:
        with pytest.raises(WeightsError, match=message):
            load_back._compare(artefact, loaded_by, outputs, expected)


@pytest.mark.filterwarnings("ignore")  # MONAI's own
def test_monai_client__mask_on_other_axes_than_the_scan_is_refused(model, tmp_path):
    pytest.importorskip("jsonschema")
    _, probe = write_bundle(model, tmp_path / "release", not_on_the_grid_of_the_file)
    with pytest.raises(ValueError, match=r"not on the scan's grid \(got shape \(48, 64, 2\), expected \(2, 48, 64\)\)"):
        monai_client(tmp_path / "release" / "monai", probe, {})


def mirrored_input(tensors):
    tensors["image_encoder.patch_embed.proj.weight"] = tensors["image_encoder.patch_embed.proj.weight"].flip(-1)


def shifted_positions(tensors):
    tensors["image_encoder.pos_embed"] = tensors["image_encoder.pos_embed"].roll(1, 1)


def rescaled(tensors):
    tensors["image_encoder.patch_embed.proj.weight"] = 1.01 * tensors["image_encoder.patch_embed.proj.weight"]


def permuted_tokens(tensors):
    tensors["mask_decoder.mask_tokens.weight"] = tensors["mask_decoder.mask_tokens.weight"][[0, 2, 1, 3]]


def exchanged_position_axes(tensors):
    name = "image_encoder.blocks.1.attn.rel_pos_"
    tensors[name + "h"], tensors[name + "w"] = tensors[name + "w"], tensors[name + "h"]


@pytest.mark.parametrize(
    "change", [mirrored_input, shifted_positions, rescaled, permuted_tokens, exchanged_position_axes]
)
def test_load_back__almost_right_sam_file_is_refused(tmp_path, change):
    subject = subject_of(tiny_plain_spec(depth=2, image_size=96), 96)
    probe = make_probe(subject)
    expected = expected_outputs(subject, probe)
    tensors = dict(subject.tensors)
    change(tensors)
    wrong = Subject(tensors=tensors, spec=subject.spec, image_size=96)
    artefact = SAM_FORMAT.write(wrong, tmp_path)[0]
    outputs, loaded_by = CLIENTS["segment_anything"](tmp_path / artefact.path, probe, artefact.options)
    with pytest.raises(WeightsError, match="does not give the run's outputs when loaded back"):
        load_back._compare(artefact, loaded_by, outputs, expected)


def test_load_back__large_offset_does_not_hide_a_difference():
    artefact = Artefact(path="sam.pth", client="segment_anything")
    maps = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = {"embeddings": 50 + maps}
    load_back._compare(artefact, "x", {"embeddings": 50 + maps + 2e-4}, expected)
    with pytest.raises(WeightsError, match=r"embeddings differ by .*, expected at most 5\.\d\de-04"):
        load_back._compare(artefact, "x", {"embeddings": 50 + maps + 4e-3}, expected)
    with pytest.raises(WeightsError, match="differ by nan"):
        load_back._compare(artefact, "x", {"embeddings": expected["embeddings"] * float("nan")}, expected)


def test_load_back__model_that_ignores_its_image_is_refused(tmp_path):
    subject = subject_of(tiny_vit_t_spec(), 64)
    probe = make_probe(subject)
    expected = expected_outputs(subject, probe)
    for outputs in (expected, {**expected, "mask": torch.zeros(2, 4, 4, dtype=torch.int32)}):
        load_back._require_contrast(outputs)
    same = {name: value[:1].expand_as(value) for name, value in expected.items()}
    with pytest.raises(WeightsError, match="the same embeddings for different images"):
        load_back.load_back(tmp_path, [], probe=probe, expected=same)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"class_ids": [1, 2], "class_members": [[3], [3, 5]]}, "regions of this model overlap"),
        ({"num_neighbours": 1}, "reads the slices beside it"),
        ({"prompt": {"mode": "box"}}, "this model needs them"),
    ],
)
def test_monai_format__model_that_a_bundle_cannot_express_is_left_out(model, change, reason):
    import dataclasses

    other = dataclasses.replace(model, task=dataclasses.replace(model.task, **change))
    assert reason in monai_format(other).why_not(None)
    assert monai_format(model).why_not(None) is None
