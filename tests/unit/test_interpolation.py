"""Interpolation between initial and trained encoder, and the choice of the exported one."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from model_factory import make_sam
from safetensors.torch import load_file
from samgraft.shared.errors import UsageError
from samgraft.shared.weights.save import save_sam
from samgraft.ssl.export import interpolation
from samgraft.ssl.export.interpolation import interpolate
from samgraft.ssl.monitor.exported import choose_share
from tiny_encoders import TINY_VIT
from tiny_pretrain import config_of, left_behind, make_lab, make_labelled_store, run

SHARES = "export.interpolate=[0.25,0.5,1.0]"


def measures(probe, box=None):
    return {"probe/dice": probe} if box is None else {"probe/dice": probe, "drift/box_dice": box}


@pytest.mark.parametrize(
    ("values", "share"),
    [
        # The probe gains most at 1, but the boxes lose there.
        ({0.0: (0.5, 0.9), 0.25: (0.52, 0.91), 0.5: (0.55, 0.9), 1.0: (0.7, 0.8)}, 0.25),
        ({0.0: (0.5, 0.9), 0.25: (0.52, 0.91), 0.5: (0.56, 0.93), 1.0: (0.55, 0.92)}, 0.5),
        # Equal candidates: the one that was trained longest.
        ({0.0: (0.5, 0.9), 0.25: (0.5, 0.9), 0.5: (0.5, 0.9), 1.0: (0.5, 0.9)}, 1.0),
        # Every candidate loses: the smallest loss.
        ({0.0: (0.5, 0.9), 0.25: (0.49, 0.89), 0.5: (0.48, 0.9), 1.0: (0.3, 0.9)}, 0.25),
    ],
)
def test_choose_share__takes_the_largest_smallest_change(values, share):
    measured = {s: measures(*pair) for s, pair in values.items()}
    chosen = choose_share([0.25, 0.5, 1.0], measured)
    assert chosen.share == share
    change = values[share][0] - values[0.0][0]
    assert f"linear probe {change:+.3f}" in chosen.describe()


def test_choose_share__without_boxes_uses_the_probe_alone():
    measured = {s: measures(d) for s, d in {0.0: 0.5, 0.25: 0.6, 1.0: 0.7}.items()}
    chosen = choose_share([0.25, 1.0], measured)
    assert chosen.share == 1.0
    assert "box-prompt" not in chosen.describe()


@pytest.mark.parametrize(("shares", "share"), [([0.25, 0.5, 1.0], 0.5), ([0.25, 0.75], 0.25), ([0.3], 0.3)])
def test_choose_share__without_labels_takes_the_middle(shares, share):
    chosen = choose_share(shares, {})
    assert chosen.share == share
    assert f"{100 * share:g} % of the way" in chosen.describe()


def test_choose_share__trained_weights_alone_need_no_words():
    assert choose_share([1.0], {}).describe() == ""


def test_interpolate__mixes_numbers_and_keeps_counters():
    initial = {"weight": torch.tensor([0.0, 4.0]), "count": torch.tensor(3)}
    trained = {"weight": torch.tensor([2.0, 8.0]), "count": torch.tensor(5)}
    mixed = interpolate(initial, trained, 0.25)
    assert torch.equal(mixed["weight"], torch.tensor([0.5, 5.0]))
    assert mixed["count"] == 5
    assert interpolate(initial, trained, 1.0) is trained


class OneWeight(torch.nn.Module):
    """Objective whose encoder has one weight, 5 after the training."""

    max_steps = 7

    def __init__(self):
        super().__init__()
        self.encoder = one_weight(5.0)
        self.anchor = object()

    @property
    def exported_encoder(self):
        return self.encoder

    def references(self, images, *, sample_counters):
        return {"mean": 1.0}


def one_weight(value):
    encoder = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    encoder.weight.fill_(value)
    return encoder


def choose(monkeypatch, *, measure=None, probe=None, held_out=None):
    """Choose among the weights 2, 3 and 5, which is the trained one. The initial one is 1."""
    monkeypatch.setattr(interpolation, "load_whole_encoder", lambda model: (one_weight(1.0), None))
    monkeypatch.setattr(interpolation, "check_encoder", measure)
    shares = SimpleNamespace(interpolate=[0.25, 0.5, 1.0])
    config = SimpleNamespace(export=shares, model=None, data=SimpleNamespace(batch_size=1))
    return interpolation.choose_encoder(OneWeight(), config, SimpleNamespace(probe=probe, held_out=held_out))


def test_choose_encoder__every_candidate_is_between_the_initial_and_the_trained_weights(monkeypatch):
    """The measure is highest at the weight 3, which is half of the way from 1 to 5."""
    seen = []

    def measure(encoder, *_, **__):
        seen.append(encoder.weight.item())
        return measures(-abs(encoder.weight.item() - 3.0))

    tensors, exported = choose(monkeypatch, measure=measure, probe="labels")
    assert seen == [1.0, 2.0, 3.0, 5.0]
    assert exported.share == 0.5
    assert tensors["weight"].item() == 3.0


def test_choose_encoder__grey_error_is_that_of_the_exported_encoder(monkeypatch):
    def held_out_loss(objective, held_out, *, batch_size, step, device):
        assert (objective.training, objective.anchor, step) == (False, None, 7)
        return {"grey_error": objective.encoder.weight.item()}

    monkeypatch.setattr(interpolation, "held_out_loss", held_out_loss)
    held_out = SimpleNamespace(images_N1SS=torch.zeros(1, 1, 4, 4), sample_counters=[0])
    assert choose(monkeypatch, held_out=held_out)[1].grey_error == 3.0


def test_run__without_labels_exports_the_middle(tmp_path):
    lab = make_lab(tmp_path)
    trained = run(lab, "trained", "masked_image")
    mixed = run(lab, "mixed", "masked_image", SHARES)
    initial = load_file(lab / "base" / "encoder.safetensors")
    ends, middle = (
        load_file(trained / "encoder" / "encoder.safetensors"),
        load_file(mixed / "encoder" / "encoder.safetensors"),
    )
    moved = [name for name in initial if not torch.equal(initial[name], ends[name])]
    assert moved
    for name in moved:
        torch.testing.assert_close(middle[name], (initial[name] + ends[name]) / 2)
    (note,) = json.loads((mixed / "encoder" / "card.json").read_text())["notes"]
    assert "50 % of the way" in note
    assert "no labels" in note
    report = (mixed / "report.html").read_text()
    assert "50 % of the way" in report
    assert "exported encoder with the trained decoder" in report
    assert "exported encoder" not in (trained / "report.html").read_text()
    # Everything else is what the run without interpolation leaves behind.
    ours, theirs = left_behind(mixed), left_behind(trained)
    assert {n for n in ours if ours[n] != theirs[n]} == {"encoder/encoder.safetensors", "encoder/card.json"}


def test_run__with_labels_exports_the_measured_candidate(tmp_path):
    lab = make_lab(tmp_path)
    save_sam(make_sam(dataclasses.replace(TINY_VIT, neck_dim=32), image_size=32), lab / "sam.safetensors")
    make_labelled_store(lab, seed=50)
    labels = (f"probe.store={lab / 'labelled.zarr'}", f"model.base={lab / 'sam.safetensors'}")
    first = run(lab, "first", "masked_image", SHARES, *labels)
    text = (first / "report.html").read_text()
    assert len(re.findall(r"\(exported\)", text)) == 1
    assert "initial weights" in text
    assert "of the change" in text
    (note,) = [n for n in json.loads((first / "encoder" / "card.json").read_text())["notes"] if "of the way" in n]
    assert re.search(
        r"whose smallest change of linear probe and box-prompt check is largest, linear probe [+-]0\.\d{3}", note
    )
    # A finished run that is started again exports the same bytes.
    before = left_behind(first)
    (first / "encoder" / "encoder.safetensors").unlink()
    assert left_behind(run(lab, "first", "masked_image", SHARES, *labels)) == before


def test_run__lora_and_a_teacher_are_interpolated_under_sams_names(tmp_path):
    lab = make_lab(tmp_path)
    initial = load_file(lab / "base" / "encoder.safetensors")
    for name, objective, more in (("lora", "masked_image", "model.scope.kind=lora"), ("dino", "dino", "seed=0")):
        trained = load_file(run(lab, name, objective, more) / "encoder" / "encoder.safetensors")
        mixed = load_file(run(lab, f"{name}-mixed", objective, more, SHARES) / "encoder" / "encoder.safetensors")
        assert mixed.keys() == initial.keys()
        for key, tensor in mixed.items():
            torch.testing.assert_close(tensor, ((initial[key] + trained[key]) / 2).to(tensor.dtype))


def test_random_weights__switch_anchor_and_interpolation_off(tmp_path):
    lab = make_lab(tmp_path)
    config = config_of(lab, "masked_image", "model.base=random", SHARES, "objective.anchor.kind=features")
    assert config.export.interpolate == [1.0]
    assert config.objective.anchor.kind.value == "none"


@pytest.mark.parametrize("shares", ["[]", "[0.5,0.5]", "[0]", "[1.5]"])
def test_settings__impossible_shares_are_refused(tmp_path, shares):
    with pytest.raises(UsageError, match=re.escape("export.interpolate")):
        config_of(make_lab(tmp_path), "masked_image", f"export.interpolate={shares}")


def test_run__average_of_the_weights_is_interpolated(tmp_path):
    lab = make_lab(tmp_path)
    initial = load_file(lab / "base" / "encoder.safetensors")
    last, average, mixed = (
        load_file(run(lab, name, "masked_image", *more) / "encoder" / "encoder.safetensors")
        for name, more in (
            ("last", ()),
            ("average", ("optim.ema_decay=0.5",)),
            ("mixed", ("optim.ema_decay=0.5", SHARES)),
        )
    )
    assert any(not torch.equal(last[name], average[name]) for name in initial)
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, ((initial[name] + average[name]) / 2).to(tensor.dtype))
