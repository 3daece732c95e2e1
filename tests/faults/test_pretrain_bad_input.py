"""Bad input to `samgraft pretrain`, which gives one screen, the right exit code and a hint, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from samgraft.shared.cli import main
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.stage_config import TypedSettings
from samgraft.shared.training import preflight
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl.prepare import prepare
from store_factory import make_store
from tiny_encoders import plain_encoder, tiny_encoder

SMALL = ("data.batch_size=2", "trainer.max_steps=2", "optim.warmup_steps=1", "model.num_frozen_depths=0")


def wrong_value(method: str, *values: str, base: str = "tiny") -> list[str]:
    """Return the command line of a dry run with these settings."""
    size = f"model.image_size={32 if base == 'tiny' else 96}"
    flags = ["--data", "store.zarr", "--base", base, "--method", method, "--preset", "cpu", "--dry-run"]
    return [*flags, size, *SMALL, *values]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=3, shape_zyx=(3, 20, 20), labelled=False)
    card = Card(arch="vit_t", stem="conv1x1", image_size=32, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3)
    save_encoder(tiny_encoder(), root / "tiny", card)
    save_encoder(
        plain_encoder(), root / "plain", Card(arch="vit_b", image_size=96, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    )
    (root / "notes.txt").write_text("no weights at all")
    (root / "half.zarr").mkdir()
    return root


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        pytest.param(
            ["--modality", "mrri"], 2, ["must be one of ct, mri, ultrasound, xray, got 'mrri'", "Did you mean 'mri'"],
            id="unknown modality",
        ),
        pytest.param(
            ["--data", "store.zarr", "--base", "tiny", "trainer.max_steps=4"], 2,
            ["warmup_steps must be at least 0 and below max_steps, got 12 of 4"], id="warm-up as long as the run",
        ),
        pytest.param(["--data", "nowhere.zarr"], 3, ["the store does not exist", "samgraft store build"], id="none"),
        pytest.param(["--data", "half.zarr"], 3, ["is not a slice store"], id="a folder that is no store"),
        pytest.param(
            ["--data", "store.zarr", "--modality", "ct", "--base", "tiny"], 3,
            ["must be of modality ct, got mri. Use --modality mri"], id="another modality than the store's",
        ),
        pytest.param(
            ["--data", "store.zarr", "--base", "tiny", "optim.lrr=1e-4"], 2, ["lrr", "Did you mean 'optim.lr'"],
            id="misspelt key",
        ),
        pytest.param(
            ["--data", "store.zarr", "--base", "tiny", "--method", "maee"], 2,
            ["METHOD must be one of dino, feature, lejepa, mae, masked_image, got 'maee'"], id="unknown method",
        ),
        pytest.param(
            ["--data", "store.zarr", "--base", "tiny", "--preset", "tpu"], 2, ["must be one of", "'masked_image-tpu'"],
            id="unknown preset",
        ),
        pytest.param(
            ["--data", "store.zarr", "--base", "tiny", "--model", "vit_x"], 2,
            ["model must be one of vit_t, vit_b, vit_l, vit_h, sam2_t,", "got 'vit_x'"], id="unknown model",
        ),
        pytest.param(["--data", "store.zarr", "--base", "notes.txt"], 4, ["notes.txt"], id="base that is no weights"),
        pytest.param(
            ["--data", "store.zarr", "--base", "plain", "--model", "vit_t"], 4,
            ["of another architecture", "Use --model vit_b"], id="base of another architecture",
        ),
        pytest.param(
            ["--data", "store.zarr", "--model", "vit_b"], 2, ["--model vit_b needs weights", "--base sam"],
            id="no base",
        ),
        pytest.param(
            ["--data", "store.zarr", "--base", "tiny", "objective.mae.mask_ratio=0.5"], 2,
            ["objective.mae is set but objective.name is masked_image"], id="setting of another objective",
        ),
        pytest.param(
            ["--data", "store.zarr", "--base", "tiny", "data.batch_size=500"], 2,
            ["batch_size must not exceed the 6 training slices, got 500"], id="batch larger than the data",
        ),
        pytest.param(
            ["--data", "store.zarr", "--base", "tiny", "model.num_frozen_depths=99"], 2,
            ["num_frozen_depths must be below", "leaves nothing to train"], id="everything frozen",
        ),
        *(
            pytest.param(wrong_value(method, value), 2, [message], id=f"{method} {value}")
            for method, value, message in (
                ("masked_image", "objective.masked_image.mask_unit_px=24", "image_size 32, got 24. Use one of 4, 8"),
                ("masked_image", "model.image_size=4", "image_size must be at least two tokens of 4 px, got 4"),
                ("masked_image", "model.image_size=0", "model.image_size must be at least 1, got 0"),
                ("masked_image", "objective.masked_image.mask_unit_px=6", "where  objective.*.mask_unit_px"),
                ("masked_image", "objective.masked_image.mask_ratio=0.001", "where  objective.*.mask_ratio"),
                ("feature", "objective.feature.mask_kind=per_window", "where  objective.feature.mask_kind"),
                ("feature", "objective.feature.mask_unit_px=6", "where  objective.*.mask_unit_px"),
                ("dino", "objective.dino.mask_unit_px=6", "where  objective.*.mask_unit_px"),
                ("dino", "model.image_size=4", "where  model.image_size"),
                ("dino", "optim.ema_decay=0.9", "optim.ema_decay has no effect on objective=dino"),
                ("lejepa", "objective.lejepa.crops.local_size_px=6", "where  objective.*.crops.local_size_px"),
                ("masked_image", "watch.every_n_steps=0", "watch.every_n_steps must be at least 1, got 0"),
                ("masked_image", "watch.every_n_steps=-3", "watch.every_n_steps must be at least 1, got -3"),
                ("masked_image", "watch.num_panel_rows=0", "watch.num_panel_rows must be at least 1, got 0"),
                ("masked_image", "probe.every_n_steps=0", "probe.every_n_steps must be at least 1, got 0"),
                ("masked_image", "data.min_foreground_fraction=2", "min_foreground_fraction must be less than 1"),
                ("masked_image", "data.augment.max_log_gamma=1000", "max_log_gamma must be at most 10, got 1000"),
                ("masked_image", "seed=-1", "seed must be in 0..4294967295, got -1"),
            )
        ),
        pytest.param(
            wrong_value("mae", "objective.mae.mask_ratio=0.01", base="plain"), 2, ["where  objective.*.mask_ratio"],
            id="mae that hides nothing",
        ),
        pytest.param(
            wrong_value(
                "feature", "objective.feature.mask_kind=per_window", "objective.feature.mask_unit_px=32", base="plain"
            ), 2, ["where  objective.feature.mask_unit_px"], id="windows and squares",
        ),
    ],
)  # fmt: skip
def test_bad_input__one_screen_and_nothing_written(
    lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    messages: list[str],
) -> None:
    monkeypatch.chdir(lab)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["pretrain", *arguments]) == code
    shown = capsys.readouterr().err
    for message in messages:
        assert message in shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) < 25
    assert not (lab / "runs").exists()


def test_measured_step__out_of_memory_is_one_screen_and_writes_nothing(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.chdir(lab)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preflight, "_time_micro_step", too_much)
    assert main(["pretrain", "--data", "store.zarr", "--base", "tiny", "data.batch_size=4"]) == 2
    shown = capsys.readouterr().err
    assert "out of memory with batch_size 4 and trainer.accumulate 1" in shown
    assert "nothing was written" in shown
    assert "a batch of 2 with trainer.accumulate=2" in shown
    assert "please report" not in shown
    assert not (lab / "runs").exists()


@pytest.fixture
def with_runs(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of runs with a file, a foreign folder and a run of other settings."""
    monkeypatch.chdir(lab)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "scan.txt").write_text("x")
    prepared, _ = prepare(TypedSettings(options={"data.store": "store.zarr", "model.base": "tiny"}), has_gpu=False)
    RunFolder.open(tmp_path, "before", config=prepared, stage="pretrain").close()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "must be a plain folder name"),
        ("file", "file is a file"),
        ("foreign", "contains no run"),
        ("before", "another configuration, 1 difference: optim.lr: 2e-05 -> 0.0003"),
    ],
)
def test_dry_run__run_folder_that_a_run_would_refuse_is_refused(
    with_runs: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    before = {p: p.stat().st_mtime_ns for p in with_runs.rglob("*")}
    place = ["--runs", str(with_runs), "--name", name]
    assert main(["pretrain", "--data", "store.zarr", "--base", "tiny", *place, "--dry-run", "optim.lr=3e-4"]) == 2
    assert message in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in with_runs.rglob("*")} == before
