"""Stage 1: go on training SAM's image encoder on unlabelled slices."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from samgraft.shared.runs.inputs import check_run_inputs, record_run_inputs, save_run_split
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.samples.augment import SliceAugmentation
from samgraft.shared.samples.dataset import SliceDataset, collate_slices
from samgraft.shared.samples.slices import select_slices
from samgraft.shared.samples.split import Split
from samgraft.shared.scans.preset import ModalityPreset, load_preset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.config import Strategy, check_warmup
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.processes import full_state, is_sharded, load_full_state
from samgraft.shared.training.resume import seed_process
from samgraft.shared.training.trainer import FitContext, fit
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.export.encoder_weights import encoder_card, hand_over, write_card_of_states
from samgraft.ssl.module import PretrainModule
from samgraft.ssl.moments import read_moments
from samgraft.ssl.monitor.labelled import open_probe_store
from samgraft.ssl.monitor.monitor import Watch, Watched, load_watched
from samgraft.ssl.monitor.report import write_report
from samgraft.ssl.objectives import Objective
from samgraft.ssl.optimizer import build_schedule
from samgraft.ssl.preflight import leak_check, preflight, pretraining_split
from samgraft.ssl.start import start_objective

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig, *, name: str, runs: Path, device: DeviceChoice, dry_run: bool = False
) -> Path | None:
    """Continue self-supervised training of the SAM image encoder; return the encoder weights file.

    Args:
        config: Everything that decides the result.
        name: Of the run; an interrupted run of this name and configuration goes on.
        runs: Folder of all runs.
        device: Where to train.
        dry_run: Stop after the pre-flight, write nothing, return None.
    """
    check_warmup(config.optim.warmup_steps, config.trainer.max_steps)
    store = SliceStore.open(config.data.store)
    preset = load_preset(config.modality)
    split = pretraining_split(config.data, store, seed=config.seed, run_path=runs / name)
    probe_store = open_probe_store(config.probe)
    leaks = leak_check(config.data, store, split.train, probe=probe_store)
    dataset = training_set(config, store, split.train, preset)

    seed_process(config.seed)
    objective, start_card, taken_up = start_objective(config)
    stride = objective.encoder.stride
    watched = load_watched(config, store, split, probe_store, preset=preset, stride=stride)
    moments = read_moments(config.model.base) if taken_up else None
    module = PretrainModule(objective, config, moments=moments)
    inputs = _inputs(store, split, probe_store, watched, base_sha256=start_card.base_sha256)
    check_run_inputs(runs / name, inputs)
    preflight(config, objective, dataset, split, watched, leaks=leaks, device=device, run_path=runs / name)
    if dry_run:
        return None

    notes = [*leaks, *taken_up]
    card = encoder_card(config, start_card, store=store, split=split, intensity=preset.intensity, notes=notes)
    with RunFolder.open(runs, name, config=config, stage="pretrain") as run:
        record_run_inputs(run, inputs)
        save_run_split(run, split)
        write_card_of_states(run, card)
        whole = copy.deepcopy(objective) if config.trainer.strategy is Strategy.FSDP else objective
        result = fit(
            module,
            FitContext(
                config=config.trainer,
                run=run,
                device=device,
                dataset=dataset,
                collate_fn=collate_slices,
                batch_size=config.data.batch_size,
                seed=config.seed,
                callbacks=[build_schedule(config.optim, max_steps=config.trainer.max_steps)],
                periodic=Watch(watched=watched, config=config, run_path=run.path).tasks(),
                data_fingerprint=store.fingerprint,
            ),
        )
        objective = put_together(objective, whole)
        weights = hand_over(objective, run, config, card, result)
        write_report(run, config, objective, watched, result=result, notes=leaks)
        _say_end(run, weights)
    return weights


def _inputs(
    store: SliceStore,
    split: Split,
    probe: tuple[SliceStore, Split] | None,
    watched: Watched,
    *,
    base_sha256: str | None,
) -> dict[str, str | None]:
    """Return the hashes of everything that is read by a path or drawn: what a run must go on with."""
    return {
        "data_fingerprint": store.fingerprint,
        "split_sha256": split.sha256,
        "base_sha256": base_sha256,
        "probe_store_fingerprint": probe[0].fingerprint if probe else None,
        "probe_split_sha256": probe[1].sha256 if probe else None,
        "drift_decoder_sha256": watched.gauge.decoder_sha256 if watched.gauge else None,
    }


def put_together(objective: Objective, whole: Objective) -> Objective:
    """Return the trained objective with every parameter whole; ``whole`` is a copy from before it was sharded."""
    if not is_sharded(objective):
        return objective
    load_full_state(whole, full_state(objective.state_dict()))
    return whole


def training_set(
    config: PretrainConfig, store: SliceStore, patient_ids: Sequence[str], preset: ModalityPreset
) -> SliceDataset:
    """Return the augmented slices of the training patients."""
    slices = select_slices(
        store,
        patient_ids,
        planes=config.data.planes,
        min_foreground_fraction=config.data.least_foreground(preset),
    )
    return SliceDataset(
        store,
        slices,
        intensity=preset.intensity,
        augment=SliceAugmentation(config.data.augment),
        seed=config.seed,
        num_neighbours=config.data.num_neighbours,
    )


def _say_end(run: RunFolder, weights: Path) -> None:
    """Tell where the results are and what to do with them; the report has said what the run learned."""
    log.info("  encoder  %s", weights)
    log.info("  report   %s", run.report)
    log.info("  next     make finetune CKPT=%s", shlex.quote(str(run.path)))
