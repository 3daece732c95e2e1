"""Bootstrap intervals and paired tests over patients.

Patients are the unit, because scans of one patient are not independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from samgraft.shared.counting import counted
from scipy import stats

MIN_PATIENTS = 6
"""Smallest number of patients with an interval. With 5 patients a 95 % percentile interval is hardly more than the
range of the values: the most extreme resample (one patient five times) alone has probability (1/5)^5 = 0.0003 on each
side, and the tails consist of a handful of distinct means."""
NUM_RESAMPLES = 10_000
"""Number of bootstrap resamples of a mean."""
EFFECT_RESAMPLES = 2_000
"""Number of resamples of the effect size, which needs new ranks for each of them."""
MAX_DRAWN = 4_000_000
"""Largest number of patients drawn at once, 32 MB of indices."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean over patients with its percentile bootstrap interval."""

    mean: float
    low: float | None
    """Lower bound. It and ``high`` are None with too few patients for an interval."""
    high: float | None
    num_patients: int

    def render(self) -> str:
        """Return a text such as ``0.812 (0.774 to 0.846, 40 patients)``."""
        patients = counted(self.num_patients, "patient")
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} ({patients}: too few for an interval)"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f}, {patients})"


def bootstrap_mean(per_patient: Sequence[float], *, seed: int = 0, confidence: float = 0.95) -> Interval | None:
    """Return the mean over patients with a percentile bootstrap interval.

    Args:
        per_patient: One value per patient, the mean over that patient's scans.
        seed: Seed of the resampling; global generators are not used.
        confidence: Nominal coverage of the interval.

    Returns:
        None without any value; an interval without bounds below ``MIN_PATIENTS``.
    """
    return bootstrap_means([per_patient], seed=seed, confidence=confidence)[0]


def bootstrap_means(
    columns: Sequence[Sequence[float]], *, seed: int = 0, confidence: float = 0.95
) -> list[Interval | None]:
    """Return the interval of ``bootstrap_mean`` for every column of values.

    Columns of the same number of patients share their resamples, because drawing them takes most of the time.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    by_number: dict[int, list[int]] = {}
    for place, values in enumerate(arrays):
        by_number.setdefault(values.size, []).append(place)
    intervals: list[Interval | None] = [None] * len(arrays)
    for number, places in by_number.items():
        if number == 0:
            continue
        # Percentiles of means of patients drawn with replacement: no assumption about the distribution of scores.
        means = _resampled_means([arrays[place] for place in places], seed=seed) if number >= MIN_PATIENTS else None
        for row, place in enumerate(places):
            low, high = (None, None) if means is None else _bounds(means[row], confidence)
            mean = float(arrays[place].mean())
            intervals[place] = Interval(mean=mean, low=low, high=high, num_patients=number)
    return intervals


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Comparison of two models on the same patients. Positive values favour larger values of the second one."""

    difference: Interval
    """Mean over patients of second minus first, with its bootstrap interval."""
    effect: Interval
    """Matched-pairs rank-biserial correlation in [-1, 1] with its bootstrap interval. It is 1 if every patient's value
    is larger in the second, and 0 if the ranks of gains and losses balance."""
    p_value: float | None
    """P-value of the two-sided Wilcoxon signed-rank test. None below ``MIN_PATIENTS``, where it cannot reach 0.05."""


def compare_paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedComparison | None:
    """Compare two models by the values of the same patients.

    Args:
        first: One value per patient.
        second: The same patients in the same order.
        seed: Seed of the resampling.

    Returns:
        None without any patient.

    Raises:
        ValueError: If the lengths differ.

    Source:
        Wilcoxon, "Individual comparisons by ranking methods" (1945); Kerby, "The simple difference formula" (2014).
    """
    if len(first) != len(second):
        raise ValueError(f"paired values must be one per patient in both, got {len(first)} and {len(second)}.")
    values = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    # Tables have four decimals. Smaller differences are rounding errors, which must count as ties.
    values = np.round(values, 6)
    difference = bootstrap_mean(values.tolist(), seed=seed)
    if difference is None:
        return None
    number = len(values)
    effect = rank_biserial(values)
    if number < MIN_PATIENTS:
        return PairedComparison(
            difference=difference,
            effect=Interval(mean=effect, low=None, high=None, num_patients=number),
            p_value=None,
        )
    samples = (values[row] for rows in _resamples(number, EFFECT_RESAMPLES, seed=seed) for row in rows)
    effects = np.array([rank_biserial(sample) for sample in samples])
    low, high = _bounds(effects, 0.95)
    # SciPy has no p-value for differences that are all 0; equal models are no evidence of a difference.
    p_value = float(stats.wilcoxon(values).pvalue) if values.any() else 1.0
    return PairedComparison(
        difference=difference,
        effect=Interval(mean=effect, low=low, high=high, num_patients=number),
        p_value=p_value,
    )


def rank_biserial(differences: npt.NDArray[np.float64]) -> float:
    """Return (ranks of gains - ranks of losses) / (all ranks) of the differences other than 0.

    The result is 0 if all differences are 0.
    """
    known = differences[differences != 0]
    if known.size == 0:
        return 0.0
    ranks = stats.rankdata(np.abs(known))
    return float((ranks * np.sign(known)).sum() / ranks.sum())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct a family of p-values for their number by Holm's step-down rule.

    None stays None and does not count.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    # The smallest p-value is multiplied by the number of tests, the next one by one less, and so on. A corrected value
    # is never smaller than the one before, so that the order of the tests stays.
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[place] = largest
    return corrected


def _resampled_means(columns: Sequence[npt.NDArray[np.float64]], *, seed: int) -> npt.NDArray[np.float64]:
    """Return the means (columns, resamples) of columns of equal length."""
    means = np.empty((len(columns), NUM_RESAMPLES))
    start, drawn = 0, np.empty((0, 0))
    for rows in _resamples(len(columns[0]), NUM_RESAMPLES, seed=seed):
        # One array for all columns of a block, and clipping instead of a check of each index, are five times faster.
        drawn = drawn if drawn.shape == rows.shape else np.empty(rows.shape)
        for column, values in enumerate(columns):
            means[column, start : start + len(rows)] = values.take(rows, out=drawn, mode="clip").mean(axis=1)
        start += len(rows)
    return means


def _resamples(number: int, num_resamples: int, *, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield blocks of rows of patient indices, the same rows whatever the size of a block."""
    # All rows at once would need 800 MB for 10,000 patients.
    rng = np.random.default_rng([seed, 3])
    block = max(1, MAX_DRAWN // number)
    for start in range(0, num_resamples, block):
        yield rng.integers(0, number, size=(min(block, num_resamples - start), number))


def _bounds(values: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
