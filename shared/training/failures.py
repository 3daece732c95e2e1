"""Explanations of failures that the machine causes, such as lack of memory and dead loader workers."""

from __future__ import annotations

import re
import traceback
from multiprocessing import resource_sharer

import torch
from samgraft.shared.errors import SamgraftError, UsageError

WORKER_DIED = re.compile(r"DataLoader worker \(pid.*\) (?:is killed by signal: (?P<signal>\w+)|exited unexpectedly)")


def find_first_failure(error: Exception) -> Exception:
    """Return the failure that caused an error of Lightning's teardown."""
    # When a loader never started, Lightning's teardown fails on it and hides the original error in the context.
    frames = traceback.walk_tb(error.__traceback__)
    if isinstance(error.__context__, Exception) and any(f.f_code.co_name == "_teardown" for f, _ in frames):
        return find_first_failure(error.__context__)
    return error


def explain_failure(error: Exception, *, batch_size: int, accumulate: int, num_workers: int, kept: str) -> Exception:
    """Return an explained error for a failed training, or the error itself if its cause is unknown."""
    text = str(error)
    if isinstance(error, SamgraftError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return explain_out_of_memory(batch_size=batch_size, accumulate=accumulate, kept=kept)
    where = "trainer.num_workers"
    if "bus error" in text.lower() or "shared memory" in text.lower() or "/dev/shm" in text:
        return UsageError(
            "shared memory is full. The loader workers pass their batches through /dev/shm.",
            where=where,
            kept=kept,
            next_command="the same with trainer.num_workers=0, or mount a larger /dev/shm",
        )
    died = WORKER_DIED.search(text)
    if died or _failed_to_share_memory(error):
        signal = f"signal {died['signal']}" if died and died["signal"] else "unexpectedly"
        return UsageError(
            f"a data worker died ({signal}, probably because memory ran out).",
            where=where,
            kept=kept,
            next_command=f"the same with trainer.num_workers={num_workers // 2}",
        )
    if "DataLoader timed out" in text:
        return UsageError(
            f"no data worker delivered a batch in time: {text.splitlines()[0]}",
            where=where,
            kept=kept,
            next_command="the same with trainer.num_workers=0, to see where it hangs",
        )
    return error


def explain_out_of_memory(
    *, batch_size: int, accumulate: int, kept: str = "nothing was written: it was the pre-flight's trial step"
) -> UsageError:
    """Return the error for a step that does not fit in memory."""
    if batch_size > 1:
        next_command = (
            f"a batch of {batch_size // 2} with trainer.accumulate={2 * accumulate} for the same global batch; "
            "or trainer.activation_checkpointing=true; under another NAME="
        )
    else:
        next_command = "trainer.activation_checkpointing=true, or a smaller image_size, under another NAME="
    return UsageError(
        f"out of memory with batch_size {batch_size} and trainer.accumulate {accumulate}.",
        kept=kept,
        next_command=next_command,
    )


def _failed_to_share_memory(error: Exception) -> bool:
    """Return True if a worker died between announcing a batch and passing its memory on."""
    # Such a death appears only as an error of the socket that multiprocessing shares the memory through.
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, OSError | EOFError) and any(
        frame.f_globals.get("__name__") == resource_sharer.__name__ for frame, _ in frames
    )
