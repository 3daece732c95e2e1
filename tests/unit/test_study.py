"""Studies: cells of the grid, runs and resumed runs, and tables worked out by hand."""

import csv
import dataclasses
import json
import logging
import math
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from samgraft.finetune.evaluation.evaluate import Evaluation, write_evaluation
from samgraft.finetune.evaluation.scores import CASE_COLUMNS
from samgraft.finetune.study import report, schedule
from samgraft.finetune.study.cell_run import CellFolder, Processes, run_cell
from samgraft.finetune.study.cells import expand
from samgraft.finetune.study.config import StudyConfig
from samgraft.finetune.study.report import rank_figure
from samgraft.finetune.study.results import (
    group_similar_settings,
    rank_settings,
    rank_table,
    score_settings,
    short_names,
)
from samgraft.finetune.study.schedule import run_locally, run_on_slurm
from samgraft.finetune.study.study import StudyIncomplete, plan_study, read_slurm_options, run_study
from samgraft.shared.config import load_config
from samgraft.shared.errors import DataError, StoppedAndSaved, UsageError

GRID = {
    "name": "s",
    "data_sets": [{"name": "a", "store": "a.zarr"}],
    "initialisations": [{"name": "base", "ckpt": {"vit_t": "base.pth"}}],
    "architectures": ["vit_t"],
    "methods": ["lora", "full"],
    "seeds": [0, 1],
}
STORES = {"a": "a.zarr"}


def config(**values):
    return load_config(StudyConfig, layers=[GRID | values])


def cells(**values):
    return expand(config(**values), stores=STORES).cells


class FakeSamgraft:
    """Replacement of ``samgraft finetune`` and ``evaluate`` that writes their files with fixed scores."""

    def __init__(self, *, codes=()):
        self.calls = []
        self.codes = list(codes)

    def __call__(self, arguments, log_file, num_threads, processes):
        self.calls.append(arguments)
        code = self.codes.pop(0) if self.codes else 0
        with log_file.open("a") as file:
            file.write("hello\nerror: no such thing. See /vol/name/x.log\n  next   nothing\n" if code else "hello\n")
        if code == 0 and arguments[0] == "finetune":
            self.finetune(Path(arguments[arguments.index("--runs") + 1]), arguments)
        if code == 0 and arguments[0] == "evaluate":
            self.evaluate(Path(arguments[1]))
        return code, 60.0, 2048.0

    def finetune(self, runs, arguments):
        model = runs / arguments[arguments.index("--name") + 1] / "model"
        model.mkdir(parents=True)
        trained = {"decoder": 1.0, "encoder": 2.0 if "full" in arguments else 0.5}
        (model / "task.json").write_text(json.dumps({"trainable_millions": trained, "validation": {"best": 0.5}}))
        (model / "arguments.json").write_text(json.dumps(arguments))

    def evaluate(self, run):
        arguments = json.loads((run / "model" / "arguments.json").read_text())
        bonus = 0.1 if "full" in arguments else 0.0
        rows = [
            {c: 0.0 for c in CASE_COLUMNS}
            | {"patient_id": f"p{i}", "series_id": f"s{i}", "label_id": 1, "class": "x", "dice": 0.3 + 0.05 * i + bonus}
            | {"true_voxels": 1, "predicted_voxels": 1}
            for i in range(12)
        ]
        evaluation = Evaluation(part="test", rows=rows, tolerance_mm=2.0)
        write_evaluation(evaluation, run / "evaluation" / "test", provenance={})


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zarr").mkdir()
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(GRID))
    return file


def plan(study):
    return plan_study(study, root=Path("studies"))


def test_expand__product_has_no_duplicate_or_skipped_cells():
    grid = expand(config(), stores=STORES)
    assert len(grid.cells) == 4
    same = [{"name": "base", "ckpt": {"vit_t": "base.pth"}}, {"name": "again", "ckpt": {"vit_t": "base.pth"}}]
    grid = expand(config(initialisations=same, skip=[{"method": "full", "seed": "1"}]), stores=STORES)
    assert (len(grid.cells), grid.num_duplicates, grid.num_skipped) == (3, 3, 2)
    with pytest.raises(UsageError, match="at least one cell"):
        expand(config(skip=[{"architecture": "vit_t"}]), stores=STORES)
    with pytest.raises(UsageError, match="weights for every architecture, vit_b is missing"):
        expand(config(architectures=["vit_b"]), stores=STORES)


