"""Run of a self-training, round by round, with each fine-tuning in a process of its own.

runs/NAME/round-1/teachers/lora      run of a teacher
runs/NAME/round-1/pseudo_labels.zarr pseudo-labels of the round
runs/NAME/round-1/student            run of the student, if more rounds follow
runs/NAME                            run of the last student, an ordinary fine-tuning
runs/NAME/selftraining.html          report on teachers, pseudo-labels and students
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.ending import describe_ending
from samgraft.finetune.model_folder import FinishedModel, read_model
from samgraft.finetune.selftraining.cost import describe_costs, measure_part, measure_teacher
from samgraft.finetune.selftraining.labelling import label_scans
from samgraft.finetune.selftraining.parts import Part, Round, Teacher, as_plain_finetuning, plan_rounds
from samgraft.finetune.selftraining.report import write_report
from samgraft.finetune.study.cell_run import Processes, Runner, find_error, run_samgraft, wait_for_orphan
from samgraft.finetune.study.schedule import forward_stop_signals
from samgraft.finetune.task import Task
from samgraft.finetune.training.preparation import Prepared, describe_data, open_unlabelled
from samgraft.finetune.training.train import prepare_seeded
from samgraft.finetune.training.unlabelled import UnlabelledScans, choose_unlabelled
from samgraft.shared.config import config_to_yaml
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, ExitCode, SamgraftError, StoppedAndSaved, UsageError
from samgraft.shared.files import write_text
from samgraft.shared.machine import threads_per_process
from samgraft.shared.runs.inputs import record_run_inputs, save_run_split
from samgraft.shared.runs.run_folder import RunFolder, check_run_folder, read_run_json
from samgraft.shared.samples.split import Split
from samgraft.shared.training.device import DeviceChoice

log = logging.getLogger(__name__)


class PartFailed(SamgraftError):
    """Failure of a fine-tuning of a self-training. Its exit code is that of its process."""

    def __init__(self, part: Part, log_file: Path, *, code: int) -> None:
        super().__init__(
            f"{part.name} failed: {find_error(log_file)}",
            where=str(log_file),
            kept="every complete part and the last training states of the others",
            next_command="fix the cause and run the same command: complete parts are not run again",
        )
        # A negative code is the number of the signal that killed the process.
        self.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.INTERRUPTED


@dataclass(frozen=True, kw_only=True)
class SelftrainingPlan:
    """Self-training that is ready to run."""

    config: FinetuneConfig
    path: Path
    """Folder of the run."""
    rounds: tuple[Round, ...]
    scans: UnlabelledScans
    inputs: dict[str, str | None]
    """Hashes of the data, which a resumed run must have again."""
    split: Split
    lines: tuple[str, ...]
    """Pre-flight lines on the data and, if it was measured, the cost."""

    @property
    def parts(self) -> list[Part]:
        """All fine-tunings in order."""
        return [*self.rounds[0].trained_teachers, *(one.student for one in self.rounds)]


def plan_selftraining(
    config: FinetuneConfig, path: Path, device: DeviceChoice, *, measure: bool = True
) -> SelftrainingPlan:
    """Check data, weights and settings of every part, and measure its cost. Nothing is written.

    Args:
        config: Settings of the student, with teachers in the section ``selftrain``.
        path: Folder of the run.
        device: Device to measure on.
        measure: Measure the cost.

    Raises:
        SamgraftError: If data, weights and settings of a part do not fit.
    """
    rounds = plan_rounds(config, path)
    check_run_folder(path.parent, path.name, config=rounds[-1].student.config, stage="finetune")
    # Without pseudo-labels, which do not exist yet, a step of the student costs the same.
    plain = dataclasses.replace(rounds[-1].student, config=as_plain_finetuning(config))
    ready = prepare_seeded(plain.config, run_path=path)
    unlabelled = open_unlabelled(config, ready.store)
    scans = choose_unlabelled(unlabelled, ready.store, ready.split, allow_transductive=config.data.allow_transductive)
    costs = [measure_part(plain, ready, scans, device)] if measure else []
    for teacher in rounds[0].teachers:
        if isinstance(teacher, Part):
            with _without_info():
                prepared = prepare_seeded(teacher.config, run_path=teacher.path)
            costs += [measure_part(teacher, prepared, scans, device)] if measure else []
        else:
            model = _read_finished(teacher, ready, allow_transductive=config.data.allow_transductive)
            costs += [measure_teacher(teacher, model, scans, device)] if measure else []
    passes = 1 + config.selftrain.flips
    cost_lines = describe_costs(costs, rounds, num_slices=scans.num_slices, passes=passes) if measure else []
    return SelftrainingPlan(
        config=config,
        path=path,
        rounds=tuple(rounds),
        scans=scans,
        inputs={
            "store_fingerprint": ready.store.fingerprint,
            "split_sha256": ready.split.sha256,
            **scans.inputs,
        },
        split=ready.split,
        lines=(*describe_data(ready), f"unlabelled: {scans.describe()}", *cost_lines),
    )


def _read_finished(teacher: Teacher, ready: Prepared, *, allow_transductive: bool) -> FinishedModel:
    """Read a finished run that is to be a teacher.

    Raises:
        SamgraftError: If it has no finished model, other classes, or may have seen validation or test patients.
    """
    where = f"selftrain.teachers, {teacher.path.name}"
    record = read_run_json(teacher.path)
    if record.get("stage") != "finetune" or not record.get("complete"):
        raise UsageError("a teacher given by its path must be a finished fine-tuning. Give another run.", where=where)
    model = read_model(teacher.path)
    if model.task.classes != ready.classes or model.task.inference().prompt.is_prompted:
        raise UsageError(
            f"a teacher must segment the classes {', '.join(ready.classes.names)} without prompts, got "
            f"{', '.join(model.task.classes.names)}. Give another run.",
            where=where,
        )
    # Other parts would make its Dice incomparable with the student's, and its labels could come from test patients.
    differing = [part for part in ("val", "test") if set(model.task.split[part]) != set(ready.split.part(part))]
    if differing or (model.task.transductive and not allow_transductive):
        raise DataError(
            f"a teacher must have the validation and test patients of this run and have seen none of them, "
            f"{' and '.join(differing) or 'its pretraining'} differs. Train it with the same data.split.",
            where=where,
        )
    return model


@contextmanager
def _without_info() -> Iterator[None]:
    """Hide the lines on data and weights of a teacher, which are those of the student."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run_selftraining(
    plan: SelftrainingPlan, device: DeviceChoice, *, num_parallel: int = 1, run: Runner = run_samgraft
) -> Path:
    """Run every part that is not complete, write the report, and return the folder of the run.

    Args:
        plan: Result of ``plan_selftraining``.
        device: Device of the labelling. The fine-tunings choose it again from the settings.
        num_parallel: Number of teachers that train at the same time.
        run: Function that runs one command in a process of its own.

    Raises:
        UsageError: If another process runs this self-training.
        StoppedAndSaved: If a signal requested a stop.
        PartFailed: If a fine-tuning failed.
    """
    processes = Processes()
    check_stop = partial(_refuse_after_stop, processes)
    plan.path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.path / ".selftraining.lock", timeout=0), forward_stop_signals(processes):
            # The last student of a killed self-training may still be saving.
            wait_for_orphan(plan.path)
            _open_part(plan.rounds[-1].student, plan)
            for one in plan.rounds:
                # Later rounds use teachers that exist already.
                if one.number == 1:
                    _run_parts(one.trained_teachers, plan, processes, num_parallel=num_parallel, run=run)
                log.info("round %d: labelling %s", one.number, counted(len(plan.scans.series), "scan"))
                label_scans(one, plan.scans, plan.config, device, check_stop=check_stop)
                _run_parts([one.student], plan, processes, num_parallel=1, run=run)
            write_report(
                plan.path,
                plan.rounds,
                plan.scans,
                log_images=plan.config.watch.log_images,
                test_patients=plan.split.test,
            )
    except Timeout as err:
        raise UsageError(
            "another process runs this self-training. Wait for it or stop it.", where=plan.path.name
        ) from err
    return plan.path


