"""Released files load in the libraries that they are for, with equal outputs."""

import json

import pytest
import torch
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.release import load_back as load_back_module
from samgraft.shared.release import onnx_format
from samgraft.shared.release.clients import CLIENTS
from samgraft.shared.release.formats import SAM_FORMAT, TRANSFORMERS_FORMAT, choose_formats
from samgraft.shared.release.load_back import load_back
from samgraft.shared.release.onnx_format import ONNX_FORMAT
from samgraft.shared.release.subject import Subject, expected_outputs, make_probe
from samgraft.shared.weights.transformers_format import save_transformers_encoder

CASES = {"plain": (tiny_plain_spec(depth=2, image_size=96), 96), "vit_t": (tiny_vit_t_spec(), 64)}


@pytest.fixture(scope="module", params=["plain", "vit_t"])
def released(request):
    spec, size = CASES[request.param]
    subject = Subject(tensors=make_sam(spec, image_size=size).state_dict(), spec=spec, image_size=size)
    probe = make_probe(subject)
    return subject, probe, expected_outputs(subject, probe)


@pytest.fixture(scope="module")
def encoder(released):
    whole = released[0]
    tensors = {k: v for k, v in whole.tensors.items() if k.startswith("image_encoder.")}
    subject = Subject(tensors=tensors, spec=whole.spec, image_size=whole.image_size)
    return subject, released[1], expected_outputs(subject, released[1])


def assert_equal_outputs(artefacts, folder, probe, expected, names):
    assert artefacts
    for artefact in artefacts:
        outputs, loaded_by = CLIENTS[artefact.client](folder / artefact.path, probe, artefact.options)
        assert loaded_by
        assert set(outputs) == names
        for name, value in outputs.items():
            assert value.shape == expected[name].shape
            difference = float((value - expected[name]).abs().max())
            assert difference <= load_back_module._allowed_difference(expected[name]), (artefact.path, name)


def test_sam_files__open_strictly_and_in_sam_predictor(released, tmp_path):
    subject, probe, expected = released
    artefacts = SAM_FORMAT.write(subject, tmp_path)
    assert [a.path for a in artefacts] == ["sam.safetensors", "sam.pth"]
    assert_equal_outputs(artefacts, tmp_path, probe, expected, {"embeddings", "automatic", "boxes"})


def test_encoder_files__open_strictly(encoder, tmp_path):
    subject, probe, expected = encoder
    artefacts = SAM_FORMAT.write(subject, tmp_path)
    assert [a.path for a in artefacts] == ["encoder.safetensors", "encoder.pth"]
    assert_equal_outputs(artefacts, tmp_path, probe, expected, {"embeddings"})


def test_transformers_folder__opens_with_no_key_left_over(released, encoder, tmp_path):
    subject, probe, expected = released
    if "transformers" not in subject.spec.release_formats:
        assert "cannot express vit_t" in TRANSFORMERS_FORMAT.why_not(subject)
        return
    artefacts = TRANSFORMERS_FORMAT.write(subject, tmp_path)
    assert_equal_outputs(artefacts, tmp_path, probe, expected, {"embeddings", "automatic", "boxes"})
    alone = tmp_path / "alone"
    alone.mkdir()
    artefacts = TRANSFORMERS_FORMAT.write(encoder[0], alone)
    assert_equal_outputs(artefacts, alone, probe, expected, {"embeddings"})
    with pytest.raises(WeightsError, match="must be those of an image encoder alone"):
        save_transformers_encoder(subject.tensors, alone, subject.spec, image_size=subject.image_size)


def test_onnx__runs_in_onnx_runtime_as_single_files_without_traces_of_this_machine(released, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    subject, probe, expected = released
    artefacts = ONNX_FORMAT.write(subject, tmp_path)
    assert_equal_outputs(artefacts, tmp_path, probe, expected, {"embeddings", "automatic", "boxes"})
    files = sorted(p.name for p in (tmp_path / "onnx").iterdir())
    assert files == ["decoder.onnx", "decoder_automatic.onnx", "encoder.onnx"]
    for name in files:
        model = onnx.load(str(tmp_path / "onnx" / name), load_external_data=False)
        assert not model.metadata_props
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
        assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)


def test_onnx__too_large_or_not_installed_is_left_out_with_a_reason(released, monkeypatch):
    monkeypatch.setattr(onnx_format, "MAX_BYTES", 10)
    assert "one ONNX file holds 2 GiB" in ONNX_FORMAT.why_not(released[0])
    monkeypatch.setattr(onnx_format.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'samgraft[onnx]'" in ONNX_FORMAT.why_not(released[0])


def test_choose_formats__inapplicable_format_is_a_line_or_an_error_if_requested():
    spec, size = CASES["vit_t"]
    subject = Subject(tensors=make_sam(spec, image_size=size).state_dict(), spec=spec, image_size=size)
    formats = [SAM_FORMAT, TRANSFORMERS_FORMAT]
    chosen, lines = choose_formats(formats, None, subject)
    assert [f.name for f in chosen] == ["sam"]
    assert lines[0].startswith("transformers: left out, ")
    with pytest.raises(UsageError, match="format transformers cannot be written"):
        choose_formats(formats, ["transformers"], subject)
    with pytest.raises(UsageError, match=r"unknown name \(got torchscript, expected sam, transformers\)"):
        choose_formats(formats, ["torchscript"], subject)


class FakeProcess:
    """Double of ``subprocess`` that runs load_back's main in this process, because a fresh one costs seconds."""

    def __init__(self, capsys):
        self.capsys = capsys

    def run(self, command, **_):
        code = load_back_module.main([command[-1]])
        out = self.capsys.readouterr()
        return type("Done", (), {"returncode": code, "stdout": out.out, "stderr": out.err})()


def test_load_back__refuses_other_outputs_and_files_that_do_not_open(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load_back_module.subprocess, "run", FakeProcess(capsys).run)
    spec, size = CASES["vit_t"]
    subject = Subject(tensors=make_sam(spec, image_size=size).state_dict(), spec=spec, image_size=size)
    probe = make_probe(subject)
    expected = expected_outputs(subject, probe)
    folder = tmp_path / "partial"
    folder.mkdir()
    artefacts = SAM_FORMAT.write(subject, folder)
    checked = load_back(folder, artefacts, probe=probe, expected=expected)
    assert [c.path for c in checked] == ["sam.safetensors", "sam.pth"]
    assert max(c.max_difference for c in checked) < 1e-4
    off = {**expected, "boxes": expected["boxes"] + 0.01}
    with pytest.raises(WeightsError, match="boxes differ by"):
        load_back(folder, artefacts, probe=probe, expected=off)
    (folder / "sam.pth").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=r"sam\.pth does not load strictly: "):
        load_back(folder, artefacts, probe=probe, expected=expected)
    tensors = dict(subject.tensors)
    tensors.pop("mask_decoder.iou_token.weight")
    torch.save(tensors, folder / "sam.pth")
    with pytest.raises(WeightsError, match="Missing key"):
        load_back(folder, artefacts, probe=probe, expected=expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["partial"]


def test_transformers_client__refuses_missing_keys(tmp_path):
    spec, size = CASES["plain"]
    subject = Subject(tensors=make_sam(spec, image_size=size).state_dict(), spec=spec, image_size=size)
    [artefact] = TRANSFORMERS_FORMAT.write(subject, tmp_path)
    config = json.loads((tmp_path / "transformers" / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "transformers" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="not exactly those of transformers"):
        CLIENTS["transformers"](tmp_path / "transformers", make_probe(subject), artefact.options)
