"""A release: merged weights in two formats, card, checksums; loaded back and searched before it exists."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from samgraft.finetune.model_card import read_test_scores, write_model_card
from samgraft.finetune.model_folder import CARD_FILE, WEIGHTS_FILE, FinishedModel, read_model
from samgraft.finetune.privacy import refuse_findings, scan_folder
from samgraft.finetune.release_check import probe_logits
from samgraft.finetune.task import Task
from samgraft.shared.errors import StorageError, UsageError, WeightsError
from samgraft.shared.models.card import Card
from samgraft.shared.models.safe_read import file_sha256
from samgraft.shared.models.weights import save_sam

log = logging.getLogger(__name__)

PTH_FILE = "sam.pth"
CHECKSUMS = "SHA256SUMS"
MAX_DIFFERENCE = 1e-4
"""Largest absolute difference of logits between the run's model and a released file loaded back."""


@dataclass(frozen=True, kw_only=True)
class CheckedFile:
    """One weights file, loaded back in a fresh process."""

    name: str
    builder: str
    max_difference: float


def release(run: Path, *, out: Path, licence: str | None, known_identifiers: Collection[str] = ()) -> list[CheckedFile]:
    """Write a release folder; it appears whole, checked and clean, or not at all.

    Args:
        run: A finished stage-2 run.
        out: Folder to create; must not exist.
        licence: Licence of the release, an SPDX name such as ``cc-by-4.0``. Asked for, never guessed.
        known_identifiers: Further strings that must not occur anywhere.

    Raises:
        UsageError: Without a licence.
        StorageError: If ``out`` exists.
        WeightsError: If the run has no finished model, or a file does not give the same outputs when loaded back.
        DataError: If the privacy gate finds anything.
    """
    model = read_model(run)
    if not licence or not licence.strip():
        raise UsageError(
            "a release must state its licence; the base weights' and the data's terms limit the choice.",
            next_command=f"samgraft release {run.name} --out {out.name} --license cc-by-4.0",
        )
    if out.exists():
        raise StorageError("the release folder must not exist yet.", where=out.name, kept="what is in it")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_files(model, run, partial, title=out.name, licence=licence.strip())
        checked = _load_back(model, partial)
        refuse_findings(scan_folder(partial, known=[*known_identifiers, *_pseudonyms(model.task)]))
        _write_checksums(partial)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checked


def _write_files(model: FinishedModel, run: Path, folder: Path, *, title: str, licence: str) -> None:
    scores = read_test_scores(run / "evaluation" / "test" / "cases.csv")
    if scores is None:
        log.warning("no test scores: the card will say so. samgraft evaluate %s --split test makes them.", run.name)
    for name in (WEIGHTS_FILE, PTH_FILE):
        # torch names the archive's inner folder after the file: nothing that identifies.
        save_sam(model.segmenter.sam, folder / name)
    card = _public_card(model.card, licence=licence, weights=folder / WEIGHTS_FILE)
    card.write(folder / CARD_FILE)
    write_model_card(folder, title=title, card=card, task=model.task, licence=licence, scores=scores)
    dataclasses.replace(model.task, split={}).write(folder)


def _public_card(card: Card, *, licence: str, weights: Path) -> Card:
    """Leave patient ids out, even pseudonymous ones; content hashes stay: others find leaks by them."""
    manifest = {key: value for key, value in card.data_manifest.items() if key != "patient_ids"}
    if isinstance(manifest.get("pretraining"), dict):
        manifest["pretraining"] = {k: v for k, v in manifest["pretraining"].items() if k != "patient_ids"}
    return dataclasses.replace(card, data_manifest=manifest, license=licence, weights_sha256=file_sha256(weights))


def _pseudonyms(task: Task) -> list[str]:
    return [patient for patients in task.split.values() for patient in patients]


def _load_back(model: FinishedModel, folder: Path) -> list[CheckedFile]:
    """Load each weights file in a fresh process and compare its logits with the run's model."""
    size = model.task.image_size
    images = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    sam = model.segmenter.sam
    expected = probe_logits(sam, images, spec_tensors=sam.state_dict())
    scratch = folder.with_name(f"{folder.name}.check")
    scratch.mkdir()
    try:
        save_file({"images": images}, scratch / "probe.safetensors")
        checked = [_check_file(folder / name, scratch, expected) for name in (WEIGHTS_FILE, PTH_FILE)]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return checked


def _check_file(file: Path, scratch: Path, expected: torch.Tensor) -> CheckedFile:
    out = scratch / f"{file.name}.logits"
    command = [sys.executable, "-m", "samgraft.finetune.release_check", str(file), str(scratch / "probe.safetensors")]
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise WeightsError(
            f"a released file must load strictly, {file.name} does not: {reason[0][:300]}", kept="the run"
        )
    difference = float((load_file(out)["logits"] - expected).abs().max())
    if not difference <= MAX_DIFFERENCE:
        raise WeightsError(
            f"{file.name} must give the run's outputs when loaded back, logits differ by {difference:.2e}.",
            kept="the run",
        )
    builder = str(json.loads(done.stdout.strip().splitlines()[-1])["builder"])
    return CheckedFile(name=file.name, builder=builder, max_difference=difference)


def _write_checksums(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")
