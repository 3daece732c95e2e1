"""Neighbouring slices (2.5D) reach the encoder's input, the card and inference in both stages."""

import json

import numpy as np
import pytest
import torch
from model_factory import make_sam, randomise, tiny_vit_t_spec
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.inference import InferenceConfig, segment_volume
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.training.preparation import neighbours_of, prepare
from samgraft.shared.config import load_config
from samgraft.shared.errors import UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.samples.dataset import centre_channel, neighbour_slices
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.module import PretrainModule
from samgraft.ssl.monitor.labelled import load_probe, open_probe_store
from samgraft.ssl.objectives import OBJECTIVES
from samgraft.ssl.objectives.dino import DINO, DINOConfig
from samgraft.ssl.objectives.feature import Feature, FeatureConfig
from samgraft.ssl.objectives.lejepa import LeJEPA, LeJEPAConfig
from samgraft.ssl.objectives.mae import MAE, MAEConfig
from samgraft.ssl.objectives.masked_image import MaskedImage, MaskedImageConfig
from samgraft.ssl.pretrain import pretrain
from store_factory import make_store
from tiny_encoders import lively_encoder, plain_encoder, tiny_encoder
from tiny_pretrain import make_lab, run

SPEC = tiny_vit_t_spec()
HEADS = {"output_dim": 12, "head_hidden_dim": 8, "head_bottleneck_dim": 4}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=5, shape_zyx=(5, 24, 24))
    about = {"arch": "vit_t", "stem": "conv1x1", "pixel_mean": [0.0] * 3, "pixel_std": [255.0] * 3}
    save_encoder(tiny_encoder(), root / "base", Card(image_size=32, **about))
    sam = make_sam(SPEC, image_size=32)
    write_tensors(root / "sam.safetensors", dict(sam.state_dict()))
    save_encoder(sam.image_encoder, root / "ssl", Card(image_size=32, stage="encoder", num_neighbours=1, **about))
    return root


@pytest.fixture(scope="module")
def small_lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("small"))


def test_neighbour_slices__end_slices_repeat():
    assert neighbour_slices(2, num_slices=5, num_neighbours=0) == [2]
    assert [neighbour_slices(z, num_slices=3, num_neighbours=1) for z in range(3)] == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]
    assert neighbour_slices(0, num_slices=1, num_neighbours=1) == [0, 0, 0]


def pretrain_config(lab, *overrides):
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 2, "num_held_out_slices": 2},
        "model": {"base": str(lab / "base"), "image_size": 32},
        "objective": {"name": "masked_image", "masked_image": {"mask_unit_px": 8, "decoder_dim": 8}},
        "optim": {"warmup_steps": 0},
        "trainer": {"max_steps": 1, "save_every_steps": 1},
    }
    return load_config(PretrainConfig, layers=[layer], overrides=overrides)


@pytest.mark.parametrize("num_neighbours", [0, 1])
def test_pretrain__neighbours_reach_the_encoder_and_the_card(lab, monkeypatch, num_neighbours):
    seen = []
    loss = MaskedImage.loss

    def watched(self, images, **options):
        seen.append(images)
        return loss(self, images, **options)

    monkeypatch.setattr(MaskedImage, "loss", watched)
    config = pretrain_config(lab, f"data.num_neighbours={num_neighbours}")
    weights = pretrain(config, name=f"n{num_neighbours}", runs=lab / "runs", device=choose_device("cpu"))
    assert {images.shape[1] for images in seen} == {1 + 2 * num_neighbours}
    assert Card.read(weights.with_name("card.json")).num_neighbours == num_neighbours
    if num_neighbours:
        assert any(not torch.equal(images[:, 0], images[:, 1]) for images in seen)


