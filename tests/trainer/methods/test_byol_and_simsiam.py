"""What makes BYOL and SimSiam what they are."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("torchvision")
from torchvision.transforms import v2

from fastssl.trainer import Config, augment, optim
from fastssl.trainer.methods import METHODS

B = 8
WIDTHS = {"projection_hidden": 16, "projection_dim": 8}
PREDICTOR = {**WIDTHS, "prediction_hidden": 4}


def batch(*shape, count=1):
    views = [torch.randn(B, *shape) for _ in range(count)]
    return augment.Batch(views, torch.arange(B), torch.full((B,), -1))


def test_byols_loss_is_that_of_both_directions_against_the_target(make):
    model = make("byol", **WIDTHS, prediction_hidden=16)
    with torch.no_grad():
        for p in model.target.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that the target is another network
    views = batch(1, 16, 16, count=2)
    loss, (z0, z1) = model(views)
    p0, p1 = model.predictor(torch.cat([z0, z1])).chunk(2)
    t0, t1 = model.target(torch.cat(views.views)).chunk(2)
    unit = [F.normalize(x, dim=1) for x in (p0, t1, p1, t0)]
    forth, back = (unit[0] - unit[1]).square().sum(1), (unit[2] - unit[3]).square().sum(1)
    torch.testing.assert_close(loss, (forth + back).mean())
    assert not torch.allclose(z0, t0)


def test_byols_target_starts_as_a_copy_and_gets_no_gradient(make):
    model = make("byol", **PREDICTOR)
    online = [*model.backbone.parameters(), *model.head.parameters()]
    for ours, theirs in zip(online, model.target.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    model(batch(1, 16, 16, count=2))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    assert all(p.grad is not None for p in (*online, *model.predictor.parameters()))
    optimised = sum(
        len(group["params"]) for group in optim.build(model, Config().resolved()).param_groups
    )
    assert optimised == len(online) + len(list(model.predictor.parameters()))


def test_byols_target_follows_with_a_momentum_that_rises_to_one_as_a_cosine(make):
    model = make("byol", **PREDICTOR, momentum=0.9)
    online = [*model.backbone.parameters(), *model.head.parameters()]
    for step in (0, 5, 9):  # of 10
        with torch.no_grad():
            for p in online:
                p.add_(torch.randn_like(p))
        momentum = 1 - 0.1 * (math.cos(math.pi * step / 10) + 1) / 2
        expected = [
            momentum * theirs + (1 - momentum) * ours
            for ours, theirs in zip(online, model.target.parameters(), strict=True)
        ]
        model.after_step(step, per_epoch=2)
        torch.testing.assert_close([p.detach() for p in model.target.parameters()], expected)


def test_byols_target_moves_after_the_step_alone(make):
    model = make("byol", **PREDICTOR)
    before = [p.clone() for p in model.target.parameters()]
    model.before_step(0, 2)
    model(batch(1, 16, 16, count=2))[0].backward()
    model.after_backward()
    assert all(map(torch.equal, before, model.target.parameters()))


def test_byols_two_sides_are_those_of_the_paper():
    first, second = augment.byol(224)
    for side in (first, second):
        crop, flip, jitter, grey, blur, _ = side.transforms
        assert (crop.scale, crop.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
        assert crop.interpolation == v2.InterpolationMode.BICUBIC
        assert (flip.p, jitter.p, grey.p) == (0.5, 0.8, 0.2)
        (colours,), (gauss,) = jitter.transforms, blur.transforms
        assert (colours.brightness, colours.contrast) == ((0.6, 1.4), (0.6, 1.4))
        assert (colours.saturation, colours.hue) == ((0.8, 1.2), (-0.1, 0.1))
        assert list(gauss.kernel_size) == [23, 23]
        assert list(gauss.sigma) == [0.1, 2.0]
    assert [side.transforms[4].p for side in (first, second)] == [1.0, 0.1]
    assert [side.transforms[5].p for side in (first, second)] == [0.0, 0.2]
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    for size in (224, 32, 9):
        for view in (side(image) for side in augment.byol(size)):
            assert view.shape == (3, size, size)
            assert view.dtype == torch.uint8


@pytest.mark.parametrize("method", ["simclr", "barlow", "vicreg", "byol", "simsiam"])
def test_a_method_of_two_views_takes_any_augmentation(method):
    def steps(kind, **options):
        config = Config(method=method, **options).resolved()
        return [
            t
            for view in METHODS[method].views(config, 32)
            for t in view.transforms
            if isinstance(t, v2.RandomApply) and isinstance(t.transforms[0], kind)
        ]

    def blurs(**options):
        return [t.p for t in steps(v2.GaussianBlur, **options)]

    assert blurs(dataset="cifar10", augmentation="byol") == [1.0, 0.1]
    assert blurs(dataset="cifar10", augmentation="default") == [0.5, 0.5]
    assert blurs(dataset="cifar10", augmentation="simclr") == [0.5, 0.5]
    for augmentation, brightness in (("simclr", (0.2, 1.8)), ("default", (0.6, 1.4))):
        for jitter in steps(v2.ColorJitter, dataset="cifar10", augmentation=augmentation):
            assert jitter.transforms[0].brightness == pytest.approx(brightness)
    assert blurs(dataset="cifar10") == ([1.0, 0.1] if method == "byol" else [0.5, 0.5])
    assert blurs(dataset="digits") == [0.3, 0.3]
    with pytest.raises(
        ValueError, match="augmentation 'byol' is for colour images only, got it wi"
    ):
        blurs(dataset="digits", augmentation="byol")


def test_simsiam_stops_the_gradient_of_what_is_predicted(make):
    model = make("simsiam", **PREDICTOR)
    loss, (z0, z1) = model(batch(1, 16, 16, count=2))
    ((predictions, targets),) = model.given
    assert not targets.requires_grad
    assert torch.equal(targets, torch.cat([z1, z0]))
    p0, p1 = predictions.chunk(2)
    similarity = F.cosine_similarity
    both = -(similarity(p0, z1.detach()).mean() + similarity(p1, z0.detach()).mean()) / 2
    torch.testing.assert_close(loss, both)
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(both, parameters))


def test_simsiams_predictor_is_a_bottleneck_whose_learning_rate_is_constant(make):
    model = make("simsiam", **PREDICTOR)
    assert [m.out_features for m in model.predictor if isinstance(m, nn.Linear)] == [4, 8]
    assert sum(isinstance(m, nn.Linear) for m in model.head) == 3
    constant = {
        id(p)
        for group in optim.build(model, Config().resolved()).param_groups
        if not group["scheduled"]
        for p in group["params"]
    }
    assert constant == {id(p) for p in model.predictor.parameters()}
