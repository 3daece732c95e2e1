"""A key of a file or an override has the effect of the option with the same meaning, in both stages."""

import pytest
from samgraft.finetune.commands.finetune import build_config, typed_settings
from samgraft.shared.config import read_settings, without_keys
from samgraft.shared.demo.heads import demo_paths
from samgraft.shared.errors import UsageError
from samgraft.shared.stage_config import TypedSettings
from samgraft.ssl.prepare import prepare
from store_factory import make_store


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return a store. A test that would fetch the demo data fails."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the demo data would be fetched")

    monkeypatch.setattr("samgraft.shared.stage_config.demo_data", refuse)
    monkeypatch.chdir(tmp_path)
    return make_store(tmp_path, num_patients=3)


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_pretrain__file_with_data_and_weights_is_used(store, tmp_path):
    file = written(
        tmp_path,
        f"data: {{store: {store}, batch_size: 2}}\nmodel: {{base: random, arch: vit_b}}\nobjective: {{name: mae}}",
    )
    config, name = prepare(TypedSettings(files=(file,)), has_gpu=False)
    assert (config.data.store, config.data.batch_size) == (str(store), 2)
    assert (config.model.base, config.model.arch, config.objective.name) == ("random", "vit_b", "mae")
    assert not config.watch.log_images
    assert config.probe.store is None
    assert name.endswith("vit_b-mae")


def test_pretrain__override_of_the_store_drops_the_demo_settings(store):
    config, _ = prepare(TypedSettings(overrides=(f"data.store={store}", "model.base=random")), has_gpu=False)
    assert config.data.store == str(store)
    assert not config.watch.log_images
    assert not config.data.test_stores
    assert config.probe.store is None


def test_pretrain__options_override_files_and_overrides_override_both(store, tmp_path):
    file = written(tmp_path, "model: {base: random, arch: vit_l}\nobjective: {name: dino}\n")
    request = TypedSettings(
        options={"data.store": str(store), "model.arch": "vit_b", "objective.name": "mae"}, files=(file,)
    )
    config, _ = prepare(request, has_gpu=False)
    assert (config.model.arch, config.objective.name) == ("vit_b", "mae")
    config, _ = prepare(
        TypedSettings(
            options={"data.store": "nowhere"}, files=(file,), overrides=(f"data.store={store}", "model.arch=vit_b")
        ),
        has_gpu=False,
    )
    assert (config.data.store, config.model.arch) == (str(store), "vit_b")


def test_pretrain__file_overrides_the_demo_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = make_store(tmp_path / "data" / "demo", num_patients=3, name="mri.zarr")
    paths = demo_paths()
    assert paths.unlabelled.resolve() == demo.resolve()
    shown, _ = prepare(TypedSettings(options={"data.store": str(demo), "model.base": "random"}), has_gpu=False)
    assert shown.watch.log_images
    assert shown.probe.store == str(paths.labelled)
    file = written(tmp_path, "watch: {log_images: false}\n")
    hidden, _ = prepare(
        TypedSettings(options={"data.store": str(demo), "model.base": "random"}, files=(file,)), has_gpu=False
    )
    assert not hidden.watch.log_images


def test_finetune__store_of_a_file_or_an_override_is_used(store, tmp_path):
    file = written(tmp_path, f"data: {{store: {store}}}\nmodel: {{ckpt: runs/mine}}\n")
    for options in ({"config": file}, {"ckpt": "runs/mine", "settings": [f"data.store={store}"]}):
        settings = typed_settings(**options)
        config = build_config(settings)
        assert (config.data.store, config.data.split, config.model.ckpt) == (str(store), None, "runs/mine")
        assert not config.watch.log_images
        assert settings.by_key()["model.ckpt"] == "runs/mine"


def test_read_settings__later_values_win_and_null_counts_as_not_given(tmp_path):
    file = written(tmp_path, "a: {b: 1, c: null}\nd: [1, 2]\n")
    assert read_settings([file, {"a": {"b": 2}}], []) == {"a.b": "2"}
    assert read_settings([file], ["a.b=null", "e='x y'"]) == {"e": "x y"}
    assert without_keys(["a.b=1", "c=2"], ("a.b",)) == ["c=2"]
    with pytest.raises(UsageError, match="not plain YAML"):
        read_settings([written(tmp_path, "a: !x 1\n")], [])


def test_pretrain__mistyped_key_is_an_error(store):
    with pytest.raises(UsageError, match=r"unknown key 'data\.stor'"):
        prepare(
            TypedSettings(options={"data.store": str(store), "model.base": "random"}, overrides=("data.stor=x",)),
            has_gpu=False,
        )
