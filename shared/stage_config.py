"""Configuration of a training stage, merged from what the user typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from samgraft.shared.config import load_config, read_settings, without_keys
from samgraft.shared.demo.heads import DemoPaths, demo_data, demo_paths
from samgraft.shared.errors import UsageError
from samgraft.shared.scans.preset import load_preset, modality_layer
from samgraft.shared.store.files import is_address
from samgraft.shared.store.from_data import modality_of_data, store_from_data

Schema = TypeVar("Schema")
Settings = Mapping[str, object] | Sequence[str]
"""Settings by dotted key, or as ``key.sub=value`` strings."""


@dataclass(frozen=True, kw_only=True)
class TypedSettings:
    """Settings as the user typed them, from three places."""

    options: Mapping[str, Path | str | None] = field(default_factory=dict)
    """Command line options by the dotted key that they set. None means that the option was not given."""
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Options that may be repeated, by the dotted key that they set. An empty list means that none was given."""
    files: tuple[Path, ...] = ()
    """YAML files on top of the preset. Later files win over earlier ones, and options over files."""
    overrides: tuple[str, ...] = ()
    """``key.sub=value`` strings. They win over options and files."""

    def by_key(self) -> dict[str, str]:
        """Return every typed setting as text by its dotted key.

        Raises:
            UsageError: If a file is not plain YAML, or an option or override has no value.
        """
        for key, value in self.options.items():
            # Taken as not given, an unset variable in --data "$STORE" would train on the demo data.
            if value == "":
                raise UsageError(f"the option for {key} has an empty value. Write one, or leave the option out.")
        return read_settings([*self.files, nest_keys(self.options)], self.overrides)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Use of the demo data by a stage."""

    store: Callable[[DemoPaths], Path]
    """Function that returns the stage's demo store."""
    layer: Callable[[DemoPaths], Mapping[str, Any]]
    """Function that returns the settings that apply to the demo store only."""


def build_stage_config(
    schema: type[Schema],
    typed: TypedSettings,
    *,
    presets: Sequence[Path],
    demo: DemoSettings,
    defaults: Mapping[str, str | Callable[[], str]],
) -> Schema:
    """Merge modality, presets, demo settings, files, options and overrides into a configuration.

    Without ``data.store`` the demo data are fetched and used. When ``data.store`` holds scans, a store is built first.

    Args:
        schema: The stage's configuration.
        typed: What the user typed.
        presets: YAML files of the stage.
        demo: Use of the demo data.
        defaults: Values by dotted key for settings that were not typed and depend on other settings. A function is
            called after the data were checked, so that no weights are fetched for a request that fails.

    Raises:
        UsageError: For an unknown modality or key, or a wrong value.
        DataError: If the data is not a complete store, or scans are refused.
    """
    # Modality and store are read before the merge, because presets and the demo settings depend on them.
    given = typed.by_key()
    data = given.get("data.store")
    modality = load_preset(given.get("modality") or modality_of_data(data)).modality.value
    paths = demo_data(modality=modality) if data is None else demo_paths()
    is_demo = data is None or _is_same_store(data, demo.store(paths))
    store = demo.store(paths) if data is None else store_from_data(data, modality=modality)
    filled = {key: value() if callable(value) else value for key, value in defaults.items() if key not in given}
    filled |= {"modality": modality, "data.store": str(store)}
    return load_config(
        schema,
        # The demo settings are below the user's files. The filled values are on top, because they come from the typed
        # ones; an override of the same key was read already and must not bring the unresolved value back.
        layers=[
            modality_layer(modality),
            *presets,
            demo.layer(paths) if is_demo else {},
            *typed.files,
            nest_keys({**typed.options, **typed.lists}),
            nest_keys(filled),
        ],
        overrides=without_keys(typed.overrides, filled),
    )


def settings_texts(settings: Settings) -> tuple[str, ...]:
    """Return settings in the form of the command line, ``key.sub=value``."""
    if isinstance(settings, Mapping):
        return tuple(f"{key}={_setting_text(value)}" for key, value in settings.items())
    return tuple(settings)


def _setting_text(value: object) -> str:
    # JSON is the part of YAML in which a list, a bool and None have only one form.
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def nest_keys(values: Mapping[str, Path | str | Sequence[str] | None]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings, without the keys whose value is None or empty."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if value:
            *sections, name = key.split(".")
            section = nested
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = str(value) if isinstance(value, Path) else value
    return nested


def _is_same_store(data: str, demo_store: Path) -> bool:
    return not is_address(data) and Path(data).resolve() == demo_store.resolve()
