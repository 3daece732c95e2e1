"""``evaluate`` and ``compare`` on the command line: files, splits, post-processing and refusals."""

import csv
import json
import random
import stat

import numpy as np
import pytest
import torch
import yaml
from finished_factory import make_lab, write_finished
from samgraft.finetune.evaluation.evaluate import evaluate
from samgraft.finetune.evaluation.postprocess import PostProcessing
from samgraft.finetune.evaluation.scores import per_patient, read_cases
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.prediction.predictor import Predictor
from samgraft.shared.cli import main
from samgraft.shared.samples.split import default_split_path, load_split, make_folds, make_split
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.names import read_names
from samgraft.shared.store.store import SliceStore
from store_factory import make_cases


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = make_lab(tmp_path_factory.mktemp("lab"))
    write_finished(lab.root / "runs" / "other", lab.store, lab.split, seed=3)
    (lab.root / "runs" / "other" / "config.yaml").write_bytes((lab.run / "config.yaml").read_bytes())
    return lab


def test_evaluate__default_writes_tables_and_a_report_without_pictures(lab, capsys):
    assert main(["evaluate", str(lab.run), "--by", "plane"]) == 0
    folder = lab.run / "evaluation" / "test"
    rows = read_cases(folder / "cases.csv")
    assert {row["patient_id"] for row in rows} == set(lab.split.test)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["store_fingerprint"] == lab.store.fingerprint
    assert summary["surface_tolerance_mm"] == 2.0
    assert summary["prompts"] == "none: automatic"
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 1
    assert str(lab.root) not in page
    assert (folder / "subgroups.csv").is_file()
    assert "HD95 (mm)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def filed(lab):
    """A run made with ``data.split=FILE``; another split is next to the store."""
    split = make_split(lab.store, fractions=(0.5, 0.2, 0.3), seed=11)
    assert set(split.test) != set(lab.split.test)
    split.save(lab.root / "own.json")
    run = lab.root / "runs" / "filed"
    write_finished(run, lab.store, split)
    values = yaml.safe_load((lab.run / "config.yaml").read_text())
    values["data"]["split"] = str(lab.root / "own.json")
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    return run, split


def scored(run, out, *more):
    assert main(["evaluate", str(run), "--out", str(out), *more]) == 0
    summary = json.loads((out / "summary.json").read_text())
    return {row["patient_id"] for row in read_cases(out / "cases.csv")}, summary["split_sha256"]


def test_evaluate__run_with_a_split_file_is_scored_on_its_patients(filed, tmp_path):
    run, split = filed
    assert scored(run, tmp_path / "out") == (set(split.test), split.sha256)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_evaluate__missing_split_file_uses_the_patients_recorded_with_the_model(lab, filed, tmp_path, change):
    run, split = filed
    content = (lab.root / "own.json").read_bytes()
    (lab.root / "own.json").unlink()
    if change == "replaced":
        lab.split.save(lab.root / "own.json")
    try:
        assert scored(run, tmp_path / "out") == (set(split.test), split.sha256)
    finally:
        (lab.root / "own.json").write_bytes(content)


def test_evaluate__release_on_the_store_of_its_run_uses_the_recorded_patients(lab, filed, tmp_path):
    run, split = filed
    found = scored(run / "model", tmp_path / "out", "--data", str(lab.store.path))
    assert found == (set(split.test), split.sha256)


def test_evaluate__drawn_split_is_kept_with_the_run(lab, tmp_path):
    """The split next to the store was made again after the run, which has a copy of its own."""
    split = make_split(lab.store, fractions=(0.5, 0.2, 0.3), seed=11)
    run = lab.root / "runs" / "kept"
    write_finished(run, lab.store, split)
    (run / "config.yaml").write_bytes((lab.run / "config.yaml").read_bytes())
    split.save(run / "split.json")
    assert scored(run, tmp_path / "out") == (set(split.test), split.sha256)


def test_evaluate__larger_tolerance_raises_the_surface_dice_only(lab, tmp_path):
    for name, tolerance in (("a", "1"), ("b", "30")):
        arguments = ["--tolerance-mm", tolerance, "--out", str(tmp_path / name), "--log-images"]
        assert main(["evaluate", str(lab.run), *arguments]) == 0
        # A score belongs to the masks that predict writes.
        expected = "bf16" if Predictor(lab.run).is_bf16 else "fp32"
        assert json.loads((tmp_path / name / "summary.json").read_text())["precision"] == expected
    a, b = (read_cases(tmp_path / name / "cases.csv") for name in "ab")
    assert [r["dice"] for r in a] == [r["dice"] for r in b]
    assert sum(r["nsd"] or 0 for r in a) < sum(r["nsd"] or 0 for r in b)
    assert (tmp_path / "a" / "report.html").read_text().count("<img") > 1


