"""Tests of schedules, parameter groups, devices, generators and the progress meter."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from samgraft.shared.errors import UsageError
from samgraft.shared.machine import format_duration
from samgraft.shared.report.page import running_mean
from samgraft.shared.runs.environment import local_rank, process_rank
from samgraft.shared.runs.metrics import MetricsLog
from samgraft.shared.training import device as device_module
from samgraft.shared.training import progress as progress_module
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.device import bf16_speedup, choose_device, cpu_has_fast_bf16, retain_freed_memory
from samgraft.shared.training.optim import (
    LearningRate,
    OptimizerConfig,
    build_optimizer,
    cosine_value,
    parameter_groups,
    warmup_cosine,
)
from samgraft.shared.training.periodic import PeriodicTask, evaluation_mode
from samgraft.shared.training.preflight import state_bytes
from samgraft.shared.training.progress import ProgressMeter, StepLog
from samgraft.shared.training.resume import RunCounters, capture_rng, preserve_rng, restore_rng, seed_process
from samgraft.shared.training.trainer import choose_cluster_environment
from torch import nn


@pytest.mark.parametrize(("step", "expected"), [(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.55), (12, 0.1), (99, 0.1)])
def test_warmup_cosine__returns_known_points(step: int, expected: float) -> None:
    assert warmup_cosine(step, warmup_steps=4, max_steps=12, final_factor=0.1) == pytest.approx(expected)


def test_cosine_value__runs_from_start_to_end() -> None:
    assert [cosine_value(s, start=0.996, end=1.0, last_step=10) for s in (0, 5, 10, 20)] == pytest.approx(
        [0.996, 0.998, 1.0, 1.0]
    )


def test_learning_rate__with_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps must be at least 0 and below max_steps, got 10 of 10"):
        LearningRate(warmup_steps=10, max_steps=10)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(4, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2, 2, 4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def layer_groups(self) -> list[tuple[int, list[nn.Parameter]]]:
        first = [*self.patch_embed.parameters(), self.pos_embed]
        return [(0, first), (1, list(self.blocks[0].parameters())), (2, list(self.blocks[1].parameters()))]


def test_parameter_groups__contain_every_parameter_once_with_rate_and_decay() -> None:
    module = Encoder()
    config = OptimizerConfig(lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    groups = parameter_groups(module, config, layer_groups=module.layer_groups())
    names = {id(p): name for name, p in module.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == {
        "patch_embed.weight": (0.25e-3, 0.1),
        "patch_embed.bias": (0.25e-3, 0.0),
        "pos_embed": (0.25e-3, 0.0),
        "blocks.0.weight": (0.5e-3, 0.1),
        "blocks.0.bias": (0.5e-3, 0.0),
        "blocks.1.weight": (1e-3, 0.1),
        "blocks.1.bias": (1e-3, 0.0),
        "norm.weight": (1e-3, 0.0),
        "norm.bias": (1e-3, 0.0),
        "head.weight": (1e-3, 0.1),
        "head.bias": (1e-3, 0.0),
    }
    assert sum(len(g["params"]) for g in groups) == len(found)


def test_build_optimizer__decays_of_both_moments_are_those_of_the_settings() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerConfig(beta1=0.8, beta2=0.7))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.7)] * 2


def test_learning_rate__ends_at_the_set_share_of_its_peak() -> None:
    rate = LearningRate(warmup_steps=2, max_steps=10, final_factor=0.3)
    assert [rate.factor(step) for step in (0, 2, 6, 10)] == pytest.approx([0.5, 1.0, 0.65, 0.3])


def test_build_optimizer__without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one parameter must be trainable"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"lr\n  Input should be"),
        ({"lr": 1e3}, r"lr\n  Input should be"),
        ({"weight_decay": -1.0}, r"weight_decay\n  Input should be"),
        ({"layer_decay": 0.0}, r"layer_decay\n  Input should be"),
        ({"beta2": 1.0}, r"beta2\n  Input should be"),
    ],
)
def test_optimizer_config__outside_its_ranges_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, r"max_steps\n  Input should be"),
        ({"accumulate": 0}, r"accumulate\n  Input should be"),
        ({"keep_last": 1}, r"keep_last\n  Input should be"),
        ({"num_workers": -1}, r"num_workers\n  Input should be"),
        ({"clip_grad_norm": 0.0}, r"clip_grad_norm\n  Input should be"),
        ({"devices": 0}, r"devices\n  Input should be"),
    ],
)
def test_trainer_config__outside_its_ranges_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**{"max_steps": 5, **settings})


def test_state_bytes__counts_weights_buffers_and_two_moments() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).requires_grad_(False))
    weights, trainable = 20 + 10 + 12, 20 + 10
    assert state_bytes(module) == 4 * (weights + 2 * trainable) + 4 * (5 + 5) + 8


def test_choose_device__auto_reports_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    choice = choose_device()
    assert (choice.accelerator, choice.devices, choice.torch_device) == ("cpu", 1, torch.device("cpu"))
    assert "CUDA_VISIBLE_DEVICES hides every GPU" in choice.reason
    with pytest.raises(UsageError, match="device cuda is not available: CUDA_VISIBLE_DEVICES hides every GPU"):
        choose_device("cuda")


def test_choose_device__under_torchrun_takes_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    choice = choose_device("cpu")
    assert (choice.devices, choice.num_nodes) == (2, 2)


ONE_TASK = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "samgraft", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"} | {
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1"
}  # fmt: skip
"""Variables of a batch script. With ``STEP`` they are those of a task of srun."""
STEP = {"SLURM_STEP_ID": "0"}
FOUR_TASKS = {**ONE_TASK, **STEP, "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "t", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
CHILD_OF_LIGHTNING = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Set exactly these variables of launchers in the environment."""
    ours = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "NODE_RANK", "MASTER_")
    with monkeypatch.context() as patch:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        patch.setattr(os, "environ", clean)
        yield clean.update


