"""What may never be committed: data, weights, machine paths, package-index hosts, functions that grew too long."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _tracked() -> list[Path]:
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if out.returncode != 0:
        pytest.skip("not a git checkout: nothing is tracked")
    return [ROOT / name for name in out.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_repository__holds_no_data_or_weights() -> None:
    banned = {".nii", ".gz", ".nrrd", ".dcm", ".pth", ".pt", ".ckpt", ".safetensors", ".onnx", ".zarr", ".npz", ".npy"}
    assert [str(p.relative_to(ROOT)) for p in _tracked() if p.suffix in banned] == []


def test_repository__no_file_over_500_kb() -> None:
    assert [str(p.relative_to(ROOT)) for p in _tracked() if p.stat().st_size > 500_000] == []


# Split so that this file does not find itself.
MADE_UP_PATHS = {"test_release_privacy.py"}  # canaries for the release gate
FORBIDDEN = {
    "path of a machine": re.compile(r"(?<![\w.])/(?:" + "work|farm|root" + r"|home/[a-z]+)/"),
    "package index host": re.compile("pypi" + r"\.org|pythonhosted" + r"\.org|registry\.npm" + r"js\.org"),
    "pip option with an address": re.compile("--(?:extra-)?index" + "-url|--find" + "-links"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_repository__names_no(what: str) -> None:
    found = []
    for path in _tracked():
        if path.suffix in {".png", ".js"} or path == Path(__file__):
            continue
        if what == "path of a machine" and path.name in MADE_UP_PATHS:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if FORBIDDEN[what].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_code__functions_stay_under_50_lines() -> None:
    long = []
    for path in _tracked():
        if path.suffix != ".py" or path.relative_to(ROOT).parts[0] not in {"api", "ssl", "finetune", "shared"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = _code_lines(node)
                if lines > 50:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {lines}")
    assert long == []


def _code_lines(node: ast.FunctionDef) -> int:
    """Lines of the body without its docstring."""
    body = node.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