def test_cell__key_depends_on_the_settings_of_its_commands():
    first, *_, last = cells(shots=[0, 5], shot_unit="slices", settings=["trainer.max_steps=3"],
                            method_settings={"full": ["optim.lr=1e-4"]})  # fmt: skip
    assert first.key == cells(settings=["trainer.max_steps=3"])[0].key
    assert first.key != cells(settings=["trainer.max_steps=4"])[0].key
    arguments = last.finetune_arguments(Path("runs"))
    assert arguments[arguments.index("--method") + 1] == "full"
    for override in ("trainer.max_steps=3", "optim.lr=1e-4", "seed=1", "adapter.scope=encoder_decoder",
                     "data.few_shot.num=5", "data.few_shot.unit=slices", "data.few_shot.repeat=1"):  # fmt: skip
        assert override in arguments
    assert not any("few_shot" in a for a in first.finetune_arguments(Path("runs")))
    assert last.evaluate_arguments(Path("runs"))[1] == f"runs/{last.key}"


def test_cell__keys_of_earlier_studies_do_not_change():
    assert [cell.key for cell in cells()] == ["b7506adc1a9a", "d9bf89b21090", "357aeed7829e", "11cae89a4128"]


def test_expand__folds_are_an_axis_that_reaches_the_run():
    found = cells(methods=["lora"], folds=[0, 1, 2], part="val")
    assert [(cell.seed, cell.fold) for cell in found] == [(s, f) for s in (0, 1) for f in (0, 1, 2)]
    assert len({cell.key for cell in found}) == 6
    assert "data.fold=2" in found[2].finetune_arguments(Path("runs"))
    assert found[2].title.endswith("seed 0, fold 2")


def test_write_results__models_without_gain_are_marked(tmp_path):
    found = cells(seeds=[0])
    cost = {"train_seconds": 60, "peak_mib": 1, "trainable_millions": 1.0}
    results = {c.key: {"dice_per_patient": {"a": 0.5}, "has_gain": c.method == "lora", **cost} for c in found}
    rows = report.write_results(config(seeds=[0]), found, results, tmp_path, failed={})
    assert [row.num_without_gain for row in rows] == [0, 1]
    assert [line.split()[-1] for line in report.table_lines(rows)[1:]] == ["-", "1"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("did not improve, by setting: full (1)") == 2


def test_write_results__next_is_the_rest_of_the_study_or_its_best_model(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMGRAFT_FRONT_END", "make study")
    first, best = cells(seeds=[0])
    cost = {"train_seconds": 60, "peak_mib": 1, "trainable_millions": 1.0}
    results = {
        first.key: {"dice_per_patient": {"a": 0.9, "b": 0.9}, "validation_dice": 0.5, **cost},
        best.key: {"dice_per_patient": {"a": 0.6, "b": 0.7}, "validation_dice": 0.7, **cost},
    }
    folder = tmp_path / "studies" / "tiny"
    folder.mkdir(parents=True)
    report.write_results(config(seeds=[0]), [first, best], {best.key: results[best.key]}, folder, failed={})
    page = (folder / "report.html").read_text()
    assert "samgraft study tiny/study.yaml --studies ." in page
    assert "make release" not in page
    report.write_results(config(seeds=[0]), [first, best], results, folder, failed={})
    page = (folder / "report.html").read_text()
    assert f"samgraft compare tiny/runs/{best.key} tiny/runs/{first.key} --split test" in page
    assert f"make release RUN=tiny/runs/{best.key} OUT=releases/{best.key}" in page
    on_validation = [dataclasses.replace(cell, part="val") for cell in (first, best)]
    of_validation = {cell.key: result for cell, result in zip(on_validation, results.values(), strict=True)}
    [evaluate, _] = report.next_commands(on_validation, of_validation, "studies/tiny")
    assert evaluate == f"make evaluate RUN=studies/tiny/runs/{on_validation[1].key} SPLIT=test"
    [predict, _] = report.next_commands([best], results, "studies/tiny")
    assert predict == f"make predict RUN=studies/tiny/runs/{best.key} DATA=SCANS OUT=masks"


def test_score_settings__folds_are_pooled_over_patients():
    found = cells(methods=["lora"], folds=[0, 1], part="val")
    cost = {"train_seconds": 60, "peak_mib": 1, "trainable_millions": 1.0}
    dice = {(0, 0): {"a": 0.2, "b": 0.4}, (0, 1): {"c": 0.6}, (1, 0): {"a": 0.4, "b": 0.6}, (1, 1): {"c": 0.8}}
    results = {cell.key: {"dice_per_patient": dice[cell.seed, cell.fold], **cost} for cell in found}
    (score,) = score_settings(found, results)
    # Patients a, b, c have the means 0.3, 0.5, 0.7 over two seeds, and the seeds the means 0.4 and 0.6.
    assert score.dice.mean == pytest.approx(0.5)
    assert score.dice.num_patients == 3
    assert score.num_seeds == 2
    assert score.seed_std == pytest.approx(np.std([0.4, 0.6], ddof=1))


def test_write_results__folds_are_stated_in_the_report(tmp_path):
    settings = config(methods=["lora"], folds=[0, 1], part="val")
    report.write_results(settings, cells(methods=["lora"], folds=[0, 1], part="val"), {}, tmp_path, failed={})
    assert "Scores are pooled over 2 folds" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"folds": [0, 1]}, "part must be val with folds"),
        ({"folds": [0, 0], "part": "val"}, "folds must be different numbers"),
        ({"seeds": [0, 0]}, "seeds must have at least one value and none twice"),
        ({"shot_unit": "voxels"}, "shot_unit must be patients or slices"),
        ({"part": "train"}, "part must be val or test"),
        ({"skip": [{"colour": "red"}]}, "skip must name axes"),
        ({"method_settings": {"dora": []}}, "method_settings must be for methods"),
        ({"data_sets": [{"name": "a"}]}, "exactly one of store and synthetic_patients"),
        ({"sedes": [1]}, "Did you mean 'seeds'"),
    ],
)
def test_study_config__contradictory_values_are_refused(values, match):
    with pytest.raises(UsageError, match=match):
        config(**values)


