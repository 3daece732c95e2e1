"""Folder of a training run and its result, as the commands of both stages return it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.shared.errors import UsageError

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


def checked_run_path(root: Path, name: str) -> Path:
    """Return the folder of a run.

    Raises:
        UsageError: If the name is not a plain folder name, or a file is in the way.
    """
    if not name or name in {".", ".."} or Path(name).name != name or "\n" in name or len(name.encode()) > 200:
        raise UsageError(f"the run name must be a plain folder name of at most 200 bytes, got {name!r}.", where="NAME=")
    path = root / name
    for place in (path, root, *root.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"the run folder must be a folder, but {place.name} is a file.", where="NAME=")
    return path
