"""The objective ``dino``, its loss, its teacher, its schedules and its settings."""

import copy
import math

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from samgraft.shared.encoders.base import freeze_batch_norm
from samgraft.shared.errors import UsageError
from samgraft.ssl.objectives.dino import DINO, DINOConfig, teacher_temperature
from samgraft.ssl.objectives.teacher import update_ema
from samgraft.ssl.scope import freeze_depths
from samgraft.ssl.views.crops import CropConfig, multi_crop
from samgraft.ssl.views.masking import MaskKind, mask_unit, scattered_masks
from samgraft.ssl.views.view_features import small_view_features, view_features
from tiny_encoders import lively_encoder, plain_encoder, slices

COUNTERS = (7, 8, 9)
SIZES = {"vit_t": 32, "plain": 96}


def make_objective(kind="vit_t", *, encoder=None, max_steps=100, **settings):
    encoder = encoder or {"vit_t": lively_encoder, "plain": plain_encoder}[kind]()
    crops = settings.pop("crops", CropConfig(num_local_crops=2))
    small = {"output_dim": 12, "head_hidden_dim": 8, "head_bottleneck_dim": 4, "freeze_last_layer": 0.0}
    torch.manual_seed(1)
    return DINO(encoder, DINOConfig(crops=crops, **(small | settings)), seed=3, max_steps=max_steps)


def images_for(objective):
    return slices(count=3, size=objective.encoder.image_size)


def train_step(objective, step=0, lr=0.1):
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=lr)
    objective.loss(images_for(objective), sample_counters=COUNTERS, step=step).total.backward()
    objective.before_step(step)
    optimizer.step()
    objective.after_step(step)


def copy_of(objective):
    return {name: tensor.clone() for name, tensor in objective.state_dict().items()}


def moved_since(objective, before):
    return {name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("kind", ["vit_t", "plain"])
def test_loss__equals_lightlys_terms(kind):
    objective = make_objective(kind, teacher_temp_warmup=0.0, ibot_weight=0.7)
    images = images_for(objective)
    result = objective.loss(images, sample_counters=COUNTERS, step=0)
    crops = multi_crop(
        images,
        sample_counters=COUNTERS,
        seed=3,
        config=objective.config.crops,
        local_size_px=objective.local_size_px,
    )
    masks = objective._masks(COUNTERS)
    taught = objective.teacher.heads.tokens(
        view_features(objective.teacher.encoder, crops.global_BCSS, with_neck=False)
    )
    learned = objective.heads.tokens(
        view_features(
            objective.encoder,
            crops.global_BCSS,
            with_neck=False,
            token_mask_Bhw=masks,
            mask_token=objective.mask_token,
        )
    )
    small = objective.heads.tokens(
        small_view_features(
            objective.encoder, crops.local_BCss, sample_counters=COUNTERS, seed=objective.seed, with_neck=False
        )
    )
    teacher_out = list(objective.teacher.heads.view(taught.mean(1)).split(3))
    student_out = [*objective.heads.view(learned.mean(1)).split(3), *objective.heads.view(small.mean(1)).split(3)]
    dino = DINOLoss(12)(teacher_out, student_out, teacher_temp=0.07)
    torch.testing.assert_close(result.parts["dino"], dino.detach())
    side = int(math.sqrt(taught.shape[1]))
    repeat = side // masks.shape[-1]
    hidden = masks.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
    with_holes = hidden.flatten(1).any(1)
    flat = hidden.flatten(1)
    ibot = IBOTPatchLoss(12)(
        objective.teacher.heads.token(taught[flat]),
        objective.heads.token(learned[flat]),
        hidden[with_holes],
        teacher_temp=0.07,
    )
    torch.testing.assert_close(result.parts["ibot"], ibot.detach())
    total = dino + 0.7 * ibot + 0.1 * result.parts["koleo"]
    torch.testing.assert_close(result.total.detach(), total.detach())


@pytest.mark.parametrize("kind", ["vit_t", "plain"])
@pytest.mark.parametrize("train_neck", [False, True])
def test_gradient_flow__student_trains_and_teacher_follows(kind, train_neck):
    objective = make_objective(kind, train_neck=train_neck)
    before = copy_of(objective)
    trainable = {name for name, p in objective.named_parameters() if p.requires_grad}
    train_step(objective)
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)  # or DDP would wait
    assert all(p.grad is None for p in objective.teacher.parameters())
    moved = moved_since(objective, before)
    untouched = "encoder.neck" if not train_neck else "nothing"
    learned = {name for name in trainable if not name.startswith(untouched)}
    assert {name for name in moved if not name.startswith(("teacher.", "dino_loss.", "ibot_loss."))} == learned
    expected = {f"teacher.{name}" for name in learned if name.startswith(("encoder.", "heads."))}
    assert {name for name in moved if name.startswith("teacher.")} == expected
    assert "dino_loss.step_center.center_D" in moved
    assert "ibot_loss.center.center_D" in moved