@pytest.mark.parametrize(
    ("variables", "devices", "shape", "rank", "cluster"),
    [
        ({}, None, (1, 1), 0, LightningEnvironment),
        ({}, 2, (2, 1), 0, LightningEnvironment),
        (TORCHRUN, None, (2, 1), 1, TorchElasticEnvironment),
        (ONE_TASK | TORCHRUN, None, (2, 1), 1, TorchElasticEnvironment),
        (ONE_TASK | STEP | TORCHRUN, None, (2, 1), 1, TorchElasticEnvironment),
        (FOUR_TASKS | TORCHRUN | {"WORLD_SIZE": "4"}, None, (2, 2), 1, TorchElasticEnvironment),
        (ONE_TASK | STEP, None, (1, 1), 0, LightningEnvironment),
        (ONE_TASK | STEP, 2, (2, 1), 0, LightningEnvironment),
        (ONE_TASK | STEP | CHILD_OF_LIGHTNING, 2, (2, 1), 1, LightningEnvironment),
        (FOUR_TASKS | {"SLURM_NTASKS_PER_NODE": "2"}, None, (2, 2), 3, SLURMEnvironment),
        (FOUR_TASKS | {"SLURM_NTASKS_PER_NODE": ""}, 2, (2, 2), 3, SLURMEnvironment),
    ],
    ids=[
        "alone", "two of Lightning", "torchrun", "torchrun in a batch script", "torchrun in a task",
        "torchrun in one of several tasks", "one task", "two of Lightning in a task", "its second process",
        "srun", "srun without --ntasks-per-node",
    ],
)  # fmt: skip
def test_choose_cluster_environment__detects_the_launcher(
    started_with, variables, devices, shape, rank, cluster
) -> None:
    """torchrun comes before SLURM, and SLURM counts only if srun started several tasks."""
    started_with({name: value for name, value in variables.items() if value})
    choice = choose_device("cpu", devices=devices)
    assert (choice.devices, choice.num_nodes) == shape
    assert process_rank() == rank
    assert local_rank() == min(rank, 1)
    found = choose_cluster_environment(choice)
    assert type(found) is cluster
    found.validate_settings(num_devices=choice.devices, num_nodes=choice.num_nodes)
    assert not getattr(found, "auto_requeue", False)


