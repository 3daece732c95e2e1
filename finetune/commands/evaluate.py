"""Command ``samgraft evaluate``, with scores per case and class on the scans' own grids."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samgraft.shared.cli import Command
from samgraft.shared.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from samgraft.finetune.evaluation.evaluate import Evaluation
    from samgraft.finetune.evaluation.evaluation_report import Pictured
    from samgraft.finetune.evaluation.postprocess import PostProcessing
    from samgraft.finetune.evaluation.subgroups import Subgroups
    from samgraft.finetune.model_folder import FinishedModel
    from samgraft.shared.samples.split import Split
    from samgraft.shared.store.names import Names
    from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="RUN_OR_RELEASE", help="a finished stage-2 run or a release")
    parser.add_argument("--data", help="labelled slice store, folder or address; default the run's")
    parser.add_argument("--split-file", type=Path, help="split by patient; default the one of the run")
    parser.add_argument(
        "--split",
        default="test",
        choices=("train", "val", "test", "all"),
        help="part (default test); all scores every patient of a store that was not trained on",
    )
    parser.add_argument("--out", type=Path, help="folder; default RUN/evaluation/PART")
    parser.add_argument("--tolerance-mm", type=float, default=2.0, help="tolerance of the surface Dice (default 2)")
    parser.add_argument(
        "--by", action="append", default=[], help="table per subgroup: site, plane, orientation, slice_spacing"
    )
    parser.add_argument("--groups", type=Path, help="table per subgroup: CSV with patient_id and group")
    parser.add_argument(
        "--choose-postprocessing",
        action="store_true",
        help="first choose largest component and hole filling per class on the validation part, and store the choice",
    )
    parser.add_argument(
        "--no-postprocessing", action="store_true", help="score the segmentation without post-processing"
    )
    parser.add_argument(
        "--log-images",
        action="store_true",
        help="write pictures of the scans into the report; for data that may be shared",
    )
    parser.add_argument(
        "--show-names",
        action="store_true",
        help="show files and patients by name, also in cases.names.csv and report.names.html, which must stay local",
    )
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16", "auto"), help="number format (default fp32)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="slices per forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from samgraft.finetune.evaluation.evaluate import evaluate, write_evaluation, write_named_cases
    from samgraft.finetune.evaluation.evaluation_report import write_evaluation_report
    from samgraft.finetune.evaluation.run_inputs import read_run_inputs, split_for_evaluation
    from samgraft.finetune.model_folder import read_model
    from samgraft.shared.store.names import Names, require_names
    from samgraft.shared.store.store import SliceStore
    from samgraft.shared.training.device import choose_device, retain_freed_memory

    _check(arguments)
    retain_freed_memory()
    path = Path(arguments.model)
    model, inputs = read_model(path), read_run_inputs(path)
    store = SliceStore.open(arguments.data or inputs.require_store())
    names = require_names(store) if arguments.show_names else Names()
    # Without a split file the model is scored on the patients that its run left out. The split next to the store may be
    # another one.
    split, split_sha256 = split_for_evaluation(
        path, model, store, split_file=arguments.split_file, part=arguments.split
    )
    subgroups = _subgroups(arguments, store, split)
    device = choose_device(arguments.device, precision=arguments.precision)
    model.segmenter.to(device.torch_device)
    is_bf16 = device.precision == "bf16-mixed"
    evaluation = evaluate(
        model,
        store,
        split,
        part=arguments.split,
        batch_size=arguments.batch_size,
        tolerance_mm=arguments.tolerance_mm,
        postprocessing=_postprocessing(arguments, model, store, split),
        bf16=is_bf16,
        on_case=partial(_log_case, names),
    )
    provenance = _provenance(model, store, split_sha256, is_bf16=is_bf16)
    # The run's permission covers its own data only, not a store that is given now.
    is_shareable = arguments.log_images or (arguments.data is None and inputs.log_images)
    folder = arguments.out or path / "evaluation" / arguments.split
    write_evaluation(evaluation, folder, provenance=provenance, subgroups=subgroups)
    write_report = partial(
        write_evaluation_report,
        evaluation,
        folder,
        title=path.name,
        provenance=provenance,
        subgroups=subgroups,
        pictured=_pictured(model, store) if is_shareable else None,
    )
    write_report()
    _log_result(evaluation)
    log.info("written: cases.csv, summary.json and report.html in %s", folder)
    if names:
        write_report(names=names)
        log.info(
            "with names, for you only: %s and report.names.html", write_named_cases(evaluation, folder, names).name
        )
    return int(ExitCode.OK)


def _provenance(model: FinishedModel, store: SliceStore, split_sha256: str, *, is_bf16: bool) -> dict[str, Any]:
    return {
        "weights_sha256": model.card.weights_sha256,
        "store_fingerprint": store.fingerprint,
        "split_sha256": split_sha256,
        "precision": "bf16" if is_bf16 else "fp32",
        "prompts": _prompts(model),
    }


def _pictured(model: FinishedModel, store: SliceStore) -> Pictured:
    from samgraft.finetune.evaluation.evaluation_report import Pictured

    return Pictured(store=store, intensity=model.task.inference().intensity, classes=model.task.classes)


def _prompts(model: FinishedModel) -> str:
    """Return the kind of prompts. Prompts from the true labels give scores that no user can reach."""
    prompt = model.task.inference().prompt
    return f"drawn from the true labels ({prompt.mode.value})" if prompt.is_prompted else "none: automatic"


def _check(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.tolerance_mm < float("inf"):
        raise UsageError(f"--tolerance-mm must be a positive length, got {arguments.tolerance_mm:g}.")
    if arguments.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {arguments.batch_size}.")
    if arguments.split == "all" and arguments.split_file:
        raise UsageError("--split all scores every patient, so that --split-file would be ignored. Remove one of them.")
    if arguments.split == "all" and arguments.choose_postprocessing:
        raise UsageError(
            "--choose-postprocessing chooses on validation patients, which --split all does not have. Choose it on the "
            "run's own data first, without --data."
        )
    if arguments.choose_postprocessing and arguments.no_postprocessing:
        raise UsageError("--choose-postprocessing and --no-postprocessing contradict each other. Remove one of them.")


def _subgroups(arguments: argparse.Namespace, store: SliceStore, split: Split) -> list[Subgroups]:
    from samgraft.finetune.evaluation.subgroups import read_subgroups, subgroups_by

    found = [subgroups_by(attribute, store) for attribute in arguments.by]
    if arguments.groups:
        found.append(read_subgroups(arguments.groups, store, patients=split.part(arguments.split)))
    return found


def _postprocessing(
    arguments: argparse.Namespace, model: FinishedModel, store: SliceStore, split: Split
) -> PostProcessing | None:
    """Return the post-processing chosen on validation, now or earlier, or None with ``--no-postprocessing``."""
    from samgraft.finetune.evaluation.evaluate import choose_on_validation
    from samgraft.finetune.evaluation.postprocess import read_postprocessing

    if arguments.no_postprocessing:
        return None
    classes = model.task.classes
    if arguments.choose_postprocessing:
        chosen = choose_on_validation(model, store, split, batch_size=arguments.batch_size)
        path = chosen.write(model.folder)
        log.info("post-processing chosen on %d validation patients: %s (%s)", chosen.num_patients,
                 chosen.describe(classes), path.name)  # fmt: skip
        return chosen
    found = read_postprocessing(model.folder, weights_sha256=model.card.weights_sha256, classes=classes)
    if found.steps:
        log.info("post-processing as chosen on validation: %s", found.describe(classes))
    return found


def _log_case(names: Names, number: int, total: int, rows: Any) -> None:
    for row in rows:
        dice, distance = row["dice"], row["hd95_mm"]
        log.info("%d/%d %s %s: Dice %s, HD95 %s mm (%d voxels true, %d predicted)", number, total,
                 names.scan(row["series_id"]), row["class"], "n/a" if dice is None else f"{dice:.3f}",
                 "n/a" if distance is None else f"{distance:.1f}", row["true_voxels"],
                 row["predicted_voxels"])  # fmt: skip


def _log_result(evaluation: Evaluation) -> None:
    from samgraft.finetune.evaluation.scores import METRICS, count_one_sided, interval_of

    for metric in METRICS:
        interval = interval_of(evaluation.rows, metric.key)
        log.info("%s, %s: %s", evaluation.part, metric.title, interval.render() if interval else "n/a")
    for warning in evaluation.warnings:
        log.warning("%s", warning)
    if one_sided := count_one_sided(evaluation.rows):
        log.info("%d of %d rows are missed or have no truth: Dice is 0 and distances are the scan's diagonal",
        one_sided, len(evaluation.rows))  # fmt: skip


COMMAND = Command(help="scores per case and class, with intervals over patients", add_arguments=add_arguments, run=run)
