"""The adapter on disk: peft's own two files, what it belongs to, and back onto the base weights.

adapter_config.json, adapter_model.safetensors       read by PeftModel.from_pretrained onto the base SAM
adapter_base.json                                    which base that is; peft does not look
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from samgraft.finetune.adapters.config import Method
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_tensors
from samgraft.shared.weights.adapter_base import read_adapter_base, write_adapter_base
from samgraft.shared.weights.save import tensors_sha256
from samgraft.shared.weights.tensor_report import shorten
from segment_anything.modeling import Sam
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"


def remember_base(peft_model: PeftModel, sha256: str) -> None:
    """Keep the identity of the weights before anything was put onto them."""
    vars(peft_model)["base_sha256"] = sha256


def remember_start(peft_model: PeftModel) -> None:
    """Keep the factors that pissa took out of the base weights: an adapter for the published base needs them."""
    tensors = {name: tensor.detach().clone() for name, tensor in _lora_factors(peft_model).items()}
    vars(peft_model)["pissa_start"] = tensors


def save_adapter(peft_model: PeftModel, folder: Path, *, method: Method) -> None:
    """Write the adapter for the base weights that the run started from."""
    config: Any = peft_model.peft_config["default"]
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter_base(folder, vars(peft_model)["base_sha256"])
    if method is Method.PISSA:
        _save_as_lora(peft_model, folder)
        return
    if method is Method.ADALORA:
        # Ranks that were taken away are 0 in the weights. peft would cut them by the last step's pattern, but the best
        # step may have had another one.
        config.rank_pattern = None
    peft_model.save_pretrained(str(folder))
    # peft writes through safetensors, which ignores the umask: nobody but the owner could read the file.
    write_tensors(folder / TENSORS_FILE, load_file(folder / TENSORS_FILE))


def load_adapter(sam: Sam, folder: Path) -> PeftModel:
    """Put a saved adapter onto its base weights, in place, frozen.

    Raises:
        WeightsError: If a file is missing, or the adapter does not fit ``sam`` or was trained on other weights.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from samgraft.finetune.adapters.layers import without_warnings_of_peft

    for name in (CONFIG_FILE, TENSORS_FILE):
        # Asked for by name: without the second peft would look for a pickle.
        if not (folder / name).is_file():
            raise WeightsError(
                f"an adapter must have {CONFIG_FILE} and {TENSORS_FILE}, {name} is missing.", where=folder.name
            )
    wanted, found = read_adapter_base(folder), tensors_sha256(sam.state_dict())
    try:
        with without_warnings_of_peft():
            loaded: PeftModel = PeftModel.from_pretrained(sam, str(folder))
    except (RuntimeError, ValueError, KeyError, TypeError) as err:
        raise WeightsError(
            f"the adapter must fit the weights beside it, and does not: {str(err).splitlines()[0][:200]}",
            where=folder.name,
        ) from err
    with safe_open(folder / TENSORS_FILE, framework="pt") as file:
        stored = set(file.keys())
    if odd := stored ^ set(get_peft_model_state_dict(loaded)):
        # peft leaves out silently what matches no layer.
        raise WeightsError(
            f"the adapter must fit the weights beside it, {len(odd)} of its tensors do not ({shorten(sorted(odd))}). "
            "It belongs to another architecture or another number of classes.",
            where=folder.name,
        )
    if wanted is not None and wanted != found:
        raise WeightsError(
            f"the adapter must lie on the weights it was trained on, whose tensors have sha256 {wanted[:16]}..., got "
            f"others of equal shapes ({found[:16]}...). Give the base of its run.",
            where=folder.name,
        )
    return loaded


def base_tensors(sam: Sam) -> dict[str, Tensor]:
    """Return an adapted model's base weights under segment_anything's own names, as they were before tuning."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    added: list[str] = []
    for name, module in sam.named_modules():
        if isinstance(module, BaseTunerLayer):
            added += [f"{name}.{attribute}." for attribute in (*module.adapter_layer_names, *module.other_param_names)]
        elif isinstance(module, ModulesToSaveWrapper):
            added.append(f"{name}.modules_to_save.")
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in sam.state_dict().items()
        if not name.startswith(tuple(added))
    }


def _lora_factors(peft_model: PeftModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    tensors: dict[str, Tensor] = get_peft_model_state_dict(peft_model)
    return {name: tensor for name, tensor in tensors.items() if ".lora_A." in name or ".lora_B." in name}


def _save_as_lora(peft_model: PeftModel, folder: Path) -> None:
    """Write what pissa learnt as a plain LoRA of twice the rank: B A - B0 A0, with A0 and B0 its start.

    Source:
        peft's ``LoraModel.subtract_mutated_init``, which wants the start as a folder on disk.
    """
    from peft import get_peft_model_state_dict

    start: dict[str, Tensor] = vars(peft_model)["pissa_start"]
    tensors: dict[str, Tensor] = dict(get_peft_model_state_dict(peft_model))
    for name, first in start.items():
        now = tensors[name]
        first = first.to(now)
        tensors[name] = torch.cat([now, first], 0) if ".lora_A." in name else torch.cat([now, -first], 1)
    config: Any = copy.deepcopy(peft_model.peft_config["default"])
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS_FILE, tensors, metadata={})
    config.save_pretrained(str(folder))
