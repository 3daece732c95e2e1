"""What trains: PEFT methods through peft, whole parts, and the heads of the mask decoder.

adapt(sam, config, num_classes=...)   in place; returns peft's wrapper, or None where SAM's own tensors train
"""

from samgraft.finetune.adapters.adaptation import adapt, can_merge
from samgraft.finetune.adapters.config import (
    AdapterConfig,
    BottleneckInit,
    Heads,
    Method,
    Scope,
    Targets,
)
from samgraft.finetune.adapters.merge import merge_adapters, take_out
from samgraft.finetune.adapters.placement import head_names, target_pattern
from samgraft.finetune.adapters.rank_updates import RankUpdates
from samgraft.finetune.adapters.saving import base_tensors, load_adapter, save_adapter
from samgraft.finetune.adapters.table import (
    TensorGroup,
    render_groups,
    render_parts,
    trainable_groups,
    trainable_table,
    trainable_tensors,
)

__all__ = [
    "AdapterConfig",
    "BottleneckInit",
    "Heads",
    "Method",
    "RankUpdates",
    "Scope",
    "Targets",
    "TensorGroup",
    "adapt",
    "base_tensors",
    "can_merge",
    "head_names",
    "load_adapter",
    "merge_adapters",
    "render_groups",
    "render_parts",
    "save_adapter",
    "take_out",
    "target_pattern",
    "trainable_groups",
    "trainable_table",
    "trainable_tensors",
]
