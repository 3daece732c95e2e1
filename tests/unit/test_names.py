"""The owner's table of names stays beside the store, is private, and translates own splits."""

import json
import stat

import pytest
from samgraft.shared.cli import main
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.release.privacy import scan_folder
from samgraft.shared.release.request import ReleaseRequest
from samgraft.shared.samples.own_splits import read_own_split
from samgraft.shared.samples.split import default_split_path, load_split
from samgraft.shared.scans.privacy import pseudonym
from samgraft.shared.store.names import names_path, read_names, require_names
from samgraft.shared.store.store import SliceStore
from store_factory import make_scan, make_store, write_nifti


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    return SliceStore.open(make_store(folder, num_patients=6, shape_zyx=(2, 12, 12)))


def id_of(number):
    return pseudonym("p", f"patient{number:02d}", salt="test")


def ids_of(*numbers):
    return tuple(sorted(id_of(number) for number in numbers))


def test_build_store__names_are_beside_it_and_for_the_owner_only(store):
    path = names_path(store.path)
    assert path == store.path.with_name("store.names.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    names = read_names(store)
    assert {name.patient: name.scan for name in names.by_series.values()} == {
        f"patient{number:02d}": f"case{number:02d}_0" for number in range(6)
    }
    assert names.patient(id_of(3)) == "patient03"
    assert not any(b"patient03" in file.read_bytes() for file in store.path.rglob("*") if file.is_file())


def test_build_store__complete_store_of_an_earlier_version_gets_its_names(tmp_path):
    for name in ("anna", "ben"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", make_scan(shape_zyx=(2, 12, 12), seed=len(name))[0])
    path = tmp_path / "s.zarr"
    command = ["store", "build", str(tmp_path / "in"), "--out", str(path)]
    assert main(command) == 0
    before = SliceStore.open(path).fingerprint
    names_path(path).unlink()
    with pytest.raises(DataError, match=r"no table of names beside it \(s.names.json\)"):
        require_names(SliceStore.open(path))
    assert main(command) == 0
    assert len(require_names(SliceStore.open(path)).by_series) == 2
    assert SliceStore.open(path).fingerprint == before


def test_read_names__damaged_table_is_refused(tmp_path):
    path = make_store(tmp_path, num_patients=2, shape_zyx=(2, 12, 12))
    for content in ("{", "[]", '{"series": {"s_1": {"scan": "a"}}}'):
        names_path(path).write_text(content)
        with pytest.raises(DataError, match="table of names is damaged"):
            read_names(SliceStore.open(path))


def test_store_info__names_are_listed_on_request_only(store, capsys):
    assert main(["store", "info", str(store.path)]) == 0
    assert "patient03" not in capsys.readouterr().out
    assert main(["store", "info", str(store.path), "--names"]) == 0
    listed = capsys.readouterr()
    assert f"{id_of(3)}  patient03  case03_0" in listed.out
    assert "keep it on this machine" in listed.err
    assert main(["store", "info", str(store.path), "--names", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6


def test_scan_folder__table_of_names_is_refused_under_any_name(store, tmp_path):
    content = names_path(store.path).read_bytes()
    (tmp_path / "mine.names.json").write_text("{}")
    (tmp_path / "notes.txt").write_bytes(content)
    found = {(finding.file, finding.kind) for finding in scan_folder(tmp_path)}
    assert ("mine.names.json", "file of a kind that is never released (.json)") in found
    assert ("notes.txt", "table with the names of patients") in found


def test_release_request__names_of_the_stores_scans_are_identifiers(store, tmp_path):
    (tmp_path / "config.yaml").write_text(f"data:\n  store: {store.path}\n")
    request = ReleaseRequest(run=tmp_path, out=tmp_path / "out", identifiers=("Jane",))
    assert set(request.known_identifiers) >= {"Jane", "patient03", "case03_0"}
    (tmp_path / "card.txt").write_text("trained on patient03")
    assert [f.kind for f in scan_folder(tmp_path, known=request.known_identifiers) if f.file == "card.txt"]


def test_read_own_split__table_takes_names_of_patients_scans_and_ids(store, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        f"patient,part\npatient00,train\ncase01_0,train\n{id_of(2)},train\npatient03,val\npatient04,TEST\npatient05,test\n"
    )
    split = read_own_split(path, store)
    assert (split.train, split.val, split.test) == (ids_of(0, 1, 2), ids_of(3), ids_of(4, 5))


def test_read_own_split__nnunet_folds_and_patients_in_no_part(store, tmp_path, caplog):
    path = tmp_path / "splits_final.json"
    pool = [f"case{n:02d}_0" for n in range(5)]
    path.write_text(
        json.dumps([{"train": [p for p in pool if p not in val], "val": val} for val in (pool[:2], pool[2:])])
    )
    split = read_own_split(path, store)
    assert [fold.val for fold in split.folds] == [ids_of(0, 1), ids_of(2, 3, 4)]
    assert split.fold(1).train == ids_of(0, 1)
    assert "1 of 6 patients of store.zarr are in no part" in caplog.text
    path.write_text(json.dumps([{"train": pool[:4], "val": pool[4:]}]))
    single = read_own_split(path, store)
    assert (single.folds, single.val) == ((), ids_of(4))


def test_read_own_split__nnunet_case_means_every_channel(tmp_path):
    for case in ("knee_001", "knee_002", "knee_003"):
        for channel in ("0000", "0001"):
            image, label = make_scan(shape_zyx=(2, 12, 12), seed=int(case[-1]) * 10 + int(channel))
            write_nifti(tmp_path / "in" / "imagesTr" / f"{case}_{channel}.nii.gz", image)
        write_nifti(tmp_path / "in" / "labelsTr" / f"{case}.nii.gz", label)
    channels = {"0": "T1", "1": "T2"}
    values = {
        "channel_names": channels,
        "labels": {"background": 0, "a": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(values))
    assert main(["store", "build", str(tmp_path / "in"), "--out", str(tmp_path / "k.zarr")]) == 0
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["knee_001", "knee_002"], "val": ["knee_003"]}]))
    assert main(["store", "split", str(tmp_path / "k.zarr"), "--from", str(splits)]) == 0
    store = SliceStore.open(tmp_path / "k.zarr")
    split = load_split(default_split_path(store.path), store)
    assert (len(split.train), len(split.val)) == (2, 1)
    assert read_names(store).patient(split.val[0]).startswith("knee_003")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", "patient,part\nnobody,train\npatient01,val\n", DataError, r"1 names are not in the store \(nobody\)"),
        ("a.csv", "patient,part\npatient01,dev\n", UsageError, r"one of train, val, test \(got 'dev'\)"),
        ("a.csv", "id,fold\n1,2\n", UsageError, r"columns patient and part \(got fold, id\)"),
        ("a.csv", "", UsageError, r"\(got none\)"),
        ("a.csv", "patient,part\npatient01,val\npatient01,train\n", DataError, "in both train and val"),
        ("a.json", "{}", UsageError, "lists no fold"),
        ("a.json", "[1]", UsageError, "not nnU-Net's splits_final.json"),
        (
            "a.json",
            '[{"train": ["patient00"], "val": ["patient01"]}, {"train": ["patient00"], "val": ["patient01"]}]',
            DataError,
            "1 patient is validated in several folds",
        ),
    ],
)
def test_read_own_split__what_cannot_be_used_is_refused(store, tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_own_split(tmp_path / name, store)


def test_read_own_split__name_of_two_patients_is_refused(tmp_path):
    for folder in ("anna", "ben"):
        write_nifti(tmp_path / "in" / folder / "t1.nii.gz", make_scan(shape_zyx=(2, 12, 12), seed=len(folder))[0])
    assert main(["store", "build", str(tmp_path / "in"), "--out", str(tmp_path / "s.zarr")]) == 0
    (tmp_path / "a.csv").write_text("patient,part\nt1,train\nanna,train\n")
    with pytest.raises(DataError, match=r"1 names mean several patients \(t1\)"):
        read_own_split(tmp_path / "a.csv", SliceStore.open(tmp_path / "s.zarr"))


def test_store_split__folds_are_drawn_and_contradictions_refused(tmp_path, capsys):
    path = str(make_store(tmp_path, num_patients=6, shape_zyx=(2, 12, 12)))
    assert main(["store", "split", path, "--folds", "3"]) == 0
    assert "3 folds that validate 2, 2, 2 patients, test 0 patients" in capsys.readouterr().err
    store = SliceStore.open(path)
    assert len(load_split(None, store).folds) == 3
    for options, message in (
        (["--folds", "3", "--fractions", "0.5,0.5,0"], "the second of --fractions must be 0"),
        (["--folds", "3", "--few-shot", "1"], "--few-shot draws from a split without folds"),
        (["--from", "a.csv", "--folds", "3"], "--folds would be ignored"),
        (["--from", "none.csv"], "the file of the split does not exist"),
        (["--fractions", "a,b"], "must be three numbers"),
    ):
        assert main(["store", "split", path, *options]) == 2
        assert message in capsys.readouterr().err
