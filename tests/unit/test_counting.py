"""Numbers with their nouns."""

import pytest
from samgraft.shared.counting import counted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "scan"), "1 scan"),
        ((0, "scan"), "0 scans"),
        ((2, "scan"), "2 scans"),
        ((1, "class", "classes"), "1 class"),
        ((3, "patient is", "patients are"), "3 patients are"),
    ],
)
def test_counted__noun_fits_the_number(arguments, text):
    assert counted(*arguments) == text
