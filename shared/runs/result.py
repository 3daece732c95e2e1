"""Result of a training run, as the commands of both stages return it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

ENCODER_FILE = "encoder/encoder.safetensors"
"""Encoder weights in the folder of a stage-1 run."""
MODEL_FOLDER = "model"
"""Finished model in the folder of a stage-2 run."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Finished run of one stage."""

    path: Path
    """Folder of the run, which later commands take."""
    weights: Path
    """Encoder weights file of stage 1, or folder of the model of stage 2."""

    @property
    def report(self) -> Path:
        """Path of the HTML report."""
        return self.path / "report.html"

    @property
    def metrics(self) -> DataFrame:
        """Table with one row per logged step, such as loss, learning rate and validation scores."""
        # Imported here, because commands return results without their tables.
        import pandas as pd
        from samgraft.shared.runs.metrics import MetricsLog

        return pd.DataFrame(list(MetricsLog(self.path / "metrics.jsonl").read()))
