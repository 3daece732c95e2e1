"""Measured cost of a self-training before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from samgraft.finetune.inference import InferenceConfig, segment_probabilities
from samgraft.finetune.model_folder import FinishedModel
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.selftraining.parts import Part, Round, Teacher
from samgraft.finetune.training.preparation import Prepared
from samgraft.finetune.training.train import measure_cost
from samgraft.finetune.training.unlabelled import UnlabelledScans
from samgraft.shared.machine import format_duration
from samgraft.shared.training.device import DeviceChoice, release_memory

NUM_MEASURED_SLICES = 4


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Cost of one fine-tuning and of its use as a teacher."""

    name: str
    num_steps: int
    step_s: float
    """Seconds per optimizer step, without data loading and validation."""
    slice_s: float
    """Seconds to label one slice."""
    thread_advice: str | None = None
    """What to do if one thread is faster than several."""


def measure_part(part: Part, prepared: Prepared, scans: UnlabelledScans, device: DeviceChoice) -> PartCost:
    """Measure a training step and the labelling of some slices."""
    step = measure_cost(prepared, part.config, device)
    slice_s = _measure_slice(prepared.segmenter, prepared.inference, scans, device)
    return PartCost(
        name=part.name,
        num_steps=part.config.trainer.max_steps,
        step_s=step.seconds,
        slice_s=slice_s,
        thread_advice=step.thread_advice(),
    )


def measure_teacher(teacher: Teacher, model: FinishedModel, scans: UnlabelledScans, device: DeviceChoice) -> PartCost:
    """Measure the labelling of some slices by a finished model, which costs no step."""
    model.segmenter.to(device.torch_device)
    slice_s = _measure_slice(model.segmenter, model.task.inference(), scans, device)
    return PartCost(name=teacher.name, num_steps=0, step_s=0.0, slice_s=slice_s)


def _measure_slice(
    segmenter: Segmenter, inference: InferenceConfig, scans: UnlabelledScans, device: DeviceChoice
) -> float:
    record = scans.images.record(scans.series[0])
    volume_ZHW = scans.images.read_volume(record.series_id)
    # A few slices suffice, and a 3D network labels the whole scan in any case.
    only = range(min(NUM_MEASURED_SLICES, len(volume_ZHW)))
    begin = time.perf_counter()
    found = segment_probabilities(segmenter, volume_ZHW, record.stats, inference, only=only)
    # A model of several planes segments about as many slices in each of them.
    seconds = (time.perf_counter() - begin) / int(found.shape[1]) * max(1, len(inference.planes))
    # The models are measured one after the other and must not share the memory of a GPU.
    segmenter.cpu()
    release_memory(device)
    return seconds


def describe_costs(costs: Sequence[PartCost], rounds: Sequence[Round], *, num_slices: int, passes: int) -> list[str]:
    """Return the pre-flight lines on the time of every part and of all of them.

    Args:
        costs: The student, then the teachers.
        rounds: Rounds of the self-training.
        num_slices: Number of slices to label in every round.
        passes: Largest number of flips of a slice.
    """
    by_name = {cost.name: cost for cost in costs}
    student = costs[0]
    lines, total = [], 0.0
    for one in rounds:
        new = [by_name[teacher.name] for teacher in one.trained_teachers if one.number == 1]
        for name, cost in [*((cost.name, cost) for cost in new), (one.student.name, student)]:
            seconds = cost.num_steps * cost.step_s
            total += seconds
            lines.append(
                f"{name}: {cost.num_steps} steps of {cost.step_s:.2f} s, about {format_duration(seconds)} without "
                "validation"
            )
        seconds = num_slices * passes * sum(by_name.get(teacher.name, student).slice_s for teacher in one.teachers)
        total += seconds
        lines.append(f"labels of round {one.number}: {num_slices} slices, about {format_duration(seconds)}")
    # The advice is the same for all parts.
    advice = [cost.thread_advice for cost in costs if cost.thread_advice][:1]
    return [*lines, *advice, f"self-training: about {format_duration(total)} together, without validation"]
