"""Loads one released weights file as a stranger would, in a process of its own, and writes its logits.

    python -m samgraft.finetune.release_check FILE PROBE.safetensors OUT.safetensors

Stock SAMs (vit_b, vit_l, vit_h at 1024 px) go through segment_anything's own builder, which loads strictly; others
through this project's builder, strictly as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from samgraft.shared.models.architecture import spec_from_tensors
from samgraft.shared.models.sam import build_sam, decode_automatic, to_pixels
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam


def load_released(file: Path, *, image_size: int) -> tuple[Sam, str]:
    """Load a released file strictly and say through which builder."""
    tensors = (
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    )
    spec = spec_from_tensors(tensors)
    num_tokens = int(tensors["mask_decoder.mask_tokens.weight"].shape[0])
    is_stock = spec.plain is not None and spec.is_standard and image_size == spec.native_image_size and num_tokens == 4
    if is_stock:
        sam = sam_model_registry[spec.arch.value]()
        sam.load_state_dict(tensors, strict=True)
        return sam.eval(), f"segment_anything's builder {spec.arch.value}"
    sam = build_sam(spec, image_size=image_size, num_multimask_outputs=num_tokens - 1)
    sam.load_state_dict(tensors, strict=True)
    return sam.eval(), f"samgraft's builder for {spec.arch.value} at {image_size} px"


@torch.inference_mode()
def probe_logits(sam: Sam, images_N1SS: torch.Tensor, *, spec_tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return all mask logits of the probe images: single-mask and multimask outputs side by side."""
    spec = spec_from_tensors(spec_tensors)
    embeddings = sam.image_encoder(to_pixels(images_N1SS, spec))
    return torch.cat([decode_automatic(sam, embeddings, multimask=m)[0] for m in (False, True)], dim=1)


def main(arguments: list[str]) -> int:
    """Load, compute, write; any failure is an exception, so the exit code is not 0."""
    file, probe_path, out = (Path(a) for a in arguments)
    images = load_file(probe_path)["images"]
    sam, builder = load_released(file, image_size=int(images.shape[-1]))
    logits = probe_logits(sam, images, spec_tensors=sam.state_dict())
    save_file({"logits": logits.contiguous()}, out)
    sys.stdout.write(json.dumps({"builder": builder, "tensors": len(sam.state_dict())}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
