"""A lab with labels on part of its scans pretrains without the patients on which it will measure."""

import dataclasses
import json
import logging

import pytest
from model_factory import make_sam
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.training.preparation import check_leak, prepare
from samgraft.shared.config import load_config
from samgraft.shared.errors import DataError
from samgraft.shared.invocation import in_typed_grammar
from samgraft.shared.runs.inputs import load_run_split
from samgraft.shared.samples.split import default_split_path, load_split, make_split
from samgraft.shared.stage_config import TypedSettings
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_sam
from samgraft.ssl.monitor.labelled import open_probe_store
from samgraft.ssl.preflight import find_left_out, open_labelled, pretraining_split
from samgraft.ssl.prepare import prepare as resolve
from store_factory import make_store
from tiny_encoders import TINY_VIT
from tiny_pretrain import config_of, make_lab, run


@pytest.fixture
def lab(tmp_path):
    """Make eight unlabelled patients, of whom the first six have labels in a second store."""
    make_lab(tmp_path)
    make_store(tmp_path, num_patients=8, shape_zyx=(4, 24, 20), labelled=False, name="many.zarr")
    make_store(tmp_path, num_patients=6, shape_zyx=(4, 24, 20), name="labelled.zarr")
    return tmp_path


def settings(lab, *more):
    return (f"data.store={lab / 'many.zarr'}", f"data.labelled=[{lab / 'labelled.zarr'}]", *more)


def test_pretrain__validation_and_test_patients_of_the_labelled_store_are_left_out(lab, caplog):
    with caplog.at_level(logging.INFO):
        path = run(lab, "run", "masked_image", *settings(lab))
    labelled, store = (SliceStore.open(lab / name) for name in ("labelled.zarr", "many.zarr"))
    split = make_split(labelled)
    card = Card.read(path / "encoder" / "card.json")
    assert len(split.held_out) == 2
    assert not set(card.data_manifest["patient_ids"]) & set(split.held_out)
    kept = load_run_split(path, store)
    assert sorted((*kept.train, *kept.val)) == sorted(set(store.patient_ids) - set(split.held_out))
    line = (
        "left out 2 of 8 patients of many.zarr (2 by id): they are among the 2 validation and test patients of "
        "labelled.zarr"
    )
    assert line in card.notes
    assert json.loads((path / "run.json").read_text())["left_out"] == [line]
    assert line in caplog.text
    assert f"make finetune CKPT={path} DATA={labelled.path}" in caplog.text
    assert "--data labelled.zarr" in (path / "report.html").read_text()
    # The split is kept, so that stage 2 measures on the patients that were left out.
    assert load_split(default_split_path(labelled.path), labelled) == split
    assert not check_leak(card, load_split(None, labelled), labelled, allow=False)


def test_pretrain__split_that_changed_afterwards_stops_a_resume(lab):
    run(lab, "run", "masked_image", *settings(lab))
    labelled = SliceStore.open(lab / "labelled.zarr")
    before = set(make_split(labelled).held_out)
    other = next(s for s in (make_split(labelled, seed=n) for n in range(50)) if not before & set(s.held_out))
    other.save(default_split_path(labelled.path))
    with pytest.raises(DataError, match="in the pretraining set"):
        run(lab, "run", "masked_image", *settings(lab))


def test_pretraining_split__file_of_the_user_loses_the_left_out_patients(lab):
    store, labelled = (SliceStore.open(lab / name) for name in ("many.zarr", "labelled.zarr"))
    own = make_split(store, fractions=(0.5, 0.5, 0), seed=4)
    own.save(lab / "own.json")
    data = config_of(lab, "masked_image", *settings(lab, f"data.split={lab / 'own.json'}")).data
    out = find_left_out(store, open_labelled(data)).patients
    split = pretraining_split(data, store, seed=0, left_out=out)
    assert out == set(make_split(labelled).held_out)
    assert (set(split.train), set(split.val)) == (set(own.train) - out, set(own.val) - out)


