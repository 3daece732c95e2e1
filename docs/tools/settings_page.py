"""Page of all settings, written from the configuration classes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.study.config import StudyConfig
from samgraft.shared.config import plain_value
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives import OBJECTIVES

STAGES = (
    ("Stage 1, `samgraft pretrain`", PretrainConfig),
    ("Stage 2, `samgraft finetune` and `samgraft selftrain`", FinetuneConfig),
    ("Studies, the YAML file of `samgraft study`", StudyConfig),
)
INTRODUCTION = """# All settings

Each can be given as `key=value` after a training command (`ARGS='key=value'` with make) or nested in a YAML file for
`--config`. The default is that of the code. Presets under `configs/` change some of them, and `config.yaml` of a run
has the values that were used. `null` means that the value follows from other settings, as the text states."""
_BOUNDS = {Gt: "> {}", Ge: ">= {}", Lt: "< {}", Le: "<= {}"}
_NAMES = {int: "integer", float: "number", bool: "true, false", str: "text"}


def settings_page(note: str) -> str:
    """Return the Markdown of every setting with type, range, default and meaning."""
    lines = [note, "", INTRODUCTION]
    for title, schema in STAGES:
        lines += ["", f"## {title}", *_section(schema, "")]
    return "\n".join([*lines, ""])


def _section(schema: type, prefix: str) -> list[str]:
    """Return a table of the plain settings of a section, followed by the sections below it."""
    hints = get_type_hints(schema, include_extras=True)
    docs = attribute_docs(schema)
    rows, below = [], []
    for field in dataclasses.fields(schema):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            section = docs.get(field.name) or first_line(OBJECTIVES.get(field.name, hint))
            below += ["", f"### {key}", "", section, *_section(hint, f"{key}.")]
        else:
            rows.append(f"| `{key}` | {_kind(hint)} | {_default(field)} | {cell_text(docs[field.name])} |")
            for item in (k for k in get_args(hint) if isinstance(k, type) and dataclasses.is_dataclass(k)):
                below += ["", f"### Each of {key}", *_section(item, "")]
    table = ["", "| setting | type and range | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    return [*table, *below]


@cache
def attribute_docs(schema: type) -> dict[str, str]:
    """Return the text below every attribute of a class and of the classes that it is made from."""
    found: dict[str, str] = {}
    for part in reversed(schema.__mro__):
        try:
            [body] = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        except (OSError, TypeError):  # generated classes and builtins have no source
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for before, after in itertools.pairwise(statements):
            target = before.target if isinstance(before, ast.AnnAssign) else None
            target = before.targets[0] if isinstance(before, ast.Assign) else target
            if isinstance(target, ast.Name) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[target.id] = " ".join(str(after.value.value).split())
    return found


def first_line(thing: Any) -> str:
    """Return the first sentence of a class, or of the module of an objective, whose classes have all the same one."""
    text = inspect.getmodule(thing).__doc__ if thing in OBJECTIVES.values() else inspect.getdoc(thing)
    return cell_text((text or "").split("\n\n")[0])


def _kind(hint: Any) -> str:
    """Return a type with its range in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [_bound(limit) for limit in arguments[1:] if type(limit) in _BOUNDS]
        return " ".join([_kind(arguments[0]), ", ".join(bounds)]).strip()
    if origin in (Union, UnionType):
        return " or ".join("null" if kind is NoneType else _kind(kind) for kind in arguments)
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"{_kind(arguments[0])} to {_kind(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    if dataclasses.is_dataclass(hint):
        return "section"
    return _NAMES.get(hint, "text")


def _bound(limit: Any) -> str:
    kind = type(limit)
    return _BOUNDS[kind].format(f"{getattr(limit, kind.__name__.lower()):g}")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = plain_value(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        value = plain_value(field.default_factory())
    else:
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "empty"


def cell_text(text: str) -> str:
    """Return a docstring's text for one cell of a table."""
    text = re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split())).replace("|", "\\|")
    return re.sub(r"(?<![`\w])(<\w+>[\w.]*\w)", r"`\1`", text)  # a browser would take it for a tag
