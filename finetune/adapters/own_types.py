"""Dealing with peft's ways: a tuner of our own among its types, and warnings that do not concern us."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def register(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Let ``get_peft_model`` and ``PeftModel.from_pretrained`` find a tuner by the type in its configuration.

    peft's list of types is closed to others, its tables take any text.
    """
    tables: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for table, entry in tables:
        table[name] = entry


@contextmanager
def without_warnings_of_peft() -> Iterator[None]:
    """Hide what peft says about layers and settings that are as they should be, and what is checked here instead."""
    with warnings.catch_warnings():
        for message in (
            "Unsupported layer type",  # a norm has no inputs and outputs of its own; ln_tuning does not ask
            "lora with eva initialization used",  # memory of language models
            "Found missing adapter keys",  # an error here
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
