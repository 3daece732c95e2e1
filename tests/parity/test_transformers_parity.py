"""Masks of our SAM against transformers' ``SamModel``, after conversion of the files in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_factory import make_sam, randomise, tiny_plain_spec, tiny_vit_t_spec
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.sam import build_sam, decode_automatic, encode_images
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.load import load_sam, read_weights
from samgraft.shared.weights.save import save_sam
from samgraft.shared.weights.transformers_format import (
    SHARED_POSITIONS,
    from_transformers,
    save_transformers,
    to_transformers,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sam = make_sam(tiny_plain_spec(), image_size=160)
    path = tmp_path_factory.mktemp("transformers")
    return save_transformers(sam.state_dict(), path, sam.image_encoder.spec, image_size=160)


def test_saved_folder__gives_equal_outputs_in_transformers(folder: Path) -> None:
    from transformers import SamModel

    theirs, info = SamModel.from_pretrained(folder, output_loading_info=True)
    theirs = theirs.eval()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ours = make_sam(tiny_plain_spec(), image_size=160)
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = theirs.get_image_embeddings(images)
        embeddings = ours.image_encoder(images)
        torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
        points, labels = torch.tensor([[[40.0, 60.0], [100.0, 90.0]]]), torch.tensor([[1, 0]])
        sparse, dense = ours.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        logits, iou = ours.mask_decoder(
            image_embeddings=embeddings,
            image_pe=ours.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        out = theirs(image_embeddings=expected, input_points=points[None], input_labels=labels[None])
    scale = logits.abs().max().item()
    torch.testing.assert_close(out.pred_masks[:, 0], logits, atol=1e-5 * max(1.0, scale), rtol=1e-4)
    torch.testing.assert_close(out.iou_scores[:, 0], iou, atol=1e-4, rtol=1e-4)


def test_saved_folder__is_read_back_bitwise(folder: Path) -> None:
    expected = make_sam(tiny_plain_spec(), image_size=160).state_dict()
    for where in (folder, folder / "model.safetensors"):
        assert read_weights(where).format == "transformers SamModel"
        found = load_sam(where).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_folder_of_transformers__is_read(folder: Path, tmp_path: Path) -> None:
    from transformers import SamModel

    SamModel.from_pretrained(folder).save_pretrained(tmp_path)
    expected = make_sam(tiny_plain_spec(), image_size=160).state_dict()
    found = load_sam(tmp_path).state_dict()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("arch", ["vit_b", "vit_l", "vit_h"])
def test_key_map__is_a_bijection_on_every_published_shape(arch: str) -> None:
    with torch.device("meta"):
        tensors = build_sam(arch).state_dict()
    renamed = {k: v for k, v in to_transformers(tensors).items() if k != SHARED_POSITIONS}
    assert len(renamed) == len(tensors)
    back = from_transformers(renamed, [])
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in tensors.items()}


def test_vit_t__is_refused_because_transformers_has_no_tiny_vit(tmp_path: Path) -> None:
    sam = make_sam(tiny_vit_t_spec(), image_size=64)
    with pytest.raises(WeightsError, match="has a plain ViT only"):
        save_transformers(sam.state_dict(), tmp_path / "out", sam.image_encoder.spec, image_size=64)
    with pytest.raises(WeightsError, match="has no place for"):
        to_transformers(sam.state_dict())
    assert not (tmp_path / "out").exists()


def test_positional_copies__that_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[SHARED_POSITIONS] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="SamModel file differ"):
        read_weights(tmp_path)


@pytest.mark.parametrize("spec", [tiny_plain_spec(), tiny_vit_t_spec()], ids=["plain", "vit_t"])
def test_save_sam__gives_equal_outputs_after_loading(tmp_path: Path, spec: object) -> None:
    sam = make_sam(spec, image_size=64)
    for name in ("a.pth", "b.safetensors"):
        loaded = load_sam(save_sam(sam, tmp_path / name), image_size=64)
        image = torch.rand(2, 3, 64, 64)
        got, expected = (decode_automatic(m, encode_images(m, image), multimask=True) for m in (loaded, sam))
        assert torch.equal(got[0], expected[0])


def test_decode_automatic__equals_a_loop_over_images() -> None:
    sam = make_sam(tiny_plain_spec(), image_size=64)
    embeddings = torch.randn(3, 32, 4, 4)
    logits, iou = decode_automatic(sam, ImageFeatures(embeddings), multimask=False)
    assert logits.shape == (3, 1, 16, 16)
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    for i in range(3):
        one, one_iou = sam.mask_decoder(
            image_embeddings=embeddings[i : i + 1],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        torch.testing.assert_close(logits[i : i + 1], one, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(iou[i : i + 1], one_iou, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_real_vit_b__same_embeddings_as_transformers(tmp_path: Path) -> None:
    from transformers import SamModel

    ours = build_sam("vit_b", image_size=512)
    randomise(ours, scale=0.02)
    folder = save_transformers(ours.state_dict(), tmp_path, ours.image_encoder.spec, image_size=512)
    theirs = SamModel.from_pretrained(folder).eval()
    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.image_encoder(images), theirs.get_image_embeddings(images), atol=1e-5, rtol=1e-5
        )
