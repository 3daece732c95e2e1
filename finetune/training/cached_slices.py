"""Training slices whose embeddings are on disk: what the loader gives when only the decoder trains.

Shape letters: N = samples; C, h, w = channels and grid of an embedding; S = side of the encoder's input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.embedding_cache import EmbeddingCache, EmbeddingMemory, RecordShape
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.config import config_to_dict
from samgraft.shared.errors import UsageError
from samgraft.shared.runs.environment import processes_expected
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.sampler import sample_generator
from samgraft.shared.store.files import is_address
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.weights.save import tensors_sha256
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from samgraft.finetune.training.preparation import Prepared

log = logging.getLogger(__name__)


class CachedSample(TypedDict):
    """One sample as the decoder needs it."""

    embedding: Tensor
    """(C, h, w) float32."""
    label: Tensor
    """(S, S) int64 label ids."""
    sample_counter: int


class CachedBatch(TypedDict):
    """Samples of one batch."""

    embeddings_NChw: Tensor
    labels_NSS: Tensor
    sample_counter: Tensor


class CachedSlices(Dataset[CachedSample]):
    """The slices of a dataset by their embeddings; which variant is shown depends on the sample counter alone."""

    def __init__(self, dataset: SliceDataset, cache: EmbeddingCache, *, variants: int) -> None:
        self.cache = cache
        self.variants = variants
        self.seed = dataset.seed
        # Slices with foreground stand in the list several times; their embeddings do not.
        self.unique = tuple(dict.fromkeys(dataset.slices))
        position = {ref: index for index, ref in enumerate(self.unique)}
        self._unique_of = [position[ref] for ref in dataset.slices]

    def __len__(self) -> int:
        return len(self._unique_of)

    def __getitem__(self, item: tuple[int, int]) -> CachedSample:
        index, sample_counter = item
        variant = int(sample_generator(self.seed, sample_counter).integers(self.variants))
        embedding, label = self.cache.read(self._unique_of[index] * self.variants + variant)
        return {"embedding": embedding, "label": label, "sample_counter": sample_counter}


def collate_cached(samples: Sequence[CachedSample]) -> CachedBatch:
    """Stack samples, which have one size."""
    return {
        "embeddings_NChw": torch.stack([sample["embedding"] for sample in samples]),
        "labels_NSS": torch.stack([sample["label"] for sample in samples]),
        "sample_counter": torch.tensor([sample["sample_counter"] for sample in samples]),
    }


def plan_cache(
    dataset: SliceDataset, segmenter: Segmenter, config: FinetuneConfig, *, precision: str
) -> tuple[EmbeddingCache, CachedSlices]:
    """Return the cache that belongs to a run, filled or not; nothing is computed.

    Raises:
        UsageError: If there is no place for it.
    """
    spec = segmenter.sam.image_encoder.spec
    size = segmenter.image_size
    grid = size // spec.stride
    shape = RecordShape(embedding_Chw=(spec.neck_dim, grid, grid), image_size=size, dtype=config.cache.dtype)
    unique = tuple(dict.fromkeys(dataset.slices))
    facts = {
        "schema": 1,
        "encoder": tensors_sha256(segmenter.sam.image_encoder.state_dict()),
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
        "precision": precision,
    }
    number = len(unique) * config.cache.variants
    cache = EmbeddingCache(_folder(config), shape, num_records=number, facts=facts)
    return cache, CachedSlices(dataset, cache, variants=config.cache.variants)


def embedding_lines(prepared: Prepared, config: FinetuneConfig, device: DeviceChoice) -> list[str]:
    """Return the pre-flight line on cached embeddings, counted before anything is written.

    Raises:
        StorageError: If the disk is too small.
    """
    if not config.cache.variants:
        return []
    assert isinstance(prepared.dataset, SliceDataset)
    cache, cached = plan_cache(prepared.dataset, prepared.segmenter, config, precision=device.precision)
    size = cache.num_records * cache.shape.expected_bytes / 1e9
    state = "all cached" if cache.is_complete else f"{cache.check_disk() / 1e9:.2f} GB of it to compute and write"
    return [f"embeddings: {len(cached.unique)} slices x {cached.variants} variants, {size:.2f} GB, {state}"]


def fill_cache(
    cached: CachedSlices, dataset: SliceDataset, segmenter: Segmenter, config: FinetuneConfig, device: DeviceChoice
) -> None:
    """Run the encoder over every slice and variant that is not cached yet.

    Raises:
        StorageError: If the disk is too small; nothing was computed then.
        UsageError: If several processes would fill the same files.
    """
    cache = cached.cache
    if cache.is_complete:
        log.info("embeddings: %d cached ones fit this run (%s)", cache.num_records, cache.path.name)
        return
    if processes_expected() > 1:
        raise UsageError(
            "an embedding cache must be filled by one process. Run the command once without torchrun or srun, with "
            "trainer.devices=1; stop it when training begins."
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
    was_training = encoder.training
    segmenter.to(device.torch_device)
    encoder.eval()
    try:
        cache.fill(lambda first: _embedded(cached, dataset, segmenter, config, device, first=first))
    finally:
        encoder.train(was_training)


def use_cache(prepared: Prepared, config: FinetuneConfig, device: DeviceChoice) -> Prepared:
    """Return the run with what is known of its embeddings: the same, where the encoder trains."""
    if not config.freezes_encoder:
        return prepared
    if config.cache.validation_mb:
        prepared.segmenter.embedding_memory = EmbeddingMemory(limit_bytes=config.cache.validation_mb * 2**20)
    if not config.cache.variants:
        return prepared
    assert isinstance(prepared.dataset, SliceDataset)
    _, cached = plan_cache(prepared.dataset, prepared.segmenter, config, precision=device.precision)
    fill_cache(cached, prepared.dataset, prepared.segmenter, config, device)
    return replace(prepared, dataset=cached)


def _embedded(
    cached: CachedSlices,
    dataset: SliceDataset,
    segmenter: Segmenter,
    config: FinetuneConfig,
    device: DeviceChoice,
    *,
    first: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield embeddings and labels in the order of the records; each record has a sample counter of its own."""
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
        batch = collate_slices([plain[record // cached.variants, record] for record in records])
        images, labels, _ = batch_to_input(
            batch, image_size=segmenter.image_size, keep_aspect=config.data.keep_aspect, device=device.torch_device
        )
        assert labels is not None
        with torch.no_grad(), torch.autocast(device.torch_device.type, dtype=torch.bfloat16, enabled=half):
            embeddings = segmenter.embed(images)
        yield embeddings, labels
        done = records[-1] + 1
        if done * 10 // total > start * 10 // total:
            log.info("embeddings: %d of %d", done, total)


def _folder(config: FinetuneConfig) -> Path:
    if config.cache.folder:
        return Path(config.cache.folder)
    if is_address(config.data.store):
        raise UsageError(
            "cache.folder must say where embeddings lie when the store is not on this machine.", where="cache.folder"
        )
    store = Path(config.data.store)
    return store.with_name(store.name.removesuffix(".zarr") + ".embeddings")
