"""Command ``samgraft evaluate``, with scores per case and class on the scans' own grids."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samgraft.shared.cli import Command, keywords
from samgraft.shared.counting import counted
from samgraft.shared.errors import ExitCode, UsageError
from samgraft.shared.invocation import log_next

if TYPE_CHECKING:
    from pandas import DataFrame
    from samgraft.finetune.evaluation.evaluate import Evaluation
    from samgraft.finetune.evaluation.evaluation_report import Pictured
    from samgraft.finetune.evaluation.postprocess import PostProcessing
    from samgraft.finetune.evaluation.subgroups import Subgroups
    from samgraft.finetune.model_folder import FinishedModel
    from samgraft.shared.samples.split import Split
    from samgraft.shared.store.names import Names
    from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="RUN_OR_RELEASE", help="a finished stage-2 run or a release")
    parser.add_argument("--data", help="labelled slice store, folder or address; default the run's")
    parser.add_argument("--split-file", type=Path, help="split by patient; default the one of the run")
    parser.add_argument(
        "--split",
        default="test",
        choices=PARTS,
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
        "--no-postprocessing",
        dest="postprocessing",
        action="store_false",
        help="score the segmentation without post-processing",
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
        "--precision",
        default="auto",
        choices=("auto", "bf16", "fp32"),
        help="number format; auto is that of predict on this machine, fp32 gives equal scores on all machines",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="slices per forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Scores of a model on one part of a split."""

    path: Path
    """Folder with ``cases.csv``, ``summary.json`` and the report."""

    @property
    def report(self) -> Path:
        """Path of the HTML report."""
        return self.path / "report.html"

    @property
    def cases(self) -> DataFrame:
        """Table with one row per scan and class."""
        import pandas as pd
        from samgraft.finetune.evaluation.scores import read_cases

        return pd.DataFrame(read_cases(self.path / "cases.csv"))

    @property
    def summary(self) -> dict[str, Any]:
        """Means with intervals over patients, and what was evaluated."""
        return dict(json.loads((self.path / "summary.json").read_text(encoding="utf-8")))


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    evaluate(**keywords(arguments))
    return int(ExitCode.OK)


def evaluate(
    model: Path | str,
    *,
    data: Path | str | None = None,
    split_file: Path | str | None = None,
    split: str = "test",
    out: Path | str | None = None,
    tolerance_mm: float = 2.0,
    by: Sequence[str] = (),
    groups: Path | str | None = None,
    choose_postprocessing: bool = False,
    postprocessing: bool = True,
    log_images: bool = False,
    show_names: bool = False,
    precision: str = "auto",
    batch_size: int = 8,
    device: str = "auto",
) -> EvaluationResult:
    """Score a finished run or a release on labelled scans, on the scans' own grids.

    Args:
        model: Finished stage-2 run or release.
        data: Labelled slice store, folder or address; None takes the run's.
        split_file: Split by patient; None takes the run's.
        split: Part of the split, or ``all`` patients of a store that was not trained on.
        out: Folder for the results; None takes ``RUN/evaluation/PART``.
        tolerance_mm: Tolerance of the surface Dice.
        by: Attributes for tables of subgroups, among ``site``, ``plane``, ``orientation`` and ``slice_spacing``.
        groups: CSV with ``patient_id`` and ``group`` for another such table.
        choose_postprocessing: Choose the post-processing on the validation part first, and store the choice.
        postprocessing: Apply the post-processing that was chosen.
        log_images: Put pictures of the scans into the report, for data that may be shared.
        show_names: Show files and patients by name, in further files that must stay local.
        precision: ``auto``, which is that of ``predict`` on this machine, ``bf16`` or ``fp32``.
        batch_size: Slices per forward pass.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        SamgraftError: If the model or the data cannot be read, or training patients are in the part.
    """
    _check(tolerance_mm, batch_size, choose=choose_postprocessing, apply=postprocessing)
    _check_part(split, split_file=split_file, choose=choose_postprocessing)
    folder = Path(out) if out else Path(model) / "evaluation" / split
    scored = _Scored.load(Path(model), data, split_file, part=split, device=device, precision=precision)
    names = _read_names(scored.store) if show_names else None
    subgroups = _subgroups(by, groups, scored)
    # Chosen before the first test scan is read.
    steps = _postprocessing(scored, batch_size, choose=choose_postprocessing) if postprocessing else None
    evaluation = _score(scored, names, batch_size=batch_size, tolerance_mm=tolerance_mm, postprocessing=steps)
    _write(evaluation, scored, folder, subgroups=subgroups, log_images=log_images, names=names)
    log_next(log, next_commands(Path(model), str(Path(model))))
    return EvaluationResult(path=folder)


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """Model and scans of one evaluation."""

    path: Path
    model: FinishedModel
    store: SliceStore
    split: Split
    split_sha256: str
    part: str
    is_bf16: bool
    may_be_shown: bool
    """Permission of the run to show pictures of its own data."""

    @classmethod
    def load(
        cls,
        path: Path,
        data: Path | str | None,
        split_file: Path | str | None,
        *,
        part: str,
        device: str,
        precision: str,
    ) -> _Scored:
        """Read the model and open its scans."""
        from samgraft.finetune.evaluation.run_inputs import read_run_inputs, split_for_evaluation
        from samgraft.finetune.model_folder import read_model
        from samgraft.shared.store.store import SliceStore
        from samgraft.shared.training.device import choose_device, retain_freed_memory

        retain_freed_memory()
        model = read_model(path)
        inputs = read_run_inputs(path)
        store = SliceStore.open(data or inputs.require_store())
        # Without a split file the model is scored on the patients that its run left out. The split next to the store
        # may be another one.
        split, split_sha256 = split_for_evaluation(
            path, model, store, split_file=Path(split_file) if split_file else None, part=part
        )
        choice = choose_device(device, precision=precision)
        log.info("device: %s", choice.reason)
        model.segmenter.to(choice.torch_device)
        return cls(
            path=path,
            model=model,
            store=store,
            split=split,
            split_sha256=split_sha256,
            part=part,
            is_bf16=choice.precision == "bf16-mixed",
            # The permission covers the run's own data only, not a store that is given now.
            may_be_shown=data is None and inputs.log_images,
        )


