"""How well methods of fine-tuning segment, beside U-Nets from scratch: MSD Task04 Hippocampus, vit_t, 64 px.

    python benchmarks/finetune_methods.py run DATA WEIGHTS --out FOLDER     trains what is missing, cell by cell
    python benchmarks/finetune_methods.py table --out FOLDER                writes benchmarks/results/...-DATE.md

DATA is the folder of the Decathlon task (``dataset.json``; CC-BY-SA 4.0), WEIGHTS LiteMedSAM's (``samgraft
demo-data``). A run that is stopped goes on at its last training state when the same command is given again. The 40
validation subjects of ``dataset.json`` are the test part here; the step to keep is chosen on 10 of the 180 training
subjects. Settings: ``configs/finetune/default.yaml`` with ``SETTINGS`` on top, the same for every cell, and what
``METHODS`` says.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import datetime
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from samgraft.finetune.evaluation.metrics import mean_or_none
from samgraft.finetune.evaluation.statistics import bootstrap_mean
from samgraft.shared.samples.split import Split, check_split, default_split_path
from samgraft.shared.scans.privacy import local_salt, pseudonym
from samgraft.shared.scans.sources import discover
from samgraft.shared.store.store import SliceStore

RESULTS = Path(__file__).parent / "results"
NUM_CHOOSING_SUBJECTS = 10
STORE = "hippocampus.zarr"
COMMAND = [sys.executable, "-c", "import sys; from samgraft.shared.cli import main; sys.exit(main())"]
SETTINGS = {
    "data": {"min_foreground_fraction": 0.0},
    "model": {"image_size": 64},
    "optim": {"lr": 1e-3, "warmup_steps": 20},
    "trainer": {"save_every_steps": 100, "log_every_steps": 10},
}
FULL_RATE = "optim.lr=1e-4"
"""``full`` moves pretrained weights themselves: a tenth of the rate, as config.py advises."""
STEPS = {"all": 600, "5": 250}
EVERY = {"all": 300, "5": 125}
BOX_STEPS = ["trainer.max_steps=400", "watch.validate_every_n_steps=100"]
"""A box says where to look: there is less to learn."""
METHODS = {
    "lora": ["adapter.method=lora"],
    "lora-long": ["adapter.method=lora", "trainer.max_steps=2400", "watch.validate_every_n_steps=300"],
    "decoder": ["adapter.method=full", "adapter.scope=decoder", FULL_RATE],
    "adapter": ["adapter.method=adapter"],
    "full": ["adapter.method=full", FULL_RATE],
    "unet2d": ["model.arch=unet2d"],
    "dynunet2d": ["model.arch=dynunet2d"],
    "dynunet3d": ["model.arch=dynunet3d", "data.batch_size=2"],
    "box": ["adapter.method=lora", "prompt.mode=box", *BOX_STEPS],
    "box-untrained": ["adapter.method=lora", "prompt.mode=box", "optim.lr=1e-12", "trainer.max_steps=2"],
}
BASELINES = {"unet2d", "dynunet2d", "dynunet3d"}
ORDER = (
    [("lora-long", "all", 0), ("box", "all", 0), ("box-untrained", "all", 0)]
    + [(m, "5", 0) for m in ("lora", "unet2d", "decoder", "adapter", "full")]
    + [(m, "all", 0) for m in ("full", "lora", "unet2d", "decoder", "adapter")]
    + [(m, "5", s) for s in (1, 2) for m in ("lora", "unet2d", "decoder", "adapter", "full")]
    + [(m, "5", s) for m in ("dynunet2d", "dynunet3d") for s in (0, 1, 2)]
    + [(m, "all", 0) for m in ("dynunet2d", "dynunet3d")]
)
"""What answers the most questions first."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    method: str
    subjects: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run."""
        return f"{self.method}-{self.subjects}-seed{self.seed}"

    def arguments(self, weights: Path) -> list[str]:
        """Return what ``samgraft finetune`` is given beside the common settings."""
        steps = [f"trainer.max_steps={STEPS[self.subjects]}", f"watch.validate_every_n_steps={EVERY[self.subjects]}"]
        few = (
            []
            if self.subjects == "all"
            else [f"data.few_shot.num={self.subjects}", f"data.few_shot.repeat={self.seed}"]
        )
        start = [] if self.method in BASELINES else ["--ckpt", str(weights)]
        if self.method in BASELINES:
            start = ["--model", self.method]
        own = [setting for setting in METHODS[self.method] if not setting.startswith("model.arch")]
        return [*start, f"seed={self.seed}", *steps, *few, *own]


CELLS = [Cell(*one) for one in ORDER]


def prepare(data: Path, out: Path) -> None:
    """Build the store and the split by the data set's own lists, once."""
    store_path = out / STORE
    if not (store_path / "complete.json").is_file():
        _command(
            "store", "build", str(data), "--out", str(store_path), "--modality", "mri", "--workers", "1", where=out
        )
    if default_split_path(store_path).is_file():
        return
    store, salt = SliceStore.open(store_path), local_salt(out)
    held_out = {Path(e["image"]).name for e in json.loads((data / "dataset.json").read_text())["validation"]}
    patients = {Path(c.scan.paths[0]).name: pseudonym("p", c.patient_key, salt=salt) for c in discover(data).cases}
    test = [patient for name, patient in patients.items() if name in held_out]
    rest = sorted(patient for name, patient in patients.items() if name not in held_out)
    chosen = {rest[i] for i in np.random.default_rng([0, 7]).permutation(len(rest))[:NUM_CHOOSING_SUBJECTS]}
    split = Split(
        train=tuple(p for p in rest if p not in chosen),
        val=tuple(sorted(chosen)),
        test=tuple(sorted(test)),
        seed=0,
        store_fingerprint=store.fingerprint,
    )
    check_split(split, store)
    split.save(default_split_path(store_path))


