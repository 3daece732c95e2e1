"""Page of the Python functions, written from their signatures and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import samgraft.api as sg
from samgraft.finetune.prediction.loaded_model import LoadedModel, Segmentation
from settings_page import attribute_docs, cell_text

_ARGUMENT = re.compile(r"^    (\*{0,2}\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_ORDER = (
    "build_store",
    "open_store",
    "pretrain",
    "finetune",
    "selftrain",
    "evaluate",
    "compare",
    "average",
    "release",
    "load",
)
_PART = re.compile(r"^(Args|Returns|Raises|Source|Yields):\n((?: {4}.*\n?|\n)+)", re.MULTILINE)


def python_page(note: str) -> str:
    """Return the Markdown of every function and class of ``samgraft.api``."""
    names = [*_ORDER, *(name for name in sorted(sg.__all__) if name not in _ORDER and name != "__version__")]
    functions = [name for name in names if not inspect.isclass(getattr(sg, name))]
    classes = [name for name in names if inspect.isclass(getattr(sg, name))]
    lines = [
        note,
        "",
        "# Python functions",
        "",
        "`import samgraft.api as sg`. [From Python](../python.md) has examples.",
    ]
    for name in functions:
        lines += _function(f"sg.{name}", getattr(sg, name))
        if name == "load":
            lines += _function("sg.load(...).predict", LoadedModel.predict)
            lines += [*_class("Segmentation", Segmentation), *_function("Segmentation.save", Segmentation.save)]
    for name in classes:
        lines += _class(f"sg.{name}", getattr(sg, name))
    return "\n".join([*lines, ""])


def _function(name: str, function: Any) -> list[str]:
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    returned = "" if signature.return_annotation in (None, "None") else f" -> {_name(signature.return_annotation)}"
    shown = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    text, parts = _docstring(function)
    lines = ["", f"## {name}", "", "```text", f"{name}{shown}{returned}".replace("PosixPath", "Path"), "```", "", text]
    if parts.get("Args"):
        rows = [f"| `{key}` | {cell_text(value)} |" for key, value in _ARGUMENT.findall(parts["Args"])]
        lines += ["", "| argument | meaning |", "|---|---|", *rows]
    if parts.get("Returns"):
        lines += ["", f"Returns: {cell_text(parts['Returns'])}"]
    if parts.get("Raises"):
        rows = [f"- `{key}`: {cell_text(value)}" for key, value in _ARGUMENT.findall(parts["Raises"])]
        lines += ["", "Raises:", "", *rows]
    return lines


def _class(name: str, kind: type) -> list[str]:
    text, _ = _docstring(kind)
    docs = attribute_docs(kind)
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    names += [key for key, value in vars(kind).items() if isinstance(value, property) and not key.startswith("_")]
    rows = [
        f"| `{key}` | {cell_text(docs.get(key) or inspect.getdoc(getattr(kind, key, None)) or '')} |" for key in names
    ]
    table = ["", "| attribute | meaning |", "|---|---|", *rows] if rows else []
    return ["", f"## {name}", "", text, *table]


def _docstring(thing: Any) -> tuple[str, dict[str, str]]:
    """Return the text of a docstring and its parts by title."""
    doc = inspect.getdoc(thing) or ""
    parts = {title: body for title, body in _PART.findall(doc + "\n")}
    return "\n\n".join(cell_text(part) for part in _PART.sub("", doc + "\n").strip().split("\n\n")), parts


def _name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
