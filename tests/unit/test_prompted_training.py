"""Training and validation with prompts: trained tensors, drawn prompts and the position of masks."""

import dataclasses

import numpy as np
import pytest
import torch
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.finetune.adapters import AdapterConfig, TuningScope, adapt, trainable_tensors
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.loss import LossConfig, MaskLoss
from samgraft.finetune.prompting import prompted_inference
from samgraft.finetune.prompting.prompt_sampling import PromptConfig, PromptMode, PromptUnit
from samgraft.finetune.prompting.prompted_inference import label_prompts, prompt_to_frame, segment_prompted_slices
from samgraft.finetune.prompting.prompted_loss import PromptedLoss, _iou
from samgraft.finetune.prompting.prompts import Prompt, decode_prompts
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.samples.frame import fit_frame
from torch import nn

SIZE = 32
MODES = [mode for mode in PromptMode if mode is not PromptMode.NONE]
TWO = ClassTable(ids=(3, 7), names=("a", "b"))


def config_of(mode, **settings):
    return PromptConfig(mode=mode, **settings)


def batch():
    """Return masks of two slices with two classes."""
    masks = torch.zeros(2, 2, SIZE, SIZE, dtype=torch.bool)
    masks[0, 0, 4:12, 5:20] = True
    masks[0, 1, 16:28, 10:18] = True
    masks[1, 1, 2:9, 2:9] = True
    return masks


@pytest.fixture(scope="module")
def features():
    return ImageFeatures(torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_fixture__embeddings_fit_the_decoder(features):
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)
    assert features.embeddings.shape[1:] == (sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_prompted_loss__mode_moves_its_mask_tokens_and_the_iou_head(mode, method, features):
    config = config_of(mode)
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)
    torch.manual_seed(1)
    adapter = AdapterConfig(method=method, scope=TuningScope.DECODER, r=2, lora_alpha=2)
    adapt(sam, adapter, num_classes=2, prompted_tokens=config.mask_tokens)
    loss = PromptedLoss(config, LossConfig(), seed=0)
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    optimizer = torch.optim.SGD(trainable_tensors(sam).values(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss(sam, features, batch(), [2 * step, 2 * step + 1])["loss"].backward()
        optimizer.step()
    moved = {name for name, tensor in sam.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved <= set(trainable_tensors(sam))
    assert any("iou_prediction_head" in name for name in moved)
    tokens = {int(name.split("output_hypernetworks_mlps.")[1][0]) for name in moved if "hypernetworks" in name}
    # Only the best of the three masks of an ambiguous prompt learns.
    assert tokens <= set(config.mask_tokens)
    assert 0 in tokens or mode is PromptMode.POINTS
    assert tokens & {1, 2, 3} or mode in {PromptMode.BOX, PromptMode.MASK}
    assert not any(name.startswith(("prompt_encoder", "image_encoder")) for name in moved)


@pytest.mark.parametrize("mode", MODES)
def test_prompted_loss__equal_counters_give_equal_prompts(mode, features):
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)
    loss = PromptedLoss(config_of(mode), LossConfig(), seed=0)

    def value(counters, seed=0):
        loss.seed = seed
        torch.manual_seed(int(torch.randint(1000, ()).item()))
        with torch.no_grad():
            return loss(sam, features, batch(), counters)["loss"].item()

    assert value([5, 6]) == value([5, 6])
    assert len({value([5, 6]), value([7, 8]), value([5, 6], seed=1)}) > 1


def test_prompted_loss__no_object_gives_zero_gradients(features):
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)
    adapt(sam, AdapterConfig(method="full"), num_classes=1, prompted_tokens=(0,))
    out = PromptedLoss(config_of(PromptMode.BOX), LossConfig(), seed=0)(
        sam, features, torch.zeros_like(batch()), [0, 1]
    )
    out["loss"].backward()
    assert out["loss"].item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in trainable_tensors(sam).values())


