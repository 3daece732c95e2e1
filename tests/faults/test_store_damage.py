"""Damaged, crafted and unfinished stores are refused, and ``store check`` finds every damage."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys

import numpy as np
import pytest
import zarr
from samgraft.shared.cli import main
from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.check import check_store
from samgraft.shared.store.examine import BuildSettings, examine_case
from samgraft.shared.store.store import SliceStore
from store_factory import make_cases, make_scan, make_store, write_nifti

SETTINGS = BuildSettings(modality=Modality.MRI, salt="test")


@pytest.fixture
def store(tmp_path):
    return SliceStore.open(make_store(tmp_path, num_patients=2, shape_zyx=(70, 16, 16)))


def shards(store, name="image"):
    folder = store.path / "series" / store.series[0].series_id / name / "c"
    return sorted(p for p in folder.rglob("*") if p.is_file())


def metadata(store):
    return store.path / "series" / store.series[0].series_id / "image" / "zarr.json"


def rewrite_table(store, change):
    """Change records of the table and update its checksum, as an attacker would."""
    path = store.path / "manifest.json"
    values = json.loads(path.read_text())
    for record in values["series"]:
        change(record)
    path.write_text(json.dumps(values))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (store.path / "complete.json").write_text(json.dumps({"manifest_sha256": digest}))


def test_check_store__undamaged_store_has_no_problems(store, capsys):
    check = check_store(store.path)
    assert check.problems == []
    assert check.num_bytes == sum(p.stat().st_size for p in store.path.rglob("series/s_*/**/*") if p.is_file()) - sum(
        p.stat().st_size for p in store.path.rglob("record.json")
    )
    assert main(["store", "check", str(store.path)]) == 0
    assert "all bytes verified (2 series" in capsys.readouterr().err


def flipped_byte(store):
    data = bytearray(shards(store)[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards(store)[0].write_bytes(data)


def flipped_byte_of_label(store):
    data = bytearray(shards(store, "label")[0].read_bytes())
    data[10] ^= 1
    shards(store, "label")[0].write_bytes(data)


def deleted_shard(store):
    shards(store)[1].unlink()


def truncated_shard(store):
    shards(store)[0].write_bytes(shards(store)[0].read_bytes()[:-1])


def empty_shard(store):
    shards(store)[0].write_bytes(b"")


def added_file(store):
    (store.path / "series" / store.series[0].series_id / "note.txt").write_text("x")


def added_series(store):
    shutil.copytree(store.path / "series" / store.series[0].series_id, store.path / "series" / "s_unexpected")


def changed_metadata(store):
    metadata(store).write_text(metadata(store).read_text().replace("zstd", "gzip"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped_byte, r"image/c/0/0/0: sha256 differs, the file was changed"),
        (flipped_byte_of_label, r"label/c/0/0/0: sha256 differs"),
        (deleted_shard, r"image/c/1/0/0: missing"),
        (truncated_shard, r"image/c/0/0/0: must have \d+ bytes"),
        (empty_shard, r"must have \d+ bytes, got 0"),
        (added_file, "note.txt: not in the table"),
        (added_series, "s_unexpected: not in the table"),
        (changed_metadata, "image/zarr.json: sha256 differs"),
    ],
)
def test_check_store__damage_is_named(store, damage, message, capsys):
    damage(store)
    problems = check_store(store.path).problems
    assert len(problems) == 1
    assert re.search(message, problems[0])
    assert main(["store", "check", str(store.path)]) == 3
    assert "1 problem in 2 series" in capsys.readouterr().err


def test_read_slice__damaged_shard_index_is_refused(store):
    path = shards(store)[0]
    good = path.read_bytes()
    index = range(len(good) - (16 * 64 + 4), len(good))
    for place in list(index)[::37]:
        bad = bytearray(good)
        bad[place] ^= 4
        path.write_bytes(bad)
        with pytest.raises(DataError, match="checksum of the shard index"):
            SliceStore.open(store.path).read_slice(store.series[0].series_id, 5)


def test_check__truncated_scan_and_shifted_label_are_found_in_the_source(tmp_path, capsys):
    image, label = make_scan()
    source = tmp_path / "in"
    path = write_nifti(source / "a.nii.gz", image)
    write_nifti(source / "a_label.nii.gz", label)
    write_nifti(source / "b.nii.gz", image)
    shifted = np.array([[-1, 0, 0, 2.0], [0, -1, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])
    write_nifti(source / "b_label.nii.gz", label, affine=shifted)
    path.write_bytes(path.read_bytes()[:-30])
    assert main(["store", "check", str(source), "--workers", "1", "--report", str(tmp_path / "r.json")]) == 3
    text = capsys.readouterr().err
    assert "a.nii.gz: the gzip data is damaged or cut short" in text
    assert "b.nii.gz: image and label must lie on one grid: corners lie up to 2 mm apart" in text
    assert "2 of 2 cases are refused" in text
    assert set(json.loads((tmp_path / "r.json").read_text())["refused"]) == {"a.nii.gz", "b.nii.gz"}


def test_read_slice__missing_shard_is_refused_where_zarr_returns_zeros(store):
    deleted_shard(store)
    record = store.series[0]
    foreign = zarr.open_array(store.path / "series" / record.series_id / "image", mode="r")
    assert (np.asarray(foreign[69]) == 0).all()
    with pytest.raises(DataError, match="cannot be decoded"):
        store.read_slice(record.series_id, 69)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"int16"', '"object"', "numbers of 8 to 32 bits, got 'object'"),
        ('"int16"', '"complex64"', "numbers of 8 to 32 bits"),
        ('"zstd"', '"numcodecs.pickle"', "sharded zstd with checksum"),
        ('"sharding_indexed"', '"blosc"', "sharded zstd with checksum"),
        ('"checksum": true', '"checksum": false', "sharded zstd with checksum"),
        ('"zarr_format": 3', '"zarr_format": 2', "zarr format 3"),
        ("70,", "71,", r"shape \(70, 16, 16\)"),
        ('"shape"', '"sha"', "not those of a store"),
        ("{", "{{", "cannot be read"),
    ],
)
def test_read_slice__crafted_metadata_is_refused_before_decoding(store, old, new, message):
    path = metadata(store)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1) + " " * 0)
    rewrite_table(
        store,
        lambda record: (
            record["files"].update({"image/zarr.json": [path.stat().st_size, "0"]})
            if record["series_id"] == store.series[0].series_id
            else None
        ),
    )
    with pytest.raises(DataError, match=message):
        SliceStore.open(store.path).read_slice(store.series[0].series_id, 0)


def test_read_slice__implausibly_large_slices_are_refused_before_allocating(store):
    side = 400_000

    def enlarge(record):
        record["planes"]["axial"]["shape_zyx"] = [70, side, side]
        record["files"].pop("image/zarr.json")

    text = metadata(store).read_text().replace("16,", f"{side},").replace("16\n", f"{side}\n")
    metadata(store).write_text(text)
    rewrite_table(store, enlarge)
    with pytest.raises(DataError, match="implausibly large"):
        SliceStore.open(store.path).read_slice(store.series[0].series_id, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("planes"),
        lambda record: record.update(plane="diagonal"),
        lambda record: record.update(files=[1, 2]),
        lambda record: record["stats"].update(mean="bright"),
        lambda record: record["planes"]["axial"].update(shape_zyx=[70, 16]),
    ],
)
def test_open__table_of_another_program_is_refused(store, change):
    """Its checksum is right, so reading the values is the only check."""
    rewrite_table(store, change)
    with pytest.raises(DataError, match="table of series is invalid"):
        SliceStore.open(store.path)


@pytest.mark.parametrize("content", ["[1, 2]", "{}", "null", "not JSON"])
def test_open__table_without_records_is_refused(store, content):
    (store.path / "manifest.json").write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    (store.path / "complete.json").write_text(json.dumps({"manifest_sha256": digest}))
    with pytest.raises(DataError, match=r"table of series is (invalid|not JSON)"):
        SliceStore.open(store.path)


@pytest.mark.parametrize("make", ["v2", "v3", "zip", "empty"])
def test_open__zarr_of_other_programs_is_refused(tmp_path, make):
    path = tmp_path / "x.zarr"
    if make == "zip":
        path.write_bytes(b"PK\x05\x06" + b"\0" * 18)
    elif make == "empty":
        path.mkdir()
    else:
        zarr.create_array(path, shape=(2, 8, 8), dtype="u1", zarr_format=int(make[1]))
    with pytest.raises(DataError, match=r"is not a slice store|no completion mark"):
        SliceStore.open(path)


@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 1, 200), (2, 4, 17)])
def test_examine_case__small_slices_are_refused(tmp_path, shape):
    image = np.arange(np.prod(shape)).reshape(shape).astype(np.int16)
    cases = make_cases(tmp_path, num_patients=1, labelled=False)
    write_nifti(cases[0].scan.paths[0], image)
    with pytest.raises(DataError, match=r"sides of 8 to 16384 px"):
        examine_case(cases[0], SETTINGS)


def test_examine_case__extreme_aspect_ratio_is_kept(tmp_path):
    cases = make_cases(tmp_path, num_patients=1, labelled=False)
    image = np.arange(17 * 4096).reshape(1, 17, 4096).astype(np.int32)
    write_nifti(cases[0].scan.paths[0], image)
    examined = examine_case(cases[0], SETTINGS)
    np.testing.assert_array_equal(examined.images[examined.record.plane], image)


def test_examine_case__constant_scan_is_refused_with_its_value(tmp_path):
    cases = make_cases(tmp_path, num_patients=1, labelled=False)
    write_nifti(cases[0].scan.paths[0], np.full((4, 16, 16), 7, dtype=np.int16))
    with pytest.raises(DataError, match="must have contrast, every voxel is 7"):
        examine_case(cases[0], SETTINGS)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE with a catchable signal")
def test_build__full_disk_leaves_an_incomplete_store(tmp_path):
    cases = make_cases(tmp_path / "scans", num_patients=2, shape_zyx=(4, 64, 64))
    noise = np.random.default_rng(0).integers(0, 30000, size=(64, 64, 64)).astype(np.int16)
    write_nifti(cases[1].scan.paths[0], noise)
    write_nifti(cases[1].labels[0].scan.paths[0], (noise > 15000).astype(np.uint8))
    out = tmp_path / "s.zarr"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(StorageError, match="cannot be written") as caught:
            build_store(cases, out=out, settings=SETTINGS, label_names={1: "lesion"}, intensity=IntensityPreset())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "1 finished series; the store is marked incomplete" in caught.value.kept
    with pytest.raises(DataError, match="no completion mark"):
        SliceStore.open(out)
    report = build_store(cases, out=out, settings=SETTINGS, label_names={1: "lesion"}, intensity=IntensityPreset())
    assert report.num_kept == 1
    assert check_store(out).problems == []


def test_build__umask_decides_the_permissions(tmp_path):
    previous = os.umask(0o027)
    try:
        path = make_store(tmp_path, num_patients=1)
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in path.rglob("*") if p.is_file()}
    assert modes <= {0o640, 0o600}


def test_build__salt_is_private_and_beside_the_store(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii", make_scan()[0])
    for name in ("one", "two"):
        out = tmp_path / "data" / f"{name}.zarr"
        assert main(["store", "build", str(tmp_path / "in"), "--out", str(out), "--workers", "1"]) == 0
    salt = tmp_path / "data" / ".samgraft-salt"
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    ids = {SliceStore.open(tmp_path / "data" / f"{n}.zarr").patient_ids for n in ("one", "two")}
    assert len(ids) == 1
    for file in (tmp_path / "data").rglob("*.json"):
        assert salt.read_text() not in file.read_text()
