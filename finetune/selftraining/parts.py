"""Fine-tunings of a self-training, which are the teachers of the first round and one student per round.

A teacher is trained in the first round, or is a finished run of the user.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samgraft.finetune.adapters import METHODS
from samgraft.finetune.baselines import Baseline
from samgraft.finetune.config import FinetuneConfig, SelftrainConfig
from samgraft.shared.config import config_to_dict, default_settings, load_config
from samgraft.shared.errors import UsageError

NEIGHBOURS = "neighbours"
"""Name of the teacher with the slices before and after as channels (2.5D)."""
KNOWN_TEACHERS = (*METHODS, *(baseline.value for baseline in Baseline), NEIGHBOURS)
"""Names of teachers that need no settings."""
PSEUDO_STORE = "pseudo_labels.zarr"
"""Name of the store of pseudo-labels in the folder of a round."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Run whose model labels scans."""

    name: str
    """Name for progress lines and tables, e.g. ``teacher lora``."""
    path: Path
    """Folder of the run."""


@dataclass(frozen=True, kw_only=True)
class Part(Teacher):
    """Fine-tuning of a self-training. A student may be a teacher of the next round."""

    config: FinetuneConfig
    """Settings of its run."""
    files: Path
    """Path of its settings and its log without the ending."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Teachers, pseudo-labels and student of one round."""

    number: int
    """Number of the round, from 1."""
    teachers: tuple[Teacher, ...]
    pseudo_path: Path
    """Store of the pseudo-labels."""
    student: Part

    @property
    def trained_teachers(self) -> list[Part]:
        """Teachers that the self-training trains."""
        return [teacher for teacher in self.teachers if isinstance(teacher, Part)]


def plan_rounds(config: FinetuneConfig, path: Path) -> list[Round]:
    """Return the rounds of a self-training. The student of the last round is the run itself.

    Args:
        config: Settings of the student, with the section ``selftrain``.
        path: Folder of the run.

    Raises:
        UsageError: If there is no teacher, or a teacher is unknown or has wrong settings.
    """
    settings = config.selftrain
    if config.data.pseudo_labels is not None:
        raise UsageError("data.pseudo_labels is written by the self-training. Leave it out.", where="data")
    first = plan_teachers(config, path / "round-1" / "teachers")
    rounds: list[Round] = []
    for number in range(1, settings.rounds + 1):
        folder = path / f"round-{number}"
        student_path = path if number == settings.rounds else folder / "student"
        # The path is part of the configuration, so that a resumed student reads the labels of its own round.
        data = dataclasses.replace(config.data, pseudo_labels=str(folder / PSEUDO_STORE))
        student = Part(
            name=f"student {number}",
            path=student_path,
            config=dataclasses.replace(config, data=data),
            files=folder / "student",
        )
        before = (rounds[-1].student,) if rounds else ()
        teachers = (*(first if settings.keep_teachers or not before else ()), *before)
        rounds.append(Round(number=number, teachers=teachers, pseudo_path=folder / PSEUDO_STORE, student=student))
    return rounds


def plan_teachers(config: FinetuneConfig, folder: Path) -> list[Teacher]:
    """Return the teachers of the first round. Those to be trained differ from the student in their settings only.

    Raises:
        UsageError: If there is none, or one is unknown, twice, or has wrong settings.
    """
    settings = config.selftrain
    # The folder of a run is its name in tables and in the record of the pseudo-labels.
    names = [Path(name).name if is_run(name) else name for name in settings.teachers]
    if not names or len(set(names)) != len(names):
        raise UsageError(
            f"selftrain.teachers must be at least one name and none twice, got {settings.teachers}. Use for example "
            "selftrain.teachers=[lora,adapter].",
            where="selftrain.teachers",
        )
    # A preset may have settings of methods that the user did not choose. A name that means nothing is a mistake.
    if unused := sorted(set(settings.teacher_settings) - set(settings.teachers) - set(KNOWN_TEACHERS)):
        raise UsageError(
            f"selftrain.teacher_settings has settings of {', '.join(unused)}, which selftrain.teachers does not list. "
            "Remove them or add the teacher.",
            where="selftrain.teacher_settings",
        )
    return [
        Teacher(name=f"teacher {name}", path=Path(given))
        if is_run(given)
        else Part(
            name=f"teacher {name}",
            path=folder / name,
            config=as_plain_finetuning(config, teacher_changes(name, settings)),
            files=folder / name,
        )
        for name, given in zip(names, settings.teachers, strict=True)
    ]


def is_run(teacher: str) -> bool:
    """Return whether a name in ``selftrain.teachers`` is the path of a finished run."""
    return "/" in teacher


def teacher_changes(name: str, settings: SelftrainConfig) -> list[str]:
    """Return the settings as key=value in which a teacher differs from the student.

    Raises:
        UsageError: If the name means nothing.
    """
    given = settings.teacher_settings.get(name, [])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UsageError(
            f"the name of a teacher must have letters, digits, _ and - only, got {name!r}.", where="selftrain.teachers"
        )
    if name in METHODS:
        own = [f"adapter.method={name}"]
    elif name in {baseline.value for baseline in Baseline}:
        own = [f"model.arch={name}", "model.ckpt=null", "model.base=null"]
    elif name == NEIGHBOURS:
        own = ["data.num_neighbours=1"]
    elif given:
        own = []
    else:
        raise UsageError(
            f"a teacher must be one of {', '.join(KNOWN_TEACHERS)}, the path of a finished run, or have settings, got "
            f"{name!r}. Add selftrain.teacher_settings.{name}.",
            where="selftrain.teachers",
        )
    return [*own, *settings.every_teacher, *given]


def as_plain_finetuning(config: FinetuneConfig, changes: Sequence[str] = ()) -> FinetuneConfig:
    """Return the settings of a fine-tuning on the labels alone, with some changes as key=value."""
    # A teacher that recorded the rounds would be refused on resume when only their number changes.
    values = config_to_dict(config)
    values["data"]["unlabelled"] = None
    return load_config(
        FinetuneConfig, layers=[{**values, "selftrain": default_settings(SelftrainConfig)}], overrides=changes
    )
