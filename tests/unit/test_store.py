"""The slice store returns what was written, and a half-built or damaged store never opens."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.scans.case import SourceCase
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.readers.registry import read_scan
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import CasesRefused, _run_cases, build_store
from samgraft.shared.store.examine import BuildSettings, CaseResult
from samgraft.shared.store.store import COMPLETE, SliceStore
from store_factory import make_cases, make_scan, make_store, nifti_files, write_nifti

SETTINGS = BuildSettings(modality=Modality.MRI, salt="test")


def build(cases, out, **options):
    return build_store(
        cases,
        **{"out": out, "settings": SETTINGS, "label_names": {1: "lesion"}, "intensity": IntensityPreset(), **options},
    )


@pytest.fixture
def store(tmp_path):
    return SliceStore.open(make_store(tmp_path, num_patients=2))


def test_round_trip__values_spacing_affine_and_labels(store):
    expected = {tuple(make_scan(seed=s)[0].ravel()[:1000]): make_scan(seed=s) for s in (0, 100)}
    for record in store.series:
        volume = store.read_volume(record.series_id)
        image, label = expected[tuple(volume.ravel()[:1000])]
        np.testing.assert_array_equal(volume, image)
        assert volume.dtype == np.int16
        np.testing.assert_array_equal(store.read_label_volume(record.series_id), label)
        np.testing.assert_array_equal(store.read_slice(record.series_id, 3), image[3])
        np.testing.assert_array_equal(store.read_label_slice(record.series_id, 3), label[3])
        assert record.spacing_mm == (5.0, 1.0, 1.0)
        np.testing.assert_array_equal(record.affine, np.diag([-1, -1, 5, 1]))
        assert record.label_voxels == {1: int(label.sum())}
        assert record.planes[Plane.AXIAL].label_pixels[1] == tuple(label.sum(axis=(1, 2)))
        assert record.dtype == "int16"
        assert record.grid.orientation == "LPS"
    assert store.label_names == {1: "lesion"}


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", ">i2", ">f4"])
def test_round_trip__dtypes(tmp_path, dtype):
    image = (make_scan()[0] % 120).astype(dtype)
    case = SourceCase(name="a", patient_key="a", scan=nifti_files(write_nifti(tmp_path / "a.nii", image)))
    store = SliceStore.open(build([case], tmp_path / "s.zarr", label_names={}).path)
    np.testing.assert_array_equal(store.read_volume(store.series[0].series_id), image)


def test_round_trip__all_zero_slices_are_stored(tmp_path):
    image = make_scan()[0]
    image[2:4] = 0
    case = SourceCase(name="a", patient_key="a", scan=nifti_files(write_nifti(tmp_path / "a.nii", image)))
    store = SliceStore.open(build([case], tmp_path / "s.zarr", label_names={}).path)
    assert (store.read_slice(store.series[0].series_id, 2) == 0).all()


def test_fingerprint__depends_on_content_only(tmp_path):
    first = SliceStore.open(make_store(tmp_path / "here"))
    time.sleep(0.01)
    second = SliceStore.open(make_store(tmp_path / "there" / "deeper", name="other.zarr"))
    third = SliceStore.open(make_store(tmp_path / "third", seed=1))
    assert first.fingerprint == second.fingerprint != third.fingerprint


def test_build__stores_nothing_that_identifies_a_person(tmp_path):
    image = make_scan()[0]
    path = write_nifti(tmp_path / "MRN4711" / "Jane_Roe.nii.gz", image)
    case = SourceCase(
        name="Jane_Roe", patient_key="Jane_Roe", study_key="1987-06-05", site_key="St Elsewhere", scan=nifti_files(path)
    )
    out = build([case], tmp_path / "s.zarr", label_names={}).path
    for file in out.rglob("*"):
        text = str(file.relative_to(out)).encode() + (file.read_bytes() if file.is_file() else b"")
        for canary in (b"Jane", b"Roe", b"MRN4711", b"1987", b"Elsewhere", str(tmp_path).encode()):
            assert canary not in text, (file, canary)


@pytest.mark.slow
def test_pickle__store_reads_in_a_spawned_process(store):
    record = store.series[0]
    store.read_slice(record.series_id, 0)
    clone = pickle.loads(pickle.dumps(store))
    assert clone._arrays == {}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        value = pool.apply(store.read_slice, (record.series_id, 1))
    np.testing.assert_array_equal(value, store.read_slice(record.series_id, 1))


def first_shard(store):
    chunks = store.path / "series" / store.series[0].series_id / "image" / "c"
    return next(p for p in chunks.rglob("*") if p.is_file())


def damage_no_mark(store):
    (store.path / COMPLETE).unlink()


def damage_mark(store):
    (store.path / COMPLETE).write_text("{")


def damage_table(store):
    path = store.path / "manifest.json"
    path.write_text(path.read_text().replace("lesion", "tumour"))


def damage_missing_shard(store):
    shutil.rmtree(store.path / "series" / store.series[0].series_id / "image" / "c")


def damage_cut_shard(store):
    path = next(
        p for p in (store.path / "series" / store.series[0].series_id / "image" / "c").rglob("*") if p.is_file()
    )
    path.write_bytes(path.read_bytes()[:-10])


def damage_all(store):
    shutil.rmtree(store.path)


def damage_schema(store):
    import hashlib

    path = store.path / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (store.path / COMPLETE).write_text(json.dumps({"manifest_sha256": digest}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_no_mark, "no completion mark"),
        (damage_mark, "completion mark is damaged"),
        (damage_table, "does not match its checksum"),
        (damage_missing_shard, "is missing: image/c/0/0/0"),
        (damage_cut_shard, r"must have \d+ bytes, got \d+: image/c/0/0/0"),
        (damage_all, "does not exist"),
        (damage_schema, "schema 1, got 99"),
    ],
)
def test_open__damaged_store_is_refused_by_name(store, damage, message):
    damage(store)
    with pytest.raises(DataError, match=message):
        SliceStore.open(store.path)


def test_read_volume__flipped_bit_never_gives_wrong_values(store):
    record = store.series[0]
    path = first_shard(store)
    good, volume = path.read_bytes(), store.read_volume(record.series_id)
    rng = np.random.default_rng(0)
    num_noticed = 0
    for place in rng.choice(len(good), size=60, replace=False):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        reopened = SliceStore.open(store.path)
        try:  # a few bits of a zstd frame mean nothing; wrong values must never come back
            np.testing.assert_array_equal(reopened.read_volume(record.series_id), volume)
        except DataError as err:
            num_noticed += "damaged" in err.what
    assert num_noticed > 50
    path.write_bytes(good)
    np.testing.assert_array_equal(SliceStore.open(store.path).read_volume(record.series_id), volume)


def test_build__complete_store_is_not_written_again(tmp_path):
    cases = make_cases(tmp_path / "scans")
    out = tmp_path / "s.zarr"
    build(cases, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    report = build(cases, out)
    assert report.already_complete
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_build__other_content_needs_overwrite(tmp_path):
    cases = make_cases(tmp_path / "scans")
    out = tmp_path / "s.zarr"
    build(cases, out)
    with pytest.raises(UsageError, match="--overwrite"):
        build(cases[:2], out)
    with pytest.raises(UsageError, match="--overwrite"):
        build(cases, out, label_names={1: "other"})
    report = build(cases[:2], out, overwrite=True)
    assert report.num_kept == 2
    assert len(SliceStore.open(out)) == 2
    assert len(list((out / "series").glob("s_*"))) == 2


def test_build__changed_source_is_read_again(tmp_path):
    cases = make_cases(tmp_path / "scans", labelled=False)
    out = tmp_path / "s.zarr"
    build(cases, out, label_names={})
    write_nifti(cases[0].scan.paths[0], make_scan(seed=999)[0])
    report = build(cases, out, label_names={}, overwrite=True)
    assert report.num_kept == 2
    contents = [SliceStore.open(out).read_volume(r.series_id).tobytes() for r in SliceStore.open(out).series]
    assert make_scan(seed=999)[0].tobytes() in contents


def _build_slowly(cases, out):
    import samgraft.shared.store.build as module

    original = module.write_series

    def slow(*args, **kwargs):
        result = original(*args, **kwargs)
        time.sleep(0.3)
        return result

    module.write_series = slow
    build(cases, out)


def test_build__killed_build_does_not_open_and_is_resumed(tmp_path):
    cases = make_cases(tmp_path / "scans", num_patients=4)
    out, whole = tmp_path / "s.zarr", tmp_path / "whole.zarr"
    build(cases, whole)
    process = multiprocessing.get_context("fork").Process(target=_build_slowly, args=(cases, out))
    process.start()
    deadline = time.monotonic() + 20
    while len(list((out / "series").glob("s_*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(DataError, match="no completion mark"):
        SliceStore.open(out)
    report = build(cases, out)
    assert 2 <= report.num_kept < 4
    assert SliceStore.open(out).fingerprint == SliceStore.open(whole).fingerprint
    assert not (out / ".partial").exists()


@pytest.mark.slow
def test_build__two_workers_give_the_same_store(tmp_path):
    cases = make_cases(tmp_path / "scans", num_patients=3)
    one = build(cases, tmp_path / "one.zarr")
    two = build(cases, tmp_path / "two.zarr", num_workers=2)
    assert SliceStore.open(one.path).fingerprint == SliceStore.open(two.path).fingerprint


def test_build__refused_cases_are_all_named_and_the_store_stays_incomplete(tmp_path):
    cases = make_cases(tmp_path / "scans", num_patients=4)
    for case in cases[:2]:
        path = case.scan.paths[0]
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"2 of 4 cases are refused(?s:.*)case00(?s:.*)gzip(?s:.*)case01"):
        build(cases, tmp_path / "s.zarr")
    with pytest.raises(DataError, match="completion mark"):
        SliceStore.open(tmp_path / "s.zarr")
    report = build(cases, tmp_path / "s.zarr", skip_refused=True)
    assert report.num_kept == 2
    assert sorted(report.refused) == ["case00_0", "case01_0"]
    assert len(SliceStore.open(tmp_path / "s.zarr")) == 2


class Surprise:
    """Reader that fails as damaged files make libraries fail."""

    def __init__(self, error):
        self.error = error

    def __call__(self, files, **options):
        if files.name.startswith("case01"):
            raise self.error
        return read_scan(files, **options)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("float() argument must be a number\nmore"), r"\(TypeError: float\(\) argument must be a number\)"),
        (PermissionError(13, "Permission denied"), "cannot be read: Permission denied"),
        (MemoryError(), "does not fit into memory"),
        (UsageError("the scan has 3 volumes."), "the scan has 3 volumes"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
    ],
)
def test_build__any_failure_of_one_case_refuses_this_case_only(tmp_path, monkeypatch, error, reason):
    monkeypatch.setattr("samgraft.shared.scans.case.read_scan", Surprise(error))
    cases = make_cases(tmp_path / "scans", num_patients=3)
    with pytest.raises(CasesRefused, match=f"1 of 3 cases are refused(?s:.*)case01_0: .*{reason}"):
        build(cases, tmp_path / "s.zarr")
    report = build(cases, tmp_path / "s.zarr", skip_refused=True)
    assert list(report.refused) == ["case01_0"]
    assert len(SliceStore.open(tmp_path / "s.zarr")) == 2


def test_build__drive_that_does_not_respond_ends_the_build(tmp_path, monkeypatch):
    """Otherwise every case after the fault would count as damaged and be left out."""
    monkeypatch.setattr("samgraft.shared.scans.case.read_scan", Surprise(StorageError("no response.")))
    with pytest.raises(StorageError, match="no response"):
        build(make_cases(tmp_path / "scans"), tmp_path / "s.zarr", skip_refused=True)


def test_build__all_cases_refused_are_named_even_if_they_may_be_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("samgraft.shared.scans.case.read_scan", Surprise(ValueError("damage")))
    cases = [case for case in make_cases(tmp_path / "scans") if case.name == "case01_0"]
    with pytest.raises(CasesRefused, match=r"case01_0: .*damage"):
        build(cases, tmp_path / "s.zarr", skip_refused=True)


def test_build__again_without_the_refused_cases_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr("samgraft.shared.scans.case.read_scan", Surprise(ValueError("damage")))
    cases = make_cases(tmp_path / "scans")
    build(cases, tmp_path / "s.zarr", skip_refused=True)
    again = build(cases, tmp_path / "s.zarr", skip_refused=True)
    assert again.already_complete
    assert list(again.refused) == ["case01_0"]
    monkeypatch.undo()
    with pytest.raises(UsageError, match="other content"):
        build(cases, tmp_path / "s.zarr", skip_refused=True)


def _examine_or_die(case, **options):
    if case.name == "case01_0":
        os.kill(os.getpid(), signal.SIGKILL)
    return CaseResult(name=case.name)


@pytest.mark.slow
def test_run_cases__a_killed_worker_refuses_its_own_case_only(tmp_path):
    """The pool of a killed worker is lost with everything in it, e.g. when a huge scan exhausts the memory."""
    cases = make_cases(tmp_path / "scans", num_patients=4)
    results = {result.name: result.refused for result in _run_cases(cases, _examine_or_die, num_workers=2)}
    assert len(results) == 4
    assert [name for name, reason in results.items() if reason] == ["case01_0"]
    assert "was killed" in results["case01_0"]


def test_build__full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    import samgraft.shared.store.build as module

    cases = make_cases(tmp_path / "scans")
    original, calls = module.write_series, []

    def fill_up(*args, **kwargs):
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "write_series", fill_up)
    with pytest.raises(StorageError, match="No space left") as caught:
        build(cases, tmp_path / "s.zarr")
    assert "2 finished series" in caught.value.kept
    monkeypatch.undo()
    assert build(cases, tmp_path / "s.zarr").num_kept == 2


def test_build__planes_of_near_isotropic_volumes(tmp_path):
    image, _ = make_scan(shape_zyx=(10, 12, 14))
    scan = nifti_files(write_nifti(tmp_path / "a.nii", image, spacing_mm=(1, 1, 1)))
    settings = dataclasses.replace(SETTINGS, planes=(Plane.AXIAL, Plane.CORONAL, Plane.SAGITTAL))
    case = SourceCase(name="a", patient_key="a", scan=scan)
    store = SliceStore.open(build([case], tmp_path / "s.zarr", settings=settings, label_names={}).path)
    record = store.series[0]
    # Axial rows run to the back, slices to the head; coronal rows run to the feet, slices to the back.
    coronal = store.read_volume(record.series_id, plane=Plane.CORONAL)
    np.testing.assert_array_equal(coronal, image.transpose(1, 0, 2)[:, ::-1])
    sagittal = store.read_volume(record.series_id, plane=Plane.SAGITTAL)
    np.testing.assert_array_equal(sagittal, image.transpose(2, 0, 1)[:, ::-1])
    np.testing.assert_array_equal(store.read_slice(record.series_id, 4, plane=Plane.CORONAL), coronal[4])


def test_build__thick_slices_keep_only_their_plane(tmp_path):
    settings = dataclasses.replace(SETTINGS, planes=(Plane.AXIAL, Plane.CORONAL))
    store = SliceStore.open(build(make_cases(tmp_path, num_patients=1), tmp_path / "s.zarr", settings=settings).path)
    assert list(store.series[0].planes) == [Plane.AXIAL]


def test_build__unusable_arguments_are_refused(tmp_path):
    cases = make_cases(tmp_path / "scans", num_patients=1)
    with pytest.raises(DataError, match="0 usable scans"):
        build([], tmp_path / "s.zarr")
    with pytest.raises(UsageError, match="occurs twice"):
        build([*cases, *cases], tmp_path / "s.zarr")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="a file has this name"):
        build(cases, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.docx").write_text("x")
    with pytest.raises(UsageError, match="something other than a store"):
        build(cases, tmp_path / "folder")
    assert (tmp_path / "folder" / "thesis.docx").read_text() == "x"
