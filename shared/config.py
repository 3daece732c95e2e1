"""Typed configuration from YAML files and dotted overrides.

A configuration is a tree of frozen dataclasses. ``load_config`` merges the YAML layers and then the overrides
``key.sub=value``, and checks the result against the dataclasses. Values keep the file and the line that they came
from, and everything that is wrong is reported in one message.

OmegaConf merges. Every value travels through it as one opaque ``Setting``, so that nothing in it is interpolated: a
path that contains ``${HOME}`` is that path. pydantic checks types and the ranges that fields declare
(``lr: Annotated[float, Gt(0)]``); checks of combinations are in the ``__post_init__`` of each dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError
from samgraft.shared.counting import counted
from samgraft.shared.errors import UsageError
from samgraft.shared.settings import Setting, read_override, read_settings_file

Schema = TypeVar("Schema")
MAX_LISTED_PROBLEMS = 20

RENAMED_KEYS: Final[Mapping[str, str]] = MappingProxyType({
    # The later one wins where a stored run has both.
    "probe.decoder": "model.base",
    "model.rest": "model.base",
    "data.num_workers": "trainer.num_workers",
    "selftrain.online.ema_decay": "optim.ema_decay",
})  # fmt: skip
"""Settings of earlier versions and their names today.

A user's old name is refused with the new one, and the stored configuration of an earlier run is translated."""
RENAME_NOTES: Final = MappingProxyType({"model.base": " Initial encoder weights are model.ckpt."})
"""Additions to the message about an old name, by new name."""

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
AtLeastOne = Annotated[float, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
"""Fraction from 0 to 1."""
PositiveShare = Annotated[float, Gt(0), Le(1)]
"""Fraction above 0, up to 1."""
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
"""Fraction from 0 to below 1."""
OpenShare = Annotated[float, Gt(0), Lt(1)]
"""Fraction above 0 and below 1."""

MAY_CHANGE: Final = MappingProxyType({"may_change_on_resume": True})
"""Metadata of a field whose setting does not change the numbers, so that a resumed run may have another one."""


def packaged_config(relative: str) -> Path:
    """Return the path of a YAML file shipped as ``samgraft.configs``, e.g. ``pretrain/default.yaml``.

    Raises:
        UsageError: If there is no such file; the message lists its neighbours.
    """
    # An editable install adds a placeholder that is no folder to the namespace; importlib.resources fails on it.
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
    """Merge YAML layers and dotted overrides into an instance of ``schema``.

    Args:
        schema: A frozen dataclass, nested as needed. Fields without default are required.
        layers: YAML files or plain mappings; later ones win.
        overrides: ``key.sub=value`` strings, applied last. Values are parsed as YAML scalars.

    Returns:
        The dataclass instance; its ``__post_init__`` checks have run.

    Raises:
        UsageError: For unknown keys (with the nearest known key), wrong types, values out of range, missing required
            keys, failed checks (all of them in one message), or a file that is not plain YAML.
    """
    from omegaconf import OmegaConf

    # A section's own default may differ from the defaults of its class, so that defaults are the first layer.
    merged = _omega(_from_python(default_settings(schema)))
    check = _Check(schema)
    for layer in layers:
        merged = OmegaConf.merge(merged, _omega(check.fitting_content(schema, _read_layer(layer))))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            problem = f"an override must look like key.sub=value, got {override!r}."
            check.reject(override, problem, Setting(None, "", "command line"))
            continue
        if not text.strip():
            check.reject(key, _NO_VALUE.format(key=key), Setting(None, "", f"command line, {override}"))
            continue
        nested: Any = read_override(
            text, takes_text=_takes_text(_kind_of(schema, key)), where=f"command line, {override}"
        )
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merged = OmegaConf.merge(merged, _omega(check.fitting_content(schema, nested)))
    settings: Any = OmegaConf.to_container(merged, resolve=False)
    return _validate(schema, settings, check)


def translate_renamed_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted settings of an earlier version under their names of today."""
    translated = {key: value for key, value in flat.items() if key not in RENAMED_KEYS}
    for old, new in RENAMED_KEYS.items():
        if flat.get(old) is None:
            continue
        if new == "model.base" and flat.get(new) is not None:
            # `model.base` were the initial encoder weights of stage 1 as long as it had these two settings.
            translated["model.ckpt"] = flat[new]
        translated[new] = flat[old]
    return translated


def read_stored_config(path: Path) -> dict[str, Any]:
    """Return the stored configuration of a run with the names of today, as a layer for ``load_config``."""
    nested: dict[str, Any] = {}
    stored = flatten_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
    for key, value in translate_renamed_keys(stored).items():
        *sections, name = key.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return nested


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key. An empty mapping counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_settings(layers: Sequence[Path | Mapping[str, Any]], overrides: Sequence[str]) -> dict[str, str]:
    """Return what a user wrote by dotted key, as text, before defaults are added.

    Nothing is checked here, because ``load_config`` reads the same again. Lists and null are left out.

    Raises:
        UsageError: For a file that is not plain YAML, or an override without a value.
    """
    given: dict[str, str] = {}
    for layer in layers:
        given |= {key: setting.text for key, setting in _leaves(_read_layer(layer), "")}
    for override in overrides:
        key, separator, text = override.partition("=")
        if separator and not text.strip():
            # Taken as "none", an unset variable in data.store=$STORE would train on the demo data.
            raise UsageError(_NO_VALUE.format(key=key), where=f"command line, {override}")
        given[key] = text.strip().strip("\"'")
    return {key: text for key, text in given.items() if text.lower() not in {"", "~", "null", "none"}}


def without_keys(overrides: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Return the overrides that set none of ``keys``, which the caller has read already."""
    read = set(keys)
    return [override for override in overrides if override.partition("=")[0] not in read]


def config_to_yaml(config: object) -> str:
    """Return the resolved configuration as YAML with keys in the order of the dataclasses."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def config_to_dict(config: object) -> dict[str, Any]:
    """Return nested plain dictionaries with enums by value and paths as text."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UsageError(f"config must be a dataclass instance, got {type(config).__name__}.")
    plain = plain_value(config)
    assert isinstance(plain, dict)
    return plain


def config_sha256(config: object) -> str:
    """Return the sha256 over the sorted JSON of a configuration, which identifies it.

    Settings marked ``MAY_CHANGE`` are left out, because a resumed run may have others than its config.yaml.
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


def default_settings(schema: type) -> dict[str, Any]:
    """Return the settings that have a default, nested as in YAML."""
    hints = get_type_hints(schema)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        if field.default is not dataclasses.MISSING:
            values[field.name] = plain_value(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = plain_value(field.default_factory())
        elif isinstance(kind := hints[field.name], type) and dataclasses.is_dataclass(kind):
            values[field.name] = default_settings(kind)
    return values


def dotted_keys(schema: type, prefix: str = "") -> list[str]:
    """Return every leaf key of a nested dataclass, dotted, in order."""
    hints = get_type_hints(schema)
    found: list[str] = []
    for field in dataclasses.fields(schema):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        is_section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        found += dotted_keys(kind, f"{key}.") if is_section else [key]
    return found


def plain_value(value: object) -> object:
    """Return one value of a configuration as YAML holds it.

    Enums are given by value, paths as text, and sections as mappings.
    """
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


def _read_layer(layer: Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(layer, Path):
        return read_settings_file(layer)
    return {str(key): _from_python(value) for key, value in layer.items()}


def _from_python(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _from_python(child) for key, child in value.items()}
    value = plain_value(value)
    if isinstance(value, list):
        return Setting([_from_python(child) for child in value], str(value), "command line")
    return Setting(value, "" if value is None else str(value), "command line")


def _leaves(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Setting]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value.value, list):
            yield f"{prefix}{key}", value


def _omega(content: Mapping[str, Any]) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(dict(content), flags={"allow_objects": True})


# Checking: nested settings are compared with the dataclasses.

_EXPECTED = {
    "int": "be a whole number (such as 10)",
    "float": "be a number (such as 0.5 or 1e-4, without quotes)",
    "bool": "be true or false",
    "string": "be text",
    "list": "be a list (such as [1, 2])",
    "dict": "hold keys and values",
    "dataclass": "hold keys and values",
}
"""Requirement of a field, by the first word of pydantic's error type."""
_NO_VALUE = "{key} has no value. Write one, or null for none."
_MAX_SHOWN = 80
"""Characters of a wrong value that a message shows."""
_RANGES = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


class _Check:
    """Check of one configuration, with the places of its values and the problems found so far."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.places: dict[str, Setting] = {}
        self.problems: dict[str, str] = {}
        """Problem and place by dotted key."""

    def fitting_content(self, schema: type, content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return the content of one layer without single values for sections and keys below single values.

        They are recorded as problems here, because a later layer would silently replace them in the merge.
        """
        hints = get_type_hints(schema)
        fitting: dict[str, Any] = {}
        for name, value in content.items():
            kind, key = hints.get(name), f"{prefix}{name}"
            is_section, has_keys = dataclasses.is_dataclass(kind), isinstance(value, Mapping)
            if is_section and not has_keys:
                what = _shown(value.text)
                self.reject(key, f"{key} must {_EXPECTED['dataclass']}, got {what}. Write keys below it.", value)
            elif is_section:
                assert isinstance(kind, type)
                fitting[name] = self.fitting_content(kind, value, f"{key}.")
            elif kind is not None and has_keys and get_origin(kind) is not dict:
                got = ", ".join(map(str, value)) or "nothing"
                self.reject(key, f"{key} must be a single value, got keys below it ({_shown(got)}).", value)
            else:
                fitting[name] = value
        return fitting

    def plain_section(self, schema: type, settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return the values of one section as JSON holds them.

        Content that cannot be a value is recorded as a problem and left out.
        """
        hints = get_type_hints(schema)
        plain: dict[str, Any] = {}
        for name, content in settings.items():
            key = f"{prefix}{name}"
            if name not in hints:
                self.reject(key, self._unknown(key), content)
            elif dataclasses.is_dataclass(hints[name]) and isinstance(content, Mapping):
                plain[name] = self.plain_section(hints[name], content, f"{key}.")
            else:
                plain[name] = self.plain_content(hints[name], content, key)
        return plain

    def plain_content(self, kind: Any, content: Any, key: str) -> Any:
        """Return one field's value as JSON holds it."""
        arguments = get_args(kind)
        if isinstance(content, Mapping):
            inner = arguments[-1] if get_origin(kind) is dict else Any
            return {name: self.plain_content(inner, value, f"{key}.{name}") for name, value in content.items()}
        self.places[key] = content
        value = content.value
        if isinstance(value, list):
            inner = arguments[0] if get_origin(kind) is list else Any
            if dataclasses.is_dataclass(inner):
                return [self.plain_section(inner, v, f"{key}.{i}.") if isinstance(v, Mapping) else v.value
                        for i, v in enumerate(value)]  # fmt: skip
            return [self.plain_content(inner, v, f"{key}.{i}") for i, v in enumerate(value)]
        for member_kind in (kind, *arguments):
            if isinstance(member_kind, type) and issubclass(member_kind, Enum) and value is not None:
                return self._member(member_kind, content, key)
        if _takes_text(kind) and value is not None:
            if not content.text.isprintable():  # a path with a zero byte cannot even be refused by the system
                self.reject(key, f"{key} must be text in one line without control characters.", content)
            return content.text
        if isinstance(value, float) and not math.isfinite(value):
            self.reject(key, f"{key} must be a finite number, got {content.text}.", content)
        return value

    def reject(self, key: str, problem: str, content: Any) -> None:
        """Record a problem of one key."""
        self.problems.setdefault(key, f"{problem}\0{_place(content)}")

    def reject_all(self, error: ValidationError) -> None:
        """Record what pydantic found, except in keys that are rejected already."""
        for entry in error.errors(include_url=False):
            key = ".".join(str(part) for part in entry["loc"])
            if any(f"{key}.".startswith(f"{known}.") for known in self.problems):
                continue
            if entry["type"] == "value_error":
                self._reject_combination(key, str(entry["ctx"]["error"]).splitlines()[0])
                continue
            content = self.places.get(key)
            got = str(entry["input"]) if content is None else content.text
            # What is nested in a list has no place of its own.
            while content is None and "." in key:
                key = key.rpartition(".")[0]
                content = self.places.get(key)
            kind = entry["type"].split("_")[0]
            limits = [
                f"{word} {entry['ctx'][name]:g}" for name, word in _RANGES.items() if name in entry.get("ctx", {})
            ]
            if entry["type"] == "missing":
                self.reject(key, f"required key not given: {key}.", None)
            elif limits:
                self.reject(key, f"{key} must be {limits[0]}, got {_shortened(got)}.", content)
            else:
                self.reject(key, f"{key} must {_EXPECTED.get(kind, entry['msg'])}, got {_shown(got)}.", content)

    def raise_problems(self) -> None:
        """Raise one error that lists every problem with its place.

        Raises:
            UsageError: If there is any problem.
        """
        found = [problem.split("\0") for problem in self.problems.values()]
        if len(found) == 1:
            raise UsageError(found[0][0], where=found[0][1])
        if found:
            found.sort(key=lambda item: _natural_order(item[1]))
            lines = [f"  - {text.rstrip('.')} ({place})" for text, place in found[:MAX_LISTED_PROBLEMS]]
            if len(found) > MAX_LISTED_PROBLEMS:
                lines.append(f"  and {len(found) - MAX_LISTED_PROBLEMS} more")
            raise UsageError("\n".join([f"{counted(len(found), 'setting is', 'settings are')} wrong.", *lines]))

    def _unknown(self, key: str) -> str:
        if key in RENAMED_KEYS:
            new = RENAMED_KEYS[key]
            return f"{key} is now called {new}. Use that name.{RENAME_NOTES.get(new, '')}"
        return f"unknown key {key!r}.{_hint(key, dotted_keys(self.schema))}"

    def _member(self, kind: type[Enum], content: Setting, key: str) -> Any:
        known = [str(member.value) for member in kind]
        text = content.text.lower()
        if text not in known:
            self.reject(
                key, f"{key} must be one of {', '.join(known)}, got {content.text!r}.{_hint(text, known)}", content
            )
        return text

    def _reject_combination(self, section: str, message: str) -> None:
        """Record a failed ``__post_init__`` at the place of the settings that its message names."""
        words = set(re.findall(r"\w+", message))
        named = [k for k in self.places if k.startswith(section) and k.rsplit(".", 1)[-1] in words]
        self.reject(f"{section} {message}", message, self.places[named[-1]] if named else None)


def _shown(text: str) -> str:
    """Return a wrong value in quotes, shortened, or ``nothing``."""
    return repr(_shortened(text)) if text else "nothing"


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 20]}... ({len(text)} characters)"


