"""The adapter pair before merging, with the weights it was trained on, for ``PeftModel.from_pretrained``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from samgraft.finetune.initial_weights import InitialWeights, read_initial_weights
from samgraft.finetune.model_folder import FinishedModel
from samgraft.finetune.segmenter import add_class_tokens
from samgraft.shared.errors import SamgraftError
from samgraft.shared.files import write_tensors
from samgraft.shared.release.formats import Artefact, Format
from samgraft.shared.release.licence import KNOWN_BASES
from samgraft.shared.release.subject import Subject

PAIR = ("adapter_config.json", "adapter_model.safetensors")
BASE_FILE = "base.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What the run started from, or why it cannot be had."""

    point: InitialWeights | None = None
    where: str = ""
    """Path or name of the base weights, as the run's configuration has it; never released."""
    problem: str = ""


def adapter_format(model: FinishedModel, run: Path) -> Format:
    """Return the ``peft`` format of one run."""
    adapter = model.folder / "adapter"
    num_classes = model.task.classes.num_classes

    @cache
    def start() -> _Start:
        return _find_start(run)

    def why_not(subject: Subject) -> str | None:
        if not all((adapter / name).is_file() for name in PAIR):
            return "the run has no adapter: its method changes whole weights."
        kind = str(json.loads((adapter / PAIR[0]).read_text(encoding="utf-8")).get("peft_type"))
        if kind not in _stock_kinds():
            return f"its adapter ({kind.lower()}) is this project's own and stock peft cannot load it."
        return start().problem or None

    def write(subject: Subject, folder: Path) -> list[Artefact]:
        folder = folder / "peft"
        folder.mkdir()
        shutil.copyfile(adapter / PAIR[1], folder / PAIR[1])
        begin = start()
        assert begin.point is not None
        point = begin.point
        known = KNOWN_BASES.get(point.base.sha256)
        sam, _ = point.build()
        is_public = known is not None and not point.is_continued and num_classes <= _room(sam)
        title = known[0] if is_public and known else BASE_FILE
        config = json.loads((adapter / PAIR[0]).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = title
        (folder / PAIR[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if is_public:
            return [Artefact(path="peft", client="peft", options={"base": begin.where})]
        # An adapter on weights that nobody else has is of no use: they come along.
        add_class_tokens(sam, num_classes=num_classes)
        write_tensors(folder / BASE_FILE, sam.state_dict())
        return [Artefact(path="peft", client="peft")]

    return Format(name="peft", why_not=why_not, write=write)


def _room(sam: Any) -> int:
    return max(1, int(sam.mask_decoder.num_mask_tokens) - 1)


def _stock_kinds() -> set[str]:
    from peft import PeftType  # imports transformers: seconds

    return {kind.value for kind in PeftType}


def _find_start(run: Path) -> _Start:
    """Read again what the run started from, and make sure that it is the same."""
    gone = "the weights it started from are no longer where the run's configuration says"
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
        point = read_initial_weights(
            Path(values["ckpt"]),
            base=Path(values["base"]) if values.get("base") else None,
            image_size=values.get("image_size"),
        )
    except (OSError, KeyError, ValueError, SamgraftError) as err:
        return _Start(problem=f"{gone} ({type(err).__name__}).")
    same = (point.encoder.sha256, point.base.sha256) == (facts.get("encoder_sha256"), facts.get("base_sha256"))
    return _Start(point=point, where=str(values.get("base") or values["ckpt"])) if same else _Start(problem=f"{gone}.")
