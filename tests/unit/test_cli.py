"""The command line: exit codes, one-screen errors, hints; no traceback without --debug."""

import argparse
import logging

import pytest
from samgraft.shared import cli
from samgraft.shared.errors import DataError, ExitCode, StoppedAndSaved, StorageError, UsageError, WeightsError


class _Point:
    def __init__(self, name: str, run) -> None:
        self.name = name
        self._command = cli.Command(help="a test command", add_arguments=self._add, run=run)

    @staticmethod
    def _add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--flag")

    def load(self) -> cli.Command:
        return self._command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    def install(run) -> None:
        monkeypatch.setattr(cli, "entry_points", lambda group: [_Point("train", run)])

    return install


def _raise(error: BaseException):
    def run(_args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (DataError("x"), 3),
        (WeightsError("x"), 4),
        (StorageError("x"), 5),
        (RuntimeError("boom"), 7),
        (StoppedAndSaved("x"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 5),
        (PermissionError(13, "denied", "a.txt"), 5),
    ],
)
def test_main__exit_codes(command, capsys: pytest.CaptureFixture[str], error: BaseException, code: int) -> None:
    command(_raise(error))
    assert cli.main(["train"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_main__an_error_is_one_screen(command, capsys: pytest.CaptureFixture[str]) -> None:
    command(_raise(DataError("store must be complete.", where="a.zarr", kept="sources", next_command="samgraft store")))
    cli.main(["train"])
    expected = "error: store must be complete.\n  where  a.zarr\n  kept   sources\n  next   samgraft store\n"
    assert capsys.readouterr().err == expected


def test_main__debug_shows_the_traceback(command, capsys: pytest.CaptureFixture[str]) -> None:
    command(_raise(RuntimeError("boom")))
    assert cli.main(["train", "--debug"]) == ExitCode.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_main__disk_full_says_so(command, capsys: pytest.CaptureFixture[str]) -> None:
    command(_raise(OSError(28, "No space left on device")))
    cli.main(["train"])
    assert "the disk is full" in capsys.readouterr().err


def test_main__unknown_command_is_hinted(command, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _args: 0)
    assert cli.main(["trian"]) == ExitCode.USAGE
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train", "--flga", "1"], ["train", "--fl", "1"]])
def test_main__unknown_or_abbreviated_option_is_usage(command, arguments: list[str]) -> None:
    command(lambda _args: 0)
    assert cli.main(arguments) == ExitCode.USAGE


@pytest.mark.parametrize(
    "words", [["a=1", "--name", "x", "b=2"], ["--name", "x", "a=1", "b=2"], ["a=1", "b=2", "--name", "x"]]
)
def test_main__settings_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    from samgraft.ssl import command as pretraining

    seen: list[dict[str, object]] = []
    monkeypatch.setattr(pretraining, "pretrain", lambda **options: seen.append(options))
    assert cli.main(["pretrain", *words]) == 0
    assert (seen[0]["name"], seen[0]["settings"]) == ("x", ["a=1", "b=2"])


def test_main__drops_variables_that_allow_pickles(
    command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import os

    seen: list[str | None] = []
    monkeypatch.setenv("MONAI_ALLOW_PICKLE", "1")
    command(lambda _args: seen.append(os.environ.get("MONAI_ALLOW_PICKLE")) or 0)
    monkeypatch.setattr(cli, "_configure_logging", lambda debug: None)
    with caplog.at_level(logging.WARNING):
        assert cli.main(["train"]) == 0
    assert seen == [None]
    assert "MONAI_ALLOW_PICKLE is set" in caplog.text


def test_main__a_container_that_grants_fewer_cores_gets_fewer_threads(
    command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import os

    seen: list[str | None] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "to be put back")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("samgraft.shared.machine.granted_cores", lambda _groups=None: 1)
    monkeypatch.setattr("samgraft.shared.machine._pinned_cores", lambda: 64)
    command(lambda _args: seen.append(os.environ.get("OMP_NUM_THREADS")) or 0)
    monkeypatch.setattr(cli, "_configure_logging", lambda debug: None)
    with caplog.at_level(logging.INFO):
        assert cli.main(["train"]) == 0
    assert seen == ["1"]
    assert "1 of 64 visible cores" in caplog.text


def test_main__without_command_lists_them_and_fails(command, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _args: 0)
    assert cli.main([]) == ExitCode.USAGE
    assert "a test command" in capsys.readouterr().out
