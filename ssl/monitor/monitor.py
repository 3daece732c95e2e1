"""Monitoring rounds of a run, which compute held-out loss, pictures, linear probe, box-prompt check and warnings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.runs.metrics import add_to_curves
from samgraft.shared.samples.split import Split
from samgraft.shared.scans.preset import ModalityPreset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.periodic import PeriodicTask, TaskContext
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.monitor.box_prompt_check import BoxPromptCheck, load_box_prompt_check
from samgraft.ssl.monitor.health import health_warnings
from samgraft.ssl.monitor.held_out import HeldOut, held_out_loss, held_out_panel, load_held_out, panel_picture
from samgraft.ssl.monitor.labelled import ProbeData, load_probe
from samgraft.ssl.monitor.linear_probe import probe_dice
from samgraft.ssl.objectives import Objective, Panel

log = logging.getLogger(__name__)

PANELS_FOLDER = "panels"


@dataclass(frozen=True, kw_only=True)
class MonitorData:
    """Slices and decoder of the monitoring rounds, None where a measure is off."""

    held_out: HeldOut | None
    probe: ProbeData | None
    box_check: BoxPromptCheck | None
    box_check_note: str
    """Description of the box-prompt check, or the reason why it is off."""


def load_monitor_data(
    config: PretrainConfig,
    store: SliceStore,
    split: Split,
    probe_store: tuple[SliceStore, Split] | None,
    *,
    preset: ModalityPreset,
    stride: int,
) -> MonitorData:
    """Read the slices and the decoder of the monitoring rounds. ``stride`` is the encoder's."""
    held_out = load_held_out(store, split.val, config=config.data, model=config.model, preset=preset)
    probe = load_probe(probe_store, config, preset=preset)
    box_check, note = load_box_prompt_check(probe, config.probe, config.model, stride=stride)
    return MonitorData(held_out=held_out, probe=probe, box_check=box_check, box_check_note=note)


@dataclass(kw_only=True)
class Monitor:
    """Periodic monitoring tasks of a run, and the warnings that were printed already."""

    data: MonitorData
    config: PretrainConfig
    run_path: Path
    _active_rules: set[str] = field(default_factory=set)
    """Names of the rules that warned in the newest round."""
    _values: dict[str, float] = field(default_factory=dict)
    """Values of this step's tasks so far. The metrics log receives them only after the last task."""

    def tasks(self) -> list[PeriodicTask]:
        """Return the periodic tasks for the trainer."""
        watch, probe = self.config.watch.every_n_steps, self.config.probe.every_n_steps
        tasks = []
        if self.data.held_out is not None:
            tasks.append(
                PeriodicTask(name="held-out slices", every_steps=watch, run=self._measure_held_out, at_start=True)
            )
        if self.data.probe is not None:
            tasks.append(PeriodicTask(name="probe", every_steps=probe, run=self._measure_probe, at_start=True))
        return tasks

    def _measure_held_out(self, context: TaskContext) -> Mapping[str, float]:
        held_out, config = self.data.held_out, self.config.watch
        assert held_out is not None
        objective, device = cast(Objective, context.module.objective), context.module.device
        batch_size = self.config.data.batch_size
        numbers = held_out_loss(objective, held_out, batch_size=batch_size, step=context.step, device=device)
        if config.log_images:
            context.check_stop()
            # On every process, because with sharded weights all of them take part in each forward pass.
            panel = held_out_panel(objective, held_out, num_rows=config.num_panel_rows, device=device)
            if context.rank == 0:
                self._write_panel(panel, context)
        values = self._values = {f"held_out/{name}": value for name, value in numbers.items()}
        # Where the probe runs at the same step, it is the last task and checks the rules with both sets of values.
        probe = next((task for task in self.tasks() if task.name == "probe"), None)
        if probe is None or not probe.is_due(context.step, max_steps=self.config.trainer.max_steps):
            self._print_warnings(context)
        return values

    def _write_panel(self, panel: Panel, context: TaskContext) -> None:
        picture_HW = panel_picture(panel)
        context.add_image(f"held_out/{', '.join(panel.columns)}", picture_HW)
        path = panel_path(self.run_path, context.step)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture_HW).save(path)

    def _measure_probe(self, context: TaskContext) -> Mapping[str, float]:
        started = time.monotonic()
        encoder = cast(Objective, context.module.objective).exported_encoder
        values = check_encoder(
            encoder, self.data, self.config, device=context.module.device, check_stop=context.check_stop
        )
        values["perf/probe_s"] = time.monotonic() - started
        self._values = {**self._values, **values}
        self._print_warnings(context)
        return values

    def _print_warnings(self, context: TaskContext) -> None:
        """Print each warning of the newest values once while its condition lasts.

        After the last step nothing is printed, because the report then prints the warnings of the whole run.
        """
        newest, self._values = self._values, {}
        if context.rank != 0 or context.step == self.config.trainer.max_steps:
            return
        curves = context.log.curves()
        add_to_curves(curves, [newest])
        found = health_warnings(curves, is_final=False)
        for warning in found:
            if warning.rule not in self._active_rules:
                log.warning("step %d: %s", context.step, warning.text)
        self._active_rules = {warning.rule for warning in found}


def check_encoder(
    encoder: ImageEncoder,
    data: MonitorData,
    config: PretrainConfig,
    *,
    device: torch.device,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return linear probe and box-prompt check of an encoder, by their names in the metrics.

    Args:
        encoder: Encoder in evaluation mode, which is not changed.
        data: Labelled slices, which must be there, and the decoder of the box-prompt check.
        config: Settings of the run.
        device: Device of the encoder.
        check_stop: Function that is called between the parts and may raise.
    """
    box_check = data.box_check
    assert data.probe is not None
    if box_check is not None:
        box_check.start_round()
    dice = probe_dice(
        encoder,
        data.probe,
        ridge=config.probe.ridge,
        batch_size=config.data.batch_size,
        device=device,
        on_features=None if box_check is None else lambda first, features: box_check.add(encoder, first, features),
        check_stop=check_stop,
    )
    boxes = {} if box_check is None else {"drift/box_dice": box_check.mean_dice()}
    return {"probe/dice": dice, **boxes}


def panel_path(run_path: Path, step: int) -> Path:
    """Return the path of the pictures of a step."""
    return run_path / PANELS_FOLDER / f"step-{step:06d}.png"
