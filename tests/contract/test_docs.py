"""Documentation says what exists: command pages, shown commands, links, pictures, and measured numbers."""

import argparse
import ast
import inspect
import re
import shutil
import subprocess
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

import pytest
import samgraft.api as sg
from doc_commands import ROOT, check_command, fake_environment, parse, shell_commands
from message_texts import texts
from PIL import Image
from write_reference import reference_pages

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GENERATED = {"commands", "reference"}
WRITTEN = [ROOT / "README.md", *(page for page in PAGES if page.parent.name not in GENERATED)]
SHOWN = [(page.name, command) for page in WRITTEN for command in shell_commands(page)]


def test_reference__is_what_the_code_says() -> None:
    on_disk = {p.relative_to(DOCS).as_posix(): p.read_text("utf-8") for p in PAGES if p.parent.name in GENERATED}
    pages = reference_pages()
    assert set(on_disk) == set(pages), "run `make docs`"
    assert [name for name, text in pages.items() if on_disk[name] != text] == [], "run `make docs`"


def test_command_pages__have_every_command_and_flag() -> None:
    for point in entry_points(group="samgraft.commands"):
        text = (DOCS / "commands" / f"{point.name}.md").read_text(encoding="utf-8")
        parser = argparse.ArgumentParser()
        point.load().add_arguments(parser)
        for action in parser._actions:
            for option in action.option_strings:
                assert option in {"-h", "--help"} or option in text, (point.name, option)


def test_docs__every_page_with_steps_shows_commands() -> None:
    shown = {page for page, _ in SHOWN}
    assert shown >= {"README.md", "install.md", "quick_start.md", "tutorial.md", "troubleshooting.md"}
    assert shown >= {page.name for page in (DOCS / "howto").glob("*.md")}


def test_readme__leads_with_the_two_commands_in_at_most_100_lines() -> None:
    assert [command for page, command in SHOWN if page == "README.md"][:2] == [
        "make pretrain MODALITY=mri",
        "make test",
    ]
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in SHOWN))
def test_docs__command_is_understood(tmp_path: Path, command: str) -> None:
    """A renamed program, target, variable, option, setting, extra or file turns this red."""
    check_command(command, fake_environment(tmp_path))


@pytest.mark.parametrize(
    "command",
    [
        "samgraft pretrain --data a no.such_setting=1",
        "samgraft pretrain --no-such-option",
        "make finetune CHKPT=a",
        "make no-such-target",
        "sbatch configs/slurm/none.sbatch DATA=a",
        "pip install '.[no_such_extra]'",
        "export SAMGRAFT_NONE=1",
        "rm -r runs",
    ],
)
def test_docs__a_wrong_command_is_found(tmp_path: Path, command: str) -> None:
    with pytest.raises((AssertionError, argparse.ArgumentError, SystemExit, subprocess.CalledProcessError)):
        check_command(command, fake_environment(tmp_path))


def test_troubleshooting__quotes_messages_that_exist() -> None:
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text("utf-8"), flags=re.MULTILINE)
    known = [text for _, text in texts()]
    assert len(quoted) > 15
    assert [fragment for fragment in quoted if not any(fragment in text for text in known)] == []


def test_docs__an_unknown_flag_would_be_seen() -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse(["release", "run", "--out", "x", "--no-such-flag"])


PYTHON = [
    (page.name, number, block)
    for page in WRITTEN
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
]


@pytest.mark.parametrize("block", [block for _, _, block in PYTHON], ids=[f"{page}-{n}" for page, n, _ in PYTHON])
def test_docs__python_calls_have_existing_functions_and_arguments(block: str) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "sg"
    ]
    for call in calls:
        function = getattr(sg, call.func.attr)
        arguments = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(function).bind(*call.args, **arguments)


def test_docs__python_is_shown() -> None:
    assert {name for name in sg.__all__ if name.islower() and name not in {"__version__", "compare"}} <= {
        node.func.attr
        for _, _, block in PYTHON
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_docs__links_and_pictures_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_architecture__every_file_and_folder_it_names_exists() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:shared|ssl|finetune|configs|tests)/[\w./-]*)`", text)
    assert len(named) > 50
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_docs__pictures_are_small_used_and_readable() -> None:
    used = {name for page in WRITTEN for name in re.findall(r"pictures/([\w.-]+)", page.read_text(encoding="utf-8"))}
    pictures = sorted((DOCS / "pictures").iterdir())
    assert {p.name for p in pictures} == used
    for path in pictures:
        assert path.stat().st_size < 100_000
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            root = ElementTree.fromstring(text)
            assert root.tag.endswith("svg")
            assert float(root.attrib["width"].removesuffix("pt")) > 300
            assert "creator" not in text.lower()
            continue
        with Image.open(path, formats=("PNG",)) as picture:
            assert picture.size[0] > 300
            assert not picture.info.get("Software")


def test_settings__quote_measured_numbers_only() -> None:
    results = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "benchmarks" / "results").glob("*.md"))
    measured = set(re.findall(r"\d[\d,]*\.?\d*", results))
    text = re.sub(r"\]\([^)]*\)", "", (DOCS / "settings.md").read_text(encoding="utf-8"))
    text = re.sub(r"`[^`]*`", "", text)
    decimals = re.findall(r"(?<![\w.])\d[\d,]*\.\d+", text)
    assert len(decimals) > 10
    assert [number for number in decimals if number not in measured] == []
