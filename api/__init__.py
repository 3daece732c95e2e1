"""The Python interface, with the words of the command line.

    import samgraft.api as sg

    store = sg.build_store("scans/", "data/mine.zarr", modality="mri")
    encoder = sg.pretrain(store.path, base="sam_vit_b.pth")
    run = sg.finetune("data/labelled.zarr", ckpt=encoder.path)
    scores = sg.evaluate(run.path).cases
    sg.load(run.path).predict("scan.nii.gz").save("mask.nii.gz")

Nothing heavy is imported before a function needs it. Errors are ``SamgraftError`` and its subclasses, which state what
is wrong and what to do. No signal handler is installed. In a notebook or an interactive session the messages of the
command line are shown, unless the program has configured logging.
"""

from __future__ import annotations

from importlib.metadata import version

from samgraft.api.calls import as_call
from samgraft.api.loading import load, load_encoder, load_sam, open_store
from samgraft.finetune.commands.average import average as _average
from samgraft.finetune.commands.compare import ComparisonResult
from samgraft.finetune.commands.compare import compare as _compare
from samgraft.finetune.commands.evaluate import EvaluationResult
from samgraft.finetune.commands.evaluate import evaluate as _evaluate
from samgraft.finetune.commands.finetune import finetune as _finetune
from samgraft.finetune.commands.selftrain import selftrain as _selftrain
from samgraft.shared.commands.release import ReleaseResult
from samgraft.shared.commands.release import release as _release
from samgraft.shared.commands.store import StoreResult
from samgraft.shared.commands.store import build_store as _build_store
from samgraft.shared.errors import SamgraftError
from samgraft.shared.runs.result import TrainingResult
from samgraft.ssl.command import pretrain as _pretrain

__version__ = version("samgraft")

build_store = as_call(_build_store)
pretrain = as_call(_pretrain)
finetune = as_call(_finetune)
selftrain = as_call(_selftrain)
evaluate = as_call(_evaluate)
compare = as_call(_compare)
average = as_call(_average)
release = as_call(_release)

__all__ = [
    "ComparisonResult",
    "EvaluationResult",
    "ReleaseResult",
    "SamgraftError",
    "StoreResult",
    "TrainingResult",
    "__version__",
    "average",
    "build_store",
    "compare",
    "evaluate",
    "finetune",
    "load",
    "load_encoder",
    "load_sam",
    "open_store",
    "pretrain",
    "release",
    "selftrain",
]
