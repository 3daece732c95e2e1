"""Self-training in one run, with targets, views and weights of the teacher, and a resume to the same bytes."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_factory import make_sam, tiny_vit_t_spec
from pytorch_lightning import LightningModule
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.training import train
from samgraft.finetune.training.module import FinetuneModule
from samgraft.finetune.training.online import OnlineTeacher, strong_intensity
from samgraft.shared.config import load_config
from samgraft.shared.errors import StoppedAndSaved, UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.samples.augment import AugmentConfig
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.training.device import choose_device
from store_factory import make_store

DEVICE = choose_device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=8, shape_zyx=(4, 24, 20))
    write_tensors(root / "base.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    return root


def config_of(lab, *overrides):
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 4, "few_shot": {"num": 2}},
        "model": {"ckpt": str(lab / "base.safetensors"), "image_size": 32},
        "adapter": {"r": 2, "lora_alpha": 2},
        "optim": {"warmup_steps": 1, "ema_decay": 0.9},
        "trainer": {"max_steps": 4, "save_every_steps": 2, "device": "cpu"},
        "watch": {"validate_every_n_steps": 4, "num_overlays": 1},
        "selftrain": {"mode": "online", "min_agreement": 0.0, "online": {"ramp_up_steps": 4, "paste_probability": 0.5}},
    }
    return load_config(FinetuneConfig, layers=[layer], overrides=overrides)


def run(lab, name, *overrides):
    config = config_of(lab, *overrides)
    prepared = train.prepare_seeded(config)
    with RunFolder.open(lab / "runs", name, config=config, stage="finetune") as folder:
        train.finetune(config, folder, DEVICE, prepared)
    return lab / "runs" / name


class Threshold(Segmenter):
    """Network whose logit is high where a slice is bright."""

    image_size = 32

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.scale = torch.nn.Parameter(torch.tensor(20.0))

    def forward(self, images_NCSS):
        return self.scale * (images_NCSS - 0.5)


def mix(lab, images, target, *overrides, counters=(0, 1, 2, 3), planes=(Plane.AXIAL,) * 4):
    """Label the second half of the slices with a network that finds bright pixels, and return the student's view."""
    teacher = OnlineTeacher(config_of(lab, *overrides))
    return teacher.mix(images, target, teacher.label(Threshold(), images[2:]), counters=counters, planes=planes)


def bright_squares(lab):
    """Return two labelled and two unlabelled slices with a bright square, and the channels of the labelled ones."""
    images = torch.zeros(4, 1, 16, 16)
    for place in range(4):
        images[place, :, 2 + place : 8 + place, 3:9] = 1.0
    target = (images[:, 0] > 0.5).long()
    target[2:] = IGNORE_LABEL
    return images, target


def test_mix__without_paste_labels_and_pseudo_labels_are_apart(lab):
    images, target = bright_squares(lab)
    off = ("selftrain.online.paste_probability=0", "selftrain.online.intensity_strength=0")
    mixed = mix(lab, images, target, *off)
    assert torch.equal(mixed.known_NSS, target)
    assert (mixed.pseudo_NSS[:2] == IGNORE_LABEL).all()
    assert torch.equal(mixed.pseudo_NSS[2:], (images[2:, 0] > 0.5).long())
    assert torch.equal(mixed.images_NCSS[:2], images[:2])


def test_mix__pixels_below_the_agreement_are_ignored(lab):
    images, target = bright_squares(lab)
    images[2, :, 0, 0] = 0.52  # the teacher's probability there is sigmoid(0.4) = 0.6
    mixed = mix(lab, images, target, "selftrain.min_agreement=0.7", "selftrain.online.paste_probability=0")
    assert mixed.pseudo_NSS[2, 0, 0] == IGNORE_LABEL
    assert (mixed.pseudo_NSS[2:] == IGNORE_LABEL).sum() == 1


