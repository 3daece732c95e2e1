"""Presets of stage 2, their files in configs/finetune, and the choice for this machine."""

from __future__ import annotations

import logging

import torch
from samgraft.shared.training.device import choose_device

log = logging.getLogger(__name__)

MEMORY_PRESETS = ((22, "gpu_24gb"), (11, "gpu_12gb"), (0, "gpu_8gb"))
"""Smallest GPU memory in GiB and name of each preset. A card of 24 GB reports 22 to 24 GiB."""


def preset_layers(name: str) -> list[str]:
    """Return the files of a preset, of which later ones have priority. ``auto`` chooses by device and memory."""
    chosen = auto_preset() if name == "auto" else name
    # GPU presets differ from the default in memory only, so they are layers on top of it.
    return ["default", chosen] if chosen.startswith("gpu_") else [chosen]


def auto_preset() -> str:
    """Return the preset for this machine and log the reason."""
    if choose_device().accelerator != "cuda":
        return "cpu"
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    preset = preset_for_memory(memory_gib)
    log.info("preset %s: the GPU has %.1f GiB (set PRESET= for another)", preset, memory_gib)
    return preset


def preset_for_memory(memory_gib: float) -> str:
    """Return the largest preset that fits into a GPU's memory."""
    return next(name for least, name in MEMORY_PRESETS if memory_gib >= least)