def test_evaluate__chosen_postprocessing_is_used_in_later_evaluations(lab, tmp_path, capsys):
    assert main(["evaluate", str(lab.run), "--choose-postprocessing", "--out", str(tmp_path / "x")]) == 0
    chosen = json.loads((lab.run / "model" / "postprocessing.json").read_text())
    assert chosen["split_sha256"] == lab.split.sha256
    assert chosen["num_patients"] == len(lab.split.val)
    model = read_model(lab.run)
    steps = PostProcessing(steps={1: ["largest_component"]}, weights_sha256=model.card.weights_sha256)
    steps.write(lab.run / "model")
    capsys.readouterr()
    assert main(["evaluate", str(lab.run), "--out", str(tmp_path / "with")]) == 0
    assert "as chosen on validation: lesion: largest component" in capsys.readouterr().err
    assert main(["evaluate", str(lab.run), "--no-postprocessing", "--out", str(tmp_path / "without")]) == 0
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("with", "without")]
    assert [s["postprocessing"] for s in summaries] == ["lesion: largest component", "none"]
    (lab.run / "model" / "postprocessing.json").unlink()


def test_evaluate__postprocessing_changes_the_scores(lab):
    model = read_model(lab.run)
    bare = evaluate(model, lab.store, lab.split, part="test")
    cut = evaluate(
        model, lab.store, lab.split, part="test", postprocessing=PostProcessing(steps={1: ["largest_component"]})
    )
    assert sum(r["predicted_voxels"] for r in cut.rows) < sum(r["predicted_voxels"] for r in bare.rows)


def test_evaluate__precision_bf16_runs_the_model_under_autocast(lab, monkeypatch, tmp_path):
    from samgraft.finetune.evaluation import evaluate as module

    seen = []
    segment = module.segment_series

    def spy(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return segment(*arguments)

    monkeypatch.setattr(module, "segment_series", spy)
    assert main(["evaluate", str(lab.run), "--precision", "bf16", "--out", str(tmp_path / "x")]) == 0
    assert set(seen) == {True}
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["precision"] == "bf16"


def test_compare__two_runs_write_tables_and_a_report(lab, tmp_path, capsys):
    for name in ("seg", "other"):
        assert main(["evaluate", str(lab.root / "runs" / name)]) == 0
    runs = [str(lab.root / "runs" / name) for name in ("seg", "other")]
    capsys.readouterr()
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "other - seg" in said
    assert "too few patients for a test" in said
    assert (tmp_path / "out" / "comparison.csv").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Comparison of seg and other" in page
    assert str(lab.root) not in page

    assert main(["compare", *runs, "--out", str(tmp_path / "out"), "--show-names", "--metrics", "dice"]) == 0
    shown = capsys.readouterr().err
    private = tmp_path / "out" / "patients.names.csv"
    rows = list(csv.DictReader(private.read_text().splitlines()))
    first, second = (
        per_patient(read_cases(lab.root / "runs" / name / "evaluation" / "test" / "cases.csv"), "dice")
        for name in ("seg", "other")
    )
    owner = read_names(lab.store)
    expected = {owner.patient(patient): second[patient] - first[patient] for patient in first}
    assert all(name.startswith("patient0") for name in expected)
    assert {row["patient"]: float(row["difference"]) for row in rows} == pytest.approx(expected)
    assert [float(row["difference"]) for row in rows] == sorted(float(row["difference"]) for row in rows)
    assert all(f"Dice, {name}: seg " in shown for name in expected)
    assert private.stat().st_mode & 0o077 == 0
    assert not any(name in (tmp_path / "out" / "report.html").read_text() for name in expected)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["evaluate", "{run}", "--tolerance-mm", "0"], 2, "positive length"),
        (["evaluate", "{run}", "--tolerance-mm", "nan"], 2, "positive length"),
        (["evaluate", "{run}", "--batch-size", "0"], 2, "at least 1"),
        (["evaluate", "{run}", "--by", "hospital"], 2, "by one of site"),
        (["evaluate", "{run}", "--by", "site"], 3, "has the site of no scan"),
        (["evaluate", "{run}", "--groups", "gone.csv"], 3, "does not exist"),
        (["evaluate", "{run}", "--choose-postprocessing", "--no-postprocessing"], 2, "contradict"),
        (["evaluate", "{root}/nothing"], 4, "does not exist"),
        (["evaluate", "{run}", "--data", "{root}/no.zarr"], 3, "does not exist"),
        (["evaluate", "{run}/model"], 2, "path of its data"),
        (["compare", "{run}"], 3, "evaluated on"),
        (["compare", "{root}/nothing", "{run}"], 3, "evaluated on"),
        (["compare", "{run}", "{run}", "--split", "test"], 2, "different names"),
    ],
)
def test_command__bad_request_is_refused_with_its_exit_code(lab, capsys, arguments, code, text):
    if arguments[-1] == "test":
        assert main(["evaluate", str(lab.run)]) == 0
    elif arguments[0] == "compare":
        arguments = [*arguments, "--split", "val"]
    capsys.readouterr()
    assert main([a.format(run=lab.run, root=lab.root) for a in arguments]) == code
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown


