"""What a run shows of itself while it learns: held-out loss, health of the features, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast

from PIL import Image
from samgraft.shared.training.periodic import Boundary, Periodic
from samgraft.ssl.config import WatchConfig
from samgraft.ssl.held_out import HeldOut, held_out_loss, held_out_panel, panel_picture
from samgraft.ssl.objectives.objective import Objective

PANELS_FOLDER = "panels"


def watch(held_out: HeldOut | None, config: WatchConfig, *, run_path: Path, batch_size: int) -> list[Periodic]:
    """Return the periodic task of the trainer; none without held-out slices."""
    if held_out is None:
        return []
    look = partial(_look, held_out=held_out, config=config, run_path=run_path, batch_size=batch_size)
    return [Periodic(name="held-out slices", every_steps=config.every_n_steps, run=look, at_start=True)]


def panel_path(run_path: Path, step: int) -> Path:
    """Return where the pictures of a step lie."""
    return run_path / PANELS_FOLDER / f"step-{step:06d}.png"


def _look(
    boundary: Boundary, *, held_out: HeldOut, config: WatchConfig, run_path: Path, batch_size: int
) -> Mapping[str, float]:
    objective, device = cast(Objective, boundary.module.objective), boundary.module.device
    numbers = held_out_loss(objective, held_out, batch_size=batch_size, step=boundary.step, device=device)
    if config.log_images and boundary.rank == 0:
        boundary.check_stop()
        panel = held_out_panel(objective, held_out, num_rows=config.num_panel_rows, device=device)
        picture_HW = panel_picture(panel)
        boundary.add_image(f"held_out/{', '.join(panel.columns)}", picture_HW)
        path = panel_path(run_path, boundary.step)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture_HW).save(path)
    return {f"held_out/{name}": value for name, value in numbers.items()}
