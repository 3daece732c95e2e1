"""task.json beside a model: which classes it segments and how scans must reach it; ``card.json`` says what it is."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samgraft.finetune.classes import ClassTable, clean_class_names
from samgraft.finetune.inference import InferenceConfig
from samgraft.finetune.prompting.prompt_sampling import PromptConfig
from samgraft.shared.config import load_config
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_json
from samgraft.shared.scans.intensity import IntensityPreset

SCHEMA = 1
TASK_FILE = "task.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything beside weights that a prediction or an evaluation needs."""

    class_ids: list[int]
    class_names: list[str]
    class_members: list[list[int]] = field(default_factory=list)
    """Overlapping classes only: the label ids that each joins; predictions then hold one bit per class."""
    modality: str
    image_size: int
    keep_aspect: bool
    intensity: dict[str, Any]
    num_neighbours: int = 0
    """Slices on each side that are the encoder's other channels (2.5D)."""
    store_fingerprint: str
    """Store it was trained on."""
    split_sha256: str
    split: dict[str, list[str]]
    """Pseudonymous patients of train, val and test."""
    network: dict[str, Any] = field(default_factory=dict)
    """Plan of a baseline's network; empty: SAM."""
    prompt: dict[str, Any] = field(default_factory=dict)
    """Prompts the model was trained with and evaluation draws; empty: automatic."""
    transductive: bool = False
    """True when the user allowed patients of val or test in pretraining."""
    trainable_millions: dict[str, float] = field(default_factory=dict)
    """Trainable parameters per part, in millions."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Foreground Dice on validation: zero_shot, start, best, and the step of the best."""
    schema: int = SCHEMA

    @property
    def classes(self) -> ClassTable:
        """Channel order."""
        return ClassTable(
            ids=tuple(self.class_ids),
            names=clean_class_names(self.class_names),
            members=tuple(tuple(labels) for labels in self.class_members),
        )

    def inference(self, *, batch_size: int = 8) -> InferenceConfig:
        """Return how slices reach the encoder."""
        return InferenceConfig(
            intensity=IntensityPreset.from_dict(self.intensity),
            keep_aspect=self.keep_aspect,
            num_neighbours=self.num_neighbours,
            batch_size=batch_size,
            prompt=load_config(PromptConfig, layers=[self.prompt]).for_evaluation(),
        )

    def write(self, folder: Path) -> None:
        """Write ``task.json`` through a temporary neighbour."""
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
                f"a fine-tuned model must have {TASK_FILE} beside its weights. Give a finished run or a release.",
                where=folder.name,
                next_command="make finetune CKPT=...",
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in dataclasses.fields(cls)}
            # Models from before there were neighbours have none.
            if values.get("schema") != SCHEMA or set(values) | {"num_neighbours"} != known:
                raise WeightsError(
                    f"{TASK_FILE} must have schema {SCHEMA} and exactly its fields, got schema "
                    f"{values.get('schema')!r} and other fields {sorted(set(values) ^ known)}.",
                    where=folder.name,
                )
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as err:
            if isinstance(err, WeightsError):
                raise
            raise WeightsError(f"{TASK_FILE} is damaged.", where=folder.name) from err
