"""Scores of a study's settings with intervals, and ranks with a critical difference.

A setting is a combination of initialisation, architecture, scope, method and variant. Its score on one patient is the
mean over seeds. Patients are the unit of resampling and ranking, because scans and seeds of one patient are not
independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.evaluation.metrics import mean_or_none
from samgraft.finetune.evaluation.statistics import Interval, bootstrap_mean
from samgraft.finetune.study.cells import SETTING_AXES, Cell
from scipy.stats import friedmanchisquare, rankdata, studentized_range

Setting = tuple[str, ...]
"""Values of a setting in the order of ``SETTING_AXES``."""
CONFIDENCE = 0.95
"""Confidence of the critical difference."""


@dataclass(frozen=True, kw_only=True)
class SettingScore:
    """Score and cost of one setting on one data set with one number of shots."""

    setting: Setting
    data_set: str
    shots: int
    """Number of training patients or slices, 0 for all."""
    dice: Interval | None
    """Mean Dice over patients, None if no patient has a score."""
    num_seeds: int
    seed_std: float | None
    """Standard deviation of the seeds' means, None for one seed."""
    train_minutes: float
    """Wall time of training, mean over seeds."""
    peak_gib: float
    """Resident memory of the training process, largest over seeds."""
    trainable_millions: float
    """Trainable parameters, millions."""
    num_without_gain: int = 0
    """Number of models that segment hardly anything or did not improve."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Mean ranks of settings over patients, with rank 1 for the best."""

    mean_ranks: Mapping[Setting, float]
    num_patients: int
    """Number of blocks in which every setting has a score."""
    p_value: float | None
    """P-value of Friedman's test. None below three settings or ten blocks, where its approximation is poor."""
    critical_difference: float
    """Smallest difference of mean ranks that is significant (Nemenyi, 5 %)."""


def score_settings(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> list[SettingScore]:
    """Return the scores of every setting, data set and number of shots, without unfinished cells."""
    groups: dict[tuple[Setting, str, int], list[tuple[int, Mapping[str, Any]]]] = {}
    for cell in cells:  # in the order of the grid, so that equal studies give equal tables
        if cell.key in results:
            groups.setdefault((cell.setting, cell.data_set, cell.shots), []).append((cell.seed, results[cell.key]))
    scores = []
    for (setting, data_set, shots), seeded in groups.items():
        found = [result for _, result in seeded]
        patients = _seed_means(found)
        means = _means_of_seeds(seeded)
        scores.append(
            SettingScore(
                setting=setting,
                data_set=data_set,
                shots=shots,
                dice=bootstrap_mean(list(patients.values())),
                num_seeds=len({seed for seed, _ in seeded}),
                seed_std=float(np.std(means, ddof=1)) if len(means) > 1 else None,
                train_minutes=float(np.mean([r["train_seconds"] for r in found])) / 60,
                peak_gib=max(float(r["peak_mib"]) for r in found) / 1024,
                trainable_millions=float(found[0]["trainable_millions"]),
                # Results of earlier versions do not have this entry.
                num_without_gain=sum(not result.get("has_gain", True) for result in found),
            )
        )
    return scores


def _means_of_seeds(seeded: Sequence[tuple[int, Mapping[str, Any]]]) -> list[float]:
    """Return the mean Dice over patients of every seed, whose folds have different patients."""
    # Averaging the means of the folds instead would weight patients of small folds more.
    pooled: dict[int, list[float | None]] = {}
    for seed, result in seeded:
        pooled.setdefault(seed, []).extend(result["dice_per_patient"].values())
    return [mean for mean in map(mean_or_none, pooled.values()) if mean is not None]


def _seed_means(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    patients: dict[str, list[float]] = {}
    for result in results:
        for patient, dice in result["dice_per_patient"].items():
            patients.setdefault(patient, []).append(float(dice))
    return {patient: float(np.mean(values)) for patient, values in sorted(patients.items())}


def rank_settings(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> Ranking | None:
    """Rank the settings patient by patient.

    A block is one patient of one data set with one number of shots. Ties share their mean rank. The result is None with
    fewer than two settings, or without a block in which all of them have a score.

    Source:
        Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006): Friedman's test, and the
        Nemenyi critical difference q_a(k, inf) / sqrt(2) * sqrt(k (k + 1) / (6 N)).
    """
    scores: dict[tuple[str, int, str], dict[Setting, list[float]]] = {}
    settings: dict[Setting, None] = {}
    for cell in cells:
        if cell.key not in results:
            continue
        settings.setdefault(cell.setting)
        for patient, dice in results[cell.key]["dice_per_patient"].items():
            block = scores.setdefault((cell.data_set, cell.shots, patient), {})
            block.setdefault(cell.setting, []).append(float(dice))
    # Only blocks with every setting count. Ranks within incomplete blocks could not be compared.
    names = list(settings)
    table = np.array(
        [[np.mean(block[name]) for name in names] for block in scores.values() if len(block) == len(names)]
    )
    if len(names) < 2 or len(table) == 0:
        return None
    return rank_table(table, names)


def rank_table(table_NK: npt.NDArray[np.float64], names: Sequence[Setting]) -> Ranking:
    """Rank the K columns within each of N rows, the highest value first."""
    number, count = table_NK.shape
    ranks = rankdata(-table_NK, axis=1)
    # SciPy has the studentised range; Nemenyi's q is that divided by the square root of 2.
    quantile = float(studentized_range.ppf(CONFIDENCE, count, np.inf)) / math.sqrt(2)
    p_value = None
    if count >= 3 and number >= 10 and not np.all(table_NK == table_NK[:, :1]):
        p_value = float(friedmanchisquare(*table_NK.T).pvalue)
    return Ranking(
        mean_ranks=dict(zip(names, ranks.mean(axis=0).tolist(), strict=True)),
        num_patients=number,
        p_value=p_value,
        critical_difference=quantile * math.sqrt(count * (count + 1) / (6 * number)),
    )


def short_names(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Return names of settings with the axes on which they differ."""
    varying = [i for i in range(len(SETTING_AXES)) if len({s[i] for s in settings}) > 1]
    return {s: ", ".join(s[i] for i in varying) or "the only setting" for s in settings}


def group_similar_settings(ranking: Ranking) -> list[tuple[Setting, ...]]:
    """Return the largest groups of settings whose mean ranks are within the critical difference."""
    ordered = sorted(ranking.mean_ranks.items(), key=lambda item: item[1])
    groups: list[tuple[Setting, ...]] = []
    for start, (_, low) in enumerate(ordered):
        group = tuple(name for name, value in ordered[start:] if value - low <= ranking.critical_difference)
        # A group inside the one before adds nothing to the figure.
        if len(group) > 1 and not (groups and set(group) <= set(groups[-1])):
            groups.append(group)
    return groups
