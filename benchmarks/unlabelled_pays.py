"""What do unlabelled scans buy? Few labels alone against the same labels and pseudo-labels, on two public data sets.

    python benchmarks/unlabelled_pays.py FOLDER --data hippocampus --base lite_medsam.pth --work WORK
    python benchmarks/unlabelled_pays.py FOLDER --data hc18 --base lite_medsam.pth --work WORK
    python benchmarks/unlabelled_pays.py --table --work WORK

FOLDER is the Medical Segmentation Decathlon's hippocampus task, or the HC18 images with masks of the heads (``images``
and ``labels``). The arms are in ``unlabelled_pays_plan.py``, with all their settings.

Every seed draws other labelled patients. All other training patients are scans without labels in the arms that use
them. The test patients are looked at once per model and nothing is chosen on them. Every cell is a fresh process of the
public commands and leaves one JSON file under ``WORK/cells``. A finished cell is never run again, and a stopped one is
resumed by the same command.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import datetime
import hashlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from result_file import words_of
from samgraft.finetune.evaluation.metrics import class_scores
from samgraft.finetune.pseudo_labels import ignored_share
from samgraft.finetune.task import Task
from samgraft.shared.samples.leaks import find_patients_again
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.store.store import SliceStore
from ssl_helps import RESULTS, finish_cell, run, save, say, start_and_end, subject_dice, subjects
from unlabelled_pays_plan import ARMS, CELL_KIND, DATA_SETS, STAGE_1_KIND, UNET_3D, Arm, DataSet, Plan
from unlabelled_pays_table import draw, render

FIGURE = Path(__file__).parents[1] / "docs" / "pictures" / "unlabelled_pays.png"

# data


def prepare(plan: Plan, source: Path) -> None:
    """Build the store and its split, once."""
    data = DATA_SETS[plan.data]
    if not (plan.store / "complete.json").is_file():
        command = ["store", "build", str(source), "--out", str(plan.store), "--workers", "1", *data.build]
        run(command, plan, log=f"store-{plan.data}")
    if plan.split.is_file():
        return
    store = SliceStore.open(plan.store)
    train, test = subjects(store, source) if data.num_test is None else draw_patients(store, source, data.num_test)
    # Two patients that are one person would be on both sides.
    again = find_patients_again(store, store, test)
    train = [patient for patient in train if patient not in again]
    save(store, plan.split, train=train[data.num_val :], val=train[: data.num_val], test=test)


def draw_patients(store: SliceStore, source: Path, num_test: int) -> tuple[list[str], list[str]]:
    """Return training and test patients of a folder without lists, in an order that a seed decided."""
    # Ids are salted differently on every machine: the order must come from the files.
    hashes = {hashlib.sha256(file.read_bytes()).hexdigest(): file.name for file in (source / "images").iterdir()}
    first: dict[str, str] = {}
    for record in store.series:
        name = hashes[record.source_sha256]
        first[record.patient_id] = min(name, first.get(record.patient_id, name))
    patients = sorted(first, key=lambda patient: first[patient])
    order = [patients[i] for i in np.random.default_rng([7]).permutation(len(patients))]
    return order[num_test:], order[:num_test]


# cells


def cells(plan: Plan, arms: list[str], seeds: range) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, what it is), seed by seed, so that a stopped comparison has whole pairs."""
    for seed in seeds:
        for name in arms:
            for num in plan.numbers if not ARMS[name].once else (None,):
                if not ARMS[name].once or seed == 0:
                    yield plan.cell(name, num, seed), {"arm": name, "data": plan.data, "labels": num, "seed": seed}


def run_cell(plan: Plan, name: str, what: dict[str, Any]) -> None:
    """Train and test one cell unless its result is there."""
    arm = ARMS[what["arm"]]
    # Trained before the first cell that needs it, so that its time is not counted there.
    if arm.stage_1:
        pretrain(plan)

    def compute() -> dict[str, Any]:
        before = cpu_minutes()
        folder = train(plan, name, arm, num=what["labels"], seed=what["seed"])
        trained = cpu_minutes()
        command = ["evaluate", str(folder), "--split-file", str(plan.split), "--split", "test", "--batch-size", "8"]
        out = plan.work / "scores" / name
        run([*command, "--device", plan.device, "--out", str(out)], plan, log=f"evaluate-{name}")
        return {
            "steps": num_steps(plan, arm),
            "cpu_minutes": round(trained - before, 1),
            "dice": subject_dice(out / "cases.csv"),
            **pseudo_quality(plan, folder),
        }

    finish_cell(plan, name, {"kind": CELL_KIND, **what}, compute)


def pretrain(plan: Plan) -> None:
    """Train an encoder on all training patients of the data set, once."""
    name = plan.stage_1.name

    def compute() -> dict[str, Any]:
        before = cpu_minutes()
        command = ["pretrain", "--data", str(plan.store), "--preset", "cpu", "--name", name]
        command += ["--base", str(plan.base), f"data.split={plan.split}", f"trainer.device={plan.device}"]
        command += [f"model.image_size={DATA_SETS[plan.data].image_size}", *DATA_SETS[plan.data].stage_1]
        command += ["trainer.save_every_steps=200", "watch.every_n_steps=500", "watch.log_images=false"]
        run(command, plan, log=name)
        return {"cpu_minutes": round(cpu_minutes() - before, 1), **start_and_end(plan.stage_1)}

    finish_cell(plan, name, {"kind": STAGE_1_KIND, "data": plan.data}, compute)