def test_prompted_loss__single_point_uses_its_best_mask(features):
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)
    config = config_of(PromptMode.POINTS, iou_weight=0.0)
    loss = PromptedLoss(config, LossConfig(), seed=3)
    masks = batch()[:1, :1]
    with torch.no_grad():
        whole = loss(sam, features.of_images(slice(1)), masks, [4])["loss"]
        prompts = [one.prompt for one in loss._draw(sam, masks, [4])]
        logits, _ = decode_prompts(sam, features.of_images(slice(1)), prompts, multimask=True)
        each = MaskLoss()(logits[0], masks[0].expand(3, -1, -1))
    assert whole.item() == pytest.approx(each.min().item(), abs=1e-6)
    assert each.max() - each.min() > 1e-3


def test_prompted_loss__iou_weight_and_clicks_change_the_loss(features):
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)

    def value(config):
        with torch.no_grad():
            return PromptedLoss(config, LossConfig(), seed=0)(sam, features, batch(), [0, 1])

    with_iou, without = value(config_of(PromptMode.BOX)), value(config_of(PromptMode.BOX, iou_weight=0.0))
    assert with_iou["loss"] - without["loss"] == pytest.approx(with_iou["loss/iou"].item(), abs=1e-6)
    one, five = (value(config_of(PromptMode.CLICKS, num_clicks=n))["loss"] for n in (1, 5))
    assert abs(one - five) > 1e-5


def test_iou__diagonal_and_half_give_one_fifth():
    true = torch.zeros(1, 4, 4, dtype=torch.bool)
    true[0, :2] = True
    predicted = torch.where(torch.eye(4) > 0, 1.0, -1.0)[None]
    # 4 predicted, 8 true, 2 in both.
    assert _iou(predicted, true).tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("unit", PromptUnit)
def test_prompted_loss__unit_determines_the_number_of_prompts(unit, features):
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)
    masks = batch()
    masks[1, 1, 20:24, 20:24] = True
    drawn = PromptedLoss(config_of(PromptMode.BOX, unit=unit), LossConfig(), seed=0)._draw(sam, masks, [0, 1])
    prompts = [one.prompt for one in drawn]
    assert len(prompts) == (4 if unit is PromptUnit.COMPONENT else 3)
    assert [p.image for p in prompts] == [0, 0, 1, 1][: len(prompts)]


class FillsBoxes:
    """Replacement of SAM that returns the filled box on the input frame."""

    def __init__(self):
        self.received = []

    def __call__(self, sam, features, prompts):
        self.received.append(prompts)
        columns = torch.arange(SIZE).float()
        out = []
        for number, prompt in enumerate(prompts):
            x0, y0, x1, y1 = prompt.box
            inside = ((columns >= x0) & (columns <= x1))[None] & ((columns >= y0) & (columns <= y1))[:, None]
            out.append(torch.where(inside, 1.0 + number, -1.0))
        return torch.stack(out), torch.ones(len(prompts))


def label_slices():
    label = np.zeros((3, 20, 12), dtype=np.uint8)
    label[0, 3:9, 2:7] = 3
    label[0, 12:18, 5:11] = 7
    label[2, 0:4, 8:12] = 7
    label[2, 10, 2] = 3
    return label


def segment_slices(segmenter, features, label, classes, config):
    frame = fit_frame(label.shape[1:], image_size=SIZE, keep_aspect=True)
    source = label_prompts(segmenter, label, "s_1", classes, config.for_evaluation())
    return segment_prompted_slices(
        segmenter,
        features,
        source.prompts_of(range(len(label)), frame),
        classes=classes,
        frame=frame,
        num_corrections=source.num_corrections,
    )


def segmented(monkeypatch, classes, config, label):
    fake = FillsBoxes()
    monkeypatch.setattr(prompted_inference, "predict_prompts", fake)
    segmenter = Segmenter(make_sam(tiny_vit_t_spec(), image_size=SIZE), num_classes=2)
    return segment_slices(segmenter, ImageFeatures(torch.zeros(3, 32, 8, 8)), label, classes, config), fake


