"""Embedding cache, its exactness, its verification, its key and its size on disk."""

import dataclasses
import json
import pickle

import pytest
import torch
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.embedding_cache import CacheType, EmbeddingCache, EmbeddingMemory, RecordShape
from samgraft.finetune.training.cached_slices import CachedSlices, collate_cached, fill_cache, plan_cache
from samgraft.finetune.training.preparation import prepare, use_cached_embeddings
from samgraft.shared.cli import main
from samgraft.shared.config import load_config
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.samples.dataset import batch_to_input, collate_slices
from samgraft.shared.scans.intensity import IntensityKind, IntensityPreset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device
from store_factory import make_store
from tiny_sams import tiny_sam

SHAPE = RecordShape(maps=((4, 3, 3),), image_size=8, dtype=CacheType.FP16)
DEVICE = choose_device("cpu", precision="fp32")


def embeddings(count, *, scale=1.0, seed=0):
    return scale * torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def labels(count):
    return torch.randint(0, 3, (count, 8, 8), generator=torch.Generator().manual_seed(9))


def filled(folder, *, count=5, facts=None, scale=1.0, shape=SHAPE):
    cache = EmbeddingCache(folder, shape, num_records=count, facts=facts or {"encoder": "a"})
    values, ids = embeddings(count, scale=scale), labels(count)
    # Further maps of a record have the same values, with more rows.
    finer = tuple(embeddings(count, scale=scale, seed=i).repeat(1, 1, 2, 2) for i in range(1, len(shape.maps)))
    features = ImageFeatures(values, finer)

    def batches(first):
        for start in range(first, count, 2):
            yield features.of_images(slice(start, start + 2)), ids[start : start + 2]

    cache.fill(batches)
    return cache, values, ids


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
@pytest.mark.parametrize(("dtype", "bound"), [(CacheType.FP16, 2**-11), (CacheType.BF16, 2**-8)])
def test_cache_read__embedding_is_exact_to_the_formats_precision(tmp_path, dtype, bound, scale):
    shape = dataclasses.replace(SHAPE, dtype=dtype)
    cache, values, ids = filled(tmp_path, scale=scale, shape=shape)
    for record in (4, 0, 2):
        [embedding], label = cache.read(record)
        assert torch.equal(label, ids[record])
        largest = values[record].abs().max()
        assert ((embedding - values[record]).abs() <= bound * values[record].abs() + 1e-6 * largest).all()
    assert (cache.path / "embeddings.bin").stat().st_size == 5 * 2 * 4 * 3 * 3
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.read(3)[0][0], cache.read(3)[0][0])


def test_cache_read__finer_maps_follow_the_embedding(tmp_path):
    shape = dataclasses.replace(SHAPE, maps=((4, 3, 3), (4, 6, 6)))
    cache, values, _ = filled(tmp_path, shape=shape)
    (embedding, finer), _ = cache.read(2)
    torch.testing.assert_close(embedding, values[2], atol=1e-3, rtol=2**-11)
    torch.testing.assert_close(finer, embeddings(5, seed=1)[2].repeat(1, 2, 2), atol=1e-3, rtol=2**-11)
    assert (cache.path / "embeddings.bin").stat().st_size == 5 * 2 * (4 * 9 + 4 * 36)


