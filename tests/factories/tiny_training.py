"""Two-layer training with dropout, batch norm, an EMA teacher and random losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from samgraft.shared.config import MAY_CHANGE, load_config
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.device import choose_device
from samgraft.shared.training.optim import LearningRate, OptimizerConfig, build_optimizer
from samgraft.shared.training.periodic import PeriodicTask, TaskContext
from samgraft.shared.training.resume import seed_process
from samgraft.shared.training.trainer import FitContext, FitResult, fit
from tiny_dataset import BATCH_SIZE, TinyDataset
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    trainer: TrainerConfig
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    width: int = 16
    note: str = field(default="", metadata=MAY_CHANGE)


class Killed(BaseException):
    """Replacement of SIGKILL within one process, which no code catches."""


class TinyModule(pl.LightningModule):
    def __init__(self, *, width: int = 16, nan_at: int | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.student = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.2), nn.GELU(), nn.Conv2d(width, 3, 1)
        )
        self.teacher = nn.Conv2d(3, width, 3, padding=1).requires_grad_(False)
        self.nan_at = nan_at
        self.lr = lr
        self.updates = 0

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = batch["image"]
        teach = (self.student[0](image) - self.teacher(image)).square().mean()
        # All three global generators are used, as careless code would.
        shift = 0.01 * (torch.rand(()) + np.random.rand())
        loss = (self.student(image) + shift - image).square().mean() + 0.1 * teach
        if self.nan_at is not None and self.trainer.global_step + 1 == self.nan_at:
            loss = loss * float("nan")
        return {"loss": loss, "loss/teach": teach.detach()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, OptimizerConfig(lr=self.lr))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.updates += 1
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student[0].parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["updates"] = self.updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.updates = checkpoint["updates"]


class At(pl.Callback):
    """Callback that acts after the optimizer step and before the step boundary."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step = step
        self.act = act

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act()


def die() -> None:
    raise Killed


def noisy_validation(context: TaskContext) -> dict[str, float]:
    """Draw random numbers and leave training mode on, which must not change the training."""
    context.check_stop()
    torch.rand(3)
    context.module.train()
    return {"val/score": float(np.sin(context.step))}


def tiny_config(**settings: Any) -> TinyConfig:
    values = {"max_steps": 15, "save_every_steps": 4, "log_every_steps": 5, "device": "cpu"} | settings
    return load_config(TinyConfig, layers=[{"trainer": values}])


def tiny_fit(
    root: Path,
    name: str,
    config: TinyConfig,
    *,
    callbacks: Sequence[pl.Callback] = (),
    periodic: Sequence[PeriodicTask] | None = None,
    dataset: Dataset[Any] | None = None,
    nan_at: int | None = None,
    module: Callable[..., pl.LightningModule] = TinyModule,
    data_fingerprint: str | None = None,
    ema_decay: float | None = None,
) -> FitResult:
    trainer = config.trainer
    if periodic is None:
        periodic = [PeriodicTask(name="validation", every_steps=3, run=noisy_validation, at_start=True)]
    with RunFolder.open(
        root, name, config=config, stage="pretrain", continue_command=f"make pretrain NAME={name}"
    ) as run:
        seed_process(7)
        return fit(
            module(width=config.width, nan_at=nan_at),
            FitContext(
                config=trainer,
                run=run,
                device=choose_device(trainer.device, precision=trainer.precision, devices=trainer.devices),
                dataset=dataset or TinyDataset(),
                collate_fn=default_collate,
                batch_size=BATCH_SIZE,
                seed=7,
                ema_decay=ema_decay,
                callbacks=[LearningRate(warmup_steps=2, max_steps=trainer.max_steps), *callbacks],
                periodic=periodic,
                data_fingerprint=data_fingerprint,
            ),
        )


def final_bytes(root: Path, name: str, step: int) -> dict[str, bytes]:
    """Return every byte of the last training state."""
    folder = root / name / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def curve(root: Path, name: str) -> list[tuple[int, dict[str, str]]]:
    """Return steps and values of metrics.jsonl bit by bit, without timings."""
    lines = [json.loads(text) for text in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], {k: float(v).hex() for k, v in line.items() if k != "step" and not k.startswith("perf/")})
        for line in lines
    ]
