"""peft's configuration of each method.

Imports peft, and with it transformers (seconds): import this where an adapter is made, not at the top of a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import peft
import peft.tuners.boft.layer
from peft import PeftConfig
from samgraft.finetune.adapters.config import AdapterConfig, BottleneckInit, Method, Scope, Targets
from samgraft.finetune.adapters.layers import BottleneckConfig, ScaleShiftConfig
from samgraft.finetune.adapters.placement import parallel_pattern
from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.errors import UsageError

ADALORA_START = 1.5
"""adalora begins with this many times the rank and takes the rest away (12 to 8 in the paper's code)."""
ADALORA_WARMUP = 0.1
ADALORA_FINAL = 0.4
"""Shares of the steps before ranks move, and after they are fixed."""

# Without this, every boft layer tries to compile a CUDA extension when it is made. One butterfly factor needs none.
setattr(peft.tuners.boft.layer, "_FBD_CUDA", False)  # noqa: B010  # typed as None there


def peft_config_of(
    config: AdapterConfig, spec: EncoderSpec, *, pattern: str, modules_to_save: list[str], max_steps: int | None
) -> PeftConfig:
    """Return what peft needs for a method.

    Args:
        config: The method and its options.
        spec: Architecture of the encoder.
        pattern: Full regular expression of the targets.
        modules_to_save: Modules that train whole.
        max_steps: Length of the run; adalora plans its ranks by it.

    Raises:
        UsageError: If adalora does not know the length of the run, or it is too short.
    """
    common = {"target_modules": pattern, "modules_to_save": modules_to_save or None}
    made = _BUILDERS[config.method](config, spec, max_steps)
    kind = made.pop("kind")
    result: PeftConfig = kind(**common, **made)
    return result


def _lora(config: AdapterConfig, spec: EncoderSpec, max_steps: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {
        "kind": peft.LoraConfig,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.method is Method.DORA,
        "use_rslora": config.method is Method.RSLORA,
    }
    if config.targets is Targets.QV and config.scope is Scope.ENCODER_DECODER:
        # The encoder's qkv is one layer: rank r for the queries and r for the values (``hold_keys``), at their scale.
        alpha = config.lora_alpha * (math.sqrt(2) if config.method is Method.RSLORA else 2)
        options |= {"rank_pattern": {r"attn\.qkv": 2 * config.r}, "alpha_pattern": {r"attn\.qkv": alpha}}
    if config.method is Method.PISSA:
        options["init_lora_weights"] = "pissa"
    if config.method is Method.EVA:
        # rho 1: no rank moves between layers, so that a file of this method has the shape of a plain LoRA's.
        options |= {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0, use_label_mask=False)}
    return options


def _adalora(config: AdapterConfig, spec: EncoderSpec, max_steps: int | None) -> dict[str, Any]:
    start = max(config.r + 1, round(ADALORA_START * config.r))
    if max_steps is None:
        raise UsageError("adapter.method=adalora must know trainer.max_steps: it plans its ranks by them.")
    warmup, final = round(ADALORA_WARMUP * max_steps), round(ADALORA_FINAL * max_steps)
    if max_steps < 10:
        raise UsageError(
            f"trainer.max_steps must be at least 10 for adapter.method=adalora, got {max_steps}: its ranks "
            "move between 10 % and 60 % of the run.",
            where="trainer.max_steps",
        )
    return {
        "kind": peft.AdaLoraConfig,
        "init_r": start,
        "target_r": config.r,
        "lora_alpha": config.lora_alpha,
        "tinit": warmup,
        "tfinal": final,
        "deltaT": max(1, max_steps // 100),
        "total_step": max_steps,
    }


def _lycoris(kind: type[PeftConfig]) -> Callable[[AdapterConfig, EncoderSpec, int | None], dict[str, Any]]:
    return lambda config, spec, max_steps: {"kind": kind, "r": config.r, "alpha": config.lora_alpha}


def _bottleneck(config: AdapterConfig, spec: EncoderSpec, max_steps: int | None) -> dict[str, Any]:
    return {
        "kind": BottleneckConfig,
        "parallel_modules": parallel_pattern(spec, config),
        "ratio": config.bottleneck_ratio,
        "parallel_scale": config.bottleneck_mlp_scale,
        "init_zero": config.bottleneck_init is BottleneckInit.ZERO,
    }


_BUILDERS: Mapping[Method, Callable[[AdapterConfig, EncoderSpec, int | None], dict[str, Any]]] = {
    Method.LORA: _lora,
    Method.DORA: _lora,
    Method.RSLORA: _lora,
    Method.PISSA: _lora,
    Method.EVA: _lora,
    Method.ADALORA: _adalora,
    Method.ADAPTER: _bottleneck,
    Method.LOHA: _lycoris(peft.LoHaConfig),
    Method.LOKR: _lycoris(peft.LoKrConfig),
    Method.IA3: lambda config, spec, max_steps: {"kind": peft.IA3Config, "feedforward_modules": []},
    Method.VERA: lambda config, spec, max_steps: {"kind": peft.VeraConfig, "r": config.vera_r},
    Method.HRA: lambda config, spec, max_steps: {"kind": peft.HRAConfig, "r": config.r},
    Method.BOFT: lambda config, spec, max_steps: {
        "kind": peft.BOFTConfig,
        "boft_block_size": config.boft_block_size,
        "boft_n_butterfly_factor": 1,
        "bias": "none",
    },
    Method.SSF: lambda config, spec, max_steps: {"kind": ScaleShiftConfig},
    Method.LN_TUNING: lambda config, spec, max_steps: {"kind": peft.LNTuningConfig},
}
