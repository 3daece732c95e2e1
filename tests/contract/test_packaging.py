"""The packaging contract: what is on disk is what is installed, and nothing shadows the standard library."""

import subprocess
import sys
import tomllib
import venv
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from finished_factory import make_lab
from store_factory import make_scan, write_nifti

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone in a new environment that sees this one's libraries, and return its ``bin``."""
    root = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(root), str(ROOT)],
        check=True,
        capture_output=True,
    )
    venv.create(root / "venv", with_pip=True)
    python = root / "venv" / "bin" / "python"
    [wheel] = root.glob("samgraft-*.whl")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    # Folders that a .pth file names do not get their own .pth files read, so that the editable install stays outside.
    folders = [path for path in sys.path if "site-packages" in path]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = root / "venv" / "lib" / version / "site-packages"
    (site / "libraries.pth").write_text("\n".join(folders) + "\n")
    return python.parent


def _output_of(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel__every_command_and_module_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    site = installed.parent / "lib"
    for point in entry_points(group="samgraft.commands"):
        assert "usage: samgraft" in _output_of([str(installed / "samgraft"), point.name, "--help"], tmp_path)
    packages = [name for name in PYPROJECT["tool"]["setuptools"]["packages"] if name != "samgraft.configs"]
    code = (
        "import importlib, pkgutil\n"
        f"for package in {packages!r}:\n"
        "    folder = importlib.import_module(package)\n"
        "    for module in pkgutil.iter_modules(folder.__path__, package + '.'):\n"
        "        print(importlib.import_module(module.name).__file__)\n"
    )
    files = _output_of([str(installed / "python"), "-I", "-c", code], tmp_path).split()
    assert len(files) > 100
    assert all(Path(file).is_relative_to(site) for file in files)


@pytest.mark.slow
def test_wheel__configs_are_found_by_name(installed: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))
    code = f"from samgraft.shared.config import packaged_config as p\nfor n in {names!r}: print(p(n).is_file(), p(n))"
    lines = _output_of([str(installed / "python"), "-I", "-c", code], tmp_path).splitlines()
    assert len(lines) == len(names)
    assert all(line.startswith(f"True {installed.parent}") for line in lines)


@pytest.mark.slow
def test_wheel__python_interface_runs(installed: Path, tmp_path: Path) -> None:
    lab = make_lab(tmp_path)
    write_nifti(tmp_path / "scans" / "a.nii.gz", make_scan(shape_zyx=(4, 32, 32), seed=1)[0])
    code = (
        "import samgraft.api as sg\n"
        f"print(sg.__file__, sg.evaluate({str(lab.run)!r}).cases.shape[0])\n"
        "print(sg.build_store('scans', 'mine.zarr').cases.shape[0])\n"
        f"print(sg.load({str(lab.run)!r}).predict('scans/a.nii.gz').labels.shape)\n"
    )
    first, stored, shape = _output_of([str(installed / "python"), "-I", "-c", code], tmp_path).splitlines()
    assert first.startswith(str(installed.parent))
    assert (stored, shape) == ("1", "(32, 32, 4)")
