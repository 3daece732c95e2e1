"""Typed dataclasses from YAML files and dotted overrides; the only user of OmegaConf.

A configuration is a tree of frozen dataclasses. ``load_config`` merges, in this order: the defaults of the
dataclasses, the given YAML layers, the dotted overrides ``key.sub=value``. Unknown keys, wrong types and duplicate
keys are errors that name the key and the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from samgraft.shared.errors import UsageError

Schema = TypeVar("Schema")
MAX_CONFIG_BYTES = 1_000_000

MAY_CHANGE: Final = MappingProxyType({"may_change_on_resume": True})
"""``field(metadata=MAY_CHANGE)``: this setting does not change the numbers, so a resumed run may have another one."""


def packaged_config(relative: str) -> Path:
    """Return the path of a YAML file shipped as ``samgraft.configs``, e.g. ``pretrain/default.yaml``.

    Raises:
        UsageError: If there is no such file; the message lists its neighbours.
    """
    # An editable install adds a placeholder that is no folder to the namespace; importlib.resources trips over it.
    spec = find_spec("samgraft.configs")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    root = next(place for place in places if place.is_dir())
    path = root / relative
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UsageError(
            f"{path.parent.name} must be one of {', '.join(known)}, got {path.stem!r}.{_hint(path.stem, known)}",
            where=f"configs/{relative}",
        )
    return path


def load_config(
    schema: type[Schema], *, layers: Sequence[Path | Mapping[str, Any]] = (), overrides: Sequence[str] = ()
) -> Schema:
    """Merge defaults, YAML layers and dotted overrides into an instance of ``schema``.

    Args:
        schema: A frozen dataclass, nested as needed. Fields without default are required.
        layers: YAML files or plain mappings, later ones win.
        overrides: ``key.sub=value`` strings, applied last. Values are parsed as YAML scalars.

    Returns:
        The dataclass instance; its ``__post_init__`` checks have run.

    Raises:
        UsageError: For an unknown key (with the nearest known key), a wrong type, a missing required key, a failed
            check, or a file that is not plain YAML.
    """
    config = OmegaConf.structured(schema)
    _make_writable(config)
    for layer in layers:
        name = layer.name if isinstance(layer, Path) else "command line"
        values = read_yaml(layer) if isinstance(layer, Path) else dict(layer)
        config = _merge(config, values, schema, where=name)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key or key.startswith("-"):
            raise UsageError(
                f"an override must look like key.sub=value, got {override!r}.", where="command line (ARGS=...)"
            )
        try:
            single = OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as err:
            raise UsageError(f"the value of {key} is not plain YAML: {text!r}.", where="command line") from err
        nested = OmegaConf.to_container(single)
        assert isinstance(nested, dict)
        config = _merge(config, {str(k): v for k, v in nested.items()}, schema, where=f"command line: {override}")
    return _to_object(config, schema)


def read_settings(layers: Sequence[Path | Mapping[str, Any]], overrides: Sequence[str]) -> dict[str, str]:
    """Return what a user wrote, by dotted key and as text, before defaults are filled in by what it says.

    Nothing is checked here: ``load_config`` reads the same again. Lists and null are left out.

    Raises:
        UsageError: For a file that is not plain YAML.
    """
    said: dict[str, str] = {}
    for layer in layers:
        said |= dict(_leaves(read_yaml(layer) if isinstance(layer, Path) else layer, ""))
    for override in overrides:
        key, _, text = override.partition("=")
        said[key] = text.strip().strip("\"'")
    return {key: text for key, text in said.items() if text.lower() not in {"", "~", "null"}}


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", "" if value is None else str(value)


def without_keys(overrides: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Return the overrides that set none of ``keys``: what stands behind them was read and filled in already."""
    read = set(keys)
    return [override for override in overrides if override.partition("=")[0] not in read]


def config_to_yaml(config: object) -> str:
    """Return the resolved configuration as YAML with keys in the order of the dataclasses."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def config_to_dict(config: object) -> dict[str, Any]:
    """Return nested plain dictionaries, enums by value, paths as text."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UsageError(f"config must be a dataclass instance, got {type(config).__name__}.")
    plain = plain_value(config)
    assert isinstance(plain, dict)
    return plain


