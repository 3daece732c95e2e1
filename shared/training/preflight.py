"""Pre-flight of both stages with the time, memory and disk that a run will need."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from samgraft.shared.errors import StorageError
from samgraft.shared.machine import THREADS, format_duration, granted_memory
from samgraft.shared.runs.training_state import find_leftovers, finished_states
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.device import DeviceChoice, use_channels_last
from samgraft.shared.training.failures import explain_out_of_memory
from samgraft.shared.training.resume import preserve_rng
from torch import Tensor, nn

log = logging.getLogger(__name__)

MEASURE_S = 8.0
"""Seconds after which no further micro-step is measured, even if only the warm-up was."""
MAX_MEASURED_STEPS = 5
MAX_SHARE_OF_ONE_THREAD = 0.8
"""Share of the time with several threads below which one thread is recommended."""
LOGS_BYTES = 2**26
"""Allowance for metrics, events, images and the report."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Measured cost of one optimizer step, without data loading and the update itself."""

    seconds: float
    """Median micro-step times the number of micro-steps."""
    num_measured: int
    """Number of measured micro-steps, after one as warm-up. A slow warm-up is the only measured one."""
    saved_bytes: int
    """Memory of the activations that the forward pass keeps for the backward pass."""
    one_thread_s: float | None = None
    """Seconds of one optimizer step with one thread, None if that is not faster or was not measured."""

    def thread_advice(self) -> str | None:
        """Return what to do if one thread is faster than several, and None otherwise."""
        if self.one_thread_s is None:
            return None
        return (
            f"with 1 thread instead of {torch.get_num_threads()} a step takes {self.one_thread_s:.2f} s instead of "
            f"{self.seconds:.2f} s, because other programs use the cores or the slices are small. Start again with "
            f"{THREADS}=1 in front of the command"
        )


def measure_step(
    module: nn.Module,
    compute_loss: Callable[[], Tensor],
    *,
    config: TrainerConfig,
    device: DeviceChoice,
    batch_size: int,
) -> StepCost:
    """Time forward and backward passes on real slices.

    Weights, buffers, gradients and random generators are the same afterwards.

    Args:
        module: Everything that trains. It is moved to the device.
        compute_loss: Function that computes the loss of one micro-step.
        config: Settings of the training loop.
        device: Device and precision.
        batch_size: Slices per micro-step, for the error message.

    Raises:
        UsageError: If a step does not fit in memory.
    """
    target = device.torch_device
    module.to(target)
    if config.channels_last:
        use_channels_last(module)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    saved = SavedBytes(module)
    times: list[float] = []
    # Printed before the first step, because one step of large slices can take minutes on a CPU.
    log.info("measuring a training step of %d slices ...", batch_size)
    started = time.perf_counter()
    with preserve_rng():
        try:
            # The first micro-step also allocates memory, which is a small part of a slow one. It is counted only then.
            while len(times) < 1 + MAX_MEASURED_STEPS and (not times or time.perf_counter() - started < MEASURE_S):
                counting = contextlib.nullcontext() if times else saved.count()
                times.append(_time_micro_step(module, compute_loss, counting, device))
            one_thread_s = _time_one_thread(module, compute_loss, device, several_s=median(times[1:] or times))
        except torch.OutOfMemoryError as error:
            raise explain_out_of_memory(batch_size=batch_size, accumulate=config.accumulate) from error
    # The trial steps have moved batch norm's statistics and, in some objectives, centers and counters.
    for buffer, before in buffers:
        buffer.copy_(before)
    measured = times[1:] or times
    return StepCost(
        seconds=config.accumulate * median(measured),
        num_measured=len(measured),
        saved_bytes=saved.total,
        one_thread_s=None if one_thread_s is None else config.accumulate * one_thread_s,
    )


def _time_one_thread(
    module: nn.Module, compute_loss: Callable[[], Tensor], device: DeviceChoice, *, several_s: float
) -> float | None:
    """Return the seconds of a micro-step with one thread if it is clearly faster than with several.

    With other programs on the same cores, each operation waits for the thread whose core is taken.
    """
    num_threads = torch.get_num_threads()
    # One thread takes at most as many times as long as there are threads.
    if device.torch_device.type != "cpu" or num_threads == 1 or several_s * num_threads > MEASURE_S:
        return None
    torch.set_num_threads(1)
    try:
        steps = [_time_micro_step(module, compute_loss, contextlib.nullcontext(), device) for _ in range(2)]
    finally:
        torch.set_num_threads(num_threads)
    return min(steps) if min(steps) < MAX_SHARE_OF_ONE_THREAD * several_s else None