def test_cache_fill__resumed_after_a_kill_gives_the_same_bytes(tmp_path):
    whole, values, ids = filled(tmp_path / "whole")
    cache = EmbeddingCache(tmp_path / "cut", SHAPE, num_records=5, facts={"encoder": "a"})
    firsts = []

    def dying(first):
        firsts.append(first)
        yield ImageFeatures(values[:2]), ids[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(dying)
    with (cache.path / "embeddings.bin").open("ab") as file:
        file.write(b"half a record")  # what a kill between two writes leaves
    with (cache.path / "index.jsonl").open("a") as file:
        file.write("[0, 12")
    assert not cache.is_complete

    def rest(first):
        firsts.append(first)
        yield ImageFeatures(values[first:]), ids[first:]

    cache.fill(rest)
    assert firsts == [0, 2]
    for name in ("embeddings.bin", "labels.bin", "index.jsonl", "complete.json"):
        assert (cache.path / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.mark.parametrize("name", ["embeddings.bin", "labels.bin"])
def test_cache_read__flipped_bit_is_refused(tmp_path, name):
    cache, _, _ = filled(tmp_path)
    data = bytearray((cache.path / name).read_bytes())
    data[-1] ^= 1
    (cache.path / name).write_bytes(data)
    assert cache.read(0)
    with pytest.raises(DataError, match="record 4 of the embedding cache is damaged"):
        cache.read(4)


def test_cache_read__changed_index_or_facts_are_refused(tmp_path):
    cache, _, _ = filled(tmp_path)
    (cache.path / "facts.json").write_text(json.dumps({"encoder": "b"}))
    with pytest.raises(DataError, match="belongs to another encoder"):
        cache.read(0)
    cache, _, _ = filled(tmp_path / "second")
    (cache.path / "index.jsonl").write_text((cache.path / "index.jsonl").read_text().replace("0", "1", 1))
    with pytest.raises(DataError, match="its index or its size differs"):
        cache.read(0)


def test_check_disk__too_little_space_is_refused_before_writing(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path, SHAPE, num_records=1000, facts={})
    need = cache.check_disk()
    assert need >= 1000 * SHAPE.embedding_bytes
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": need - 1})())
    with pytest.raises(StorageError, match="embedding cache needs"):
        cache.check_disk()
    assert list(tmp_path.iterdir()) == []


def test_cache_fill__nan_is_refused(tmp_path):
    cache = EmbeddingCache(tmp_path, SHAPE, num_records=1, facts={})
    with pytest.raises(DataError, match="has NaN or Inf"):
        cache.fill(lambda first: iter([(ImageFeatures(torch.full((1, 4, 3, 3), float("nan"))), labels(1))]))


def test_embedding_memory__batch_is_computed_once_within_the_limit():
    calls = []

    def embed(images):
        calls.append(len(images))
        return ImageFeatures(images * 2, (images * 3,))

    first, second = torch.rand(2, 1, 4, 4), torch.rand(3, 1, 4, 4)
    memory = EmbeddingMemory(limit_bytes=2 * 2 * 16 * 4)
    for images in (first, second, first, second):
        embeddings, [finer] = memory.lookup(images, embed)
        assert torch.equal(embeddings, images * 2)
        assert torch.equal(finer, images * 3)
    assert calls == [2, 3, 3]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    store = make_store(root, num_patients=5, shape_zyx=(4, 24, 24))
    write_tensors(root / "base.safetensors", dict(tiny_sam("vit_t").state_dict()))
    return root, store


def config_for(place, **settings):
    root, store = place
    values = {
        "modality": "mri",
        "data": {"store": str(store), "batch_size": 3, "foreground_fraction": 0.8},
        "model": {"ckpt": str(root / "base.safetensors"), "image_size": 32},
        "adapter": {"scope": "decoder", "r": 2},
        "trainer": {"max_steps": 2, "device": "cpu"},
        "cache": {"variants": 2},
    }
    return load_config(FinetuneConfig, layers=[values, settings])


def test_cached_slices__equal_the_encoders_embeddings(place):
    config = config_for(place)
    prepared = prepare(config)
    cached_run = use_cached_embeddings(prepared, config, DEVICE)
    cached = cached_run.dataset
    assert isinstance(cached, CachedSlices)
    assert len(cached) == len(prepared.dataset)
    assert len(cached.unique) < len(cached)  # foreground slices are repeated, not their embeddings
    assert cached.cache.num_records == 2 * len(cached.unique)

    shown = [cached[3, counter] for counter in range(6)]
    distinct = {sample["maps"][0].sum().item() for sample in shown}
    assert len(distinct) == 2
    position = prepared.dataset.slices.index(prepared.dataset.slices[3])
    unique = cached.unique.index(prepared.dataset.slices[3])
    for variant in (0, 1):
        record = 2 * unique + variant
        batch = collate_slices([prepared.dataset[position, record]])
        images, ids, _ = batch_to_input(batch, image_size=32, keep_aspect=True, device="cpu")
        [embedding], label = cached.cache.read(record)
        with torch.no_grad():
            expected = prepared.segmenter.eval().embed(images).embeddings[0]
        torch.testing.assert_close(embedding, expected, atol=2e-3, rtol=2e-3)
        assert torch.equal(label, ids[0])
    batch = collate_cached(shown[:2])
    assert batch["features"].embeddings.shape == (2, 16, 8, 8)
    assert batch["labels_NSS"].shape == (2, 32, 32)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"cache": {"variants": 3}},
        {"cache": {"dtype": "bf16"}},
        {"data": {"augment": {"max_rotation_deg": 5.0}}},
        {"data": {"keep_aspect": False}},
        {"model": {"image_size": 64}},
    ],
    ids=str,
)
def test_plan_cache__another_setting_has_another_key(place, change):
    def key(config):
        prepared = prepare(config)
        return plan_cache(prepared.dataset, prepared.segmenter, config, precision="32-true")[0].key

    assert key(config_for(place)) == key(config_for(place))
    assert key(config_for(place, **change)) != key(config_for(place))


def test_plan_cache__other_weights_precision_or_intensity_have_another_key(place):
    config = config_for(place)
    prepared = prepare(config)
    keys = [plan_cache(prepared.dataset, prepared.segmenter, config, precision=p)[0].key for p in ("32-true", "bf16")]
    with torch.no_grad():
        prepared.segmenter.sam.image_encoder.neck[0].weight.mul_(1.001)
    keys.append(plan_cache(prepared.dataset, prepared.segmenter, config, precision="32-true")[0].key)
    prepared.dataset.intensity = IntensityPreset(kind=IntensityKind.WINDOW, window_center=50.0, window_width=100.0)
    keys.append(plan_cache(prepared.dataset, prepared.segmenter, config, precision="32-true")[0].key)
    assert len(set(keys)) == 4


