"""Fine-tuning from prepared data to the merged model and its report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from samgraft.finetune.adapters import (
    RankUpdates,
    merge_adapters,
    save_adapter,
    trainable_groups,
    trainable_table,
    trainable_tensors,
)
from samgraft.finetune.adapters.eva import initialise_eva
from samgraft.finetune.baselines.networks import RandomWeights
from samgraft.finetune.baselines.volume_patches import VolumePatches
from samgraft.finetune.config import FinetuneConfig, Schedule
from samgraft.finetune.ending import Ending
from samgraft.finetune.evaluation.evaluate import dice_per_class, summarise, write_evaluation
from samgraft.finetune.evaluation.overlays import choose_slices, overlay, slice_pictures
from samgraft.finetune.evaluation.validation import CaseResult, mean_dice, score_scans
from samgraft.finetune.few_shot import may_end
from samgraft.finetune.initial_weights import InitialWeights
from samgraft.finetune.model_folder import ADAPTER_FOLDER, write_model
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.task import Task
from samgraft.finetune.training.cached_slices import CachedSlices, collate_cached
from samgraft.finetune.training.module import FinetuneModule
from samgraft.finetune.training.preparation import Prepared, describe, prepare, use_cached_embeddings
from samgraft.finetune.training.report import short_training, write_report
from samgraft.finetune.training.rounds import ValidationRounds
from samgraft.finetune.training.unlabelled import joined_manifest
from samgraft.shared.config import config_sha256, config_to_dict
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.runs.environment import code_revision
from samgraft.shared.runs.inputs import check_run_inputs, record_run_inputs, save_run_split
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.samples.dataset import JoinedSamples, SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.leaks import pretrain_manifest
from samgraft.shared.samples.split import keep_drawn_split
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.optim import LearningRate
from samgraft.shared.training.periodic import PeriodicTask, TaskContext
from samgraft.shared.training.preflight import StepCost, measure_step
from samgraft.shared.training.resume import preserve_rng, seed_process
from samgraft.shared.training.trainer import FitContext, FitResult, fit
from samgraft.shared.weights.card import Card
from torch import nn
from torch.utils.data import default_collate

log = logging.getLogger(__name__)

POLY_POWER = 0.9
"""Power of the study's polynomial schedule."""
EVA_SLICES = 16
"""Number of training slices from which eva computes its initial factors."""
MERGE_TOLERANCE = 1e-3
"""Largest absolute difference of logits, which span tens, between the adapted and the merged model in float32."""


def finetune(config: FinetuneConfig, run: RunFolder, device: DeviceChoice, prepared: Prepared) -> Path:
    """Fine-tune SAM on labelled slices and return the folder of the finished model.

    Args:
        config: Settings of the run.
        run: Open run folder. A run in it is resumed.
        device: Device to train on.
        prepared: Result of ``prepare`` with the same settings.
    """
    record_run_inputs(run, _inputs(prepared))
    if not config.data.split:
        save_run_split(run, prepared.split)
        if run.is_writer:
            keep_drawn_split(prepared.store)
    run.write_run_json(**_provenance(prepared), world_size=device.world_size)
    rounds = ValidationRounds(run.path, is_writer=run.is_writer)
    if run.is_writer and rounds.record.zero_shot is None and isinstance(prepared.initial, InitialWeights):
        _record_zero_shot(prepared, prepared.initial, config, rounds, device)
    if isinstance(prepared.initial, InitialWeights):
        prepared = use_cached_embeddings(prepared, config, device)
    # A resumed run has these factors in its training state.
    if prepared.peft_model and config.adapter.spec.uses_training_slices and run.latest_training_state() is None:
        initialise_from_slices(prepared, config, device)
    module = FinetuneModule(
        prepared.segmenter, config, prepared.classes, rank_updates=RankUpdates.of(prepared.peft_model)
    )
    result = _fit(module, config, run, device, prepared, rounds)
    # Merging, scores and the report need one process only.
    if not run.is_writer:
        return run.path / "model"
    sam = restore_best(prepared, rounds, device.torch_device)
    trainable, groups = trainable_table(sam), trainable_groups(sam)
    results = score_scans(prepared.segmenter, prepared.store, prepared.val_series, prepared.classes, prepared.inference)
    # Merged and written in float32 on a CPU: the lower precision of a GPU would look like a failed merge.
    prepared.segmenter.cpu()
    folder = write_finished(sam, prepared, config, run, rounds, trainable=trainable, result=result)
    evaluation = summarise(results, prepared.store, prepared.classes, part="val")
    write_evaluation(evaluation, run.path / "evaluation" / "val", provenance={"chosen_on": "this part"})
    speed = result.slices_per_s
    write_report(run, config, prepared, rounds.record, results, trainable=trainable, groups=groups, slices_per_s=speed)
    rounds.delete_others()
    best = {"best_step": rounds.record.best_step, "best_dice": round(mean_dice(results) or 0.0, 4)}
    run.mark_complete(**best, world_size=result.world_size)
    ending = rounds.record.ending
    log.log(logging.INFO if ending.is_good else logging.WARNING, "%s", ending.text)
    if (short := short_training(config, prepared)) is not None:
        log.info("%s", short)
    return folder


