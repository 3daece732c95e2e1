"""Every YAML of the package parses into its schema, and its first line says how to run it."""

from pathlib import Path

import pytest
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.study.cells import expand
from samgraft.finetune.study.config import StudyConfig
from samgraft.shared.config import load_config
from samgraft.shared.data.preset import load_preset
from samgraft.shared.data.volume import Modality
from samgraft.ssl.config import PretrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml"))
SCHEMAS = {
    "pretrain": (PretrainConfig, {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"base": "random"}}),
    "finetune": (FinetuneConfig, {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"ckpt": "runs/a"}}),
}


def test_configs__are_found() -> None:
    assert {path.parent.name for path in FILES} == {"modality", "pretrain", "finetune", "study"}
    assert {path.stem for path in FILES if path.parent.name == "modality"} == {m.value for m in Modality}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs__parse_into_their_schema(path: Path) -> None:
    if path.parent.name == "modality":
        assert load_preset(path.stem).modality.value == path.stem
        return
    if path.parent.name == "study":
        config = load_config(StudyConfig, layers=[path])
        assert config.name == path.stem
        grid = expand(config, stores={data_set.name: "a.zarr" for data_set in config.data_sets})
        assert len(grid.cells) > 1
        return
    schema, required = SCHEMAS[path.parent.name]
    # Presets by memory say only what differs from default.yaml.
    below = [path.with_name("default.yaml")] if path.stem.startswith("gpu_") else []
    assert isinstance(load_config(schema, layers=[*below, path, required]), schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs__first_line_is_the_command(path: Path) -> None:
    assert path.read_text().startswith(("# make ", "# samgraft "))
