"""Resume of stage 2. A stopped or killed run ends with the bytes of an uninterrupted one, in every mode."""

import dataclasses
import hashlib
import json
import os
import signal

import pytest
import torch
from model_factory import make_sam, tiny_vit_t_spec
from safetensors.torch import load_file
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.training import train
from samgraft.finetune.training.module import FinetuneModule
from samgraft.shared.cli import main
from samgraft.shared.config import load_config
from samgraft.shared.errors import SamgraftError, StoppedAndSaved
from samgraft.shared.files import write_tensors
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.samples.split import default_split_path, make_split
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device
from samgraft.shared.training.trainer import fit
from store_factory import make_store

MODES = {
    "automatic": (),
    "box": ("prompt.mode=box",),
    "clicks": ("prompt.mode=clicks", "prompt.num_clicks=2"),
    "unet2d": ("model.ckpt=null", "model.arch=unet2d", "baseline.base_channels=4"),
    "dynunet3d": ("model.ckpt=null", "model.arch=dynunet3d", "baseline.base_channels=4"),
    "average": ("optim.ema_decay=0.9",),
    "regions": ("data.regions={whole: [1]}", "loss.overlap=tversky", "loss.pixel=focal"),
}


class Killed(BaseException):
    """Replacement of SIGKILL that no code catches."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=5, shape_zyx=(4, 24, 20))
    write_tensors(root / "base.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    return root


def config_of(lab, *overrides):
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 2},
        "model": {"ckpt": str(lab / "base.safetensors"), "image_size": 32},
        "adapter": {"r": 2, "lora_alpha": 2},
        "optim": {"warmup_steps": 1},
        "trainer": {"max_steps": 4, "save_every_steps": 2},
        "watch": {"validate_every_n_steps": 2, "num_overlays": 1},
    }
    return load_config(FinetuneConfig, layers=[layer], overrides=overrides)


def run(lab, name, *overrides):
    config = config_of(lab, *overrides)
    with RunFolder.open(lab / "runs", name, config=config, stage="finetune") as folder:
        train.finetune(config, folder, choose_device("cpu"), train.prepare_seeded(config))
    return lab / "runs" / name


def results(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    (weights,) = (path / "model").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest(), metrics


def at_step(monkeypatch, step, act):
    """Call a function in the forward pass of a step."""
    original = FinetuneModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step:
            act()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FinetuneModule, "training_step", training_step)


def kill():
    raise Killed


@pytest.mark.parametrize(
    "mode", [m if m in {"automatic", "box", "dynunet3d"} else pytest.param(m, marks=pytest.mark.slow) for m in MODES]
)
def test_finetune__resumed_run_has_the_bytes_of_an_uninterrupted_one(lab, monkeypatch, mode):
    whole = run(lab, f"whole-{mode}", *MODES[mode])
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedAndSaved):
            run(lab, f"stopped-{mode}", *MODES[mode])
    stopped = run(lab, f"stopped-{mode}", *MODES[mode])
    assert results(stopped) == results(whole)
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(Killed):
            run(lab, f"killed-{mode}", *MODES[mode])
    assert results(run(lab, f"killed-{mode}", *MODES[mode])) == results(whole)
    if mode == "box":
        assert read_model(whole).task.inference().prompt.mode.value == "box"
        assert any("train/loss/iou" in line for line in results(whole)[1])


def test_early_end__is_recorded_and_not_repeated(lab, caplog):
    """Dice cannot rise at a learning rate near 0, so the second round without gain ends the run."""
    overrides = (
        "optim.lr=1e-12", "trainer.max_steps=40", "watch.validate_every_n_steps=2", "watch.patience_rounds=2",
    )  # fmt: skip
    with caplog.at_level("INFO"):
        path = run(lab, "early", *overrides)
    # Rounds at 2 (the first after warm-up), 4 and 6.
    assert "training ends at step 6 of 40: 2 validation rounds had no higher Dice" in caplog.text
    assert [line["step"] for line in results(path)[1]][-1] == 6
    assert read_model(path).card.steps == 6
    again = json.loads((path / "validation.json").read_text())
    assert sorted(int(step) for step in again["rounds"]) == [2, 4, 6]


def test_measure_cost__out_of_memory_gives_advice(lab, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(FinetuneModule, "training_step", too_much)
    config = config_of(lab)
    with pytest.raises(SamgraftError, match=r"out of memory with batch_size 2 and trainer\.accumulate 1") as refusal:
        train.measure_cost(train.prepare_seeded(config), config, choose_device("cpu"))
    assert "nothing was written" in refusal.value.kept
    assert "trainer.activation_checkpointing=true" in refusal.value.next_command


def test_last_validation__runs_on_the_device(lab, monkeypatch):
    """On a CPU every scan of a vit_b takes minutes, so a GPU would wait for hours after its training."""
    events = []
    measure, cpu = train.score_scans, Segmenter.cpu
    monkeypatch.setattr(train, "score_scans", lambda *args: events.append("measured") or measure(*args))
    monkeypatch.setattr(Segmenter, "cpu", lambda self: events.append("off the device") or cpu(self))
    run(lab, "order")
    assert events[-2:] == ["measured", "off the device"]


@pytest.mark.slow
def test_early_end__killed_run_does_not_continue_training(lab, monkeypatch):
    overrides = ("optim.lr=1e-12", "trainer.max_steps=40", "watch.validate_every_n_steps=2", "watch.patience_rounds=1")
    with monkeypatch.context() as patch:
        patch.setattr(train, "restore_best", lambda *_: kill())
        with pytest.raises(Killed):
            run(lab, "early-killed", *overrides)
    path = run(lab, "early-killed", *overrides)
    assert [line["step"] for line in results(path)[1]][-1] == 4


@pytest.mark.parametrize("mode", ["unet2d", "dynunet3d"])
def test_baseline__is_evaluated_and_never_released(lab, monkeypatch, capsys, mode):
    path = run(lab, f"scored-{mode}", *MODES[mode], "trainer.max_steps=2")
    monkeypatch.chdir(lab)
    assert main(["evaluate", f"runs/{path.name}", "--split", "test", "--data", "store.zarr"]) == 0
    summary = json.loads((path / "evaluation" / "test" / "summary.json").read_text())
    assert summary["dice"]["num_patients"] == 1
    model = read_model(path)
    assert model.card.arch == mode
    assert model.card.base_name == "random weights"
    # Two steps teach it nothing, which release states first unless it is forced.
    assert main(["release", f"runs/{path.name}", "--out", "out", "--license", "cc-by-4.0", "--force"]) == 2
    assert "is a U-Net baseline" in capsys.readouterr().err
    assert not (lab / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.arch=unet2d",), "Remove CKPT"),
        (("model.arch=unet2d", "model.ckpt=null", "prompt.mode=box"), "takes no prompts"),
        (
            ("model.arch=unet3d", "model.ckpt=null", "data.few_shot.num=2", "data.few_shot.unit=slices"),
            "a 3D baseline trains on volumes",
        ),
        (("model.ckpt=null",), "CKPT and BASE are both missing"),
        (("model.arch=unet2d", "model.ckpt=null", "data.batch_size=999"), "batch_size must be at most"),
        (("data.few_shot.num=99",), "got 99"),
        (("loss.class_weights=[1, 2]",), "one per class"),
        (("prompt.mode=bocks",), "one of none, box, points, mask, clicks, got 'bocks'"),
        (("prompt.mode=box", "loss.class_weights=[1]"), "no effect with prompts"),
        (("data.regions={a: [5]}",), "got 5; it has 1"),
        (("data.regions={a: [1]}", "data.classes=[1]"), "both given"),
    ],
)
def test_finetune__bad_input_is_refused_before_a_run_folder_exists(lab, settings, message):
    """The command prepares data and weights before it opens a run folder."""
    with pytest.raises(SamgraftError, match=message):
        train.prepare_seeded(config_of(lab, *settings))


@pytest.mark.parametrize("few_shot", ["null", "2"])
def test_resume__uses_the_runs_own_split(tmp_path, few_shot):
    store = SliceStore.open(make_store(tmp_path, num_patients=6, shape_zyx=(4, 24, 20)))
    write_tensors(tmp_path / "base.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    config = config_of(tmp_path, f"data.few_shot.num={few_shot}", "trainer.max_steps=2")
    path = tmp_path / "runs" / "a"
    first = train.prepare_seeded(config, run_path=path)
    with RunFolder.open(tmp_path / "runs", "a", config=config, stage="finetune") as folder:
        train.finetune(config, folder, choose_device("cpu"), first)
    other = next(s for s in (make_split(store, seed=seed) for seed in range(50)) if s.test != first.split.test)
    other.save(default_split_path(store.path))
    again = train.prepare_seeded(config, run_path=path)
    assert again.split == first.split
    with RunFolder.open(tmp_path / "runs", "a", config=config, stage="finetune") as folder:
        train.finetune(config, folder, choose_device("cpu"), again)
    assert set(train.prepare_seeded(config, run_path=tmp_path / "runs" / "b").split.test) == set(other.test)


def test_measure_cost__changes_nothing(lab):
    config = config_of(lab, "prompt.mode=box", "trainer.accumulate=2")
    prepared = train.prepare_seeded(config)
    before = {k: v.clone() for k, v in prepared.segmenter.state_dict().items()}
    torch.manual_seed(3)
    generators = torch.get_rng_state()
    cost = train.measure_cost(prepared, config, choose_device("cpu"))
    assert cost.seconds > 0
    assert cost.saved_bytes > 0
    assert torch.equal(torch.get_rng_state(), generators)
    assert all(torch.equal(before[k], v) for k, v in prepared.segmenter.state_dict().items())
    assert all(p.grad is None for p in prepared.segmenter.parameters())


@pytest.mark.slow
def test_finished_card__counts_the_slices_of_every_process(lab, monkeypatch):
    """No variable announces processes that Lightning starts, so the number counted in training is written."""

    def by_two_processes(*arguments, **keywords):
        result = fit(*arguments, **keywords)
        return dataclasses.replace(result, slices_seen=2 * result.slices_seen, world_size=2)

    monkeypatch.setattr(train, "fit", by_two_processes)
    path = run(lab, "two", "trainer.max_steps=1", "optim.warmup_steps=0")
    assert read_model(path).card.slices_seen == 2 * 2
    assert json.loads((path / "run.json").read_text())["world_size"] == 2


def test_average__is_validated_and_written(lab):
    path = run(lab, "averaged", "optim.ema_decay=0.9", "adapter.method=full")
    step = json.loads((path / "validation.json").read_text())["rounds"]
    best = max(step, key=lambda s: (step[s], -int(s)))
    state = load_file(path / "checkpoints" / f"step-{int(best):06d}" / "state.safetensors")
    written = load_file(path / "model" / "sam.safetensors")
    kept = load_file(path / "best" / f"step-{int(best):06d}.safetensors")
    prefix = "average.segmenter.sam."
    averaged = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    assert set(kept) <= set(averaged)
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in kept.items())
    assert all(torch.equal(written[name], tensor) for name, tensor in kept.items())
    assert any(not torch.equal(tensor, state[f"model.segmenter.sam.{name}"]) for name, tensor in kept.items())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_layer_decay__rates_fall_towards_the_input_and_the_decoder_has_the_full_rate(lab, method):
    config = config_of(lab, f"adapter.method={method}", "optim.layer_decay=0.5", "optim.lr=0.08")
    segmenter = train.prepare_seeded(config).segmenter
    optimizer = FinetuneModule(segmenter, config, ClassTable(ids=(1,), names=("a",))).configure_optimizers()
    rate_of = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    depths = {}
    for depth, parameters in segmenter.sam.image_encoder.layer_groups():
        for parameter in parameters:
            if parameter.requires_grad:
                depths.setdefault(depth, set()).add(rate_of[id(parameter)])
    deepest = max(depth for depth, _ in segmenter.sam.image_encoder.layer_groups() if depth in depths)
    assert len(depths) > 2
    assert depths == {depth: {0.08 * 0.5 ** (deepest - depth)} for depth in depths}
    decoder = [p for p in segmenter.sam.mask_decoder.parameters() if p.requires_grad]
    assert {rate_of[id(p)] for p in decoder} == {0.08}


@pytest.mark.parametrize("setting", ["adapter.scope=decoder", "model.arch=unet2d"])
def test_layer_decay__without_layers_that_train_is_refused(lab, setting):
    with pytest.raises(SamgraftError, match=r"optim.layer_decay has no effect"):
        config_of(lab, setting, "optim.layer_decay=0.5")
