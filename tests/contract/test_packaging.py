"""The packaging contract: what is on disk is what is installed, and nothing shadows the standard library."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("api", "ssl", "finetune", "shared", "configs")


def _packages_on_disk() -> set[str]:
    found = set()
    for top in FOLDERS:
        for path in [ROOT / top, *(ROOT / top).rglob("*")]:
            if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.py")):
                found.add("samgraft." + ".".join(path.relative_to(ROOT).parts))
    return found


def test_packages__list_equals_the_folders_on_disk() -> None:
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    assert listed - {"samgraft.configs"} == _packages_on_disk()


def test_package_data__every_other_file_is_shipped() -> None:
    shipped = {".py", ".yaml", ".jinja", ".css", ".typed", ".sh", ".sbatch", ".html", ".js", ".txt"}
    odd = [
        str(path.relative_to(ROOT))
        for top in FOLDERS
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in shipped
    ]
    assert odd == []


def test_ssl__has_no_init_and_the_standard_library_wins() -> None:
    assert not (ROOT / "ssl" / "__init__.py").exists()
    code = "import ssl, sys, asyncio; print(ssl.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not Path(out.stdout.strip()).is_relative_to(ROOT / "ssl")


def test_namespace__samgraft_itself_has_no_module() -> None:
    import samgraft

    assert getattr(samgraft, "__file__", None) is None


@pytest.mark.parametrize("point", entry_points(group="samgraft.commands"), ids=lambda point: point.name)
def test_commands__every_entry_point_loads(point) -> None:
    command = point.load()
    assert command.help
    assert callable(command.run)


def test_commands__the_command_modules_import_nothing_heavy() -> None:
    code = (
        "import sys; from samgraft.shared.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'monai', 'peft', 'zarr', 'timm') if m in sys.modules], file=sys.stderr)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stderr.strip().splitlines()[-1] == "[]"


def test_code__no_module_is_named_like_a_dumping_ground() -> None:
    banned = {"utils.py", "helpers.py", "common.py", "misc.py", "core.py"}
    assert [p for top in FOLDERS for p in (ROOT / top).rglob("*.py") if p.name in banned] == []


def test_code__files_have_at_most_600_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for top in FOLDERS
        for path in (ROOT / top).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 600
    }
    assert long == {}


@pytest.mark.slow
def test_wheel__imports_from_an_empty_folder(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(tmp_path.glob("samgraft-*.whl"))) as wheel:
        wheel.extractall(installed)
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import samgraft.ssl.pretrain as m; print(m.__file__)"
    out = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.startswith(str(installed))
