"""Clients that load a released file with the library it is meant for and compute the probe.

Weights of a published shape (vit_b, vit_l, vit_h at 1024 px) are loaded by segment_anything's registry, all others by
this project's builder. Both load strictly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.registry import spec_from_tensors
from samgraft.shared.errors import WeightsError
from samgraft.shared.release.subject import Subject, decoder_outputs
from segment_anything import SamPredictor, sam_model_registry
from torch import Tensor

Outputs = tuple[dict[str, Tensor], str]
"""Outputs of the probe by name, and a description of how the file was loaded."""
Client = Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], Outputs]


def read_subject(path: Path, *, image_size: int) -> Subject:
    """Read a released ``.safetensors`` or ``.pth`` file strictly."""
    # Not read_weights, which also accepts and converts foreign layouts and would hide a fault of the released file.
    is_pth = path.suffix == ".pth"
    tensors = torch.load(path, map_location="cpu", weights_only=True) if is_pth else load_file(path)
    return Subject(tensors=tensors, spec=spec_from_tensors(tensors), image_size=image_size)


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
    """Load a folder with ``SamModel`` or ``SamVisionModel`` and refuse missing and unexpected keys.

    Raises:
        WeightsError: If transformers reports any difference between the file and its model.
    """
    from transformers import SamModel, SamVisionModel

    is_encoder = options.get("encoder", False)
    kind: Any = SamVisionModel if is_encoder else SamModel
    model, info = kind.from_pretrained(str(path), output_loading_info=True)
    # transformers only warns of missing keys and fills them with random values.
    problems = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if problems:
        raise WeightsError(
            f"the keys are not exactly those of transformers' model (got {str(problems)[:200]}).", where=path.name
        )
    model.eval()
    pixels = probe["pixels_N3SS"]
    if is_encoder:
        return {"embeddings": model(pixels).last_hidden_state}, "transformers' SamVisionModel"
    embeddings = model.get_image_embeddings(pixels)
    boxes = model(image_embeddings=embeddings, input_boxes=probe["boxes_N4"][:, None], multimask_output=True)
    automatic = [model(image_embeddings=embeddings, multimask_output=m).pred_masks[:, 0] for m in (False, True)]
    outputs = {"embeddings": embeddings, "boxes": boxes.pred_masks[:, 0], "automatic": torch.cat(automatic, dim=1)}
    return outputs, "transformers' SamModel"


def onnx_client(path: Path, probe: Mapping[str, Tensor], options: Mapping[str, Any]) -> Outputs:
    """Run encoder and decoders with ONNX Runtime on the CPU."""
    import onnxruntime

    def run(name: str, **inputs: Tensor) -> list[Tensor]:
        session = onnxruntime.InferenceSession(str(path / name), providers=["CPUExecutionProvider"])
        feeds = {key: value.contiguous().numpy() for key, value in inputs.items()}
        return [torch.from_numpy(out) for out in session.run(None, feeds)]

    [embeddings] = run("encoder.onnx", pixels=probe["pixels_N3SS"])
    outputs = {"embeddings": embeddings}
    if not options.get("encoder", False):
        outputs["automatic"], _ = run("decoder_automatic.onnx", image_embeddings=embeddings)
        size = int(probe["pixels_N3SS"].shape[-1])
        masks = []
        for embedding, box_4 in zip(embeddings, probe["boxes_N4"], strict=True):
            _, _, low_res = run("decoder.onnx", image_embeddings=embedding[None], **_box_prompt(box_4, size, embedding))
            # The first mask is that of the single-mask token, which SamPredictor leaves out for multimask outputs.
            masks.append(low_res[:, 1:])
        outputs["boxes"] = torch.cat(masks)
    return outputs, f"ONNX Runtime {onnxruntime.__version__}"


def _box_prompt(box_4: Tensor, size: int, embedding_Chw: Tensor) -> dict[str, Tensor]:
    # In segment_anything's ONNX convention a box is two points, with label 2 at the top left and 3 at the bottom right.
    side = 4 * embedding_Chw.shape[-1]
    return {
        "point_coords": box_4.view(1, 2, 2),
        "point_labels": torch.tensor([[2.0, 3.0]]),
        "mask_input": torch.zeros(1, 1, side, side),
        "has_mask_input": torch.zeros(1),
        "orig_im_size": torch.tensor([float(size), float(size)]),
    }


CLIENTS: dict[str, Client] = {
    "segment_anything": segment_anything_client,
    "transformers": transformers_client,
    "onnx": onnx_client,
}
