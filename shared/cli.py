"""The ``samgraft`` command line.

Commands are found through entry points. Refusals are printed on one screen, and the exit code states their kind.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

from samgraft.shared.errors import FULL_DISK, ExitCode, SamgraftError, StoppedAndSaved, StorageError, UsageError
from samgraft.shared.invocation import for_terminal, typed_argument
from samgraft.shared.machine import configure_openmp

# With these variables MONAI and torch would load pickles again, which can execute code.
UNSAFE_ENVIRONMENT = ("MONAI_ALLOW_PICKLE", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand.

    Modules that define one import nothing heavy at the top, so that ``--help`` is quick.
    """

    help: str
    """One line for ``samgraft --help``."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Function that runs the command and returns an exit code or raises ``SamgraftError``."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}.", next_command=f"{self.prog} --help")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # An unset variable of a script leaves an empty word. Taken as not given, the default would be used silently,
        # and an empty path is the current folder.
        if (
            "" in arg_strings and action.nargs != argparse.PARSER
        ):  # the words of `store build` have a parser of their own
            positionals = [one for one in self._actions if not one.option_strings]
            place = positionals.index(action) if action in positionals else None
            option = max(action.option_strings, key=len, default=str(action.metavar or action.dest))
            name = typed_argument(option, place=place)
            raise UsageError(f"{name} has an empty value. Write one, or leave it out if it has a default.")
        return super()._get_values(action, arg_strings)


def keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return parsed options as the keyword arguments of the function behind the command."""
    return {name: value for name, value in vars(arguments).items() if name != "debug"}


def local_path(text: str) -> Path:
    """Parse an argument that must be a path on this machine.

    An address such as ``s3://...`` would otherwise become a path that does not exist.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"must be on this machine, got the address {text}: copy it here first")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    A traceback is shown with ``--debug`` only.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    _configure_logging(debug=debug)
    for name in UNSAFE_ENVIRONMENT:
        if os.environ.pop(name, None) is not None:
            logging.getLogger(__name__).warning(
                "%s is set in the environment and ignored, because it would allow pickles.", name
            )
    if limited := configure_openmp():
        logging.getLogger(__name__).info("%s", limited)
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # argparse --help
        return int(stop.code or 0)
    except SamgraftError as error:
        if debug and not isinstance(error, StoppedAndSaved):
            traceback.print_exc()
        _print_error(error.render())
        return int(error.exit_code)
    except KeyboardInterrupt:
        _print_error("interrupted: nothing further was written.")
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return int(ExitCode.OK)
    except Exception as error:
        if debug:
            traceback.print_exc()
        storage = _as_storage_error(error)
        _print_error(storage.render() if storage else _internal(error))
        return int(storage.exit_code if storage else ExitCode.INTERNAL)


def _dispatch(arguments: list[str]) -> int:
    found = {point.name: point for point in entry_points(group="samgraft.commands")}
    if not arguments or arguments[0] in {"-h", "--help"}:
        sys.stdout.write(_overview(found))
        return int(ExitCode.OK if arguments else ExitCode.USAGE)
    if arguments[0] == "--version":
        sys.stdout.write(f"samgraft {version('samgraft')}\n")
        return int(ExitCode.OK)
    name = arguments[0]
    if name not in found:
        close = difflib.get_close_matches(name, list(found), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(
            f"unknown command {name!r}.{hint} Known: {', '.join(sorted(found))}.", next_command="samgraft --help"
        )
    command: Command = found[name].load()
    parser = _Parser(prog=f"samgraft {name}", description=command.help, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.add_arguments(parser)
    return command.run(_parse(parser, arguments[1:]))


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse options and settings in any order, so that settings can be added at the end of a command."""
    try:
        return parser.parse_intermixed_args(words)
    except TypeError:  # argparse cannot mix them for a command with actions of its own (store build, ...)
        return parser.parse_args(words)


def _overview(found: dict[str, EntryPoint]) -> str:
    width = max((len(name) for name in found), default=0)
    lines = ["usage: samgraft COMMAND ...", "", "commands:"]
    lines += [f"  {name:<{width}}  {found[name].load().help}" for name in sorted(found)]
    lines += ["", "samgraft COMMAND --help describes one command; `make help` lists the make targets."]
    return "\n".join(lines) + "\n"


class _TypedGrammar(logging.Formatter):
    """Formatter that shows commands and options as the user typed them."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def _configure_logging(*, debug: bool) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_TypedGrammar("%(message)s"))
    logging.getLogger("samgraft").setLevel(logging.DEBUG if debug else logging.INFO)
    # Lightning prints device tables and promotional tips; torch.distributed repeats itself.
    # highdicom logs study and series UIDs.
    for noisy in (
        "highdicom",
        "pytorch_lightning",
        "lightning_fabric",
        "lightning.pytorch",
        "torch.distributed",
        "matplotlib",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _print_error(text: str) -> None:
    sys.stderr.write(for_terminal(text) + "\n")
    sys.stderr.flush()


def _as_storage_error(error: Exception) -> StorageError | None:
    """Return a full disk or a missing permission as a refusal, and None for any other error."""
    if not isinstance(error, OSError):
        return None
    name = Path(str(error.filename)).name if error.filename else None
    kept = "everything that was complete"
    if error.errno in FULL_DISK:
        return StorageError(
            "the disk is full.", where=name, kept=kept, next_command="free space, then the same command"
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return StorageError("no permission to read or write.", where=name, kept=kept)
    return None


def _internal(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else ""
    return (
        f"error: internal error, please report it: {type(error).__name__}: {first}\n"
        "  kept   inputs and every verified training state\n"
        "  next   the same command with --debug shows the traceback"
    )
