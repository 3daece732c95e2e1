"""Task of a model, ``task.json``, with its classes and the conversion of scans to its input."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from samgraft.finetune.classes import ClassTable, clean_class_names
from samgraft.finetune.ending import describe_ending
from samgraft.finetune.inference import InferenceConfig
from samgraft.finetune.prompting.prompt_sampling import PromptConfig
from samgraft.shared.config import load_config
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_json
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.orientation import Plane

SCHEMA = 1
TASK_FILE = "task.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Facts that a prediction or an evaluation needs in addition to the weights."""

    class_ids: list[int]
    class_names: list[str]
    class_members: list[list[int]] = field(default_factory=list)
    """Label ids that each overlapping class joins. Predictions then have one bit per class. Empty for exclusive
    classes."""
    modality: str
    image_size: int
    keep_aspect: bool
    intensity: dict[str, Any]
    num_neighbours: int = 0
    """Number of slices on each side that are further channels of the encoder (2.5D)."""
    planes: list[str] = field(default_factory=list)
    """Planes whose probabilities are averaged. Empty segments scans in the plane in which they were acquired."""
    store_fingerprint: str
    """Fingerprint of the training store."""
    split_sha256: str
    split: dict[str, list[str]]
    """Pseudonymous patients of train, val and test."""
    network: dict[str, Any] = field(default_factory=dict)
    """Plan of a baseline's network. Empty for SAM."""
    prompt: dict[str, Any] = field(default_factory=dict)
    """Prompts of the training, which evaluation draws too. Empty for automatic mode."""
    transductive: bool = False
    """True when the user allowed validation or test patients in pretraining."""
    trainable_millions: dict[str, float] = field(default_factory=dict)
    """Trainable parameters per part, in millions."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Foreground Dice on validation under zero_shot, start and best, and the step of the best."""
    schema: int = SCHEMA

    @property
    def warning(self) -> str | None:
        """Sentence on a model that segments hardly anything or did not improve, None for any other."""
        ending = describe_ending(self.validation)
        return None if ending is None or ending.is_good else ending.text

    @property
    def classes(self) -> ClassTable:
        """Table of classes in channel order."""
        return ClassTable(
            ids=tuple(self.class_ids),
            names=clean_class_names(self.class_names),
            members=tuple(tuple(labels) for labels in self.class_members),
        )

    def inference(self, *, batch_size: int = 8) -> InferenceConfig:
        """Return the conversion of slices to the encoder's input."""
        return InferenceConfig(
            intensity=IntensityPreset.from_dict(self.intensity),
            keep_aspect=self.keep_aspect,
            num_neighbours=self.num_neighbours,
            planes=tuple(Plane(plane) for plane in self.planes),
            batch_size=batch_size,
            prompt=load_config(PromptConfig, layers=[self.prompt]).for_evaluation(),
        )

    def write(self, folder: Path) -> None:
        """Write ``task.json`` atomically."""
        path = folder / TASK_FILE
        write_json(path, dataclasses.asdict(self), indent=2)

    @classmethod
    def read(cls, folder: Path) -> Task:
        """Read a task strictly.

        Raises:
            WeightsError: If the file is missing, damaged or of another schema.
        """
        path = folder / TASK_FILE
        if not path.is_file():
            raise WeightsError(
                f"{TASK_FILE} is missing next to the weights. Give a finished run or a release.",
                where=folder.name,
                next_command="make finetune CKPT=...",
            )
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text)
            known = {f.name for f in dataclasses.fields(cls)}
            # Models of versions without 2.5D input or planes have no such fields.
            if values.get("schema") != SCHEMA or set(values) | {"num_neighbours", "planes"} != known:
                raise WeightsError(
                    f"{TASK_FILE} does not fit this version (got schema {values.get('schema')!r}, expected {SCHEMA}; "
                    f"missing or unexpected fields {sorted(set(values) ^ known)}). Install the version of "
                    "samgraft that wrote it.",
                    where=folder.name,
                )
            task = _TYPES.validate_json(text, strict=True)
            # Classes and intensities are checked here, so that no later step fails on them.
            task.classes  # noqa: B018
            task.inference()
        except ValidationError as err:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors())
            raise WeightsError(f"{TASK_FILE} is damaged ({problems[:300]}). Copy it again.", where=folder.name) from err
        except (ValueError, TypeError, AttributeError, RecursionError) as err:
            if isinstance(err, WeightsError):
                raise
            raise WeightsError(f"{TASK_FILE} is damaged. Copy it again.", where=folder.name) from err
        return task


_TYPES = TypeAdapter(Task)
