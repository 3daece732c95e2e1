"""Typed configuration from YAML layers and overrides, and the message for each kind of wrong value."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

import pytest
from annotated_types import Lt
from samgraft.shared.config import (
    config_sha256,
    config_to_dict,
    config_to_yaml,
    dotted_keys,
    load_config,
    translate_renamed_keys,
)
from samgraft.shared.errors import UsageError
from samgraft.shared.settings import read_settings_file
from samgraft.shared.stage_config import TypedSettings


class Method(Enum):
    MAE = "mae"
    DINO = "dino"


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    dropout: Annotated[float, Lt(1)] = 0.0
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


@dataclass(frozen=True, kw_only=True)
class Outer:
    optim: Optim = field(default_factory=lambda: Optim(dropout=0.5))


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
        ("seed=1.5", r"seed must be a whole number \(such as 10\), got '1\.5'"),
        ("seed=true", r"seed must be a whole number \(such as 10\), got 'true'"),
        ("seed=", r"seed has no value\. Write one, or null for none\."),
        ("seed=null", r"seed must be a whole number \(such as 10\), got 'null'"),
        (f"seed={'9' * 5000}", r"seed must be a whole number .*, got '9{60}\.\.\. \(5000 characters\)'"),
        ("optim.lr=abc", r"optim\.lr must be a number .*, got 'abc'"),
        ("optim.lr=1e999", r"optim\.lr must be a finite number, got 1e999"),
        ("optim.lr.x=1", r"optim\.lr must be a single value, got keys below it \('x'\)"),
        ("optim.betas=0.9", r"optim\.betas must be a list .*, got '0\.9'"),
        ("optim.betas=[0.9, x]", r"optim\.betas\.1 must be a number .*, got 'x'"),
        ("method=simclr", r"method must be one of mae, dino, got 'simclr'"),
        ("optim.lr=-1", r"optim\.lr must be positive, got -1"),
        ("method=dinov", r"Did you mean 'dino'"),
        ("OPTIM.LR=3", r"unknown key 'OPTIM'\. Did you mean 'optim\.lr'"),
        ("optim=3", r"optim must hold keys and values, got '3'"),
        ("--seed", r"must look like key\.sub=value"),
        ("seed", r"must look like key\.sub=value"),
    ],
)
def test_load_config__refuses_by_name(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _load("name=a", override)


@pytest.mark.parametrize(
    "path", ["a b/ü=1", "a #2", "&a", "*a", "!a", "- a", "a: b", "[a].zarr", "${HOME}/a", "0x10", "%A%"]
)
def test_load_config__text_of_an_override_is_taken_as_it_is(path: str) -> None:
    assert _load(f"name={path}").name == path
    assert _load(f"name='{path}'").name == path


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
        ("name: a\nseed: 010\n", "seed must be a whole number .*, got '010'"),
        ("name: a\nseed: 0x10\n", "seed must be a whole number .*, got '0x10'"),
        ("name: a\nseed: 1_0\n", "seed must be a whole number .*, got '1_0'"),
        ("name: a\nseed: 12:30:00\n", "seed must be a whole number .*, got '12:30:00'"),
        ("name: a\nseed: no\n", "seed must be a whole number .*, got 'no'"),
        ("name: a\noptim: {lr: .inf}\n", "optim.lr must be a number .*, got '.inf'"),
        ("name: a\noptim: {lr: '1e-4'}\n", "optim.lr must be a number .* without quotes"),
        ("name: a\n---\nname: b\n", "found another document"),
        ("name: a\noptim.lr: 1e-4\n", r"unknown key 'optim\.lr'\. In a file, write optim: \{lr: VALUE\}\."),
        ('name: "a\\0b"\n', "name must be text in one line without control characters"),
    ],
)
def test_load_config__refuses_yaml_traps(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _load(layers=(_file(tmp_path, text),))


def test_load_config__several_wrong_values_give_one_line_each_with_file_and_line(tmp_path: Path) -> None:
    text = "name: a\nseed: 010\nmethod: simclr\noptim:\n  dropout: 7\n  lrr: 2\n  betas: 3\n"
    with pytest.raises(UsageError) as caught:
        _load("base=b", "sed=1", layers=(_file(tmp_path, text),))
    assert caught.value.what.splitlines() == [
        "6 settings are wrong.",
        "  - unknown key 'sed'. Did you mean 'seed'? (command line, sed=1)",
        "  - seed must be a whole number (such as 10), got '010' (x.yaml, line 2)",
        "  - method must be one of mae, dino, got 'simclr' (x.yaml, line 3)",
        "  - optim.dropout must be less than 1, got 7 (x.yaml, line 5)",
        "  - unknown key 'optim.lrr'. Did you mean 'optim.lr'? (x.yaml, line 6)",
        "  - optim.betas must be a list (such as [1, 2]), got '3' (x.yaml, line 7)",
    ]


def test_load_config__declared_range_is_checked_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^optim\.dropout must be less than 1, got 1\.5\.$") as caught:
        _load(layers=(_file(tmp_path, "name: a\noptim:\n  dropout: 1.5\n"),))
    assert caught.value.where == "x.yaml, line 3"


def test_load_config__later_layer_replaces_a_wrong_value(tmp_path: Path) -> None:
    assert _load("seed=4", layers=(_file(tmp_path, "name: a\nseed: x\n"),)).seed == 4


@pytest.mark.parametrize(
    "text",
    [
        "/a/${oc.env:HOME}/x",
        "${name}",
        "010",
        "1:30",
        "2024-01-01",
        "/a/[x].zarr",
        "C:\\x: y",
        "/a b/ü=1.zarr",
        "1e3",
        "true",
    ],
)
def test_load_config__text_field_takes_the_value_as_written(text: str) -> None:
    assert _load("name=a", f"base={text}").base == text


def test_load_config__text_field_in_a_file_takes_a_number_as_written(tmp_path: Path) -> None:
    config = _load(layers=(_file(tmp_path, "name: 010\nbase: ${oc.env:HOME}\n"),))
    assert (config.name, config.base) == ("010", "${oc.env:HOME}")


def test_load_config__partly_given_section_keeps_the_defaults_of_its_field() -> None:
    assert load_config(Outer, overrides=["optim.lr=2e-4"]).optim == Optim(lr=2e-4, dropout=0.5)


def test_load_config__null_clears_a_text_field(tmp_path: Path) -> None:
    assert _load("base=null", layers=(_file(tmp_path, "name: a\nbase: x\n"),)).base is None


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfname: a\n", b"name: a\r\nseed: 0\r\n"])
def test_load_config__byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    assert _load(layers=(tmp_path / "x.yaml",)).name == "a"


def test_load_config__renamed_key_is_refused_with_its_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samgraft.shared.config.RENAMED_KEYS", {"optim.rate": "optim.lr"})
    with pytest.raises(UsageError, match=r"optim\.rate is now called optim\.lr\. Use that name\."):
        _load("name=a", "optim.rate=1")
    assert translate_renamed_keys({"optim.rate": 1, "seed": 2}) == {"optim.lr": 1, "seed": 2}


def test_config_identity__changes_with_a_value_only() -> None:
    assert config_sha256(_load("name=a")) == config_sha256(_load("seed=0", "name=a"))
    assert config_sha256(_load("name=a")) != config_sha256(_load("name=a", "seed=1"))


def test_config_to_yaml__round_trips(tmp_path: Path) -> None:
    config = _load("name=a", "method=dino")
    assert config_to_dict(config)["method"] == "dino"
    again = _load(layers=(_file(tmp_path, config_to_yaml(config)),))
    assert again == config


def test_dotted_keys__lists_leaves() -> None:
    assert dotted_keys(Root) == ["name", "seed", "method", "base", "optim.lr", "optim.dropout", "optim.betas"]


@pytest.mark.parametrize(
    ("text", "override", "match"),
    [
        ("optim: 3\n", "optim.lr=1", r"optim must hold keys and values, got '3'\. Write keys below it\."),
        ("optim:\n", "optim.lr=1", "optim must hold keys and values, got nothing"),
        ("optim: [1]\n", "optim.lr=1", r"optim must hold keys and values, got '\[1\]'"),
        ("seed: {a: 1}\n", "seed=1", r"seed must be a single value, got keys below it \('a'\)"),
    ],
)
def test_load_config__sections_and_values_are_never_replaced_by_each_other(tmp_path, text, override, match):
    with pytest.raises(UsageError, match=match) as caught:
        _load("name=a", "optim.lr=0.1", override, layers=(_file(tmp_path, text),))
    assert caught.value.where == "x.yaml, line 1"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"optim:\n\tlr: 1\n", r"a tab is not allowed as a space \(line 2\)"),
        ("name: \u00e9\n".encode("latin-1"), r"it is not UTF-8 text \(line 1\)\. Save it as UTF-8"),
        ("name: a\n".encode("utf-16"), "it is not UTF-8 text"),
        (b"name: a\nseed: " + b"9" * 5000, r"the number has too many digits \(line 2\)"),
        (b"name: " + b"[" * 3000 + b"]" * 3000, "it is nested too deeply"),
        (b"- a\n", "keys and values at its top level. Write one `key: value` per line"),
    ],
)
def test_read_settings_file__unreadable_content_is_explained(tmp_path, content, match):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=match):
        read_settings_file(path)


def test_read_settings_file__folder_is_refused_as_one(tmp_path):
    with pytest.raises(UsageError, match="the configuration file is a folder"):
        read_settings_file(tmp_path)


@pytest.mark.parametrize(
    "typed", [TypedSettings(options={"data.store": ""}), TypedSettings(overrides=("data.store=",))]
)
def test_typed_settings__empty_store_is_refused_and_does_not_mean_the_demo(typed):
    """An unset variable of a shell script gives an empty value."""
    with pytest.raises(UsageError, match=r"data\.store has (no|an empty) value"):
        typed.by_key()
