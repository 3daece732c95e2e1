"""Settings as a user writes them, in YAML files and in overrides.

YAML is read by the rules of its version 1.2 and every value keeps its text, its file and its line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from samgraft.shared.errors import UsageError

MAX_CONFIG_BYTES = 1_000_000


class Setting:
    """One value as a user wrote it.

    Not a dataclass, because OmegaConf would take a dataclass for a section of its own and look into it.

    Attributes:
        value: Parsed scalar, or a list of settings.
        text: Characters of the value as written, which fields that hold text take.
        where: File and line, or the command-line override.
    """

    def __init__(self, value: Any, text: str, where: str) -> None:
        self.value = value
        self.text = text
        self.where = where


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a plain YAML (or JSON) file of keys and values.

    Raises:
        UsageError: If it is missing, too large, or uses tags, aliases, duplicate keys or YAML 1.1 forms of numbers.
    """
    values = _values(read_settings_file(path))
    assert isinstance(values, dict)
    return values


def _values(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        return {key: _values(value) for key, value in settings.items()}
    if isinstance(settings, Setting):
        return _values(settings.value)
    return [_values(value) for value in settings] if isinstance(settings, list) else settings


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases and resolves scalars by YAML 1.2's core schema."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"anchors and aliases are not allowed (line {self.peek_event().start_mark.line + 1})")
        return super().compose_node(parent, index)


def _core_schema_resolvers() -> dict[str, list[tuple[str, Any]]]:
    """Return YAML 1.2's rules, which have no dates and no octal, hexadecimal or base-60 numbers."""
    number_start = list("-+0123456789.")
    digits = r"(?:0|[1-9][0-9]*)"
    rules = [
        ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
        ("int", rf"^[-+]?{digits}$", number_start),
        ("float", rf"^[-+]?(?:\.[0-9]+|{digits}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", number_start),
        ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ]
    table: dict[str, list[tuple[str, Any]]] = {}
    for kind, pattern, starts in rules:
        for start in starts:
            table.setdefault(start, []).append((f"tag:yaml.org,2002:{kind}", re.compile(pattern)))
    return table


_StrictLoader.yaml_implicit_resolvers = _core_schema_resolvers()
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read a YAML file as nested mappings of ``Setting``.

    Raises:
        UsageError: If it is missing, too large, or not plain YAML.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"the configuration file {what}. Give the path of a YAML file.", where=str(path))
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UsageError(f"a configuration file must be under {MAX_CONFIG_BYTES} bytes.", where=path.name)
    try:
        content = _compose(path.read_text(encoding="utf-8-sig"), where=path.name)
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        raise UsageError(
            f"the configuration file is not plain YAML: {_yaml_problem(err)}. Write one `key: value` per line and nest "
            "with spaces.",
            where=path.name,
        ) from err
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            "a configuration file must hold keys and values at its top level. Write one `key: value` per line.",
            where=path.name,
        )
    return content


def read_override(text: str, *, takes_text: bool, where: str) -> Any:
    """Read the value of an override ``key=value`` as a ``Setting`` or as nested mappings of them.

    Args:
        text: Characters after the equals sign.
        takes_text: True if the field holds text, which takes the characters as they are.
        where: Override for messages.
    """
    text = text.strip()
    try:
        content = _compose(text, where="")
    except (yaml.YAMLError, ValueError, RecursionError):
        content = Setting(text, text, where)
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_null = isinstance(content, Setting) and content.value is None and content.text == text
    if takes_text and not (is_null or (is_quoted and isinstance(content, Setting))):
        # A path may look like YAML: [x].zarr is a list, C:\\x: y a mapping, and "scan #2" ends with a comment.
        content = Setting(text, text, where)
    return _placed(content or Setting(None, "", where), where)


def _placed(content: Any, where: str) -> Any:
    """Return settings of an override with the override as their place."""
    if isinstance(content, Mapping):
        return {key: _placed(value, where) for key, value in content.items()}
    value = [_placed(child, where) for child in content.value] if isinstance(content.value, list) else content.value
    return Setting(value, content.text, where)


def _compose(text: str, *, where: str) -> Any:
    """Parse YAML into nested mappings of ``Setting``. The result of an empty document is None."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _from_node(loader, node, text, where)
    finally:
        loader.dispose()


def _from_node(loader: _StrictLoader, node: Any, text: str, where: str) -> Any:
    line = node.start_mark.line + 1
    place = f"{where}, line {line}"
    if node.tag not in _PLAIN_TAGS:
        raise yaml.YAMLError(f"the tag {node.tag!r} is not allowed (line {line})")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in mapping:
                raise yaml.YAMLError(f"duplicate key {key!r} in line {key_node.start_mark.line + 1}")
            mapping[key] = _from_node(loader, value_node, text, where)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        children = [_from_node(loader, child, text, where) for child in node.value]
        return Setting(children, text[node.start_mark.index : node.end_mark.index], place)
    try:
        return Setting(loader.construct_object(node), str(node.value), place)
    except ValueError as err:  # Python refuses to convert a number of more than 4,300 digits.
        raise yaml.YAMLError(f"the number has too many digits (line {line})") from err


def _yaml_problem(err: Exception) -> str:
    mark = getattr(err, "problem_mark", None)
    if isinstance(err, RecursionError):
        return "it is nested too deeply"
    if isinstance(err, UnicodeDecodeError):
        line = err.object.count(b"\n", 0, err.start) + 1
        return f"it is not UTF-8 text (line {line}). Save it as UTF-8"
    if mark is None:
        return str(err).splitlines()[0]
    problem = getattr(err, "problem", None) or "it cannot be read"
    if "'\\t'" in problem:
        problem = "a tab is not allowed as a space"
    return f"{problem} (line {mark.line + 1})"
