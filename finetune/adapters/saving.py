"""Adapter files, and loading them onto their base weights.

An adapter folder has peft's own two files, which ``PeftModel.from_pretrained`` reads: ``adapter_config.json`` and
``adapter_model.safetensors``. A third one, ``adapter_base.json``, contains the hash of the base weights, which
peft does not check.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from samgraft.finetune.adapters.methods import METHODS
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_tensors
from samgraft.shared.weights.run_files import read_adapter_base, write_adapter_base
from samgraft.shared.weights.save import tensors_sha256
from samgraft.shared.weights.tensor_report import shorten
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from segment_anything.modeling import Sam

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"


def keep_base_sha256(peft_model: PeftModel, sha256: str) -> None:
    """Store the hash of the base weights in the wrapper, for ``save_adapter``."""
    vars(peft_model)["base_sha256"] = sha256


def keep_initial_factors(peft_model: PeftModel) -> None:
    """Store the factors that pissa subtracts from the base weights, for ``save_adapter``."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, Tensor] = get_peft_model_state_dict(peft_model)
    vars(peft_model)["initial_factors"] = {
        name: tensor.detach().clone() for name, tensor in tensors.items() if ".lora_A." in name or ".lora_B." in name
    }


def save_adapter(peft_model: PeftModel, folder: Path, *, method: str) -> None:
    """Write the adapter of a run, for the base weights as they were before the run."""
    config: Any = peft_model.peft_config["default"]
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter_base(folder, vars(peft_model)["base_sha256"])
    if METHODS[method].changes_base:
        _save_as_lora(peft_model, folder)
        return
    if hasattr(peft_model.base_model, "rankallocator"):
        # adalora: ranks that were removed are 0 in the weights. peft would cut them by the pattern of the last step,
        # but the best step may have had another one.
        config.rank_pattern = None
    peft_model.save_pretrained(str(folder))
    # peft writes through safetensors, which ignores the umask: only the owner could read the file.
    write_tensors(folder / TENSORS_FILE, load_file(folder / TENSORS_FILE))


def load_adapter(sam: Sam, folder: Path) -> PeftModel:
    """Load a saved adapter onto its base weights, in place and frozen.

    Raises:
        WeightsError: If a file is missing, or the adapter does not fit ``sam`` or was trained on other weights.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from samgraft.finetune.adapters.layers import without_peft_warnings

    # Without the tensors file peft would search for a pickle, which can run code.
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise WeightsError(
                f"an adapter must have {CONFIG_FILE} and {TENSORS_FILE}, {name} is missing.", where=folder.name
            )
    wanted, found = read_adapter_base(folder), tensors_sha256(sam.state_dict())
    try:
        with without_peft_warnings():
            loaded: PeftModel = PeftModel.from_pretrained(sam, str(folder))
    except (RuntimeError, ValueError, KeyError, TypeError) as err:
        raise WeightsError(
            f"the adapter does not fit its base weights: {str(err).splitlines()[0][:200]}", where=folder.name
        ) from err
    with safe_open(folder / TENSORS_FILE, framework="pt") as file:
        stored = set(file.keys())
    # peft silently ignores tensors that match no layer, so the names are compared both ways.
    if odd := stored ^ set(get_peft_model_state_dict(loaded)):
        raise WeightsError(
            f"the adapter does not fit its base weights: {len(odd)} tensors are different ({shorten(sorted(odd))}). "
            "It belongs to another architecture or another number of classes.",
            where=folder.name,
        )
    if wanted is not None and wanted != found:
        raise WeightsError(
            f"the adapter was trained on other base weights (their tensors have sha256 {found[:16]}..., expected "
            f"{wanted[:16]}...). Give the base weights of its run.",
            where=folder.name,
        )
    return loaded


def _save_as_lora(peft_model: PeftModel, folder: Path) -> None:
    """Write pissa's update as a plain LoRA of twice the rank.

    pissa trains B A on weights from which B0 A0 was subtracted. For the published base weights the update is
    B A - B0 A0, which is the LoRA with the factors [B, -B0] and [A, A0].

    Source:
        peft's ``LoraModel.subtract_mutated_init``, which needs the initial factors as a folder on disk.
    """
    from peft import get_peft_model_state_dict

    initial: dict[str, Tensor] = vars(peft_model)["initial_factors"]
    tensors: dict[str, Tensor] = dict(get_peft_model_state_dict(peft_model))
    for name, first in initial.items():
        now = tensors[name]
        first = first.to(now)
        tensors[name] = torch.cat([now, first], 0) if ".lora_A." in name else torch.cat([now, -first], 1)
    config: Any = copy.deepcopy(peft_model.peft_config["default"])
    # Both double, so that the scale alpha / r stays the same.
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    config.inference_mode = True
    write_tensors(folder / TENSORS_FILE, tensors, metadata={})
    config.save_pretrained(str(folder))
