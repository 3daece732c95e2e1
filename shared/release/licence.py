"""The licence of a release.

The user states it. It must not allow commercial use if the licence of the base weights does not.
"""

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
    """Terms of a release and of its base weights."""

    name: str
    """SPDX name, lower case as the Hugging Face hub writes it."""
    base_name: str
    base_licence: str | None
    """None if neither the hash of the base weights nor their card identifies the licence."""


def decide_licence(name: str | None, card: Card, *, next_command: str) -> Licence:
    """Check the chosen licence against that of the base weights.

    Args:
        name: SPDX name such as ``cc-by-4.0``.
        card: Card of the run, which names the base weights.
        next_command: Command that the message shows when the licence is missing.

    Raises:
        UsageError: If the licence is missing, is not one name, or allows commercial use and the base weights do not.
    """
    if not name or not name.strip():
        raise UsageError(
            "the licence of the release is missing. Choose one that the terms of base weights and data allow.",
            next_command=next_command,
        )
    name = name.strip().lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise UsageError(
            f"--license is not one SPDX name (got {name!r}, expected a name such as cc-by-4.0).",
            next_command=next_command,
        )
    # The hash identifies published files for certain; a card may have been edited.
    known = KNOWN_BASES.get(card.base_sha256 or "")
    base_name = known[0] if known else card.base_name or "unknown"
    base_licence = known[1] if known else card.license
    if base_licence and is_non_commercial(base_licence) and not is_non_commercial(name):
        raise UsageError(
            f"--license allows commercial use, but the base weights do not (got {name}, base weights: {base_licence}).",
            where=base_name,
            next_command=f"--license {base_licence.lower()}, or other base weights",
        )
    if base_licence is None:
        log.warning("the licence of the base weights (%s) is unknown. Check that it permits %s.", base_name, name)
    return Licence(name=name, base_name=base_name, base_licence=base_licence)


def is_non_commercial(licence: str) -> bool:
    """Return True for licences with a non-commercial clause (``cc-by-nc-4.0``, ``polyform-noncommercial-1.0.0``)."""
    # Whole words, because "ncsa" contains the letters of "nc" and is a permissive licence.
    words = re.split(r"[^a-z]+", licence.lower())
    return "nc" in words or "noncommercial" in words