def test_evaluate__model_and_generators_are_unchanged(lab):
    model = read_model(lab.run)
    model.segmenter.train()
    model.segmenter.sam.mask_decoder.eval()
    modes = {name: module.training for name, module in model.segmenter.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.segmenter.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    evaluate(model, lab.store, lab.split, part="test", bf16=True)
    assert {name: module.training for name, module in model.segmenter.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.segmenter.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.segmenter.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_choose_on_validation__segments_validation_scans_only(lab, monkeypatch):
    from samgraft.finetune.evaluation import evaluate as module

    seen = []
    segment = module.segment_series

    def spy(segmenter, store, series_id, *rest):
        seen.append(store.record(series_id).patient_id)
        return segment(segmenter, store, series_id, *rest)

    monkeypatch.setattr(module, "segment_series", spy)
    module.choose_on_validation(read_model(lab.run), lab.store, lab.split)
    assert set(seen) == set(lab.split.val)


def make_other_site(folder):
    """Build a store of other people, whose ids have another salt."""
    build_store(
        make_cases(folder / "scans", num_patients=3, shape_zyx=(4, 32, 32), seed=70),
        out=folder / "site.zarr",
        settings=BuildSettings(modality=Modality.MRI, salt="another site"),
        label_names={1: "lesion"},
        intensity=IntensityPreset(),
    )
    return SliceStore.open(folder / "site.zarr")


def test_evaluate__store_of_another_site_is_scored_whole(lab, tmp_path):
    """Every patient of the other site is for testing. No split is needed, and none is drawn."""
    other = make_other_site(tmp_path)
    path = other.path
    out = tmp_path / "out"
    assert main(["evaluate", str(lab.run), "--data", str(path), "--split", "all", "--out", str(out)]) == 0
    assert {row["patient_id"] for row in read_cases(out / "cases.csv")} == set(other.patient_ids)
    assert json.loads((out / "summary.json").read_text())["part"] == "all"
    assert not default_split_path(path).exists()


def test_evaluate__all_patients_of_the_runs_own_store_are_refused(lab, capsys):
    assert main(["evaluate", str(lab.run), "--split", "all"]) == 3
    assert "trained on" in capsys.readouterr().err


def test_evaluate__test_only_split_of_another_site_is_used(lab, tmp_path):
    other = make_other_site(tmp_path)
    assert main(["store", "split", str(other.path), "--fractions", "0,0,1"]) == 0
    patients, sha256 = scored(lab.run, tmp_path / "out", "--data", str(other.path))
    assert (patients, sha256) == (set(other.patient_ids), load_split(None, other).sha256)


def test_evaluate__fold_of_the_run_is_scored(lab, tmp_path):
    split = make_folds(lab.store, num_folds=3)
    split.save(tmp_path / "folds.json")
    run = lab.root / "runs" / "fold1"
    write_finished(run, lab.store, split.fold(1))
    data = {"store": str(lab.store.path), "split": str(tmp_path / "folds.json"), "fold": 1}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    expected = (set(split.folds[1].val), split.fold(1).sha256)
    assert scored(run, tmp_path / "a", "--split", "val") == expected
    file = str(tmp_path / "folds.json")
    assert scored(run, tmp_path / "b", "--split", "val", "--split-file", file) == expected


def test_evaluate__names_are_shown_on_request_and_only_in_private_files(lab, tmp_path, capsys):
    assert main(["evaluate", str(lab.run), "--show-names", "--out", str(tmp_path)]) == 0
    assert "case0" in capsys.readouterr().err
    named = (tmp_path / "cases.names.csv", tmp_path / "report.names.html")
    for path in named:
        assert "patient0" in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in tmp_path.iterdir():
        assert path in named or b"patient0" not in path.read_bytes()
    with named[0].open(newline="") as file:
        assert [row["series_id"] for row in csv.DictReader(file)] == [
            row["series_id"] for row in read_cases(tmp_path / "cases.csv")
        ]


@pytest.mark.parametrize("options", [["--split-file", "a.json"], ["--choose-postprocessing"]])
def test_evaluate__options_that_all_would_ignore_are_refused(lab, options, capsys):
    assert main(["evaluate", str(lab.run), "--split", "all", *options]) == 2
    assert options[0] in capsys.readouterr().err
