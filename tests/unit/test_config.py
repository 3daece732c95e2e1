"""Configuration: typed, strict, and every refusal names the key."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest
from samgraft.shared.config import config_sha256, config_to_dict, config_to_yaml, dotted_keys, load_config
from samgraft.shared.errors import UsageError


class Method(Enum):
    MAE = "mae"
    DINO = "dino"


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UsageError(f"optim.lr must be positive, got {self.lr}.")


@dataclass(frozen=True, kw_only=True)
class Root:
    name: str
    seed: int = 0
    method: Method = Method.MAE
    base: str | None = None
    optim: Optim = field(default_factory=Optim)


def _load(*overrides: str, layers: tuple[Path, ...] = ()) -> Root:
    return load_config(Root, layers=layers, overrides=overrides)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return path


def test_load_config__later_layers_win_and_types_are_kept(tmp_path: Path) -> None:
    config = _load("optim.lr=2e-4", "method=dino", layers=(_file(tmp_path, "name: a\nseed: 3\noptim:\n  lr: 1e-4\n"),))
    assert config == Root(name="a", seed=3, method=Method.DINO, optim=Optim(lr=2e-4))
    assert isinstance(config.optim.betas, list)


def test_load_config__exponent_without_dot_is_a_float(tmp_path: Path) -> None:
    assert _load(layers=(_file(tmp_path, "name: a\noptim: {lr: 1e-4}\n"),)).optim.lr == 1e-4


def test_load_config__result_is_frozen() -> None:
    config = _load("name=a")
    with pytest.raises(AttributeError):
        config.optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=3", r"unknown key 'sed'\. Did you mean 'seed'"),
        ("optim.lrr=3", r"unknown key 'optim\.lrr'\. Did you mean 'optim\.lr'"),
        ("lr=3", r"unknown key 'lr'\. Did you mean 'optim\.lr'"),
        ("seed=1.5", r"seed has a wrong value"),
        ("optim.lr=abc", r"optim\.lr has a wrong value"),
        ("method=simclr", r"method must be one of mae, dino, got 'simclr'"),
        ("optim.lr=-1", r"optim\.lr must be positive, got -1"),
        ("method=dinov", r"Did you mean 'dino'"),
        ("optim=3", r"optim must hold keys and values, got 3"),
        ("--seed", r"must look like key\.sub=value"),
        ("seed", r"must look like key\.sub=value"),
    ],
)
def test_load_config__refuses_by_name(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _load("name=a", override)


def test_load_config__missing_required_key_is_named() -> None:
    with pytest.raises(UsageError, match="required key not given: name"):
        _load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "duplicate key 'name' in line 2"),
        ("name: !!python/object/apply:os.system ['true']\n", "not plain YAML"),
        ("name: &x a\nbase: *x\n", "aliases are not allowed"),
        ("- a\n", "keys and values at its top level"),
        ("name: a\n\tseed: 1\n", "not plain YAML"),
        ("name: a\nseed: 010\n", "seed has a wrong value"),
        ("name: a\nseed: 12:30:00\n", "seed has a wrong value"),
        ("name: a\nseed: no\n", "seed has a wrong value"),
    ],
)
def test_load_config__refuses_yaml_traps(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _load(layers=(_file(tmp_path, text),))


def test_config_identity__changes_with_a_value_only() -> None:
    assert config_sha256(_load("name=a")) == config_sha256(_load("seed=0", "name=a"))
    assert config_sha256(_load("name=a")) != config_sha256(_load("name=a", "seed=1"))


def test_config_to_yaml__round_trips(tmp_path: Path) -> None:
    config = _load("name=a", "method=dino")
    assert config_to_dict(config)["method"] == "dino"
    again = _load(layers=(_file(tmp_path, config_to_yaml(config)),))
    assert again == config


def test_dotted_keys__lists_leaves() -> None:
    assert dotted_keys(Root) == ["name", "seed", "method", "base", "optim.lr", "optim.betas"]
