"""The grid expanded into cells; equal work is one cell, whatever its names."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from samgraft.finetune.study.config import ALL, DataSet, Initialisation, StudyConfig, Variant
from samgraft.shared.errors import UsageError

SETTING_AXES = ("initialisation", "architecture", "scope", "method", "variant")
"""What a row of the result table is; data set, shots and seed are what it is measured over."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fine-tuning with its evaluation."""

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

    @property
    def setting(self) -> tuple[str, ...]:
        """The compared setting: a value per ``SETTING_AXES``."""
        return tuple(str(getattr(self, axis)) for axis in SETTING_AXES)

    @property
    def key(self) -> str:
        """Identity of the work: names of data set, start and variant do not count, what they stand for does."""
        work = {k: v for k, v in dataclasses.asdict(self).items() if k not in {"data_set", "initialisation", "variant"}}
        work["shot_unit"] = None if self.shots == ALL else self.shot_unit
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """For progress lines."""
        shots = "all" if self.shots == ALL else f"{self.shots} {self.shot_unit}"
        return f"{self.data_set}, {', '.join(self.setting)}, {shots}, seed {self.seed}"

    def finetune_arguments(self, runs: Path) -> list[str]:
        """Return the arguments of ``samgraft finetune``."""
        arguments = ["finetune", "--ckpt", self.ckpt, "--data", self.store, "--modality", self.modality]
        arguments += ["--model", self.architecture, "--method", self.method, "--preset", self.preset]
        arguments += ["--base", self.base] if self.base else []
        arguments += ["--runs", str(runs), "--name", self.key]
        overrides = [f"adapter.scope={self.scope}", f"seed={self.seed}", *self.settings]
        overrides += [f"data.split={self.split}"] if self.split else []
        if self.shots != ALL:
            # The draw follows the seed and is the same for every setting.
            overrides += [f"data.few_shot.num={self.shots}", f"data.few_shot.unit={self.shot_unit}"]
            overrides += [f"data.few_shot.repeat={self.seed}"]
        return [*arguments, *overrides]

    def evaluate_arguments(self, runs: Path) -> list[str]:
        """Return the arguments of ``samgraft evaluate``."""
        given = ["--split-file", self.split] if self.split else []
        return ["evaluate", str(runs / self.key), "--data", self.store, "--split", self.part, *given]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every cell of a study."""

    cells: tuple[Cell, ...]
    num_duplicates: int
    """Combinations that are the same work as an earlier one."""
    num_skipped: int
    """Combinations that ``skip`` leaves out."""


def expand(config: StudyConfig, *, stores: dict[str, str]) -> Grid:
    """Return the cells of a study in the order of its axes.

    Args:
        config: The study.
        stores: Path of the store by name of the data set.

    Raises:
        UsageError: If an initialisation has no weights for an architecture, or nothing is left.
    """
    found: dict[str, Cell] = {}
    duplicates = skipped = 0
    axes = itertools.product(
        config.data_sets,
        config.initialisations,
        config.architectures,
        config.scopes,
        config.methods,
        config.variants,
        config.shots,
        config.seeds,
    )
    for data_set, start, architecture, scope, method, variant, shots, seed in axes:
        names = {
            "data_set": data_set.name, "initialisation": start.name, "architecture": architecture, "scope": scope,
            "method": method, "variant": variant.name, "shots": str(shots), "seed": str(seed),
        }  # fmt: skip
        if any(all(names[axis] == value for axis, value in rule.items()) for rule in config.skip):
            skipped += 1
            continue
        cell = _cell(config, data_set, start, architecture, scope, method, variant, shots, seed, stores[data_set.name])
        if cell.key in found:
            duplicates += 1
        else:
            found[cell.key] = cell
    if not found:
        raise UsageError("a study must have at least one cell; skip leaves out all of them.", where="skip")
    return Grid(cells=tuple(found.values()), num_duplicates=duplicates, num_skipped=skipped)


def _cell(
    config: StudyConfig,
    data_set: DataSet,
    start: Initialisation,
    architecture: str,
    scope: str,
    method: str,
    variant: Variant,
    shots: int,
    seed: int,
    store: str,
) -> Cell:
    if architecture not in start.ckpt:
        raise UsageError(
            f"initialisation {start.name!r} must have weights for every architecture, {architecture} is missing. Name "
            "them in ckpt, or leave the combination out with skip.",
            where=f"initialisations, {start.name}",
        )
    return Cell(
        data_set=data_set.name,
        initialisation=start.name,
        architecture=architecture,
        scope=scope,
        method=method,
        variant=variant.name,
        shots=shots,
        seed=seed,
        store=store,
        split=data_set.split,
        modality=data_set.modality,
        ckpt=start.ckpt[architecture],
        base=start.base.get(architecture),
        preset=config.preset,
        part=config.part,
        shot_unit=config.shot_unit,
        settings=(*config.settings, *config.method_settings.get(method, ()), *variant.settings),
    )
