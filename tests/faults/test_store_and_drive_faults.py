"""Failing drives, zarr of other programs, crafted chunks, and two processes on one store."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import samgraft.shared.files as files
import zarr
from samgraft.shared.cli import main
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.scans.file_index import index_files
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from store_factory import make_cases, make_scan, make_store, write_nifti

SETTINGS = BuildSettings(modality=Modality.MRI, salt="test")


def build(cases, out, **options):
    return build_store(
        cases, out=out, settings=SETTINGS, label_names={1: "lesion"}, intensity=IntensityPreset(), **options
    )


# Drives that fail for a while or permanently -----------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """Make reads raise an error a number of times, and return the list of attempts."""
    monkeypatch.setattr(files, "FIRST_WAIT_S", 0.0)
    tried = []

    def install(code, times, suffix):
        read_bytes, pread = Path.read_bytes, os.pread

        def fail(name):
            tried.append(name)
            if len(tried) <= times:
                raise OSError(code, os.strerror(code))

        def failing_read(self):
            if self.name.endswith(suffix):
                fail(self.name)
            return read_bytes(self)

        def failing_pread(descriptor, length, start):
            if suffix == "shard":
                fail("shard")
            return pread(descriptor, length, start)

        monkeypatch.setattr(Path, "read_bytes", failing_read)
        monkeypatch.setattr(os, "pread", failing_pread)
        return tried

    return install


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_build_store__source_on_a_failing_drive_is_read_again(tmp_path, failing, code):
    cases = make_cases(tmp_path / "in", num_patients=2)
    tried = failing(code, 2, "case00_0.nii.gz")
    assert len(build(cases, tmp_path / "s.zarr").records) == 2
    assert len(tried) >= 3


def test_build_store__source_on_a_dead_drive_gives_exit_code_5(tmp_path, failing):
    cases = make_cases(tmp_path / "in", num_patients=2, labelled=False)
    failing(errno.EIO, 10**6, "case01_0.nii.gz")
    with pytest.raises(StorageError, match=r"does not respond after 4 attempts") as caught:
        build(cases, tmp_path / "s.zarr")
    assert caught.value.exit_code == 5
    with pytest.raises(DataError, match="no completion mark"):
        SliceStore.open(tmp_path / "s.zarr")


def test_build_store__permanent_errors_are_not_retried(tmp_path, failing):
    cases = make_cases(tmp_path / "in", num_patients=1, labelled=False)
    tried = failing(errno.EACCES, 10**6, "case00_0.nii.gz")
    with pytest.raises(DataError, match="Permission denied"):
        build(cases, tmp_path / "s.zarr")
    assert len(tried) == 1


def test_read_slice__store_on_a_failing_drive_is_read_again(tmp_path, failing):
    store = SliceStore.open(make_store(tmp_path, num_patients=1))
    series_id = store.series[0].series_id
    expected = store.read_slice(series_id, 2)
    failing(errno.ESTALE, 2, "shard")
    np.testing.assert_array_equal(SliceStore.open(store.path).read_slice(series_id, 2), expected)
    failing(errno.ESTALE, 10**6, "shard")
    with pytest.raises(StorageError, match="after 4 attempts"):
        SliceStore.open(store.path)


# Zarr of other programs --------------------------------------------------------------------------------------------


def foreign_zarr(path, *, zarr_format=3, attributes=None, axes=(0, 1, 2)):
    """Write a volume whose air half has no chunks, with its axes in any order, as other programs do."""
    volume = make_scan(shape_zyx=(4, 16, 12))[0]
    volume[:2] = 0
    volume = volume.transpose(axes)
    array = zarr.create_array(
        path, shape=volume.shape, dtype=volume.dtype, chunks=(1, *volume.shape[1:]), fill_value=0,
        zarr_format=zarr_format, attributes=attributes or {},
    )  # fmt: skip
    array[...] = volume
    return path


OME = {"ome": {"multiscales": [{"axes": [{"name": "z", "unit": "micrometer"}], "datasets": []}]}}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="absent chunks"),
        pytest.param({"zarr_format": 2}, id="format 2"),
        pytest.param({"axes": (2, 1, 0)}, id="order xyz"),
        pytest.param({"attributes": OME}, id="scale missing"),
    ],
)
def test_store_command__foreign_zarr_is_refused(tmp_path, capsys, options):
    """Absent chunks may be lost or zero, and axes may be in any order, so such a file is no source and no store."""
    path = foreign_zarr(tmp_path / "scans.zarr", **options)
    for arguments in (["build", str(path), "--out", str(tmp_path / "out.zarr")], ["check", str(path)]):
        assert main(["store", *arguments]) == 3
        shown = capsys.readouterr().err
        assert "its axes are not named" in shown or "is not a slice store" in shown
    with pytest.raises(DataError, match="is not a slice store"):
        SliceStore.open(path)
    assert not (tmp_path / "out.zarr").exists()


def test_index_files__zarr_among_scans_is_counted_once(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii", make_scan()[0])
    foreign_zarr(tmp_path / "in" / "b.zarr")
    foreign_zarr(tmp_path / "in" / "deep" / "c", zarr_format=2)
    index = index_files(tmp_path / "in")
    assert [path.name for path in index.files] == ["a.nii"]
    (reason,) = [reason for reason in index.left_out if reason.startswith("zarr (not read")]
    assert dict(index.left_out) == {reason: 2}


def test_discover__store_as_source_is_refused_with_advice(tmp_path):
    with pytest.raises(UsageError, match=r"is a slice store already. Give it as DATA="):
        discover(make_store(tmp_path, num_patients=1))


# Crafted chunks ----------------------------------------------------------------------------------------------------

CRAFTED = """
import sys, faulthandler, numpy as np
from pathlib import Path
import google_crc32c
from samgraft.shared.store.store import SliceStore
from samgraft.shared.errors import DataError
faulthandler.enable()
path = Path(sys.argv[1])
store = SliceStore.open(path)
series_id = store.series[0].series_id
shard = path / "series" / series_id / "image" / "c" / "0" / "0" / "0"
good = shard.read_bytes()
truth = store.read_volume(series_id)
num_slices = len(truth)
index = len(good) - 16 * num_slices - 4
rng = np.random.default_rng(0)
refused = 0
for number in range(300):
    bad = bytearray(good)
    kind = number % 3
    if kind == 0:    # noise where compressed data should be
        bad[:index] = rng.bytes(index)
    elif kind == 1:  # a real frame with bytes changed
        for place in rng.integers(0, index, size=4):
            bad[place] = int(rng.integers(256))
    else:            # an index that points anywhere, signed as a forger would
        table = np.frombuffer(bytes(bad[index:-4]), dtype="<u8").copy()
        table[rng.integers(len(table))] = rng.integers(0, 2**63)
        bad[index:-4] = table.tobytes()
        bad[-4:] = google_crc32c.value(table.tobytes()).to_bytes(4, "little")
    shard.write_bytes(bad)
    reader = SliceStore.open(path)
    for z in range(num_slices):
        try:
            assert (reader.read_slice(series_id, z) == truth[z]).all(), "wrong values"
        except DataError:
            refused += 1
