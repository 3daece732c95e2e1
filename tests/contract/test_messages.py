"""What a message tells a person to type exists: options, configuration keys, commands, make targets."""

import argparse
import dataclasses
import re
import typing
from importlib.metadata import entry_points

import pytest
from message_texts import ROOT, texts
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.study.config import StudyConfig
from samgraft.shared.config import RENAMED_KEYS
from samgraft.ssl.config import PretrainConfig

NOT_OURS = ("tensorboard", "torchrun", "srun", "python -m", "mlflow ui")
"""A text that names one of these may name its options."""


def options_of(parser):
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found |= options_of(below)
    return found


def keys_of(config, prefix=""):
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        yield prefix + field.name
        for kind in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind):
                yield from keys_of(kind, f"{prefix}{field.name}.")


@pytest.fixture(scope="module")
def commands():
    return {point.name: point.load() for point in entry_points(group="samgraft.commands")}


def test_options__every_one_that_is_named_can_be_typed(commands):
    known = {"--debug", "--version", "--help"}
    for command in commands.values():
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        known |= options_of(parser)
    named = [
        (place, option)
        for place, text in texts()
        if " " in text.strip() and not any(word in text for word in NOT_OURS)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
    ]
    assert len(named) > 20
    assert [(place, option) for place, option in named if option not in known] == []


def test_keys__every_one_that_is_named_can_be_set():
    known = {key for config in (PretrainConfig, FinetuneConfig, StudyConfig) for key in keys_of(config)}
    known |= set(RENAMED_KEYS)  # Earlier names, which are refused with the new one.
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    pattern = re.compile(rf"(?<![\w./-])(?:{sections})(?:\.[a-z][a-z_0-9]*)+")
    files = (".safetensors", ".pt", ".pkl", ".npz", ".json", ".onnx")
    named = [(place, key) for place, text in texts() for key in pattern.findall(text) if not key.endswith(files)]
    assert len(named) > 50
    assert [(place, key) for place, key in named if key not in known] == []


def test_commands__every_one_that_is_named_exists(commands):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for place, text in texts():
        for command in re.findall(r"(?<![\w/.-])samgraft ([a-z-]+) (?=[-A-Z.<{])", text):
            assert command in commands, place
        for target in re.findall(r"\bmake ([a-z-]+) (?=[A-Z]+=)", text):
            assert target in targets, place
