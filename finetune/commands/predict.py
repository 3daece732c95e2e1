"""Command ``samgraft predict``, which writes masks of scans in their own geometry."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.shared.cli import Command, local_path
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, ExitCode, StoppedAndSaved, UsageError

if TYPE_CHECKING:
    from samgraft.finetune.prediction.predict import PredictReport
    from samgraft.finetune.prediction.prediction_inputs import Inputs
    from samgraft.shared.training.signals import StopRequest

log = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 60.0
FORMATS = ("nifti", "nrrd", "dicom-seg")
PICTURES = ("auto", "stack", "single")
MAX_NOTES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="RUN_OR_RELEASE", type=Path, help="a finished stage-2 run or a release")
    parser.add_argument("input", metavar="INPUT", type=local_path, help="a scan, a folder, a DICOM series, a CSV list")
    parser.add_argument("--out", type=Path, required=True, help="folder for the masks")
    parser.add_argument(
        "--prompts", type=Path, help="YAML or JSON with boxes and points, slice by slice; default: automatic"
    )
    parser.add_argument(
        "--formats", help="nifti, nrrd, dicom-seg (for DICOM input), separated by commas; default all that apply"
    )
    parser.add_argument(
        "--flips", action="store_true", help="average over mirrored slices, which takes four times as long"
    )
    parser.add_argument(
        "--no-postprocessing", action="store_true", help="write the segmentation without post-processing"
    )
    parser.add_argument("--frame", type=int, help="number of the volume in 4D files, counted from 0")
    parser.add_argument("--allow-gaps", action="store_true", help="accept missing DICOM slices")
    parser.add_argument(
        "--pictures", choices=PICTURES, default="auto", help="meaning of a folder of pictures; default as in training"
    )
    parser.add_argument("--nan-policy", default="refuse", choices=("refuse", "zero"), help="NaN and Inf in scans")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="number format")
    parser.add_argument("--batch-size", type=int, help="slices per forward pass; default 1 on a CPU, 8 on a GPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from samgraft.finetune.model_folder import read_task
    from samgraft.finetune.prediction.predict import PredictSettings, predict_scans
    from samgraft.finetune.prediction.prediction_inputs import find_inputs
    from samgraft.finetune.prediction.predictor import Predictor
    from samgraft.finetune.prompting.prompt_file import read_prompts
    from samgraft.shared.scans.discovery import pictures_are_scans
    from samgraft.shared.training.device import retain_freed_memory
    from samgraft.shared.training.signals import StopRequest, handle_stop_signals

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {arguments.batch_size}.")
    single = pictures_are_scans(arguments.pictures, read_task(arguments.model).modality)
    inputs = find_inputs(
        arguments.input, frame=arguments.frame, allow_gaps=arguments.allow_gaps, pictures_are_scans=single
    )
    formats = _formats(arguments.formats, inputs)
    retain_freed_memory()
    predictor = Predictor(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        flips=arguments.flips,
        postprocess=not arguments.no_postprocessing,
    )
    predictor.check_mode(prompted=arguments.prompts is not None)
    prompts = read_prompts(arguments.prompts, predictor.classes) if arguments.prompts else None
    _log_start(inputs, predictor.reason, predictor.postprocessing.describe(predictor.classes))
    if prompts is not None:
        log.info("only slices with a prompt are segmented, and no mask is propagated between slices")
    stop = StopRequest()
    stop.kept = "every finished scan"
    settings = PredictSettings(formats=formats, zero_non_finite=arguments.nan_policy == "zero")
    with handle_stop_signals(stop):
        report = predict_scans(
            predictor, inputs.scans, arguments.out, settings=settings, prompts=prompts, progress=_ProgressLines(stop)
        )
    _log_viewers(report, inputs, arguments.out)
    return _finish(report, arguments.out, total=len(inputs.scans))


def _formats(text: str | None, inputs: Inputs) -> tuple[str, ...]:
    from samgraft.finetune.prediction.dicom_seg_file import is_available

    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip())) if text else FORMATS
    if not chosen or set(chosen) - set(FORMATS):
        raise UsageError(f"--formats must be some of {', '.join(FORMATS)}, got {text!r}.")
    # DICOM-SEG refers to the images of a DICOM series, so other scans cannot have it.
    num_dicom = sum(scan.is_dicom for scan in inputs.scans)
    if chosen == ("dicom-seg",) and num_dicom < len(inputs.scans):
        raise UsageError(
            f"--formats=dicom-seg gives no mask for {counted(len(inputs.scans) - num_dicom, 'scan')} that are not "
            "DICOM. Add nifti or nrrd."
        )
    if "dicom-seg" in chosen and num_dicom and not is_available():
        if text:
            raise UsageError("DICOM-SEG needs highdicom.", next_command="pip install 'samgraft[dicom]'")
        log.warning("no DICOM-SEG for %d series: pip install 'samgraft[dicom]'", num_dicom)
        return tuple(name for name in chosen if name != "dicom-seg")
    return chosen


def _log_start(inputs: Inputs, device: str, postprocessing: str) -> None:
    log.info("%s; %s; post-processing: %s", counted(len(inputs.scans), "scan"), device, postprocessing)
    for reason, count in inputs.left_out.most_common():
        log.info("left out: %d x %s", count, reason)
    for note in inputs.notes:
        log.info("note: %s", note)


def _log_viewers(report: PredictReport, inputs: Inputs, out: Path) -> None:
    """Print how the first mask is opened in ITK-SNAP and in 3D Slicer."""
    from samgraft.finetune.prediction.predict import ENDINGS
    from samgraft.finetune.prediction.prediction_files import LABEL_LIST

    first = next((scan for scan in inputs.scans if scan.name in {*report.written, *report.skipped}), None)
    if first is None:
        return
    scan = first.case.scan.paths[0]
    volume, segmentation = (out / f"{first.out_stem}{ENDINGS[name]}" for name in ("nifti", "nrrd"))
    ways = []
    if volume.is_file():
        words = ["itksnap", "-g", str(scan), "-s", str(volume), "-l", str(out / LABEL_LIST)]
        ways.append(f"in ITK-SNAP: {shlex.join(words)}")
    if segmentation.is_file():
        ways.append(f"in 3D Slicer: drop {segmentation} and the scan on its window")
    if ways:
        log.info("view %s", "; ".join(ways))


def _finish(report: PredictReport, out: Path, *, total: int) -> int:
    parts = [f"{len(report.written)} segmented"]
    if report.skipped:
        parts.append(f"{len(report.skipped)} finished before (verified)")
    if report.unprompted:
        parts.append(f"{len(report.unprompted)} without a prompt")
    if report.refused:
        parts.append(f"{len(report.refused)} refused")
    for note, number in report.notes.most_common(MAX_NOTES):
        log.info("note: %d x %s", number, note)
    if (more := len(report.notes) - MAX_NOTES) > 0:
        log.info("note: %d more in the records beside the masks", more)
    log.info("%s: %s; masks in %s", counted(total, "scan"), ", ".join(parts), out)
    if report.refused:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(report.refused.items())[:5])
        raise DataError(
            f"{len(report.refused)} of {counted(total, 'scan')} could not be segmented. {shown}",
            kept=f"{counted(len(report.written) + len(report.skipped), 'mask')}",
            next_command="repair or remove them and run the same command again; finished scans are skipped",
        )
    return int(ExitCode.OK)


class _ProgressLines:
    """Progress lines, one per scan, with a line per minute or a changing line on a terminal in long scans."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.is_terminal = sys.stderr.isatty()
        self.head = ""
        self.last = 0.0
        self.finished = 0

    def begin(self, number: int, total: int, name: str) -> Callable[[int, int], None]:
        """Start the line of a scan and return the function that reports its slices."""
        self._raise_if_stopped(total)
        self.head = f"{number}/{total} {name}"
        self.last = time.monotonic()

        # Called after every batch, so that Ctrl-C ends a long scan at once. A scan is written only when it is finished.
        def on_slices(done: int, of: int) -> None:
            self._raise_if_stopped(total)
            now = time.monotonic()
            if self.is_terminal:
                sys.stderr.write(f"\r{self.head}: slice {done} of {of}\x1b[K")
                sys.stderr.flush()
            elif now - self.last > PLAIN_LINE_EVERY_S:
                self.last = now
                log.info("%s: slice %d of %d", self.head, done, of)

        return on_slices

    def end(self, name: str, text: str) -> None:
        """Log the result of a scan."""
        self.finished += 1
        if self.is_terminal:
            sys.stderr.write("\r\x1b[K")
        log.info("%s: %s", self.head, text)

    def _raise_if_stopped(self, total: int) -> None:
        if self.stop.requested:
            raise StoppedAndSaved(
                f"{self.stop.signal_name} after {self.finished} of {counted(total, 'scan')}.",
                kept="every finished scan",
                next_command="run the same command again; finished scans are skipped",
            )


COMMAND = Command(help="masks for new scans, in their own geometry", add_arguments=add_arguments, run=run)
