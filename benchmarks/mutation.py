"""Small changes of Python code, one at a time, as realistic bugs for ``benchmarks/mutants.py``.

Messages, logging, annotations, decorators and docstrings stay as they are: no test of values can find a change of them.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "zeros": "ones",
    "ones": "zeros", "mean": "sum", "sum": "mean", "argmax": "argmin", "argmin": "argmax", "minimum": "maximum",
    "maximum": "minimum", "train": "eval", "eval": "train",
}  # fmt: skip
LOGGERS = ("log", "warnings", "logging")
WITHOUT_EFFECT = ("strict", "where", "next_command", "kept", "encoding", "on_note", "on_progress")
"""Arguments that serve messages, or assertions of what other code guarantees."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change of a module."""

    operator: str
    line: int
    code: str
    """Line of the module, without indentation."""
    before: str
    after: str
    tree: ast.Module
    """Changed module."""


def mutations(source: str) -> Iterator[Mutation]:
    """Yield every mutation of a module in a fixed order.

    The trees share nodes: a tree is valid until the next mutation is taken.
    """
    tree = ast.parse(source)
    lines = source.splitlines()
    for parent, field, index, node in _places(tree):
        for operator, new in _changes(node, parent):
            ast.copy_location(new, node)
            # Whole statements are shown in one line.
            shown = [" ".join(ast.unparse(item).split()) for item in (node, new)]
            _put(parent, field, index, ast.fix_missing_locations(new))
            yield Mutation(
                operator=operator,
                line=node.lineno,
                code=lines[node.lineno - 1].strip(),
                before=shown[0],
                after=shown[1],
                tree=tree,
            )
            _put(parent, field, index, node)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _places(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.expr | ast.stmt]]:
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or _is_left_out(node, parent):
                continue
            if isinstance(node, ast.expr | ast.stmt):
                yield parent, field, index, node
            yield from _places(node)


def _is_left_out(node: ast.AST, parent: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Global):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    # Aliases of types look like expressions.
    is_alias = isinstance(node, ast.Assign) and isinstance(parent, ast.Module) and isinstance(node.value, ast.Subscript)
    return is_alias or (isinstance(node, ast.Expr) and _root(node.value) in LOGGERS)


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Call | ast.Attribute):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _changes(node: ast.expr | ast.stmt, parent: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt]]:
    if isinstance(node, ast.stmt):
        yield from _statement_changes(node)
    elif isinstance(node, ast.Call):
        yield from _call_changes(node)
    elif isinstance(node, ast.Constant):
        yield from _constant_changes(node)
    else:
        yield from _expression_changes(node, parent)


def _statement_changes(node: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    if isinstance(node, ast.If | ast.While):
        new = copy.copy(node)
        new.test = ast.UnaryOp(ast.Not(), node.test)
        if isinstance(node, ast.If):
            yield "negate condition", new
    elif isinstance(node, ast.AugAssign):
        yield "delete statement", ast.Pass()
        if type(node.op) in OPERATORS:
            new_op = copy.copy(node)
            new_op.op = OPERATORS[type(node.op)]()
            yield "other operator", new_op
    elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    ):
        yield "delete statement", ast.Pass()


def _call_changes(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    for number, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in WITHOUT_EFFECT:
            new = copy.copy(node)
            new.keywords = node.keywords[:number] + node.keywords[number + 1 :]
            yield "drop argument", new
    if len(node.args) >= 2 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
        new = copy.copy(node)
        new.args = [node.args[1], node.args[0], *node.args[2:]]
        yield "swap arguments", new
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in NAMES:
        new = copy.copy(node)
        new.func = copy.copy(node.func)
        setattr(new.func, "attr" if isinstance(node.func, ast.Attribute) else "id", NAMES[name])
        yield "other function", new


def _constant_changes(node: ast.Constant) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.value, bool):
        yield "other constant", ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield "other constant", ast.Constant(node.value + 1)
    elif isinstance(node.value, float):
        yield "other constant", ast.Constant(2 * node.value if node.value else 1.0)


def _expression_changes(node: ast.expr, parent: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    new = copy.copy(node)
    if isinstance(node, ast.Compare) and isinstance(new, ast.Compare):
        new.ops = [COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
        yield "other comparison", new
    elif isinstance(node, ast.BinOp) and isinstance(new, ast.BinOp):
        # Texts and types are joined with + and | as well, where another operator fails at once.
        is_text = any(isinstance(side, ast.JoinedStr) for side in (node.left, node.right))
        if type(node.op) in OPERATORS and not is_text:
            new.op = OPERATORS[type(node.op)]()
            yield "other operator", new
    elif isinstance(node, ast.BoolOp) and isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "other operator", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "drop operator", node.operand
    elif isinstance(node, ast.IfExp):
        yield "drop condition", node.body
        yield "drop condition", node.orelse
    elif isinstance(node, ast.Slice) and isinstance(new, ast.Slice) and (node.lower or node.upper):
        new.lower, new.upper = (None, node.upper) if node.lower else (node.lower, None)
        yield "other slice", new
    elif isinstance(node, ast.Tuple) and isinstance(new, ast.Tuple) and _can_swap(node, parent):
        new.elts = [node.elts[1], node.elts[0], *node.elts[2:]]
        yield "swap elements", new
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) and node.generators[0].ifs:
        assert isinstance(new, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp)
        first = copy.copy(node.generators[0])
        first.ifs = []
        new.generators = [first, *node.generators[1:]]
        yield "drop condition", new


def _can_swap(node: ast.Tuple, parent: ast.AST) -> bool:
    is_type = isinstance(parent, ast.Subscript) and not any(isinstance(e, ast.Slice | ast.Constant) for e in node.elts)
    return isinstance(node.ctx, ast.Load) and len(node.elts) >= 2 and not is_type