def test_gradient_flow__frozen_depths_do_not_change_in_student_and_teacher():
    encoder = lively_encoder()
    frozen = freeze_depths(encoder, 2)
    objective = make_objective(encoder=encoder)
    before = copy_of(objective)
    train_step(objective)
    moved = moved_since(objective, before)
    assert not any(f"encoder.{name}" in moved or f"teacher.encoder.{name}" in moved for name in frozen)
    assert "mask_token" not in moved  # above a frozen stem it would cost a backward pass through all frozen layers
    assert any(name.startswith("teacher.encoder.layers.3") for name in moved)


def test_after_step__teacher_equals_an_average_by_hand():
    objective = make_objective(momentum=0.75, final_momentum=1.0, max_steps=11)
    teacher, student = objective.teacher.encoder, objective.encoder
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    objective.after_step(5)  # half of the cosine, momentum 0.875
    for name, parameter in student.named_parameters():
        expected = 0.875 * before[name] + 0.125 * parameter
        torch.testing.assert_close(teacher.get_parameter(name), expected)
    unchanged = {name: p.clone() for name, p in teacher.named_parameters()}
    objective.after_step(10)  # last step, momentum 1
    assert all(torch.equal(p, unchanged[name]) for name, p in teacher.named_parameters())


def test_update_ema__equal_weights_stay_exact_and_buffers_are_copied():
    slow, fast = lively_encoder(), lively_encoder()
    for module in fast.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(0.3)
    before = {name: p.clone() for name, p in slow.named_parameters()}
    update_ema(slow, fast, momentum=0.9)
    assert all(torch.equal(p, before[name]) for name, p in slow.named_parameters())
    assert all(torch.equal(b, dict(fast.named_buffers())[name]) for name, b in slow.named_buffers())


def test_teacher__outputs_follow_its_weights_in_evaluation_mode():
    objective = make_objective(momentum=0.0, final_momentum=0.0).eval()
    images = images_for(objective)
    first = view_features(objective.teacher.encoder, images, with_neck=False)
    with torch.no_grad():
        for name, parameter in objective.encoder.named_parameters():
            if "attention_biases" in name:
                parameter.add_(3 * torch.randn_like(parameter))
    objective.after_step(0)
    second = view_features(objective.teacher.encoder, images, with_neck=False)
    assert (second - first).norm() > 0.01 * first.norm()  # timm's cache of the biases would make them equal


def test_teacher__has_no_dropout_and_fixed_statistics_while_the_student_trains():
    """The copied encoder contains LoRA's dropout and batch norm, which change the outputs in training mode."""
    encoder = lively_encoder()
    freeze_batch_norm(encoder, frozen=False)
    block = encoder.layers[3].blocks[0]
    block.mlp = torch.nn.Sequential(block.mlp, torch.nn.Dropout(0.5))
    objective = make_objective(encoder=encoder)
    for mode in (True, False):
        assert objective.train(mode).encoder.training is mode
        assert not any(module.training for module in objective.teacher.modules())
    objective.train()
    images, before = images_for(objective), {name: b.clone() for name, b in objective.teacher.named_buffers()}
    first, second = (view_features(objective.teacher.encoder, images, with_neck=False) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(b, before[name]) for name, b in objective.teacher.named_buffers())


def test_loss__without_gradients_changes_nothing_and_is_repeatable():
    objective = make_objective()
    images = images_for(objective)
    before = copy_of(objective) | {name: b.clone() for name, b in objective.named_buffers()}
    with torch.no_grad():
        first = objective.loss(images, sample_counters=COUNTERS, step=5).total
        second = objective.loss(images, sample_counters=COUNTERS, step=5).total
    assert torch.equal(first, second)
    assert all(torch.equal(b, before[name]) for name, b in objective.named_buffers())
    other = objective.loss(images, sample_counters=(1, 2, 3), step=5).total
    assert not torch.equal(first, other)


def test_before_step__prototypes_are_frozen_at_the_beginning():
    objective = make_objective(freeze_last_layer=0.05, max_steps=100)
    for step, held in ((0, True), (4, True), (5, False)):
        objective.zero_grad()
        objective.loss(images_for(objective), sample_counters=COUNTERS, step=step).total.backward()
        objective.before_step(step)
        for head in (objective.heads.view, objective.heads.token):
            assert (head.last_layer.weight_v.grad is None) == held


def test_deepcopy__works_with_lightlys_heads():
    objective = make_objective()
    copied = copy.deepcopy(objective)
    assert copied.exported_encoder is copied.teacher.encoder
    assert copied.heads.view is not objective.heads.view
    assert all(torch.equal(tensor, copied.state_dict()[name]) for name, tensor in objective.state_dict().items())
    flags = {name: p.requires_grad for name, p in objective.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in copied.named_parameters()}


