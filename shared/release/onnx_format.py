"""The ONNX format, with the image encoder and the decoder with and without prompts.

The prompted decoder has the inputs and outputs of segment_anything's export script. Every model is one file without
external data, because CVE-2022-25882 and CVE-2024-27318 are path traversals through external data. Plain ViTs are
exported from segment_anything's encoder with the released weights, so the graph has standard operators only.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.sam import decode_automatic
from samgraft.shared.release.formats import Artefact, Format
from samgraft.shared.release.subject import Subject
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel
from torch import Tensor, nn

OPSET = 17
MAX_BYTES = 2_000_000_000
"""Limit of an encoder in bytes, because one protobuf file holds 2 GiB. ViT-H in float32 has 2.5 GB."""


class AutomaticDecoder(nn.Module):
    """Decoder without prompts, from image embeddings to masks of every mask token."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, image_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, 1 + M, 4h, 4w) and predicted IoU (N, 1 + M) with the first token first."""
        features = ImageFeatures(image_embeddings)
        pairs = [decode_automatic(self.sam, features, multimask=multimask) for multimask in (False, True)]
        return torch.cat([logits for logits, _ in pairs], dim=1), torch.cat([iou for _, iou in pairs], dim=1)


def _why_not(subject: Subject) -> str | None:
    if "onnx" not in subject.spec.release_formats:
        return f"encoders of {subject.spec.arch} cannot be exported to ONNX."
    if missing := [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed. Run pip install 'samgraft[onnx]'."
    num_bytes = sum(t.numel() * t.element_size() for t in subject.encoder_tensors().values())
    if num_bytes > MAX_BYTES:
        return f"the encoder has {num_bytes / 1e9:.1f} GB and one ONNX file holds 2 GiB."
    return None


def _write(subject: Subject, folder: Path) -> list[Artefact]:
    folder = folder / "onnx"
    folder.mkdir()
    size, grid = subject.image_size, subject.image_size // subject.spec.stride
    pixels = torch.rand(1, 3, size, size)
    encoder = subject.build_encoder().for_export()
    _export(encoder, (pixels,), folder / "encoder.onnx", inputs=["pixels"], outputs=["embeddings"])
    if subject.is_whole:
        sam = subject.build()
        embeddings = torch.rand(1, subject.spec.neck_dim, grid, grid)
        _export(
            AutomaticDecoder(sam),
            (embeddings,),
            folder / "decoder_automatic.onnx",
            inputs=["image_embeddings"],
            outputs=["low_res_masks", "iou_predictions"],
        )
        _export_prompted(sam, embeddings, folder / "decoder.onnx", side=4 * grid)
    return [Artefact(path="onnx", client="onnx", options={"encoder": not subject.is_whole})]


def _export_prompted(sam: Sam, embeddings: Tensor, path: Path, *, side: int) -> None:
    """Export ``SamOnnxModel`` with the input and output names of segment_anything's script."""
    inputs = {
        "image_embeddings": embeddings,
        "point_coords": torch.rand(1, 5, 2) * sam.image_encoder.img_size,
        "point_labels": torch.randint(0, 4, (1, 5)).float(),
        "mask_input": torch.randn(1, 1, side, side),
        "has_mask_input": torch.tensor([1.0]),
        "orig_im_size": torch.tensor([float(sam.image_encoder.img_size)] * 2),
    }
    dynamic = {"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}}
    _export(
        SamOnnxModel(sam, return_single_mask=False),
        tuple(inputs.values()),
        path,
        inputs=list(inputs),
        outputs=["masks", "iou_predictions", "low_res_masks"],
        dynamic=dynamic,
    )


def _export(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    path: Path,
    *,
    inputs: list[str],
    outputs: list[str],
    dynamic: dict[str, dict[int, str]] | None = None,
) -> None:
    """Trace a module to ONNX in memory, remove paths of this machine, and save it."""
    import onnx

    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in (inputs[0], outputs[0])} if not dynamic else {}
    stream: Any = io.BytesIO()  # torch accepts a stream, but its annotation does not list it
    with torch.inference_mode(), warnings.catch_warnings():
        # The tracer warns of every branch in Python. Only the number of images or points varies, and the load-back
        # check compares the outputs.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            arguments,
            stream,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=dynamic or axes,
            opset_version=OPSET,
            dynamo=False,
        )
    model: Any = onnx.load_from_string(stream.getvalue())
    # The exporter stores stack traces with file names, which identify the user and the machine.
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del model.metadata_props[:]
    model.graph.doc_string = model.doc_string = ""
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path), save_as_external_data=False)


ONNX_FORMAT = Format(name="onnx", why_not=_why_not, write=_write)
