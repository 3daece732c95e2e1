"""``samgraft evaluate``: Dice per case and class on the scans' own grids, with intervals over patients."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from samgraft.shared.cli import Command
from samgraft.shared.errors import ExitCode, UsageError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="RUN_OR_RELEASE", help="a finished stage-2 run or a release")
    parser.add_argument("--data", type=Path, help="labelled slice store; default the one the run was trained on")
    parser.add_argument("--split-file", type=Path, help="split by patient; default the one beside the store")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="part (default test)")
    parser.add_argument("--out", type=Path, help="folder; default RUN/evaluation/PART")
    parser.add_argument("--batch-size", type=int, default=8, help="slices per forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    from samgraft.finetune.evaluate import evaluate, write_evaluation
    from samgraft.finetune.model_folder import read_model
    from samgraft.shared.data.split import load_split
    from samgraft.shared.data.store import SliceStore
    from samgraft.shared.training.device import choose_device

    path = Path(arguments.model)
    model = read_model(path)
    store = SliceStore.open(arguments.data or _store_of_run(path))
    split = load_split(arguments.split_file, store)
    model.segmenter.to(choose_device(arguments.device).torch_device)
    evaluation, _ = evaluate(model, store, split, part=arguments.split, batch_size=arguments.batch_size)
    folder = arguments.out or path / "evaluation" / arguments.split
    provenance = {
        "weights_sha256": model.card.weights_sha256,
        "store_fingerprint": store.fingerprint,
        "split_sha256": split.sha256,
    }
    write_evaluation(evaluation, folder, provenance=provenance)
    for row in evaluation.rows:
        dice = "n/a" if row["dice"] is None else f"{row['dice']:.3f}"
        log.info("%s %s: Dice %s (%d voxels true, %d predicted)", row["series_id"], row["class"], dice,
                 row["true_voxels"], row["predicted_voxels"])  # fmt: skip
    log.info("%s, mean: %s", arguments.split, evaluation.overall.render() if evaluation.overall else "n/a")
    log.info("written: %s, %s", folder / "cases.csv", folder / "summary.json")
    return int(ExitCode.OK)


def _store_of_run(path: Path) -> Path:
    """Read the store from the run's configuration; a release does not know where data lies."""
    config = path / "config.yaml"
    if not config.is_file():
        raise UsageError("a release does not know where the data lies.", next_command="add --data STORE.zarr (DATA=)")
    import yaml

    return Path(yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["store"])


COMMAND = Command(help="scores per case and class, with intervals over patients", add_arguments=add_arguments, run=run)
