"""Page of the formats and names that the code accepts, written from its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from samgraft.finetune.adapters.methods import METHODS
from samgraft.finetune.baselines import Baseline
from samgraft.shared.encoders.registry import published_specs
from samgraft.shared.scans.readers.registry import READERS
from samgraft.shared.weights.official import OFFICIAL
from samgraft.ssl.objectives import OBJECTIVES
from settings_page import attribute_docs, first_line

CONFIGS = Path(__file__).parents[2] / "configs"


def formats_page(note: str) -> str:
    """Return the Markdown of all tables."""
    specs = {spec.arch: spec for spec in reversed(published_specs())}
    baselines = attribute_docs(Baseline)
    return "\n".join(
        [
            note,
            "",
            "# Formats and names",
            *_table(
                "Scans and labels",
                ("format", "endings"),
                ((r.name, ", ".join(f"`{s}`" for s in r.suffixes) or "found by content") for r in READERS.values()),
            ),
            "",
            "A file without a known ending is recognised by its content. Folders may have the layout of nnU-Net (1 and",
            "2), Decathlon, MONAI lists or BIDS, or labels beside the scans; a CSV list names files in any layout.",
            *_table(
                "Encoders, `MODEL=`",
                ("name", "family", "native px", "objective of stage 1"),
                ((f"`{s.arch}`", s.family, s.native_image_size, f"`{s.default_objective}`") for s in _forward(specs)),
            ),
            *_table(
                "Official weights, `BASE=`",
                ("name", "MB", "licence"),
                ((f"`{f.name}`", f"{f.num_bytes / 1e6:.0f}", f.licence) for f in OFFICIAL.values()),
            ),
            "",
            "They are fetched once, by sha256. A path of any file of these shapes is accepted too, in the layout of",
            "segment_anything, transformers, timm or SAM 2. `samgraft inspect FILE` describes a file.",
            *_table("Objectives of stage 1, `METHOD=`", ("name", "what it is"), _described(OBJECTIVES)),
            *_table(
                "Methods of stage 2, `METHOD=`",
                ("name", "merged into plain SAM weights"),
                ((f"`{name}`", "yes" if spec.is_mergeable else "no") for name, spec in METHODS.items()),
            ),
            *_table(
                "Baselines without SAM, `MODEL=`",
                ("name", "what it is"),
                ((f"`{member.value}`", baselines[member.name]) for member in Baseline),
            ),
            *_table("Presets, `PRESET=`", ("file", "first line"), _presets()),
            "",
        ]
    )


def _forward(specs: dict[str, Any]) -> Iterable[Any]:
    return reversed(list(specs.values()))


def _described(classes: dict[str, type]) -> Iterable[tuple[str, str]]:
    return ((f"`{name}`", first_line(kind)) for name, kind in classes.items())


def _presets() -> Iterable[tuple[str, str]]:
    for path in sorted(CONFIGS.rglob("*.yaml")):
        yield f"`{path.relative_to(CONFIGS)}`", f"`{path.read_text().splitlines()[0].removeprefix('# ').strip()}`"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *lines]
