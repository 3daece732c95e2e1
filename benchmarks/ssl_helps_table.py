"""The table of ``ssl_helps.py`` from its finished cells: intervals over subjects, paired differences, words."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from samgraft.finetune.evaluation.statistics import bootstrap_mean
from scipy.stats import t, wilcoxon
from ssl_helps_plan import BASE, FEW, NUM_HELD_OUT, NUM_PROBE_TEST, NUM_PROBE_TRAIN, SCALES, Plan


def load(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the finished cells by name."""
    return {p.stem: json.loads(p.read_text()) for p in sorted((plan.work / "cells").glob("*.json"))}


def mean_over_seeds(done: dict[str, dict[str, Any]], init: str, size: str, seeds: Sequence[int]) -> dict[str, float]:
    """Return Dice per subject, the mean over seeds."""
    return patient_means([done[f"{size}-{init}-{seed}"] for seed in seeds])


def patient_means(cells: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the Dice of every patient, the mean over cells."""
    return {patient: float(np.mean([cell["dice"][patient] for cell in cells])) for patient in cells[0]["dice"]}


def compared_seeds(plan: Plan, done: dict[str, dict[str, Any]], init: str, size: str) -> list[int]:
    """Return the seeds that base and encoder both have."""
    return [s for s in plan.seeds(size) if f"{size}-{init}-{s}" in done and f"{size}-{BASE}-{s}" in done]


def stage_2_rows(plan: Plan, done: dict[str, dict[str, Any]], size: str) -> list[str]:
    """Return the table's rows of one training size."""
    rows = []
    for init in [BASE, *plan.objectives]:
        seeds = compared_seeds(plan, done, init, size)
        if not seeds:
            rows.append(f"| {init} | not run | | | | |")
            continue
        dice, base = (mean_over_seeds(done, name, size, seeds) for name in (init, BASE))
        interval = bootstrap_mean(list(dice.values()))
        assert interval is not None
        cells_ = [init, f"{len(seeds)}", f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"]
        if init == BASE:
            cells_ += ["", "", ""]
        else:
            cells_ += gain_cells([dice[p] - base[p] for p in base], seed_differences(done, init, size, seeds))
        rows.append("| " + " | ".join(cells_) + " |")
    return rows


def gain_cells(per_patient: Sequence[float], per_seed: Sequence[float]) -> list[str]:
    """Return a gain with its interval over patients, its interval over seeds if there is one, and its p value."""
    gain, over_seeds = bootstrap_mean(per_patient), seed_interval(per_seed)
    assert gain is not None
    return [
        f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})",
        f"{over_seeds[0]:+.3f} to {over_seeds[1]:+.3f}" if over_seeds else "",
        p_value(per_patient),
    ]


def seed_differences(done: dict[str, dict[str, Any]], init: str, size: str, seeds: Sequence[int]) -> list[float]:
    """Return the mean difference from the base weights of every seed: its own few subjects and its own training."""
    dice, base = ([done[f"{size}-{name}-{s}"]["dice"] for s in seeds] for name in (init, BASE))
    return [float(np.mean([d[p] - b[p] for p in b])) for d, b in zip(dice, base, strict=True)]


