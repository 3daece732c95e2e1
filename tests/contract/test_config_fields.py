"""Every setting of a configuration is read by the code. A setting that nothing reads would be ignored silently."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import pytest
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.study.config import StudyConfig
from samgraft.shared.config import PositiveInt
from samgraft.ssl.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [PretrainConfig, FinetuneConfig, StudyConfig]
Reads = list[tuple[str, set[str], set[tuple[str, str]]]]
"""Per file its package, its words, and the attributes that it reads as pairs of owner and attribute."""


@pytest.fixture(scope="module")
def reads() -> Reads:
    """Return what every file of the package reads. The owner of ``config.data.store`` is ``data``.

    Range checks do not count, because they are the only code that touches a setting without effect.
    """
    found = []
    for path in (path for folder in ("shared", "ssl", "finetune") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("__post_init")]
        skipped = {id(inner) for check in checks for inner in ast.walk(check)}
        attributes = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in skipped:
                owner = node.value
                attributes.add(
                    (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", ""), node.attr)
                )
        package = ".".join(["samgraft", *path.parent.relative_to(ROOT).parts])
        found.append((package, set(re.findall(r"\w+", text)), attributes))
    return found


def sections(schema: type, name: str) -> Iterator[tuple[str, type]]:
    """Yield every configuration class below ``schema`` with the name of its section."""
    yield name, schema
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield from sections(kind, field.name)


def unread_fields(parts: list[tuple[str, type]], reads: Reads) -> list[str]:
    """Return the fields that nothing reads.

    Two sections may have a field of one name, e.g. ``batch_size`` in ``data`` and ``watch``. Reading one must not count
    for the other. So the access has to name the section, or be in a file that names the section's class or its list or
    is in the folder of the class. Sections themselves are read when their fields are.
    """
    names = [field.name for _, part in parts for field in dataclasses.fields(part)]
    lists = {field.name for _, part in parts for field in dataclasses.fields(part) if "list[" in str(field.type)}
    missing = []
    for section, part in parts:
        for field in dataclasses.fields(part):
            is_unique = names.count(field.name) == 1
            is_section = any(field.name == name for name, _ in parts)
            if not is_section and not any(
                attribute == field.name
                and (
                    is_unique
                    or owner == section
                    or part.__name__ in words
                    or package == part.__module__.rpartition(".")[0]
                    or (section in lists and section in words)
                )
                for package, words, attributes in reads
                for owner, attribute in attributes
            ):
                missing.append(f"{section}.{field.name}")
    return missing


@pytest.mark.parametrize("schema", CONFIGS, ids=lambda schema: schema.__name__)
def test_config__every_field_is_read(schema: type, reads: Reads) -> None:
    assert unread_fields(list(sections(schema, "config")), reads) == []


CHECKED_BY_FUNCTION = {"seed", "num_neighbours", "patch_size", "classes", "regions", "seeds", "shots"}
"""Numbers whose range depends on more than a constant. Their classes check them."""


def unbounded_numbers(part: type) -> list[str]:
    """Return the numeric fields of a section that declare no range. A declared one is an ``Annotated`` type."""
    found = []
    for name, hint in get_type_hints(part, include_extras=True).items():
        options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        items = {item for option in options for item in (get_args(option) if get_origin(option) is list else (option,))}
        if items & {int, float} and name not in CHECKED_BY_FUNCTION:
            found.append(name)
    return found


@pytest.mark.parametrize("schema", CONFIGS, ids=lambda schema: schema.__name__)
def test_config__every_number_declares_its_range(schema: type) -> None:
    """Ranges on fields are checked all at once, each with its file and line."""
    missing = {name: unbounded_numbers(part) for name, part in sections(schema, "config")}
    assert {name: fields for name, fields in missing.items() if fields} == {}


def test_unbounded_numbers__a_plain_number_is_found() -> None:
    part = dataclasses.make_dataclass("Part", [("a", int), ("b", float | None), ("c", list[float]), ("d", PositiveInt)])
    assert unbounded_numbers(part) == ["a", "b", "c"]


def test_unread_fields__a_field_that_only_another_section_reads_is_found() -> None:
    loader = dataclasses.make_dataclass("LoaderConfig", [("num_workers", int, 0)])
    trainer = dataclasses.make_dataclass("TrainerConfig", [("num_workers", int, 0), ("seed", int, 0)])
    reads: Reads = [
        ("samgraft.shared.training", {"TrainerConfig"}, {("trainer", "num_workers"), ("config", "num_workers")})
    ]
    assert unread_fields([("data", loader), ("trainer", trainer)], reads) == ["data.num_workers", "trainer.seed"]
