"""The licence of a release: asked for, never guessed, and not freer than its base weights."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from samgraft.shared.errors import UsageError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.official import OFFICIAL

log = logging.getLogger(__name__)

LITE_MEDSAM_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
KNOWN_BASES: dict[str, tuple[str, str]] = {
    **{file.sha256: (file.name, file.licence) for file in OFFICIAL.values()},
    LITE_MEDSAM_SHA256: ("LiteMedSAM", "Apache-2.0"),
}
"""Name and licence of published base weights, by the sha256 of their file."""


@dataclass(frozen=True, kw_only=True)
class Licence:
    """What the card says about terms."""

    name: str
    """SPDX name, lower case as the Hugging Face hub writes it."""
    base_name: str
    base_licence: str | None
    """None if the base weights are not known by their hash and their card is silent."""


def decide_licence(name: str | None, card: Card, *, next_command: str) -> Licence:
    """Check the licence that was asked for against the base weights'.

    Args:
        name: SPDX name such as ``cc-by-4.0``.
        card: Of the run; says what the weights started from.
        next_command: Shown when the licence is missing.

    Raises:
        UsageError: Without a licence, or if the base weights forbid commercial use and this licence allows it.
    """
    if not name or not name.strip():
        raise UsageError(
            "a release must state its licence; the base weights' and the data's terms limit the choice.",
            next_command=next_command,
        )
    name = name.strip().lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise UsageError(f"--license must be one SPDX name such as cc-by-4.0, got {name!r}.", next_command=next_command)
    known = KNOWN_BASES.get(card.base_sha256 or "")
    base_name = known[0] if known else card.base_name or "unknown"
    base_licence = known[1] if known else card.license
    if base_licence and is_non_commercial(base_licence) and not is_non_commercial(name):
        raise UsageError(
            f"--license must not allow more than the base weights' {base_licence} (non-commercial), got {name}.",
            where=base_name,
            next_command=f"--license {base_licence.lower()}, or other base weights",
        )
    if base_licence is None:
        log.warning("the licence of the base weights (%s) is not known: make sure that %s fits it.", base_name, name)
    return Licence(name=name, base_name=base_name, base_licence=base_licence)


def is_non_commercial(licence: str) -> bool:
    """True for licences with a non-commercial clause (``cc-by-nc-4.0``, ``polyform-noncommercial-1.0.0``)."""
    words = re.split(r"[^a-z]+", licence.lower())
    return "nc" in words or "noncommercial" in words
