"""Release of a fine-tuned model, with every format, a true card, and nothing left after a failure."""

import dataclasses
import json
import re

import pytest
import torch
from model_factory import tiny_hiera_spec, tiny_plain_spec, tiny_vit_t_spec
from release_factory import PATIENTS, InThisProcess, finished_model, write_scores
from samgraft.finetune.evaluation.postprocess import PostProcessing, read_postprocessing
from samgraft.finetune.evaluation.scores import read_cases
from samgraft.finetune.evaluation.statistics import bootstrap_mean
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.release import release_clients
from samgraft.finetune.release.model_card import SHOWN, _sam_lines, _scores
from samgraft.finetune.release.model_card import TestScores as ModelScores
from samgraft.finetune.release.release import release_model
from samgraft.shared.commands.release import _names, _releaser
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.errors import DataError, StorageError, UsageError, WeightsError
from samgraft.shared.files import file_sha256
from samgraft.shared.release import load_back
from samgraft.shared.release.card_page import table_cell
from samgraft.shared.release.request import ReleaseRequest
from samgraft.shared.release.subject import Subject


@pytest.fixture
def in_process(monkeypatch, capsys):
    monkeypatch.setattr(load_back.subprocess, "run", InThisProcess(capsys, release_clients.CLIENTS).run)


@pytest.fixture
def run(tmp_path):
    return finished_model(tmp_path, tiny_plain_spec(depth=2, image_size=96), image_size=96)


def request(run, **values):
    return ReleaseRequest(**({"run": run, "out": run.parents[1] / "out", "licence": "cc-by-4.0"} | values))


