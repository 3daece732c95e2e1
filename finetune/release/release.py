"""Release of a fine-tuned model in every format that applies, with card, task and checksums."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from samgraft.finetune.evaluation.postprocess import read_postprocessing
from samgraft.finetune.model_folder import CARD_FILE, FinishedModel, read_model, weights_digest
from samgraft.finetune.release.adapter_format import adapter_format
from samgraft.finetune.release.model_card import read_test_scores, write_model_card
from samgraft.finetune.release.monai_bundle import expected_slices, monai_format
from samgraft.finetune.release.pair_format import pair_formats, pair_outputs, pair_subject
from samgraft.finetune.task import Task
from samgraft.shared.errors import UsageError
from samgraft.shared.release.formats import SAM_FORMAT, TRANSFORMERS_FORMAT, Artefact, Format, choose_formats
from samgraft.shared.release.licence import Licence, decide_licence
from samgraft.shared.release.onnx_format import ONNX_FORMAT
from samgraft.shared.release.release_folder import Contents, build_release, refuse_existing
from samgraft.shared.release.request import Released, ReleaseRequest
from samgraft.shared.release.subject import Subject
from samgraft.shared.weights.card import Card

log = logging.getLogger(__name__)

CLIENTS_MODULE = "samgraft.finetune.release.release_clients"


def release_model(request: ReleaseRequest) -> Released:
    """Write a checked release folder atomically.

    Raises:
        UsageError: Without a licence, for a format that does not apply, or with ``--continuable``.
        StorageError: If ``out`` exists.
        WeightsError: If the run has no finished model, or a file does not load back with equal outputs.
        DataError: If the privacy gate finds anything.
    """
    model = read_model(request.run)
    licence = decide_licence(request.licence, model.card, next_command=request.with_licence)
    if request.continuable:
        raise UsageError("--continuable applies to runs of stage 1 only. Leave it out for a fine-tuned model.")
    request.refuse_warnings([model.task.warning] if model.task.warning else [])
    refuse_existing(request.out)
    subject = _subject(model)
    formats, left_out = choose_formats(_formats(model, request.run), request.formats, subject)

    def write_texts(folder: Path, artefacts: Sequence[Artefact]) -> None:
        _write_texts(model, request, folder, artefacts, subject=subject, licence=licence)

    contents = Contents(
        subject=subject,
        formats=formats,
        write_texts=write_texts,
        clients_module=CLIENTS_MODULE,
        # Pseudonyms are not released either, because others could link them to the same patients elsewhere.
        identifiers=[*request.known_identifiers, *_pseudonyms(model.task)],
        extra_outputs=lambda probe: (expected_slices if model.is_merged else pair_outputs)(model, probe),
    )
    return Released(checked=build_release(request.out, contents), left_out=left_out)


def _subject(model: FinishedModel) -> Subject:
    if not model.is_merged:
        return pair_subject(model)
    sam = model.segmenter.sam
    return Subject(
        tensors=sam.state_dict(),
        spec=sam.image_encoder.spec,
        image_size=model.segmenter.image_size,
        memory=model.memory,
    )


def _formats(model: FinishedModel, run: Path) -> list[Format]:
    formats = [SAM_FORMAT, TRANSFORMERS_FORMAT, adapter_format(model, run), ONNX_FORMAT, monai_format(model)]
    return formats if model.is_merged else pair_formats(model, formats)


def _write_texts(
    model: FinishedModel,
    request: ReleaseRequest,
    folder: Path,
    artefacts: Sequence[Artefact],
    *,
    subject: Subject,
    licence: Licence,
) -> None:
    scores = read_test_scores(request.run / "evaluation" / "test" / "cases.csv")
    if scores is None:
        run = shlex.quote(str(request.run))
        log.warning(
            "the card will have no test scores. To include them, run first: make evaluate RUN=%s SPLIT=test", run
        )
    postprocessing = read_postprocessing(
        model.folder, weights_sha256=model.card.weights_sha256, classes=model.task.classes
    )
    card = _public_card(model.card, licence=licence.name, digest=weights_digest(folder))
    card.write(folder / CARD_FILE)
    write_model_card(
        folder,
        title=request.out.name,
        card=card,
        task=model.task,
        subject=subject,
        licence=licence,
        scores=scores,
        artefacts=artefacts,
        statement=request.statement,
        postprocessing=postprocessing.describe(model.task.classes),
    )
    # The split consists of patient ids.
    dataclasses.replace(model.task, split={}).write(folder)
    if postprocessing.steps:
        # The released file has other bytes than the run's, so its post-processing needs the new hash.
        dataclasses.replace(postprocessing, weights_sha256=card.weights_sha256 or "").write(folder)


def _public_card(card: Card, *, licence: str, digest: str) -> Card:
    """Return the card without patient ids, even pseudonymous ones."""
    # Content hashes stay, because users of the release find leaks by them.
    manifest = {key: value for key, value in card.data_manifest.items() if key != "patient_ids"}
    if isinstance(manifest.get("pretraining"), dict):
        manifest["pretraining"] = {k: v for k, v in manifest["pretraining"].items() if k != "patient_ids"}
    return dataclasses.replace(card, data_manifest=manifest, license=licence, weights_sha256=digest)


def _pseudonyms(task: Task) -> list[str]:
    return [patient for patients in task.split.values() for patient in patients]
