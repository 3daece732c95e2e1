"""Texts in the code, for tests of what messages name and of what documentation quotes."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def texts():
    """Yield (file:line, text) of every string in the package."""
    for folder in ("api", "ssl", "finetune", "shared"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            whole = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
            parts = {part for node in whole for part in node.values}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
                    text = node.value
                else:
                    continue
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text