def seed_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % t interval of the mean over seeds; None below three of them."""
    if len(differences) < 3:
        return None
    reach = float(t.ppf(0.975, len(differences) - 1)) * float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return float(np.mean(differences)) - reach, float(np.mean(differences)) + reach


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
            rows.append(f"| {objective} | not run | | | | | |")
            continue
        ends = cell["ends"]
        keys = ("probe/dice", "drift/box_dice", "held_out/loss", "held_out/effective_rank")
        shown = [f"{ends[k][0]:.3f} -> {ends[k][1]:.3f}" if k in ends else "" for k in keys]
        # Cells of earlier versions have no epochs.
        rows.append(f"| {objective} | {cell['steps']} | {cell.get('epochs', '')} | {' | '.join(shown)} |")
    return rows


def verdict(plan: Plan, done: dict[str, dict[str, Any]]) -> list[str]:
    """Say in words what the intervals say, for every comparison that was made."""
    words = []
    for size, title in (("few", f"{FEW} subjects"), ("full", "all subjects")):
        for init in plan.objectives:
            seeds = compared_seeds(plan, done, init, size)
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
            over_seeds = seed_interval(seed_differences(done, init, size, seeds))
            doubt = ""
            if over_seeds is None:
                doubt = " How much trainings differ by chance is not known from so few."
            elif gain.low * gain.high > 0 > over_seeds[0] * over_seeds[1]:
                doubt = " On these test subjects; other trainings could turn it: the interval over seeds holds 0."
            number = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
            words.append(f"- {title}, {init}, {number}: {found} ({gain.mean:+.3f}).{doubt}")
    return words or ["- No comparison is finished yet."]


def render(plan: Plan) -> str:
    """Return the whole result as Markdown."""
    done = load(plan)
    tested = next((len(c["dice"]) for c in done.values() if "dice" in c), 40)
    revisions = sorted({str(c["code_revision"])[:9] for c in done.values()})
    hardware = sorted({f"{c['hardware']}, torch {c['torch']}" for c in done.values() if "hardware" in c})
    head = (
        "| start | seeds | test Dice (95 % interval over subjects) | against the base, paired | the same over seeds "
        "| Wilcoxon p |"
    )
    rule = "|---|---|---|---|---|---|"
    return "\n".join(
        [
            f"# Does stage 1 help stage 2? {datetime.date.today()}, {plan.scale.image_size} px, {plan.geometry} "
            "geometry",
            "",
            f"Medical Segmentation Decathlon, hippocampus (2 classes): {tested} test subjects, looked at once per "
            f"model; {plan.scale.image_size} px, `vit_t` from LiteMedSAM's weights. Stage 1 on the training subjects "
            f"except {NUM_HELD_OUT + NUM_PROBE_TRAIN + NUM_PROBE_TEST} (held-out loss, probe): {plan.scale.says}. "
            f"Stage 2: LoRA in encoder and "
            f"decoder, automatic mode, {plan.few_steps} steps of 8 slices for {FEW} subjects, {plan.full_steps} for "
            f"all, {plan.geometry} geometry; the last weights, nothing chosen. Dice is the mean of both classes per "
            "subject on its own grid. The "
            "interval is over subjects: it does not cover the choice of the few training subjects, which every seed "
            "draws anew. The interval over seeds (t, from three on) covers that choice and everything else that a "
            "training draws, not the test subjects; stage 1 was trained once per line.",
            "",
            f"Hardware: {'; '.join(hardware) or 'not run yet'}; code {', '.join(revisions) or 'not run yet'}. Other "
            "work ran beside it; only Dice is reported, no times. `masked_image_skip` is `masked_image` whose decoder "
            "also sees the visible pixels (`decoder_sees_pixels=true`). "
            "`mae` is not in the table: it needs an encoder that can leave tokens out, vit_t cannot.",
            "",
            "## Stage 1: what the runs show of themselves (start -> end)",
            "",
            "| objective | steps | epochs | frozen-feature probe Dice | box-prompt Dice of SAM's own decoder | "
            "held-out loss | effective rank |",
            "|---|---|---|---|---|---|---|",
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
            command(plan),
            "",
        ]
    )


def command(plan: Plan) -> str:
    """Return the line that says how to get this table again."""
    sized = "" if plan.scale.image_size == min(SCALES) else f" --image-size {plan.scale.image_size}"
    device = "" if plan.device == "cpu" else f" --device {plan.device}"
    return (
        f"Command: `python benchmarks/ssl_helps.py FOLDER --base lite_medsam.pth --work WORK --steps "
        f"{plan.stage_1_steps} --few-steps {plan.few_steps} --full-steps {plan.full_steps} --few-seeds "
        f"{plan.few_seeds} --full-seeds {plan.full_seeds} --geometry {plan.geometry}{sized}{device} --objectives "
        f"{','.join(plan.objectives)}`"
    )
