"""Pages under ``docs/commands``, written from the commands' own parsers."""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points
from typing import Any

from samgraft.shared.cli import Command

NOTE = "<!-- Written by `make docs` from the command's own parser; edit the help texts there. -->"


def command_pages() -> dict[str, str]:
    """Return the Markdown of one page per command and of an index, by file name."""
    commands: dict[str, Command] = {
        point.name: point.load() for point in sorted(entry_points(group="samgraft.commands"), key=lambda p: p.name)
    }
    pages = {f"{name}.md": _page(name, command) for name, command in commands.items()}
    rows = [f"| [`samgraft {name}`]({name}.md) | {_cell(command.help)} |" for name, command in commands.items()]
    end = "Every command ends with one of the [exit codes](../reference/exit_codes.md)."
    index = [NOTE, "", "# Commands", "", "| command | does |", "|---|---|", *rows, "", end, ""]
    pages["README.md"] = "\n".join(index)
    return pages


def _page(name: str, command: Command) -> str:
    parser = argparse.ArgumentParser(prog=f"samgraft {name}", add_help=False)
    command.add_arguments(parser)
    lines = [NOTE, "", f"# samgraft {name}", "", f"{_sentence(command.help)}", *_describe(parser)]
    return "\n".join([*lines, ""])


def _describe(parser: argparse.ArgumentParser) -> list[str]:
    lines: list[str] = []
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    subcommands = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    rows = [_row(action) for action in actions if not isinstance(action, argparse._SubParsersAction)]
    if rows:
        lines += ["", "| argument | what it does | default |", "|---|---|---|", *rows]
    for group in subcommands:
        summaries = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for name, child in group.choices.items():
            lines += ["", f"## {parser.prog} {name}", "", _sentence(summaries.get(name, "")), *_describe(child)]
    return lines


def _row(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        name = f"`{metavar}`"
    elif action.nargs == 0:
        name = ", ".join(f"`{option}`" for option in action.option_strings)
    else:
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else metavar
        name = ", ".join(f"`{option} {value}`" for option in action.option_strings)
    return f"| {_cell(name)} | {_cell(action.help or '')} | {_default(action)} |"


def _default(action: argparse.Action) -> str:
    if action.required and action.option_strings:
        return "required"
    default: Any = action.default
    if default in (None, False, "", [], argparse.SUPPRESS) or not action.option_strings or action.nargs == 0:
        return ""
    return f"`{default}`"


def _cell(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|")


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith(".") else f"{text}."
