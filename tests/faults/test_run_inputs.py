"""Tests that a resumed run uses the patients and files of its first session."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from model_factory import make_sam
from samgraft.shared.errors import DataError, StoppedAndSaved, UsageError
from samgraft.shared.samples.split import Split, default_split_path, make_split
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_sam
from samgraft.ssl.preflight import pretraining_split
from samgraft.ssl.pretrain import pretrain
from store_factory import make_store
from tiny_encoders import TINY_VIT
from tiny_pretrain import act_after, config_of, make_lab, make_labelled_store


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Make data, weights and a labelled store of other patients for the linear probe."""
    make_lab(tmp_path)
    save_sam(make_sam(dataclasses.replace(TINY_VIT, neck_dim=32), image_size=32), tmp_path / "sam.safetensors")
    make_labelled_store(tmp_path, seed=50)
    return tmp_path


def run_pretrain(lab: Path, *, dry_run: bool = False) -> Path:
    overrides = (f"model.base={lab / 'sam.safetensors'}", f"probe.store={lab / 'labelled.zarr'}")
    config = config_of(lab, "masked_image", *overrides, "probe.every_n_steps=2", "probe.num_train_slices=2")
    weights = pretrain(config, name="run", runs=lab / "runs", device=choose_device("cpu"), dry_run=dry_run)
    assert weights is not None
    return weights


def stop_half_way(lab: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        act_after(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(StoppedAndSaved):
            run_pretrain(lab)


def make_other_split(store: SliceStore, kept: Split) -> Split:
    """Return a split that trains on other patients."""
    for seed in range(50):
        split = make_split(store, fractions=(0.5, 0.25, 0.25), seed=seed)
        if set(split.train) - set(kept.train):
            return split
    raise AssertionError("every seed gives the same patients")


@pytest.mark.parametrize("finished", [False, True])
def test_split__made_next_to_the_store_later_changes_neither_patients_nor_card(lab: Path, finished: bool) -> None:
    store = SliceStore.open(lab / "store.zarr")
    _ = run_pretrain(lab) if finished else stop_half_way(lab)
    kept = json.loads((lab / "runs" / "run" / "split.json").read_text())["train"]
    drawn = pretraining_split(config_of(lab, "masked_image").data, store, seed=0)
    assert kept == list(drawn.train)
    make_other_split(store, drawn).save(default_split_path(store.path))
    card = Card.read(run_pretrain(lab).with_name("card.json"))
    assert card.data_manifest["patient_ids"] == sorted(kept)
    assert json.loads((lab / "runs" / "run" / "split.json").read_text())["train"] == kept


def test_store__replaced_by_another_is_refused(lab: Path) -> None:
    stop_half_way(lab)
    shutil.rmtree(lab / "store.zarr")
    make_store(lab, num_patients=4, shape_zyx=(4, 24, 20), labelled=False, seed=9)
    with pytest.raises(DataError, match="are not those that the run was started with") as refusal:
        run_pretrain(lab)
    assert refusal.value.kept == "the run, unchanged"


def test_base__replaced_by_another_file_is_refused(lab: Path) -> None:
    stop_half_way(lab)
    spec = dataclasses.replace(TINY_VIT, neck_dim=32)
    save_sam(make_sam(spec, image_size=32, seed=7), lab / "sam.safetensors")
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"the base is not the one that the run was started with \("):
            run_pretrain(lab, dry_run=dry_run)


def test_probe__with_another_store_or_split_is_refused(lab: Path) -> None:
    stop_half_way(lab)
    make_labelled_store(lab, seed=80)
    with pytest.raises(UsageError, match=r"the probe store is not the one that the run was started with \("):
        run_pretrain(lab)
    make_labelled_store(lab, seed=50)
    values = json.loads((lab / "labelled.split.json").read_text())
    parts = {"train": tuple(values["val"][:1]), "val": tuple(values["val"][1:]), "test": ()}
    Split(**parts, seed=0, store_fingerprint=values["store_fingerprint"]).save(lab / "labelled.split.json")
    with pytest.raises(UsageError, match=r"the probe split is not the one that the run was started with \("):
        run_pretrain(lab)
    assert json.loads((lab / "runs" / "run" / "run.json").read_text())["probe_split_sha256"] == values["sha256"]


def test_split__with_a_damaged_copy_is_refused(lab: Path) -> None:
    stop_half_way(lab)
    (lab / "runs" / "run" / "split.json").write_text("{")
    with pytest.raises(DataError, match="split file is damaged") as refusal:
        run_pretrain(lab)
    assert refusal.value.where == "run/split.json"