def _fit(
    module: FinetuneModule,
    config: FinetuneConfig,
    run: RunFolder,
    device: DeviceChoice,
    prepared: Prepared,
    rounds: ValidationRounds,
) -> FitResult:
    dataset = prepared.dataset
    return fit(
        module,
        FitContext(
            config=config.trainer,
            run=run,
            device=device,
            dataset=dataset,
            collate_fn=_collate(dataset),
            batch_size=config.data.batch_size,
            seed=config.seed,
            # Few labelled slices among many others would be rare in batches that are drawn from all of them.
            batch_parts=dataset.parts if isinstance(dataset, JoinedSamples) else (),
            ema_decay=config.optim.ema_decay,
            callbacks=[_learning_rate(config)],
            periodic=[_validation(prepared, config, rounds)],
            data_fingerprint=prepared.store.fingerprint,
        ),
    )


def _record_zero_shot(
    prepared: Prepared,
    weights: InitialWeights,
    config: FinetuneConfig,
    rounds: ValidationRounds,
    device: DeviceChoice,
) -> None:
    dice = rounds.set_reference("zero_shot", measure_zero_shot(prepared, weights, device.torch_device))
    prompts = f"{config.prompt.mode.value} prompts from the labels" if config.prompt.is_prompted else "no prompt"
    log.info("validation Dice of the base weights without training, %s (zero-shot): %.3f", prompts, dice)


def prepare_seeded(config: FinetuneConfig, *, run_path: Path | None = None) -> Prepared:
    """Prepare a run with adapter weights drawn from its seed. The caller's random generators do not change."""
    with preserve_rng():
        seed_process(config.seed)
        prepared = prepare(config, run_path=run_path)
    if run_path is not None:
        check_run_inputs(run_path, _inputs(prepared))
    return prepared


def measure_cost(prepared: Prepared, config: FinetuneConfig, device: DeviceChoice) -> StepCost:
    """Measure one training step on the first batch."""
    module = FinetuneModule(prepared.segmenter, config, prepared.classes).to(device.torch_device)
    batch_size, dataset = config.data.batch_size, prepared.dataset
    batch = _collate(dataset)([dataset[index, index] for index in range(batch_size)])
    if "volume" in batch:
        batch = {key: value.to(device.torch_device) for key, value in batch.items()}
    was_training = module.training
    cost = measure_step(
        module.train(),
        lambda: module.training_step(batch, 0)["loss"],
        config=config.trainer,
        device=device,
        batch_size=batch_size,
    )
    module.train(was_training)
    return cost


