"""Health measures and rules that warn of a collapse before the budget is spent.

Shape letters: N = slices, C = channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

ROUNDING = 1e-4
"""Share of the features' size below which differences between slices are rounding, so that the encoder collapsed."""
COLLAPSED_SHARE = 0.3
"""Share of the initial effective rank or deviation below which a run warns. Healthy masked modelling of pretrained
weights keeps more than half."""
LEARNED_SHARE = 0.98
"""Share of the initial held-out loss above which nothing was learned."""
RISEN_SHARE = 1.1
"""Multiple of the best held-out loss above which the run overfits or diverges."""
PATIENT_ROUNDS = 6
"""Monitoring rounds before a loss that does not fall is reported during a run. It often falls late."""
PROBE_NOISE = 0.02
"""Dice by which the linear probe may change by chance with some dozen slices of several patients."""
NUM_PROBES = 4
"""Number of probes in a run from which on the changes from round to round measure how much of a change is chance."""
DRIFTED_SHARE = 0.5
"""Share of the initial box-prompt Dice below which a run warns."""
ONE_PROTOTYPE, ALL_PROTOTYPES = 0.01, 0.99
"""Bounds of the teacher's entropy as a share of its maximum. Below, one prototype has all the probability. Above, all
prototypes have the same."""
GRADIENT_STEPS = 20
"""Number of steps over which the gradient norm is compared."""
EXPLODED = 20.0
"""Multiple of the gradient norm after the first steps of the warm-up above which a run warns."""
NO_GRADIENT = 1e-8
"""Gradient norm below which nothing is learned."""

Curves = Mapping[str, Sequence[float]]
"""Values of each metric in the order of the steps, the first one before training. Metrics that were not measured are
absent."""


@dataclass(frozen=True, kw_only=True)
class HealthWarning:
    """A rule whose condition holds, explained to the user."""

    rule: str
    """Short name of the rule. A rule whose condition persists is not printed again."""
    text: str


def feature_health(features_NC: torch.Tensor) -> dict[str, float]:
    """Measure the variety of the features of different slices.

    Args:
        features_NC: One vector per slice.

    Returns:
        ``effective_rank``, the number of directions over which the slices really spread, between 1 and N, and
        ``feature_std``, the mean standard deviation per channel between slices. Both fall towards their minimum when
        an encoder collapses.

    Source:
        Roy and Vetterli, The effective rank (EUSIPCO 2007): exp of the entropy of the normalised singular values.
    """
    features_NC = features_NC.float()
    centred_NC = features_NC - features_NC.mean(dim=0)
    spread = float(centred_NC.std(dim=0, correction=0).mean())
    # Singular values of pure rounding are about equal, and would look like a high rank.
    if spread <= ROUNDING * float(features_NC.abs().mean()):
        return {"effective_rank": 1.0, "feature_std": 0.0}
    values = torch.linalg.svdvals(centred_NC)
    shares = values / values.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return {"effective_rank": float(entropy.exp()), "feature_std": spread}


def has_moving_target(curves: Curves) -> bool:
    """Return True if the loss compares with a moving teacher, so that its height means nothing over time."""
    return "held_out/teacher_entropy" in curves


def health_warnings(curves: Curves, *, is_final: bool) -> list[HealthWarning]:
    """Return a warning for every rule whose condition holds.

    Args:
        curves: ``held_out/loss``, ``held_out/effective_rank``, ``held_out/feature_std``, ``held_out/teacher_entropy``
            (share of its maximum), ``probe/dice``, ``drift/box_dice``, ``train/grad_norm``.
        is_final: True at the last step. Before it, rules that need patience wait for a few rounds.
    """
    texts = {name: rule(curves, is_final) for name, rule in RULES.items()}
    return [HealthWarning(rule=name, text=text) for name, text in texts.items() if text is not None]


def _check_rank(curves: Curves, is_final: bool) -> str | None:
    first, last = _first_and_last(curves, "held_out/effective_rank")
    if first is None or last >= COLLAPSED_SHARE * first:
        return None
    return (
        f"Collapse: the features of different slices spread over {last:.1f} directions ({first:.1f} before training). "
        "Lower optim.lr, and do not fine-tune from this encoder."
    )


def _check_spread(curves: Curves, is_final: bool) -> str | None:
    first, last = _first_and_last(curves, "held_out/feature_std")
    if first is None or last >= COLLAPSED_SHARE * first:
        return None
    return (
        f"Collapse: the features of different slices differ by {last:.2g} ({first:.2g} before training), so the "
        "encoder returns nearly the same for every slice. Lower optim.lr."
    )


