"""Files for people and services around the code name what exists."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {folder for folder in PROJECT["tool"]["setuptools"]["package-dir"].values() if "/" not in folder}


def test_citation__is_of_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])
    assert citation["cff-version"] == "1.2.0"


def test_workflow__runs_targets_and_tests_that_exist() -> None:
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")]
    jobs = [job for workflow in workflows for job in workflow["jobs"].values()]
    steps = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    wanted = [word for step in steps if step.startswith("make ") for word in step.split()[1:]]
    assert wanted
    assert set(wanted) <= targets
    files = [word for step in steps for word in step.split() if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_workflow__versions_of_python_are_supported_ones() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())
    supported = {line.rsplit(" :: ", 1)[1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line}
    assert set(workflow["jobs"]["checks"]["strategy"]["matrix"]["python"]) <= supported


def test_forms__are_complete() -> None:
    for form in ("bug", "idea"):
        content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
        assert {"name", "description", "body"} <= set(content)
        inputs = [part for part in content["body"] if part["type"] != "markdown"]
        assert all(part["attributes"]["label"] for part in inputs)
        assert len({part["id"] for part in inputs}) == len(inputs)


def test_dockerfile__copies_everything_that_the_wheel_is_made_of() -> None:
    copied = set(re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    assert copied == SOURCES
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert sent >= SOURCES | {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"}


def test_dockerfile__extras_exist() -> None:
    [extras] = re.findall(r"\.whl\)\[([a-z0-9,]+)\]", (ROOT / "Dockerfile").read_text())
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
