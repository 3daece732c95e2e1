"""Does stage 1 learn at all? From random weights, stage 1 must help few labels, and on shuffled pixels it must not.

    python benchmarks/learns_at_all.py MSD_TASK04_FOLDER --base lite_medsam.pth --work FOLDER
    python benchmarks/learns_at_all.py MSD_TASK04_FOLDER --base lite_medsam.pth --work FOLDER --table

Three encoders begin at the same random weights:

- ``base`` is trained with a rate of practically 0, so that its weights stay random and only its batch norms collect
  the statistics of the slices;
- ``METHOD`` is trained on the slices;
- ``METHOD_shuffled`` is trained on the same slices after one random permutation of the voxels of every scan, which
  keeps every grey value and no structure.

Stage 2 then trains all weights on 5 subjects, with LiteMedSAM's decoder in every arm. A recipe passes if its encoder is
at least 5 Dice points better than the random one and the shuffled one is not. Cells, splits and the test subjects are
those of ``ssl_helps.py``, with the same promise: a finished cell is never run again, an interrupted one is resumed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import datetime
import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from samgraft.shared.samples.split import load_split
from samgraft.shared.store.store import SliceStore
from ssl_helps import RESULTS, build_store, finish_cell, prepare, run_stage_1, run_stage_2, save, say
from ssl_helps_plan import BASE, SCALES, Plan
from ssl_helps_table import compared_seeds, load, mean_over_seeds, stage_1_rows, stage_2_rows

WANTED_GAIN = 0.05
"""Dice by which stage 1 from random weights must be better than random weights."""
SHUFFLED = "_shuffled"
FROM_RANDOM = (
    "--model=vit_t",
    "--base=random",
    "data.batch_size=8",
    # Every depth is random, and all of them have to be trained.
    "model.num_frozen_depths=0",
    "optim.head_lr_factor=2.0",
    "trainer.num_workers=0",
)
STAGE_2 = ("adapter.method=full", "optim.lr=3e-4")
"""All weights: low-rank updates of random weights would measure little else than the random weights."""


def shuffled_plan(plan: Plan) -> Plan:
    """Return the same plan in a folder of its own, for the shuffled scans."""
    return dataclasses.replace(plan, work=plan.work / "shuffled")


def prepare_shuffled(plan: Plan, source: Path) -> None:
    """Write every pretraining scan with permuted voxels, build their store, and split it as the original one."""
    shuffled, store = shuffled_plan(plan), SliceStore.open(plan.store)
    parts = load_split(plan.work / "pretrain.split.json", store)
    patient_of = {record.source_sha256: record.patient_id for record in store.series}
    scans = shuffled.work / "scans"
    scans.mkdir(parents=True, exist_ok=True)
    moved: dict[str, str] = {}
    for number, entry in enumerate(json.loads((source / "dataset.json").read_text())["training"]):
        path = source / entry["image"]
        patient = patient_of[hashlib.sha256(path.read_bytes()).hexdigest()]
        if patient in {*parts.train, *parts.val}:
            target = scans / path.name
            if not target.is_file():
                shuffle_scan(path, target, seed=number)
            moved[hashlib.sha256(target.read_bytes()).hexdigest()] = patient
    own = build_store(shuffled, scans)
    names = {moved[record.source_sha256]: record.patient_id for record in own.series}
    train, val = ([names[p] for p in part] for part in (parts.train, parts.val))
    save(own, shuffled.work / "pretrain.split.json", train=train, val=val)


def shuffle_scan(source: Path, target: Path, *, seed: int) -> None:
    """Write a scan whose voxels are permuted at random."""
    image = nib.load(source)
    voxels = np.asanyarray(image.dataobj)
    order = np.random.default_rng([seed, 11]).permutation(voxels.size)
    draft = target.with_name(f"draft-{target.name}")
    nib.save(nib.Nifti1Image(voxels.ravel()[order].reshape(voxels.shape), image.affine, image.header), draft)
    draft.rename(target)


def run_arms(plan: Plan, method: str, rate: float) -> None:
    """Run every missing cell: three encoders, then stage 2 from each with every seed."""
    probe = [f"probe.store={plan.store}", f"probe.split={plan.work / 'probe.split.json'}"]
    arms = {
        BASE: (plan, 1e-12, probe),
        method: (plan, rate, probe),
        # The shuffled scans have other hashes, so the probe's patients are still those of the original store.
        f"{method}{SHUFFLED}": (shuffled_plan(plan), rate, probe),
    }
    for arm, (where, lr, more) in arms.items():
        own = [*where.scale.own.get(method, ()), *FROM_RANDOM, f"optim.lr={lr}", *more]
        finish_cell(
            plan,
            f"pretrain-{arm}",
            {"kind": "pretrain", "objective": arm},
            lambda where=where, own=own, arm=arm: run_stage_1(where, name=f"learns-{arm}", method=method, settings=own),
        )
    for seed in plan.seeds("few"):
        for arm, (where, _, _) in arms.items():
            ckpt = where.work / "runs" / f"learns-{arm}"
            finish_cell(
                plan,
                f"few-{arm}-{seed}",
                {"kind": "finetune", "init": arm, "seed": seed, "size": "few"},
                lambda ckpt=ckpt, seed=seed, arm=arm: run_stage_2(
                    plan, name=f"few-{arm}-{seed}", ckpt=ckpt, seed=seed, size="few", settings=STAGE_2
                ),
            )


def render(plan: Plan, method: str) -> str:
    """Return the whole result as Markdown."""
    done = load(plan)
    both = dataclasses.replace(plan, objectives=(method, f"{method}{SHUFFLED}"))
    everything = dataclasses.replace(plan, objectives=(BASE, *both.objectives))
    hardware = sorted(
        {f"{c['hardware']}, torch {c['torch']}, code {str(c['code_revision'])[:9]}" for c in done.values()}
    )
    return "\n".join(
        [
            f"# Does stage 1 learn at all? {method} from random weights, {datetime.date.today()}",
            "",
            f"Hippocampus, {plan.scale.image_size} px, `vit_t` from random weights (`base`: no training, batch-norm "
            f"statistics only), {plan.stage_1_steps} steps of 8 slices; then stage 2 of all weights on 5 subjects, "
            f"{plan.few_steps} steps, LiteMedSAM's decoder in every arm. {'; '.join(hardware) or 'Not run yet'}. Other "
            "work ran beside it; no times are reported.",
            "",
            "| encoder | steps | epochs | linear probe | box-prompt Dice | held-out loss | effective rank |",
            "|---|---|---|---|---|---|---|",
            *stage_1_rows(everything, done),
            "",
            "| encoder | seeds | test Dice (95 % interval over subjects) | against random, paired | the same over "
            "seeds | Wilcoxon p |",
            "|---|---|---|---|---|---|",
            *stage_2_rows(both, done, "few"),
            "",
            *[f"- {line}" for line in results(both, done)],
            "",
            f"Command: `python benchmarks/learns_at_all.py FOLDER --base lite_medsam.pth --work WORK --method {method} "
            f"--steps {plan.stage_1_steps} --few-steps {plan.few_steps} --few-seeds {plan.few_seeds} --image-size "
            f"{plan.scale.image_size}`",
            "",
        ]
    )


def results(plan: Plan, done: dict[str, dict[str, object]]) -> list[str]:
    """Return one sentence per arm on whether it met what is expected of it."""
    lines = []
    for arm in plan.objectives:
        seeds = compared_seeds(plan, done, arm, "few")
        if not seeds:
            lines.append(f"{arm}: not run.")
            continue
        ours, random = (mean_over_seeds(done, name, "few", seeds) for name in (arm, BASE))
        gain = float(np.mean([ours[p] - random[p] for p in random]))
        is_control = arm.endswith(SHUFFLED)
        met = (gain >= WANTED_GAIN) is not is_control
        wanted = f"{'below' if is_control else 'at least'} {WANTED_GAIN:+.2f}"
        lines.append(f"{arm}: {gain:+.3f} against random weights, expected {wanted}: {'met' if met else 'not met'}.")
    return lines


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the hippocampus folder")
    parser.add_argument("--base", type=Path, required=True, help="LiteMedSAM's weights, for the decoder")
    parser.add_argument("--work", type=Path, default=Path("build/learns_at_all"), help="stores, runs and cells")
    parser.add_argument("--method", default="masked_image", help="objective of vit_t")
    parser.add_argument("--steps", type=int, default=4000, help="of stage 1")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of stage 1")
    parser.add_argument("--few-steps", type=int, default=300)
    parser.add_argument("--few-seeds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=56, choices=tuple(SCALES), help="56 on a CPU, 256 on a GPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if not (arguments.source / "dataset.json").is_file():
        say(f"skipped: {arguments.source.name} is not there. Get Task04_Hippocampus from medicaldecathlon.com.")
        return
    plan = Plan(
        work=arguments.work.resolve(),
        base=arguments.base.resolve(),
        objectives=(),
        stage_1_steps=arguments.steps,
        few_steps=arguments.few_steps,
        full_steps=0,
        few_seeds=arguments.few_seeds,
        full_seeds=0,
        scale=SCALES[arguments.image_size],
        geometry="mild",
        device=arguments.device,
    )
    if not arguments.table:
        prepare(plan, arguments.source.resolve())
        prepare_shuffled(plan, arguments.source.resolve())
        run_arms(plan, arguments.method, arguments.rate)
    out = RESULTS / f"learns_at_all-{arguments.method}-{datetime.date.today()}.md"
    out.write_text(render(plan, arguments.method))
    say(f"written: {out.name}")


if __name__ == "__main__":
    main()
