"""Fine-tuning methods, the modules that train whole, and adapter files.

``adapt(sam, config, num_classes=...)`` changes ``sam`` in place. It returns peft's wrapper, or None when SAM's own
tensors train.
"""

from samgraft.finetune.adapters.adaptation import adapt
from samgraft.finetune.adapters.choices import BottleneckInit, Heads, Targets, TuningScope
from samgraft.finetune.adapters.merge import base_tensors, merge_adapters
from samgraft.finetune.adapters.methods import METHODS, AdapterConfig, MethodSpec
from samgraft.finetune.adapters.placement import head_names, target_pattern
from samgraft.finetune.adapters.rank_updates import RankUpdates
from samgraft.finetune.adapters.saving import load_adapter, save_adapter
from samgraft.finetune.adapters.table import (
    TensorGroup,
    render_groups,
    render_parts,
    trainable_groups,
    trainable_table,
    trainable_tensors,
)

__all__ = [
    "METHODS",
    "AdapterConfig",
    "BottleneckInit",
    "Heads",
    "MethodSpec",
    "RankUpdates",
    "Targets",
    "TensorGroup",
    "TuningScope",
    "adapt",
    "base_tensors",
    "head_names",
    "load_adapter",
    "merge_adapters",
    "render_groups",
    "render_parts",
    "save_adapter",
    "target_pattern",
    "trainable_groups",
    "trainable_table",
    "trainable_tensors",
]