def test_inference__filled_boxes_reproduce_the_label(monkeypatch):
    """The objects are nearly rectangles, so filled boxes on the slices' own pixels equal them."""
    label = label_slices()
    predicted, fake = segmented(monkeypatch, TWO, config_of(PromptMode.BOX), label)
    assert np.array_equal(predicted[1], np.zeros((20, 12)))
    for channel in range(2):
        true, found = TWO.true_mask(label, channel), TWO.predicted_mask(predicted, channel)
        assert 2 * (true & found).sum() / (true.sum() + found.sum()) > 0.85
    # Evaluation prompts for objects of a single pixel too.
    assert len(fake.received[0]) == 4


def test_inference__overlapping_classes_share_pixels(monkeypatch):
    label = label_slices()
    table = ClassTable.of_regions({"whole": [3, 7], "b": [7]})
    predicted, _ = segmented(monkeypatch, table, config_of(PromptMode.BOX), label)
    assert table.predicted_mask(predicted, 0)[0, 15, 8]
    assert table.predicted_mask(predicted, 1)[0, 15, 8]
    assert not table.predicted_mask(predicted, 1)[0, 5, 4]


def test_inference__jitter_is_off_by_default_and_repeatable(monkeypatch):
    def boxes(**settings):
        config = config_of(PromptMode.BOX, max_jitter=0.2, box_jitter=0.3, **settings)
        _, fake = segmented(monkeypatch, TWO, config, label_slices())
        return [prompt.box.tolist() for prompt in fake.received[0]]

    tight = boxes()
    frame = fit_frame((20, 12), image_size=SIZE, keep_aspect=True)
    expected = prompt_to_frame(Prompt(image=0, box=torch.tensor([2.0, 3.0, 6.0, 8.0])), frame)
    assert tight[0] == expected.box.tolist()
    assert boxes(eval_jitter=1.0) == boxes(eval_jitter=1.0) != tight


@pytest.mark.parametrize("mode", MODES)
def test_inference__every_mode_is_repeatable(mode):
    segmenter = Segmenter(make_sam(tiny_vit_t_spec(), image_size=SIZE), num_classes=2).eval()
    features = ImageFeatures(torch.randn(3, 32, 8, 8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        first, again = (segment_slices(segmenter, features, label_slices(), TWO, config_of(mode)) for _ in range(2))
    assert np.array_equal(first, again)
    assert set(np.unique(first)) <= {0, 3, 7}
    assert not first[1].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": PromptMode.NONE, "unit": PromptUnit.CLASS}, r"prompt\.unit has no effect with prompt\.mode=none"),
        ({"mode": PromptMode.BOX, "num_negative": 2}, "num_negative has no effect"),
        ({"mode": PromptMode.MASK, "box_jitter": 0.3}, "box_jitter has no effect"),
    ],
)
def test_prompt_config__unused_setting_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PromptConfig(**values)


def test_segmenter__three_equal_channels_equal_one():
    segmenter = Segmenter(make_sam(tiny_vit_t_spec(), image_size=SIZE), num_classes=2).eval()
    images = torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        one = segmenter(images)
        torch.testing.assert_close(segmenter(images.expand(-1, 3, -1, -1)), one)
        other = images.expand(-1, 3, -1, -1).clone()
        other[:, 2] += 0.5
        assert not torch.allclose(segmenter.embed(other).embeddings, segmenter.embed(images).embeddings, atol=1e-4)


def test_for_evaluation__automatic_mode_is_unchanged():
    assert PromptConfig().for_evaluation() == PromptConfig()
    assert (
        dataclasses.replace(config_of(PromptMode.BOX), min_pixels=1, box_jitter=0.0, max_jitter=0.0)
        == config_of(PromptMode.BOX).for_evaluation()
    )


def test_adapt__prompt_encoder_stays_frozen(features):
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)
    adapt(sam, AdapterConfig(method="full"), num_classes=1, prompted_tokens=(0,))
    assert not any(p.requires_grad for p in sam.prompt_encoder.parameters())
    assert all(p.requires_grad for p in sam.mask_decoder.iou_prediction_head.parameters())
    assert isinstance(sam.mask_decoder.output_hypernetworks_mlps[1], nn.Module)
    assert not any(p.requires_grad for p in sam.mask_decoder.output_hypernetworks_mlps[1].parameters())