@pytest.mark.parametrize(
    ("variables", "devices", "message"),
    [
        ({"SLURM_NTASKS": "3"}, None, r"spread evenly over the nodes, got 3 tasks on 2 nodes\. Start with srun"),
        ({"SLURM_NTASKS_PER_NODE": "1"}, None, "got 4 tasks on 2 nodes, 1 per node"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1"}, None, r"got 4 tasks on 2 nodes \(3,1\)"),
        ({}, 4, "devices must be the 2 processes that torchrun or SLURM started on this machine, got 4. Leave it out"),
    ],
)
def test_choose_device__with_uneven_or_unexpected_processes_is_refused(
    started_with, variables, devices, message
) -> None:
    tasks = FOUR_TASKS | variables
    started_with({k: v for k, v in tasks.items() if k != "SLURM_NTASKS_PER_NODE" or k in variables})
    with pytest.raises(UsageError, match=message):
        choose_device("cpu", devices=devices)


@pytest.mark.parametrize(
    ("machine", "flags", "fast"),
    [
        ("x86_64", "fpu avx512f avx512_bf16", True),
        ("x86_64", "fpu amx_bf16", True),
        ("x86_64", "fpu avx2 avx512f", False),
        ("aarch64", "fp bf16", True),
        ("aarch64", "fp asimd", False),
    ],
)
def test_cpu_has_fast_bf16__without_instructions_is_false(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, fast: bool
) -> None:
    monkeypatch.setattr(device_module, "bf16_speedup", lambda: 2.0)
    monkeypatch.setattr(device_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset(flags.split()))
    assert cpu_has_fast_bf16() is fast
    assert choose_device("cpu").precision == ("bf16-mixed" if fast else "32-true")


def test_bf16_speedup__is_measured_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = iter([1.05, 9.9])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset({"avx512_bf16", "bf16"}))
    monkeypatch.setattr(device_module, "_measure_bf16_speedup", lambda: next(measured))
    for _ in range(2):  # The second time it is read from the file.
        bf16_speedup.cache_clear()
        assert bf16_speedup() == 1.05
    assert not cpu_has_fast_bf16()
    (tmp_path / "samgraft" / "bf16_speed.json").write_text("damaged")
    bf16_speedup.cache_clear()
    assert bf16_speedup() == 9.9
    bf16_speedup.cache_clear()


def test_measure_bf16_speedup__leaves_the_generators_unchanged() -> None:
    before = torch.get_rng_state()
    assert device_module._measure_bf16_speedup() > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_retain_freed_memory__is_accepted_by_glibc() -> None:
    assert retain_freed_memory() is (platform.system() == "Linux" and platform.libc_ver()[0] == "glibc")


def test_capture_rng__restores_all_generators() -> None:
    seed_process(3, rank=1)
    np.random.standard_normal()  # This caches a second value.
    before = capture_rng()
    first = torch.rand(2).tolist(), random.random(), np.random.standard_normal(3).tolist()
    with preserve_rng():
        torch.rand(5)
    restore_rng(before)
    assert (torch.rand(2).tolist(), random.random(), np.random.standard_normal(3).tolist()) == first
    seed_process(3, rank=0)
    assert torch.rand(2).tolist() != first[0]


def test_preserve_rng__after_an_error_restores_the_generators() -> None:
    before = capture_rng()

    def fail() -> None:
        with preserve_rng():
            torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(before["torch"], capture_rng()["torch"])


def test_evaluation_mode__restores_the_mode_of_each_submodule() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    with evaluation_mode(module):
        assert [m.training for m in module.modules()] == [False, False, False]
    assert [m.training for m in module.modules()] == [True, False, True]


def test_periodic_task__is_due_at_its_interval_and_at_the_end() -> None:
    task = PeriodicTask(name="p", every_steps=4, run=lambda _: {}, at_start=True)
    assert [s for s in range(11) if task.is_due(s, max_steps=10)] == [0, 4, 8, 10]
    with pytest.raises(ValueError, match="every_steps of p must be at least 1"):
        PeriodicTask(name="p", every_steps=0, run=lambda _: {})


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")]
)
def test_format_duration__uses_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_running_mean__has_shorter_windows_at_both_ends() -> None:
    np.testing.assert_allclose(running_mean(np.array([1.0, 2.0, 6.0, 3.0]), 3), [1.5, 3.0, 11 / 3, 4.5])


def test_step_log__values_of_one_step_may_be_written_in_two_parts(tmp_path: Path) -> None:
    run = SimpleNamespace(metrics=MetricsLog(tmp_path / "metrics.jsonl"), tb=tmp_path / "tb", is_writer=True)
    step_log = StepLog(run, every_steps=1)  # type: ignore[arg-type]
    step_log.record(1, {"train/loss": 3.0})
    step_log.flush()
    step_log.record(1, {"probe/dice": 0.5})
    assert {name: list(values) for name, values in step_log.curves().items()} == {
        "train/loss": [3.0], "probe/dice": [0.5],
    }  # fmt: skip


