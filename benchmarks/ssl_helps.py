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
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samgraft.finetune.evaluation.statistics import bootstrap_mean
from samgraft.shared.data.split import Split
from samgraft.shared.data.store import SliceStore
from samgraft.shared.training.device import cpu_has_fast_bf16
from samgraft.shared.training.environment import code_revision
from scipy.stats import wilcoxon

RESULTS = Path(__file__).parent / "results"
BASE = "base"
IMAGE_SIZE = 56
"""The crops are about 35 x 50 pixels; vit_t's attention windows fit 56 px, 64 px cost 1.8 times as much for padding."""
NUM_HELD_OUT, NUM_PROBE_TRAIN, NUM_PROBE_TEST = 12, 8, 16
"""Training subjects kept out of pretraining: for the held-out loss (four of them validate stage 2), and the probe."""
NUM_STAGE_2_VAL = 4
SEEDS = (0, 1, 2)
FEW = 5
STAGE_1 = (
    f"model.image_size={IMAGE_SIZE}",
    "data.batch_size=2",
    "data.num_held_out_slices=24",
    "optim.lr=3e-5",
    "optim.warmup_steps=50",
    "trainer.channels_last=true",
    "trainer.save_every_steps=100",
    "trainer.num_workers=0",
    "watch.every_n_steps=250",
    "watch.log_images=false",
    "probe.every_n_steps=250",
    "probe.num_train_slices=64",
    "probe.num_test_slices=96",
)
STAGE_2 = (
    f"model.image_size={IMAGE_SIZE}",
    "data.batch_size=8",
    "data.min_foreground_fraction=0.0",
    "trainer.channels_last=true",
    "trainer.save_every_steps=100",
    "optim.warmup_steps=20",
)
OWN_SETTINGS = {
    "masked_image": ("objective.masked_image.mask_unit_px=8",),
    # Its Gaussian term compares the slices of a batch: two would be no sample.
    "lejepa": ("data.batch_size=4",),
}
"""Where an objective needs other settings than the rest."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared and at what length."""

    work: Path
    base: Path
    objectives: tuple[str, ...]
    stage_1_steps: int
    few_steps: int
    full_steps: int
    device: str

    @property
    def store(self) -> Path:
        """The store of all subjects."""
        return self.work / "hippocampus.zarr"

    def steps(self, size: str) -> int:
        """Steps of a fine-tuning."""
        return self.few_steps if size == "few" else self.full_steps


# data


def prepare(plan: Plan, source: Path) -> None:
    """Build the store and every split, once."""
    if not (plan.store / "complete.json").is_file():
        command = ["store", "build", str(source), "--out", str(plan.store), "--modality", "mri", "--workers", "1"]
        run(command, plan, log="store")
    store = SliceStore.open(plan.store)
    train, test = subjects(store, source)
    held_out = train[:NUM_HELD_OUT]
    probe_train = train[NUM_HELD_OUT : NUM_HELD_OUT + NUM_PROBE_TRAIN]
    probe_test = train[NUM_HELD_OUT + NUM_PROBE_TRAIN : NUM_HELD_OUT + NUM_PROBE_TRAIN + NUM_PROBE_TEST]
    rest = train[NUM_HELD_OUT + NUM_PROBE_TRAIN + NUM_PROBE_TEST :]
    save(store, plan.work / "pretrain.split.json", train=rest, val=held_out)
    save(store, plan.work / "probe.split.json", train=probe_train, val=probe_test)
    for seed in SEEDS:
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
    if "few" in kinds:
        for seed in SEEDS:
            for init in inits:
                yield f"few-{init}-{seed}", {"kind": "finetune", "init": init, "seed": seed, "size": "few"}
    if "full" in kinds:
        for init in inits:
            yield f"full-{init}-0", {"kind": "finetune", "init": init, "seed": 0, "size": "full"}