def _time_micro_step(
    module: nn.Module,
    compute_loss: Callable[[], Tensor],
    counting: contextlib.AbstractContextManager[None],
    device: DeviceChoice,
) -> float:
    kind = device.torch_device.type
    begin = time.perf_counter()
    with counting, torch.autocast(kind, dtype=torch.bfloat16, enabled=device.precision == "bf16-mixed"):
        loss = compute_loss()
    loss.backward()
    # CUDA runs asynchronously, so the clock must wait for it.
    if kind == "cuda":
        torch.cuda.synchronize(device.torch_device)
    seconds = time.perf_counter() - begin
    module.zero_grad(set_to_none=True)
    return seconds


def describe_cost(
    module: nn.Module,
    cost: StepCost,
    *,
    config: TrainerConfig,
    device: DeviceChoice,
    batch_size: int,
    run_path: Path,
    evaluation_s: float | None = None,
    has_average: bool = False,
) -> dict[str, str]:
    """Return the pre-flight lines on time, memory, disk and the run.

    Args:
        module: Everything that trains.
        cost: From ``measure_step``.
        config: Settings of the training loop.
        device: Device and precision.
        batch_size: Slices per process and micro-step.
        run_path: Folder of the run.
        evaluation_s: Expected seconds of all evaluation rounds, or None if unknown.
        has_average: True if the run averages its weights.

    Raises:
        StorageError: If the training states do not fit on the disk.
    """
    seconds = config.max_steps * cost.seconds + (evaluation_s or 0.0)
    included = "without validation" if evaluation_s is None else "with evaluation rounds"
    advice = cost.thread_advice()
    return {
        "time": f"{cost.seconds:.2f} s per step of {batch_size * config.accumulate} slices "
        f"(median of {cost.num_measured}); {config.max_steps} steps take about {format_duration(seconds)} {included}",
        **({"threads": advice} if advice else {}),
        "memory": check_memory(
            module, cost, device=device.torch_device, batch_size=batch_size, has_average=has_average
        ),
        "disk": check_disk(module, config, run_path, has_average=has_average),
        "run": describe_run(run_path, max_steps=config.max_steps),
        "monitor": f"tensorboard --logdir {run_path}/tb --host localhost",
        "stop": "Ctrl-C saves and ends; the same command resumes",
    }


def log_preflight(lines: Mapping[str, str]) -> None:
    """Log the pre-flight as a table of names and texts."""
    for name, text in lines.items():
        log.info("  %-10s %s", name, text)


def describe_run(run_path: Path, *, max_steps: int) -> str:
    """Return a description of a new run, or of the step at which an interrupted run resumes."""
    checkpoints = run_path / "checkpoints"
    states = finished_states(checkpoints) if checkpoints.is_dir() else []
    if not states:
        return f"new run {run_path}"
    return f"{run_path}, resuming step {int(states[-1].name.removeprefix('step-'))} of {max_steps}"


