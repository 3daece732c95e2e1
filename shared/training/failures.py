"""Failures of the machine in words: memory, loader workers, shared memory."""

from __future__ import annotations

import re
import traceback
from multiprocessing import resource_sharer

import torch
from samgraft.shared.errors import SamgraftError

WORKER_DIED = re.compile(r"DataLoader worker \(pid.*\) (?:is killed by signal: (?P<signal>\w+)|exited unexpectedly)")


def first_failure(error: Exception) -> Exception:
    """Return what went wrong first: Lightning clears away a loader that never started, fails, and hides why."""
    frames = traceback.walk_tb(error.__traceback__)
    if isinstance(error.__context__, Exception) and any(f.f_code.co_name == "_teardown" for f, _ in frames):
        return first_failure(error.__context__)
    return error


def explain_failure(error: Exception, *, batch_size: int, accumulate: int, num_workers: int, kept: str) -> Exception:
    """Return the error to raise for a failed training: a refusal in words where the cause is known, else itself."""
    text = str(error)
    if isinstance(error, SamgraftError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return explain_out_of_memory(batch_size=batch_size, accumulate=accumulate, kept=kept)
    if "bus error" in text.lower() or "shared memory" in text.lower() or "/dev/shm" in text:
        return SamgraftError(
            "shared memory is full: the loader workers pass their batches through /dev/shm.",
            kept=kept,
            next_command="the same with trainer.num_workers=0, or mount a larger /dev/shm",
        )
    died = WORKER_DIED.search(text)
    if died or _broke_while_handing_over(error):
        signal = f"signal {died['signal']}" if died and died["signal"] else "unexpectedly"
        return SamgraftError(
            f"a data worker died ({signal}, likely out of memory).",
            kept=kept,
            next_command=f"the same with trainer.num_workers={num_workers // 2}",
        )
    if "DataLoader timed out" in text:
        return SamgraftError(
            f"no data worker delivered a batch in time: {text.splitlines()[0]}",
            kept=kept,
            next_command="the same with trainer.num_workers=0 shows where it hangs",
        )
    return error


def explain_out_of_memory(
    *, batch_size: int, accumulate: int, kept: str = "nothing was written: it was the pre-flight's trial step"
) -> SamgraftError:
    """Return the refusal for a step that does not fit in memory."""
    return SamgraftError(
        f"out of memory with batch_size {batch_size} and trainer.accumulate {accumulate}.",
        kept=kept,
        next_command=_smaller_batch(batch_size, accumulate),
    )


def _broke_while_handing_over(error: Exception) -> bool:
    """Tell whether a worker died between announcing a batch and giving its memory: its socket is all that is heard."""
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, OSError | EOFError) and any(
        frame.f_globals.get("__name__") == resource_sharer.__name__ for frame, _ in frames
    )


def _smaller_batch(batch_size: int, accumulate: int) -> str:
    if batch_size > 1:
        same = f"a batch of {batch_size // 2} with trainer.accumulate={2 * accumulate}"
        return f"{same}: the same global batch; or trainer.activation_checkpointing=true; under another NAME="
    return "trainer.activation_checkpointing=true, or a smaller image_size, under another NAME="