def test_run_study__every_cell_runs_once_and_is_in_table_and_report(study, caplog):
    caplog.set_level(logging.INFO)
    samgraft = FakeSamgraft()
    report = run_study(plan(study), num_parallel=2, run=samgraft)
    assert len(samgraft.calls) == 8
    with (report.parent / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["dice"], r["patients"], r["seeds"]) for r in rows] == [
        ("lora", "0.5750", "12", "2"), ("full", "0.6750", "12", "2"),
    ]  # fmt: skip
    assert float(rows[0]["low"]) < 0.575 < float(rows[0]["high"])
    assert (rows[0]["train min"], rows[0]["peak GiB"], rows[1]["trainable M"]) == ("1.0000", "2.0000", "3.0000")
    assert "0.575 (0." in caplog.text
    compared, released = (re.search(pattern, caplog.text)[1] for pattern in (r"samgraft compare (.*)", r"RUN=(\S+)"))
    runs = [word for word in compared.split() if "/runs/" in word]
    assert released == runs[0] != runs[1]
    assert all((report.parent / "cells" / f"{Path(run).name}.json").is_file() for run in runs)
    assert compared.endswith("--split test")
    page = report.read_text()
    assert page.count("data:image/png") == 2
    assert "4 of 4 complete" in page
    run_study(plan(study), run=samgraft)
    assert len(samgraft.calls) == 8, "complete cells ran again"


def test_table_csv__formula_in_a_name_is_quoted(study):
    """A spreadsheet would run the name of a variant as a formula."""
    variants = [{"name": "=1+1"}, {"name": "plain", "settings": ["seed=7"]}]
    study.write_text(yaml.safe_dump(GRID | {"variants": variants, "methods": ["lora"], "seeds": [0]}))
    report = run_study(plan(study), run=FakeSamgraft())
    with (report.parent / "table.csv").open() as file:
        assert {row["variant"] for row in csv.DictReader(file)} == {"'=1+1", "plain"}


def test_run_study__few_shots_give_a_picture_per_data_set(study):
    study.write_text(yaml.safe_dump(GRID | {"shots": [2, 0], "seeds": [0]}))
    page = run_study(plan(study), run=FakeSamgraft()).read_text()
    assert page.count("data:image/png") == 3
    assert "The right-most point uses all training data." in page


