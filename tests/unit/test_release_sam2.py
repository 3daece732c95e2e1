"""Released files of SAM 2 load in the package ``sam2``, transformers and ONNX Runtime with equal outputs."""

import dataclasses

import pytest
import torch
from model_factory import make_sam, tiny_hiera_spec
from original_hiera import NO_SAM2
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.release import clients
from samgraft.shared.release.clients import CLIENTS
from samgraft.shared.release.formats import SAM_FORMAT, TRANSFORMERS_FORMAT
from samgraft.shared.release.onnx_format import ONNX_FORMAT
from samgraft.shared.release.sam2_client import predictor_outputs, sam2_build, why_not_sam2
from samgraft.shared.release.subject import Subject, expected_outputs, make_probe
from samgraft.shared.weights.load import load_sam, read_weights
from samgraft.shared.weights.sam2_format import MEMORY, from_sam2, split_memory

SIZE = 64
ALL = {"embeddings", "automatic", "boxes"}


def subject_of(spec, *, whole=True, memory=None, num_multimask_outputs=3):
    sam = make_sam(spec, image_size=SIZE, num_multimask_outputs=num_multimask_outputs)
    tensors = (
        sam.state_dict() if whole else {f"image_encoder.{k}": v for k, v in sam.image_encoder.state_dict().items()}
    )
    return Subject(tensors=tensors, spec=spec, image_size=SIZE, memory=memory or {})


@pytest.fixture(scope="module")
def tiny():
    subject = subject_of(tiny_hiera_spec())
    probe = make_probe(subject)
    return subject, probe, expected_outputs(subject, probe)


def assert_equal_outputs(artefact, folder, probe, expected, names=ALL):
    outputs, loaded_by = CLIENTS[artefact.client](folder / artefact.path, probe, artefact.options)
    assert set(outputs) == names
    for name, value in outputs.items():
        assert value.shape == expected[name].shape
        largest = max(1.0, float(expected[name].abs().max()))
        assert float((value - expected[name]).abs().max()) < 1e-4 * largest, (artefact.path, name)
    return loaded_by