def test_pretraining_split__labels_on_every_patient_leave_none_and_are_refused(lab):
    data = config_of(lab, "masked_image", *settings(lab)).data
    store = SliceStore.open(lab / "many.zarr")
    with pytest.raises(DataError, match=r"no patient is left to train on: all training patients of 8 .*labelled.zarr"):
        pretraining_split(data, store, seed=0, left_out=store.patient_ids)


def test_pretraining_split__labelled_store_itself_keeps_held_out_patients(lab):
    """The store for pretraining is the labelled one, and its split is beside it since an earlier run."""
    store = SliceStore.open(lab / "labelled.zarr")
    own = make_split(store, fractions=(0.6, 0.2, 0.2))
    own.save(default_split_path(store.path))
    data = config_of(lab, "masked_image", f"data.store={store.path}", f"data.labelled=[{store.path}]").data
    split = pretraining_split(data, store, seed=0, left_out=own.held_out)
    assert split.val
    assert {*split.train, *split.val} == set(own.train)


def test_find_left_out__ids_of_another_folder_are_reported(lab, caplog):
    """Stores of two folders have two salts, so that a patient with another scan cannot be found."""
    (lab / "else").mkdir()
    make_store(lab / "else", num_patients=6, shape_zyx=(4, 24, 20), name="labelled.zarr")
    (lab / "else" / ".samgraft-salt").write_text("another")
    data = config_of(lab, "masked_image", f"data.labelled=[{lab / 'else' / 'labelled.zarr'}]").data
    with caplog.at_level(logging.WARNING):
        find_left_out(SliceStore.open(lab / "many.zarr"), open_labelled(data))
    assert "matched by their voxels only. Build both stores in one folder" in caplog.text


def test_finetune__leak_refusal_names_the_command_that_leaves_patients_out(lab):
    base = lab / "sam.safetensors"
    save_sam(make_sam(dataclasses.replace(TINY_VIT, neck_dim=32), image_size=32), base)
    path = run(lab, "all", "masked_image", f"data.store={lab / 'many.zarr'}", f"model.base={base}")
    labelled = SliceStore.open(lab / "labelled.zarr")
    seen = set(Card.read(path / "encoder" / "card.json").data_manifest["patient_ids"])
    assert seen & set(make_split(labelled).held_out)
    layer = {
        "modality": "mri",
        "data": {"store": str(labelled.path)},
        "model": {"ckpt": str(path), "base": str(base)},
        "trainer": {"max_steps": 1},
    }
    with pytest.raises(DataError) as refusal:
        prepare(load_config(FinetuneConfig, layers=[layer]))
    assert (
        f"samgraft pretrain --data {lab / 'many.zarr'} --labelled {lab / 'labelled.zarr'} --name all-without "
        f"--model vit_t --method masked_image --base {base}" in in_typed_grammar(refusal.value.render())
    )


def resolved(lab, *more):
    typed = TypedSettings(overrides=("model.base=random", *settings(lab, *more)))
    return resolve(typed, has_gpu=False)[0]


def test_prepare__linear_probe_takes_the_labelled_store_unless_it_is_switched_off(lab):
    store = str(lab / "labelled.zarr")
    assert resolved(lab).probe.store == store
    assert open_probe_store(resolved(lab, "probe.store=off").probe) is None
    assert resolved(lab, f"probe.store={lab / 'other.zarr'}").probe.store == str(lab / "other.zarr")


def test_prepare__linear_probe_takes_the_first_store_with_labels_to_fit_and_to_score(lab):
    """A store of test patients only, and one without labels, say nothing about the encoder."""
    make_store(lab, num_patients=3, shape_zyx=(4, 24, 20), seed=9, name="site.zarr")
    site = SliceStore.open(lab / "site.zarr")
    split = make_split(site, fractions=(0, 0, 1))
    split.save(default_split_path(site.path))
    unusable = [str(site.path), str(lab / "many.zarr")]
    assert resolved(lab, f"data.labelled=[{','.join(unusable)}]").probe.store is None
    stores = [*unusable, str(lab / "labelled.zarr")]
    assert resolved(lab, f"data.labelled=[{','.join(stores)}]").probe.store == stores[-1]
