"""Training samples from the embedding cache, for runs in which only the decoder trains.

Shape letters: N = samples; C, h, w = channels and grid of an embedding; S = side of the encoder's input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.embedding_cache import EmbeddingCache, RecordShape
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.config import config_to_dict
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.sam import feature_shapes, feature_tensors
from samgraft.shared.errors import UsageError
from samgraft.shared.runs.environment import processes_expected
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.sampler import sample_generator
from samgraft.shared.store.files import is_address
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.weights.save import tensors_sha256
from torch import Tensor
from torch.utils.data import Dataset

log = logging.getLogger(__name__)


class CachedSample(TypedDict):
    """One sample of the decoder's training."""

    maps: list[Tensor]
    """Image embedding (C, h, w) and finer maps after it, float32."""
    label: Tensor
    """Label ids (S, S), int64."""
    sample_counter: int


class CachedBatch(TypedDict):
    """Samples of one batch."""

    features: ImageFeatures
    labels_NSS: Tensor
    sample_counter: Tensor


class CachedSlices(Dataset[CachedSample]):
    """Slices of a dataset as embeddings. The sample counter alone decides which variant of a slice is returned."""

    def __init__(self, dataset: SliceDataset, cache: EmbeddingCache, *, variants: int) -> None:
        self.cache = cache
        self.variants = variants
        self.seed = dataset.seed
        # The dataset lists slices with foreground several times. Their embeddings are stored once.
        self.unique = tuple(dict.fromkeys(dataset.slices))
        position = {ref: index for index, ref in enumerate(self.unique)}
        self._unique_of = [position[ref] for ref in dataset.slices]

    def __len__(self) -> int:
        return len(self._unique_of)

    def __getitem__(self, item: tuple[int, int]) -> CachedSample:
        index, sample_counter = item
        # Not drawn from a running generator: a resumed run must read the same variant for the same sample.
        variant = int(sample_generator(self.seed, sample_counter).integers(self.variants))
        maps, label = self.cache.read(self._unique_of[index] * self.variants + variant)
        return {"maps": maps, "label": label, "sample_counter": sample_counter}


def collate_cached(samples: Sequence[CachedSample]) -> CachedBatch:
    """Stack samples, which are of equal size."""
    embeddings, *high_res = (torch.stack(one) for one in zip(*(sample["maps"] for sample in samples), strict=True))
    return {
        "features": ImageFeatures(embeddings, tuple(high_res)),
        "labels_NSS": torch.stack([sample["label"] for sample in samples]),
        "sample_counter": torch.tensor([sample["sample_counter"] for sample in samples]),
    }


def plan_cache(
    dataset: SliceDataset, segmenter: Segmenter, config: FinetuneConfig, *, precision: str
) -> tuple[EmbeddingCache, CachedSlices]:
    """Return the cache of a run, filled or not, and its dataset. Nothing is computed.

    Raises:
        UsageError: If the store is not on this machine and ``cache.folder`` is not set.
    """
    spec = segmenter.sam.image_encoder.spec
    size = segmenter.image_size
    maps = tuple(feature_shapes(segmenter.sam))
    shape = RecordShape(maps=maps, image_size=size, dtype=config.cache.dtype)
    unique = tuple(dict.fromkeys(dataset.slices))
    # Everything that changes an embedding or a label must be listed here, or a run would read those of another one.
    facts = {
        "schema": 1,
        "encoder": tensors_sha256(feature_tensors(segmenter.sam)),
        "pixels": [list(spec.pixel_mean), list(spec.pixel_std)],
        "store": dataset.store.fingerprint,
        "slices": [[ref.series_id, ref.slice_index, ref.plane.value if ref.plane else None] for ref in unique],
        "intensity": dataset.intensity.to_dict(),
        "augment": config_to_dict(config.data.augment),
        "neighbours": dataset.num_neighbours,
        "seed": dataset.seed,
        "image_size": size,
        "keep_aspect": config.data.keep_aspect,
        "variants": config.cache.variants,
        "dtype": config.cache.dtype.value,
        # bf16 autocast gives other embeddings than float32.
        "precision": precision,
    }
    number = len(unique) * config.cache.variants
    cache = EmbeddingCache(_folder(config), shape, num_records=number, facts=facts)
    return cache, CachedSlices(dataset, cache, variants=config.cache.variants)


def fill_cache(
    cached: CachedSlices, dataset: SliceDataset, segmenter: Segmenter, config: FinetuneConfig, device: DeviceChoice
) -> None:
    """Run the encoder on every slice and variant that is not cached yet.

    Raises:
        StorageError: If the disk is too small. Nothing is computed then.
        UsageError: If several processes would fill the same files.
    """
    cache = cached.cache
    if cache.is_complete:
        log.info("embeddings: all %d are cached (%s)", cache.num_records, cache.path.name)
        return
    # The index is written in the order of the records, which several writers could not keep.
    if processes_expected() > 1:
        raise UsageError(
            f"an embedding cache is filled by one process, got {processes_expected()}. Run the command once without "
            "torchrun or srun, with trainer.devices=1, and stop it when training begins."
        )
    need = cache.check_disk()
    log.info(
        "embeddings: %d slices x %d variants, %.2f GB to compute (%s)",
        len(cached.unique),
        cached.variants,
        need / 1e9,
        cache.path.name,
    )
    encoder = segmenter.sam.image_encoder
    # In eval mode: dropout or batch statistics would make an embedding depend on the batch that it is computed in.
    was_training = encoder.training
    segmenter.to(device.torch_device)
    encoder.eval()
    try:
        cache.fill(lambda first: _embedded(cached, dataset, segmenter, config, device, first=first))
    finally:
        encoder.train(was_training)


def _embedded(
    cached: CachedSlices,
    dataset: SliceDataset,
    segmenter: Segmenter,
    config: FinetuneConfig,
    device: DeviceChoice,
    *,
    first: int,
) -> Iterator[tuple[ImageFeatures, Tensor]]:
    """Yield features and labels in the order of the records, from record ``first`` on."""
    plain = SliceDataset(
        dataset.store,
        cached.unique,
        intensity=dataset.intensity,
        augment=dataset.augment,
        seed=dataset.seed,
        with_label=True,
        num_neighbours=dataset.num_neighbours,
    )
    total = len(cached.unique) * cached.variants
    half = device.precision != "32-true"
    for start in range(first, total, config.data.batch_size):
        records = range(start, min(start + config.data.batch_size, total))
        # The number of the record is its sample counter, so every variant of a slice has its own augmentation.
        batch = collate_slices([plain[record // cached.variants, record] for record in records])
        images, labels, _ = batch_to_input(
            batch, image_size=segmenter.image_size, keep_aspect=config.data.keep_aspect, device=device.torch_device
        )
        assert labels is not None
        with torch.no_grad(), torch.autocast(device.torch_device.type, dtype=torch.bfloat16, enabled=half):
            features = segmenter.embed(images)
        yield features, labels
        done = records[-1] + 1
        if done * 10 // total > start * 10 // total:
            log.info("embeddings: %d of %d", done, total)


def _folder(config: FinetuneConfig) -> Path:
    if config.cache.folder:
        return Path(config.cache.folder)
    if is_address(config.data.store):
        raise UsageError(
            "cache.folder is not set, and the store is not on this machine. Set it to a local folder for embeddings.",
            where="cache.folder",
        )
    store = Path(config.data.store)
    return store.with_name(store.name.removesuffix(".zarr") + ".embeddings")
