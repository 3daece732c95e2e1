"""Augmentation is seeded per sample, moves labels with the image and keeps values in range."""

import pickle

import numpy as np
import pytest
import torch
from samgraft.finetune.commands.finetune import build_config, typed_settings
from samgraft.finetune.config import FinetuneConfig
from samgraft.shared.config import load_config, packaged_config
from samgraft.shared.samples.augment import AugmentConfig, SliceAugmentation
from samgraft.shared.samples.sampler import sample_generator
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.preset import load_preset, modality_layer
from samgraft.shared.scans.volume import Modality
from samgraft.shared.stage_config import TypedSettings
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.prepare import prepare
from store_factory import make_store

STILL = {"flip_columns_probability": 0.0}
PARTS = {
    "crop": {"min_crop_fraction": 0.5},
    "rotation": {"max_rotation_deg": 30.0},
    "scale": {"min_scale": 0.5, "max_scale": 0.9},
    "shear": {"max_shear": 0.5},
    "shift": {"max_shift": 0.3},
    "flip_columns": {"flip_columns_probability": 1.0},
    "flip_rows": {"flip_rows_probability": 1.0},
    "gamma": {"max_log_gamma": 0.5},
    "contrast": {"max_log_contrast": 0.5},
    "bias_field": {"bias_field_probability": 1.0},
    "blur": {"blur_probability": 1.0},
    "low_resolution": {"low_resolution_probability": 1.0},
    "noise": {"noise_std": 0.1},
}
GEOMETRIC = {"crop", "rotation", "scale", "shear", "shift", "flip_columns", "flip_rows"}
EVERYTHING = AugmentConfig(**{key: value for part in PARTS.values() for key, value in part.items()})


def sample(*, channels=1):
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 48), indexing="ij")
    image = ((rows + columns) / 2)[None].repeat(channels, 1, 1)
    label = torch.zeros(40, 48, dtype=torch.int64)
    label[10:20, 12:30] = 300
    label[25:30, 5:9] = 65535
    return image, label


def augmented(config, image, label, counter=0, **options):
    return SliceAugmentation(config)(image, label, sample_generator(0, counter), **options)


def test_augmentation__everything_off_is_the_identity():
    image, label = sample()
    out, out_label = augmented(AugmentConfig(**STILL), image, label)
    assert torch.equal(out, image)
    assert torch.equal(out_label, label)


def test_augmentation__same_generator_gives_the_same_result_after_pickling():
    image, label = sample()
    augment = SliceAugmentation(EVERYTHING)
    clone = pickle.loads(pickle.dumps(augment))
    outs = [f(image, label, sample_generator(3, c)) for c in (1, 2, 1) for f in (augment, clone)]
    for out in outs[1:2] + outs[4:]:
        assert torch.equal(out[0], outs[0][0])
        assert torch.equal(out[1], outs[0][1])
    assert not torch.equal(outs[2][0], outs[0][0])