def _read_names(store: SliceStore) -> Names:
    from samgraft.shared.store.names import require_names

    return require_names(store)


def _score(
    scored: _Scored, names: Names | None, *, batch_size: int, tolerance_mm: float, postprocessing: PostProcessing | None
) -> Evaluation:
    from samgraft.finetune.evaluation.evaluate import evaluate as score

    return score(
        scored.model,
        scored.store,
        scored.split,
        part=scored.part,
        batch_size=batch_size,
        tolerance_mm=tolerance_mm,
        postprocessing=postprocessing,
        bf16=scored.is_bf16,
        on_case=partial(_log_case, names),
    )


def _write(
    evaluation: Evaluation,
    scored: _Scored,
    folder: Path,
    *,
    subgroups: Sequence[Subgroups],
    log_images: bool,
    names: Names | None,
) -> None:
    from samgraft.finetune.evaluation.evaluate import write_evaluation, write_named_cases
    from samgraft.finetune.evaluation.evaluation_report import write_evaluation_report
    from samgraft.shared.report.page import path_for_report

    provenance = {
        "weights_sha256": scored.model.card.weights_sha256,
        "store_fingerprint": scored.store.fingerprint,
        "split_sha256": scored.split_sha256,
        "precision": "bf16" if scored.is_bf16 else "fp32",
        "prompts": _prompts(scored.model),
    }
    write_evaluation(evaluation, folder, provenance=provenance, subgroups=subgroups)
    write_report = partial(
        write_evaluation_report,
        evaluation,
        folder,
        title=scored.path.name,
        provenance=provenance,
        subgroups=subgroups,
        pictured=_pictured(scored) if log_images or scored.may_be_shown else None,
        next_commands=next_commands(scored.path, path_for_report(scored.path)),
    )
    write_report()
    _log_result(evaluation)
    log.info("written: cases.csv, summary.json and report.html in %s", folder)
    if names:
        write_report(names=names)
        log.info(
            "with names, for you only: %s and report.names.html", write_named_cases(evaluation, folder, names).name
        )


def _pictured(scored: _Scored) -> Pictured:
    from samgraft.finetune.evaluation.evaluation_report import Pictured

    task = scored.model.task
    return Pictured(store=scored.store, intensity=task.inference().intensity, classes=task.classes)


