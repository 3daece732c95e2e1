"""What a stage-1 report says first, and that its parts say where their numbers come from."""

from types import SimpleNamespace

import pytest
import torch
from samgraft.shared.training.report import Picture, Table, Text
from samgraft.ssl import watch as watch_module
from samgraft.ssl.objectives.objective import Panel
from samgraft.ssl.report import verdict
from samgraft.ssl.report_curves import engine_parts, feature_parts, probe_parts
from samgraft.ssl.watch import Watch, Watched, panel_path

LOSS = [{"step": 0, "held_out/loss": 1.0}, {"step": 100, "held_out/loss": 0.5}]
NOTHING = Watched(held_out=None, probe=None, gauge=None, gauge_note="off")


def with_probe(start, end, *, drift=(0.8, 0.7)):
    first, last = LOSS
    return [
        {**first, "probe/dice": start, "drift/box_dice": drift[0]},
        {**last, "probe/dice": end, "drift/box_dice": drift[1]},
    ]


@pytest.mark.parametrize(
    ("end", "words", "kind"),
    [
        (0.61, "rose to a Dice of 0.610, 0.500 at the start", "good"),
        (0.51, "is where it was: a Dice of 0.510, 0.500 at the start. A difference below 0.02 is noise", "plain"),
        (
            0.41,
            "fell to a Dice of 0.410, 0.500 at the start: a linear head reads the labelled structures less",
            "warning",
        ),
    ],
)
def test_verdict__the_probe_comes_first(end, words, kind):
    remarks = verdict(with_probe(0.5, end))
    assert words in remarks[0].text
    assert remarks[0].kind == kind
    assert "SAM's own decoder, asked with boxes, scores a Dice of 0.700" in remarks[1].text
    assert "50 % lower than at the start" in remarks[2].text
    assert len(remarks) == 3  # each thing is said once


def test_verdict__without_a_probe_the_loss_and_without_held_out_patients_a_warning():
    assert [r.text[:28] for r in verdict(LOSS)] == ["The loss on held-out slices "]
    assert verdict([])[0].kind == "warning"


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
    assert "fell to a Dice of 0.500" in verdict(log)[0].text


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