def test_augmentation__global_generators_are_not_used():
    image, label = sample()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = augmented(EVERYTHING, image, label)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(augmented(EVERYTHING, image, label)[0], first[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation__values_stay_in_range_and_ids_are_a_subset(channels):
    image, label = sample(channels=channels)
    for counter in range(6):
        out, out_label = augmented(EVERYTHING, image, label, counter)
        assert out.dtype == torch.float32
        assert out.shape[0] == channels
        assert torch.isfinite(out).all()
        assert 0 <= out.min() <= out.max() <= 1
        assert out_label.dtype == torch.int64
        assert out_label.shape == out.shape[1:]
        assert set(out_label.unique().tolist()) <= {0, 300, 65535}


@pytest.mark.parametrize("part", sorted(PARTS))
def test_augmentation__each_setting_changes_the_result(part):
    """The label changes with geometric settings only."""
    image, label = sample()
    config = AugmentConfig(**{**STILL, **PARTS[part]})
    outs = [augmented(config, image, label, counter) for counter in range(4)]
    assert all(out.shape != image.shape or not torch.equal(out, image) for out, _ in outs)
    moved = any(out_label.shape != label.shape or not torch.equal(out_label, label) for _, out_label in outs)
    assert moved == (part in GEOMETRIC)


@pytest.mark.parametrize("part", ["rotation", "gamma", "noise"])
def test_augmentation__probability_is_the_share_of_changed_samples(part):
    name = {"rotation": "affine_probability", "gamma": "gamma_probability", "noise": "noise_probability"}[part]
    image, label = sample()
    config = AugmentConfig(**{**STILL, **PARTS[part], name: 0.5})
    changed = sum(not torch.equal(augmented(config, image, label, counter)[0], image) for counter in range(40))
    assert 10 < changed < 30


def test_augmentation__label_moves_with_the_image():
    _, label = sample()
    image = (label[None] == 300).float()
    config = AugmentConfig(max_rotation_deg=30, max_shift=0.1, min_scale=0.8, max_scale=1.2)
    for counter in range(6):
        out, out_label = augmented(config, image, label, counter)
        overlap = ((out[0] > 0.5) & (out_label == 300)).sum() / ((out[0] > 0.5) | (out_label == 300)).sum()
        assert overlap > 0.85


def test_augmentation__rotation_keeps_pixels_square():
    """A disc stays a disc on a slice that is wider than high."""
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(96.0), indexing="ij")
    disc = ((rows - 19.5).square() + (columns - 47.5).square() < 100).float()[None]
    config = AugmentConfig(flip_columns_probability=0.0, max_rotation_deg=90)
    for counter in range(4):
        out, _ = augmented(config, disc, None, counter)
        assert ((out > 0.5) != (disc > 0.5)).float().mean() < 0.01


def test_augmentation__sagittal_slices_are_never_flipped():
    """Their columns run from front to back, and no patient looks like the flipped slice. Other draws are unchanged."""
    image, label = sample()
    config = AugmentConfig(flip_columns_probability=1.0, max_log_gamma=0.3)
    sagittal, _ = augmented(config, image, label, plane=Plane.SAGITTAL)
    coronal, _ = augmented(config, image, label, plane=Plane.CORONAL)
    assert torch.equal(sagittal, coronal.flip(-1))
    assert sagittal[0, 0, 0] < sagittal[0, 0, -1]


def test_augmentation__works_without_label():
    image, _ = sample()
    assert augmented(EVERYTHING, image, None)[1] is None


def extents(config, image, *, number=40):
    """Return rows and columns of the bright part of augmented images, (number, 2)."""
    outs = [augmented(AugmentConfig(**STILL, **config), image, None, counter)[0][0] > 0.5 for counter in range(number)]
    return np.array([(int(out.any(1).sum()), int(out.any(0).sum())) for out in outs])


def test_augmentation__magnification_and_shear_have_the_stated_size():
    image = torch.zeros(1, 64, 96)
    image[:, 24:40, 40:56] = 1  # 16 px
    np.testing.assert_allclose(extents({"min_scale": 2.0, "max_scale": 2.0}, image, number=1), [[32, 32]], atol=1)
    sheared = extents({"max_shear": 0.5}, image)
    ratios = sheared[:, 0] / sheared[:, 1]
    assert 1.3 < ratios.max() < 1.85  # exp(0.5) is 1.65, and a side is rounded to pixels
    assert 0.54 < ratios.min() < 0.77


def test_augmentation__largest_shift_is_the_set_share_of_the_side():
    image = torch.zeros(1, 40, 80)
    image[:, 20, 40] = 1
    outs = [augmented(AugmentConfig(**STILL, max_shift=0.25), image, None, counter)[0] for counter in range(60)]
    places = np.array([np.unravel_index(int(out[0].argmax()), (40, 80)) for out in outs if out.max() > 0])
    shares = np.abs(places - [20, 40]) / [40, 80]
    assert len(places) == 60
    assert (shares.max(axis=0) > 0.2).all()
    assert (shares <= 0.25 + 1 / 40).all()


def test_augmentation__crops_reach_every_side_and_cut_the_label_at_the_same_place():
    label = torch.arange(8 * 40).view(8, 40)
    image = (label / 320)[None]
    outs = [augmented(AugmentConfig(**STILL, min_crop_fraction=0.2), image, label, c) for c in range(60)]
    for out, out_label in outs:
        assert torch.equal((out[0] * 320).round().long(), out_label)
    small = [out_label % 40 for _, out_label in outs if out_label.shape[1] <= 16]
    assert min(int(columns.min()) for columns in small) < 6
    assert max(int(columns.max()) for columns in small) > 33


def test_augmentation__blur_keeps_the_border_and_noise_has_any_strength():
    image = torch.ones(1, 12, 10)
    torch.testing.assert_close(augmented(AugmentConfig(**STILL, blur_probability=1.0), image, None)[0], image)
    grey = torch.full((1, 40, 40), 0.5)
    noisy = AugmentConfig(**STILL, noise_std=0.2)
    stds = [float(augmented(noisy, grey, None, counter)[0].std()) for counter in range(30)]
    assert min(stds) < 0.05
    assert 0.15 < max(stds) < 0.21


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_probability", 1.5),
        ("max_shift", -1.0),
        ("min_zoom", 0.0),
        ("min_crop_fraction", 0.0),
        ("min_crop_fraction", 1.1),
        ("min_scale", 2.0),
    ],
)
def test_augment_config__impossible_values_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        AugmentConfig(**{name: value})