def test_mix__pasted_pixels_keep_their_own_target(lab):
    """Every pixel of the student's view has the target of the slice that it comes from, and exactly one target."""
    images, target = bright_squares(lab)
    on = ("selftrain.online.paste_probability=1", "selftrain.online.intensity_strength=0")
    mixed = mix(lab, images, target, *on, counters=(10, 11, 12, 13))
    both = torch.stack([mixed.known_NSS, mixed.pseudo_NSS])
    assert ((both == IGNORE_LABEL).sum(dim=0) == 1).all()
    assert torch.equal(both.max(dim=0).values, (mixed.images_NCSS[:, 0] > 0.5).long())
    shares = [(mixed.known_NSS[place] == IGNORE_LABEL).float().mean().item() for place in range(4)]
    assert all(0.05 < share < 0.55 for share in shares[:2])
    assert all(0.45 < share < 0.95 for share in shares[2:])
    again = mix(lab, images, target, *on, counters=(10, 11, 12, 13))
    assert torch.equal(again.images_NCSS, mixed.images_NCSS)
    other = mix(lab, images, target, *on, counters=(20, 21, 22, 23))
    assert not torch.equal(other.images_NCSS, mixed.images_NCSS)


@pytest.mark.parametrize(
    ("planes", "partners"),
    [
        ("ACCA", {0: 3, 1: 2, 2: 1, 3: 0}),
        ("AACS", {0: None, 1: None, 2: None, 3: None}),
        ("ASAA", {0: 2, 1: None}),
        ("AAAA", {0: 2, 1: 3, 2: 0, 3: 1}),
    ],
)
def test_mix__pastes_between_slices_of_one_plane_only(lab, planes, partners):
    images = torch.zeros(4, 1, 16, 16) + torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None, None]
    target = torch.zeros(4, 16, 16, dtype=torch.long)
    letters = {plane.value[0].upper(): plane for plane in Plane}
    on = ("selftrain.online.paste_probability=1", "selftrain.online.intensity_strength=0")
    mixed = mix(lab, images, target, *on, planes=[letters[letter] for letter in planes])
    for place, partner in partners.items():
        expected = {images[i, 0, 0, 0].item() for i in (place, partner) if i is not None}
        assert set(mixed.images_NCSS[place].unique().tolist()) == expected


def pasted_boxes(teacher, first=0):
    """Return the pixels of the pasted rectangle in each of four slices of one grey value."""
    images = torch.zeros(4, 1, 16, 16) + torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None, None]
    known, pseudo = torch.zeros(4, 16, 16, dtype=torch.long), torch.zeros(2, 16, 16, dtype=torch.long)
    mixed = teacher.mix(images, known, pseudo, counters=range(first, first + 4), planes=(Plane.AXIAL,) * 4)
    return [torch.nonzero(mixed.images_NCSS[place, 0] != images[place, 0]) for place in range(4)]


def pasting_teacher(lab, *overrides):
    on = ("selftrain.online.paste_probability=1", "selftrain.online.intensity_strength=0", *overrides)
    return OnlineTeacher(config_of(lab, *on))


def test_mix__pasted_rectangles_are_whole_and_reach_every_edge(lab):
    """Rectangles are cut from slices as they were, because a mixed slice as a source would have a hole in them."""
    corners = []
    teacher = pasting_teacher(lab)
    for first in range(0, 200, 4):
        for pixels in pasted_boxes(teacher, first):
            low, high = pixels.min(dim=0).values, pixels.max(dim=0).values
            sides = high - low + 1
            assert len(pixels) == int(sides.prod())
            assert 5 <= int(sides.min()) <= int(sides.max()) <= 11
            corners.append([*low.tolist(), *high.tolist()])
    assert np.min(corners, axis=0)[:2].tolist() == [0, 0]
    assert np.max(corners, axis=0)[2:].tolist() == [15, 15]


def test_mix__seed_of_the_run_changes_the_rectangles(lab):
    def boxes(seed):
        return [pixels.tolist() for pixels in pasted_boxes(pasting_teacher(lab, f"seed={seed}"))]

    assert boxes(1) != boxes(2)
    assert boxes(1) == boxes(1)


