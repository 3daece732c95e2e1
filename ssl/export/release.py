"""Release of a stage-1 run, the image encoder in every format that applies, and on request its SSL state."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samgraft.shared.counting import counted
from samgraft.shared.encoders.base import SAM_PIXEL_MEAN
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import file_sha256
from samgraft.shared.release.card_page import (
    LIMITS,
    contents_section,
    front_matter,
    input_section,
    licence_section,
    statement_section,
    transformers_lines,
    write_card_page,
)
from samgraft.shared.release.formats import SAM_FORMAT, TRANSFORMERS_FORMAT, Artefact, Format, choose_formats
from samgraft.shared.release.licence import Licence, decide_licence
from samgraft.shared.release.load_back import THIS_MODULE
from samgraft.shared.release.onnx_format import ONNX_FORMAT
from samgraft.shared.release.release_folder import Contents, build_release, refuse_existing
from samgraft.shared.release.request import Released, ReleaseRequest
from samgraft.shared.release.subject import Subject
from samgraft.shared.runs.metrics import MetricsLog
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import read_weights
from samgraft.ssl.export.encoder_weights import ENCODER_FOLDER
from samgraft.ssl.export.membership import MembershipAudit, audit_membership
from samgraft.ssl.ssl_state import STATE_FOLDER

log = logging.getLogger(__name__)

WEIGHTS_FILE = "encoder.safetensors"
ALLOWED_STATE = (".safetensors", ".json")
PEFT = Format(
    name="peft",
    why_not=lambda _: "stage 1 changes the encoder's own weights: there is no adapter.",
    write=lambda *_: [],
)
MONAI = Format(
    name="monai",
    why_not=lambda _: "an encoder alone segments nothing; release a fine-tuned model for a bundle.",
    write=lambda *_: [],
)


def release_encoder(request: ReleaseRequest) -> Released:
    """Write a checked release folder atomically.

    Raises:
        UsageError: Without a licence, or for a format that does not apply.
        StorageError: If ``out`` exists.
        WeightsError: If the encoder is not the one of its card, or a file does not load back with equal outputs.
        DataError: If the privacy gate finds anything.
    """
    file = request.run / ENCODER_FOLDER / WEIGHTS_FILE
    weights = read_weights(file)
    card = weights.card
    # A release must not describe a file that was exchanged after the run.
    if card is None or card.weights_sha256 != file_sha256(file):
        raise WeightsError(
            f"{WEIGHTS_FILE} must be the file that its card describes, but it was changed or damaged.",
            where=request.run.name,
            kept="the run's training states",
        )
    licence = decide_licence(request.licence, card, next_command=request.with_licence)
    refuse_existing(request.out)
    subject = Subject(tensors=weights.tensors, spec=weights.spec, image_size=weights.image_size)
    formats, left_out = choose_formats(
        [SAM_FORMAT, TRANSFORMERS_FORMAT, PEFT, ONNX_FORMAT, MONAI], request.formats, subject
    )
    # Before anything is written; an audit that cannot be made stops the release.
    audit = audit_membership(request.run) if request.continuable else None

    def write_texts(folder: Path, artefacts: Sequence[Artefact]) -> None:
        public = _public_card(card, licence=licence.name, weights=folder / WEIGHTS_FILE)
        public.write(folder / "card.json")
        if audit is not None:
            _copy_state(request.run / STATE_FOLDER, folder / STATE_FOLDER)
        write_encoder_card(folder, public, licence, request, artefacts, audit)

    contents = Contents(
        subject=subject,
        formats=formats,
        write_texts=write_texts,
        clients_module=THIS_MODULE,
        identifiers=[*request.known_identifiers, *_patient_ids(card.data_manifest)],
    )
    if audit is None:
        left_out.append("ssl_state: left out, because it reveals more about the training scans; --continuable adds it.")
    else:
        log.info("membership audit: %s", audit.render())
    return Released(checked=build_release(request.out, contents), left_out=left_out)


def write_encoder_card(
    folder: Path,
    card: Card,
    licence: Licence,
    request: ReleaseRequest,
    artefacts: Sequence[Artefact],
    audit: MembershipAudit | None,
) -> None:
    """Write ``README.md`` of an encoder."""
    modality = _modality(request.run)
    state = [Artefact(path=STATE_FOLDER, client="")] if audit else []
    sections = {
        "": (
            f"Segment Anything's image encoder ({card.arch}, {card.image_size} px) after self-supervised training "
            f"({card.objective}) on unlabelled {modality} slices: {counted(card.steps, 'step')}, "
            f"{counted(card.slices_seen, 'slice')} seen{_epochs(card)}. Base weights: {card.base_name or 'unknown'}, "
            f"sha256 `{card.base_sha256}`."
        ),
        "What it learned": _learned(request.run),
        "Files": contents_section([*artefacts, *state]),
        "Use": _use(folder, card, {a.path for a in artefacts}),
        "Input": input_section(card, image_size=card.image_size, intensity=card.intensity, keep_aspect=None),
        "Data": f"{statement_section(request.statement)}\n\n{_data(card)}",
        "Membership": _membership(audit),
        "Limits": "\n".join(f"- {limit}" for limit in (*LIMITS, "An encoder: it segments nothing by itself.")),
        "Licence": licence_section(licence),
    }
    front = front_matter(
        card, licence, pipeline="image-feature-extraction", modality=modality, tags=["self-supervised-learning"]
    )
    write_card_page(folder, front=front, title=request.out.name, sections=sections)


def _public_card(card: Card, *, licence: str, weights: Path) -> Card:
    """Return the card without patient ids, even pseudonymous ones."""
    # Content hashes stay, because users of the release find leaks by them.
    manifest = {key: value for key, value in card.data_manifest.items() if key != "patient_ids"}
    return dataclasses.replace(card, data_manifest=manifest, license=licence, weights_sha256=file_sha256(weights))


def _patient_ids(manifest: Mapping[str, Any]) -> list[str]:
    return [str(patient) for patient in manifest.get("patient_ids", ())]


def _modality(run: Path) -> str:
    import yaml

    return str(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["modality"])


def _epochs(card: Card) -> str:
    """Return the epochs in parentheses, or nothing for a card of an earlier version."""
    if card.epochs is None:
        return ""
    return f" ({card.epochs:.3g} epochs over {counted(card.slices_available, 'slice')})"


def _learned(run: Path) -> str:
    losses = [
        float(line["held_out/loss"]) for line in MetricsLog(run / "metrics.jsonl").read() if "held_out/loss" in line
    ]
    if len(losses) < 2:
        return "No patient was held out, so the loss on unseen slices was not measured."
    return f"Loss on slices of held-out patients with fixed masks: {losses[0]:.4g} before, {losses[-1]:.4g} after."


def _use(folder: Path, card: Card, paths: set[str]) -> str:
    blocks = [
        "```python\nfrom samgraft.shared.weights.load import load_image_encoder\n"
        'encoder, card = load_image_encoder("encoder.safetensors")  # (B, 3, S, S) -> (B, 256, h, w)\n```',
        "Fine-tune it with `samgraft finetune --ckpt` and this folder.",
    ]
    if "transformers" in paths:
        blocks.append(transformers_lines(folder, variable="encoder"))
    if list(card.pixel_mean) != list(SAM_PIXEL_MEAN):
        blocks.append(
            f"Pixel statistics are not SAM's: mean {card.pixel_mean}, std {card.pixel_std} on the 0..255 scale."
        )
    return "\n\n".join(blocks)


def _data(card: Card) -> str:
    hashes = card.data_manifest.get("content_sha256", ())
    fingerprint = card.data_manifest.get("fingerprint", "unknown")
    notes = "".join(f" {note}." for note in card.notes)
    return f"{len(hashes)} series; store sha256 `{fingerprint}`.{notes}"


def _membership(audit: MembershipAudit | None) -> str:
    if audit is None:
        return (
            "Decoder, teacher, optimizer and earlier states are not part of this release, because with them "
            "reconstruction errors reveal whether a scan was trained on (arXiv 2408.06825)."
        )
    return audit.render()


def _copy_state(source: Path, target: Path) -> None:
    """Copy the files of the SSL state, and refuse any other kind of file."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix not in ALLOWED_STATE:
            raise WeightsError(
                f"ssl_state must contain {' and '.join(ALLOWED_STATE)} files only, got another one.", where=path.name
            )
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        shutil.copyfile(path, target / path.name)
