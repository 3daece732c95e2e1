"""The parts of a release's README.md, a Hugging Face model card, that are the same for both stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from samgraft.shared.release.formats import Artefact
from samgraft.shared.release.licence import Licence
from samgraft.shared.weights.card import Card

LIMITS = (
    "Research software: not a medical device, not for diagnosis or treatment decisions.",
    "Results on scans of another sequence, scanner, site or population than the training data may be wrong without any "
    "warning.",
)
CONTENTS = {
    "sam.safetensors": "the whole SAM under segment_anything's names",
    "sam.pth": "the same for `torch.load(..., weights_only=True)`",
    "sam2.pt": "the whole SAM 2, with its memory of videos unchanged, under the names of the package `sam2`",
    "encoder.safetensors": "the image encoder under segment_anything's names (`image_encoder.*`)",
    "encoder.pth": "the same for `torch.load(..., weights_only=True)`",
    "transformers": "a folder for transformers' `SamModel.from_pretrained` (encoder alone: `SamVisionModel`)",
    "base.safetensors": "the weights before fine-tuning; `adapter/` contains the trained part, which cannot be merged",
    "peft": "the adapter before merging, for `PeftModel.from_pretrained`",
    "onnx": "encoder and decoders, one file each, with the input and output names of segment_anything's export",
    "monai": "a MONAI bundle: `configs/metadata.json`, `configs/inference.json`, `models/model.pt`",
    "ssl_state": "decoder, teacher and optimizer of the self-supervised objective, to continue the training",
}


def write_card_page(folder: Path, *, front: Mapping[str, Any], title: str, sections: Mapping[str, str]) -> None:
    """Write ``README.md`` with YAML front matter, a title and sections in the given order.

    The section with the name "" has no heading, and a section without text is left out.
    """
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    parts = [f"# {title}", *(f"## {name}\n\n{text}" if name else text for name, text in sections.items() if text)]
    (folder / "README.md").write_text(f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(card: Card, licence: Licence, *, pipeline: str, modality: str, tags: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of the card under the keys of the Hugging Face hub."""
    return {
        "license": licence.name,
        "library_name": "samgraft",
        "pipeline_tag": pipeline,
        "tags": ["medical-imaging", "segment-anything", card.arch, modality, *tags],
    }


def contents_section(artefacts: Sequence[Artefact], *, in_registry: bool = False) -> str:
    """Return the table of the files in the folder.

    Args:
        artefacts: Files and folders with weights.
        in_registry: True if segment_anything's registry loads ``sam.pth``.
    """
    contents = dict(CONTENTS)
    if any(a.path == "sam2.pt" for a in artefacts):
        contents["transformers"] = contents["transformers"].replace("Sam", "Sam2")
    if in_registry:
        contents["sam.pth"] += " and segment_anything's `sam_model_registry`"
    rows = [f"| `{a.path}` | {contents[a.path]} |" for a in artefacts]
    rows += ["| `card.json` | the facts below, for programs |", "| `SHA256SUMS` | `sha256sum -c SHA256SUMS` |"]
    return "\n".join(["| file | what it is |", "|---|---|", *rows])


def transformers_lines(folder: Path, *, variable: str) -> str:
    """Return the lines of Python that load the ``transformers`` folder of a release."""
    [title] = json.loads((folder / "transformers" / "config.json").read_text(encoding="utf-8"))["architectures"]
    return f'```python\nfrom transformers import {title}\n{variable} = {title}.from_pretrained("transformers")\n```'


def table_cell(text: str) -> str:
    """Return text for one cell of a Markdown table."""
    # A bar would start another column, even inside of backticks, and a line break would end the table.
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def input_section(card: Card, *, image_size: int, intensity: Mapping[str, Any], keep_aspect: bool | None) -> str:
    """Return the description of the encoder's input."""
    preset = ", ".join(f"{key} {value}" for key, value in sorted(intensity.items()))
    fit = {True: ", aspect kept, padded right and bottom", False: ", resized to the square", None: ""}[keep_aspect]
    return (
        f"One slice{fit}, {image_size} px; intensity to [0, 1] per volume by this preset: {preset}. Then three "
        f"equal channels times 255, minus {card.pixel_mean}, over {card.pixel_std}."
    )


def licence_section(licence: Licence) -> str:
    """Return the licence and the terms of the base weights."""
    base = f"{licence.base_name}: {licence.base_licence or 'unknown licence'}"
    return f"{licence.name}, as stated by the releaser. Base weights {base}; their terms apply too."


def statement_section(statement: str | None) -> str:
    """Return the releaser's statement on the data, or a sentence that there is none."""
    if statement and statement.strip():
        return f"The releaser states: {statement.strip()}"
    return "The releaser gave no statement on origin, consent and de-identification of the scans."
