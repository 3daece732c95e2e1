"""Health: numbers that show a collapse before the budget is spent, and what they mean in words.

Shape letters: N = slices, C = channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

ROUNDING = 1e-4
"""Differences between slices below this share of the features are rounding, not content: collapsed."""
COLLAPSED_SHARE = 0.3
"""Of the start's effective rank or deviation; healthy masked modelling of pretrained weights keeps more than half."""
LEARNED_SHARE = 0.98
"""Of the start's held-out loss: above it nothing was learned."""
RISEN_SHARE = 1.1
"""Of the best held-out loss: above it the run overfits or diverges."""
PATIENT_LOOKS = 4
"""Looks before a loss that does not fall is called dead: the warm-up comes first."""
PROBE_NOISE = 0.02
"""Dice by which the probe may lie below its start: with some dozen slices that is no more than chance."""
DRIFTED_SHARE = 0.5
"""Of the start's box-prompt Dice."""
ONE_PROTOTYPE, ALL_PROTOTYPES = 0.01, 0.99
"""Teacher entropy as a share of its maximum: outside, one prototype has won or all are alike."""
GRADIENT_STEPS = 20
EXPLODED = 20.0
"""Times the norm just after the warm-up's first steps."""
NO_GRADIENT = 1e-8


def feature_health(features_NC: torch.Tensor) -> dict[str, float]:
    """Measure how varied the features of different slices are.

    Args:
        features_NC: One vector per slice.

    Returns:
        ``effective_rank``: how many directions the slices really spread over, between 1 and N; ``feature_std``: mean
        standard deviation per channel between slices. Both fall towards their minimum when an encoder collapses.

    Source:
        Roy and Vetterli, The effective rank (EUSIPCO 2007): exp of the entropy of the normalised singular values.
    """
    features_NC = features_NC.float()
    centred_NC = features_NC - features_NC.mean(dim=0)
    spread = float(centred_NC.std(dim=0, correction=0).mean())
    if spread <= ROUNDING * float(features_NC.abs().mean()):
        return {"effective_rank": 1.0, "feature_std": 0.0}
    values = torch.linalg.svdvals(centred_NC)
    shares = values / values.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return {"effective_rank": float(entropy.exp()), "feature_std": spread}


@dataclass(frozen=True, kw_only=True)
class Worry:
    """A rule that fired, in words for a person."""

    rule: str
    """Short name; a rule that goes on firing is not printed again."""
    text: str


Curves = Mapping[str, Sequence[float]]
"""Values of a metric in the order of the steps, the first one before training; metrics that were not taken are absent.
"""


def target_moves(curves: Curves) -> bool:
    """Tell whether the loss is measured against a teacher that moves: then its height means nothing over time."""
    return "held_out/teacher_entropy" in curves


def worries(curves: Curves, *, is_final: bool) -> list[Worry]:
    """Say what a person should worry about.

    Args:
        curves: ``held_out/loss``, ``held_out/effective_rank``, ``held_out/feature_std``, ``held_out/teacher_entropy``
            (share of its maximum), ``probe/dice``, ``drift/box_dice``, ``train/grad_norm``.
        is_final: At the last step; before, rules that need patience wait for a few looks.
    """
    found = [rule(curves, is_final) for rule in RULES]
    return [worry for worry in found if worry is not None]


def _rank(curves: Curves, is_final: bool) -> Worry | None:
    start, now = _ends(curves, "held_out/effective_rank")
    if start is None or now >= COLLAPSED_SHARE * start:
        return None
    return Worry(
        rule="rank",
        text=f"Collapse: the features of different slices spread over {now:.1f} directions, {start:.1f} at the start. "
        "Lower optim.lr; do not fine-tune from this encoder.",
    )


def _spread(curves: Curves, is_final: bool) -> Worry | None:
    start, now = _ends(curves, "held_out/feature_std")
    if start is None or now >= COLLAPSED_SHARE * start:
        return None
    return Worry(
        rule="spread",
        text=f"Collapse: slices differ by {now:.2g} in feature space, {start:.2g} at the start: the encoder answers "
        "nearly the same for every slice.",
    )


