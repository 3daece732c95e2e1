"""Speed of the data path: random slices from a warm store, building a store, indexing many files, waiting for data.

    python benchmarks/data_path.py            prints a table and writes benchmarks/results/data_path-DATE.md

One process, one thread; CPU time is counted, so that other work on the machine does not blur the figures. Every rate is
measured several times, kinds interleaved; the median and the range are given. The share of a training step that waits
for data is of wall-clock time, in stage 1's own loader and step (vit_t, masked_image).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from samgraft.finetune.config import FinetuneConfig
from samgraft.shared.config import load_config, packaged_config
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.samples.augment import SliceAugmentation
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.sampler import StepBatchSampler
from samgraft.shared.samples.slices import select_slices
from samgraft.shared.scans.case import SourceCase
from samgraft.shared.scans.file_index import index_files
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.loader import build_step_loader
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives.masked_image import MaskedImage, MaskedImageConfig

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


def stage_augmentation(schema, preset, model):
    """What slices of a stage go through by default."""
    required = {"modality": "mri", "data": {"store": "x.zarr"}, "model": model}
    return SliceAugmentation(load_config(schema, layers=[packaged_config(preset), required]).data.augment)


def data_wait(store, augment, *, device, num_workers, image_size=128, batch_size=8, num_steps=8):
    """Return the share of stage-1 steps that went into waiting for a batch, and seconds per step."""
    torch.manual_seed(0)
    encoder = arch_spec("vit_t").build(image_size=image_size).train()
    objective = MaskedImage(encoder, MaskedImageConfig(mask_unit_px=8), seed=0).to(device)
    dataset = SliceDataset(store, select_slices(store, store.patient_ids), augment=augment)
    sampler = StepBatchSampler(len(dataset), batch_size=batch_size, seed=0, num_micro_steps=num_steps + 2)
    loader = build_step_loader(dataset, batch_sampler=sampler, collate_fn=collate_slices, num_workers=num_workers)
    waits, steps = [], []
    batches = iter(loader)
    for step in range(num_steps + 2):
        begin = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        images, _, _ = batch_to_input(batch, image_size=image_size, keep_aspect=True, device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            total = objective.loss(images, sample_counters=batch["sample_counter"].tolist(), step=step).total
        total.backward()
        objective.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        waits.append(arrived - begin)
        steps.append(time.perf_counter() - begin)
    return sum(waits[2:]) / sum(steps[2:]), statistics.median(steps[2:])


def read_speed(store, *, num, augment=None):
    dataset = SliceDataset(store, select_slices(store, store.patient_ids), augment=augment)
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


def rates(measure, *, repeats):
    """Run every measurement in turn, several rounds; return name -> median and range as text."""
    values = {name: [] for name in measure}
    for _ in range(repeats):
        for name, run in measure.items():
            values[name].append(run())
            print(f"{name}: {values[name][-1]:,.0f}", flush=True)
    return {
        name: f"{statistics.median(numbers):,.0f} ({min(numbers):,.0f} to {max(numbers):,.0f})"
        for name, numbers in values.items()
    }


def measure_all(folder, arguments):
    (folder / "warm").mkdir()
    build_speed(write_scans(folder / "warm", 1, suffix=".nii"), folder / "warm.zarr")  # imports are not building
    cases = {suffix: write_scans(folder, arguments.series, suffix=suffix) for suffix in (".nii", ".nii.gz")}
    numbers = iter(range(10**6))
    build = rates(
        {s: lambda s=s: build_speed(cases[s], folder / f"built-{next(numbers)}.zarr") for s in cases},
        repeats=arguments.repeats,
    )
    store = SliceStore.open(folder / "built-0.zarr")
    stage_1 = stage_augmentation(PretrainConfig, "pretrain/masked_image-cpu.yaml", {"base": "random"})
    stage_2 = stage_augmentation(FinetuneConfig, "finetune/cpu.yaml", {"ckpt": "x"})
    kinds = {"plain": None, "stage 1": stage_1, "stage 2": stage_2}
    read = rates(
        {k: lambda k=k: read_speed(store, num=arguments.reads, augment=kinds[k]) for k in kinds},
        repeats=arguments.repeats,
    )
    source = arguments.series * NUM_SLICES_PER_SERIES * SIDE * SIDE * 2
    share = sum(size for r in store.series for size, _ in r.files.values()) / source
    rows = [
        ("random slices read, verified, normalised, per second and core", read["plain"], "at least 900"),
        ("the same with stage 1's augmentation", read["stage 1"], ""),
        ("the same with stage 2's augmentation", read["stage 2"], ""),
        ("store building from .nii, MB of source voxels per second and core", build[".nii"], "at least 40"),
        ("store building from .nii.gz, the same", build[".nii.gz"], "at least 40"),
        (
            f"indexing {arguments.files:,} files, s",
            f"{index_speed(folder / 'many', num=arguments.files):.2f}",
            "under 60",
        ),
        ("store size, share of the source voxels", f"{share:.2f}", ""),
    ]
    for num_workers in arguments.workers:
        waiting, seconds = data_wait(
            store, stage_1, device=arguments.device, num_workers=num_workers, num_steps=arguments.steps
        )
        what = (
            f"share of a stage-1 step waiting for data, {num_workers} workers (8 slices at 128 px, {arguments.device})"
        )
        rows.append((what, f"{100 * waiting:.1f} % of {seconds:.2f} s", ""))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reads", type=int, default=2000, help="slices per measurement of reading")
    parser.add_argument("--files", type=int, default=20_000, help="files to index")
    parser.add_argument("--steps", type=int, default=8, help="training steps, after two that do not count")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="of the loader in the training step")
    parser.add_argument("--device", default="cpu", help="for the training step: cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = measure_all(Path(name), arguments)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    lines = [
        f"# Data path, {today}",
        "",
        f"Command: `python benchmarks/data_path.py --series {arguments.series} --repeats {arguments.repeats} --reads "
        f"{arguments.reads} --files {arguments.files} --steps {arguments.steps} --workers "
        f"{' '.join(map(str, arguments.workers))} --device {arguments.device}`; {NUM_SLICES_PER_SERIES} slices of "
        f"{SIDE}x{SIDE} uint16 per series, warm page cache, CPU "
        "time of one thread; median (range).",
        f"Hardware: {cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}.",
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
