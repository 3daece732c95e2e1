"""Input frame, which places a slice of any size in the encoder's square and maps logits back.

Shape letters: N = slices, C = classes, H, W = rows and columns of a slice, S = side of the encoder's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InputFrame:
    """Placement of a slice in the encoder's input. The content starts at the top left, as in SAM."""

    native_hw: tuple[int, int]
    content_hw: tuple[int, int]
    """Rows and columns of the input that hold the slice. The rest is padding."""
    image_size: int
    """Side of the square input in pixels."""


def fit_frame(native_hw: tuple[int, int], *, image_size: int, keep_aspect: bool) -> InputFrame:
    """Compute the placement of a slice in the encoder's input.

    Args:
        native_hw: Rows and columns of the slice.
        image_size: Side of the input, pixels.
        keep_aspect: Scale both axes by one factor and pad right and bottom, as SAM does. Otherwise stretch to the
            square. Pixels count as squares in both cases, whatever their size in mm.
    """
    if min(native_hw) < 1 or image_size < 1:
        raise ValueError(f"sizes must be positive, got native_hw {native_hw} and image_size {image_size}.")
    if not keep_aspect:
        return InputFrame(native_hw=native_hw, content_hw=(image_size, image_size), image_size=image_size)
    scale = image_size / max(native_hw)
    # SAM's ResizeLongestSide rounds half up.
    content = (int(native_hw[0] * scale + 0.5), int(native_hw[1] * scale + 0.5))
    content_hw = (min(image_size, max(1, content[0])), min(image_size, max(1, content[1])))
    return InputFrame(native_hw=native_hw, content_hw=content_hw, image_size=image_size)


def image_to_frame(image_NCHW: Tensor, frame: InputFrame) -> Tensor:
    """Resize float images (N, C, H, W) into the frame (N, C, S, S), bilinearly with antialiasing and padding 0."""
    _check_size(image_NCHW, frame)
    if frame.content_hw != frame.native_hw:
        image_NCHW = F.interpolate(image_NCHW, size=frame.content_hw, mode="bilinear", antialias=True)
    return _pad(image_NCHW, frame)


def label_to_frame(label_NHW: Tensor, frame: InputFrame) -> Tensor:
    """Resize label ids (N, H, W) into the frame by nearest neighbour with padding 0, so that no new id can appear."""
    _check_size(label_NHW[:, None], frame)
    # nearest-exact samples pixel centres. torch's "nearest" would shift the label by half a pixel against the image.
    resized = F.interpolate(label_NHW[:, None].to(torch.float32), size=frame.content_hw, mode="nearest-exact")
    return _pad(resized, frame)[:, 0].to(label_NHW.dtype)


def logits_to_native(logits_NCSS: Tensor, frame: InputFrame) -> Tensor:
    """Map logits (N, C, S, S) to the slice's own pixels (N, C, H, W), without the padding.

    Logits may have another side than ``image_size``: SAM's decoder returns a quarter. They are enlarged first.
    """
    side = logits_NCSS.shape[-1]
    if logits_NCSS.ndim != 4 or logits_NCSS.shape[-2] != side:
        raise ValueError(f"logits_NCSS must have shape (N, C, S, S), got {tuple(logits_NCSS.shape)}.")
    # The padding must be cropped in input pixels. At a quarter of the size its border may lie inside a pixel.
    if side != frame.image_size:
        size = (frame.image_size, frame.image_size)
        logits_NCSS = F.interpolate(logits_NCSS, size=size, mode="bilinear", align_corners=False)
    height, width = frame.content_hw
    content = logits_NCSS[..., :height, :width]
    if frame.content_hw == frame.native_hw:
        return content
    return F.interpolate(content, size=frame.native_hw, mode="bilinear", align_corners=False)


def _pad(image_NCHW: Tensor, frame: InputFrame) -> Tensor:
    height, width = frame.content_hw
    return F.pad(image_NCHW, (0, frame.image_size - width, 0, frame.image_size - height))


def _check_size(image_NCHW: Tensor, frame: InputFrame) -> None:
    if image_NCHW.ndim != 4 or tuple(image_NCHW.shape[-2:]) != frame.native_hw:
        raise ValueError(f"the slice must have {frame.native_hw} pixels, got shape {tuple(image_NCHW.shape)}.")
