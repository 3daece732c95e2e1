"""Cells of a study's grid, one for each different fine-tuning."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from samgraft.finetune.study.config import ALL, StudyConfig
from samgraft.shared.errors import UsageError

SETTING_AXES = ("initialisation", "architecture", "scope", "method", "variant")
"""Axes of a compared setting. Its scores are measured over data sets, shots and seeds."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Fine-tuning with its evaluation."""

    data_set: str
    initialisation: str
    architecture: str
    scope: str
    method: str
    variant: str
    shots: int
    seed: int
    store: str
    split: str | None
    modality: str
    ckpt: str
    base: str | None
    preset: str
    part: str
    shot_unit: str
    settings: tuple[str, ...]
    fold: int | None = None
    """Number of the fold, None without folds."""

    @property
    def setting(self) -> tuple[str, ...]:
        """Compared setting, with a value for each of ``SETTING_AXES``."""
        return tuple(str(getattr(self, axis)) for axis in SETTING_AXES)

    @property
    def key(self) -> str:
        """Identity of the work, which does not depend on names that the study file chose."""
        # Equal work under two names, e.g. of a variant, is run once.
        work = {k: v for k, v in dataclasses.asdict(self).items() if k not in {"data_set", "initialisation", "variant"}}
        if self.fold is None:
            # Studies without folds keep the keys of earlier versions, so that their cells stay complete.
            del work["fold"]
        work["shot_unit"] = None if self.shots == ALL else self.shot_unit
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """Description for progress lines."""
        shots = "all" if self.shots == ALL else f"{self.shots} {self.shot_unit}"
        fold = "" if self.fold is None else f", fold {self.fold}"
        return f"{self.data_set}, {', '.join(self.setting)}, {shots}, seed {self.seed}{fold}"

    def finetune_arguments(self, runs: Path) -> list[str]:
        """Return the arguments of ``samgraft finetune``."""
        arguments = ["finetune", "--ckpt", self.ckpt, "--data", self.store, "--modality", self.modality]
        arguments += ["--model", self.architecture, "--method", self.method, "--preset", self.preset]
        arguments += ["--base", self.base] if self.base else []
        arguments += ["--runs", str(runs), "--name", self.key]
        overrides = [f"adapter.scope={self.scope}", f"seed={self.seed}", *self.settings]
        overrides += [f"data.split={self.split}"] if self.split else []
        overrides += [f"data.fold={self.fold}"] if self.fold is not None else []
        if self.shots != ALL:
            # The draw depends on the seed only, so all settings are trained on the same shots.
            overrides += [f"data.few_shot.num={self.shots}", f"data.few_shot.unit={self.shot_unit}"]
            overrides += [f"data.few_shot.repeat={self.seed}"]
        return [*arguments, *overrides]

    def evaluate_arguments(self, runs: Path) -> list[str]:
        """Return the arguments of ``samgraft evaluate``."""
        given = ["--split-file", self.split] if self.split else []
        return ["evaluate", str(runs / self.key), "--data", self.store, "--split", self.part, *given]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All cells of a study."""

    cells: tuple[Cell, ...]
    """Different cells in the order of the axes."""
    num_duplicates: int
    """Number of combinations that are the same work as an earlier one."""
    num_skipped: int
    """Number of combinations that ``skip`` leaves out."""


def expand(config: StudyConfig, *, stores: dict[str, str]) -> Grid:
    """Return the cells of a study in the order of its axes.

    Args:
        config: Settings of the study.
        stores: Path of the store by name of the data set.

    Raises:
        UsageError: If an initialisation has no weights for an architecture, or nothing is left.
    """
    found: dict[str, Cell] = {}  # by key: equal work occurs once, under its first names
    duplicates = skipped = 0
    folds: list[int | None] = [*config.folds] or [None]
    axes = itertools.product(
        config.data_sets,
        config.initialisations,
        config.architectures,
        config.scopes,
        config.methods,
        config.variants,
        config.shots,
        config.seeds,
        folds,
    )
    for data_set, weights, architecture, scope, method, variant, shots, seed, fold in axes:
        named = {
            "data_set": data_set.name, "initialisation": weights.name, "architecture": architecture, "scope": scope,
            "method": method, "variant": variant.name,
        }  # fmt: skip
        values = {**named, "shots": str(shots), "seed": str(seed)}
        if any(all(values[axis] == value for axis, value in rule.items()) for rule in config.skip):
            skipped += 1
            continue
        if architecture not in weights.ckpt:
            raise UsageError(
                f"initialisation {weights.name!r} must have weights for every architecture, {architecture} is missing. "
                "Name them in ckpt, or leave the combination out with skip.",
                where=f"initialisations, {weights.name}",
            )
        cell = Cell(
            **named,
            shots=shots,
            seed=seed,
            fold=fold,
            store=stores[data_set.name],
            split=data_set.split,
            modality=data_set.modality,
            ckpt=weights.ckpt[architecture],
            base=weights.base.get(architecture),
            preset=config.preset,
            part=config.part,
            shot_unit=config.shot_unit,
            settings=(*config.settings, *config.method_settings.get(method, ()), *variant.settings),
        )
        duplicates += cell.key in found
        found.setdefault(cell.key, cell)
    if not found:
        raise UsageError("a study must have at least one cell, skip leaves out all of them.", where="skip")
    return Grid(cells=tuple(found.values()), num_duplicates=duplicates, num_skipped=skipped)
