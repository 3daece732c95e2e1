"""Speed of the data path: random slices from a warm store, building a store, indexing many files.

    python benchmarks/data_path.py            prints a table and writes benchmarks/results/data_path-DATE.md

One process, one thread; CPU time is counted, so that other work on the machine does not blur the figures.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import datetime
import platform
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from samgraft.shared.data.case import SourceCase
from samgraft.shared.data.dataset import SliceDataset, select_slices
from samgraft.shared.data.examine import BuildSettings
from samgraft.shared.data.file_index import index_files
from samgraft.shared.data.intensity import IntensityPreset
from samgraft.shared.data.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.data.store import SliceStore
from samgraft.shared.data.store_build import build_store
from samgraft.shared.data.volume import Modality

NUM_SLICES_PER_SERIES = 100
SIDE = 320


def smooth_volume(rng):
    """A volume whose slices compress about as real ones do (to half): blobs and scanner noise."""
    coarse = rng.normal(size=(NUM_SLICES_PER_SERIES, 20, 20)).repeat(16, axis=1).repeat(16, axis=2)
    head = np.hypot(*np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))) < 0.75
    return ((900 + 250 * coarse + rng.normal(size=coarse.shape) * 40) * head).clip(0, 4000).astype(np.uint16)


def write_scans(folder, num_series, *, suffix):
    rng = np.random.default_rng(0)
    cases = []
    for number in range(num_series):
        path = folder / f"{number:03d}{suffix}"
        nib.save(nib.Nifti1Image(smooth_volume(rng).transpose(2, 1, 0), np.diag([-0.7, -0.7, 3.0, 1.0])), path)
        scan = ScanFiles(format=ScanFormat.NIFTI, paths=(path,), name=path.name)
        cases.append(SourceCase(name=path.name, patient_key=path.name, scan=scan))
    return cases


def build_speed(cases, out):
    start = time.process_time()
    build_store(
        cases,
        out=out,
        settings=BuildSettings(modality=Modality.MRI, salt=""),
        label_names={},
        intensity=IntensityPreset(),
    )
    seconds = time.process_time() - start
    return len(cases) * NUM_SLICES_PER_SERIES * SIDE * SIDE * 2 / 1e6 / seconds


def read_speed(store, *, num):
    dataset = SliceDataset(store, select_slices(store, store.patient_ids))
    order = np.random.default_rng(1).integers(len(dataset), size=num)
    for index in order[:200]:
        dataset[int(index), 0]
    start = time.process_time()
    for counter, index in enumerate(order):
        dataset[int(index), counter]
    return num / (time.process_time() - start)


def index_speed(folder, *, num):
    folder.mkdir()
    for number in range(num):
        (folder / f"{number:05d}.nii.gz").touch()
    start = time.perf_counter()
    found = len(index_files(folder).files)
    assert found == num
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "warm").mkdir()
        build_speed(write_scans(folder / "warm", 1, suffix=".nii"), folder / "warm.zarr")  # imports are not building
        plain = build_speed(write_scans(folder, arguments.series, suffix=".nii"), folder / "plain.zarr")
        packed = build_speed(write_scans(folder, arguments.series, suffix=".nii.gz"), folder / "packed.zarr")
        store = SliceStore.open(folder / "plain.zarr")
        reading = read_speed(store, num=4000)
        source = arguments.series * NUM_SLICES_PER_SERIES * SIDE * SIDE * 2
        share = sum(size for r in store.series for size, _ in r.files.values()) / source
        indexing = index_speed(folder / "many", num=20_000)
    rows = [
        ("random slices read, verified, normalised, per second and core", f"{reading:,.0f}", "at least 900"),
        ("store building from .nii, MB of source voxels per second and core", f"{plain:.0f}", "at least 40"),
        ("store building from .nii.gz, the same", f"{packed:.0f}", "at least 40"),
        ("indexing 20,000 files, s", f"{indexing:.2f}", "under 60"),
        ("store size, share of the source voxels", f"{share:.2f}", ""),
    ]
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    lines = [
        f"# Data path, {today}",
        "",
        f"Command: `python benchmarks/data_path.py --series {arguments.series}`; {NUM_SLICES_PER_SERIES} slices of "
        f"{SIDE}x{SIDE} uint16 per series, warm page cache, CPU time of one thread.",
        f"Hardware: {cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, NumPy {np.__version__}.",
        "",
        "| what | measured | target |",
        "|---|---|---|",
        *(f"| {what} | {value} | {target} |" for what, value, target in rows),
        "",
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"data_path-{today}.md").write_text("\n".join(lines))
    print("\n".join(lines))


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