def test_probe__uses_the_neighbours_of_training(lab):
    config = pretrain_config(lab, f"probe.store={lab / 'store.zarr'}", "data.num_neighbours=1")
    probe = load_probe(open_probe_store(config.probe), config, preset=load_preset("mri"))
    assert probe.train.images_N1SS.shape[1:] == (3, 32, 32)
    assert not torch.equal(probe.train.images_N1SS[:, 0], probe.train.images_N1SS[:, 1])


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(lambda: MaskedImage(tiny_encoder(), MaskedImageConfig(mask_unit_px=8), seed=0), id="masked_image"),
        pytest.param(lambda: MAE(plain_encoder(), MAEConfig(decoder_dim=16, num_decoder_heads=2), seed=0), id="mae"),
        pytest.param(lambda: DINO(lively_encoder(), DINOConfig(**HEADS), seed=0, max_steps=4), id="dino"),
        pytest.param(lambda: DINO(plain_encoder(), DINOConfig(**HEADS), seed=0, max_steps=4), id="dino plain"),
        pytest.param(lambda: LeJEPA(lively_encoder(), LeJEPAConfig(head_hidden_dim=8), seed=0), id="lejepa"),
        pytest.param(lambda: LeJEPA(plain_encoder(), LeJEPAConfig(head_hidden_dim=8), seed=0), id="lejepa plain"),
        pytest.param(lambda: Feature(lively_encoder(), FeatureConfig(), seed=0), id="feature"),
        pytest.param(lambda: Feature(plain_encoder(), FeatureConfig(decoder_dim=16), seed=0), id="feature plain"),
    ],
)
def test_objectives__neighbours_change_the_loss_but_not_the_pictures(objective):
    """Three equal channels are one slice three times. Other neighbours change the loss, but not the pictures."""
    model = objective().eval()
    randomise(model, scale=1.0)  # decoders start by answering zero
    size = model.encoder.image_size
    slice_2 = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    other = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(1))
    options = {"sample_counters": [0, 1]}
    with torch.no_grad():
        alone = model.loss(slice_2, step=0, **options).total
        same = model.loss(slice_2.repeat(1, 3, 1, 1), step=0, **options).total
        mixed = model.loss(torch.cat([other, slice_2, other], dim=1), step=0, **options).total
        panel = model.panel(torch.cat([other, slice_2, other], dim=1), **options)
    torch.testing.assert_close(same, alone, atol=1e-6, rtol=1e-6)
    assert abs(mixed - alone) > 1e-3
    torch.testing.assert_close(panel.images_KBHW[0], slice_2[:, 0], atol=0, rtol=0)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_pretrain__every_objective_trains_with_neighbours(small_lab, monkeypatch, objective):
    """Two steps with a monitoring round before and after them, and an export of the encoder."""
    shapes = []
    forward = PretrainModule.training_step

    def watched(self, batch, batch_idx):
        shapes.extend(image.shape[0] for image in batch["images"])
        return forward(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", watched)
    settings = ("data.num_neighbours=1", "trainer.max_steps=2", "watch.log_images=true")
    folder = run(small_lab, f"2.5d-{objective}", objective, *settings)
    assert shapes == [3] * 4
    assert Card.read(folder / "encoder" / "card.json").num_neighbours == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [v for line in lines for name, v in line.items() if name.endswith("loss")]
    assert len(values) >= 4
    assert all(np.isfinite(values))


def finetune_config(lab, *overrides):
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 2},
        "model": {"ckpt": str(lab / "ssl"), "base": str(lab / "sam.safetensors"), "image_size": 32},
        "trainer": {"max_steps": 1},
    }
    return load_config(FinetuneConfig, layers=[layer], overrides=overrides)


@pytest.mark.parametrize(("given", "expected"), [("null", 1), ("0", 0), ("1", 1)])
def test_finetune__neighbours_default_to_those_of_the_encoder(lab, given, expected):
    prepared = prepare(finetune_config(lab, f"data.num_neighbours={given}"))
    assert prepared.inference.num_neighbours == expected
    assert prepared.dataset[0, 0]["image"].shape[0] == 1 + 2 * expected


def test_neighbours_of__none_takes_the_number_of_the_card():
    card = Card(arch="vit_t", image_size=32, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3, num_neighbours=1)
    assert [neighbours_of(wanted, card) for wanted in (None, 0, 1)] == [1, 0, 1]


def test_inference__neighbours_do_not_depend_on_batches_or_selected_slices(lab):
    """Neighbours are read across the borders of batches, and also when only some slices are predicted."""
    store = SliceStore.open(lab / "store.zarr")
    series_id = store.series[0].series_id
    volume, stats = store.read_volume(series_id), store.record(series_id).stats
    segmenter = Segmenter(make_sam(SPEC, image_size=32), num_classes=1)
    classes = ClassTable(ids=(1,), names=("lesion",))
    seen = []
    segmenter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def segment(*, batch_size=8, num_neighbours=1, **options):
        config = InferenceConfig(
            intensity=store.intensity, keep_aspect=True, num_neighbours=num_neighbours, batch_size=batch_size
        )
        return segment_volume(segmenter, volume, stats, classes, config, **options)

    whole = segment()
    assert seen[0].shape == (5, 3, 32, 32)
    assert torch.equal(seen[0][1, 0], seen[0][0, 1])
    assert torch.equal(seen[0][0, 0], seen[0][0, 1])
    first = seen[0]
    np.testing.assert_array_equal(segment(batch_size=2), whole)
    torch.testing.assert_close(torch.cat(seen[1:4]), first)
    np.testing.assert_array_equal(segment(only=[3, 1]), whole[[3, 1]])
    segment(num_neighbours=0)
    torch.testing.assert_close(seen[-1], centre_channel(first))


@pytest.mark.parametrize("make", [pretrain_config, finetune_config])
@pytest.mark.parametrize("value", [2, -1])
def test_num_neighbours__more_than_the_encoder_has_channels_is_refused(lab, make, value):
    with pytest.raises(UsageError, match=r"num_neighbours must be in 0\.\.1"):
        make(lab, f"data.num_neighbours={value}")