def _check_learning(curves: Curves, is_final: bool) -> str | None:
    first, last = _first_and_last(curves, "held_out/loss")
    num_rounds = len(curves.get("held_out/loss", ()))
    # The warm-up and a moving target both give a loss that does not fall in a healthy run.
    if first is None or has_moving_target(curves) or (num_rounds < PATIENT_ROUNDS and not is_final):
        return None
    if last < LEARNED_SHARE * first:
        return None
    # A loss can begin low, for example at the error of smoothing, so that "nothing was learned" would claim too much.
    change = "did not fall" if last >= first else f"fell by less than {1 - LEARNED_SHARE:.0%}"
    return (
        f"The loss on held-out slices {change} ({last:.4g}, {first:.4g} before training), so the objective's task "
        "is hardly solved better on unseen patients than at the start. That alone is no sign of harm; linear probe and "
        "box-prompt check show it. Use more steps, more slices, or another optim.lr."
    )


def _check_overfitting(curves: Curves, is_final: bool) -> str | None:
    loss = curves.get("held_out/loss", ())
    if len(loss) < 3 or has_moving_target(curves) or loss[-1] <= RISEN_SHARE * min(loss):
        return None
    return (
        f"The held-out loss rose from its best, {min(loss):.4g}, to {loss[-1]:.4g}, so the run overfits or diverges. "
        "Stop earlier, or use more patients."
    )


def _check_entropy(curves: Curves, is_final: bool) -> str | None:
    entropy = curves.get("held_out/teacher_entropy", ())
    if len(entropy) < 2 or ONE_PROTOTYPE < entropy[-1] < ALL_PROTOTYPES:
        return None
    if entropy[-1] <= ONE_PROTOTYPE:
        text = "the teacher gives every slice the same prototype. Raise the teacher's temperature."
    else:
        text = "all prototypes are equally likely, so the student learns nothing. Lower the teacher's temperature."
    return f"Teacher entropy is {100 * entropy[-1]:.1f} % of its maximum: {text}"


def probe_noise(dice: Sequence[float]) -> float:
    """Return the Dice by which the linear probe of a run may change by chance.

    Every round fits a new head, and with slices of one patient its Dice can move by 0.1 and back. Two standard
    deviations of the change from one round to the next are chance, and never less than ``PROBE_NOISE``. The median
    estimates this deviation, so that a single lasting change does not count as chance.

    Args:
        dice: Dice of all rounds, the first one before training.
    """
    if len(dice) < NUM_PROBES:
        return PROBE_NOISE
    # The median of the absolute values of a normal variable is its standard deviation divided by 1.4826.
    deviation = 1.4826 * median(abs(after - before) for before, after in pairwise(dice))
    return max(PROBE_NOISE, 2 * deviation)


def _check_probe(curves: Curves, is_final: bool) -> str | None:
    first, last = _first_and_last(curves, "probe/dice")
    if first is None or last >= first - probe_noise(curves["probe/dice"]):
        return None
    return (
        f"The linear probe fell to a Dice of {last:.3f} ({first:.3f} before training), so a linear head segments the "
        "labelled structures less well than before. This is a sign only; fine-tune from both encoders and compare. A "
        "lower optim.lr or fewer trained depths change the encoder less."
    )


def _check_box_prompts(curves: Curves, is_final: bool) -> str | None:
    first, last = _first_and_last(curves, "drift/box_dice")
    if first is None or last >= DRIFTED_SHARE * first:
        return None
    return (
        f"Drift: with box prompts, SAM's own decoder has a Dice of {last:.3f} on the new encoder ({first:.3f} before "
        "training). Fine-tuning must train the decoder too. If prompts have to keep working, lower optim.lr or use "
        "METHOD=feature, which keeps SAM's own embeddings."
    )


def _check_gradient(curves: Curves, is_final: bool) -> str | None:
    norms = curves.get("train/grad_norm", ())
    if len(norms) < 2 * GRADIENT_STEPS:
        return None
    # The very first steps of the warm-up are left out, because their gradients are not typical.
    last, first = median(norms[-GRADIENT_STEPS:]), median(norms[GRADIENT_STEPS : 2 * GRADIENT_STEPS])
    if last < NO_GRADIENT:
        return f"No gradient: its norm is {last:.1e} over the last {GRADIENT_STEPS} steps, so nothing is learned."
    if last > EXPLODED * first:
        return (
            f"The gradient norm rose from {first:.2g} to {last:.2g}, so the run is about to diverge. Lower optim.lr or "
            "trainer.clip_grad_norm."
        )
    return None


RULES: Mapping[str, Callable[[Curves, bool], str | None]] = {
    "rank": _check_rank,
    "spread": _check_spread,
    "loss did not fall": _check_learning,
    "risen loss": _check_overfitting,
    "entropy": _check_entropy,
    "probe": _check_probe,
    "drift": _check_box_prompts,
    "gradient": _check_gradient,
}
"""Rules by name. Each returns its warning, or None where its condition does not hold."""


def _first_and_last(curves: Curves, name: str) -> tuple[float, float] | tuple[None, float]:
    values = curves.get(name, ())
    return (values[0], values[-1]) if len(values) > 1 else (None, 0.0)
