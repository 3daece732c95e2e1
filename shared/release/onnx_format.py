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
from samgraft.shared.encoders.sam import decode_automatic, encode_images, feature_shapes
from samgraft.shared.release.formats import Artefact, Format
from samgraft.shared.release.subject import Subject
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel
from torch import Tensor, nn

OPSET = 17
MAX_BYTES = 2_000_000_000
"""Limit of an encoder in bytes, because one protobuf file holds 2 GiB. ViT-H in float32 has 2.5 GB."""


class FeatureEncoder(nn.Module):
    """Image encoder with the maps that the mask decoder reads besides the embeddings."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return embeddings and finer maps."""
        features = encode_images(self.sam, pixels)
        return features.embeddings, *features.high_res


class AutomaticDecoder(nn.Module):
    """Decoder without prompts, from image features to masks of every mask token."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, image_embeddings: Tensor, *high_res: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, 1 + M, 4h, 4w) and predicted IoU (N, 1 + M) with the first token first."""
        features = ImageFeatures(image_embeddings, high_res)
        pairs = [decode_automatic(self.sam, features, multimask=multimask) for multimask in (False, True)]
        return torch.cat([logits for logits, _ in pairs], dim=1), torch.cat([iou for _, iou in pairs], dim=1)


class Sam2OnnxModel(SamOnnxModel):
    """Prompted decoder of SAM 2 with the inputs of segment_anything's, and the finer maps after the embeddings."""

    def forward(
        self,
        image_embeddings: Tensor,
        high_res_0: Tensor,
        high_res_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return masks of the image's size, predicted IoU and low-resolution logits of all mask tokens."""
        masks, iou, _ = self.model.mask_decoder.predict_all(
            image_embeddings,
            self.model.prompt_encoder.get_dense_pe(),
            self._embed_points(point_coords, point_labels),
            self._embed_masks(mask_input, has_mask_input),
            (high_res_0, high_res_1),
        )
        return self.mask_postprocessing(masks, orig_im_size), iou, masks


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
    pixels = torch.rand(1, 3, subject.image_size, subject.image_size)
    sam = subject.build() if subject.is_whole else None
    finer = [] if sam is None else [torch.rand(1, *shape) for shape in feature_shapes(sam)[1:]]
    names = [f"high_res_{i}" for i in range(len(finer))]
    encoder = FeatureEncoder(sam) if sam is not None and finer else subject.build_encoder().for_export()
    # Windows of SAM 2 are planned for a number of images, so its models take one image at a time.
    dynamic: dict[str, dict[int, str]] | None = {"pixels": {}} if subject.spec.decoder == "sam2" else None
    _export(
        encoder, (pixels,), folder / "encoder.onnx", inputs=["pixels"], outputs=["embeddings", *names], dynamic=dynamic
    )
    if sam is not None:
        grid = subject.image_size // subject.spec.stride
        embeddings = torch.rand(1, subject.spec.neck_dim, grid, grid)
        features = {"image_embeddings": embeddings, **dict(zip(names, finer, strict=True))}
        _export(
            AutomaticDecoder(sam),
            tuple(features.values()),
            folder / "decoder_automatic.onnx",
            inputs=list(features),
            outputs=["low_res_masks", "iou_predictions"],
            dynamic=dynamic,
        )
        _export_prompted(sam, features, folder / "decoder.onnx", side=4 * grid)
    options = {"encoder": not subject.is_whole, "finer": names, "one_image": dynamic is not None}
    return [Artefact(path="onnx", client="onnx", options=options)]


def _export_prompted(sam: Sam, features: dict[str, Tensor], path: Path, *, side: int) -> None:
    """Export ``SamOnnxModel`` with the input and output names of segment_anything's script."""
    inputs = {
        **features,
        "point_coords": torch.rand(1, 5, 2) * sam.image_encoder.img_size,
        "point_labels": torch.randint(0, 4, (1, 5)).float(),
        "mask_input": torch.randn(1, 1, side, side),
        "has_mask_input": torch.tensor([1.0]),
        "orig_im_size": torch.tensor([float(sam.image_encoder.img_size)] * 2),
    }
    points = {"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}}
    kind = SamOnnxModel if len(features) == 1 else Sam2OnnxModel
    _export(
        kind(sam, return_single_mask=False),
        tuple(inputs.values()),
        path,
        inputs=list(inputs),
        outputs=["masks", "iou_predictions", "low_res_masks"],
        dynamic=points,
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

    axes = {name: {0: "batch"} for name in (inputs[0], outputs[0])} if dynamic is None else dynamic
    stream: Any = io.BytesIO()  # torch accepts a stream, but its annotation does not list it
    with torch.inference_mode(), warnings.catch_warnings():
        # The tracer warns of every branch in Python. Only the number of images or points varies, and the load-back
        # check compares the outputs.
        warnings.simplefilter("ignore")
        # An encoder may keep the plan of its attention windows from the last call. It then becomes a constant.
        module.eval()(*arguments)
        torch.onnx.export(
            module,
            arguments,
            stream,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
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