def config_sha256(config: object) -> str:
    """Return the identity of a configuration: sha256 over its sorted JSON.

    Settings marked ``MAY_CHANGE`` are left out: with them, what a resumed run wrote would not match its config.yaml.
    """
    values = config_to_dict(config)
    for key in keys_that_may_change(type(config)):
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        del section[name]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def keys_that_may_change(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration that are marked ``MAY_CHANGE``."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        if field.metadata.get("may_change_on_resume"):
            yield key
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from keys_that_may_change(kind, f"{key}.")


def dotted_keys(schema: type) -> list[str]:
    """Return every leaf key of a nested dataclass, dotted, in order."""
    return list(_walk(schema, ""))


def _walk(schema: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{key}.")
        else:
            yield key


def plain_value(value: object) -> object:
    """Return one value of a configuration as YAML holds it: enums by value, paths as text, sections as mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(v) for v in value]
    return value


def _make_writable(node: DictConfig | ListConfig) -> None:
    # OmegaConf 2.3 marks frozen dataclasses read-only node by node, which also refuses merging into nested ones.
    OmegaConf.set_readonly(node, False)
    items = (node._get_node(key) for key in node) if isinstance(node, DictConfig) else iter(node._content or ())
    for child in items:
        if isinstance(child, DictConfig) and child._is_missing() and dataclasses.is_dataclass(child._metadata.ref_type):
            # A required section: expanded now, because merging would expand it read-only. Its leaves stay required.
            child._set_value(OmegaConf.structured(child._metadata.ref_type))
        if isinstance(child, DictConfig | ListConfig) and not child._is_none() and not child._is_missing():
            _make_writable(child)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a plain YAML (or JSON) file of keys and values.

    Raises:
        UsageError: If it is missing, too large, or uses tags, aliases, duplicate keys or YAML 1.1 traps.
    """
    if not path.is_file():
        raise UsageError("the configuration file does not exist.", where=path.name)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UsageError(f"a configuration file must be under {MAX_CONFIG_BYTES} bytes.", where=path.name)
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise UsageError(
            f"the configuration file is not plain YAML: {str(err).splitlines()[0]}", where=path.name
        ) from err
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError("a configuration file must hold keys and values at its top level.", where=path.name)
    return values


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, aliases, and YAML 1.1 traps (octal, sexagesimal, yes/no, dates)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(f"duplicate key {key_node.value!r} in line {key_node.start_mark.line + 1}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _plain_resolvers() -> dict[str, list[tuple[str, Any]]]:
    """YAML 1.2 core schema: only true/false are booleans, no dates, no octal or base-60 integers, 1e-4 is a float."""
    number_start = list("-+0123456789.")
    rules = [
        ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
        ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
        ("tag:yaml.org,2002:float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", number_start),
        ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ]
    table: dict[str, list[tuple[str, Any]]] = {}
    for tag, pattern, starts in rules:
        for start in starts:
            table.setdefault(start, []).append((tag, re.compile(pattern)))
    return table


_StrictLoader.yaml_implicit_resolvers = _plain_resolvers()


def _merge(config: Any, layer: Mapping[str, Any], schema: type, *, where: str) -> Any:
    try:
        return OmegaConf.merge(config, OmegaConf.create(_enums_by_value(layer, schema, where=where)))
    except (ConfigKeyError, ConfigAttributeError) as err:
        key = str(err.full_key)
        raise UsageError(f"unknown key {key!r}.{_hint(key, dotted_keys(schema))}", where=where) from err
    except ConfigTypeError as err:
        raise UsageError(f"{err.full_key or 'a key'} cannot take this value: {_first_line(err)}", where=where) from err
    except OmegaConfBaseException as err:
        raise UsageError(f"{err.full_key} has a wrong value: {_first_line(err)}", where=where) from err


def _enums_by_value(layer: Mapping[str, Any], schema: type, *, where: str, prefix: str = "") -> dict[str, Any]:
    """Replace the text of enum fields by members: OmegaConf knows only their Python names, users write the values."""
    hints = get_type_hints(schema)
    result: dict[str, Any] = {}
    for key, value in layer.items():
        kind = hints.get(key)
        members = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Enum)]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise UsageError(f"{prefix}{key} must hold keys and values, got {value!r}.", where=where)
            value = _enums_by_value(value, kind, where=where, prefix=f"{prefix}{key}.")
        elif members and isinstance(value, str):
            value = _member(members[0], value, key=f"{prefix}{key}", where=where)
        result[key] = value
    return result


def _member(kind: type[Enum], text: str, *, key: str, where: str) -> Enum:
    known = {str(member.value): member for member in kind}
    if text.lower() not in known:
        raise UsageError(
            f"{key} must be one of {', '.join(known)}, got {text!r}.{_hint(text.lower(), list(known))}", where=where
        )
    return known[text.lower()]


def _to_object(config: Any, schema: type[Schema]) -> Schema:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UsageError(
            f"required key{'s' * (len(missing) > 1)} not given: {', '.join(missing)}.", where="configuration"
        )
    try:
        result = OmegaConf.to_object(config)
    except MissingMandatoryValue as err:
        raise UsageError(f"required key not given: {err.full_key}.", where="configuration") from err
    except UsageError:
        raise
    except (ValueError, OmegaConfBaseException) as err:
        raise UsageError(_first_line(err), where="configuration") from err
    assert isinstance(result, schema)
    return result


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0]


def _hint(word: str, known: Sequence[str]) -> str:
    """Return `` Did you mean ...?`` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        tail = word.rsplit(".", 1)[-1]
        by_tail = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [by_tail[t] for t in difflib.get_close_matches(tail, list(by_tail), n=1, cutoff=0.6)]
    return f" Did you mean {close[0]!r}?" if close else ""
