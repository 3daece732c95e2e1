"""A reader added from one place: its record is all that a new file format needs."""

import json
from pathlib import Path

import numpy as np
import pytest
from samgraft.shared.cli import main
from samgraft.shared.scans.readers.registry import READERS
from samgraft.shared.scans.readers.scan import ScanFiles, ScanReader
from samgraft.shared.scans.readers.verified import read_bytes
from samgraft.shared.scans.volume import RawScan
from samgraft.shared.store.store import SliceStore
from store_factory import make_scan

MAGIC = b"TOY1"


def write_toy(path: Path, array_zyx: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"shape": array_zyx.shape, "dtype": array_zyx.dtype.str}).encode()
    path.write_bytes(MAGIC + header + b"\n" + array_zyx.tobytes())


def read_toy(files: ScanFiles, *, as_label: bool, like: RawScan | None) -> RawScan:
    data, digest = read_bytes(files.paths[0], where=files.name)
    header, _, body = data[len(MAGIC) :].partition(b"\n")
    about = json.loads(header)
    array_zyx = np.frombuffer(body, dtype=about["dtype"]).reshape(about["shape"])
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    return RawScan(array_ijk=array_zyx.transpose(2, 1, 0), affine=affine, source_sha256=digest)


def test_store_build__reads_a_format_whose_record_is_added_to_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = ScanReader(name="toy", suffixes=(".toy", ".toy.bin"), matches=lambda h: h.startswith(MAGIC), read=read_toy)
    monkeypatch.setitem(READERS, "toy", toy)
    image, label = make_scan()
    write_toy(tmp_path / "in" / "a.toy", image)
    write_toy(tmp_path / "in" / "a_seg.toy.bin", label)
    write_toy(tmp_path / "in" / "without-suffix", image + 1)
    out = tmp_path / "store.zarr"
    assert main(["store", "build", str(tmp_path / "in"), "--out", str(out), "--workers", "1"]) == 0
    store = SliceStore.open(out)
    first, second = sorted(store.series, key=lambda record: record.has_label, reverse=True)
    np.testing.assert_array_equal(store.read_volume(first.series_id), image)
    assert first.label_voxels == {1: int(label.sum())}
    np.testing.assert_array_equal(store.read_volume(second.series_id), image + 1)
    assert main(["doctor", "--data", str(tmp_path / "in")]) == 0
