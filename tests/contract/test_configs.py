"""Every YAML of the package parses into its schema, and its first line says how to run it."""

from pathlib import Path

import pytest
import torch
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.selftraining.parts import plan_rounds
from samgraft.finetune.study.cells import expand
from samgraft.finetune.study.config import StudyConfig
from samgraft.shared.config import load_config
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.scans.volume import Modality
from samgraft.ssl import prepare
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives import OBJECTIVES, build_objective
from samgraft.ssl.optimizer import build_pretrain_optimizer, build_schedule
from samgraft.ssl.scope import apply_scope

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml"))
SCHEMAS = {
    "pretrain": (PretrainConfig, {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"base": "random"}}),
    "selftrain": (FinetuneConfig, {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"ckpt": "runs/a"}}),
    "finetune": (FinetuneConfig, {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"ckpt": "runs/a"}}),
}


def test_configs__are_found() -> None:
    assert {path.parent.name for path in FILES} == {"modality", "pretrain", "finetune", "selftrain", "study"}
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
        # Every cell's settings are keys of the fine-tuning's configuration; equal ones are built once.
        given = {
            tuple(a for a in c.finetune_arguments(Path("runs")) if "=" in a and "seed=" not in a) for c in grid.cells
        }
        schema, required = SCHEMAS["finetune"]
        for overrides in given:
            load_config(schema, layers=[CONFIGS / "finetune" / "default.yaml", required], overrides=list(overrides))
        return
    schema, required = SCHEMAS[path.parent.name]
    # Presets by memory say only what differs from default.yaml.
    below = [path.with_name("default.yaml")] if path.stem.startswith("gpu_") else []
    # A self-training is a layer on top of a fine-tuning.
    below += [CONFIGS / "finetune" / "default.yaml"] if path.parent.name == "selftrain" else []
    config = load_config(schema, layers=[*below, path, required])
    assert isinstance(config, schema)
    if path.parent.name == "selftrain":
        assert len(plan_rounds(config, Path("runs/a"))[0].teachers) > 1


PRETRAIN = [path for path in FILES if path.parent.name == "pretrain"]


def test_pretrain_presets__one_per_objective_and_kind_of_machine() -> None:
    assert {path.stem for path in PRETRAIN} == {f"{name}-{kind}" for name in OBJECTIVES for kind in ("cpu", "gpu")}


@pytest.mark.parametrize("arch", [None, "sam2_t"])
@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_pretrain_presets__build_their_objective(path: Path, arch: str | None) -> None:
    model = {"model": {"arch": arch}} if arch else {}
    config = load_config(PretrainConfig, layers=[path, SCHEMAS["pretrain"][1], model])
    config = prepare._with_fitting_size(config)
    assert path.stem.startswith(config.objective.name)
    with torch.device("meta"):
        encoder = arch_spec(config.model.arch).build(image_size=config.model.image_size)
        apply_scope(encoder, config.model.scope, num_frozen_depths=config.model.num_frozen_depths)
    # Outside of the block: lightly's SIGReg computes while it is built.
    objective = build_objective(encoder, config.objective, seed=0, max_steps=config.trainer.max_steps)
    assert len(build_pretrain_optimizer(objective, config.optim).param_groups) > 1
    build_schedule(config.optim, max_steps=config.trainer.max_steps)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs__first_line_is_the_command(path: Path) -> None:
    assert path.read_text().startswith(("# make ", "# samgraft "))
