"""Centers of the DINO and iBOT losses, which move once per optimizer step."""

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from samgraft.ssl.objectives.teacher import StepCenter, StepDINOLoss, StepIBOTLoss, build_head


def outputs(views, batch=3, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, dim, generator=generator, requires_grad=True) for _ in range(views)]


@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_dino_loss__equals_lightlys_over_steps(temperature):
    ours, oracle = StepDINOLoss(6, student_temp=0.1, center_momentum=0.9), DINOLoss(6)
    for step in range(4):
        teacher, student = outputs(2, seed=step), outputs(4, seed=100 + step)
        loss = ours(teacher, student, teacher_temp=temperature)
        torch.testing.assert_close(loss, oracle(teacher, student, teacher_temp=temperature))
        ours.step_center.step()
        torch.testing.assert_close(ours.center, oracle.center[0, 0])
    assert ours.center.abs().max() > 0


def test_ibot_loss__equals_lightlys_over_steps():
    ours = StepIBOTLoss(6, student_temp=0.1, center_momentum=0.8)
    oracle = IBOTPatchLoss(6, center_momentum=0.8)
    mask = torch.tensor([[[True, False], [True, True]], [[False, False], [True, False]]])
    for step in range(3):
        (teacher,), (student,) = outputs(1, batch=4, seed=step), outputs(1, batch=4, seed=50 + step)
        loss = ours(teacher, student, mask, teacher_temp=0.05)
        torch.testing.assert_close(loss, oracle(teacher, student, mask, teacher_temp=0.05))
        ours.center.step()
        torch.testing.assert_close(ours.center.value, oracle.center.value[0])


def test_center__micro_steps_give_the_center_of_one_batch():
    whole, parts = StepCenter(6, momentum=0.9), StepCenter(6, momentum=0.9)
    (rows,) = outputs(1, batch=8)
    whole.update(rows)
    parts.update(rows[:3])
    parts.update(rows[3:])
    whole.step()
    parts.step()
    torch.testing.assert_close(parts.value, whole.value)
    torch.testing.assert_close(whole.value, 0.1 * rows.detach().mean(0))


def test_center__without_gradients_or_outputs_does_not_move():
    center = StepCenter(6, momentum=0.9)
    with torch.no_grad():
        center.update(outputs(1)[0])
    center.step()
    assert torch.equal(center.value, torch.zeros(6))  # not NaN


def test_head__last_layer_is_frozen_by_lightlys_switch():
    head = build_head(4, hidden_dim=8, bottleneck_dim=4, output_dim=6)
    head(torch.randn(3, 4)).sum().backward()
    head.cancel_last_layer_gradients(1)
    assert head.last_layer.weight_v.grad is not None
    head.cancel_last_layer_gradients(0)
    assert head.last_layer.weight_v.grad is None
    assert head.layers[0].weight.grad is not None
