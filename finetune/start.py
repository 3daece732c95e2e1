"""Where the weights come from: encoder from stage 1, prompt encoder and mask decoder from the base SAM."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from samgraft.shared.encoders.registry import DEFAULT_ARCH, arch_spec
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.checks import count_mask_outputs
from samgraft.shared.weights.load import WeightsFile, absent_by_nature, card_of, load_into, read_weights
from samgraft.shared.weights.official import OFFICIAL
from samgraft.shared.weights.tensor_report import TensorReport
from segment_anything.modeling import Sam

log = logging.getLogger(__name__)

SAM_PARTS = {"image_encoder", "prompt_encoder", "mask_decoder"}
BASE_OF_DEMO = Path("data/weights/lite_medsam.pth")
"""LiteMedSAM, where ``samgraft demo-data`` puts it."""


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """The files a fine-tuning starts from, read once."""

    base: WeightsFile
    """Whole SAM: prompt encoder, mask decoder, and the encoder of the zero-shot comparison."""
    encoder: WeightsFile
    """Image encoder to tune; the same file as ``base`` without a stage 1."""
    image_size: int

    @property
    def is_continued(self) -> bool:
        """True when the encoder went through stage 1 (or is another file than the base)."""
        return self.encoder.sha256 != self.base.sha256

    @property
    def card(self) -> Card:
        """Card of the encoder."""
        return card_of(self.encoder, image_size=self.image_size)

    def build_base(self) -> Sam:
        """Return the base SAM as published, for the zero-shot comparison."""
        sam = self._empty(self.base)
        load_into(sam, self.base, part="sam", resize_positions=True)
        return sam

    def build(self) -> tuple[Sam, list[TensorReport]]:
        """Return the SAM to tune, every part strictly loaded, and the account of its tensors."""
        sam = self._empty(self.encoder)
        reports = [load_into(sam, self.base, part="sam", resize_positions=True)]
        if self.is_continued:
            # Plain ViTs (MAE, DINO) have no relative positions and no neck: those stay the base's, and it is printed.
            absent = absent_by_nature(sam.image_encoder) if self.encoder.is_partial else set()
            reports.append(load_into(sam.image_encoder, self.encoder, resize_positions=True, allow_missing=absent))
        return sam, reports

    def _empty(self, stands_for: WeightsFile) -> Sam:
        """Build the model; shape is common to both files, pixel statistics are those its encoder was trained with."""
        outputs = count_mask_outputs(self.base.tensors, name=self.base.name)
        return build_sam(stands_for.spec, image_size=self.image_size, num_multimask_outputs=outputs).eval()


def find_starting_point(
    ckpt: Path, *, base: Path | None, image_size: int | None, model: str | None = None
) -> StartingPoint:
    """Read the weights of a fine-tuning and check that they belong together.

    Args:
        ckpt: A stage-1 run, or any encoder or SAM weights.
        base: Whole SAM that gives prompt encoder and decoder; None takes ``ckpt`` if it is one, else the demo's.
        image_size: Side of the input in pixels; None takes the encoder's.
        model: Architecture the user expects; None takes what the file holds.

    Raises:
        WeightsError: If a file is missing, is no weights, has another architecture, or parts are missing.
        UsageError: If no base weights are known.
    """
    if not ckpt.exists() and str(ckpt) not in OFFICIAL:
        raise WeightsError(
            f"CKPT must be a run or a weights file that exists, or one of {', '.join(OFFICIAL)}.",
            where=ckpt.name,
            next_command="make pretrain MODALITY=mri   (or CKPT=data/weights/lite_medsam.pth for the base weights)",
        )
    encoder = read_weights(ckpt)
    if model is not None and arch_spec(model).arch != encoder.spec.arch:
        raise WeightsError(
            f"weights must be of MODEL={model}, the file is {encoder.spec.title}. Use MODEL={encoder.spec.arch}.",
            where=encoder.name,
        )
    base_weights = encoder if base is None and encoder.parts >= SAM_PARTS else _read_base(base, encoder)
    if not base_weights.spec.has_shape_of(encoder.spec):
        raise WeightsError(
            f"CKPT and BASE must have one architecture, got {encoder.spec.title} and {base_weights.spec.title}. "
            "Give the BASE that stage 1 started from.",
            where=f"{encoder.name}, {base_weights.name}",
        )
    if missing := SAM_PARTS - base_weights.parts:
        raise WeightsError(
            f"BASE must be a whole SAM, {', '.join(sorted(missing))} is missing.", where=base_weights.name
        )
    size = image_size or encoder.image_size
    encoder.spec.check_image_size(size)
    _say(encoder, base_weights, size)
    return StartingPoint(base=base_weights, encoder=encoder, image_size=size)


def _read_base(base: Path | None, encoder: WeightsFile) -> WeightsFile:
    if base is None:
        if encoder.spec.arch != DEFAULT_ARCH:
            raise UsageError(
                f"{encoder.name} holds the image encoder only; BASE must name the SAM that gives prompt encoder and "
                "mask decoder.",
                next_command=f"make finetune CKPT=... BASE=sam_{encoder.spec.arch}.pth",
            )
        base = BASE_OF_DEMO
    if not base.exists() and str(base) not in OFFICIAL:
        raise WeightsError(
            "BASE must be a weights file that exists.", where=base.name, next_command="make demo-data MODALITY=mri"
        )
    return read_weights(base)


def _say(encoder: WeightsFile, base: WeightsFile, image_size: int) -> None:
    card = encoder.card
    if encoder.sha256 == base.sha256:
        log.info("encoder, prompt encoder and mask decoder: %s (no stage 1)", base.name)
    else:
        history = f", {card.objective} for {card.steps} steps" if card and card.objective else ""
        log.info("image encoder: %s (%s%s)", encoder.name, encoder.spec.title, history)
        log.info("prompt encoder and mask decoder: %s", base.name)
        if card and card.base_sha256 and card.base_sha256 != base.sha256:
            log.warning("the encoder started from other weights than BASE: encoder and decoder may not fit together.")
    if image_size != encoder.image_size:
        log.info("input %d px; the encoder was trained at %d px", image_size, encoder.image_size)
