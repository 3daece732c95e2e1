"""Decoding and drawing of prompts: equal to segment_anything, deterministic, and inside the slice."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.finetune.prompting.prompt_sampling import (
    MASK_LOGIT,
    ClassPrompt,
    PromptConfig,
    PromptMode,
    PromptUnit,
    add_correction_click,
    center_of,
    draw_box,
    draw_points,
    draw_prompt,
    find_objects,
    mask_prompt,
    roughen,
    thin_out,
)
from samgraft.finetune.prompting.prompts import (
    Prompt,
    best_masks,
    box_to_frame,
    decode_prompts,
    points_to_frame,
    predict_prompts,
)
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.samples.frame import fit_frame

SIZE = 32
BOX = Prompt(image=0, box=torch.tensor([4.0, 5.0, 20.0, 18.0]))
POINT = Prompt(image=1, points=torch.tensor([[9.0, 7.0]]), labels=torch.tensor([1.0]))
THREE = Prompt(image=0, points=torch.tensor([[9.0, 7], [3, 2], [30, 30]]), labels=torch.tensor([1.0, 0, 0]))
BOX_POINT = dataclasses.replace(THREE, image=2, box=torch.tensor([1.0, 2.0, 9.0, 9.0]))


@pytest.fixture(scope="module")
def sam():
    return make_sam(tiny_vit_t_spec(), image_size=SIZE)


@pytest.fixture(scope="module")
def features(sam):
    grid = sam.prompt_encoder.image_embedding_size
    return ImageFeatures(
        torch.randn(3, sam.prompt_encoder.embed_dim, *grid, generator=torch.Generator().manual_seed(0))
    )


def mask_of(sam, image=1):
    side = sam.prompt_encoder.mask_input_size[0]
    return Prompt(image=image, mask=torch.randn(side, side, generator=torch.Generator().manual_seed(2)))


def one_by_one(sam, features, prompt, *, multimask):
    """Decode one prompt as segment_anything's own predictor does."""
    points = None if prompt.points is None else (prompt.points[None], prompt.labels[None])
    boxes = None if prompt.box is None else prompt.box[None]
    masks = None if prompt.mask is None else prompt.mask[None, None]
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
    return sam.mask_decoder(
        image_embeddings=features.embeddings[prompt.image : prompt.image + 1],
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("max_per_pass", [1, 2, 64])
def test_decode_prompts__mixed_prompts_equal_segment_anything_one_by_one(sam, features, multimask, max_per_pass):
    """Boxes, different numbers of points, masks and mixtures over three images, in any order."""
    second_mask = dataclasses.replace(mask_of(sam, image=0), mask=-mask_of(sam).mask)
    prompts = [BOX, POINT, mask_of(sam), THREE, dataclasses.replace(BOX, image=2), BOX_POINT, second_mask]
    with torch.no_grad():
        logits, iou = decode_prompts(sam, features, prompts, multimask=multimask, max_per_pass=max_per_pass)
        for place, prompt in enumerate(prompts):
            expected_logits, expected_iou = one_by_one(sam, features, prompt, multimask=multimask)
            torch.testing.assert_close(logits[place], expected_logits[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(iou[place], expected_iou[0], atol=1e-5, rtol=1e-5)
    assert logits.shape[1] == (3 if multimask else 1)
    assert (logits[0] - logits[4]).abs().max() > 1e-3, "the image must change the logits"


def test_decode_prompts__autocast_keeps_exact_positions(sam, features):
    """Positions in bf16 would be wrong by up to 0.1."""
    with torch.no_grad():
        exact, _ = decode_prompts(sam, features, [BOX], multimask=False)
        encoded = []
        keep = sam.mask_decoder.register_forward_pre_hook(
            lambda _, args, kwargs: encoded.append(kwargs["sparse_prompt_embeddings"]), with_kwargs=True
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decode_prompts(sam, features, [BOX], multimask=False)
        keep.remove()
        expected, _ = sam.prompt_encoder(points=None, boxes=BOX.box[None], masks=None)
    assert torch.equal(encoded[0], expected)
    assert torch.isfinite(exact).all()


def test_predict_prompts__single_point_uses_the_best_of_three_masks(sam, features):
    with torch.no_grad():
        logits, iou = predict_prompts(sam, features, [BOX, POINT, THREE])
        three, ious = decode_prompts(sam, features, [POINT], multimask=True)
        single, _ = decode_prompts(sam, features, [BOX, THREE], multimask=False)
    assert torch.allclose(logits[1], three[0, ious[0].argmax()], atol=1e-6)
    assert iou[1].item() == pytest.approx(ious.max().item(), abs=1e-6)
    assert torch.allclose(logits[[0, 2]], single[:, 0], atol=1e-6)


def test_best_masks__different_ious_select_the_highest():
    logits = torch.arange(6.0).reshape(2, 3, 1, 1)
    best, iou = best_masks(logits, torch.tensor([[0.1, 0.9, 0.2], [0.7, 0.1, 0.2]]))
    assert best.flatten().tolist() == [1.0, 3.0]
    assert iou.tolist() == pytest.approx([0.9, 0.7])


@pytest.mark.parametrize(
    ("parts", "message"),
    [({}, "must have a box"), ({"points": torch.zeros(1, 2)}, "together"),
     ({"points": torch.zeros(2, 2), "labels": torch.zeros(1)}, "K labels")],
)  # fmt: skip
def test_prompt__missing_or_mismatched_parts_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Prompt(image=0, **parts)


def test_box_to_frame__double_size_keeps_the_edges_of_pixels():
    frame = fit_frame((20, 10), image_size=40, keep_aspect=True)
    box = box_to_frame(torch.tensor([2.0, 4.0, 5.0, 9.0]), frame)
    # Twice as large: columns 2..5 become 4..11, rows 4..9 become 8..19.
    assert box.tolist() == [4.0, 8.0, 11.0, 19.0]
    assert points_to_frame(torch.tensor([[2.0, 4.0]]), frame).tolist() == [[4.5, 8.5]]


def test_box_to_frame__squashed_slice_scales_both_axes_by_their_own_factor():
    """A slice of 20 rows and 10 columns in a 40 px square: rows times 2, columns times 4."""
    frame = fit_frame((20, 10), image_size=40, keep_aspect=False)
    assert box_to_frame(torch.tensor([2.0, 4.0, 5.0, 9.0]), frame).tolist() == [8.0, 8.0, 23.0, 19.0]
    assert points_to_frame(torch.tensor([[2.0, 4.0]]), frame).tolist() == [[9.5, 8.5]]


def masks(*rectangles, size=24):
    out = np.zeros((len(rectangles), size, size), dtype=bool)
    for channel, pieces in enumerate(rectangles):
        for y0, x0, y1, x1 in pieces:
            out[channel, y0:y1, x0:x1] = True
    return out


TWO_CLASSES = masks([(2, 2, 6, 6), (10, 12, 16, 20)], [(18, 3, 22, 9), (0, 20, 1, 22)])


def test_find_objects__units_give_components_or_classes_above_min_pixels():
    config = PromptConfig(mode=PromptMode.BOX, min_pixels=4)
    found = find_objects(TWO_CLASSES, config)
    assert [channel for channel, _ in found] == [0, 0, 1]
    assert [int(mask_HW.sum()) for _, mask_HW in found] == [16, 48, 24]
    whole = find_objects(TWO_CLASSES, dataclasses.replace(config, unit=PromptUnit.CLASS))
    assert [int(mask_HW.sum()) for _, mask_HW in whole] == [64, 26]
    kept = thin_out(found, dataclasses.replace(config, max_objects=2), np.random.default_rng(0))
    assert len(kept) == 2
    assert all(any(o is k for o in found) for k in kept)


def test_find_objects__diagonal_neighbours_are_one_object():
    diagonal = np.eye(6, dtype=bool)[None]
    [(_, found_HW)] = find_objects(diagonal, PromptConfig(mode=PromptMode.BOX))
    assert found_HW.sum() == 6


def test_draw_box__jitter_moves_edges_within_its_limit():
    mask_HW = TWO_CLASSES[0] & masks([(10, 12, 16, 20)])[0]
    still = PromptConfig(mode=PromptMode.BOX).for_evaluation()
    assert draw_box(mask_HW, still, np.random.default_rng(0)).tolist() == [12, 10, 19, 15]
    config = PromptConfig(mode=PromptMode.BOX, box_jitter=0.5, max_jitter=0.1)
    boxes = np.array([draw_box(mask_HW, config, np.random.default_rng(seed)) for seed in range(50)])
    moved = np.abs(boxes - [12, 10, 19, 15])
    assert 0 < moved.max() <= 0.1 * 24 + 1e-6
    assert (boxes >= 0).all()
    assert (boxes <= 23).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()


def test_draw_points__labels_match_the_object():
    mask_HW = masks([(10, 12, 16, 20)])[0]
    config = PromptConfig(mode=PromptMode.POINTS, num_positive=3, num_negative=4)
    for seed in range(10):
        points, labels = draw_points(mask_HW, config, np.random.default_rng(seed), central=False)
        inside = [mask_HW[int(y), int(x)] for x, y in points]
        assert inside == [True] * 3 + [False] * 4
        assert labels.tolist() == [1, 1, 1, 0, 0, 0, 0]
    points, _ = draw_points(mask_HW, config, np.random.default_rng(0), central=True)
    assert tuple(points[0]) == center_of(mask_HW)


def test_center_of__is_the_pixel_farthest_from_the_edge():
    assert center_of(masks([(3, 4, 8, 9)])[0]) == (6.0, 5.0)
    # The border of the slice counts as an edge of the object.
    assert center_of(masks([(0, 0, 5, 5)])[0]) == (2.0, 2.0)


def test_mask_prompt__half_mask_has_both_signs():
    logits = mask_prompt(masks([(0, 0, 12, 24)])[0], side=8)
    assert logits.shape == (8, 8)
    assert logits[:4].min() == MASK_LOGIT
    assert logits[4:].max() == -MASK_LOGIT


def test_roughen__jitter_changes_but_never_empties_the_mask():
    config = PromptConfig(mode=PromptMode.MASK, mask_jitter=0.4)
    mask_HW = masks([(8, 8, 16, 16)])[0]
    changed = [roughen(mask_HW, config, np.random.default_rng(seed)) for seed in range(12)]
    assert sum(not np.array_equal(mask_HW, rough) for rough in changed) > 6
    dot = masks([(3, 3, 4, 4)])[0]
    assert all(roughen(dot, config, np.random.default_rng(seed)).any() for seed in range(12))
    assert np.array_equal(roughen(mask_HW, config.for_evaluation(), np.random.default_rng(0)), mask_HW)


@pytest.mark.parametrize("mode", [m for m in PromptMode if m is not PromptMode.NONE])
def test_draw_prompt__equal_seeds_give_equal_prompts(mode):
    config = PromptConfig(mode=mode)
    draw = {"image": 1, "to_mask": partial(mask_prompt, side=16), "central": False}
    first, again, *others = (
        draw_prompt(TWO_CLASSES[0], config, np.random.default_rng(seed), **draw) for seed in (3, 3, 4, 5, 6, 7)
    )

    def parts(prompt):
        return [None if p is None else p.tolist() for p in (prompt.box, prompt.points, prompt.labels, prompt.mask)]

    assert parts(first) == parts(again)
    assert any(parts(first) != parts(other) for other in others)
    if mode is PromptMode.CLICKS:
        kinds = {o.box is None for o in (first, *others)}
        assert kinds == {True, False}


def test_draw_prompt__mode_none_is_refused():
    with pytest.raises(ValueError, match="prompt mode"):
        draw_prompt(
            TWO_CLASSES[0], PromptConfig(), np.random.default_rng(0), image=0, to_mask=mask_prompt, central=False
        )


def test_add_correction_click__points_are_where_the_mask_is_wrong():
    true_HW = masks([(4, 4, 12, 12)])[0]
    missed = masks([(4, 4, 12, 8)])[0]
    too_much = masks([(4, 4, 12, 12), (2, 15, 3, 16)]).any(axis=0) | masks([(4, 14, 12, 20)])[0]
    logits = torch.zeros(8, 8)
    first = Prompt(image=0, box=torch.tensor([4.0, 4, 11, 11]))
    drawn = ClassPrompt(channel=0, prompt=first, true_HW=true_HW, rng=np.random.default_rng(0))
    positive = add_correction_click(first, drawn, missed, low_res_logits=logits, central=False)
    (x, y), label = positive.points[0].tolist(), positive.labels[0]
    assert label == 1
    assert true_HW[int(y), int(x)]
    assert not missed[int(y), int(x)]
    negative = add_correction_click(positive, drawn, too_much, low_res_logits=logits, central=True)
    # The middle of the larger one of two wrong regions.
    assert negative.labels.tolist() == [1, 0]
    assert negative.points[1].tolist() == list(center_of(masks([(4, 14, 12, 20)])[0]))
    assert negative.mask is logits
    assert negative.box is first.box
    right = add_correction_click(first, drawn, true_HW, low_res_logits=logits, central=False)
    assert right.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_clicks": 0}, "num_clicks"),
        ({"num_positive": 0, "num_negative": 2}, r"num_positive\n  Input should be greater than or equal to 1"),
        ({"box_jitter": -1.0}, "box_jitter"),
    ],
)
def test_prompt_config__values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PromptConfig(mode=PromptMode.POINTS, **values)


def test_draw_box__noise_follows_the_sides_of_the_box_and_of_the_slice():
    """A box of 20 columns and 2 rows in a slice of 48 columns and 24 rows."""
    mask_HW = np.zeros((24, 48), dtype=bool)
    mask_HW[11:13, 14:34] = True
    config = PromptConfig(mode=PromptMode.BOX, box_jitter=0.1, max_jitter=0.1)
    boxes = np.array([draw_box(mask_HW, config, np.random.default_rng(seed)) for seed in range(200)])
    x_std, y_std = boxes[:, [0, 2]].std(axis=0), boxes[:, [1, 3]].std(axis=0)
    np.testing.assert_allclose(x_std, 2.0, atol=0.4)
    np.testing.assert_allclose(y_std, 0.2, atol=0.05)
    assert 2.4 < np.abs(boxes[:, 0] - 14).max() <= 4.8 + 1e-6


def test_draw_points__negative_ones_are_in_the_doubled_box():
    mask_HW = masks([(11, 6, 13, 18)])[0]  # 2 rows, 12 columns
    config = PromptConfig(mode=PromptMode.POINTS, num_negative=1)
    outside = np.array([draw_points(mask_HW, config, np.random.default_rng(s), central=True)[0][1] for s in range(150)])
    assert (outside.min(axis=0).tolist(), outside.max(axis=0).tolist()) == ([0, 10], [23, 13])


def test_roughen__object_grows_and_shrinks():
    mask_HW = masks([(8, 8, 16, 16)])[0]
    config = PromptConfig(mode=PromptMode.MASK, mask_jitter=0.2)
    sizes = [int(roughen(mask_HW, config, np.random.default_rng(seed)).sum()) for seed in range(20)]
    assert min(sizes) < 64 < max(sizes)


def test_thin_out__every_object_is_kept_sometimes():
    objects = [(0, np.full((1, 1), number)) for number in range(4)]
    config = PromptConfig(mode=PromptMode.BOX, max_objects=2)
    kept = [thin_out(objects, config, np.random.default_rng(seed)) for seed in range(20)]
    assert {int(mask.item()) for pair in kept for _, mask in pair} == {0, 1, 2, 3}
    assert all(len(pair) == 2 and pair[0][1] < pair[1][1] for pair in kept)
