"""Does stage 1 help stage 2? Base weights against each objective's encoder, on one public set, with intervals.

    python benchmarks/ssl_helps.py MSD_TASK04_FOLDER --base lite_medsam.pth --work FOLDER
    python benchmarks/ssl_helps.py MSD_TASK04_FOLDER --base lite_medsam.pth --work FOLDER --table

The folder is the Medical Segmentation Decathlon's hippocampus task whose ``dataset.json`` lists ``training`` and
``validation`` subjects. Only training subjects are pretrained on, and of those not the ones that the probe is scored
on. Validation subjects are looked at once per model, at the end: nothing is chosen on them.

Every cell (one stage-1 run, one fine-tuning) is a fresh process of the public commands and leaves one JSON file under
``FOLDER/cells``; a finished cell is never run again and an interrupted one goes on where it stood, so the same command
may be stopped and given again. ``--table`` only writes ``benchmarks/results/ssl_helps-DATE.md`` from what is there.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import datetime
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder_speed import hardware
from samgraft.shared.runs.environment import code_revision
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore
from ssl_helps_plan import (
    BASE,
    FEW,
    GEOMETRY,
    METHOD,
    NUM_HELD_OUT,
    NUM_PROBE_TEST,
    NUM_PROBE_TRAIN,
    NUM_STAGE_2_VAL,
    SCALES,
    STAGE_1,
    STAGE_2,
    Plan,
)
from ssl_helps_table import render

RESULTS = Path(__file__).parent / "results"


# data


def build_store(plan: Plan, source: Path) -> SliceStore:
    """Build the plan's store unless it is there, and open it."""
    if not (plan.store / "complete.json").is_file():
        command = ["store", "build", str(source), "--out", str(plan.store), "--modality", "mri", "--workers", "1"]
        run(command, plan, log="store")
    return SliceStore.open(plan.store)


def prepare(plan: Plan, source: Path) -> None:
    """Build the store and every split, once."""
    store = build_store(plan, source)
    train, test = subjects(store, source)
    held_out = train[:NUM_HELD_OUT]
    probe_train = train[NUM_HELD_OUT : NUM_HELD_OUT + NUM_PROBE_TRAIN]
    probe_test = train[NUM_HELD_OUT + NUM_PROBE_TRAIN : NUM_HELD_OUT + NUM_PROBE_TRAIN + NUM_PROBE_TEST]
    rest = train[NUM_HELD_OUT + NUM_PROBE_TRAIN + NUM_PROBE_TEST :]
    save(store, plan.work / "pretrain.split.json", train=rest, val=held_out)
    save(store, plan.work / "probe.split.json", train=probe_train, val=probe_test)
    for seed in range(max(plan.few_seeds, plan.full_seeds)):
        order = np.random.default_rng([seed, 5]).permutation(len(rest))
        few = [rest[i] for i in order[:FEW]]
        save(store, plan.work / f"few-{seed}.split.json", train=few, val=held_out[:NUM_STAGE_2_VAL], test=test)
        everyone = [p for p in train if p not in held_out[:NUM_STAGE_2_VAL]]
        save(store, plan.work / f"full-{seed}.split.json", train=everyone, val=held_out[:NUM_STAGE_2_VAL], test=test)


def subjects(store: SliceStore, source: Path) -> tuple[list[str], list[str]]:
    """Return the patients of the folder's training and validation list, each in an order that a seed decided."""
    listed = json.loads((source / "dataset.json").read_text())
    of_hash = {record.source_sha256: record.patient_id for record in store.series}
    parts = []
    for name in ("training", "validation"):
        files = [source / entry["image"] for entry in listed[name]]
        ids = sorted(of_hash[hashlib.sha256(file.read_bytes()).hexdigest()] for file in files)
        # Ids are salted differently on every machine: the order must come from the files.
        by_file = [of_hash[hashlib.sha256(file.read_bytes()).hexdigest()] for file in sorted(files)]
        assert sorted(by_file) == ids
        parts.append([by_file[i] for i in np.random.default_rng([7]).permutation(len(by_file))])
    return parts[0], parts[1]


def save(
    store: SliceStore, path: Path, *, train: Sequence[str], val: Sequence[str] = (), test: Sequence[str] = ()
) -> None:
    """Write a split file."""
    parts = {"train": tuple(sorted(train)), "val": tuple(sorted(val)), "test": tuple(sorted(test))}
    Split(**parts, seed=0, store_fingerprint=store.fingerprint).save(path)


