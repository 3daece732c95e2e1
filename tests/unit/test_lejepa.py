"""The objective ``lejepa``, which has lightly's loss terms and keeps nothing between steps."""

import pytest
import torch
from lightly.loss import LeJEPALoss
from samgraft.ssl.objectives.lejepa import DIRECTION_STREAM, LeJEPA, LeJEPAConfig
from samgraft.ssl.scope import freeze_depths
from samgraft.ssl.views.crops import CropConfig, multi_crop
from samgraft.ssl.views.view_features import view_features
from tiny_encoders import lively_encoder, plain_encoder, slices

COUNTERS = (7, 8, 9, 10)


def make_objective(encoder=None, **settings):
    encoder = encoder or lively_encoder()
    crops = settings.pop("crops", CropConfig(num_local_crops=2))
    torch.manual_seed(1)
    config = LeJEPAConfig(crops=crops, head_hidden_dim=16, output_dim=4, num_directions=8, **settings)
    return LeJEPA(encoder, config, seed=3)


def images_for(objective):
    return slices(count=4, size=objective.encoder.image_size)


def test_loss__equals_lightlys_terms():
    objective = make_objective()
    images = images_for(objective)
    crops = multi_crop(images, sample_counters=COUNTERS, seed=3, config=objective.config.crops, local_size_px=16)
    parts = [crops.global_BCSS, crops.local_BCss]
    pooled = torch.cat([view_features(objective.encoder, v, with_neck=False).mean((2, 3)) for v in parts])
    points = objective.head(pooled).unflatten(0, (4, 4))
    oracle = LeJEPALoss(lambda_param=0.05, sigreg_num_vectors=8)
    torch.manual_seed((3 * 1_000_003 + 6) ^ DIRECTION_STREAM)
    expected = oracle(local_proj=points[2:], global_proj=points[:2])
    result = objective.loss(images, sample_counters=COUNTERS, step=6)
    torch.testing.assert_close(result.total, expected)
    other_step = objective.loss(images, sample_counters=COUNTERS, step=7)
    assert torch.equal(result.parts["agreement"], other_step.parts["agreement"])
    assert not torch.equal(result.parts["sigreg"], other_step.parts["sigreg"])


@pytest.mark.parametrize("make_encoder", [lively_encoder, plain_encoder])
@pytest.mark.parametrize("train_neck", [False, True])
def test_gradient_flow__everything_changes_but_the_neck(make_encoder, train_neck):
    objective = make_objective(make_encoder(), train_neck=train_neck)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1.0)
    objective.loss(images_for(objective), sample_counters=COUNTERS, step=0).total.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    optimizer.step()
    moved = {name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in objective.named_parameters()}
    expected = parameters if train_neck else {n for n in parameters if not n.startswith("encoder.neck")}
    # A bias before BatchNorm has no effect, so its gradient is 0 apart from rounding.
    quiet = {"head.layers.0.bias", "head.layers.3.bias"}
    assert moved - quiet == expected - quiet


def test_gradient_flow__frozen_depths_do_not_change():
    encoder = lively_encoder()
    frozen = freeze_depths(encoder, 2)
    objective = make_objective(encoder)
    objective.loss(images_for(objective), sample_counters=COUNTERS, step=0).total.backward()
    assert all(encoder.get_parameter(name).grad is None for name in frozen)
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_loss__without_gradients_leaves_buffers_and_random_state_unchanged():
    objective = make_objective()
    buffers = {name: b.clone() for name, b in objective.named_buffers()}
    state = torch.get_rng_state()
    with torch.no_grad():
        first = objective.loss(images_for(objective), sample_counters=COUNTERS, step=2).total
        objective.eval()  # as in a monitoring round
        second = objective.loss(images_for(objective), sample_counters=COUNTERS, step=2).total
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in objective.named_buffers())


def test_gaussian__is_larger_for_collapsed_points():
    objective = make_objective()
    cloud = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    assert objective._gaussian(cloud, step=0) < 0.2 * objective._gaussian(torch.zeros_like(cloud), step=0)
    assert objective._gaussian(cloud, step=0) < 0.2 * objective._gaussian(cloud * torch.tensor([1.0, 0, 0, 0]), step=0)


def test_loss__falls_when_trained():
    objective = make_objective()
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = objective.loss(images_for(objective), sample_counters=COUNTERS, step=0).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigreg_weight": 0.0}, r"sigreg_weight\n  Input should be greater than 0"),
        ({"num_directions": 0}, r"num_directions\n  Input should be greater than or equal to 1"),
    ],
)
def test_config__bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LeJEPAConfig(**settings)
