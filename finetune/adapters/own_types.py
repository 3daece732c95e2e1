"""How a tuner of our own joins peft's: its list of types is closed to others, its tables take any text."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def register(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Let ``get_peft_model`` and ``PeftModel.from_pretrained`` find a tuner by the type in its configuration."""
    tables: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for table, entry in tables:
        table[name] = entry
