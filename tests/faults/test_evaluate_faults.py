"""``evaluate`` and ``compare`` from the command line: files, post-processing on validation only, refusals by code."""

import json
import random

import numpy as np
import pytest
import torch
from finished_factory import make_lab, write_finished
from samgraft.finetune.evaluation.evaluate import evaluate
from samgraft.finetune.evaluation.postprocess import PostProcessing
from samgraft.finetune.evaluation.scores import read_cases
from samgraft.finetune.model_folder import read_model
from samgraft.shared.cli import main


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = make_lab(tmp_path_factory.mktemp("lab"))
    write_finished(lab.root / "runs" / "other", lab.store, lab.split, seed=3)
    (lab.root / "runs" / "other" / "config.yaml").write_bytes((lab.run / "config.yaml").read_bytes())
    return lab


def test_evaluate__writes_tables_and_a_report_without_patients(lab, capsys):
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


def test_evaluate__tolerance_changes_the_surface_dice_only(lab, tmp_path):
    for name, tolerance in (("a", "1"), ("b", "30")):
        arguments = ["--tolerance-mm", tolerance, "--out", str(tmp_path / name), "--log-images"]
        assert main(["evaluate", str(lab.run), *arguments]) == 0
        assert json.loads((tmp_path / name / "summary.json").read_text())["precision"] == "fp32"
    a, b = (read_cases(tmp_path / name / "cases.csv") for name in "ab")
    assert [r["dice"] for r in a] == [r["dice"] for r in b]
    assert sum(r["nsd"] or 0 for r in a) < sum(r["nsd"] or 0 for r in b)
    assert (tmp_path / "a" / "report.html").read_text().count("<img") > 1


def test_postprocessing__is_chosen_on_validation_and_used_later(lab, tmp_path, capsys):
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


def test_postprocessing__changes_what_is_scored(lab):
    model = read_model(lab.run)
    bare = evaluate(model, lab.store, lab.split, part="test")
    cut = evaluate(
        model, lab.store, lab.split, part="test", postprocessing=PostProcessing(steps={1: ["largest_component"]})
    )
    assert sum(r["predicted_voxels"] for r in cut.rows) < sum(r["predicted_voxels"] for r in bare.rows)


def test_precision__reaches_the_model(lab, monkeypatch, tmp_path):
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


def test_compare__two_runs(lab, tmp_path, capsys):
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
        (["evaluate", "{run}", "--by", "site"], 3, "does not know the site"),
        (["evaluate", "{run}", "--groups", "gone.csv"], 3, "does not exist"),
        (["evaluate", "{run}", "--choose-postprocessing", "--no-postprocessing"], 2, "contradict"),
        (["evaluate", "{root}/nothing"], 4, "does not exist"),
        (["evaluate", "{run}", "--data", "{root}/no.zarr"], 3, "does not exist"),
        (["evaluate", "{run}/model"], 2, "where the data lies"),
        (["compare", "{run}"], 3, "evaluated on"),
        (["compare", "{root}/nothing", "{run}"], 3, "evaluated on"),
        (["compare", "{run}", "{run}", "--split", "test"], 2, "different names"),
    ],
)
def test_refusals__one_screen_and_their_code(lab, capsys, arguments, code, text):
    if arguments[-1] == "test":
        assert main(["evaluate", str(lab.run)]) == 0
    elif arguments[0] == "compare":
        arguments = [*arguments, "--split", "val"]
    capsys.readouterr()
    assert main([a.format(run=lab.run, root=lab.root) for a in arguments]) == code
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown


def test_evaluate__leaves_model_and_generators_alone(lab):
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


def test_postprocessing__sees_validation_scans_only(lab, monkeypatch):
    from samgraft.finetune.evaluation import evaluate as module

    seen = []
    segment = module.segment_series

    def spy(segmenter, store, series_id, *rest):
        seen.append(store.record(series_id).patient_id)
        return segment(segmenter, store, series_id, *rest)

    monkeypatch.setattr(module, "segment_series", spy)
    module.choose_on_validation(read_model(lab.run), lab.store, lab.split)
    assert set(seen) == set(lab.split.val)