def test_teacher_temperature__rises_linearly_then_stays():
    config = DINOConfig(warmup_teacher_temp=0.04, teacher_temp=0.07, teacher_temp_warmup=0.3)
    values = [teacher_temperature(step, config, max_steps=100) for step in (0, 15, 30, 99)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert teacher_temperature(0, DINOConfig(teacher_temp_warmup=0.0), max_steps=100) == 0.07


def test_teacher_entropy__is_zero_for_one_prototype_and_one_for_equal_ones():
    objective = make_objective(teacher_temp_warmup=0.0)
    with torch.no_grad():
        objective.teacher.heads.view.last_layer.weight_g.zero_()
    clueless = objective.loss(images_for(objective), sample_counters=COUNTERS, step=0).parts["teacher_entropy"]
    assert clueless.item() == pytest.approx(1.0, rel=1e-4)
    with torch.no_grad():
        objective.dino_loss.step_center.center_D[0] = -10.0
    sure = objective.loss(images_for(objective), sample_counters=COUNTERS, step=0).parts["teacher_entropy"]
    assert sure.item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("setting", [{"ibot_weight": 0.0}, {"koleo_weight": 0.0}])
def test_loss__parts_can_be_switched_off_without_unused_parameters(setting):
    objective = make_objective(**setting)
    result = objective.loss(images_for(objective), sample_counters=COUNTERS, step=0)
    assert next(iter(setting)).removesuffix("_weight") not in result.parts
    result.total.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_koleo__one_slice_is_refused_only_in_training():
    objective = make_objective()
    images = images_for(objective)[:1]
    with pytest.raises(UsageError, match=r"batch_size must be at least 2 for dino's KoLeo loss.*got 1"):
        objective.loss(images, sample_counters=COUNTERS[:1], step=0)
    with torch.no_grad():
        assert objective.loss(images, sample_counters=COUNTERS[:1], step=0).parts["koleo"] == 0


def test_loss__falls_when_trained():
    objective = make_objective(momentum=0.9, ibot_weight=0.0, koleo_weight=0.0)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(15):
        loss = objective.loss(images_for(objective), sample_counters=COUNTERS, step=step).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(step)
    assert losses[-1] < 0.8 * losses[0]


def test_panel__has_directions_of_the_teacher():
    objective = make_objective()
    images = images_for(objective)
    panel = objective.panel(images, sample_counters=COUNTERS)
    assert panel.columns == ("input", "direction 1", "direction 2", "direction 3")
    assert torch.equal(panel.images_KBHW[0], images[:, 0])
    assert panel.images_KBHW.min() >= 0
    assert panel.images_KBHW.max() <= 1
    with torch.no_grad():
        for parameter in objective.encoder.parameters():
            parameter.add_(1.0)
    assert torch.equal(objective.panel(images, sample_counters=COUNTERS).images_KBHW, panel.images_KBHW)


def test_scattered_masks__one_view_of_each_sample_has_hidden_tokens():
    counters = list(range(30))
    masks = scattered_masks(counters, seed=0, side=8, num_views=2, ratios=(0.1, 0.5), kind=MaskKind.BLOCK)
    hidden = masks.view(2, 30, 64).sum(2)
    assert ((hidden > 0).sum(0) == 1).all()
    assert set((hidden > 0).float().argmax(0).tolist()) == {0, 1}
    counts = hidden.sum(0)
    assert counts.min() >= 6
    assert counts.max() <= 32
    assert counts.unique().numel() > 5
    alone = scattered_masks([7], seed=0, side=8, num_views=2, ratios=(0.1, 0.5), kind=MaskKind.BLOCK)
    assert torch.equal(alone, masks.view(2, 30, 8, 8)[:, 7])


def test_mask_unit__fits_or_is_refused():
    assert mask_unit(plain_encoder(), None) == 16
    assert mask_unit(lively_encoder(), None) == 4
    assert mask_unit(lively_encoder(), 8) == 8
    with pytest.raises(UsageError, match=r"mask_unit_px must be a multiple of 4 px for vit_t and divide.*got 6"):
        mask_unit(lively_encoder(), 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dim": 0}, r"output_dim\n  Input should be greater than or equal to 1"),
        ({"teacher_temp": 0.2}, "a teacher softer than its student collapses"),
        ({"final_momentum": 0.9}, "momentum must be at most final_momentum"),
        ({"freeze_last_layer": 2.0}, r"freeze_last_layer\n  Input should be less than or equal to 1"),
        ({"min_mask_ratio": 0.6}, "min_mask_ratio must be at most max_mask_ratio"),
        ({"mask_kind": MaskKind.PER_WINDOW}, "mask_kind must be random or block"),
        ({"koleo_weight": -1.0}, r"koleo_weight\n  Input should be greater than or equal to 0"),
    ],
)
def test_config__bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DINOConfig(**settings)
