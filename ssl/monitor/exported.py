"""Choice among interpolations of initial and trained encoder, by the measures on labelled slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MIDDLE = 0.5
"""Share that is exported without labels. It is near the best for most tasks (WiSE-FT, section 5)."""
MEASURES = {"probe/dice": "linear probe", "drift/box_dice": "box-prompt check"}
"""Names of the measures in metrics, and for people."""

Measured = Mapping[float, Mapping[str, float]]
"""Values of ``MEASURES`` by share, 0 for the initial and 1 for the trained encoder."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Share of the training's change that the exported encoder has, and the reason for it."""

    share: float = 1.0
    """Place between the initial (0) and the trained (1) weights."""
    reason: str = ""
    """Rule and values that led to the share, empty if there was no choice."""
    measured: Measured = field(default_factory=dict)
    """Values of all candidates and of the initial encoder, empty without labels or without a choice."""
    grey_error: float | None = None
    """Error of the hidden pixels with the exported encoder and the trained decoder, grey values from 0 to 1. None for
    the trained encoder, whose error is in the metrics, and for objectives that predict no grey values."""

    def describe(self) -> str:
        """Return one sentence for the card and the report, empty if there was no choice."""
        if not self.reason:
            return ""
        return (
            f"the exported encoder is {100 * self.share:g} % of the way from the initial to the trained weights "
            f"({self.reason})"
        )


def choose_share(shares: Sequence[float], measured: Measured) -> Exported:
    """Choose the share that does no harm, or the middle without labels.

    With labels, each candidate is compared with the initial encoder by every measure. The candidate whose smallest
    change is largest is chosen, so that a gain in one measure does not pay for a loss in the other. Of equal ones the
    larger share is chosen.

    Args:
        shares: Candidates.
        measured: Values of all candidates and of the initial encoder (share 0), or nothing.

    Source:
        Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT, CVPR 2022), for interpolation and the middle.
    """
    if len(shares) == 1:
        reason = "" if shares[0] == 1 else "the only candidate"
        return Exported(share=shares[0], reason=reason, measured=measured)
    if not measured:
        share = min(shares, key=lambda s: (abs(s - MIDDLE), s))
        return Exported(share=share, reason=f"the candidate nearest to {MIDDLE}, because no labels are given")
    initial = measured[0.0]
    changes = {s: {name: measured[s][name] - initial[name] for name in initial if name in MEASURES} for s in shares}
    share = max(shares, key=lambda s: (min(changes[s].values()), s))
    shown = ", ".join(f"{MEASURES[name]} {change:+.3f}" for name, change in changes[share].items())
    names = " and ".join(MEASURES[name] for name in changes[share])
    reason = f"the candidate whose smallest change of {names} is largest, {shown} against the initial encoder"
    return Exported(share=share, reason=reason, measured=measured)