def test_mix__strong_view_changes_unlabelled_slices_only(lab):
    images, target = bright_squares(lab)
    images = 0.2 + 0.6 * images
    mixed = mix(lab, images, target, "selftrain.online.paste_probability=0")
    assert torch.equal(mixed.images_NCSS[:2], images[:2])
    assert (mixed.images_NCSS[2:] - images[2:]).abs().max() > 0.02


def test_strong_intensity__keeps_changes_off_that_the_modality_switches_off():
    weak = AugmentConfig(max_log_gamma=0.2, noise_std=0.0, blur_probability=0.6, max_log_contrast=0.1, bias_field=0.25)
    strong = strong_intensity(weak, 2.0)
    assert (strong.max_log_gamma, strong.noise_std, strong.blur_probability) == (0.4, 0.0, 1.0)
    assert (strong.max_log_contrast, strong.bias_field) == (0.2, 0.5)


@pytest.mark.parametrize("steps", [("selftrain.online.ramp_up_steps=4", "trainer.max_steps=20"), ()])
def test_teacher__its_loss_ramps_up_over_the_given_steps_or_the_whole_run(lab, steps):
    # config_of sets 4 steps of the ramp and of the run.
    null = () if steps else ("selftrain.online.ramp_up_steps=null",)
    teacher = OnlineTeacher(config_of(lab, *steps, *null))
    weights = [teacher.weight(step) for step in (0, 2, 4, 9)]
    assert weights == pytest.approx([0.0067379, 0.2865048, 1.0, 1.0], rel=1e-4)


def test_label__needs_no_gradient_and_leaves_the_model_in_its_mode(lab):
    images, _ = bright_squares(lab)
    network = Threshold().train()
    labels = OnlineTeacher(config_of(lab)).label(network, images)
    assert torch.equal(labels, (images[:, 0] > 0.5).long())
    assert network.training
    assert not labels.requires_grad


class QuarterLogits(Threshold):
    """Network whose logits have a quarter of the input's side, as those of SAM, and rise along the columns."""

    columns = (-6.0, 2.0, 3.0, 4.0)

    def forward(self, images_NCSS):
        return torch.tensor(self.columns).expand(len(images_NCSS), 1, 4, 4)


def test_label__small_logits_are_enlarged_between_the_centres_of_their_pixels(lab):
    channels = OnlineTeacher(config_of(lab, "selftrain.min_agreement=0.8")).label(
        QuarterLogits(), torch.zeros(1, 1, 16, 16)
    )
    # The centre of column i of 16 is at (i + 0.5) / 4 - 0.5 of the 4 columns. Outside of them the edge is repeated.
    logits = np.interp((np.arange(16) + 0.5) / 4 - 0.5, np.arange(4), QuarterLogits.columns)
    probability = 1 / (1 + np.exp(-logits))
    is_sure = np.maximum(probability, 1 - probability) >= 0.8
    expected = np.where(is_sure, logits > 0, IGNORE_LABEL)
    assert sorted(set(expected.tolist())) == sorted({0, 1, IGNORE_LABEL})
    assert channels[0].tolist() == [expected.tolist()] * 16


def test_label__agreement_at_the_border_is_kept(lab):
    """A logit of 0 has the probability 0.5 exactly."""
    labels = OnlineTeacher(config_of(lab, "selftrain.min_agreement=0.5")).label(
        Threshold(), torch.full((1, 1, 4, 4), 0.5)
    )
    assert (labels == 0).all()


def module_and_batch(lab):
    """Return a module after 2 of 4 steps of the ramp, and a batch whose last slice of four is unlabelled."""
    off = ("selftrain.online.paste_probability=0", "selftrain.online.intensity_strength=0", "data.pseudo_fraction=0.25")
    module = FinetuneModule(Threshold(), config_of(lab, *off), ClassTable(ids=(7,), names=("bright",)))
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    labels = 7 * (torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(4)) > 0.6).long()
    labels[3] = IGNORE_LABEL
    batch = {
        "images": list(images),
        "labels": list(labels),
        "sample_counter": torch.arange(4),
        "planes": [Plane.AXIAL] * 4,
    }
    module._trainer = SimpleNamespace(global_step=2, callbacks=[])
    return module, batch


