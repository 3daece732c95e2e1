"""Build stores from real collections of scans and say what came of each: nothing is prepared by hand.

    python benchmarks/store_builds.py msd=FOLDER:mri lungs=FOLDER:ct ...

Each argument is NAME=SOURCE:MODALITY, with a source as `samgraft store build` takes it. Every store is built in one
process, verified to its last byte, opened, and compared with its source again. CPU time is counted.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.scans.sources import discover
from samgraft.shared.store.build import build_store, examine_cases
from samgraft.shared.store.build_report import summarise
from samgraft.shared.store.check import check_store, compare_with_scans
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore


def build(source, modality, out):
    preset = load_preset(modality)
    settings = BuildSettings(modality=preset.modality, salt="benchmark")
    found = discover(source)
    begin = time.process_time()
    report = build_store(
        found.cases,
        out=out,
        settings=settings,
        label_names=found.label_names,
        intensity=preset.intensity,
        skip_refused=True,
    )
    seconds = time.process_time() - begin
    store = SliceStore.open(out)
    again = examine_cases(found.cases, settings=settings, label_names=found.label_names)
    problems = check_store(out).problems
    problems += compare_with_scans(out, again)
    return summarise(found, report), store, seconds, problems


def row(name, values, store, seconds, problems):
    voxels = sum(int(np.prod(r.shape_zyx)) * np.dtype(r.dtype).itemsize for r in store.series) / 1e6
    stored = sum(size for r in store.series for size, _ in r.files.values()) / 1e6
    cells = (
        name,
        values["layout"],
        f"{values['num_series']} of {values['num_cases']}",
        values["num_patients"],
        values["num_slices"],
        f"{values['num_labelled']} / {len(values['labels'])}",
        f"{voxels:.1f}",
        f"{stored:.1f}",
        f"{seconds:.1f}",
        f"{voxels / seconds:.0f}",
        len(problems),
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="NAME=SOURCE:MODALITY")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    head = ["collection", "layout", "series", "patients", "slices", "labelled / classes", "voxels, MB", "store, MB"]
    head += ["CPU, s", "MB/s", "problems"]
    rows, refused = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, argument in enumerate(arguments.sources):
            name, _, rest = argument.partition("=")
            source, _, modality = rest.rpartition(":")
            values, store, seconds, problems = build(Path(source), modality, Path(folder) / f"{number}.zarr")
            rows.append(row(name, values, store, seconds, problems))
            refused += [f"- {name}: {case}: {reason}" for case, reason in values["refused"].items()]
            print(rows[-1], flush=True)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    lines = [
        f"# Stores of real collections, {today}",
        "",
        "Command: `python benchmarks/store_builds.py NAME=SOURCE:MODALITY ...`; one process, CPU time, no hand. "
        "Problems: what `store check` and a second reading of the sources found.",
        f"Hardware: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *rows,
        "",
        *(["Refused:", "", *refused, ""] if refused else []),
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"store_builds-{today}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
