"""Libraries that are not imported before they are needed, so that helps and refusals appear at once."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from samgraft.finetune.early_checks import refuse_known_leak
from samgraft.shared.errors import DataError
from samgraft.shared.samples.leaks import pretrain_manifest
from samgraft.shared.samples.split import default_split_path, make_split
from samgraft.shared.store.store import SliceStore
from store_factory import make_store

NETWORKS = ("torch", "torchvision", "timm", "monai", "peft", "lightly", "pytorch_lightning", "segment_anything",
            "transformers", "matplotlib", "pandas")  # fmt: skip
DATA = ("zarr", "nibabel", "pydicom", "scipy", "numpy", "omegaconf", "pydantic", "rich")


def loaded_by(*words, among=NETWORKS):
    """Return the exit code of a command, what it printed to stderr, and the libraries that it imported."""
    code = (
        "import sys; from samgraft.shared.cli import main; code = main(sys.argv[1:]);"
        f"print('\\n', [code, [m for m in {among!r} if m in sys.modules]])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    return code, done.stderr, modules


@pytest.mark.parametrize("command", sorted(point.name for point in entry_points(group="samgraft.commands")))
def test_help__imports_no_library(command):
    code, _, modules = loaded_by(command, "--help", among=NETWORKS + DATA)
    assert (code, modules) == (0, [])


def test_predictor__imports_networks_only_when_a_model_is_read():
    slow = ("torchvision", "timm", "monai", "peft", "transformers", "segment_anything", "omegaconf", "pypi_simple",
            "matplotlib", "pandas", "pytorch_lightning", "zarr", "torch.distributed.tensor", "sympy")  # fmt: skip
    code = (
        "import sys; from samgraft.finetune.prediction.loaded_model import LoadedModel;"
        f"print('torch' in sys.modules, [m for m in {slow!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


@pytest.fixture
def lab(tmp_path):
    """Store with a split beside it, and the card of an encoder that has seen one test patient."""
    store = SliceStore.open(make_store(tmp_path, num_patients=6, shape_zyx=(2, 16, 16)))
    split = make_split(store)
    split.save(default_split_path(store.path))
    (tmp_path / "encoder").mkdir()
    manifest = pretrain_manifest(store, [*split.train, split.test[0]])
    (tmp_path / "encoder" / "card.json").write_text(json.dumps({"data_manifest": manifest}))
    return tmp_path, store, split


def test_finetune__leak_is_refused_before_networks_are_imported(lab):
    root, store, split = lab
    code, printed, modules = loaded_by("finetune", "--ckpt", str(root), "--data", str(store.path), "--runs", str(root))
    assert (code, modules) == (3, [])
    assert "error: 1 test patient was in the pretraining set" in printed
    assert split.test[0] in printed


def test_finetune__missing_weights_are_reported_before_networks_are_imported(lab):
    root, store, _ = lab
    code, printed, _ = loaded_by("finetune", "--data", str(store.path), "--runs", str(root))
    assert code == 2
    assert "--ckpt and --base are both missing" in printed


@pytest.mark.parametrize("key", ["data.allow_transductive", "data.fold"])
def test_known_leak__with_settings_that_change_it_is_left_to_the_later_check(lab, key):
    root, store, _ = lab
    given = {"data.store": str(store.path), "model.ckpt": str(root)}
    with pytest.raises(DataError, match="was in the pretraining set"):
        refuse_known_leak(given)
    refuse_known_leak({**given, key: "1"})


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data_manifest": 3}', '{"data_manifest": {}}'])
def test_known_leak__card_that_cannot_be_read_is_left_to_the_later_check(lab, content):
    root, store, _ = lab
    (root / "encoder" / "card.json").write_text(content)
    refuse_known_leak({"data.store": str(store.path), "model.ckpt": str(root)})


def test_known_leak__without_a_split_beside_the_store_is_left_to_the_later_check(lab):
    root, store, _ = lab
    default_split_path(store.path).unlink()
    refuse_known_leak({"data.store": str(store.path), "model.ckpt": str(root)})