def _validate(schema: type[Schema], settings: Mapping[str, Any], check: _Check) -> Schema:
    plain = check.plain_section(schema, settings)
    try:
        # JSON, because pydantic's strict mode takes enums by value and sections as mappings only from there.
        result: Schema = _adapter(schema).validate_json(json.dumps(plain), strict=True)  # type: ignore[arg-type]
    except ValidationError as err:
        check.reject_all(err)
    check.raise_problems()
    return result


@cache
def _adapter(schema: type) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _kind_of(schema: type, key: str) -> Any:
    """Return the type of a dotted key, or None for an unknown one."""
    kind: Any = schema
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def _takes_text(kind: Any) -> bool:
    return kind is str or set(get_args(kind)) == {str, NoneType}


def _place(content: Any) -> str:
    while isinstance(content, Mapping) and content:
        content = next(iter(content.values()))
    return content.where if isinstance(content, Setting) else "configuration"


def _natural_order(text: str) -> list[str | int]:
    """Return a sort key by which line 9 comes before line 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _hint(word: str, known: Sequence[str]) -> str:
    """Return `` Did you mean ...?`` for the nearest known word, or nothing."""
    if word in known:  # a dotted key, which overrides have and files do not
        nested = re.sub(r"\.", ": {", word)
        return f" In a file, write {nested}: VALUE{'}' * word.count('.')}."
    # The nearest word of the device "gpu" is "cpu", which would be slow and not noticed.
    word = {"gpu": "cuda"}.get(word, word).lower()
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        tail = word.rsplit(".", 1)[-1]
        by_tail = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [by_tail[t] for t in difflib.get_close_matches(tail, list(by_tail), n=1, cutoff=0.6)]
    return f" Did you mean {close[0]!r}?" if close else ""