def _prompts(model: FinishedModel) -> str:
    """Return the kind of prompts. Prompts from the true labels give scores that no user can reach."""
    prompt = model.task.inference().prompt
    return f"drawn from the true labels ({prompt.mode.value})" if prompt.is_prompted else "none: automatic"


def _check(tolerance_mm: float, batch_size: int, *, choose: bool, apply: bool) -> None:
    if not 0 < tolerance_mm < float("inf"):
        raise UsageError(f"--tolerance-mm must be a positive length, got {tolerance_mm:g}.")
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}.")
    if choose and not apply:
        raise UsageError("--choose-postprocessing and --no-postprocessing contradict each other. Remove one of them.")


def _check_part(part: str, *, split_file: Path | str | None, choose: bool) -> None:
    if part not in PARTS:
        raise UsageError(f"--split must be one of {', '.join(PARTS)}, got {part!r}.")
    if part == "all" and split_file:
        raise UsageError("--split all scores every patient, so that --split-file would be ignored. Remove one of them.")
    if part == "all" and choose:
        raise UsageError(
            "--choose-postprocessing chooses on validation patients, which --split all does not have. Choose it on the "
            "run's own data first, without --data."
        )


def _subgroups(by: Sequence[str], groups: Path | str | None, scored: _Scored) -> list[Subgroups]:
    from samgraft.finetune.evaluation.subgroups import read_subgroups, subgroups_by

    found = [subgroups_by(attribute, scored.store) for attribute in by]
    if groups:
        found.append(read_subgroups(Path(groups), scored.store, patients=scored.split.part(scored.part)))
    return found


def _postprocessing(scored: _Scored, batch_size: int, *, choose: bool) -> PostProcessing:
    """Return the post-processing chosen on validation, now or earlier."""
    from samgraft.finetune.evaluation.evaluate import choose_on_validation
    from samgraft.finetune.evaluation.postprocess import read_postprocessing

    model, classes = scored.model, scored.model.task.classes
    if choose:
        chosen = choose_on_validation(model, scored.store, scored.split, batch_size=batch_size)
        path = chosen.write(model.folder)
        patients = counted(chosen.num_patients, "validation patient")
        log.info("post-processing chosen on %s: %s (%s)", patients, chosen.describe(classes), path.name)
        return chosen
    found = read_postprocessing(model.folder, weights_sha256=model.card.weights_sha256, classes=classes)
    if found.steps:
        log.info("post-processing as chosen on validation: %s", found.describe(classes))
    return found


def _log_case(names: Names | None, number: int, total: int, rows: Any) -> None:
    for row in rows:
        dice, distance = row["dice"], row["hd95_mm"]
        scan = names.scan(row["series_id"]) if names else row["series_id"]
        log.info("%d/%d %s %s: Dice %s, HD95 %s mm (%d voxels true, %d predicted)", number, total,
                 scan, row["class"], "n/a" if dice is None else f"{dice:.3f}",
                 "n/a" if distance is None else f"{distance:.1f}", row["true_voxels"],
                 row["predicted_voxels"])  # fmt: skip


def _log_result(evaluation: Evaluation) -> None:
    from samgraft.finetune.evaluation.scores import METRICS, count_one_sided

    for metric in METRICS:
        interval = evaluation.intervals[None, metric.key]
        log.info("%s, %s: %s", evaluation.part, metric.title, interval.render() if interval else "n/a")
    for warning in evaluation.warnings:
        log.warning("%s", warning)
    if one_sided := count_one_sided(evaluation.rows):
        log.info("%d of %d rows are missed or have no truth: Dice is 0 and distances are the scan's diagonal",
        one_sided, len(evaluation.rows))  # fmt: skip


def next_commands(model: Path, shown: str) -> list[str]:
    """Return the commands that use an evaluated model, under the path that is shown."""
    from samgraft.finetune.task import Task
    from samgraft.finetune.training.report import release_command

    commands = [f"make predict RUN={shlex.quote(shown)} DATA=SCANS OUT=masks"]
    # A release was made from a run, and is not released again. That of a model that failed would be refused.
    if (model / "model").is_dir() and Task.read(model / "model").warning is None:
        commands.append(release_command(shown))
    return commands


COMMAND = Command(help="scores per case and class, with intervals over patients", add_arguments=add_arguments, run=run)
