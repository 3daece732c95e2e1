"""Messages name the command that the user typed, in a form that can be pasted."""

import logging
import shlex
import sys
from importlib.metadata import entry_points

import pytest
import samgraft.api as sg
from samgraft.shared import invocation
from samgraft.shared.cli import main
from samgraft.shared.errors import UsageError
from samgraft.shared.invocation import for_terminal, in_typed_grammar

MESSAGES = {
    "make finetune CKPT=runs/a": "samgraft finetune --ckpt runs/a",
    "next: make pretrain MODALITY=mri": "next: samgraft pretrain --modality mri",
    "make evaluate RUN='runs/my run' SPLIT=test": "samgraft evaluate 'runs/my run' --split test",
    "make release RUN=runs/a OUT=releases/a LICENSE=...": "samgraft release runs/a --out releases/a --license ...",
    "make pretrain DATA=a.zarr ARGS='optim.lr=1e-4 seed=2'": "samgraft pretrain --data a.zarr optim.lr=1e-4 seed=2",
    "Run make pretrain MODALITY=mri, or give BASE=sam_vit_b.": "Run samgraft pretrain --modality mri, or give --base "
    "sam_vit_b.",
    "make store DATA=scans OUT=x.zarr": "samgraft store build scans --out x.zarr",
    "Choose another NAME= for a run on other data.": "Choose another --name for a run on other data.",
    "Use the earlier values, or choose another NAME=.": "Use the earlier values, or choose another --name.",
    "another NAME=... to start": "another --name ... to start",
    "Use MODALITY=ct.": "Use --modality ct.",
    "CKPT and BASE are both missing.": "--ckpt and --base are both missing.",
    "Pass CKPT=FILE, BASE=FILE or BASE=random.": "Pass --ckpt FILE, --base FILE or --base random.",
    "MODEL=unet2d takes no prompts.": "--model unet2d takes no prompts.",
    "ARGS='probe.store=STORE.zarr' measures": "probe.store=STORE.zarr measures",
    "see make help": "see samgraft --help",
    "`make install` downloads it": "`make install` downloads it",
    "CKPT=./a.pth": "--ckpt ./a.pth",
    "samgraft store check data/a.zarr": "samgraft store check data/a.zarr",
    "data.split=FILE": "data.split=FILE",
    "a label named BASELINE": "a label named BASELINE",
}


@pytest.mark.parametrize(("written", "shown"), MESSAGES.items())
def test_in_typed_grammar__message_is_shown_as_typed(written, shown, monkeypatch):
    assert in_typed_grammar(written) == shown
    monkeypatch.setenv(invocation.FRONT_END, "make")
    assert in_typed_grammar(written) == written


def test_for_terminal__program_outside_path_is_named_by_its_path(monkeypatch):
    text = "samgraft store check data/a.zarr, and samgraft reads it"
    monkeypatch.setattr(sys, "argv", [".venv/bin/samgraft"])
    monkeypatch.setattr(invocation.shutil, "which", lambda _: None)
    assert for_terminal(text) == ".venv/bin/samgraft store check data/a.zarr, and samgraft reads it"
    monkeypatch.setattr(invocation.shutil, "which", lambda _: ".venv/bin/samgraft")
    assert for_terminal(text) == text


@pytest.mark.parametrize("command", [point.name for point in entry_points(group="samgraft.commands")])
def test_for_terminal__every_command_is_named_by_the_path_of_the_program(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["env/bin/samgraft"])
    monkeypatch.setattr(invocation.shutil, "which", lambda _: None)
    assert for_terminal(f"next     samgraft {command} runs/a") == f"next     env/bin/samgraft {command} runs/a"


def test_for_terminal__target_of_make_becomes_a_command_with_the_path_of_the_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["env/bin/samgraft"])
    monkeypatch.setattr(invocation.shutil, "which", lambda _: None)
    assert for_terminal("next     make finetune CKPT=runs/a") == "next     env/bin/samgraft finetune --ckpt runs/a"


@pytest.mark.parametrize("front_end", ["make", ""])
def test_main__error_and_log_lines_are_in_the_typed_grammar(front_end, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(invocation.FRONT_END, front_end)
    assert main(["finetune"]) == 2
    shown = capsys.readouterr().err
    expected = "CKPT and BASE are both missing" if front_end else "--ckpt and --base are both missing"
    assert expected in shown
    logging.getLogger("samgraft.test").info("make finetune CKPT=%s", shlex.quote("runs/a b"))
    line = capsys.readouterr().err
    assert line == ("make finetune CKPT='runs/a b'\n" if front_end else "samgraft finetune --ckpt 'runs/a b'\n")


def test_call__error_names_arguments_and_not_variables_of_make(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for front_end in ("", "make finetune"):
        monkeypatch.setenv(invocation.FRONT_END, front_end)
        with pytest.raises(UsageError, match=r"^ckpt and base are both missing") as refusal:
            sg.finetune()
        assert "base=sam_vit_b" in refusal.value.render()
        assert "CKPT" not in refusal.value.render()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("choose another NAME=.", "choose another name=."),
        ("Give it as DATA=STORE.zarr.", "Give it as data=STORE.zarr."),
        ("else give --patient-pattern", "else give patient_pattern"),
        ("the same with ARGS='a.b=1'", "the same with a.b=1"),
        ("make evaluate RUN=runs/a SPLIT=val", "samgraft evaluate runs/a --split val"),
    ],
)
def test_in_typed_grammar__in_a_call_names_arguments(text, expected):
    with invocation.called_from_python():
        assert invocation.in_typed_grammar(text) == expected


def test_repeat_command__is_the_one_of_the_user(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/samgraft", "pretrain", "--data", "my scans"])
    assert invocation.repeat_command() == ".venv/bin/samgraft pretrain --data 'my scans'"
    replay = invocation.repeat_command("a.b=1")
    assert replay == ".venv/bin/samgraft pretrain --data 'my scans' a.b=1"
    monkeypatch.setattr(sys, "argv", shlex.split(replay))
    assert invocation.repeat_command("a.b=1") == replay
    monkeypatch.setenv(invocation.FRONT_END, "make pretrain")
    monkeypatch.setenv(invocation.GIVEN, "ARGS DATA")
    monkeypatch.setenv("DATA", "my scans")
    monkeypatch.setenv("ARGS", "seed=1 a='b c'")
    assert invocation.repeat_command() == "make pretrain ARGS='seed=1 a='\"'\"'b c'\"'\"'' DATA='my scans'"
    monkeypatch.setenv("ARGS", "seed=1")
    assert invocation.repeat_command("a.b=1") == "make pretrain ARGS='seed=1 a.b=1' DATA='my scans'"


def test_demo__runs_its_commands_and_stops_at_the_first_that_fails(monkeypatch, caplog):
    from samgraft.shared.commands import demo

    calls, codes = [], iter([0, 0, 3])
    monkeypatch.setattr(demo, "main", lambda step: calls.append(step) or next(codes))
    with caplog.at_level("INFO"):
        assert main(["demo", "--dry-run"]) == 0
        assert calls == []
        assert main(["demo"]) == 3
    assert calls == list(demo.STEPS[:3])


def test_study__shipped_study_is_found_by_its_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "demo", "--dry-run"]) == 0
    assert "study demo: " in capsys.readouterr().err
    assert main(["study", "dmo", "--dry-run"]) == 2
    assert "study must be one of demo, paper, got 'dmo'. Did you mean" in capsys.readouterr().err