def _dead(curves: Curves, is_final: bool) -> Worry | None:
    start, now = _ends(curves, "held_out/loss")
    looks = len(curves.get("held_out/loss", ()))
    if start is None or target_moves(curves) or (looks < PATIENT_LOOKS and not is_final):
        return None
    if now < LEARNED_SHARE * start:
        return None
    return Worry(
        rule="dead loss",
        text=f"Dead loss: {now:.4g} on held-out slices, {start:.4g} at the start: nothing was learned that carries "
        "over to unseen patients. Use more slices, another optim.lr, or more steps.",
    )


def _risen(curves: Curves, is_final: bool) -> Worry | None:
    loss = curves.get("held_out/loss", ())
    if len(loss) < 3 or target_moves(curves) or loss[-1] <= RISEN_SHARE * min(loss):
        return None
    return Worry(
        rule="risen loss",
        text=f"The held-out loss rose from its best, {min(loss):.4g}, to {loss[-1]:.4g}: the run overfits or diverges. "
        "Stop earlier, or use more patients.",
    )


def _entropy(curves: Curves, is_final: bool) -> Worry | None:
    entropy = curves.get("held_out/teacher_entropy", ())
    if len(entropy) < 2 or ONE_PROTOTYPE < entropy[-1] < ALL_PROTOTYPES:
        return None
    if entropy[-1] <= ONE_PROTOTYPE:
        text = "the teacher gives every slice the same prototype. Raise the teacher's temperature or check centring."
    else:
        text = "the teacher finds every prototype equally likely and teaches nothing. Lower its temperature."
    return Worry(rule="entropy", text=f"Teacher entropy is {100 * entropy[-1]:.1f} % of its maximum: {text}")


def _probe(curves: Curves, is_final: bool) -> Worry | None:
    start, now = _ends(curves, "probe/dice")
    if start is None or now >= start - PROBE_NOISE:
        return None
    return Worry(
        rule="probe",
        text=f"The frozen-feature probe fell to a Dice of {now:.3f}, {start:.3f} at the start: a linear head reads the "
        "labelled structures less well than before. A sign, not a verdict: fine-tune from both and compare. A lower "
        "optim.lr or fewer trained depths change less.",
    )


def _drift(curves: Curves, is_final: bool) -> Worry | None:
    start, now = _ends(curves, "drift/box_dice")
    if start is None or now >= DRIFTED_SHARE * start:
        return None
    return Worry(
        rule="drift",
        text=f"Drift: SAM's own decoder, asked with boxes, scores {now:.3f} on the new encoder, {start:.3f} at the "
        "start: it no longer understands the embeddings. Fine-tuning must train the decoder too; to keep prompts "
        "working, lower optim.lr or take the objective that keeps SAM's own embeddings.",
    )


def _gradient(curves: Curves, is_final: bool) -> Worry | None:
    norms = curves.get("train/grad_norm", ())
    if len(norms) < 2 * GRADIENT_STEPS:
        return None
    now, before = median(norms[-GRADIENT_STEPS:]), median(norms[GRADIENT_STEPS : 2 * GRADIENT_STEPS])
    if now < NO_GRADIENT:
        return Worry(
            rule="gradient",
            text=f"No gradient: its norm is {now:.1e} over the last {GRADIENT_STEPS} steps: nothing more is learned.",
        )
    if now > EXPLODED * before:
        return Worry(
            rule="gradient",
            text=f"The gradient norm rose from {before:.2g} to {now:.2g}: the run is about to diverge. Lower optim.lr "
            "or trainer.clip_grad_norm.",
        )
    return None


RULES: tuple[Callable[[Curves, bool], Worry | None], ...] = (
    _rank,
    _spread,
    _dead,
    _risen,
    _entropy,
    _probe,
    _drift,
    _gradient,
)


def _ends(curves: Curves, name: str) -> tuple[float, float] | tuple[None, float]:
    """Return the start's value and the newest one; None where there are not two."""
    values = curves.get(name, ())
    return (values[0], values[-1]) if len(values) > 1 else (None, 0.0)