def test_fill_cache__second_run_computes_nothing(place, caplog):
    config = config_for(place)
    caplog.set_level("INFO")
    prepared = prepare(config)
    cache, cached = plan_cache(prepared.dataset, prepared.segmenter, config, precision="32-true")
    fill_cache(cached, prepared.dataset, prepared.segmenter, config, DEVICE)
    caplog.clear()
    prepared.segmenter.sam.image_encoder.forward = None  # would fail
    fill_cache(cached, prepared.dataset, prepared.segmenter, config, DEVICE)
    assert f"all {cache.num_records} are cached" in caplog.text


def test_fill_cache__encoder_is_in_eval_mode_and_gets_its_mode_back(place, tmp_path, monkeypatch):
    config = config_for(place, cache={"variants": 1, "folder": str(tmp_path)})
    prepared = prepare(config)
    encoder, embed, modes = prepared.segmenter.sam.image_encoder, prepared.segmenter.embed, set()
    encoder.train()

    def recorded(images):
        modes.add((encoder.training, torch.is_grad_enabled()))
        return embed(images)

    monkeypatch.setattr(prepared.segmenter, "embed", recorded)
    _, cached = plan_cache(prepared.dataset, prepared.segmenter, config, precision="32-true")
    fill_cache(cached, prepared.dataset, prepared.segmenter, config, DEVICE)
    assert modes == {(False, False)}
    assert encoder.training


def test_fill_cache__several_processes_are_refused(place, monkeypatch):
    config = config_for(place, seed=11)
    prepared = prepare(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="filled by one process"):
        use_cached_embeddings(prepared, config, DEVICE)


def test_dry_run__prints_size_of_embeddings_and_trained_tensors(place, monkeypatch, capsys, tmp_path):
    root, store = place
    monkeypatch.chdir(tmp_path)
    arguments = [
        "finetune", "--ckpt", str(root / "base.safetensors"), "--data", str(store), "--dry-run", "--debug",
        "--preset", "cpu",
        "adapter.scope=decoder", "adapter.r=2", "cache.variants=3", "data.batch_size=2", "model.image_size=32",
        f"cache.folder={tmp_path / 'embeddings'}",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr()
    text = " ".join((shown.out + shown.err).split())
    assert "slices x 3 variants, 0.00 GB, 0.00 GB of it to compute and write" in text
    assert "mask_decoder.transformer.layers.*.self_attn.q_proj.lora_A.weight" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scope", ["encoder_decoder", "neck_decoder"])
def test_cache_config__encoder_that_trains_is_refused(place, scope):
    with pytest.raises(UsageError, match=r"cache\.variants needs adapter\.scope=decoder"):
        config_for(place, adapter={"scope": scope})


def test_finetune__cached_embeddings_give_a_finished_model(place, monkeypatch, capsys, tmp_path):
    root, store = place
    monkeypatch.chdir(tmp_path)
    arguments = [
        "finetune", "--ckpt", str(root / "base.safetensors"), "--data", str(store), "--name", "cached",
        "--preset", "cpu", "adapter.scope=decoder", "adapter.r=2", "cache.variants=1", "trainer.max_steps=3",
        "data.batch_size=2", "model.image_size=32", "watch.validate_every_n_steps=2", "watch.num_overlays=1",
        f"cache.folder={tmp_path / 'embeddings'}", "optim.warmup_steps=1",
    ]  # fmt: skip
    assert main(arguments) == 0
    run = tmp_path / "runs" / "cached"
    assert (run / "model" / "sam.safetensors").is_file()

    # The log has one line per part; every trained tensor is in run.json and in the report.
    shown = capsys.readouterr()
    text = " ".join((shown.out + shown.err).split())
    groups = json.loads((run / "run.json").read_text())["trains"]
    number, parameters = (sum(group[key] for group in groups) for key in ("tensors", "parameters"))
    assert f"mask_decoder {parameters / 1e6:.3f} of " in text
    assert f"in {number} tensors" in text
    assert "image_encoder frozen, " in text
    assert "all trained tensors: runs/cached/run.json" in text
    name = "mask_decoder.transformer.layers.*.self_attn.q_proj.lora_A.weight"
    assert name in {group["name"] for group in groups}
    assert name not in text
    report = (run / "report.html").read_text()
    assert all(group["name"] in report for group in groups)
    (folder,) = (tmp_path / "embeddings").iterdir()
    assert (folder / "complete.json").is_file()
    assert SliceStore.open(store).fingerprint in (folder / "facts.json").read_text()
    assert str(root) not in (folder / "facts.json").read_text()
