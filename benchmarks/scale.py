"""Measure how the costs of stores and splits grow with the number of patients.

    python benchmarks/scale.py [--patients 1000 3000 10000 30000] [--out FOLDER]

Every row is one piece of work on synthetic tables of series, without voxels: the search for near-duplicates, drawing
and checking a split, and the command ``samgraft store split`` in a process of its own. The exponent is the slope of
log(CPU time) over log(patients) between the smallest and the largest size. Memory is the peak of that process.
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

import numpy as np
from samgraft.shared.samples.split import check_split, make_split
from samgraft.shared.scans.intensity import STORED_PERCENTILES, IntensityPreset, IntensityStats
from samgraft.shared.scans.orientation import NativeGrid, Plane
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.near_duplicates import near_duplicates
from samgraft.shared.store.series import PlaneTable, SeriesRecord
from samgraft.shared.store.store import SliceStore

NUM_SLICES = 24
COPIES = 0.01
"""Share of patients that are a rescaled copy of another one."""


def make_records(num_patients: int) -> list[SeriesRecord]:
    """Return one series per patient, with tissue profiles that differ as heads of people do."""
    rng = np.random.default_rng(0)
    height = np.linspace(-1, 1, NUM_SLICES)
    waves = np.array([np.cos(np.pi * k * (height + 1) / 2 + k) for k in range(8)])
    amplitudes = rng.normal(0, 0.08, size=(num_patients, 8)) / (1 + np.arange(8))
    shares_NZ = 0.45 * (1 - height**2) ** 0.7 + amplitudes @ waves + rng.normal(0, 0.005, (num_patients, NUM_SLICES))
    copies = rng.choice(num_patients, size=max(1, int(COPIES * num_patients)), replace=False)
    shares_NZ[copies] = shares_NZ[rng.integers(num_patients, size=len(copies))] + 0.002
    shares_NZ = shares_NZ.clip(0, 1).round(4)
    stats = IntensityStats(
        minimum=0, maximum=1000, mean=300, std=90, air_threshold=50, percentiles=tuple(map(float, STORED_PERCENTILES))
    )
    affine = tuple(tuple(float(v) for v in row) for row in np.eye(4))
    grid = NativeGrid(shape_ijk=(64, 64, NUM_SLICES), affine=affine, orientation="LPS")
    return [
        SeriesRecord(
            series_id=f"s_{number:08d}",
            patient_id=f"p_{number:08d}",
            study_id=f"t_{number:08d}",
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
        "import resource, sys; from samgraft.shared.cli import main; code = main(['store', 'split', sys.argv[1]]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, int(done.stdout) / 1024


def measure(num_patients: int, folder: Path) -> dict[str, float]:
    """Return CPU seconds of each piece of work, and the memory of the command."""
    store = write_store(folder / f"{num_patients}.zarr", make_records(num_patients))
    seconds = {}
    start = time.process_time()
    split = make_split(store)
    seconds["draw a split"] = time.process_time() - start
    start = time.process_time()
    pairs = near_duplicates(store.series)
    seconds["search near-duplicates"] = time.process_time() - start
    assert pairs
    start = time.process_time()
    check_split(split, store)
    seconds["check a split"] = time.process_time() - start
    seconds["samgraft store split"], seconds["memory of store split, MB"] = run_split_command(store.path)
    return seconds


def main() -> None:
    """Measure all sizes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, nargs="+", default=[1000, 3000, 10000, 30000])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        columns = {number: measure(number, Path(folder)) for number in sorted(arguments.patients)}
    smallest, largest = min(columns), max(columns)
    head = ["CPU seconds", *(f"{number:,} patients" for number in columns), "exponent"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for work in columns[smallest]:
        slope = math.log(columns[largest][work] / columns[smallest][work]) / math.log(largest / smallest)
        cells = [work, *(f"{values[work]:.3g}" for values in columns.values()), f"{slope:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    lines_of_cpu = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines_of_cpu if line.startswith("model name")]
    text = f"# Costs by number of patients, {today}\n\n{names[0] if names else platform.machine()}, "
    text += f"{os.cpu_count()} cores, one thread, {NUM_SLICES} slices per patient.\n\n" + "\n".join(lines) + "\n"
    (arguments.out / f"scale-{today}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
