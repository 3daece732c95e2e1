"""Augmentation: seeded per sample, labels follow geometry, values stay in range, float safe."""

import pickle

import numpy as np
import pytest
import torch
from samgraft.shared.data.augment import AugmentPreset, SliceAugmentation
from samgraft.shared.data.sampler import sample_generator

OFF = dict.fromkeys((n for n in AugmentPreset.__dataclass_fields__ if n.endswith("probability")), 0.0)


def sample():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 48), indexing="ij")
    image = ((rows + columns) / 2)[None]
    label = torch.zeros(40, 48, dtype=torch.int64)
    label[10:20, 12:30] = 300
    label[25:30, 5:9] = 65535
    return image, label


def test_all_off_is_the_identity():
    image, label = sample()
    out, out_label = SliceAugmentation(AugmentPreset(**OFF))(image, label, sample_generator(0, 0))
    assert torch.equal(out, image)
    assert torch.equal(out_label, label)


def test_same_generator_same_result_also_after_pickling():
    image, label = sample()
    augment = SliceAugmentation(AugmentPreset())
    clone = pickle.loads(pickle.dumps(augment))
    outs = [f(image, label, sample_generator(3, c)) for c in (1, 2, 1) for f in (augment, clone)]
    for out in outs[1:2] + outs[4:]:
        assert torch.equal(out[0], outs[0][0])
        assert torch.equal(out[1], outs[0][1])
    assert not torch.equal(outs[2][0], outs[0][0])


def test_values_stay_in_range_and_ids_a_subset():
    image, label = sample()
    always = AugmentPreset(**dict.fromkeys(OFF, 1.0))
    for counter in range(8):
        out, out_label = SliceAugmentation(always)(image, label, sample_generator(0, counter))
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()
        assert 0 <= out.min() <= out.max() <= 1
        assert out_label.dtype == torch.int64
        assert set(out_label.unique().tolist()) <= {0, 300, 65535}


@pytest.mark.parametrize("part", sorted(OFF))
def test_each_part_changes_something(part):
    image, label = sample()
    augment = SliceAugmentation(AugmentPreset(**{**OFF, part: 1.0}))
    changed = [not torch.equal(augment(image, label, sample_generator(0, c))[0], image) for c in range(4)]
    assert all(changed)
    geometric = part.startswith(("flip", "affine"))
    moved = any(not torch.equal(augment(image, label, sample_generator(0, c))[1], label) for c in range(4))
    assert moved == geometric


def test_label_moves_with_the_image():
    _, label = sample()
    image = (label[None] == 300).float()
    augment = SliceAugmentation(AugmentPreset(**{**OFF, "affine_probability": 1.0, "flip_columns_probability": 0.5}))
    for counter in range(6):
        out, out_label = augment(image, label, sample_generator(1, counter))
        overlap = ((out[0] > 0.5) & (out_label == 300)).sum() / ((out[0] > 0.5) | (out_label == 300)).sum()
        assert overlap > 0.85


def test_without_label():
    image, _ = sample()
    assert SliceAugmentation(AugmentPreset())(image, None, np.random.default_rng(0))[1] is None


def test_preset_refuses_nonsense():
    for name, value in (("noise_probability", 1.5), ("max_shift", -1.0), ("min_zoom", 0.0), ("max_scale", 1.0)):
        with pytest.raises(ValueError, match=name):
            AugmentPreset(**{name: value})