# Defaults of the stages, and what a modality says about them ---------------------------------------------------------

REQUIRED = {
    PretrainConfig: {"data": {"store": "a.zarr"}, "model": {"base": "random"}},
    FinetuneConfig: {"data": {"store": "a.zarr"}, "model": {"ckpt": "runs/a"}},
}
PRESETS = {PretrainConfig: "pretrain/masked_image-cpu.yaml", FinetuneConfig: "finetune/cpu.yaml"}


def stage_augment(schema, modality, *, layered=True, overrides=()):
    layers = [modality_layer(modality)] if layered else []
    layers += [packaged_config(PRESETS[schema]), {"modality": modality, **REQUIRED[schema]}]
    return load_config(schema, layers=layers, overrides=overrides).data.augment


@pytest.mark.parametrize("schema", [PretrainConfig, FinetuneConfig])
@pytest.mark.parametrize("modality", [m.value for m in Modality])
def test_modality_layer__reaches_both_stages(schema, modality):
    own, plain = stage_augment(schema, modality), stage_augment(schema, modality, layered=False)
    wanted = load_preset(modality).augment
    changed = {name for name in AugmentConfig.__dataclass_fields__ if getattr(own, name) != getattr(plain, name)}
    assert changed <= set(wanted)
    assert all(getattr(own, name) == value for name, value in wanted.items())
    assert own.flip_columns_probability == {"ct": 0.0, "xray": 0.0}.get(modality, 0.5)


@pytest.mark.parametrize("schema", [PretrainConfig, FinetuneConfig])
def test_modality_layer__overrides_of_the_user_win(schema):
    assert stage_augment(schema, "ct", overrides=["data.augment.flip_columns_probability=0.25"]) == stage_augment(
        schema, "mri", overrides=["data.augment.flip_columns_probability=0.25", "data.augment.gamma_probability=0.1"]
    )


def test_commands__both_stages_apply_the_modality_preset(tmp_path):
    """The flip setting of CT arrives through the commands, not only through the function they share."""
    store = str(make_store(tmp_path, num_patients=2, shape_zyx=(2, 16, 16), modality="ct"))
    config, _ = prepare(TypedSettings(options={"data.store": store, "model.base": "random"}), has_gpu=False)
    assert config.data.augment.flip_columns_probability == 0.0
    typed = typed_settings(ckpt="runs/a", data=store)
    tuned = build_config(typed, preset="cpu")
    assert tuned.data.augment.flip_columns_probability == 0.0
