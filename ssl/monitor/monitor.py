"""What a run shows of itself while it learns: held-out loss, health, pictures, probe, drift, and warnings in words."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from PIL import Image
from samgraft.shared.samples.split import Split
from samgraft.shared.scans.preset import ModalityPreset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.periodic import PeriodicTask, TaskContext
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.monitor.box_prompt_check import DriftGauge, load_gauge
from samgraft.ssl.monitor.health import Worry, worries
from samgraft.ssl.monitor.held_out import HeldOut, held_out_loss, held_out_panel, load_held_out, panel_picture
from samgraft.ssl.monitor.labelled import ProbeData, load_probe
from samgraft.ssl.monitor.linear_probe import probe_dice
from samgraft.ssl.objectives import Objective, Panel

log = logging.getLogger(__name__)

PANELS_FOLDER = "panels"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a run is looked at with; None where there is nothing of a kind."""

    held_out: HeldOut | None
    probe: ProbeData | None
    gauge: DriftGauge | None
    gauge_note: str
    """What the drift gauge works on, or why it is off."""


def load_watched(
    config: PretrainConfig,
    store: SliceStore,
    split: Split,
    probe_store: tuple[SliceStore, Split] | None,
    *,
    preset: ModalityPreset,
    stride: int,
) -> Watched:
    """Read the slices and the decoder that a run is looked at with; ``stride`` is the encoder's."""
    held_out = load_held_out(store, split.val, config=config.data, model=config.model, preset=preset)
    probe = load_probe(probe_store, config, preset=preset)
    gauge, note = load_gauge(probe, config.probe, config.model, stride=stride)
    return Watched(held_out=held_out, probe=probe, gauge=gauge, gauge_note=note)


@dataclass(kw_only=True)
class Watch:
    """The periodic looks of a run, and which rules have spoken already."""

    watched: Watched
    config: PretrainConfig
    run_path: Path
    _firing: set[str] = field(default_factory=set)
    _values: dict[str, float] = field(default_factory=dict)
    """Of the newest looks, for the rules: the log gets them when all looks of a step are done."""

    def tasks(self) -> list[PeriodicTask]:
        """Return the periodic tasks for the trainer."""
        watch, probe = self.config.watch.every_n_steps, self.config.probe.every_n_steps
        tasks = []
        if self.watched.held_out is not None:
            tasks.append(PeriodicTask(name="held-out slices", every_steps=watch, run=self._look, at_start=True))
        if self.watched.probe is not None:
            tasks.append(PeriodicTask(name="probe", every_steps=probe, run=self._probe, at_start=True))
        return tasks

    def _look(self, boundary: TaskContext) -> Mapping[str, float]:
        held_out, config = self.watched.held_out, self.config.watch
        assert held_out is not None
        objective, device = cast(Objective, boundary.module.objective), boundary.module.device
        batch_size = self.config.data.batch_size
        numbers = held_out_loss(objective, held_out, batch_size=batch_size, step=boundary.step, device=device)
        if config.log_images:
            boundary.check_stop()
            # On every process: with sharded weights all take part in each forward pass.
            panel = held_out_panel(objective, held_out, num_rows=config.num_panel_rows, device=device)
            if boundary.rank == 0:
                self._write_panel(panel, boundary)
        values = self._values = {f"held_out/{name}": value for name, value in numbers.items()}
        probe = next((task for task in self.tasks() if task.name == "probe"), None)
        if probe is None or not probe.is_due(boundary.step, max_steps=self.config.trainer.max_steps):
            self._warn(boundary)
        return values

    def _write_panel(self, panel: Panel, boundary: TaskContext) -> None:
        picture_HW = panel_picture(panel)
        boundary.add_image(f"held_out/{', '.join(panel.columns)}", picture_HW)
        path = panel_path(self.run_path, boundary.step)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture_HW).save(path)

    def _probe(self, boundary: TaskContext) -> Mapping[str, float]:
        data, gauge = self.watched.probe, self.watched.gauge
        assert data is not None
        started = time.monotonic()
        encoder = cast(Objective, boundary.module.objective).exported_encoder
        if gauge is not None:
            gauge.start_look()
        dice = probe_dice(
            encoder,
            data,
            ridge=self.config.probe.ridge,
            batch_size=self.config.data.batch_size,
            device=boundary.module.device,
            look=None if gauge is None else lambda first, features: gauge.add(encoder, first, features),
            check_stop=boundary.check_stop,
        )
        values = {"probe/dice": dice}
        if gauge is not None:
            values["drift/box_dice"] = gauge.result()
        values["perf/probe_s"] = time.monotonic() - started
        self._values = {**self._values, **values}
        self._warn(boundary)
        return values

    def _warn(self, boundary: TaskContext) -> None:
        """Print what the newest values give reason to worry about, once as long as it lasts.

        Not after the last step: the report's verdict, which is printed next, says it of the whole run.
        """
        newest, self._values = self._values, {}
        if boundary.rank != 0 or boundary.step == self.config.trainer.max_steps:
            return
        lines = [*boundary.log.lines(), {"step": boundary.step, **newest}]
        found = find_worries(lines, is_final=False)
        for worry in found:
            if worry.rule not in self._firing:
                log.warning("step %d: %s", boundary.step, worry.text)
        self._firing = {worry.rule for worry in found}


def find_worries(lines: Iterable[Mapping[str, Any]], *, is_final: bool) -> list[Worry]:
    """Apply the rules of :mod:`samgraft.ssl.monitor.health` to metrics, a line per step."""
    return worries(curves_of(lines), is_final=is_final)


def curves_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the values of every metric, in the order of the steps."""
    curves: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                curves.setdefault(name, []).append(float(value))
    return curves


def panel_path(run_path: Path, step: int) -> Path:
    """Return where the pictures of a step lie."""
    return run_path / PANELS_FOLDER / f"step-{step:06d}.png"