@pytest.mark.slow  # imports every client; each format has a quick test of its own
@pytest.mark.filterwarnings("ignore")
def test_release__writes_and_loads_back_every_format(run, in_process):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("jsonschema")
    released = release_model(request(run))
    assert {c.path for c in released.checked} == {"sam.safetensors", "sam.pth", "transformers", "peft", "onnx", "monai"}
    assert released.left_out == []
    out = run.parents[1] / "out"
    compared = {c.path: set(c.outputs) for c in released.checked}
    assert compared["peft"] == compared["onnx"] == {"automatic", "boxes", "embeddings"}
    assert compared["monai"] == {"mask", "slices"}
    config = json.loads((out / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base.safetensors"  # not published weights
    assert (out / "peft" / "base.safetensors").is_file()
    assert read_model(out).task.split == {}
    sums = dict(reversed(line.split("  ", 1)) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert all(file_sha256(out / name) == digest for name, digest in sums.items())
    assert set(sums) == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    every_byte = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    assert not any(patient.encode() in every_byte for patients in PATIENTS.values() for patient in patients)


def test_release__vit_t_has_no_transformers_format(tmp_path, in_process):
    run = finished_model(tmp_path, tiny_vit_t_spec(), image_size=64)
    released = release_model(request(run, formats=("sam", "peft")))
    assert {c.path for c in released.checked} == {"sam.safetensors", "sam.pth", "peft"}
    (tmp_path / "new").touch()
    modes = {p.name: p.stat().st_mode for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}, modes  # as the umask gives them
    with pytest.raises(UsageError, match="cannot express vit_t"):
        release_model(request(run, formats=("transformers",), out=tmp_path / "b"))


@pytest.mark.filterwarnings("ignore")  # MONAI's own
def test_release__several_classes_reach_the_bundle(tmp_path, in_process):
    pytest.importorskip("jsonschema")
    run = finished_model(tmp_path, tiny_vit_t_spec(), image_size=64, num_classes=2)
    release_model(request(run, formats=("monai",)))
    config = json.loads((tmp_path / "out" / "monai" / "configs" / "inference.json").read_text())
    assert config["postprocessing"]["transforms"][1]["target_labels"] == [0, 3, 5]
    meta = json.loads((tmp_path / "out" / "monai" / "configs" / "metadata.json").read_text())
    assert meta["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "1": "lesion",
        "2": "organ",
    }


@pytest.mark.filterwarnings("ignore")  # MONAI's own
def test_release__sam_2_runs_as_a_bundle(tmp_path, in_process):
    pytest.importorskip("jsonschema")
    run = finished_model(tmp_path, tiny_hiera_spec(), image_size=64)
    released = release_model(request(run, formats=("monai",)))
    assert {c.path: set(c.outputs) for c in released.checked}["monai"] == {"mask", "slices"}


@pytest.mark.parametrize("damage", ["adapter", "base"])
def test_release__foreign_adapter_or_missing_base_is_refused_and_leaves_nothing(run, in_process, damage):
    from safetensors.torch import load_file, save_file

    if damage == "adapter":
        file = run / "model" / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(k for k in tensors if "lora_B" in k)
        tensors[key] = tensors[key] + 0.5
        save_file(tensors, file)
        with pytest.raises(WeightsError, match="peft does not give the run's outputs when loaded back"):
            release_model(request(run, formats=("sam", "peft")))
    else:
        (run.parents[1] / "base.safetensors").unlink()
        with pytest.raises(UsageError, match="no longer at the path in its config"):
            release_model(request(run, formats=("sam", "peft")))
    assert sorted(p.name for p in run.parents[1].iterdir() if p.name.startswith((".", "out"))) == []


def test_release__wrong_request_is_refused_before_writing(run, in_process):
    with pytest.raises(UsageError, match="licence of the release is missing"):
        release_model(request(run, licence=None))
    with pytest.raises(UsageError, match="--continuable applies to runs of stage 1"):
        release_model(request(run, continuable=True))
    (run.parents[1] / "out").mkdir()
    with pytest.raises(StorageError, match="already exists"):
        release_model(request(run))


def test_release__identifier_is_refused_and_leaves_nothing(run, in_process):
    with pytest.raises(DataError, match="may identify a person or a machine"):
        release_model(request(run, formats=("sam",), statement="scans of Jane^Canary"))
    with pytest.raises(DataError, match="known identifier"):
        release_model(request(run, formats=("sam",), statement="from CanaryHospital", identifiers=("canaryhospital",)))
    assert not (run.parents[1] / "out").exists()
    assert not list(run.parents[1].glob(".out*"))


def test_card__opens_in_huggingface_hub_and_every_score_is_in_the_files(run, in_process):
    from huggingface_hub import ModelCard

    folder = write_scores(run)
    interval = bootstrap_mean([row["dice"] for row in read_cases(folder / "cases.csv")])
    release_model(request(run, formats=("sam",), statement="Public scans, de-identified, CC BY."))
    out = run.parents[1] / "out"
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "mask-generation"
    assert card.data.eval_results[0].metric_value == round(interval.mean, 4)
    text = card.text
    assert "The releaser states: Public scans" in text
    sources = (
        " ".join((out / n).read_text() for n in ("card.json", "task.json")) + (folder / "summary.json").read_text()
    )
    known = {float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", sources)}
    known |= {round(n, 3) for n in known}
    for number in re.findall(r"(?<![\w.])\d+\.\d+", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if number not in ("4.0",):  # the licence's name
            assert float(number) in known, number
    assert f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f}, 7 patients)" in text


def test_release__contains_the_postprocessing_for_the_released_weights(run, in_process):
    model = read_model(run)
    steps = {model.task.class_ids[0]: ["largest_component"]}
    PostProcessing(steps=steps, weights_sha256=model.card.weights_sha256, num_patients=5).write(model.folder)
    release_model(request(run, formats=("sam",)))
    released = read_model(run.parents[1] / "out")
    found = read_postprocessing(
        released.folder, weights_sha256=released.card.weights_sha256, classes=released.task.classes
    )
    assert found.steps == steps
    assert "largest component" in (released.folder / "README.md").read_text()


def test_card__without_scores_and_statement_reports_both(run, in_process):
    release_model(request(run, formats=("sam",)))
    text = (run.parents[1] / "out" / "README.md").read_text()
    assert "| test | - | not evaluated |" in text
    assert "gave no statement on origin" in text
    assert "model-index" not in text


def test_command__finds_the_stage_by_the_files_of_the_run(run, tmp_path):
    assert _releaser(run) is release_model
    assert _names("sam, onnx") == ("sam", "onnx")
    assert _names(None) is None
    with pytest.raises(WeightsError, match="does not exist"):
        _releaser(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="neither a run nor a release"):
        _releaser(tmp_path / "empty")


def lines_of_python(readme):
    """Return the blocks of Python that a card prints."""
    return re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("spec", "size", "num_classes", "reason"),
    [
        (tiny_plain_spec(depth=2, image_size=96), 96, 1, "it has no entry for"),
        (tiny_vit_t_spec(), 64, 1, "it has no entry for vit_t"),
        (tiny_vit_t_spec(), 64, 5, "it has no entry for vit_t"),
    ],
    ids=["plain", "vit_t", "five classes"],
)
def test_card__printed_lines_load_the_released_weights(
    tmp_path, in_process, monkeypatch, spec, size, num_classes, reason
):
    run = finished_model(tmp_path, spec, image_size=size, num_classes=num_classes)
    release_model(request(run, formats=("sam", "transformers") if spec.arch != "vit_t" else ("sam",)))
    readme = run.parents[1] / "out" / "README.md"
    monkeypatch.chdir(readme.parent)
    wanted = read_model(run).segmenter.sam.state_dict()
    for number, lines in enumerate(lines_of_python(readme)):
        names = {}
        exec(lines, names)
        if number == 0:
            loaded = names["sam"].state_dict()
            assert set(loaded) == set(wanted)
            assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    assert "`sam_model_registry` does not load `sam.pth`, because " + reason in readme.read_text()
    assert "and segment_anything's `sam_model_registry`" not in readme.read_text()


@pytest.mark.parametrize(
    ("size", "num_tokens", "expected"),
    [
        (1024, 4, None),
        (512, 4, "it builds a model for 1024 px and these weights are for 512 px"),
        (1024, 6, "it builds 4 mask tokens and these weights have 6"),
    ],
)
def test_card__names_the_registry_only_for_weights_that_it_loads(tmp_path, size, num_tokens, expected):
    tensors = {"mask_decoder.mask_tokens.weight": torch.zeros(num_tokens, 256)}
    subject = Subject(tensors=tensors, spec=arch_spec("vit_b"), image_size=size)
    assert subject.why_not_stock == expected
    task = read_model(finished_model(tmp_path, tiny_vit_t_spec(), image_size=64)).task
    text = _sam_lines(dataclasses.replace(task, image_size=size), subject, {"sam.pth"})
    assert ('sam_model_registry["vit_b"](checkpoint="sam.pth")' in text) is (expected is None)
    assert f'load_sam("sam.pth", image_size={size})' in text or expected is None


def test_card__class_names_do_not_break_its_table(tmp_path):
    assert table_cell("edema | core\n2") == "edema \\| core 2"
    scores = ModelScores(num_patients=1, num_cases=1, per_class={"a|b": dict.fromkeys(SHOWN)}, mean=None)
    task = read_model(finished_model(tmp_path, tiny_vit_t_spec(), image_size=64)).task
    rows = [line for line in _scores(task, scores).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3 + len(SHOWN)}
