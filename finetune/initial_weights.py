"""Initial weights of a fine-tuning, with the encoder from CKPT and the other parts from BASE."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.shared.encoders.registry import DEFAULT_ARCH, arch_spec
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.checks import count_mask_outputs
from samgraft.shared.weights.load import WeightsFile, absent_by_nature, card_of, load_into, read_weights
from samgraft.shared.weights.official import OFFICIAL, is_hub_address, official_name
from samgraft.shared.weights.tensor_report import TensorReport

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

log = logging.getLogger(__name__)

SAM_PARTS = {"image_encoder", "prompt_encoder", "mask_decoder"}
DEMO_BASE = Path("data/weights/lite_medsam.pth")
"""Path of LiteMedSAM after ``samgraft demo-data``."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights files of a fine-tuning."""

    base: WeightsFile
    """Full SAM with the prompt encoder, the mask decoder and the encoder of the zero-shot comparison."""
    encoder: WeightsFile
    """Image encoder to tune. The same file as ``base`` without a stage 1."""
    image_size: int
    """Side of the input in pixels."""

    @property
    def is_continued(self) -> bool:
        """True when the encoder comes from another file than the base weights, for example from stage 1."""
        return self.encoder.sha256 != self.base.sha256

    @property
    def card(self) -> Card:
        """Card of the encoder."""
        return card_of(self.encoder, image_size=self.image_size)

    def build_base(self) -> Sam:
        """Return the base SAM as published, for the zero-shot comparison."""
        sam = self._build_empty(self.base)
        load_into(sam, self.base, part="sam", resize_positions=True)
        return sam

    def build(self) -> tuple[Sam, list[TensorReport]]:
        """Return the SAM to tune, with every part loaded strictly, and the reports on its tensors."""
        sam = self._build_empty(self.encoder)
        reports = [load_into(sam, self.base, part="sam", resize_positions=True)]
        if self.is_continued:
            # Plain ViTs (MAE, DINO) have no relative positions and no neck. Those of the base weights stay, and the
            # report lists them.
            absent = absent_by_nature(sam.image_encoder) if self.encoder.is_partial else set()
            reports.append(load_into(sam.image_encoder, self.encoder, resize_positions=True, allow_missing=absent))
        return sam, reports

    def _build_empty(self, weights: WeightsFile) -> Sam:
        """Build the model with the pixel statistics of one file. Both files have the same architecture."""
        outputs = count_mask_outputs(self.base.tensors, name=self.base.name)
        return build_sam(weights.spec, image_size=self.image_size, num_multimask_outputs=outputs).eval()


def read_initial_weights(
    ckpt: Path | None, *, base: Path | None, image_size: int | None, model: str | None = None
) -> InitialWeights:
    """Read the weights of a fine-tuning and check that they fit each other.

    Args:
        ckpt: Initial encoder weights, which are a stage-1 run or any encoder or SAM weights. None takes ``base``.
        base: Base SAM weights, which supply prompt encoder and mask decoder. None takes ``ckpt`` if it is a full SAM,
            or else the demo's.
        image_size: Side of the input in pixels; None takes the encoder's.
        model: Architecture that the user expects; None takes that of the file.

    Raises:
        WeightsError: If a file is missing, contains no weights, has another architecture, or lacks parts.
        UsageError: If neither file is given, or the base weights are missing.
    """
    if ckpt is None and base is None:
        raise UsageError(f"CKPT and BASE are both missing. {advise_weights()}")
    encoder = _read_file("CKPT", ckpt) if ckpt is not None else _read_file("BASE", base)
    if model is not None and arch_spec(model).arch != encoder.spec.arch:
        raise WeightsError(
            f"the weights are of another model (got {encoder.spec.title}, expected MODEL={model}). "
            f"Use MODEL={encoder.spec.arch}.",
            where=encoder.name,
        )
    # One file can supply everything when it is a full SAM.
    if ckpt is None or (base is None and encoder.parts >= SAM_PARTS):
        base_weights = encoder
    else:
        base_weights = _read_file("BASE", base or _default_base(encoder))
    if not base_weights.spec.has_shape_of(encoder.spec):
        raise WeightsError(
            f"CKPT and BASE must have one architecture, got {encoder.spec.title} and {base_weights.spec.title}. "
            "Give the BASE of the stage-1 run.",
            where=f"{encoder.name}, {base_weights.name}",
        )
    if missing := SAM_PARTS - base_weights.parts:
        raise WeightsError(
            f"BASE must be a full SAM file, but {', '.join(sorted(missing))} is missing.", where=base_weights.name
        )
    # Positions are resized to another input size when the weights are loaded.
    size = image_size or encoder.image_size
    encoder.spec.check_image_size(size)
    _log_weights(encoder, base_weights, size)
    return InitialWeights(base=base_weights, encoder=encoder, image_size=size)


def list_stage_1_runs(folder: Path = Path("runs")) -> list[str]:
    """Return up to five stage-1 runs with encoder weights, as values of CKPT."""
    return [str(folder / name) for name in sorted(path.parent.name for path in folder.glob("*/encoder"))[:5]]


def _read_file(variable: str, path: Path | None) -> WeightsFile:
    assert path is not None
    if not path.exists() and str(path) not in OFFICIAL and not is_hub_address(path):
        raise WeightsError(
            f"{variable} does not exist, and is none of the official weights {', '.join(OFFICIAL)}. {advise_weights()}",
            where=path.name,
        )
    return read_weights(path)


def advise_weights() -> str:
    """Return values for CKPT and BASE that exist here, or the commands that make them."""
    runs = list_stage_1_runs()
    ckpt = f"Give {' or '.join(f'CKPT={run}' for run in runs)}" if runs else "Run make pretrain MODALITY=mri"
    base = f"BASE={DEMO_BASE}" if DEMO_BASE.exists() else f"BASE={next(iter(OFFICIAL))}"
    return f"{ckpt}, or give {base}."


def _default_base(encoder: WeightsFile) -> Path:
    if encoder.spec.arch == DEFAULT_ARCH and DEMO_BASE.exists():
        return DEMO_BASE
    if encoder.spec.arch == DEFAULT_ARCH:
        advice = "make demo-data MODALITY=mri"
    else:
        advice = f"make finetune CKPT=... BASE={official_name(encoder.spec.arch)}"
    raise UsageError(
        f"{encoder.name} contains the image encoder only. Give BASE, a full SAM file of {encoder.spec.title}, for "
        "prompt encoder and mask decoder.",
        next_command=advice,
    )


def _log_weights(encoder: WeightsFile, base: WeightsFile, image_size: int) -> None:
    card = encoder.card
    if encoder.sha256 == base.sha256:
        log.info("encoder, prompt encoder and mask decoder: %s (no stage 1)", base.name)
    else:
        history = f", {card.objective} for {card.steps} steps" if card and card.objective else ""
        log.info("image encoder: %s (%s%s)", encoder.name, encoder.spec.title, history)
        log.info("prompt encoder and mask decoder: %s", base.name)
        if card and card.base_sha256 and card.base_sha256 != base.sha256:
            log.warning("stage 1 used other base weights than BASE, so encoder and decoder may not fit each other.")
    if image_size != encoder.image_size:
        log.info("input %d px; the encoder was trained at %d px", image_size, encoder.image_size)
