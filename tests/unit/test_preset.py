"""Modality presets, their values, and the refusal of unknown names."""

import pytest
from samgraft.shared.errors import UsageError
from samgraft.shared.scans.intensity import IntensityKind
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.scans.volume import Modality


@pytest.mark.parametrize("modality", list(Modality))
def test_load_preset__every_modality_has_one(modality):
    assert load_preset(modality).modality is modality
    assert load_preset(f" {modality.value.upper()} ") == load_preset(modality)


def test_load_preset__values_suit_the_modality():
    ct, mri = load_preset("ct"), load_preset("mri")
    assert ct.intensity.kind is IntensityKind.WINDOW
    assert (ct.intensity.window_center, ct.intensity.window_width) == (40, 400)
    assert ct.augment["flip_columns_probability"] == 0  # heart and liver have sides
    assert mri.intensity.kind is IntensityKind.PERCENTILE
    assert "flip_columns_probability" not in mri.augment


@pytest.mark.parametrize("name", ["mr", "mrt", "", "pet"])
def test_load_preset__unknown_name_lists_the_known_ones(name):
    with pytest.raises(UsageError, match="must be one of ct, mri, ultrasound, xray"):
        load_preset(name)
