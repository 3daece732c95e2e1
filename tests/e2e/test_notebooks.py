"""The notebooks of the tutorials run from the first cell to the last, on tiny weights."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.shared.files import write_tensors

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
WEIGHTS = Path("data/weights/lite_medsam.pth")
"""Path of the base weights in every notebook."""


def run(notebook: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run all cells in a process of their own, as a reader would in an empty folder."""
    quiet = {"SAMGRAFT_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", "IPYTHONDIR": str(folder / "ip")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=nocolor", str(notebook)],
        cwd=folder,
        env={**os.environ, **quiet, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_notebooks__exist_and_have_no_outputs():
    assert {path.stem for path in NOTEBOOKS} == {"own_scans", "labels_on_a_part", "dicom", "prompts"}
    for path in NOTEBOOKS:
        code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__runs_to_its_end(tmp_path, path):
    (tmp_path / WEIGHTS).parent.mkdir(parents=True)
    write_tensors(tmp_path / WEIGHTS, dict(make_sam(tiny_vit_t_spec(), image_size=64).state_dict()))
    out = run(path, tmp_path)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]


def test_run__a_cell_that_fails_is_seen(tmp_path):
    cells = [nbformat.v4.new_code_cell("1 / 0"), nbformat.v4.new_code_cell("print('not reached')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "broken.ipynb")
    out = run(tmp_path / "broken.ipynb", tmp_path)
    assert out.returncode != 0
    assert "not reached" not in out.stdout