def _run_parts(
    parts: Sequence[Part], plan: SelftrainingPlan, processes: Processes, *, num_parallel: int, run: Runner
) -> None:
    num_threads = threads_per_process(min(num_parallel, len(parts)))
    with ThreadPoolExecutor(max_workers=num_parallel) as pool:
        futures = [pool.submit(_run_part, part, plan, processes, num_threads, run) for part in parts]
    for future in futures:
        future.result()


def _run_part(part: Part, plan: SelftrainingPlan, processes: Processes, num_threads: int, run: Runner) -> None:
    """Run one fine-tuning from its last saved step to its end. A complete one is left as it is."""
    _refuse_after_stop(processes)
    # A complete part would start a process only to report that it is complete.
    if not read_run_json(part.path).get("complete"):
        part.files.parent.mkdir(parents=True, exist_ok=True)
        wait_for_orphan(part.path)
        _open_part(part, plan)
        settings_file, log_file = part.files.with_suffix(".yaml"), part.files.with_suffix(".log")
        # Written in every session, because settings without effect on the results may have changed.
        write_text(settings_file, config_to_yaml(part.config))
        log.info("%s: training, progress in %s", part.name, log_file)
        # The file has every setting, so that no preset changes one.
        arguments = ["finetune", "--config", str(settings_file), "--preset", "default"]
        arguments += ["--runs", str(part.path.parent), "--name", part.path.name]
        code, seconds, _ = run(arguments, log_file, num_threads, processes)
        if code == ExitCode.STOPPED_SAVED or (code != 0 and processes.stopping):
            raise _stopped()
        if code != 0:
            raise PartFailed(part, log_file, code=code)
        log.info("%s: done in %.1f min", part.name, seconds / 60)
    validation = Task.read(part.path / "model").validation
    log.info("%s: validation Dice %.3f", part.name, validation["best"])
    ending = describe_ending(validation)
    if ending is not None and not ending.is_good:
        log.warning("%s: %s", part.name, ending.text)


def _open_part(part: Part, plan: SelftrainingPlan) -> None:
    """Write configuration and split of a part, or check them against those of its earlier sessions."""
    with RunFolder.open(part.path.parent, part.path.name, config=part.config, stage="finetune") as folder:
        if part.path == plan.path:
            record_run_inputs(folder, plan.inputs)
        # All parts have one split, so that no teacher trains on patients of the student's validation.
        if not part.config.data.split:
            save_run_split(folder, plan.split)


def _refuse_after_stop(processes: Processes) -> None:
    if processes.stopping:
        raise _stopped()


def _stopped() -> StoppedAndSaved:
    return StoppedAndSaved(
        "the self-training was stopped.",
        kept="every complete part, the labels of complete scans and the last states of running parts",
        next_command="run the same command to resume",
    )
