"""Seconds for all metrics of 40 small volumes, and seconds and bytes of a report of 200 cases.

    python benchmarks/evaluation_speed.py       prints a table and writes benchmarks/results/evaluation_speed-DATE.md

Predictions are made up, so that segmenting takes no part: what is timed is scoring, averaging with bootstrap intervals
and writing. The report has its pictures and, where niivue is vendored, the viewer with three scans. One thread; the
clock is this process's own time, which other work on the machine does not stretch.
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
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation.evaluate import Evaluation, PackedLabels, write_evaluation
from samgraft.finetune.evaluation.evaluation_report import Pictured, write_evaluation_report
from samgraft.finetune.evaluation.scores import case_rows
from samgraft.finetune.evaluation.viewer import find_bundle
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore

CLASSES = ClassTable(ids=(1, 2), names=("organ", "lesion"))


def scan(seed, shape_zyx):
    """An organ with a lesion in it, and both with ragged surfaces."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_zyx), indexing="ij")
    waves = 0.08 * np.sin(7 * x + seed) * np.cos(9 * y) + 0.05 * np.sin(8 * z)
    center = rng.uniform(-0.2, 0.2, size=3)
    organ = (z / 0.8) ** 2 + (y / 0.6) ** 2 + (x / 0.65) ** 2 < 1 + waves
    lesion = ((z - center[0]) / 0.3) ** 2 + ((y - center[1]) / 0.2) ** 2 + ((x - center[2]) / 0.25) ** 2 < 1 + waves
    label = organ.astype(np.uint8) + (organ & lesion)
    image = 40 * rng.random(shape_zyx) + 300 * organ + 200 * lesion
    return image.astype(np.int16), label


def make_store(folder, *, num, shape_zyx):
    import nibabel as nib

    cases = []
    for number in range(num):
        files = []
        for kind, array in zip(("scan", "label"), scan(number, shape_zyx), strict=True):
            path = folder / kind / f"{number:03d}.nii"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1.0, -1.0, 2.5, 1.0])), path)
            files.append(ScanFiles(format=ScanFormat.NIFTI, paths=(path,), name=path.name))
        label = LabelFiles(scan=files[1])
        cases.append(SourceCase(name=f"{number}", patient_key=f"{number}", scan=files[0], labels=(label,)))
    settings = BuildSettings(modality=Modality.MRI, salt="")
    names = dict(zip(CLASSES.ids, CLASSES.names, strict=True))
    build_store(cases, out=folder / "s.zarr", settings=settings, label_names=names, intensity=IntensityPreset())
    return SliceStore.open(folder / "s.zarr")


def predictions(store):
    """Return (record, true, predicted): the truth shifted by up to three pixels, some lesions missed."""
    for number, record in enumerate(store.series):
        true = store.read_label_volume(record.series_id)
        predicted = np.roll(true, (number % 2, number % 4, number % 3), axis=(0, 1, 2))
        if number % 10 == 3:
            predicted = np.where(predicted == 2, 1, predicted)
        yield record, true.astype(np.int32), predicted.astype(np.int32)


def evaluation_seconds(folder, *, num, shape_zyx):
    store = make_store(folder, num=num, shape_zyx=shape_zyx)
    cases = list(predictions(store))
    start = time.process_time()
    rows = []
    for record, true, predicted in cases:
        rows += case_rows(predicted, true, record, CLASSES, tolerance_mm=2.0)
    scored = time.process_time() - start
    write_evaluation(Evaluation(part="test", rows=rows, tolerance_mm=2.0), folder / "out", provenance={})
    return scored, time.process_time() - start


def report_cost(folder, *, num, shape_zyx):
    store = make_store(folder, num=num, shape_zyx=shape_zyx)
    rows, packed = [], {}
    for record, true, predicted in predictions(store):
        rows += case_rows(predicted, true, record, CLASSES, tolerance_mm=2.0)
        packed[record.series_id] = PackedLabels.pack(predicted)
    evaluation = Evaluation(part="test", rows=rows, tolerance_mm=2.0, predictions=packed)
    start = time.process_time()
    pictured = Pictured(store=store, intensity=store.intensity, classes=CLASSES)
    path = write_evaluation_report(evaluation, folder, title="benchmark", provenance={}, pictured=pictured)
    return time.process_time() - start, path.stat().st_size / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=40)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 128, 128), metavar=("Z", "H", "W"))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = tuple(arguments.shape)
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        scored, total = evaluation_seconds(Path(a), num=arguments.volumes, shape_zyx=shape)
        seconds, megabytes = report_cost(Path(b), num=arguments.cases, shape_zyx=(32, 96, 96))
    today = datetime.date.today().isoformat()
    z, h, w = shape
    viewer = "with the viewer" if find_bundle() else "without the viewer (niivue is not vendored)"
    text = "\n".join(
        [
            f"# Evaluation: metrics and report, {today}",
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, load "
            f"{os.getloadavg()[0]:.1f}. Command: `python benchmarks/evaluation_speed.py`.",
            "",
            "| what | measured | target |",
            "|---|---|---|",
            f"| {arguments.volumes} volumes of {w} x {h} x {z}, two classes, nine metrics | {scored:.1f} s | |",
            f"| the same with averages, intervals and files | {total:.1f} s | 30 s |",
            f"| report of {arguments.cases} cases {viewer} | {seconds:.1f} s | 10 s |",
            f"| its size | {megabytes:.1f} MB | 10 MB |",
            "",
        ]
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"evaluation_speed-{today}.md").write_text(text)


if __name__ == "__main__":
    main()
