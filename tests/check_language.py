"""Check that docstrings and messages are written in plain English.

    python tests/check_language.py FOLDER...

Prints one line per violation and exits with 1 if there is any. The rules are in CONTRIBUTING.md, section "Language".
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

MAX_FIRST_LINE_WORDS = 20
MIN_COMMENTS_PER_1000_LINES = 25
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_FILES_PER_FOLDER = 14

FRAGMENT = re.compile(
    r"^(Of|As|Beside|Beyond|Also|Not|Nor|Only|Or|And|Than|Whose|Which|Why|What|How|Whether|Where|When|By|In|On|For|With|Without)\b"
    r"(?!.*\b(is|are|was|were|has|have|can|may|must|returns?|holds?|contains?)\b)"
)
FIGURATIVE = re.compile(
    r"\b(says?|said|saying|tells?|told|telling|asks?|asked|speaks?|answers?|answered|hears?|heard|trusts?|forgets?"
    r"|forgot|forgotten|worry|worries|worried|books|bookkeeping|strangers?|lookalikes?|takes? up|taken up|goes on|go on"
    r"|going on|hand(s|ed)? (on|over)|holds? (on )?to|held to|made up for|stands? (beside|in|for)|lies? beside|for ever"
    r"|nobody|somebody|alike|mends?|mended|judges?|judged|verdict|looks? at|a look|knows?|known to|forbids?|lends?"
    r"|lender|owes?|owed)\b",
    re.IGNORECASE,
)
"""Words for people's actions, and private terms, that describe software badly. A sentence about a reader or a user may
need one of them: such lines are listed in ``ALLOWED``."""
ALLOWED = re.compile(r"ask for a review|lookup", re.IGNORECASE)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield line, text, and whether it documents a function, for every docstring, attribute docstrings included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text, isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.Module | ast.ClassDef):
            for first, second in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
                if isinstance(first, ast.Assign | ast.AnnAssign) and is_text and isinstance(second.value.value, str):
                    yield second.lineno, second.value.value.strip(), False


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string of several words that is passed to a call or raised."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            if isinstance(argument, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "X" for part in argument.values)
            elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                text = argument.value
            else:
                continue
            if text.count(" ") >= 2:
                yield argument.lineno, text


def check_file(path: Path) -> Iterator[str]:
    """Yield the violations of one file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for line, text, _ in docstrings(tree):
        first = text.splitlines()[0]
        if ":" in first.replace("::", "").replace("://", "") or ";" in first:
            yield f"{path}:{line}: colon or semicolon in the first line: {first}"
        if FRAGMENT.match(first):
            yield f"{path}:{line}: the first line is a fragment: {first}"
        if (found := FIGURATIVE.search(text)) and not ALLOWED.search(text):
            yield f"{path}:{line}: {found.group()!r} is not a word for software: {first}"
    for line, text in messages(tree):
        if (found := FIGURATIVE.search(text)) and not ALLOWED.search(text):
            yield f"{path}:{line}: {found.group()!r} is not a word for software: {text.splitlines()[0][:100]}"
    if (length := source.count("\n")) > MAX_FILE_LINES:
        yield f"{path}: {length} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def main(folders: list[str]) -> int:
    """Check all Python files below the folders."""
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    violations = [violation for path in paths for violation in check_file(path)]
    sources = [path.read_text(encoding="utf-8") for path in paths]
    num_lines = sum(source.count("\n") for source in sources)
    num_comments = sum(
        token.type == tokenize.COMMENT
        for source in sources
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
    )
    density = 1000 * num_comments / max(1, num_lines)
    if density < MIN_COMMENTS_PER_1000_LINES:
        violations.append(f"{density:.1f} comment lines per 1,000, at least {MIN_COMMENTS_PER_1000_LINES}")
    for folder in sorted({path.parent for path in paths}):
        modules = [path for path in paths if path.parent == folder and path.name != "__init__.py"]
        if len(modules) > MAX_FILES_PER_FOLDER:
            violations.append(f"{folder}: {len(modules)} files, at most {MAX_FILES_PER_FOLDER}")
    sys.stdout.write("".join(f"{violation}\n" for violation in violations))
    sys.stdout.write(f"language: {len(paths)} files, {num_lines} lines, {density:.0f} comments per 1,000 lines, ")
    sys.stdout.write(f"{len(violations)} violations\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
