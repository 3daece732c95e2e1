"""Clients that load a released file with the library it is meant for and compute the probe.

Weights of a published shape (vit_b, vit_l, vit_h at 1024 px) are loaded by segment_anything's registry, all others by
this project's builder. Both load strictly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.registry import spec_from_tensors
from samgraft.shared.errors import WeightsError
from samgraft.shared.release.sam2_client import has_sam2, predictor_outputs, sam2_build, why_not_sam2
from samgraft.shared.release.subject import Subject, decoder_outputs, sam_outputs
from samgraft.shared.weights.sam2_format import from_sam2, split_memory
from segment_anything import SamPredictor, sam_model_registry
from torch import Tensor

Outputs = tuple[dict[str, Tensor], str]
"""Outputs of the probe by name, and a description of how the file was loaded."""
Client = Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], Outputs]


def read_subject(path: Path, *, image_size: int) -> Subject:
    """Read a released ``.safetensors``, ``.pth`` or ``.pt`` file strictly."""
    # Not read_weights, which also accepts and converts foreign layouts and would hide a fault of the released file.
    is_safe = path.suffix == ".safetensors"
    content: Any = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    tensors, memory = split_memory(from_sam2(content.get("model", content)))
    return Subject(tensors=tensors, memory=memory, spec=spec_from_tensors(tensors), image_size=image_size)


@torch.inference_mode()
def segment_anything_client(path: Path, probe: Mapping[str, Tensor], options: Mapping[str, Any]) -> Outputs:
    """Load a SAM strictly and segment with ``SamPredictor``, or load an encoder alone."""
    subject = read_subject(path, image_size=int(probe["pixels_N3SS"].shape[-1]))
    if not subject.is_whole:
        return _encoder_alone(subject, probe)
    if subject.why_not_stock is None:
        sam = sam_model_registry[str(subject.spec.registry_name)]()
        sam.load_state_dict(dict(subject.tensors), strict=True)
        sam.eval()
        builder = f"segment_anything's registry {subject.spec.arch}, SamPredictor"
    else:
        sam = subject.build()
        builder = f"samgraft's builder for {subject.spec.arch} at {subject.image_size} px, SamPredictor"
    # Pixel statistics are not in the file and MedSAM's differ from SAM's. The card names them for users.
    for name in ("pixel_mean", "pixel_std"):
        getattr(sam, name).copy_(torch.tensor(options[name]).view(-1, 1, 1))
    predictor = SamPredictor(sam)
    embeddings, boxes = [], []
    for image_SS3, box_4 in zip(probe["images_NSS3"], probe["boxes_N4"], strict=True):
        predictor.set_image(image_SS3.numpy())
        embeddings.append(predictor.get_image_embedding())
        box_14 = predictor.transform.apply_boxes_torch(box_4[None], predictor.original_size)
        boxes.append(predictor.predict_torch(None, None, boxes=box_14, multimask_output=True, return_logits=True)[2])
    outputs = decoder_outputs(sam, ImageFeatures(torch.cat(embeddings)), probe["boxes_N4"])
    return {**outputs, "embeddings": torch.cat(embeddings), "boxes": torch.cat(boxes)}, builder


@torch.inference_mode()
def sam2_client(path: Path, probe: Mapping[str, Tensor], options: Mapping[str, Any]) -> Outputs:
    """Load a SAM 2 with the package ``sam2`` if it can, or else strictly with this project's builder."""
    subject = read_subject(path, image_size=int(probe["pixels_N3SS"].shape[-1]))
    if path.suffix == ".pt" and why_not_sam2(subject) is None and has_sam2():
        return predictor_outputs(path, subject, probe), f"sam2's build_sam2 ({sam2_build(subject).config}), predictor"
    title = f"samgraft's builder for {subject.spec.arch} at {subject.image_size} px"
    return sam_outputs(subject.build(), probe), title


def _encoder_alone(subject: Subject, probe: Mapping[str, Tensor]) -> Outputs:
    if subject.why_not_stock is not None:
        title = f"samgraft's encoder for {subject.spec.arch} at {subject.image_size} px"
        return {"embeddings": subject.build_encoder()(probe["pixels_N3SS"])}, title
    name = str(subject.spec.registry_name)
    encoder = sam_model_registry[name]().image_encoder
    encoder.load_state_dict(subject.encoder_tensors(), strict=True)
    title = f"segment_anything's ImageEncoderViT of {name}"
    return {"embeddings": encoder.eval()(probe["pixels_N3SS"])}, title


