"""Stage 1, self-supervised training of SAM's image encoder on unlabelled slices."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from samgraft.shared.runs.inputs import check_run_inputs, record_run_inputs, save_run_split
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.samples.augment import SliceAugmentation
from samgraft.shared.samples.dataset import SliceDataset, collate_slices
from samgraft.shared.samples.slices import select_slices
from samgraft.shared.samples.split import Split, keep_drawn_split
from samgraft.shared.scans.preset import ModalityPreset, load_preset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.config import Strategy, check_warmup
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.processes import full_state, is_sharded, load_full_state
from samgraft.shared.training.resume import seed_process
from samgraft.shared.training.trainer import FitContext, fit
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.export.encoder_weights import encoder_card, export_encoder, write_training_state_card
from samgraft.ssl.export.interpolation import choose_encoder
from samgraft.ssl.initial_weights import build_initial_objective
from samgraft.ssl.module import PretrainModule
from samgraft.ssl.monitor.labelled import open_probe_store
from samgraft.ssl.monitor.monitor import Monitor, MonitorData, load_monitor_data
from samgraft.ssl.monitor.report import finetune_command, write_report
from samgraft.ssl.objectives import Objective
from samgraft.ssl.optimizer import build_schedule, read_moments
from samgraft.ssl.preflight import check_leaks, find_left_out, open_labelled, preflight, pretraining_split

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig, *, name: str, runs: Path, device: DeviceChoice, dry_run: bool = False
) -> Path | None:
    """Train the encoder on unlabelled slices and return the encoder weights file.

    Args:
        config: All settings that influence the result.
        name: Name of the run. An interrupted run of this name and configuration is resumed.
        runs: Folder of all runs.
        device: Device to train on.
        dry_run: True stops after the pre-flight, writes nothing and returns None.
    """
    check_warmup(config.optim.warmup_steps, config.trainer.max_steps)
    store = SliceStore.open(config.data.store)
    preset = load_preset(config.modality)
    labelled = open_labelled(config.data)
    left_out = find_left_out(store, labelled)
    split = pretraining_split(config.data, store, seed=config.seed, run_path=runs / name, left_out=left_out.patients)
    probe_store = open_probe_store(config.probe)
    leaks = [*left_out.lines, *check_leaks(config.data, store, split.train, labelled=labelled, probe=probe_store)]
    dataset = build_training_set(config, store, split.train, preset)

    # Before the first weights are drawn; new heads must not depend on what ran earlier in this process.
    seed_process(config.seed)
    objective, initial_card, restored = build_initial_objective(config)
    monitored = load_monitor_data(config, store, split, probe_store, preset=preset, stride=objective.encoder.stride)
    # Moments fit only together with the decoder and heads that they were gathered for.
    moments = read_moments(config.model.initial_weights) if restored else None
    module = PretrainModule(objective, config, moments=moments)
    inputs = _input_hashes(store, split, probe_store, monitored, base_sha256=initial_card.base_sha256)
    check_run_inputs(runs / name, inputs)
    preflight(config, objective, dataset, split, monitored, leaks=leaks, device=device, run_path=runs / name)
    if dry_run:
        return None

    notes = [*leaks, *restored]
    card = encoder_card(config, initial_card, store=store, split=split, intensity=preset.intensity, notes=notes)
    with RunFolder.open(runs, name, config=config, stage="pretrain") as run:
        record_run_inputs(run, inputs)
        save_run_split(run, split)
        if labelled:
            run.write_run_json(left_out=list(left_out.lines))
        if run.is_writer:
            # Stage 2 must find the split by which patients were left out.
            for labelled_store, _ in labelled:
                keep_drawn_split(labelled_store)
        write_training_state_card(run, card)
        # FSDP replaces the parameters by shards in place, so that export and report need a copy from before.
        unsharded = copy.deepcopy(objective) if config.trainer.strategy is Strategy.FSDP else objective
        result = fit(module, _fit_context(config, run, device, dataset, monitored))
        objective = gather_objective(objective, unsharded)
        encoder, exported = choose_encoder(objective, config, monitored)
        card = dataclasses.replace(card, notes=[*card.notes, *filter(None, [exported.describe()])])
        weights = export_encoder(objective, encoder, run, config, card, result)
        write_report(run, config, objective, monitored, result=result, exported=exported, notes=leaks)
        _log_places(config, run, weights)
    return weights


def _log_places(config: PretrainConfig, run: RunFolder, weights: Path) -> None:
    # The report has printed what the run learned; these are the places of the results.
    log.info("  encoder  %s", weights)
    log.info("  report   %s", run.report)
    log.info("  next     %s", finetune_command(config, str(run.path)))


def _fit_context(
    config: PretrainConfig, run: RunFolder, device: DeviceChoice, dataset: SliceDataset, monitored: MonitorData
) -> FitContext:
    return FitContext(
        config=config.trainer,
        run=run,
        device=device,
        dataset=dataset,
        collate_fn=collate_slices,
        batch_size=config.data.batch_size,
        seed=config.seed,
        ema_decay=config.optim.ema_decay,
        callbacks=[build_schedule(config.optim, max_steps=config.trainer.max_steps)],
        periodic=Monitor(data=monitored, config=config, run_path=run.path).tasks(),
        data_fingerprint=dataset.store.fingerprint,
    )


def _input_hashes(
    store: SliceStore,
    split: Split,
    probe: tuple[SliceStore, Split] | None,
    monitored: MonitorData,
    *,
    base_sha256: str | None,
) -> dict[str, str | None]:
    """Return the hashes of all inputs, which a resumed run checks."""
    return {
        "data_fingerprint": store.fingerprint,
        "split_sha256": split.sha256,
        "base_sha256": base_sha256,
        "probe_store_fingerprint": probe[0].fingerprint if probe else None,
        "probe_split_sha256": probe[1].sha256 if probe else None,
        "drift_decoder_sha256": monitored.box_check.decoder_sha256 if monitored.box_check else None,
    }


def gather_objective(objective: Objective, unsharded: Objective) -> Objective:
    """Return the trained objective with unsharded parameters.

    Args:
        objective: The trained objective, sharded or not.
        unsharded: A copy from before it was sharded, which receives the trained weights.
    """
    if not is_sharded(objective):
        return objective
    load_full_state(unsharded, full_state(objective.state_dict()))
    return unsharded


def build_training_set(
    config: PretrainConfig, store: SliceStore, patient_ids: Sequence[str], preset: ModalityPreset
) -> SliceDataset:
    """Return the augmented slices of the training patients."""
    slices = select_slices(
        store,
        patient_ids,
        planes=config.data.planes,
        min_foreground_fraction=config.data.minimum_foreground(preset),
    )
    return SliceDataset(
        store,
        slices,
        intensity=preset.intensity,
        augment=SliceAugmentation(config.data.augment),
        seed=config.seed,
        num_neighbours=config.data.num_neighbours,
    )
