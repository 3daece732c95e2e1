"""Report of a stage-1 run, its conclusions, its sections and the warnings during training."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from samgraft.shared.report.page import Picture, Table, Text
from samgraft.shared.runs.metrics import curves_of
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.store.store import SliceStore
from samgraft.ssl.monitor import monitor as monitor_module
from samgraft.ssl.monitor.held_out import load_held_out
from samgraft.ssl.monitor.labelled import LabelledSlices, ProbeData
from samgraft.ssl.monitor.monitor import Monitor, MonitorData, panel_path
from samgraft.ssl.monitor.report import conclusions, feature_parts, probe_parts, training_parts
from samgraft.ssl.objectives import Panel
from tiny_pretrain import PLAIN_ONLY, config_of, make_lab, run

LOSS = [{"step": 0, "held_out/loss": 1.0}, {"step": 100, "held_out/loss": 0.5}]
NOTHING = MonitorData(held_out=None, probe=None, box_check=None, box_check_note="off")
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
            "rose to a Dice of 0.610 (0.500 before training), so a linear head segments the labelled structures better "
            "than before. This is a sign only",
            "plain",
        ),
        (
            0.51,
            "did not change by more than chance: a Dice of 0.510 (0.500 before training). In this run, a difference "
            "below 0.02 is noise",
            "plain",
        ),
        (
            0.41,
            "fell to a Dice of 0.410 (0.500 before training), so a linear head segments the labelled structures less",
            "warning",
        ),
    ],
)
def test_conclusions__linear_probe_comes_first(end, words, kind):
    remarks = conclusions(with_probe(0.5, end), PROBED)
    assert words in remarks[0].text
    assert remarks[0].kind == kind
    counted = "(lesion of labelled.zarr: fitted on 1 slice of 1 patient, scored on 1 slice of 1 patient.)"
    assert remarks[0].text.endswith(counted)
    assert "With box prompts, SAM's own decoder has a Dice of 0.700" in remarks[1].text
    assert "50 % lower than before training" in remarks[2].text
    assert len(remarks) == 3


def test_conclusions__without_held_out_patients_is_a_warning():
    assert [r.text[:28] for r in conclusions(LOSS, NOTHING)] == ["The loss on held-out slices "]
    assert conclusions([], NOTHING)[0].kind == "warning"


@pytest.mark.parametrize(("end", "kind", "words"), [(0.5, "good", "50 % lower"), (0.99, "plain", "1 to 0.99")])
def test_conclusions__loss_is_good_only_if_it_fell(end, kind, words):
    loss = conclusions([LOSS[0], {"step": 100, "held_out/loss": end}], NOTHING)[0]
    assert loss.kind == kind
    assert words in loss.text


@pytest.mark.parametrize("end", [14.13, 11.6])
def test_conclusions__loss_of_a_moving_teacher_is_never_good(end):
    rounds = [(0, 12.71), (20, end)]
    lines = [{"step": n, "held_out/loss": loss, "held_out/teacher_entropy": 0.5} for n, loss in rounds]
    (loss,) = conclusions(lines, NOTHING)
    assert loss.kind == "plain"
    assert f"from 12.71 to {end}. Its height means little, because the student is compared with a" in loss.text


def live_warnings(dices, run_path, *, max_steps):
    """Run a monitoring round every ten steps, and return the metrics log."""
    log: list[dict[str, float]] = []
    config = SimpleNamespace(trainer=SimpleNamespace(max_steps=max_steps))
    monitor = Monitor(data=NOTHING, config=config, run_path=run_path)
    for step, dice in zip(range(0, 10 * len(dices), 10), dices, strict=True):
        monitor._values = {"probe/dice": dice}
        monitor._print_warnings(SimpleNamespace(rank=0, step=step, log=SimpleNamespace(curves=lambda: curves_of(log))))
        log.append({"step": step, "probe/dice": dice})
    return log


def test_live_warnings__are_printed_once_and_not_after_the_last_step(tmp_path, caplog):
    """After the last step the conclusions of the report contain the warning."""
    log = live_warnings([0.7, 0.5, 0.5, 0.5], tmp_path, max_steps=30)
    assert [r.getMessage()[:40] for r in caplog.records] == ["step 10: The linear probe fell to a Dice of"[:40]]
    assert "fell to a Dice of 0.500" in conclusions(log, NOTHING)[0].text


def test_live_warnings__are_printed_again_when_the_condition_returns(tmp_path, caplog):
    live_warnings([0.7, 0.5, 0.7, 0.7, 0.7, 0.7, 0.7, 0.5], tmp_path, max_steps=99)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["step 10", "step 70"]


def test_measure_held_out__every_process_computes_pictures_and_the_first_writes_them(tmp_path, monkeypatch):
    """With sharded weights a forward pass of one process alone would wait for the others."""
    data = MonitorData(held_out=SimpleNamespace(), probe=None, box_check=None, box_check_note="off")
    config = SimpleNamespace(
        watch=SimpleNamespace(every_n_steps=1, log_images=True, num_panel_rows=2),
        probe=SimpleNamespace(every_n_steps=1),
        data=SimpleNamespace(batch_size=2),
        trainer=SimpleNamespace(max_steps=0),
    )
    calls = []
    panel = Panel(columns=("slice", "output"), images_KBHW=torch.zeros(2, 2, 4, 4))
    monkeypatch.setattr(monitor_module, "held_out_loss", lambda *_, **__: calls.append("loss") or {"loss": 1.0})
    monkeypatch.setattr(monitor_module, "held_out_panel", lambda *_, **__: calls.append("panel") or panel)

    def measure(rank):
        calls.clear()
        context = SimpleNamespace(
            rank=rank,
            step=0,
            module=SimpleNamespace(objective=None, device="cpu"),
            check_stop=lambda: calls.append("check"),
            add_image=lambda *_: calls.append("image"),
        )
        Monitor(data=data, config=config, run_path=tmp_path)._measure_held_out(context)
        return list(calls)

    assert measure(rank=1) == ["loss", "check", "panel"]
    assert not panel_path(tmp_path, 0).exists()
    assert measure(rank=0) == ["loss", "check", "panel", "image"]
    assert panel_path(tmp_path, 0).is_file()


def test_parts__without_metrics_are_not_measured():
    assert "no labels are given" in probe_parts([], NOTHING)[0].text
    assert feature_parts([]) == [Text(text="Not measured.")]
    assert training_parts([]) == [Text(text="Not measured.")]


def test_feature_parts__table_has_at_most_twelve_rows():
    lines = [{"step": n, "held_out/effective_rank": 8.0, "held_out/feature_std": 0.1} for n in range(40)]
    *pictures, table = feature_parts(lines)
    assert all(isinstance(part, Picture) for part in pictures)
    assert isinstance(table, Table)
    assert len(table.rows) == 12
    assert (table.rows[0][0], table.rows[-1][0]) == (0, 39)


def test_training_parts__has_loss_parts_gradient_and_waiting():
    lines = [
        {"step": n, "train/loss": 1.0, "train/sigreg": 0.1, "train/grad_norm": 2.0, "perf/data_wait_percent": 1.0}
        for n in range(1, 4)
    ]
    captions = [part.caption for part in training_parts(lines)]
    assert [text.split(" ")[0] for text in captions] == ["Parts", "Norm", "Time"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


CAPTIONS = {
    "masked_image": "Hidden pixels are grey in the second column; the encoder did not receive them.",
    "feature": "Hidden pixels are grey in the second column; the encoder did not receive them. The last two columns",
    "dino": "Features of the exported encoder along the three directions",
    "lejepa": "Features of the exported encoder along the three directions",
}


@pytest.mark.parametrize("objective", CAPTIONS)
def test_report__explains_the_pictures_and_contains_no_absolute_path(lab, objective):
    folder = run(lab, f"report-{objective}", objective, "watch.log_images=true")
    page = (folder / "report.html").read_text()
    assert CAPTIONS[objective] in page
    assert ("Hidden pixels" in page) == ("Hidden pixels" in CAPTIONS[objective])
    # Base weights and folder of runs were given as absolute paths.
    assert str(lab) not in page
    for written in (folder / "run.json", folder / "encoder" / "card.json"):
        assert str(lab) not in written.read_text()
    for event_file in (folder / "tb").rglob("*tfevents*"):
        assert str(lab).encode() not in event_file.read_bytes()
    assert (
        f"samgraft finetune --ckpt report-{objective} --base {'plain' if objective in PLAIN_ONLY else 'base'}<" in page
    )
    assert "samgraft finetune --ckpt base --name initial-weights" in page
    texts = re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert not re.findall(rf"{re.escape(str(Path(lab.anchor) / lab.parts[1]))}/\S+", texts)


def test_load_held_out__counts_the_patients_with_slices(lab):
    config, store = config_of(lab, "masked_image"), SliceStore.open(lab / "store.zarr")
    assert config.data.num_held_out_slices == 2
    assert len(store.patient_ids) == 4
    held_out = load_held_out(
        store, store.patient_ids, config=config.data, model=config.model, preset=load_preset("mri")
    )
    assert (len(held_out.refs), held_out.num_patients) == (2, 2)
