"""Checks of converted tensors before a model is built from their shapes.

Shape letters: g = tokens along a side; C = channels; L = 2 g - 1 relative distances; D = channels per head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.encoders.registry import image_size_from_tensors, spec_from_tensors
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.errors import SamgraftError, WeightsError

_COUNTERS = "num_batches_tracked"
"""Ending of the only integer tensors of a SAM, the step counters of batch norm."""
_MAX_SIDE = 8192
"""Largest image side in pixels that a position table is accepted for."""


def to_float32(tensors: Mapping[str, torch.Tensor], notes: list[str], *, name: str) -> dict[str, torch.Tensor]:
    """Convert floating-point tensors to float32, with a note per converted type and per constant tensor.

    Raises:
        WeightsError: If a tensor is of an integer or complex type, or is not finite.
    """
    out: dict[str, torch.Tensor] = {}
    converted: dict[str, int] = {}
    for key, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if key.endswith(_COUNTERS):
            out[key] = tensor
            continue
        if tensor.is_meta:
            raise WeightsError(
                f"{key} has a shape and no values. Save the model after its weights are loaded.", where=name
            )
        if not tensor.is_floating_point():
            raise WeightsError(
                f"{key} is of type {kind}, expected a floating-point type. Quantized weights must be converted back to "
                "float32 by the program that made them.",
                where=name,
            )
        if tensor.dtype != torch.float32:
            converted[kind] = converted.get(kind, 0) + 1
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"{key} contains NaN or Inf, expected finite weights. The training run diverged: use an earlier state.",
                where=name,
            )
        # Relative positions are zero in a SAM before training. Any other constant matrix was never trained.
        if tensor.ndim > 1 and tensor.numel() > 1 and "rel_pos" not in key:
            first = tensor.flatten()[0]
            if bool((tensor == first).all()):
                notes.append(f"warning: {key} is constant ({float(first):g})")
        out[key] = tensor
    notes += [f"{count} tensors converted from {kind} to float32" for kind, count in converted.items()]
    return out


def recognise_encoder(tensors: Mapping[str, torch.Tensor], *, name: str) -> tuple[EncoderSpec, int]:
    """Return the shape of the image encoder and the image side in pixels that its tensors were made for.

    Raises:
        WeightsError: If tensors are missing or contradict each other, or the last blocks are missing.
    """
    # The shape of the encoder is read from a few tensors, so these must be right before anything is built from them.
    _check_tables(tensors, name=name)
    try:
        spec = spec_from_tensors(tensors)
        image_size = image_size_from_tensors(tensors, spec)
        # A build without memory finds impossible numbers, such as heads that do not divide the channels.
        with torch.device("meta"):
            if any(key.startswith("mask_decoder.") for key in tensors):
                build_sam(spec, image_size=image_size)
            else:
                spec.build(image_size=image_size)
    except WeightsError as err:
        raise WeightsError(err.what, where=name) from err
    except (SamgraftError, ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError, StopIteration) as err:
        raise WeightsError(
            f"the shapes of the encoder's tensors contradict each other ({type(err).__name__}). Is the file complete?",
            where=name,
        ) from err
    if (problem := spec.find_missing_end()) is not None:
        raise WeightsError(f"the image encoder ends early ({problem}). Save all of its tensors.", where=name)
    return spec, image_size


def count_mask_outputs(tensors: Mapping[str, torch.Tensor], *, name: str) -> int:
    """Return the number of masks of a multimask output, which is 3 in every published SAM.

    Raises:
        WeightsError: If the table of mask tokens has an impossible shape.
    """
    tokens = tensors.get("mask_decoder.mask_tokens.weight")
    if tokens is None:
        # Loading reports the missing tensor, or the file is an encoder alone.
        return 3
    if tokens.ndim != 2 or tokens.shape[0] < 2:
        raise WeightsError(
            f"mask_decoder.mask_tokens.weight has shape {list(tokens.shape)}, expected (masks + 1, C).", where=name
        )
    return int(tokens.shape[0]) - 1


def _check_tables(tensors: Mapping[str, torch.Tensor], *, name: str) -> None:
    for key, tensor in tensors.items():
        shape = list(tensor.shape)
        if key == "image_encoder.pos_embed":
            is_right = len(shape) == 4 and shape[0] == 1 and 0 < shape[1] == shape[2] <= _MAX_SIDE // 16
            expected = "(1, g, g, C)"
        elif key.startswith("image_encoder.") and key.endswith((".rel_pos_h", ".rel_pos_w")):
            is_right, expected = len(shape) == 2 and shape[0] % 2 == 1 and shape[1] > 0, "(L, D) with an odd L"
        elif key == "image_encoder.patch_embed.proj.weight":
            is_right = len(shape) == 4 and shape[1] == 3 and 0 < shape[2] == shape[3]
            expected = "(C, 3, patch, patch), because SAM reads three channels"
        else:
            continue
        if not is_right:
            raise WeightsError(f"{key} has shape {shape}, expected {expected}.", where=name)
