"""Finished fine-tuning of a tiny model on a small store, for evaluate and predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model_factory import make_sam, tiny_vit_t_spec
from samgraft.finetune.model_folder import write_model
from samgraft.finetune.task import Task
from samgraft.shared.samples.leaks import pretrain_manifest
from samgraft.shared.samples.split import Split, default_split_path, make_split
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.card import Card
from store_factory import make_store

SPEC = tiny_vit_t_spec()
IMAGE_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Folder with a store and a finished run."""

    root: Path
    store: SliceStore
    split: Split
    run: Path


def make_lab(root: Path, *, num_patients=6, shape_zyx=(4, 32, 32), log_images=False, seed=0, modality="mri") -> Lab:
    store = SliceStore.open(make_store(root, num_patients=num_patients, shape_zyx=shape_zyx, modality=modality))
    split = make_split(store, fractions=(0.4, 0.3, 0.3))
    run = root / "runs" / "seg"
    write_finished(run, store, split, seed=seed)
    (run / "config.yaml").write_text(
        f"data: {{store: '{store.path}'}}\nwatch: {{log_images: {str(log_images).lower()}}}\n"
    )
    split.save(default_split_path(store.path))
    return Lab(root=root, store=store, split=split, run=run)


def write_finished(run: Path, store: SliceStore, split: Split, *, seed=0) -> None:
    task = Task(
        class_ids=[1], class_names=["lesion"], modality=store.modality.value, image_size=IMAGE_SIZE, keep_aspect=True,
        intensity=store.intensity.to_dict(), store_fingerprint=store.fingerprint, split_sha256=split.sha256,
        split={"train": list(split.train), "val": list(split.val), "test": list(split.test)},
    )  # fmt: skip
    card = Card(
        arch=SPEC.arch, stem=SPEC.variant, image_size=IMAGE_SIZE, pixel_mean=list(SPEC.pixel_mean),
        pixel_std=list(SPEC.pixel_std), stage="model", data_manifest=pretrain_manifest(store, split.train),
    )  # fmt: skip
    write_model(make_sam(SPEC, image_size=IMAGE_SIZE, seed=seed), run / "model", card=card, task=task)
