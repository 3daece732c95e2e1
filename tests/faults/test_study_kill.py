"""Kill of a study: its children stop, complete cells stay, and the same command resumes the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from samgraft.finetune.evaluation.scores import CASE_COLUMNS

# Replacement of `samgraft finetune` and `evaluate` with the real detection of the study's end.
CHILD = """
import json, signal, sys, time
from pathlib import Path
from samgraft.finetune.study.child import stop_with_parent
arguments = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: (Path("stopped").touch(), sys.exit(75)))
stop_with_parent()
if arguments[0] == "finetune":
    name = arguments[arguments.index("--name") + 1]
    run = Path(arguments[arguments.index("--runs") + 1]) / name
    run.mkdir(parents=True, exist_ok=True)
    with Path("calls").open("a") as file:
        file.write(name + "\\n")
    while "seed=1" in arguments and not Path("go").exists():
        time.sleep(0.05)
    (run / "model").mkdir()
    facts = {"trainable_millions": {"decoder": 1.0}, "validation": {"best": 0.5}}
    (run / "model" / "task.json").write_text(json.dumps(facts))
else:
    folder = Path(arguments[1]) / "evaluation" / "test"
    folder.mkdir(parents=True)
    (folder / "cases.csv").write_text(Path("cases.csv").read_text())
"""
STUDY = """
import sys
from samgraft.finetune.study import cell_run
from samgraft.shared.cli import main
cell_run.PROGRAM = (sys.executable, "child.py")
sys.exit(main(["study", "s.yaml"]))
"""
GRID = {
    "name": "s",
    "data_sets": [{"name": "a", "store": "a.zarr"}],
    "initialisations": [{"name": "base", "ckpt": {"vit_t": "base.pth"}}],
    "architectures": ["vit_t"],
    "seeds": [0, 1],
}


def wait_for(condition, *, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.05)


@pytest.mark.timeout(1500)
@pytest.mark.slow  # three interpreters that import the whole package
def test_study__killed_process_is_resumed_cell_by_cell(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(GRID))
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "study.py").write_text(STUDY)
    header = ",".join(CASE_COLUMNS)
    row = ",".join({"patient_id": "p", "series_id": "s", "class": "x"}.get(c, "1") for c in CASE_COLUMNS)
    (tmp_path / "cases.csv").write_text(f"{header}\n{row}\n")
    command = [sys.executable, "study.py"]
    study = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    calls = tmp_path / "calls"
    wait_for(lambda: calls.exists() and len(calls.read_text().split()) == 2)
    results = tmp_path / "studies" / "s" / "cells"
    [first] = [path for path in results.glob("*.json") if "." not in path.stem]
    before = first.stat().st_mtime_ns
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    wait_for((tmp_path / "stopped").exists)

    (tmp_path / "go").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "study s: 2 cells, 1 complete already" in done.stderr
    one, two, three = calls.read_text().split()
    assert one == first.stem
    assert two == three != one
    assert first.stat().st_mtime_ns == before
    assert len([path for path in results.glob("*.json") if "." not in path.stem]) == 2
    assert json.loads((results / f"{two}.json").read_text())["dice_per_patient"] == {"p": 1.0}
    assert (tmp_path / "studies" / "s" / "report.html").is_file()