# cells


def cells(plan: Plan, kinds: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, what it is) in the order in which they are worth having."""
    if "pretrain" in kinds:
        for objective in plan.objectives:
            yield f"pretrain-{objective}", {"kind": "pretrain", "objective": objective}
    inits = [BASE, *(o for o in plan.objectives if (plan.work / "cells" / f"pretrain-{o}.json").is_file())]
    for size in ("few", "full"):
        for seed in plan.seeds(size) if size in kinds else ():
            for init in inits:
                yield f"{size}-{init}-{seed}", {"kind": "finetune", "init": init, "seed": seed, "size": size}


def run_cell(plan: Plan, name: str, what: dict[str, Any]) -> None:
    """Run one cell of the comparison unless its result is there."""
    arguments = {key: value for key, value in what.items() if key != "kind"}
    finish_cell(plan, name, what, lambda: {"pretrain": pretrain, "finetune": finetune}[what["kind"]](plan, **arguments))


def finish_cell(plan: Plan, name: str, what: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> None:
    """Compute one cell and write its record, unless it is there."""
    path = plan.work / "cells" / f"{name}.json"
    if path.is_file():
        return
    started = time.time()
    record = {
        "name": name,
        **what,
        **compute(),
        "minutes": round((time.time() - started) / 60, 1),
        "code_revision": code_revision(),
        "hardware": hardware(plan.device),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.rename(path)
    say(f"{name}: done in {record['minutes']} min")


def pretrain(plan: Plan, objective: str) -> dict[str, Any]:
    """Stage 1 from the base weights; return its probe, drift and health against the start's."""
    method = METHOD.get(objective, objective)
    own = [f"--base={plan.base}", *plan.scale.stage_1, *plan.scale.own.get(objective, ())]
    own += [f"probe.store={plan.store}", f"probe.split={plan.work / 'probe.split.json'}"]
    return run_stage_1(plan, name=f"helps-{objective}", method=method, settings=own)


def run_stage_1(plan: Plan, *, name: str, method: str, settings: Sequence[str]) -> dict[str, Any]:
    """Train on the plan's store and pretraining split; return first and last value of what the run measured."""
    command = ["pretrain", "--data", str(plan.store), "--modality", "mri", "--method", method, "--preset", "cpu"]
    command += ["--name", name, f"model.image_size={plan.scale.image_size}", *STAGE_1]
    command += [f"trainer.max_steps={plan.stage_1_steps}", f"optim.warmup_steps={min(50, plan.stage_1_steps // 4)}"]
    command += [f"data.split={plan.work / 'pretrain.split.json'}", f"trainer.device={plan.device}", *settings]
    run(command, plan, log=f"pretrain-{name}")
    return {"steps": plan.stage_1_steps, **start_and_end(plan.work / "runs" / name)}


def start_and_end(folder: Path) -> dict[str, Any]:
    """Return the epochs of a stage-1 run and the first and last value of what it measured."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    ends: dict[str, Any] = {}
    for key in ("probe/dice", "drift/box_dice", "held_out/loss", "held_out/effective_rank", "held_out/feature_std"):
        values = [line[key] for line in lines if key in line]
        if values:
            ends[key] = [round(values[0], 4), round(values[-1], 4)]
    return {"epochs": round(lines[-1]["train/epochs"], 3), "ends": ends}


def finetune(plan: Plan, *, init: str, seed: int, size: str) -> dict[str, Any]:
    """Stage 2 from an encoder, then the test subjects; return one Dice per subject, the mean over both classes."""
    ckpt = plan.base if init == BASE else plan.work / "runs" / f"helps-{init}"
    return run_stage_2(plan, name=f"{size}-{init}-{seed}", ckpt=ckpt, seed=seed, size=size)


def run_stage_2(
    plan: Plan, *, name: str, ckpt: Path, seed: int, size: str, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Fine-tune from a weights file and evaluate the test subjects once."""
    split = plan.work / f"{size}-{seed}.split.json"
    steps = plan.steps(size)
    command = ["finetune", "--ckpt", str(ckpt), "--base", str(plan.base), "--data", str(plan.store), "--name", name]
    command += ["--preset", "cpu", f"model.image_size={plan.scale.image_size}", *STAGE_2, *GEOMETRY[plan.geometry]]
    command += [f"trainer.max_steps={steps}", f"optim.warmup_steps={min(20, steps // 4)}", f"seed={seed}"]
    # One round, at the end: nothing is chosen among rounds.
    command += [f"data.split={split}", f"watch.validate_every_n_steps={steps}", f"trainer.device={plan.device}"]
    run([*command, *settings], plan, log=f"finetune-{name}")
    test = ["evaluate", str(plan.work / "runs" / name), "--split-file", str(split), "--split", "test"]
    run(
        [*test, "--batch-size", "8" if plan.device == "cpu" else "32", "--precision", "auto", "--device", plan.device],
        plan,
        log=f"evaluate-{name}",
    )
    return {"steps": steps, "dice": subject_dice(plan.work / "runs" / name / "evaluation" / "test" / "cases.csv")}


