"""The licence of a release is required and does not allow more than that of the base weights."""

import logging

import pytest
from samgraft.shared.errors import UsageError
from samgraft.shared.release.licence import decide_licence, is_non_commercial
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.official import OFFICIAL

COMMAND = "samgraft release RUN --out OUT --license cc-by-4.0"


def card(**facts):
    return Card(arch="vit_b", image_size=64, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3, **facts)


@pytest.mark.parametrize("name", [None, "", "  "])
def test_licence__missing_is_refused(name):
    with pytest.raises(UsageError, match="licence of the release is missing") as refusal:
        decide_licence(name, card(), next_command=COMMAND)
    assert refusal.value.next_command == COMMAND


def test_licence__several_words_are_refused():
    with pytest.raises(UsageError, match="is not one SPDX name"):
        decide_licence("do what you want", card(), next_command=COMMAND)


def test_licence__commercial_use_of_a_non_commercial_base_is_refused():
    base = card(license="CC-BY-NC-4.0", base_name="x")
    with pytest.raises(UsageError, match=r"allows commercial use.*base weights: CC-BY-NC-4\.0"):
        decide_licence("cc-by-4.0", base, next_command=COMMAND)
    assert decide_licence("CC-BY-NC-SA-4.0", base, next_command=COMMAND).name == "cc-by-nc-sa-4.0"


def test_licence__base_weights_are_identified_by_hash_and_others_give_a_warning(caplog):
    caplog.set_level(logging.WARNING)
    known = decide_licence("mit", card(base_sha256=OFFICIAL["sam_vit_b"].sha256), next_command=COMMAND)
    assert (known.base_name, known.base_licence) == ("sam_vit_b", "Apache-2.0")
    assert not caplog.records
    assert decide_licence("mit", card(base_sha256="0" * 64), next_command=COMMAND).base_licence is None
    assert "is unknown" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cc-by-nc-4.0", True),
        ("PolyForm-Noncommercial-1.0.0", True),
        ("cc-by-4.0", False),
        ("Apache-2.0", False),
        ("ncsa", False),
    ],
)
def test_is_non_commercial__finds_the_clause_as_a_word(name, expected):
    assert is_non_commercial(name) is expected