def test_write_results__constant_columns_are_left_out_and_shots_are_marked(study, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "curve_figure", lambda curves, **values: drawn.update(values) or b"")
    study.write_text(yaml.safe_dump(GRID | {"shots": [5, 0, 2], "seeds": [0]}))
    page = run_study(plan(study), run=FakeSamgraft()).read_text()
    assert drawn["ticks"] == {2.0: "2", 5.0: "5", 10.0: "all"}
    assert drawn["xlabel"] == "training patients"
    headings = re.findall(r"<th[^>]*>(?:<button[^>]*>)?([^<]+)", page)
    assert {"method", "shots", "dice", "low", "high"} <= set(headings)
    assert not {"data set", "initialisation", "architecture", "scope", "variant", "seed std"} & set(headings)


def test_run_study__parallel_2_runs_two_cells_at_a_time(study):
    """The barrier opens for two cells, and a third one would be counted."""
    barrier, inside, most, fake = threading.Barrier(2, timeout=20), [], [], FakeSamgraft()

    def run(arguments, log_file, num_threads, processes):
        inside.append(1)
        most.append(len(inside))
        barrier.wait()
        inside.pop()
        return fake(arguments, log_file, num_threads, processes)

    run_study(plan(study), num_parallel=2, run=run)
    assert max(most) == 2


def test_run_study__failed_cell_does_not_stop_the_others_and_is_run_again(study):
    with pytest.raises(StudyIncomplete, match=r"1 of 4 cells failed, the first one with: error: no such thing\."):
        run_study(plan(study), run=FakeSamgraft(codes=[4]))
    page = (Path("studies/s") / "report.html").read_text()
    assert "3 of 4 cells are complete" in page
    assert "no such thing. See x.log" in page  # the report travels
    again = FakeSamgraft()
    run_study(plan(study), run=again)
    assert [a[0] for a in again.calls] == ["finetune", "evaluate"]


def test_run_study__stopped_cells_are_resumed(study):
    with pytest.raises(StoppedAndSaved, match="stopped with 1 of 4 cells complete"):
        run_study(plan(study), run=FakeSamgraft(codes=[0, 0, 75, 75, 75]))
    again = FakeSamgraft()
    run_study(plan(study), run=again)
    assert len(again.calls) == 6
    cost = json.loads(next(Path("studies/s/cells").glob("*.cost.json")).read_text())
    assert cost["seconds"] in (60.0, 120.0)


def test_run_cell__damaged_result_is_repeated_and_a_locked_cell_is_busy(tmp_path):
    [cell, *_] = cells()
    folder = CellFolder(root=tmp_path)
    assert run_cell(cell, folder, run=FakeSamgraft()).status == "done"
    folder.file(cell.key, ".json").write_text("{")
    (tmp_path / "runs" / cell.key / "model" / "task.json").unlink()
    again = FakeSamgraft()
    again.finetune = lambda runs, arguments: (runs / cell.key / "model" / "task.json").write_text(
        json.dumps({"trainable_millions": {}, "validation": {}})
    )
    assert run_cell(cell, folder, run=again).status == "done"

    def while_running(arguments, *_):
        busy.append(run_cell(cell, folder, run=FakeSamgraft()).status)
        return 75, 1.0, 1.0

    busy = []
    folder.file(cell.key, ".json").unlink()
    assert run_cell(cell, folder, run=while_running).status == "stopped"
    assert busy == ["busy"]


def test_plan_study__missing_store_or_bad_name_is_refused(study):
    Path("a.zarr").rmdir()
    with pytest.raises(DataError, match="store of a data set must exist"):
        plan(study)
    study.write_text(yaml.safe_dump(GRID | {"name": "../x"}))
    with pytest.raises(UsageError, match="plain folder name"):
        plan(study)
    with pytest.raises(UsageError, match="--parallel must be at least 1"):
        run_locally([], CellFolder(root=Path("x")), num_parallel=0, on_end=lambda *_: None)


