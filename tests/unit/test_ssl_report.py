"""What a stage-1 report says first, and that its parts say where their numbers come from."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from samgraft.shared.report.page import Picture, Table, Text
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.store.store import SliceStore
from samgraft.ssl.monitor import monitor as watch_module
from samgraft.ssl.monitor.held_out import load_held_out
from samgraft.ssl.monitor.labelled import LabelledSlices, ProbeData
from samgraft.ssl.monitor.monitor import Watch, Watched, panel_path
from samgraft.ssl.monitor.report import verdict
from samgraft.ssl.monitor.report_curves import engine_parts, feature_parts, probe_parts
from samgraft.ssl.objectives import Panel
from tiny_pretrain import config_of, make_lab, run

LOSS = [{"step": 0, "held_out/loss": 1.0}, {"step": 100, "held_out/loss": 0.5}]
NOTHING = Watched(held_out=None, probe=None, gauge=None, gauge_note="off")
ONE_SLICE = LabelledSlices(images_N1SS=torch.zeros(1, 1, 8, 8), labels=(None,), frames=(None,), patient_ids=("p0",))
PROBED = dataclasses.replace(
    NOTHING,
    probe=ProbeData(
        train=ONE_SLICE, test=ONE_SLICE, class_ids=(1,), class_names=("lesion",), store_name="labelled.zarr"
    ),
)


def with_probe(start, end, *, drift=(0.8, 0.7)):
    first, last = LOSS
    return [
        {**first, "probe/dice": start, "drift/box_dice": drift[0]},
        {**last, "probe/dice": end, "drift/box_dice": drift[1]},
    ]


@pytest.mark.parametrize(
    ("end", "words", "kind"),
    [
        (
            0.61,
            "rose to a Dice of 0.610, 0.500 at the start: a linear head reads the labelled structures better than "
            "before. A sign, not a verdict",
            "plain",
        ),
        (0.51, "is where it was: a Dice of 0.510, 0.500 at the start. A difference below 0.02 is noise", "plain"),
        (
            0.41,
            "fell to a Dice of 0.410, 0.500 at the start: a linear head reads the labelled structures less",
            "warning",
        ),
    ],
)
def test_verdict__the_probe_comes_first(end, words, kind):
    remarks = verdict(with_probe(0.5, end), PROBED)
    assert words in remarks[0].text
    assert remarks[0].kind == kind
    counted = "(lesion of labelled.zarr: fitted on 1 slices of 1 patient, scored on 1 slices of 1 patient.)"
    assert remarks[0].text.endswith(counted)
    assert "SAM's own decoder, asked with boxes, scores a Dice of 0.700" in remarks[1].text
    assert "50 % lower than at the start" in remarks[2].text
    assert len(remarks) == 3  # each thing is said once


def test_verdict__without_a_probe_the_loss_and_without_held_out_patients_a_warning():
    assert [r.text[:28] for r in verdict(LOSS, NOTHING)] == ["The loss on held-out slices "]
    assert verdict([], NOTHING)[0].kind == "warning"


@pytest.mark.parametrize(("end", "kind", "words"), [(0.5, "good", "50 % lower"), (0.99, "plain", "1 to 0.99")])
def test_verdict__a_loss_is_good_only_where_it_fell(end, kind, words):
    loss = verdict([LOSS[0], {"step": 100, "held_out/loss": end}], NOTHING)[0]
    assert loss.kind == kind
    assert words in loss.text


@pytest.mark.parametrize("end", [14.13, 11.6])
def test_verdict__the_height_of_a_loss_against_a_moving_teacher_is_never_good(end):
    looks = [(0, 12.71), (20, end)]
    lines = [{"step": n, "held_out/loss": loss, "held_out/teacher_entropy": 0.5} for n, loss in looks]
    (loss,) = verdict(lines, NOTHING)
    assert loss.kind == "plain"
    assert f"from 12.71 to {end}. Its height means little: the student is compared with a teacher" in loss.text


def live_warnings(dices, run_path, *, max_steps):
    """Look every ten steps; return the log that the looks leave."""
    log: list[dict[str, float]] = []
    config = SimpleNamespace(trainer=SimpleNamespace(max_steps=max_steps))
    watch = Watch(watched=NOTHING, config=config, run_path=run_path)
    for step, dice in zip(range(0, 10 * len(dices), 10), dices, strict=True):
        watch._values = {"probe/dice": dice}
        watch._warn(SimpleNamespace(rank=0, step=step, log=SimpleNamespace(lines=lambda: log)))
        log.append({"step": step, "probe/dice": dice})
    return log


def test_live_warnings__once_as_long_as_they_last_and_left_to_the_verdict_at_the_end(tmp_path, caplog):
    """What the verdict says right after the last step is not said twice."""
    log = live_warnings([0.7, 0.5, 0.5, 0.5], tmp_path, max_steps=30)
    assert [r.getMessage()[:40] for r in caplog.records] == ["step 10: The frozen-feature probe fell to"[:40]]
    assert "fell to a Dice of 0.500" in verdict(log, NOTHING)[0].text


def test_live_warnings__spoken_again_when_the_trouble_came_back(tmp_path, caplog):
    live_warnings([0.7, 0.5, 0.7, 0.5], tmp_path, max_steps=99)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["step 10", "step 30"]


def test_look__every_process_makes_the_pictures_and_the_first_writes_them(tmp_path, monkeypatch):
    """With sharded weights a forward pass of one process alone waits for the others for ever."""
    watched = Watched(held_out=SimpleNamespace(), probe=None, gauge=None, gauge_note="off")
    config = SimpleNamespace(
        watch=SimpleNamespace(every_n_steps=1, log_images=True, num_panel_rows=2),
        probe=SimpleNamespace(every_n_steps=1),
        data=SimpleNamespace(batch_size=2),
        trainer=SimpleNamespace(max_steps=0),
    )
    calls = []
    panel = Panel(columns=("slice", "output"), images_KBHW=torch.zeros(2, 2, 4, 4))
    monkeypatch.setattr(watch_module, "held_out_loss", lambda *_, **__: calls.append("loss") or {"loss": 1.0})
    monkeypatch.setattr(watch_module, "held_out_panel", lambda *_, **__: calls.append("panel") or panel)

    def look(rank):
        calls.clear()
        boundary = SimpleNamespace(
            rank=rank,
            step=0,
            module=SimpleNamespace(objective=None, device="cpu"),
            check_stop=lambda: calls.append("check"),
            add_image=lambda *_: calls.append("image"),
        )
        Watch(watched=watched, config=config, run_path=tmp_path)._look(boundary)
        return list(calls)

    assert look(rank=1) == ["loss", "check", "panel"]
    assert not panel_path(tmp_path, 0).exists()
    assert look(rank=0) == ["loss", "check", "panel", "image"]
    assert panel_path(tmp_path, 0).is_file()


def test_parts__say_what_was_not_measured():
    assert "no labelled store was named" in probe_parts([], NOTHING)[0].text
    assert feature_parts([]) == [Text(text="Not measured.")]
    assert engine_parts([]) == [Text(text="Not measured.")]


def test_feature_parts__curves_and_a_table_that_stays_short():
    lines = [{"step": n, "held_out/effective_rank": 8.0, "held_out/feature_std": 0.1} for n in range(40)]
    *pictures, table = feature_parts(lines)
    assert all(isinstance(part, Picture) for part in pictures)
    assert isinstance(table, Table)
    assert len(table.rows) == 12
    assert (table.rows[0][0], table.rows[-1][0]) == (0, 39)


def test_engine_parts__loss_parts_gradient_and_waiting():
    lines = [
        {"step": n, "train/loss": 1.0, "train/sigreg": 0.1, "train/grad_norm": 2.0, "perf/data_wait_percent": 1.0}
        for n in range(1, 4)
    ]
    captions = [part.caption for part in engine_parts(lines)]
    assert [text.split(" ")[0] for text in captions] == ["Parts", "Norm", "Time"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


IN_WORDS = {
    "masked_image": "Hidden pixels are grey in the second column; the encoder never saw them.",
    "feature": "Hidden pixels are grey in the second column; the encoder never saw them. The last columns show",
    "dino": "Features of the encoder that is handed on, along the three directions",
    "lejepa": "Features of the encoder that is handed on, along the three directions",
}


@pytest.mark.parametrize("objective", IN_WORDS)
def test_report__says_what_the_pictures_are_and_no_path_of_the_machine(lab, objective):
    folder = run(lab, f"told-{objective}", objective, "watch.log_images=true")
    page = (folder / "report.html").read_text()
    assert IN_WORDS[objective] in page
    assert ("Hidden pixels" in page) == ("Hidden pixels" in IN_WORDS[objective])
    # The base and the folder of runs were given as absolute paths.
    assert str(lab) not in page
    for written in (folder / "run.json", folder / "encoder" / "card.json"):
        assert str(lab) not in written.read_text()
    for event_file in (folder / "tb").rglob("*tfevents*"):
        assert str(lab).encode() not in event_file.read_bytes()
    assert f"make finetune CKPT=told-{objective}<" in page
    assert "make finetune CKPT=base NAME=from-the-start" in page
    texts = re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert not re.findall(rf"{re.escape(str(Path(lab.anchor) / lab.parts[1]))}/\S+", texts)


def test_held_out__counts_the_patients_whose_slices_are_looked_at(lab):
    config, store = config_of(lab, "masked_image"), SliceStore.open(lab / "store.zarr")
    assert config.data.num_held_out_slices == 2
    assert len(store.patient_ids) == 4
    held_out = load_held_out(
        store, store.patient_ids, config=config.data, model=config.model, preset=load_preset("mri")
    )
    assert (len(held_out.refs), held_out.num_patients) == (2, 2)