def initialise_from_slices(prepared: Prepared, config: FinetuneConfig, device: DeviceChoice) -> None:
    """Set the initial factors of eva from training slices, evenly spaced and without augmentation."""
    assert prepared.peft_model is not None
    segmenter = prepared.segmenter.to(device.torch_device).eval()
    dataset = _labelled_part(prepared.dataset)
    if not isinstance(dataset, SliceDataset):
        raise UsageError(
            "adapter.method=eva needs the encoder's activations, which cached embeddings do not have. Use "
            "cache.variants=0."
        )
    plain = dataset.without_augmentation()
    chosen = range(0, len(plain), max(1, len(plain) // EVA_SLICES))
    images = [
        batch_to_input(
            collate_slices([plain[index, 0]]),
            image_size=segmenter.image_size,
            keep_aspect=config.data.keep_aspect,
            device=device.torch_device,
        )[0]
        for index in chosen
    ]
    # The randomised decomposition must not change the random numbers of the training that follows.
    with preserve_rng():
        seed_process(config.seed)
        initialise_eva(prepared.peft_model, segmenter, images)


def measure_zero_shot(prepared: Prepared, weights: InitialWeights, device: torch.device) -> list[CaseResult]:
    """Score the base weights without training on the validation scans."""
    sam = weights.build_base()
    segmenter = Segmenter(sam, num_classes=min(prepared.classes.num_classes, sam.mask_decoder.num_multimask_outputs))
    return score_scans(segmenter.to(device), prepared.store, prepared.val_series, prepared.classes, prepared.inference)


def restore_best(prepared: Prepared, rounds: ValidationRounds, device: torch.device) -> nn.Module:
    """Load the tensors of the best round into the model, on the device, and return its network.

    Raises:
        WeightsError: If they are not exactly the trained tensors.
    """
    segmenter = prepared.segmenter.to(device).eval()
    best = load_file(rounds.best_file())
    trained = trainable_tensors(segmenter.network)
    if set(best) != set(trained):
        odd = sorted(set(best) ^ set(trained))
        raise WeightsError(
            f"the tensors of the best round do not fit the model ({len(odd)} differ, e.g. {odd[0]}). Train again with "
            "another NAME=.",
            where="best/",
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best[name])
    return segmenter.network


def write_finished(
    sam: nn.Module,
    prepared: Prepared,
    config: FinetuneConfig,
    run: RunFolder,
    rounds: ValidationRounds,
    *,
    trainable: list[tuple[str, int, int]],
    result: FitResult,
) -> Path:
    """Write the adapter and the merged model, and return their folder. ``prepared`` then has the merged model."""
    folder = run.path / "model"
    card = finished_card(prepared, config, result=result, ending=rounds.record.ending)
    task = finished_task(prepared, config, rounds, trainable={p: round(t / 1e6, 4) for p, t, _ in trainable})
    memory = prepared.initial.base.memory if isinstance(prepared.initial, InitialWeights) else {}
    if prepared.peft_model is None:
        write_model(sam, folder, card=card, task=task, memory=memory)
        return folder
    save_adapter(prepared.peft_model, folder / ADAPTER_FOLDER, method=config.adapter.method)
    if config.adapter.spec.is_mergeable:
        sam = _merge_and_compare(prepared, folder)
        write_model(sam, folder, card=card, task=task, memory=memory)
    else:
        log.info("%s cannot be merged: the model is kept as base weights with an adapter", config.adapter.method)
        write_model(sam, folder, card=card, task=task, is_merged=False, memory=memory)
    return folder


def _merge_and_compare(prepared: Prepared, folder: Path) -> nn.Module:
    """Merge the updates and check that the outputs stay equal. ``prepared`` then has the merged model."""
    assert prepared.peft_model is not None
    size = prepared.segmenter.image_size
    # Noise excites every layer, and a fixed seed makes the logged difference comparable between runs.
    images = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        adapted = prepared.segmenter(images)
    sam: nn.Module = merge_adapters(prepared.peft_model)
    prepared.segmenter.sam = sam
    with torch.inference_mode():
        difference = float((prepared.segmenter(images) - adapted).abs().max())
    # Written so that a NaN difference fails too.
    if not difference <= MERGE_TOLERANCE:
        raise WeightsError(
            f"the merged model differs from the adapted one (logits by {difference:.1e}, expected at most "
            f"{MERGE_TOLERANCE:.0e}).",
            where=folder.name,
            kept="the adapter, in model/adapter",
        )
    log.info("adapters merged: logits differ by %.1e at most", difference)
    return sam


def finished_card(prepared: Prepared, config: FinetuneConfig, *, result: FitResult, ending: Ending) -> Card:
    """Return the card of the fine-tuned model, with the history of its encoder."""
    further = prepared.further
    manifest = pretrain_manifest(prepared.store, prepared.split.train)
    if further is not None:
        manifest = joined_manifest(prepared.store, prepared.split.train, further)
    initial = prepared.initial
    if initial.encoder.card and initial.encoder.card.data_manifest:
        manifest["pretraining"] = initial.encoder.card.data_manifest
    notes = [*initial.card.notes]
    if further is not None:
        notes.append(f"self-training: {further.describe()}")
    if prepared.transductive:
        notes.append("transductive: validation or test patients were among the unlabelled training scans")
    if planes := prepared.inference.planes:
        notes.append(f"scores are of the mean probability of {len(planes)} planes; exported networks segment one plane")
    if not ending.is_good:
        notes.append(ending.text)
    return dataclasses.replace(
        initial.card,
        stage="model",
        steps=result.step,
        slices_seen=result.slices_seen,
        slices_available=result.slices_available,
        intensity=prepared.inference.intensity.to_dict(),
        num_neighbours=prepared.inference.num_neighbours,
        base_name=initial.base.name,
        base_sha256=initial.base.sha256,
        data_manifest=manifest,
        config_sha256=config_sha256(config),
        code_revision=code_revision(),
        notes=notes,
        weights_sha256=None,
    )


def finished_task(
    prepared: Prepared, config: FinetuneConfig, rounds: ValidationRounds, *, trainable: dict[str, float]
) -> Task:
    """Return the task of the fine-tuned model, with its Dice on validation."""
    split = prepared.split
    return Task(
        class_ids=list(prepared.classes.ids),
        class_names=list(prepared.classes.names),
        class_members=[list(labels) for labels in prepared.classes.members],
        modality=prepared.store.modality.value,
        image_size=prepared.segmenter.image_size,
        keep_aspect=config.data.keep_aspect,
        intensity=prepared.inference.intensity.to_dict(),
        num_neighbours=prepared.inference.num_neighbours,
        planes=[plane.value for plane in prepared.inference.planes],
        store_fingerprint=prepared.store.fingerprint,
        split_sha256=split.sha256,
        split={"train": list(split.train), "val": list(split.val), "test": list(split.test)},
        network=prepared.initial.plan if isinstance(prepared.initial, RandomWeights) else {},
        prompt=config_to_dict(config.prompt) if config.prompt.is_prompted else {},
        transductive=prepared.transductive,
        trainable_millions=trainable,
        validation=rounds.record.summary(),
    )


def _validation(prepared: Prepared, config: FinetuneConfig, rounds: ValidationRounds) -> PeriodicTask:
    def run_round(boundary: TaskContext) -> Mapping[str, float]:
        results = []
        # Scan by scan, so that a stop signal does not wait for the whole round.
        for series_id in prepared.val_series:
            boundary.check_stop()
            results += score_scans(
                prepared.segmenter, prepared.store, [series_id], prepared.classes, prepared.inference
            )
        if boundary.step == 0:
            dice = rounds.set_reference("start", results)
            log.info("validation Dice before training: %.3f", dice)
        else:
            # A resumed run repeats this round, so a later one in the file comes from before a kill.
            rounds.remove_after(boundary.step - 1)
            dice = rounds.add(boundary.step, results, lambda: _detached(prepared.segmenter.network))
            best = rounds.record.best_step
            log.info("step %d: validation Dice %.3f (best %.3f, step %s)", boundary.step, dice,
                     rounds.record.rounds[best] if best is not None else dice, best)  # fmt: skip
            if may_end(
                rounds.record.rounds,
                patience_rounds=config.watch.patience_rounds,
                min_steps=config.watch.min_steps,
                warmup_steps=config.optim.warmup_steps,
            ):
                boundary.end_training(f"{config.watch.patience_rounds} validation rounds had no higher Dice")
        if config.watch.log_images:
            for number, result in enumerate(results):
                boundary.add_image(f"images/val_{number}", _panel(prepared, result, number=config.watch.num_overlays))
        return {"val/dice": dice, **{f"val/dice/{name}": mean for name, mean in dice_per_class(results).items()}}

    return PeriodicTask(
        name="validation", every_steps=config.watch.validate_every_n_steps, run=run_round, at_start=True, at_end=True
    )


def _panel(prepared: Prepared, result: CaseResult, *, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    true = prepared.store.read_label_volume(result.series_id)
    indexes = choose_slices(true, number=number)
    pictures = slice_pictures(prepared.store, result.series_id, indexes, intensity=prepared.inference.intensity)
    tiles = [
        overlay(image, true_HW=label, predicted_HW=result.predicted[index])
        for index, (image, label) in zip(indexes, pictures, strict=True)
    ]
    return (np.concatenate(tiles, axis=1) * 255).round().astype(np.uint8)


def _collate(dataset: object) -> Callable[[Any], Any]:
    if isinstance(dataset, CachedSlices):
        return collate_cached
    return default_collate if isinstance(_labelled_part(dataset), VolumePatches) else collate_slices


def _labelled_part(dataset: object) -> object:
    """Return the training samples with labels, without those of a self-training."""
    return dataset.datasets[0] if isinstance(dataset, JoinedSamples) else dataset


def _learning_rate(config: FinetuneConfig) -> LearningRate:
    return LearningRate(
        # A run shorter than the warm-up still ends at the full learning rate.
        warmup_steps=min(config.optim.warmup_steps, config.trainer.max_steps - 1),
        max_steps=config.trainer.max_steps,
        final_factor=config.optim.final_lr_factor,
        poly_power=POLY_POWER if config.schedule is Schedule.POLY else None,
    )


def _inputs(prepared: Prepared) -> dict[str, str | None]:
    """Return the hashes of the inputs. A run refuses to resume when one of them has changed."""
    inputs: dict[str, str | None] = {
        "store_fingerprint": prepared.store.fingerprint,
        "split_sha256": prepared.split.sha256,
        "encoder_sha256": prepared.initial.encoder.sha256,
        "base_sha256": prepared.initial.base.sha256,
    }
    return inputs | (prepared.further.inputs if prepared.further else {})


def _provenance(prepared: Prepared) -> dict[str, Any]:
    return {
        "tensors": [report.to_dict() for report in prepared.reports],
        "preflight": describe(prepared),
        "trains": [dataclasses.asdict(group) for group in trainable_groups(prepared.segmenter.network)],
    }


def _detached(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in trainable_tensors(network).items()}
