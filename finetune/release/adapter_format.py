"""The peft format, with the adapter before merging and the weights on which it was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
class _TrainedOn:
    """Initial weights of the run, or the reason why they are unavailable."""

    weights: InitialWeights | None = None
    where: str = ""
    """Path of the base weights in the run's configuration. It is never written into a release."""
    problem: str = ""


def adapter_format(model: FinishedModel, run: Path) -> Format:
    """Return the ``peft`` format of one run."""
    adapter = model.folder / "adapter"
    num_classes = model.task.classes.num_classes

    # Both functions below need the weights, which are large. They are read only if the run has an adapter.
    @cache
    def trained_on() -> _TrainedOn:
        return _read_trained_on(run)

    def why_not(subject: Subject) -> str | None:
        if not all((adapter / name).is_file() for name in PAIR):
            return "the run has no adapter: its method changes the weights themselves."
        kind = str(json.loads((adapter / PAIR[0]).read_text(encoding="utf-8")).get("peft_type"))
        if kind not in _stock_kinds():
            return f"its adapter ({kind.lower()}) is samgraft's own and peft cannot load it."
        return trained_on().problem or None

    def write(subject: Subject, folder: Path) -> list[Artefact]:
        folder = folder / "peft"
        folder.mkdir()
        shutil.copyfile(adapter / PAIR[1], folder / PAIR[1])
        found = trained_on()
        assert found.weights is not None
        known = KNOWN_BASES.get(found.weights.base.sha256)
        sam, _ = found.weights.build()
        # Users can fetch published base weights, unless this run changed them: another encoder or more mask tokens.
        has_tokens = num_classes <= max(1, int(sam.mask_decoder.num_mask_tokens) - 1)
        is_public = known is not None and not found.weights.is_continued and has_tokens
        title = known[0] if is_public and known else BASE_FILE
        config = json.loads((adapter / PAIR[0]).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = title
        (folder / PAIR[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if is_public:
            return [Artefact(path="peft", client="peft", options={"base": found.where})]
        # Without these weights the adapter would be useless to others.
        add_class_tokens(sam, num_classes=num_classes)
        write_tensors(folder / BASE_FILE, sam.state_dict())
        return [Artefact(path="peft", client="peft")]

    return Format(name="peft", why_not=why_not, write=write)


def _stock_kinds() -> set[str]:
    from peft import PeftType  # imports transformers: seconds

    return {kind.value for kind in PeftType}


def _read_trained_on(run: Path) -> _TrainedOn:
    """Read the initial weights of the run again and check their hashes."""
    gone = "the weights that the run started from are no longer at the path in its config.yaml"
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
        weights = read_initial_weights(
            Path(values["ckpt"]) if values.get("ckpt") else None,
            base=Path(values["base"]) if values.get("base") else None,
            image_size=values.get("image_size"),
            model=values.get("arch"),
        )
    except (OSError, KeyError, ValueError, TypeError, SamgraftError) as err:
        return _TrainedOn(problem=f"{gone} ({type(err).__name__}).")
    # A path may hold another file by now, on which the adapter would give other outputs.
    same = (weights.encoder.sha256, weights.base.sha256) == (facts.get("encoder_sha256"), facts.get("base_sha256"))
    if not same:
        return _TrainedOn(problem=f"{gone}.")
    return _TrainedOn(weights=weights, where=str(values.get("base") or values["ckpt"]))