def train(plan: Plan, name: str, arm: Arm, *, num: int | None, seed: int) -> Path:
    """Train one arm and return its run. A finished teacher of another arm is its run where the settings are equal."""
    if (finished := finished_teacher(plan, arm, num=num, seed=seed)) is not None:
        return finished
    data = DATA_SETS[plan.data]
    command = [arm.command, "--data", str(plan.store), "--name", name, "--preset", "cpu_long", "--runs", "runs"]
    if arm.stage_1:
        command += ["--ckpt", str(plan.stage_1)]
    command += [*network_settings(plan, arm, data), f"seed={seed}", f"data.split={plan.split}"]
    if num is not None:
        command += [f"data.few_shot.num={num}", f"data.few_shot.repeat={seed}"]
    steps = num_steps(plan, arm)
    # One round, at the end: nothing is chosen among rounds.
    command += [f"trainer.max_steps={steps}", f"watch.validate_every_n_steps={steps}", "watch.patience_rounds=null"]
    if arm.command == "selftrain" or arm.pseudo_labels_of is not None:
        command += data.student
    command += [f"trainer.device={plan.device}", *(text.format(seed=seed) for text in arm.settings)]
    if arm.teachers:
        found = [finished_teacher(plan, ARMS[other], num=num, seed=seed) for other in arm.teachers]
        runs = [plan.work / "runs" / plan.cell(other, num, seed) for other in arm.teachers]
        teachers = [str(teacher or run_path) for teacher, run_path in zip(found, runs, strict=True)]
        command += [f"selftrain.teachers=[{','.join(teachers)}]"]
    if arm.pseudo_labels_of is not None:
        owner = plan.work / "runs" / plan.cell(arm.pseudo_labels_of, num, seed)
        command += [f"data.pseudo_labels={owner / 'round-1' / 'pseudo_labels.zarr'}"]
    run(command, plan, log=name)
    return plan.work / "runs" / name


def finished_teacher(plan: Plan, arm: Arm, *, num: int | None, seed: int) -> Path | None:
    """Return the finished teacher of another arm that is this arm's model, or None."""
    if arm.teacher_of is None:
        return None
    teacher = plan.work / "runs" / plan.cell(arm.teacher_of, num, seed) / "round-1" / "teachers" / arm.teacher
    return teacher if (teacher / "model" / "task.json").is_file() else None


def num_steps(plan: Plan, arm: Arm) -> int:
    """Return the steps of every training of an arm."""
    return arm.times_steps * DATA_SETS[plan.data].steps[arm.network]


def network_settings(plan: Plan, arm: Arm, data: DataSet) -> list[str]:
    """Return the settings of the arm's network on a data set."""
    size = [f"model.image_size={data.image_size}"]
    if arm.network == "unet3d":
        return ["--model", "dynunet3d", *UNET_3D]
    if arm.network == "unet":
        return ["--model", "dynunet2d", *size, *data.unet]
    return ["--base", str(plan.base), *size, *data.sam]


def pseudo_quality(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return the Dice of the pseudo-labels of a self-training against the labels that it never saw.

    This is the only place that reads these labels, after the training.
    """
    path = folder / "round-1" / "pseudo_labels.zarr"
    if not path.is_dir():
        return {}
    pseudo, store = SliceStore.open(path), SliceStore.open(plan.store)
    classes = Task.read(folder / "model").classes
    dice = []
    for record in pseudo.series:
        found, truth = pseudo.read_label_volume(record.series_id), store.read_label_volume(record.series_id)
        kept = np.where(found == IGNORE_LABEL, IGNORE_LABEL, truth)
        dice += [score.dice for score in class_scores(found, kept, classes) if score.dice is not None]
    return {"pseudo_dice": round(float(np.mean(dice)), 4), "ignored_share": round(ignored_share(pseudo), 4)}


def cpu_minutes() -> float:
    """Return the processor time of the finished child processes in minutes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def main() -> None:
    """Run what is missing, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="folder of the data set")
    parser.add_argument("--data", choices=tuple(DATA_SETS), default="hippocampus")
    parser.add_argument("--base", type=Path, help="LiteMedSAM's weights")
    parser.add_argument("--work", type=Path, default=Path("build/unlabelled_pays"), help="stores, runs and cells")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    parser.add_argument("--labels", default="5", help="numbers of labelled patients, comma-separated")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--table", action="store_true", help="only write the table and the figure")
    given = parser.parse_args()
    plan = Plan(
        work=given.work.resolve(),
        data=given.data,
        base=given.base.resolve() if given.base else None,
        numbers=tuple(int(number) for number in given.labels.split(",")),
        device=given.device,
    )
    if not given.table:
        if given.source is None or not given.source.is_dir():
            say("skipped: the folder of the data set is not there. See the docstring.")
            return
        prepare(plan, given.source.resolve())
        for name, what in cells(plan, given.arms.split(","), range(given.first_seed, given.seeds)):
            run_cell(plan, name, what)
    records = [json.loads(path.read_text()) for path in sorted((plan.work / "cells").glob("*.json"))]
    stage_1 = [record for record in records if record["kind"] == STAGE_1_KIND]
    finished = [record for record in records if record["kind"] == CELL_KIND]
    out = RESULTS / f"unlabelled_pays-{datetime.date.today()}.md"
    out.write_text(render(finished, stage_1=stage_1) + words_of(out))
    draw(finished, FIGURE)
    say(f"written: {out.name}")


if __name__ == "__main__":
    main()