class SavedBytes:
    """Counter of the memory that the forward pass keeps for the backward pass, without the weights."""

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count inside the block. A storage that several tensors share is counted once."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        # Views such as transposed weights share the storage of a parameter and need no memory of their own.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def training_bytes(module: nn.Module, saved_bytes: int, *, has_average: bool = False) -> int:
    """Return the memory of weights, their average, buffers, gradients, AdamW's two moments and activations."""
    # Gradients and the two moments of AdamW have the size of the parameters that train. So has the average, and a copy
    # of the weights while it replaces them.
    held = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return held + (3 + 2 * has_average) * trained + saved_bytes


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of the device, or None if the system does not report it."""
    if device.type == "cuda":
        # Memory that torch's allocator holds in reserve is available to the run.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith("MemAvailable:")]
    granted = granted_memory()
    left = [int(words[1]) * 1024 for words in found] + ([granted[1]] if granted else [])
    return min(left, default=None)


def check_memory(
    module: nn.Module, cost: StepCost, *, device: torch.device, batch_size: int, has_average: bool = False
) -> str:
    """Return the needed and the free memory, and warn if the run does not fit."""
    needed = training_bytes(module, cost.saved_bytes, has_average=has_average)
    line, fits = describe_memory(needed, free_bytes(device), batch_size=batch_size)
    if not fits:
        log.warning(
            "memory is short: %s. Use a smaller data.batch_size with trainer.accumulate for the same global batch.",
            line,
        )
    return line


def describe_memory(needed: int, free: int | None, *, batch_size: int) -> tuple[str, bool]:
    """Return the pre-flight line, and False if the memory will not suffice.

    A tenth is added to ``needed`` for the temporary buffers of single operations.
    """
    line = f"about {needed / GIB:.1f} GiB for weights, gradients, AdamW and the activations of {batch_size} slices"
    if free is None:
        return line, True
    return f"{line}; {free / GIB:.1f} GiB free", 1.1 * needed < free


def state_bytes(module: nn.Module, *, has_average: bool = False) -> int:
    """Return the size of one training state with weights, their average, buffers and AdamW's two moments."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    trainable = size(p for p in module.parameters() if p.requires_grad)
    return size(module.parameters()) + size(module.buffers()) + (2 + has_average) * trainable


def check_disk(module: nn.Module, config: TrainerConfig, run_path: Path, *, has_average: bool = False) -> str:
    """Compare the disk space that the run still needs with what is free.

    Args:
        module: The trained module, or any module with all its parameters.
        config: Length of the run and rules for keeping states.
        run_path: Folder of the run. What earlier sessions wrote there is not counted again.
        has_average: True if the run averages its weights.

    Returns:
        The needed and the free space, for the pre-flight.

    Raises:
        StorageError: If the disk is too small.
    """
    checkpoints = run_path / "checkpoints"
    states = finished_states(checkpoints) if checkpoints.is_dir() else []
    if states and not config.resume_from and _is_done(states[-1], config.max_steps):
        return f"nothing more to train after {states[-1].name}"
    one = state_bytes(module, has_average=has_average)
    need = _remaining_bytes(one, config, run_path, states)
    place = next(p for p in (run_path, *run_path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    more = "more " if states else ""
    if need > free:
        raise StorageError(
            f"the run needs {need / 1e9:.2f} GB {more}for its training states ({one / 1e9:.2f} GB "
            f"each), but only {free / 1e9:.2f} GB are free.",
            where=run_path.name,
            kept=f"the training states up to {states[-1].name}" if states else "nothing was written yet",
            next_command="free space" + (", or unset trainer.keep_every_steps" if config.keep_every_steps else ""),
        )
    return f"up to {need / 1e9:.2f} GB {more}for training states, {free / 1e9:.1f} GB free"


def _remaining_bytes(one: int, config: TrainerConfig, run_path: Path, states: Sequence[Path]) -> int:
    # States at multiples of keep_every_steps are kept in addition to the newest ones.
    milestones = config.max_steps // config.keep_every_steps if config.keep_every_steps else 0
    kept = one * (config.keep_last + milestones)
    # One state is being written while the older ones still exist, and the encoder weights are exported at the end.
    temporary = 2 * one
    logs = _size_of([run_path / "metrics.jsonl", run_path / "tb"])
    # Drafts of interrupted saves are deleted when the run is resumed from a state.
    freed = _size_of(find_leftovers(run_path / "checkpoints")) if states else 0
    return max(0, max(0, kept - _size_of(states)) + temporary + max(0, LOGS_BYTES - logs) - freed)


def _size_of(places: Iterable[Path]) -> int:
    files = (file for place in places for file in (place.rglob("*") if place.is_dir() else [place]))
    return sum(file.stat().st_size for file in files if file.is_file())


def _is_done(newest: Path, max_steps: int) -> bool:
    if int(newest.name.removeprefix("step-")) >= max_steps:
        return True
    try:
        return json.loads((newest / "state.json").read_bytes()).get("ended") is not None
    except (OSError, ValueError, AttributeError):
        return False  # A damaged state is set aside when the run starts, and training resumes from an older one.