def subject_dice(path: Path) -> dict[str, float]:
    """Return one Dice per patient, the mean over scans and classes."""
    per_subject: dict[str, list[float]] = {}
    for row in csv.DictReader(path.open()):
        if row["dice"] not in {"", "n/a"}:
            per_subject.setdefault(row["patient_id"], []).append(float(row["dice"]))
    return {patient: round(float(np.mean(values)), 4) for patient, values in sorted(per_subject.items())}


def run(arguments: Sequence[str], plan: Plan, *, log: str) -> None:
    """Run a public command in a fresh process; its output goes to a file."""
    path = plan.work / "logs" / f"{log}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        code = "import sys; from samgraft.shared.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=plan.work, stdout=file, stderr=file, check=False
        )
    if done.returncode:
        raise SystemExit(f"{log}: exit code {done.returncode}, see {path}")


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{datetime.datetime.now():%H:%M} {text}\n")
    sys.stdout.flush()


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the hippocampus folder")
    parser.add_argument("--base", type=Path, required=True, help="LiteMedSAM's weights")
    parser.add_argument("--work", type=Path, default=Path("build/ssl_helps"), help="store, runs and cells")
    parser.add_argument(
        "--objectives", default="masked_image,masked_image_skip,dino,lejepa,feature", help="comma-separated"
    )
    parser.add_argument("--kinds", default="pretrain,few,full", help="which cells to run")
    parser.add_argument("--steps", type=int, default=1000, help="of stage 1")
    parser.add_argument("--few-steps", type=int, default=300)
    parser.add_argument("--full-steps", type=int, default=800)
    parser.add_argument("--few-seeds", type=int, default=3)
    parser.add_argument("--full-seeds", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=56, choices=tuple(SCALES), help="56 on a CPU, 256 on a GPU")
    parser.add_argument("--parallel", type=int, default=1, help="cells at a time")
    parser.add_argument("--geometry", default="mild", choices=tuple(GEOMETRY), help="augmentation of stage 2")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--suffix", help="of the result's file name")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if not (arguments.source / "dataset.json").is_file():
        say(f"skipped: {arguments.source.name} is not there. Get Task04_Hippocampus from medicaldecathlon.com.")
        return
    plan = Plan(
        work=arguments.work.resolve(),
        base=arguments.base.resolve(),
        objectives=tuple(arguments.objectives.split(",")),
        stage_1_steps=arguments.steps,
        few_steps=arguments.few_steps,
        full_steps=arguments.full_steps,
        few_seeds=arguments.few_seeds,
        full_seeds=arguments.full_seeds,
        scale=SCALES[arguments.image_size],
        geometry=arguments.geometry,
        device=arguments.device,
    )
    if not arguments.table:
        prepare(plan, arguments.source.resolve())
        for kind in arguments.kinds.split(","):
            with ThreadPoolExecutor(arguments.parallel) as pool:
                list(pool.map(lambda cell: run_cell(plan, *cell), list(cells(plan, [kind]))))
    strong = "" if plan.geometry == "mild" else f"-{plan.geometry}"
    size = "" if plan.scale.image_size == min(SCALES) else f"-{plan.scale.image_size}px"
    suffix = f"-{arguments.suffix}" if arguments.suffix else ""
    out = RESULTS / f"ssl_helps{size}{strong}{suffix}-{datetime.date.today()}.md"
    out.write_text(render(plan))
    say(f"written: {out.name}")


if __name__ == "__main__":
    main()
