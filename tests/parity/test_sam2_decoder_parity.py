"""Prompt encoder and mask decoder of SAM 2 against the package ``sam2`` and transformers' ``Sam2Model``."""

import pytest
import torch
from model_factory import make_sam, randomise, tiny_hiera_spec
from original_hiera import NO_SAM2
from samgraft.finetune.prompting.prompts import Prompt, decode_prompts
from samgraft.shared.encoders.sam import encode_images, feature_shapes, feature_tensors
from samgraft.shared.encoders.sam2_decoder import Sam2MaskDecoder, Sam2PromptEncoder

DIM, GRID = 32, 6
SIZE = 16 * GRID
POINTS = (torch.tensor([[[10.0, 70.0], [40.5, 20.0]], [[3.0, 4.0], [90.0, 60.0]]]), torch.tensor([[1, 0], [1, 1]]))
BOXES = torch.tensor([[8.0, 9.0, 50.0, 61.0], [20.0, 4.0, 95.0, 30.0]])
MASKS = torch.randn(2, 1, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(4))
PROMPTS = {
    "automatic": {},
    "points": {"points": POINTS},
    "boxes": {"boxes": BOXES},
    "boxes and points": {"points": POINTS, "boxes": BOXES},
    "masks": {"masks": MASKS},
    "points and masks": {"points": POINTS, "masks": MASKS},
}


@pytest.fixture(scope="module")
def ours():
    prompts = Sam2PromptEncoder(
        embed_dim=DIM, image_embedding_size=(GRID, GRID), input_image_size=(SIZE, SIZE), mask_in_chans=16
    )
    decoder = Sam2MaskDecoder(dim=DIM).eval()
    randomise(prompts, seed=1)
    randomise(decoder, seed=2)
    return prompts, decoder


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(1, DIM, GRID, GRID, generator=generator)
    maps = [torch.randn(1, DIM, k * GRID, k * GRID, generator=generator) for k in (4, 2)]
    return embeddings, maps


def decode(ours, image, prompts, *, multimask):
    encoder, decoder = ours
    sparse, dense = encoder(**{"points": None, "boxes": None, "masks": None, **prompts})
    embeddings, maps = image
    return decoder(embeddings, encoder.get_dense_pe(), sparse, dense, multimask, decoder.project_high_res(maps))


@pytest.fixture(scope="module")
def reference(ours):
    """Return the prompt encoder and the mask decoder of the package, with our weights."""
    pytest.importorskip("sam2", reason=NO_SAM2)
    from sam2.modeling.sam.mask_decoder import MaskDecoder
    from sam2.modeling.sam.prompt_encoder import PromptEncoder
    from sam2.modeling.sam.transformer import TwoWayTransformer

    prompts = PromptEncoder(
        embed_dim=DIM, image_embedding_size=(GRID, GRID), input_image_size=(SIZE, SIZE), mask_in_chans=16
    )
    decoder = MaskDecoder(
        transformer_dim=DIM,
        transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=8, mlp_dim=8 * DIM),
        iou_head_hidden_dim=DIM,
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
        dynamic_multimask_via_stability=True,
    ).eval()
    prompts.load_state_dict(ours[0].state_dict(), strict=True)
    tensors = {name: tensor for name, tensor in ours[1].state_dict().items() if name != "no_mem_embed"}
    decoder.load_state_dict(tensors, strict=True)
    return prompts, decoder


