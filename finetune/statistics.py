"""Intervals over patients: scans of one patient are not independent, so patients are what is resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_PATIENTS = 6
"""Below, a 95 % percentile interval is the range of the values: with 5 patients the most extreme resample (one patient
five times) alone has probability 5 * (1/5)^5 = 0.0016 on each side, and the tails hold a handful of distinct means."""
NUM_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over patients with its percentile bootstrap interval."""

    mean: float
    low: float | None
    """None when there are too few patients for an interval."""
    high: float | None
    num_patients: int

    def render(self) -> str:
        """Return e.g. ``0.812 (0.774 to 0.846, 40 patients)``."""
        patients = f"{self.num_patients} patient{'s' * (self.num_patients != 1)}"
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} ({patients}: too few for an interval)"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f}, {patients})"


def bootstrap_mean(per_patient: Sequence[float], *, seed: int = 0, confidence: float = 0.95) -> Interval | None:
    """Return the mean over patients with a percentile bootstrap interval.

    Args:
        per_patient: One value per patient (the mean over that patient's scans).
        seed: Of the resampling; global generators are not touched.
        confidence: Coverage aimed at.

    Returns:
        None without any value; an interval without bounds below ``MIN_PATIENTS``.
    """
    values = np.asarray(per_patient, dtype=np.float64)
    if values.size == 0:
        return None
    mean, number = float(values.mean()), int(values.size)
    if number < MIN_PATIENTS:
        return Interval(mean=mean, low=None, high=None, num_patients=number)
    generator = np.random.default_rng([seed, 3])
    means = values[generator.integers(0, number, size=(NUM_RESAMPLES, number))].mean(axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(mean=mean, low=float(low), high=float(high), num_patients=number)
