"""``evaluate`` and ``compare`` on the command line: files, splits, post-processing and refusals."""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from finished_factory import make_lab, write_finished
from samgraft.finetune.evaluation.evaluate import evaluate
from samgraft.finetune.evaluation.postprocess import PostProcessing
from samgraft.finetune.evaluation.scores import read_cases
from samgraft.finetune.model_folder import read_model
from samgraft.shared.cli import main
from samgraft.shared.samples.split import make_split


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
        assert json.loads((tmp_path / name / "summary.json").read_text())["precision"] == "fp32"
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
