"""Description of a weights file, and extraction of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.files import write_tensors
from samgraft.shared.weights.checks import count_mask_outputs
from samgraft.shared.weights.families import EXTRA_TENSORS, describe_family, find_family
from samgraft.shared.weights.formats import PARTS
from samgraft.shared.weights.load import WeightsFile, card_of, read_weights
from samgraft.shared.weights.safe_read import read_tensors_only


def describe(path: Path) -> dict[str, Any]:
    """Return format, architecture, size and provenance of a file, and its tensors compared with a whole SAM.

    Raises:
        WeightsError: If the file contains no weights, or is damaged or unsafe.
    """
    weights = read_weights(path)
    card, parts = card_of(weights), _count_parts(weights)
    # The encoder of such a file may be usable, so that it is described and not refused.
    family = find_family([name for part in parts.values() for name in part["unexpected"]], EXTRA_TENSORS)
    return {
        "file": weights.name,
        "format": weights.format,
        "architecture": weights.spec.title,
        "arch": weights.spec.arch,
        "stem": weights.spec.variant,
        "image_size": weights.image_size,
        "stage": card.stage if weights.card else None,
        "objective": card.objective,
        "steps": card.steps,
        "slices_seen": card.slices_seen,
        "epochs": None if card.epochs is None else round(card.epochs, 3),
        "intensity": card.intensity,
        "base": card.base_name if weights.card else None,
        "license": card.license,
        "parts": parts,
        "sha256": weights.sha256,
        "notes": [*weights.notes, *([describe_family(family)] if family else [])],
    }


def extract_tensors(path: Path, out: Path) -> int:
    """Write the tensors of a file as safetensors, without foreign objects, and return their number.

    Nested names are joined by dots.
    """
    tensors = read_tensors_only(path)
    write_tensors(out, tensors)
    return len(tensors)


def _count_parts(weights: WeightsFile) -> dict[str, dict[str, Any]]:
    outputs = count_mask_outputs(weights.tensors, name=weights.name)
    with torch.device("meta"):
        sam = build_sam(weights.spec, image_size=weights.image_size, num_multimask_outputs=outputs)
    expected = {k: v.shape for k, v in sam.state_dict().items()}
    counts: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        wanted = {k for k in expected if k.startswith(f"{part}.")}
        found = {k for k in weights.tensors if k.startswith(f"{part}.")}
        counts[part] = {
            "matched": sum(weights.tensors[k].shape == expected[k] for k in wanted & found),
            "expected": len(wanted),
            "missing": sorted(wanted - found),
            "unexpected": sorted(found - wanted),
        }
    return counts