def test_run_on_slurm__cells_run_as_jobs_of_submitit(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(schedule, "run_cell", lambda cell, folder, **_: run_cell(cell, folder, run=FakeSamgraft()))
    found = cells()
    ended = []
    outcomes = run_on_slurm(found, CellFolder(root=tmp_path), num_parallel=2, parameters={"timeout_min": 5},
                            on_end=lambda outcome, *_: ended.append(outcome.key), cluster="debug")  # fmt: skip
    assert [o.status for o in outcomes] == ["done"] * 4
    assert sorted(ended) == sorted(c.key for c in found)


def test_read_slurm_options__values_have_yaml_types():
    assert read_slurm_options(["timeout_min=240", "slurm_partition=gpu"]) == {
        "timeout_min": 240,
        "slurm_partition": "gpu",
    }
    with pytest.raises(UsageError, match="must look like key=value"):
        read_slurm_options(["gpu"])


def test_processes__stop_sends_a_signal_to_every_child(monkeypatch):
    sent = []
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append(pid))
    processes = Processes(running={4, 5})
    processes.stop()
    assert processes.stopping
    assert sorted(sent) == [4, 5]


def test_rank_table__ranks_and_critical_difference_worked_out_by_hand():
    names = [("base", "vit_t", "decoder", method, "automatic") for method in "abcd"]
    table = np.tile([0.9, 0.8, 0.7, 0.7], (10, 1))
    ranking = rank_table(table, names)
    assert list(ranking.mean_ranks.values()) == [1.0, 2.0, 3.5, 3.5]
    # Demsar 2006, table 5: q_0.05 for 4 classifiers is 2.569.
    assert ranking.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 10)), abs=1e-3)
    assert ranking.p_value < 1e-5
    assert [[name[3] for name in group] for group in group_similar_settings(ranking)] == [["a", "b"], ["c", "d"]]
    assert rank_table(table[:3], names).p_value is None
    assert rank_figure(ranking).startswith(b"\x89PNG")


def test_score_settings__seeds_are_averaged_within_patients_first():
    found = cells()
    lora = [c for c in found if c.method == "lora"]
    common = {"train_seconds": 60.0, "peak_mib": 1024.0, "trainable_millions": 1.5}
    results = {
        lora[0].key: {"dice_per_patient": {"p": 0.2, "q": 0.4}} | common,
        lora[1].key: {"dice_per_patient": {"p": 0.6, "q": 0.4}} | common,
    }
    [row] = score_settings(found, results)
    assert row.dice.mean == pytest.approx(0.4)
    assert row.dice.num_patients == 2
    assert row.seed_std == pytest.approx(np.std([0.3, 0.5], ddof=1))
    assert rank_settings(found, results) is None, "one setting alone must have no rank"
    full = [c for c in found if c.method == "full"]
    results[full[0].key] = {"dice_per_patient": {"p": 0.5}} | common
    ranking = rank_settings(found, results)
    assert ranking.num_patients == 1, "q has no score with full and must not count"
    assert sorted(ranking.mean_ranks.values()) == [1.0, 2.0]
    assert short_names([c.setting for c in found]) == {lora[0].setting: "lora", full[0].setting: "full"}


def test_score_settings__costs_are_the_mean_time_and_the_largest_memory():
    first, second = [c for c in cells() if c.method == "lora"][:2]
    values = {"dice_per_patient": {"p": 0.5}, "trainable_millions": 1.5}
    results = {
        first.key: values | {"train_seconds": 60.0, "peak_mib": 3072.0},
        second.key: values | {"train_seconds": 180.0, "peak_mib": 1024.0},
    }
    [row] = score_settings([first, second], results)
    assert (row.train_minutes, row.peak_gib) == (2.0, 3.0)


def test_rank_settings__numbers_of_shots_are_blocks_of_their_own():
    lora, full = (next(c for c in cells() if c.method == method) for method in ("lora", "full"))
    found = [dataclasses.replace(c, shots=shots) for c in (lora, full) for shots in (3, 5)]
    dice = [0.9, 0.1, 0.5, 0.5]  # lora with 3 and 5 shots, full with 3 and 5 shots
    results = {c.key: {"dice_per_patient": {"p": value}} for c, value in zip(found, dice, strict=True)}
    ranking = rank_settings(found, results)
    assert ranking.num_patients == 2
    assert list(ranking.mean_ranks.values()) == [1.5, 1.5]