def test_sam2_files__memory_returns_and_the_reader_is_strict(tiny, tmp_path):
    subject, probe, expected = tiny
    memory = {"maskmem_tpos_enc": torch.ones(7, 1, 1, 64), "memory_attention.norm.bias": torch.zeros(3)}
    artefacts = SAM_FORMAT.write(dataclasses.replace(subject, memory=memory), tmp_path)
    assert [a.path for a in artefacts] == ["sam.safetensors", "sam2.pt"]
    stored = torch.load(tmp_path / "sam2.pt", weights_only=True)["model"]
    assert set(memory) < set(stored)
    assert {name for name in stored if name.startswith(("prompt_encoder", "mask_decoder"))} == set()
    assert stored["no_mem_embed"].shape == (1, 1, 32)
    found = clients.read_subject(tmp_path / "sam2.pt", image_size=SIZE)
    assert found.memory.keys() == memory.keys()
    assert found.tensors.keys() == subject.tensors.keys()
    for artefact in artefacts:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clients, "has_sam2", lambda: False)
            assert "samgraft's builder for sam2_t" in assert_equal_outputs(artefact, tmp_path, probe, expected)
    torch.save({"model": {k: v for k, v in stored.items() if "conv_s0" not in k}}, tmp_path / "sam2.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        clients.read_subject(tmp_path / "sam2.pt", image_size=SIZE).build()


@pytest.fixture(scope="module")
def published():
    """Return a SAM 2 with the decoder and memory of the published ones behind a tiny trunk."""
    pytest.importorskip("sam2", reason=NO_SAM2)
    from sam2.build_sam import build_sam2

    spec = dataclasses.replace(tiny_hiera_spec(), neck_dim=256)
    build = sam2_build(subject_of(spec, memory={"no_obj_embed_spatial": torch.zeros(1)}))
    torch.manual_seed(0)
    reference = build_sam2(build.config, device="cpu", hydra_overrides_extra=list(build.overrides))
    _, memory = split_memory(from_sam2(reference.state_dict()))
    return subject_of(spec, memory=memory)


def test_sam2_pt__loads_strictly_in_the_image_predictor(published, tmp_path):
    subject = published
    assert why_not_sam2(subject) is None
    probe = make_probe(subject)
    expected = expected_outputs(subject, probe)
    _, artefact = SAM_FORMAT.write(subject, tmp_path)
    loaded_by = assert_equal_outputs(artefact, tmp_path, probe, expected)
    assert loaded_by == "sam2's build_sam2 (configs/sam2.1/sam2.1_hiera_t.yaml), predictor"
    stored = torch.load(tmp_path / "sam2.pt", weights_only=True)["model"]
    torch.save({"model": {("odd" if k == "no_obj_ptr" else k): v for k, v in stored.items()}}, tmp_path / "sam2.pt")
    with pytest.raises(RuntimeError, match="odd"):
        CLIENTS["sam2"](tmp_path / "sam2.pt", probe, {})


def test_sam2_pt__incomplete_memory_is_read_by_this_project(published, tmp_path):
    memory = {name: tensor for name, tensor in published.memory.items() if name != "no_obj_ptr"}
    subject = dataclasses.replace(published, memory=memory)
    assert "the 160 tensors of the memory of videos, of which the base weights contain 159" in why_not_sam2(subject)
    _, artefact = SAM_FORMAT.write(subject, tmp_path)
    probe = make_probe(subject)
    loaded_by = assert_equal_outputs(artefact, tmp_path, probe, expected_outputs(subject, probe))
    assert loaded_by == "samgraft's builder for sam2_t at 64 px"


def test_why_not_sam2__mask_tokens_memory_and_pixel_statistics():
    spec, memory = tiny_hiera_spec(), {f"maskmem_tpos_enc{i or ''}": torch.zeros(1) for i in range(157)}
    assert why_not_sam2(subject_of(spec, memory=memory)) is None
    assert "builds 4 mask tokens and these weights have 6" in why_not_sam2(
        subject_of(spec, memory=memory, num_multimask_outputs=5)
    )
    assert "memory of videos" in why_not_sam2(subject_of(spec))
    other = dataclasses.replace(spec, pixel_mean=(0.0, 0.0, 0.0))
    assert "other pixel statistics" in why_not_sam2(subject_of(other, memory=memory))


def test_transformers_folder__opens_with_no_key_left_over(tiny, tmp_path):
    subject, probe, expected = tiny
    [artefact] = TRANSFORMERS_FORMAT.write(subject, tmp_path)
    assert assert_equal_outputs(artefact, tmp_path, probe, expected) == "transformers' Sam2Model"
    alone = subject_of(tiny_hiera_spec(), whole=False)
    (tmp_path / "alone").mkdir()
    [artefact] = TRANSFORMERS_FORMAT.write(alone, tmp_path / "alone")
    loaded_by = assert_equal_outputs(artefact, tmp_path / "alone", probe, expected, {"embeddings"})
    assert loaded_by == "transformers' Sam2VisionModel"


def test_onnx__runs_in_onnx_runtime(tiny, tmp_path):
    pytest.importorskip("onnxruntime")
    subject, probe, expected = tiny
    assert ONNX_FORMAT.why_not(subject) is None
    [artefact] = ONNX_FORMAT.write(subject, tmp_path)
    assert_equal_outputs(artefact, tmp_path, probe, expected)


def test_memory__names_of_the_package_are_all_known():
    """Every tensor of the package's model is that of an image or of the memory."""
    pytest.importorskip("sam2", reason=NO_SAM2)
    from sam2.build_sam import build_sam2

    reference = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="meta")
    images, memory = split_memory(from_sam2(reference.state_dict()))
    assert {name.split(".")[0] for name in images} == {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert all(name.startswith(MEMORY) for name in memory)


@pytest.mark.slow  # the published shape has 39 million parameters
@pytest.mark.parametrize("generation", ["sam2", "sam2.1"])
def test_file_of_the_package__is_loaded_strictly_with_equal_outputs(tmp_path, generation):
    pytest.importorskip("sam2", reason=NO_SAM2)
    from sam2.build_sam import build_sam2

    torch.manual_seed(0)
    reference = build_sam2(f"configs/{generation}/{generation}_hiera_t.yaml", device="cpu")
    torch.save({"model": reference.state_dict()}, tmp_path / "published.pt")
    weights = read_weights(tmp_path / "published.pt")
    assert weights.spec == arch_spec("sam2_t")
    sam = load_sam(tmp_path / "published.pt", image_size=256)
    subject = Subject(tensors=sam.state_dict(), spec=weights.spec, image_size=256, memory=weights.memory)
    assert why_not_sam2(subject) is None
    probe = make_probe(subject)
    expected = predictor_outputs(tmp_path / "published.pt", subject, probe)
    assert_equal_outputs(SAM_FORMAT.write(subject, tmp_path)[1], tmp_path, probe, expected)
    for name, value in expected_outputs(subject, probe).items():
        largest = max(1.0, float(expected[name].abs().max()))
        assert float((value - expected[name]).abs().max()) < 1e-4 * largest, name