def decode_as_predictor(reference, ours, image, prompts, *, multimask):
    """Decode as ``SAM2ImagePredictor._predict``, where boxes are points with the labels 2 and 3."""
    encoder, decoder = reference
    points, labels = prompts.get("points", (torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.int64)))
    if "boxes" in prompts:
        points = torch.cat([prompts["boxes"].reshape(-1, 2, 2), points], dim=1)
        labels = torch.cat([torch.tensor([[2, 3], [2, 3]]), labels], dim=1)
    sparse, dense = encoder(
        points=(points, labels) if points.shape[1] else None, boxes=None, masks=prompts.get("masks")
    )
    embeddings, maps = image
    high_res = [decoder.conv_s0(maps[0]), decoder.conv_s1(maps[1])]
    return decoder(
        image_embeddings=embeddings + ours[1].no_mem_embed.view(1, -1, 1, 1),
        image_pe=encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        repeat_image=len(sparse) > 1,
        high_res_features=high_res,
    )


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
def test_sam2_decoder__equals_the_image_predictor(ours, reference, image, kind, dynamic, multimask, monkeypatch):
    monkeypatch.setattr(ours[1], "dynamic_multimask", dynamic)
    monkeypatch.setattr(reference[1], "dynamic_multimask_via_stability", dynamic)
    logits, iou = decode(ours, image, PROMPTS[kind], multimask=multimask)
    expected, expected_iou, _, _ = decode_as_predictor(reference, ours, image, PROMPTS[kind], multimask=multimask)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits, expected, atol=1e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(iou, expected_iou, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_sam2_decoder__object_score_equals_the_package(ours, reference, image):
    sparse, dense = ours[0](points=POINTS, boxes=None, masks=None)
    embeddings, maps = image
    *_, score = ours[1].predict_all(embeddings, ours[0].get_dense_pe(), sparse, dense, ours[1].project_high_res(maps))
    *_, expected = decode_as_predictor(reference, ours, image, PROMPTS["points"], multimask=True)
    torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_sam2_decoder__unstable_single_mask_is_replaced_only_when_dynamic(ours, image, monkeypatch):
    """The random masks are unstable, so that both branches occur in the parity test above."""
    off, _ = decode(ours, image, PROMPTS["boxes"], multimask=False)
    three, iou = decode(ours, image, PROMPTS["boxes"], multimask=True)
    monkeypatch.setattr(ours[1], "dynamic_multimask", True)
    on, on_iou = decode(ours, image, PROMPTS["boxes"], multimask=False)
    assert not torch.equal(on, off)
    replaced = [i for i in range(2) if not torch.equal(on[i], off[i])]
    assert all(torch.equal(on[i, 0], three[i, iou[i].argmax()]) for i in replaced)
    assert all(on_iou[i, 0] == iou[i].max() for i in replaced)
    ours[1].train()
    assert torch.equal(decode(ours, image, PROMPTS["boxes"], multimask=False)[0], off)
    ours[1].eval()


@torch.no_grad()
def test_sam2_decoder__batch_of_images_equals_a_loop(ours, image):
    encoder, decoder = ours
    embeddings = torch.cat([image[0], -image[0]])
    maps = [torch.cat([one, 0.5 * one]) for one in image[1]]
    sparse, dense = encoder(points=None, boxes=None, masks=None)
    logits, iou = decoder(embeddings, encoder.get_dense_pe(), sparse, dense, True, decoder.project_high_res(maps))
    for i in range(2):
        alone = (embeddings[i : i + 1], [one[i : i + 1] for one in maps])
        expected, expected_iou = decode(ours, alone, {}, multimask=True)
        torch.testing.assert_close(logits[i : i + 1], expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(iou[i : i + 1], expected_iou, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def sam():
    return make_sam(tiny_hiera_spec(), image_size=64)


@torch.no_grad()
def test_decode_prompts__mixed_prompts_on_several_images_equal_one_by_one(sam):
    """Every prompt reads the finer maps of its own image, whatever else is in its pass."""
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = encode_images(sam, images)
    box, point = torch.tensor([5.0, 6.0, 40.0, 50.0]), torch.tensor([[20.0, 30.0]])
    prompts = [Prompt(image=image, box=box) for image in (2, 0, 2)]
    prompts += [Prompt(image=1, points=point, labels=torch.ones(1)), Prompt(image=0, mask=torch.randn(16, 16))]
    for multimask in (False, True):
        logits, iou = decode_prompts(sam, features, prompts, multimask=multimask)
        for place, prompt in enumerate(prompts):
            alone = encode_images(sam, images[prompt.image : prompt.image + 1])
            sparse, dense = sam.prompt_encoder(
                points=None if prompt.points is None else (prompt.points[None], prompt.labels[None]),
                boxes=None if prompt.box is None else prompt.box[None],
                masks=None if prompt.mask is None else prompt.mask[None, None],
            )
            expected, expected_iou = sam.mask_decoder(
                alone.embeddings, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask, alone.high_res
            )
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(logits[place], expected[0], atol=1e-5 * scale, rtol=1e-4)
            torch.testing.assert_close(iou[place], expected_iou[0], atol=1e-5, rtol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "the image must change the logits"


def test_features__shapes_and_tensors_are_those_of_the_maps(sam):
    features = encode_images(sam, torch.zeros(2, 3, 64, 64))
    assert [tuple(one.shape[1:]) for one in (features.embeddings, *features.high_res)] == feature_shapes(sam)
    before = feature_tensors(sam)
    assert {name for name in before if name.startswith("mask_decoder.")} == {
        f"mask_decoder.conv_s{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