@torch.inference_mode()
def transformers_client(path: Path, probe: Mapping[str, Tensor], options: Mapping[str, Any]) -> Outputs:
    """Load a folder with the model of its configuration and refuse missing and unexpected keys.

    Raises:
        WeightsError: If transformers reports any difference between the file and its model.
    """
    import transformers

    is_encoder = options.get("encoder", False)
    [title] = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]
    kind: Any = getattr(transformers, title)
    model, info = kind.from_pretrained(str(path), output_loading_info=True)
    # transformers only warns of missing keys and fills them with random values.
    problems = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if problems:
        raise WeightsError(
            f"the keys are not exactly those of transformers' model (got {str(problems)[:200]}).", where=path.name
        )
    model.eval()
    pixels = probe["pixels_N3SS"]
    if title.startswith("Sam2"):
        return _sam2_in_transformers(model, probe, is_encoder=is_encoder), f"transformers' {title}"
    if is_encoder:
        return {"embeddings": model(pixels).last_hidden_state}, f"transformers' {title}"
    embeddings = model.get_image_embeddings(pixels)
    boxes = model(image_embeddings=embeddings, input_boxes=probe["boxes_N4"][:, None], multimask_output=True)
    automatic = [model(image_embeddings=embeddings, multimask_output=m).pred_masks[:, 0] for m in (False, True)]
    outputs = {"embeddings": embeddings, "boxes": boxes.pred_masks[:, 0], "automatic": torch.cat(automatic, dim=1)}
    return outputs, f"transformers' {title}"


def _sam2_in_transformers(model: Any, probe: Mapping[str, Tensor], *, is_encoder: bool) -> dict[str, Tensor]:
    if is_encoder:
        return {"embeddings": model(probe["pixels_N3SS"]).fpn_hidden_states[-1]}
    maps = model.get_image_embeddings(probe["pixels_N3SS"])
    boxes = model(image_embeddings=maps, input_boxes=probe["boxes_N4"][:, None], multimask_output=True)
    # Without a prompt Sam2Model adds an empty point, so the decoder is called with no point at all.
    no_point = maps[-1].new_zeros(len(maps[-1]), 1, 0, maps[-1].shape[1])
    positions = model.get_image_wide_positional_embeddings().repeat(len(maps[-1]), 1, 1, 1)
    _, dense = model.get_prompt_embeddings()
    automatic = [
        model.mask_decoder(
            image_embeddings=maps[-1],
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=no_point,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=maps[:-1],
        )[0][:, 0]
        for multimask in (False, True)
    ]
    # The embedding of an empty memory belongs to the mask decoder here.
    embeddings = maps[-1] - model.no_memory_embedding.view(1, -1, 1, 1)
    return {"embeddings": embeddings, "boxes": boxes.pred_masks[:, 0], "automatic": torch.cat(automatic, dim=1)}


def onnx_client(path: Path, probe: Mapping[str, Tensor], options: Mapping[str, Any]) -> Outputs:
    """Run encoder and decoders with ONNX Runtime on the CPU."""
    import onnxruntime

    def run(name: str, **inputs: Tensor) -> list[Tensor]:
        session = onnxruntime.InferenceSession(str(path / name), providers=["CPUExecutionProvider"])
        feeds = {key: value.contiguous().numpy() for key, value in inputs.items()}
        return [torch.from_numpy(out) for out in session.run(None, feeds)]

    finer = options.get("finer", [])
    batches = probe["pixels_N3SS"].split(1) if options.get("one_image") else [probe["pixels_N3SS"]]
    encoded = [
        torch.cat(parts) for parts in zip(*(run("encoder.onnx", pixels=batch) for batch in batches), strict=True)
    ]
    outputs = {"embeddings": encoded[0]}
    if not options.get("encoder", False):
        features = dict(zip(["image_embeddings", *finer], encoded, strict=True))
        size = int(probe["pixels_N3SS"].shape[-1])
        automatic, boxes = [], []
        for i, box_4 in enumerate(probe["boxes_N4"]):
            one = {name: value[i : i + 1] for name, value in features.items()}
            automatic.append(run("decoder_automatic.onnx", **one)[0])
            prompt = _box_prompt(box_4, size, encoded[0][i], padded=bool(finer))
            # The first mask is that of the single-mask token, which SamPredictor leaves out for multimask outputs.
            boxes.append(run("decoder.onnx", **one, **prompt)[2][:, 1:])
        outputs |= {"automatic": torch.cat(automatic), "boxes": torch.cat(boxes)}
    return outputs, f"ONNX Runtime {onnxruntime.__version__}"


def _box_prompt(box_4: Tensor, size: int, embedding_Chw: Tensor, *, padded: bool) -> dict[str, Tensor]:
    # In segment_anything's ONNX convention a box is two points, with label 2 at the top left and 3 at the bottom right.
    # SAM 2 treats them as points, which are followed by a padding point with label -1.
    side = 4 * embedding_Chw.shape[-1]
    corners, labels = box_4.view(1, 2, 2), torch.tensor([[2.0, 3.0]])
    return {
        "point_coords": F.pad(corners, (0, 0, 0, 1)) if padded else corners,
        "point_labels": F.pad(labels, (0, 1), value=-1.0) if padded else labels,
        "mask_input": torch.zeros(1, 1, side, side),
        "has_mask_input": torch.zeros(1),
        "orig_im_size": torch.tensor([float(size), float(size)]),
    }


CLIENTS: dict[str, Client] = {
    "segment_anything": segment_anything_client,
    "sam2": sam2_client,
    "transformers": transformers_client,
    "onnx": onnx_client,
}