def test_training_step__pseudo_labels_have_the_weight_of_their_step(lab):
    """After half of the ramp the weight is exp(-5 / 4)."""
    module, batch = module_and_batch(lab)
    losses = module.training_step(batch, 0)
    expected = losses["loss/labels"] + 0.2865048 * losses["loss/pseudo"]
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["loss/labels"] > 2 * losses["loss/pseudo"] > 0
    assert losses["pseudo_share"] == 0.25


def test_module__rank_updates_add_their_penalty_and_count_the_step_that_is_done(lab, monkeypatch):
    module, batch = module_and_batch(lab)
    plain = module.training_step(batch, 0)["loss"].item()
    steps = []
    module.rank_updates = SimpleNamespace(penalty=lambda: torch.tensor(0.25), after_update=steps.append)
    assert module.training_step(batch, 0)["loss"].item() == pytest.approx(plain + 0.25, rel=1e-5)
    monkeypatch.setattr(LightningModule, "optimizer_step", lambda *_: None)
    module.optimizer_step()
    assert steps == [3]


def test_module__mask_tokens_have_no_weight_decay(lab):
    """All tokens are one tensor, of which classes use a part."""
    config = config_of(lab, "optim.weight_decay=0.1")
    prepared = train.prepare_seeded(config)
    module = FinetuneModule(prepared.segmenter, config, prepared.classes)
    decay = {id(p): g["weight_decay"] for g in module.configure_optimizers().param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    assert {value for name, value in found.items() if "mask_tokens" in name} == {0.0}
    assert {value for name, value in found.items() if name.endswith("lora_A.default.weight")} == {0.1}


def test_training__averaged_weights_label_and_the_own_weights_train(lab, monkeypatch):
    used = {"label": [], "train": []}
    label, forward = OnlineTeacher.label, Segmenter.forward

    def tensors(segmenter):
        return torch.cat([p.detach().flatten() for p in segmenter.parameters() if p.requires_grad]).clone()

    def spied_label(self, segmenter, images):
        used["label"].append(tensors(segmenter))
        return label(self, segmenter, images)

    def spied_forward(self, images):
        if self.training:
            used["train"].append(tensors(self))
        return forward(self, images)

    monkeypatch.setattr(OnlineTeacher, "label", spied_label)
    monkeypatch.setattr(Segmenter, "forward", spied_forward)
    run(lab, "spied")
    average = used["train"][0]
    for step in range(4):
        if step:
            decay = min(0.9, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * used["train"][step]
        assert torch.allclose(used["label"][step], average, atol=1e-6)
    assert not torch.allclose(used["label"][3], used["train"][3], atol=1e-6)


def test_finetune__online_run_resumes_to_the_same_bytes(lab, monkeypatch):
    whole = run(lab, "whole")
    original = FinetuneModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneModule, "training_step", training_step)
        with pytest.raises(StoppedAndSaved):
            run(lab, "stopped")
    stopped = run(lab, "stopped")
    weights = [(path / "model" / "sam.safetensors").read_bytes() for path in (whole, stopped)]
    assert weights[0] == weights[1]
    model = read_model(whole)
    origin = "self-training: store.zarr, 4 scans of 4 patients, 16 slices without labels"
    assert any(note.startswith(origin) for note in model.card.notes)
    assert len(model.card.data_manifest["patient_ids"]) == 6


def test_finetune_config__online_teacher_is_not_sharded(lab):
    with pytest.raises(UsageError, match="changes weights in every step"):
        config_of(lab, "trainer.strategy=fsdp")


def test_finetune_config__online_needs_averaged_weights(lab):
    with pytest.raises(UsageError, match=r"labels with averaged weights\. Set optim\.ema_decay"):
        config_of(lab, "optim.ema_decay=null")
