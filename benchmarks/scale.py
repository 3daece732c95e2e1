"""Measure how the costs of stores, splits, audits, evaluations and long runs grow with their size.

    python benchmarks/scale.py [--sizes 1000 3000 10000 30000] [--series-per-patient 1] [--out FOLDER]

Every row is one piece of work on synthetic tables, without voxels: the search for near-duplicates, drawing and
checking a split, the command ``samgraft store split`` in a process of its own, the choice of slices for the membership
audit, tables and report of an evaluation, and the warnings of a stage-1 run with a monitoring round every 100 steps.
The exponent is the slope of log(CPU time) over log(size) between the smallest and the largest size. Memory is the peak
of ``samgraft store split``, and of this process after all work of a size.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from samgraft.finetune.evaluation.evaluate import Evaluation, write_evaluation
from samgraft.finetune.evaluation.evaluation_report import write_evaluation_report
from samgraft.finetune.evaluation.scores import CASE_COLUMNS, METRICS
from samgraft.finetune.evaluation.subgroups import Subgroups
from samgraft.shared.config import load_config, packaged_config
from samgraft.shared.runs.metrics import MetricsLog
from samgraft.shared.samples.split import check_split, make_split
from samgraft.shared.scans.intensity import STORED_PERCENTILES, IntensityPreset, IntensityStats
from samgraft.shared.scans.orientation import NativeGrid, Plane
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.near_duplicates import near_duplicates
from samgraft.shared.store.series import PlaneTable, SeriesRecord
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.progress import StepLog
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.export.membership import audit_slices
from samgraft.ssl.monitor.monitor import Monitor, MonitorData

NUM_SLICES = 24
COPIES = 0.01
"""Share of series that are a rescaled copy of another one."""
CLASSES = ("core", "oedema", "enhancing")
NUM_SITES = 4
STEPS_PER_ROUND = 100


def make_records(num_series: int, *, series_per_patient: int) -> list[SeriesRecord]:
    """Return series with tissue profiles that differ as heads of people do."""
    rng = np.random.default_rng(0)
    height = np.linspace(-1, 1, NUM_SLICES)
    waves = np.array([np.cos(np.pi * k * (height + 1) / 2 + k) for k in range(8)])
    amplitudes = rng.normal(0, 0.08, size=(num_series, 8)) / (1 + np.arange(8))
    shares_NZ = 0.45 * (1 - height**2) ** 0.7 + amplitudes @ waves + rng.normal(0, 0.005, (num_series, NUM_SLICES))
    copies = rng.choice(num_series, size=max(1, int(COPIES * num_series)), replace=False)
    shares_NZ[copies] = shares_NZ[rng.integers(num_series, size=len(copies))] + 0.002
    shares_NZ = shares_NZ.clip(0, 1).round(4)
    stats = IntensityStats(
        minimum=0, maximum=1000, mean=300, std=90, air_threshold=50, percentiles=tuple(map(float, STORED_PERCENTILES))
    )
    affine = tuple(tuple(float(v) for v in row) for row in np.eye(4))
    grid = NativeGrid(shape_ijk=(64, 64, NUM_SLICES), affine=affine, orientation="LPS")
    return [
        SeriesRecord(
            series_id=f"s_{number:08d}",
            patient_id=f"p_{number // series_per_patient:08d}",
            study_id=f"t_{number // series_per_patient:08d}",
            modality=Modality.MRI,
            plane=Plane.AXIAL,
            planes={
                Plane.AXIAL: PlaneTable(
                    shape_zyx=(NUM_SLICES, 64, 64),
                    affine=affine,
                    foreground_fraction=tuple(map(float, shares_Z)),
                    label_pixels={1: (5,) * NUM_SLICES},
                )
            },
            has_label=True,
            source_sha256=hashlib.sha256(f"source {number}".encode()).hexdigest(),
            content_sha256=hashlib.sha256(f"content {number}".encode()).hexdigest(),
            stats=stats,
            grid=grid,
            dtype="int16",
        )
        for number, shares_Z in enumerate(shares_NZ)
    ]


def write_store(path: Path, records: list[SeriesRecord]) -> SliceStore:
    """Write a store that has a table but no voxels."""
    manifest = {
        "schema": 1,
        "modality": "mri",
        "label_names": {"1": "lesion"},
        "intensity": IntensityPreset().to_dict(),
        "series": [record.to_dict() for record in records],
    }
    path.mkdir()
    (path / "zarr.json").write_text(json.dumps({"attributes": {"samgraft": {}}}))
    (path / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    (path / "complete.json").write_text(json.dumps({"manifest_sha256": digest}))
    return SliceStore.open(path)


def run_split_command(path: Path) -> tuple[float, float]:
    """Return CPU seconds and peak memory in MB of ``samgraft store split``."""
    code = (
        "import sys; from samgraft.shared.cli import main; code = main(['store', 'split', sys.argv[1]]); "
        # Not ru_maxrss, which starts with the memory of the process that started this one.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, int(done.stdout) / 1024


def time_audit(store: SliceStore, patients: tuple[str, ...]) -> float:
    """Return CPU seconds of the choice of slices for a membership audit."""
    settings = {"modality": "mri", "data": {"store": "x"}, "model": {"base": "random"}}
    config = load_config(PretrainConfig, layers=[packaged_config("pretrain/masked_image-cpu.yaml"), settings])
    start = time.process_time()
    assert audit_slices(store, patients, config)
    return time.process_time() - start


def time_evaluation(num_cases: int, folder: Path) -> float:
    """Return CPU seconds of tables and report of an evaluation with three classes and four sites."""
    rng = np.random.default_rng(1)
    rows = [
        {column: 1 for column in CASE_COLUMNS}
        | {metric.key: float(value) for metric, value in zip(METRICS, rng.uniform(size=len(METRICS)), strict=True)}
        | {"patient_id": f"p_{case:08d}", "series_id": f"s_{case:08d}", "label_id": label_id, "class": name}
        for case in range(num_cases)
        for label_id, name in enumerate(CLASSES, start=1)
    ]
    sites = Subgroups(attribute="site", group_of={f"s_{n:08d}": f"site {n % NUM_SITES}" for n in range(num_cases)})
    evaluation = Evaluation(part="test", rows=rows, tolerance_mm=1.0)
    start = time.process_time()
    write_evaluation(evaluation, folder, provenance={}, subgroups=[sites])
    write_evaluation_report(evaluation, folder, title="model", provenance={}, subgroups=[sites])
    return time.process_time() - start


def time_monitoring(num_steps: int, folder: Path) -> float:
    """Return CPU seconds of logging the steps of a run and of the warnings in its monitoring rounds."""
    folder.mkdir()
    run = SimpleNamespace(metrics=MetricsLog(folder / "metrics.jsonl"), tb=folder / "tb", is_writer=True)
    log = StepLog(cast(Any, run), every_steps=20)
    config = SimpleNamespace(trainer=SimpleNamespace(max_steps=num_steps + 1))
    data = MonitorData(held_out=None, probe=None, box_check=None, box_check_note="off")
    monitor = Monitor(data=data, config=cast(Any, config), run_path=folder)
    start = time.process_time()
    log.start(after_step=0)
    for step in range(1, num_steps + 1):
        log.record(step, {"train/loss": 1 / step, "train/lr": 1e-4, "train/grad_norm": 1.0, "perf/slices_per_s": 9.0})
        if step % STEPS_PER_ROUND == 0:
            monitor._values = {"held_out/loss": 1 / step, "held_out/effective_rank": 8.0}
            monitor._print_warnings(cast(Any, SimpleNamespace(rank=0, step=step, log=log)))
            log.record(step, {"held_out/loss": 1 / step, "held_out/effective_rank": 8.0})
        if step % log.every_steps == 0:
            log.flush()
    log.close()
    return time.process_time() - start


def measure(size: int, folder: Path, *, series_per_patient: int) -> dict[str, float]:
    """Return CPU seconds of each piece of work, and peaks of memory."""
    records = make_records(size, series_per_patient=series_per_patient)
    store = write_store(folder / f"{size}.zarr", records)
    del records
    seconds = {}
    start = time.process_time()
    split = make_split(store)
    seconds["draw a split of so many series"] = time.process_time() - start
    start = time.process_time()
    pairs = near_duplicates(store.series)
    seconds["search near-duplicates"] = time.process_time() - start
    assert pairs
    start = time.process_time()
    check_split(split, store)
    seconds["check a split"] = time.process_time() - start
    seconds["slices of a membership audit"] = time_audit(store, split.train)
    path = store.path
    del store, split
    seconds["`samgraft store split`"], memory_mb = run_split_command(path)
    if series_per_patient == 1:
        seconds["tables and report of so many cases"] = time_evaluation(size, folder / f"evaluation-{size}")
        seconds["log and warnings of so many steps"] = time_monitoring(size, folder / f"run-{size}")
    seconds["memory of `store split`, MB"] = memory_mb
    seconds["memory of this process, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seconds


def main() -> None:
    """Measure all sizes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10000, 30000])
    parser.add_argument("--series-per-patient", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    per_patient = arguments.series_per_patient
    with tempfile.TemporaryDirectory() as folder:
        columns = {
            size: measure(size, Path(folder), series_per_patient=per_patient) for size in sorted(arguments.sizes)
        }
    smallest, largest = min(columns), max(columns)
    head = ["CPU seconds", *(f"{number:,}" for number in columns), "exponent"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for work in columns[smallest]:
        slope = math.log(columns[largest][work] / columns[smallest][work]) / math.log(largest / smallest)
        cells = [work, *(f"{values[work]:.3g}" for values in columns.values()), f"{slope:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    lines_of_cpu = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines_of_cpu if line.startswith("model name")]
    text = (
        f"# Costs by size, {today}\n\n{names[0] if names else platform.machine()}, {os.cpu_count()} cores, one thread. "
    )
    text += f"{per_patient} series per patient, {NUM_SLICES} slices per series.\n\n" + "\n".join(lines) + "\n"
    name = f"scale-{today}.md" if per_patient == 1 else f"scale-{per_patient}-series-{today}.md"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / name).write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
