"""Tables of the trainable tensors and their parameter counts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Trainable tensors whose names differ only in numbers."""

    name: str
    """Name with numbers as ``*``."""
    tensors: int
    parameters: int
    share: float
    """Fraction of all trainable parameters, 0 to 1."""


def trainable_tensors(sam: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by their name in ``sam``. A shared parameter occurs once."""
    return {name: parameter for name, parameter in sam.named_parameters() if parameter.requires_grad}


def trainable_table(sam: nn.Module) -> list[tuple[str, int, int]]:
    """Return (part, trainable, all) parameter counts, without peft's frozen copies of trained modules."""
    counts: dict[str, list[int]] = {}
    for name, parameter in sam.named_parameters():
        # peft keeps the frozen original of every module that trains as a copy. Counting both would count it twice.
        if ".original_module." in name or (".ln_tuning_layers." not in name and _is_replaced_norm(name, sam)):
            continue
        entry = counts.setdefault(name.split(".")[0], [0, 0])
        entry[0] += num_free(parameter) * parameter.requires_grad
        entry[1] += parameter.numel()
    return [(part, trainable, total) for part, (trainable, total) in counts.items()]


def trainable_groups(sam: nn.Module) -> list[TensorGroup]:
    """Return the trainable tensors in groups of one kind."""
    groups: dict[str, list[int]] = {}
    for name, parameter in trainable_tensors(sam).items():
        # peft puts the adapter's name "default" into every name, which has no meaning here.
        plain = re.sub(r"\.(modules_to_save\.)?default(?=\.|$)", "", name)
        entry = groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", plain), [0, 0])
        entry[0] += 1
        entry[1] += num_free(parameter)
    total = max(1, sum(parameters for _, parameters in groups.values()))
    return [
        TensorGroup(name=name, tensors=tensors, parameters=parameters, share=parameters / total)
        for name, (tensors, parameters) in groups.items()
    ]


def num_free(parameter: nn.Parameter) -> int:
    """Return how many numbers of a tensor can change. Some entries of qkv's updates are fixed at 0."""
    return parameter.numel() - int(getattr(parameter, "num_fixed", 0))


def render_groups(groups: list[TensorGroup]) -> list[str]:
    """Return the groups as lines of a log."""
    return [f"{g.parameters:>12,}  {100 * g.share:5.1f} %  {g.tensors:>4} x  {g.name}" for g in groups]


def render_parts(table: list[tuple[str, int, int]], groups: list[TensorGroup]) -> list[str]:
    """Return one line per part of the network with its trained tensors, parameters and share.

    Args:
        table: Result of ``trainable_table``.
        groups: Result of ``trainable_groups`` for the same network.
    """
    tensors = Counter[str]()
    for group in groups:
        tensors[group.name.split(".")[0]] += group.tensors
    width = max(len(part) for part, _, _ in table)
    trained, everything = sum(t for _, t, _ in table), sum(total for _, _, total in table)
    lines = [f"trained: {_share(trained, everything)} in {sum(tensors.values())} tensors"]
    for part, number, total in table:
        what = f"{_share(number, total)} in {tensors[part]} tensors" if tensors[part] else f"frozen, {_millions(total)}"
        lines.append(f"  {part:{width}}  {what}")
    return lines


def _share(number: int, total: int) -> str:
    return f"{number / 1e6:.3f} of {_millions(total)} ({100 * number / total:.1f} %)"


def _millions(number: int) -> str:
    return f"{number / 1e6:.3f} million parameters"


def _is_replaced_norm(name: str, sam: nn.Module) -> bool:
    """Return True for the original norm that ln_tuning keeps in addition to its trained copy."""
    if ".base_layer." not in name:
        return False
    owner = sam.get_submodule(name.rsplit(".base_layer.", 1)[0])
    return hasattr(owner, "ln_tuning_layers")
