"""A model that segments hardly anything or did not improve is stated everywhere, and is not released by itself."""

import dataclasses
import json

import pytest
from model_factory import tiny_plain_spec
from release_factory import finished_model
from samgraft.finetune.ending import describe_ending
from samgraft.finetune.evaluation.evaluate import Evaluation, write_evaluation
from samgraft.finetune.evaluation.evaluation_report import write_evaluation_report
from samgraft.finetune.evaluation.scores import CASE_COLUMNS
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.release.release import release_model
from samgraft.finetune.task import Task
from samgraft.finetune.training.rounds import Record
from samgraft.shared.cli import main
from samgraft.shared.errors import UsageError
from samgraft.shared.release.request import ReleaseRequest

BAD = {"zero_shot": 0.2, "start": 0.1, "best": 0.15, "best_step": 50}
EMPTY = {"zero_shot": 0.0, "start": 0.0, "best": 0.0, "best_step": 50}
LOW = {"zero_shot": None, "start": 0.039, "best": 0.043, "best_step": 50}
GOOD = {"zero_shot": 0.2, "start": 0.1, "best": 0.25, "best_step": 50}


def test_describe_ending__four_endings():
    assert describe_ending({}) is None
    for validation, is_good, text in (
        (GOOD, True, r"rose from 0.200 to 0.250 (best at step 50)"),
        (BAD, False, "did not rise: 0.150 at best, 0.200 before training"),
        (EMPTY, False, "segments nothing"),
        (LOW, False, "segments hardly anything: its foreground Dice on validation is 0.043 at best, 0.039 before"),
        (LOW | {"best": 0.1}, True, "rose from 0.039 to 0.100"),
    ):
        ending = describe_ending(validation)
        assert ending.is_good is is_good
        assert text in ending.text


def test_record__ending_is_that_of_its_task():
    record = Record(zero_shot=0.2, start=0.1, rounds={10: 0.12, 50: 0.15, 60: 0.15})
    assert record.summary() == BAD
    assert record.ending == describe_ending(BAD)
    assert not Record().ending.is_good


def evaluation(dice, *, predicted=0, notes=()):
    row = dict.fromkeys(CASE_COLUMNS, 0.0) | {"patient_id": "p", "series_id": "s", "label_id": 1, "class": "a"}
    row |= {"dice": dice, "true_voxels": 5, "predicted_voxels": predicted}
    return Evaluation(part="test", rows=[row], tolerance_mm=2.0, notes=notes)


@pytest.mark.parametrize(
    ("scored", "warnings"),
    [
        (evaluation(0.0), ["The model predicted no voxel of any class in 1 scan."]),
        (evaluation(0.0, predicted=3), ["The model found no voxel of any class where it is in 1 scan."]),
        (evaluation(0.04, predicted=3), ["The model segments hardly anything in 1 scan."]),
        (evaluation(0.5, predicted=3, notes=("It ended badly.",)), ["It ended badly."]),
        (evaluation(0.5, predicted=3), []),
    ],
)
def test_evaluation__failure_is_the_first_line_and_nothing_is_green(scored, warnings, tmp_path):
    assert scored.warnings == warnings
    write_evaluation(scored, tmp_path, provenance={})
    assert json.loads((tmp_path / "summary.json").read_text()).get("warnings", []) == warnings
    page = write_evaluation_report(
        scored, tmp_path, title="m", provenance={}, next_commands=["make predict RUN=m"]
    ).read_text()
    body = page[page.index("<body") :]
    assert "<pre>samgraft predict m</pre>" in body[body.rindex("<h2") :]
    assert ('class="good"' in body) is (not warnings)
    if warnings:
        assert body.index(warnings[0]) < body.index("Dice ")


def test_release__model_without_gain_needs_force(tmp_path, monkeypatch):
    run = finished_model(tmp_path, tiny_plain_spec(depth=2, image_size=96), image_size=96)
    task = read_model(run).task
    assert task.warning is None
    dataclasses.replace(task, validation=BAD).write(run / "model")
    request = ReleaseRequest(run=run, out=tmp_path / "out", licence="cc-by-4.0")
    with pytest.raises(UsageError, match=r"did not rise.*--force releases it"):
        release_model(request)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("samgraft.finetune.release.release.build_release", lambda *_: [])
    assert release_model(dataclasses.replace(request, force=True)).checked == []


def test_release__force_reaches_the_request(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "samgraft.shared.commands.release._releaser",
        lambda _: lambda request: seen.append(request.force) or type("R", (), {"checked": [], "left_out": []})(),
    )
    words = ["release", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert main([*words, "--force"]) == 0
    assert seen == [False, True]


def test_model_card__warning_is_its_first_paragraph(tmp_path):
    from samgraft.finetune.release.model_card import _summary
    from samgraft.shared.weights.card import Card

    run = finished_model(tmp_path, tiny_plain_spec(depth=2, image_size=96), image_size=96)
    task = dataclasses.replace(Task.read(run / "model"), validation=EMPTY)
    card = Card.read(run / "model" / "card.json")
    assert _summary(card, task).startswith("**Warning.** The model segments nothing")
    assert "Warning" not in _summary(card, dataclasses.replace(task, validation=GOOD))