def run_cell(plan: Plan, name: str, what: dict[str, Any]) -> None:
    """Run one cell unless its result is there."""
    path = plan.work / "cells" / f"{name}.json"
    if path.is_file():
        return
    started = time.time()
    result = pretrain(plan, what["objective"]) if what["kind"] == "pretrain" else finetune(plan, **without_kind(what))
    record = {
        "name": name,
        **what,
        **result,
        "minutes": round((time.time() - started) / 60, 1),
        "code_revision": code_revision(),
        "load": round(os.getloadavg()[0], 1),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.rename(path)
    say(f"{name}: done in {record['minutes']} min")


def without_kind(what: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a fine-tuning."""
    return {key: value for key, value in what.items() if key != "kind"}


def pretrain(plan: Plan, objective: str) -> dict[str, Any]:
    """Stage 1 from the base weights; return its probe, drift and health against the start's."""
    name = f"helps-{objective}"
    command = ["pretrain", "--data", str(plan.store), "--modality", "mri", "--base", str(plan.base)]
    command += ["--method", objective, "--preset", "cpu" if plan.device == "cpu" else "gpu", "--name", name]
    command += [*STAGE_1, *OWN_SETTINGS.get(objective, ()), f"trainer.max_steps={plan.stage_1_steps}"]
    command += [f"data.split={plan.work / 'pretrain.split.json'}", f"trainer.device={plan.device}"]
    command += [f"probe.store={plan.store}", f"probe.split={plan.work / 'probe.split.json'}"]
    run(command, plan, log=f"pretrain-{objective}")
    lines = [json.loads(text) for text in (plan.work / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    ends: dict[str, Any] = {}
    for key in ("probe/dice", "drift/box_dice", "held_out/loss", "held_out/effective_rank", "held_out/feature_std"):
        values = [line[key] for line in lines if key in line]
        if values:
            ends[key] = [round(values[0], 4), round(values[-1], 4)]
    return {"steps": plan.stage_1_steps, "ends": ends}


def finetune(plan: Plan, *, init: str, seed: int, size: str) -> dict[str, Any]:
    """Stage 2 from an encoder, then the test subjects; return one Dice per subject, the mean over both classes."""
    name = f"{size}-{init}-{seed}"
    ckpt = plan.base if init == BASE else plan.work / "runs" / f"helps-{init}"
    split = plan.work / f"{size}-{seed}.split.json"
    steps = plan.steps(size)
    command = ["finetune", "--ckpt", str(ckpt), "--base", str(plan.base), "--data", str(plan.store), "--name", name]
    command += ["--preset", "cpu", *STAGE_2, f"trainer.max_steps={steps}", f"seed={seed}", f"data.split={split}"]
    # One round, at the end: nothing is chosen among rounds.
    command += [f"watch.validate_every_n_steps={steps}", f"trainer.device={plan.device}"]
    run(command, plan, log=f"finetune-{name}")
    test = ["evaluate", str(plan.work / "runs" / name), "--split-file", str(split), "--split", "test"]
    run([*test, "--batch-size", "8", "--precision", "auto", "--device", plan.device], plan, log=f"evaluate-{name}")
    rows = list(csv.DictReader((plan.work / "runs" / name / "evaluation" / "test" / "cases.csv").open()))
    per_subject: dict[str, list[float]] = {}
    for row in rows:
        if row["dice"] not in {"", "n/a"}:
            per_subject.setdefault(row["patient_id"], []).append(float(row["dice"]))
    return {"steps": steps, "dice": {p: round(float(np.mean(v)), 4) for p, v in sorted(per_subject.items())}}


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


# the table


def load(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the finished cells by name."""
    return {p.stem: json.loads(p.read_text()) for p in sorted((plan.work / "cells").glob("*.json"))}


def mean_over_seeds(done: dict[str, dict[str, Any]], init: str, size: str, seeds: Sequence[int]) -> dict[str, float]:
    """Return Dice per subject, the mean over seeds."""
    runs = [done[f"{size}-{init}-{seed}"]["dice"] for seed in seeds]
    return {patient: float(np.mean([run[patient] for run in runs])) for patient in runs[0]}


def stage_2_rows(plan: Plan, done: dict[str, dict[str, Any]], size: str) -> list[str]:
    """Return the table's rows of one training size: only seeds that base and encoder both have are compared."""
    rows = []
    for init in [BASE, *plan.objectives]:
        seeds = [s for s in SEEDS if f"{size}-{init}-{s}" in done and f"{size}-{BASE}-{s}" in done]
        if not seeds:
            rows.append(f"| {init} | not run | | | |")
            continue
        dice, base = (mean_over_seeds(done, name, size, seeds) for name in (init, BASE))
        interval = bootstrap_mean(list(dice.values()))
        assert interval is not None
        cells_ = [init, f"{len(seeds)}", f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"]
        if init == BASE:
            cells_ += ["", ""]
        else:
            differences = [dice[p] - base[p] for p in base]
            gain = bootstrap_mean(differences)
            assert gain is not None
            cells_ += [f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})", p_value(differences)]
        rows.append("| " + " | ".join(cells_) + " |")
    return rows


def p_value(differences: Sequence[float]) -> str:
    """Return the two-sided Wilcoxon signed-rank p value over subjects."""
    if not any(differences):
        return "1 (all equal)"
    return f"{wilcoxon(differences).pvalue:.2g}"


def stage_1_rows(plan: Plan, done: dict[str, dict[str, Any]]) -> list[str]:
    """Return what every stage-1 run shows of itself, start -> end."""
    rows = []
    for objective in plan.objectives:
        cell = done.get(f"pretrain-{objective}")
        if cell is None:
            rows.append(f"| {objective} | not run | | | | |")
            continue
        ends = cell["ends"]
        keys = ("probe/dice", "drift/box_dice", "held_out/loss", "held_out/effective_rank")
        shown = [f"{ends[k][0]:.3f} -> {ends[k][1]:.3f}" if k in ends else "" for k in keys]
        rows.append(f"| {objective} | {cell['steps']} | {' | '.join(shown)} |")
    return rows


def verdict(plan: Plan, done: dict[str, dict[str, Any]]) -> list[str]:
    """Say in words what the intervals say, for every comparison that was made."""
    words = []
    for size, title in (("few", f"{FEW} subjects"), ("full", "all subjects")):
        for init in plan.objectives:
            seeds = [s for s in SEEDS if f"{size}-{init}-{s}" in done and f"{size}-{BASE}-{s}" in done]
            if not seeds:
                continue
            dice, base = (mean_over_seeds(done, name, size, seeds) for name in (init, BASE))
            gain = bootstrap_mean([dice[p] - base[p] for p in base])
            assert gain is not None
            assert gain.low is not None
            assert gain.high is not None
            if gain.low > 0:
                found = "better than the base weights"
            elif gain.high < 0:
                found = "worse than the base weights"
            else:
                found = "no difference from the base weights that the interval excludes from being chance"
            words.append(f"- {title}, {init}, {len(seeds)} seed{'s' * (len(seeds) > 1)}: {found} ({gain.mean:+.3f}).")
    return words or ["- No comparison is finished yet."]


def render(plan: Plan) -> str:
    """Return the whole result as Markdown."""
    done = load(plan)
    tested = next((len(c["dice"]) for c in done.values() if "dice" in c), 40)
    revisions = sorted({str(c["code_revision"])[:9] for c in done.values()})
    head = "| start | seeds | test Dice (95 % interval over subjects) | against the base, paired | Wilcoxon p |"
    rule = "|---|---|---|---|---|"
    return "\n".join(
        [
            f"# Does stage 1 help stage 2? {datetime.date.today()}",
            "",
            f"Medical Segmentation Decathlon, hippocampus (2 classes): {tested} test subjects, looked at once per "
            f"model; {IMAGE_SIZE} px, `vit_t` from LiteMedSAM's weights. Stage 1 on the training subjects except "
            f"{NUM_HELD_OUT + NUM_PROBE_TRAIN + NUM_PROBE_TEST} (held-out loss, probe). Stage 2: LoRA in encoder and "
            f"decoder, automatic mode, {plan.few_steps} steps of 8 slices for {FEW} subjects, {plan.full_steps} for "
            "all; the last weights, nothing chosen. Dice is the mean of both classes per subject on its own grid. The "
            "interval is over subjects: it does not cover the choice of the training subjects, of which the seeds "
            "draw three.",
            "",
            f"Hardware: {platform.machine()}, {os.cpu_count()} logical cores, one thread, bf16 "
            f"{'native' if cpu_has_fast_bf16() else 'emulated or off'}, no GPU, torch {torch.__version__}; code "
            f"{', '.join(revisions) or 'not run yet'}. Other work ran beside it; only Dice is reported, no times. "
            "`mae` is not in the table: it needs an encoder that can leave tokens out, vit_t cannot.",
            "",
            "## Stage 1: what the runs show of themselves (start -> end)",
            "",
            "| objective | steps | frozen-feature probe Dice | box-prompt Dice of SAM's own decoder | held-out loss | "
            "effective rank |",
            "|---|---|---|---|---|---|",
            *stage_1_rows(plan, done),
            "",
            f"## Stage 2 on {FEW} subjects",
            "",
            head,
            rule,
            *stage_2_rows(plan, done, "few"),
            "",
            "## Stage 2 on all training subjects",
            "",
            head,
            rule,
            *stage_2_rows(plan, done, "full"),
            "",
            "## In words",
            "",
            *verdict(plan, done),
            "",
            f"Command: `python benchmarks/ssl_helps.py FOLDER --base lite_medsam.pth --work WORK --steps "
            f"{plan.stage_1_steps} --few-steps {plan.few_steps} --full-steps {plan.full_steps} --objectives "
            f"{','.join(plan.objectives)}`",
            "",
        ]
    )


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the hippocampus folder")
    parser.add_argument("--base", type=Path, required=True, help="LiteMedSAM's weights")
    parser.add_argument("--work", type=Path, default=Path("build/ssl_helps"), help="store, runs and cells")
    parser.add_argument("--objectives", default="masked_image,dino,lejepa,feature", help="comma-separated")
    parser.add_argument("--kinds", default="pretrain,few,full", help="which cells to run")
    parser.add_argument("--steps", type=int, default=1000, help="of stage 1")
    parser.add_argument("--few-steps", type=int, default=300)
    parser.add_argument("--full-steps", type=int, default=800)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
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
        device=arguments.device,
    )
    if not arguments.table:
        prepare(plan, arguments.source.resolve())
        for kind in arguments.kinds.split(","):
            for name, what in list(cells(plan, [kind])):
                run_cell(plan, name, what)
    out = RESULTS / f"ssl_helps-{datetime.date.today()}.md"
    out.write_text(render(plan))
    say(f"written: {out.name}")


if __name__ == "__main__":
    main()
