"""README.md of a release: a Hugging Face model card. What is in it comes from files of the run; this is its frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from samgraft.shared.release.formats import Artefact
from samgraft.shared.release.licence import Licence
from samgraft.shared.weights.card import Card

LIMITS = (
    "Research software: not a medical device, not for diagnosis or treatment decisions.",
    "Scans of another sequence, scanner, site or population than the training data may be handled badly without any "
    "sign of it.",
)
CONTENTS = {
    "sam.safetensors": "the whole SAM under segment_anything's names",
    "sam.pth": "the same for `sam_model_registry` and `torch.load(..., weights_only=True)`",
    "encoder.safetensors": "the image encoder under segment_anything's names (`image_encoder.*`)",
    "encoder.pth": "the same for `torch.load(..., weights_only=True)`",
    "transformers": "a folder for transformers' `SamModel.from_pretrained` (encoder alone: `SamVisionModel`)",
    "base.safetensors": "the weights before tuning; `adapter/` beside it holds what was learnt and cannot be merged",
    "peft": "the adapter pair before merging, for `PeftModel.from_pretrained`",
    "onnx": "encoder and decoders, one file each; inputs and outputs are named as segment_anything's export does",
    "monai": "a MONAI bundle: `configs/metadata.json`, `configs/inference.json`, `models/model.pt`",
    "ssl_state": "decoder, teacher and optimizer of the self-supervised objective, to go on with it",
}


def write_card_page(folder: Path, *, front: Mapping[str, Any], title: str, sections: Mapping[str, str]) -> None:
    """Write ``README.md``: YAML front matter, a title, and sections in the order given ("" has no heading)."""
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    parts = [f"# {title}", *(f"## {name}\n\n{text}" if name else text for name, text in sections.items() if text)]
    (folder / "README.md").write_text(f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(card: Card, licence: Licence, *, pipeline: str, modality: str, tags: Sequence[str]) -> dict[str, Any]:
    """Return the card's metadata under the Hugging Face hub's keys."""
    return {
        "license": licence.name,
        "library_name": "samgraft",
        "pipeline_tag": pipeline,
        "tags": ["medical-imaging", "segment-anything", card.arch, modality, *tags],
    }


def contents_section(artefacts: Sequence[Artefact]) -> str:
    """Return the table of what the folder holds."""
    rows = [f"| `{a.path}` | {CONTENTS[a.path]} |" for a in artefacts]
    rows += ["| `card.json` | the facts below, for programs |", "| `SHA256SUMS` | `sha256sum -c SHA256SUMS` |"]
    return "\n".join(["| file | what it is |", "|---|---|", *rows])


def input_section(card: Card, *, image_size: int, intensity: Mapping[str, Any], keep_aspect: bool | None) -> str:
    """Return how a slice must reach the encoder."""
    preset = ", ".join(f"{key} {value}" for key, value in sorted(intensity.items()))
    fit = {True: ", aspect kept, padded right and bottom", False: ", resized to the square", None: ""}[keep_aspect]
    return (
        f"One slice{fit}, {image_size} px; intensity to [0, 1] per volume by this preset: {preset}. Then three "
        f"equal channels times 255, minus {card.pixel_mean}, over {card.pixel_std}."
    )


def licence_section(licence: Licence) -> str:
    """Return what may be done, and by whose word."""
    base = f"{licence.base_name}: {licence.base_licence or 'licence not known to the tool that wrote this card'}"
    return f"{licence.name}, as stated by whoever made this release. Base weights {base}; their terms apply too."


def statement_section(statement: str | None) -> str:
    """Return the releaser's words on the data, or that there are none."""
    if statement and statement.strip():
        return f"The releaser states: {statement.strip()}"
    return "The releaser gave no statement on origin, consent and de-identification of the scans."