shard.write_bytes(good)
print(refused)
"""


def test_read_slice__crafted_chunks_neither_crash_nor_give_wrong_values(tmp_path):
    path = make_store(tmp_path, num_patients=1)
    done = subprocess.run([sys.executable, "-c", CRAFTED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 600


def test_read_slice__chunk_larger_than_its_slice_is_refused(tmp_path):
    """A frame that announces more bytes than its slice has is refused and not written beyond the array."""
    from numcodecs.zstd import Zstd

    store = SliceStore.open(make_store(tmp_path, num_patients=1))
    record = store.series[0]
    shard = store.path / "series" / record.series_id / "image" / "c" / "0" / "0" / "0"
    good, num_slices = shard.read_bytes(), record.shape_zyx[0]
    index = np.frombuffer(good[-16 * num_slices - 4 : -4], dtype="<u8").reshape(-1, 2).copy()
    bomb = Zstd(level=3, checksum=True).encode(np.zeros(50_000_000, dtype=np.uint8))
    assert len(bomb) > int(index[0, 1])
    body = bytearray(good[: -16 * num_slices - 4])
    index[0] = len(body), len(bomb)
    table = index.astype("<u8").tobytes()
    shard.write_bytes(bytes(body) + bomb + table + google_crc32c.value(table).to_bytes(4, "little"))
    reader = SliceStore.from_manifest(store.path, json.loads((store.path / "manifest.json").read_text()))
    reader.series[0].files["image/c/0/0/0"] = (shard.stat().st_size, "")
    with pytest.raises(DataError, match="cannot be decoded"):
        reader.read_slice(record.series_id, 0)


# Two processes on one store ----------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from samgraft.shared.store.build import _lock_store
with _lock_store(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_build_store__second_builder_is_refused_until_the_first_ends(tmp_path):
    cases = make_cases(tmp_path / "in", num_patients=1)
    out = tmp_path / "s.zarr"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process is building this store"):
            build(cases, out)
        with pytest.raises(DataError, match="is not a slice store"):
            SliceStore.open(out)
        holder.kill()
    assert len(build(cases, out).records) == 1


def test_read_slice__rebuilt_store_is_an_error_for_its_old_reader(tmp_path):
    """A store that was replaced gives an error, and never slices of one store under the table of the other."""
    path = make_store(tmp_path, num_patients=1)
    opened, used = SliceStore.open(path), SliceStore.open(path)
    series_id = opened.series[0].series_id
    used.read_slice(series_id, 0)
    cases = make_cases(tmp_path / "new", num_patients=1, seed=5)
    (series_new,) = build(cases, path, overwrite=True).records
    assert series_new.series_id == series_id
    with pytest.raises(DataError, match="the file changed after the store was opened"):
        opened.read_slice(series_id, 3)
    with pytest.raises(DataError, match="cannot be decoded"):
        used.read_slice(series_id, 3)
    with pytest.raises(UsageError, match="other content exists"):
        build(make_cases(tmp_path / "third", num_patients=1, seed=6), path)


def test_open__store_under_construction_is_refused(tmp_path):
    path = make_store(tmp_path, num_patients=1)
    (path / "complete.json").unlink()
    with pytest.raises(DataError, match="no completion mark, because its build was interrupted"):
        SliceStore.open(path)