def test_step_log__curves_have_all_sessions_and_the_file_is_read_once(tmp_path: Path) -> None:
    """Step 2 is in the file, in the values that a resume loads again, and has a value that is not written yet."""
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.append_many([{"step": step, "train/loss": 10.0 - step} for step in (1, 2, 3)])
    run = SimpleNamespace(metrics=metrics, tb=tmp_path / "tb", is_writer=True)
    step_log = StepLog(run, every_steps=1)  # type: ignore[arg-type]
    step_log.start(after_step=2)
    step_log.record(2, {"probe/dice": 0.5})
    assert {name: list(values) for name, values in step_log.curves().items()} == {
        "train/loss": [9.0, 8.0], "probe/dice": [0.5],
    }  # fmt: skip
    step_log.flush()
    size = metrics.path.stat().st_size
    metrics.read = pytest.fail  # type: ignore[method-assign]
    for step in (3, 4):
        step_log.record(step, {"train/loss": torch.tensor(float(step))})
        assert list(step_log.curves()["train/loss"])[-1] == step
        step_log.flush()
    step_log.close()
    assert list(step_log.curves()["train/loss"]) == [9.0, 8.0, 3.0, 4.0]
    assert metrics.path.stat().st_size > size


def make_meter(step_log: Any, config: TrainerConfig, *, samples_seen: int = 0) -> ProgressMeter:
    counters = RunCounters(seed=0, batch_size=4, accumulate=config.accumulate, samples_seen=samples_seen)
    return ProgressMeter(step_log, config, counters=counters, slices_per_micro_step=4, slices_available=16)


def test_progress_meter__epochs_count_earlier_sessions() -> None:
    recorded: dict[str, float] = {}
    step_log = SimpleNamespace(every_steps=5, record=lambda step, values: recorded.update(values))
    meter = make_meter(step_log, TrainerConfig(max_steps=9, accumulate=2), samples_seen=32)
    trainer = SimpleNamespace(
        global_step=5, is_global_zero=False, optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]
    )
    meter.on_train_start(trainer, None)
    for _ in range(2):
        meter.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, None, 0)
    assert recorded["train/epochs"] == (32 + 8) / 16


def test_progress_meter__eta_comes_from_the_newest_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a minute of validation and a slow first step, the steps take 2 s, and later 4 s."""
    clock = [100.0]
    monkeypatch.setattr(progress_module, "PLAIN_LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress_module, "FIRST_PLAIN_LINE_AFTER_S", 0.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    step_log = SimpleNamespace(every_steps=1, record=lambda step, values: None)
    progress = make_meter(step_log, TrainerConfig(max_steps=200))
    module = nn.ModuleDict({"encoder": nn.Linear(10, 10, bias=False), "heads": nn.Linear(5, 1, bias=False)})
    groups = [
        {"params": [module["encoder"].weight], "lr": 1e-5, "peak_lr": 1e-4},
        {"params": [module["heads"].weight], "lr": 1e-4, "peak_lr": 1e-3},
    ]
    optimizer = SimpleNamespace(param_groups=groups)
    trainer = SimpleNamespace(global_step=1, is_global_zero=True, optimizers=[optimizer])
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level("INFO")
    progress.on_train_start(trainer, module)
    assert "peak: encoder 1.0e-04 (0.00 M parameters), heads 1.0e-03 (0.00 M parameters)" in caplog.text
    clock[0] += 60
    for step in range(1, 101):
        trainer.global_step = step
        progress.on_train_batch_start(trainer, None, None, 0)
        clock[0] += 20 if step == 1 else 2 if step <= 49 else 4
        progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, None, 0)
    lines = [record.getMessage() for record in caplog.records if "step " in record.getMessage()]
    assert "ETA unknown" in lines[2]
    assert "step 4/200" in lines[3]
    assert f"ETA {format_duration(2 * 196)} " in lines[3]
    assert f"ETA {format_duration(4 * 100)} " in lines[99]
    assert progress._eta(0) == "0 s"
    assert "lr 1.0e-05 to 1.0e-04" in lines[99]


def test_progress_meter__counts_micro_steps_of_one_step_as_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    progress = make_meter(SimpleNamespace(every_steps=1), TrainerConfig(max_steps=10, accumulate=3))
    optimizer = SimpleNamespace(param_groups=[])
    trainer = SimpleNamespace(global_step=1, is_global_zero=True, optimizers=[optimizer])
    progress.on_train_start(trainer, nn.Identity())
    for wait, work in ((60, 3), (1, 4)):
        clock[0] += wait
        progress.on_train_batch_start(trainer, None, None, 0)
        clock[0] += work
        progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, None, 0)
    assert (progress.wait_s, progress.work_s) == (1, 7)
    assert progress.slices_per_s == 1