def run(data: Path, weights: Path, out: Path, *, only: str) -> None:
    """Train and evaluate every cell that is not done."""
    out.mkdir(parents=True, exist_ok=True)
    prepare(data.resolve(), out)
    (out / "settings.yaml").write_text(json.dumps(SETTINGS))  # JSON is YAML
    for cell in CELLS:
        if only not in cell.name:
            continue
        if not _summary(out, cell).is_file():
            print(datetime.datetime.now().strftime("%H:%M"), cell.name, flush=True)
            if not (out / "runs" / cell.name / "report.html").is_file():
                _command(
                    "finetune", "--data", STORE, "--preset", "default", "--config", "settings.yaml",
                    "--name", cell.name, *cell.arguments(weights.resolve()), where=out,
                )  # fmt: skip
            # bf16 as in training: float32 takes 2.4 times as long. On the first cell the mean Dice of both differed
            # by 0.0001, that of a class and scan by 0.004 at most.
            how = ["--split", "test", "--data", STORE, "--batch-size", "8", "--precision", "auto"]
            _command("evaluate", f"runs/{cell.name}", *how, where=out)
        print(cell.name, json.loads(_summary(out, cell).read_text())["dice"], flush=True)


def table(out: Path) -> str:
    """Return the results as Markdown; cells that are not done are counted."""
    done = [cell for cell in CELLS if _summary(out, cell).is_file()]
    lines = [
        "# Methods of fine-tuning on MSD Task04 Hippocampus",
        "",
        "`vit_t` (LiteMedSAM), 64 px, bf16, one CPU thread. Foreground volume Dice on the scans' own grid, mean over",
        "the two classes per scan, over the 40 validation subjects of the data set, with a 95 % bootstrap interval",
        "over subjects (mean of the seeds where there are several). The step to keep was chosen on 10 other",
        f"subjects. {len(done)} of {len(CELLS)} cells are done; `benchmarks/finetune_methods.py run` goes on.",
        "",
        f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, beside other work: no",
        f"times. Code {', '.join(sorted(_revisions(out, done)))}.",
        "",
        "| method | subjects | seeds | steps (slices) | Dice | anterior | posterior | trained (M) | zero-shot |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for subjects in STEPS:
            cells = [cell for cell in done if (cell.method, cell.subjects) == (method, subjects)]
            if cells:
                lines.append(_row(out, method, subjects, cells))
    missing = [cell.name for cell in CELLS if cell not in done]
    lines += ["", f"Not done yet: {', '.join(missing) or 'nothing'}.", ""]
    lines += [
        "Zero-shot: the base weights without training on the 10 subjects that choose the step, with the same prompts.",
        "`box`: one tight box per connected piece of a class and slice, drawn from the label, in training with jitter;",
        "the score says how well objects are outlined, not whether they are found. `box-untrained` is the same model",
        "before training (two steps at a rate of 1e-12).",
        "`lora-long` is the preset `default` at 64 px with 2400 steps and nothing else that bears on the result. The",
        "others stand beside each other at equal steps; none is trained to its end, the U-Nets start from nothing.",
        "In the first seed of 5 subjects SAM's methods looked at the 10 subjects every 50 steps, otherwise every 125.",
        "",
    ]
    return "\n".join(lines)


def _row(out: Path, method: str, subjects: str, cells: list[Cell]) -> str:
    per_class: dict[str, dict[str, list[float | None]]] = {}
    for cell in cells:
        with (_summary(out, cell).parent / "cases.csv").open() as file:
            for row in csv.DictReader(file):
                value = None if row["dice"] == "n/a" else float(row["dice"])
                per_class.setdefault(row["class"], {}).setdefault(row["patient_id"], []).append(value)
    names = sorted(per_class)
    patients = sorted(per_class[names[0]])
    by_class = {name: [mean_or_none(per_class[name][p]) for p in patients] for name in names}
    overall = bootstrap_mean(
        [v for p in zip(*by_class.values(), strict=True) if (v := mean_or_none(list(p))) is not None]
    )
    assert overall is not None
    card = json.loads((out / "runs" / cells[0].name / "model" / "card.json").read_text())
    task = json.loads((out / "runs" / cells[0].name / "model" / "task.json").read_text())
    trained = sum(task["trainable_millions"].values())
    zero_shot = task["validation"]["zero_shot"]
    classes = " | ".join(f"{mean_or_none(by_class[name]) or 0:.3f}" for name in names)
    return (
        f"| {method} | {170 if subjects == 'all' else subjects} | {len(cells)} | "
        f"{card['steps']} ({card['slices_seen']}) | {overall.render()} | {classes} | "
        f"{trained:.2f} | {'-' if zero_shot is None else f'{zero_shot:.3f}'} |"
    )


def _revisions(out: Path, cells: list[Cell]) -> set[str]:
    runs = [json.loads((out / "runs" / cell.name / "run.json").read_text()) for cell in cells]
    return {str(run["code_revision"])[:9] for run in runs}


def _summary(out: Path, cell: Cell) -> Path:
    return out / "runs" / cell.name / "evaluation" / "test" / "summary.json"


def _command(*arguments: str, where: Path) -> None:
    with (where / "log.txt").open("a") as log:
        subprocess.run([*COMMAND, *arguments], cwd=where, check=True, stdout=log, stderr=subprocess.STDOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run")
    training.add_argument("data", type=Path)
    training.add_argument("weights", type=Path)
    training.add_argument("--only", default="", help="train cells whose name holds this")
    commands.add_parser("table")
    for one in commands.choices.values():
        one.add_argument("--out", type=Path, required=True, help="folder of store, runs and log")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.data, arguments.weights, arguments.out, only=arguments.only)
        return
    text = table(arguments.out)
    path = RESULTS / f"finetune_methods-{datetime.date.today()}.md"
    path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
