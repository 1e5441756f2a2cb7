"""What a method does beside its loss."""

import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torchvision")

from fastssl import reference
from fastssl.trainer import Config, augment, networks
from fastssl.trainer.methods import METHODS

B, D, K = 4, 8, 5


@pytest.fixture
def swav():
    """A small SwAV whose loss keeps what it is given, and does steps of two an epoch."""

    def make(**options):
        small = {"batch_size": B, "projection_hidden": 16, "projection_dim": D, "prototypes": K}
        config = Config(**{"method": "swav", "queue_start": 0, **small, **options}).resolved()
        model = METHODS["swav"](networks.build_backbone("cnn", 1, 16), config, 100).train()
        model.given = []
        model.loss.register_forward_pre_hook(lambda _, given: model.given.append(given))

        def step(number, sizes=(16, 16, 10)):
            model.before_step(number, per_epoch=2)
            model.zero_grad()
            views = [torch.randn(B, 1, size, size) for size in sizes]
            value, embeddings = model(augment.Batch(views, torch.arange(B), torch.full((B,), -1)))
            value.backward()
            model.after_backward()
            model.after_step(number, per_epoch=2)
            return embeddings

        model.step = step
        return model

    return make


def test_swavs_views_are_two_global_and_the_local_crops():
    scales = {"local_scale_min": 0.2, "local_scale_max": 0.4, "global_scale_min": 0.7}
    options = {"local_crops": 3, "local_size": 9, **scales}
    config = Config(method="swav", **options).resolved()
    image = torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8)
    transforms = METHODS["swav"].views(config, 16)
    assert [transform(image).shape[-1] for transform in transforms] == [16, 16, 9, 9, 9]
    crops = [transform.transforms[0].scale for transform in transforms]
    assert crops == [(0.7, 1.0)] * 2 + [(0.2, 0.4)] * 3


def test_every_crop_predicts_and_global_crops_are_assigned(swav):
    model = swav()
    model.step(0, sizes=(16, 16, 10, 10, 10))
    model.step(1, sizes=(16, 16))
    for (high, low, queue), local in zip(model.given, (3, 0), strict=True):
        assert [scores.shape for scores in (*high, *low)] == [(B, K)] * (2 + local)
        assert queue is None


def test_prototypes_are_put_at_unit_length_before_a_step(swav):
    model = swav()
    with torch.no_grad():
        model.prototypes.weight.mul_(torch.rand(K, 1) + 3)
    directions = F.normalize(model.prototypes.weight.detach())
    model.step(0)
    torch.testing.assert_close(model.prototypes.weight.detach(), directions)
    scores = torch.cat([*model.given[0][0], *model.given[0][1]])
    assert scores.abs().max() <= 1 + 1e-6  # cosines


def test_prototypes_are_frozen_at_first_and_the_rest_learns(swav):
    model = swav(freeze_epochs=1)
    gradients = []
    for number in range(4):
        model.step(number)
        gradients.append(model.prototypes.weight.grad is not None)
        assert all(p.grad is not None for p in (*model.backbone.parameters(), model.head[0].weight))
    assert gradients == [False, False, True, True]


def test_the_queue_holds_the_newest_embeddings_first_and_drops_the_oldest(swav):
    model = swav(queue_length=10)
    seen = [torch.stack(model.step(number)).detach() for number in range(4)]
    assert torch.equal(model.queue, torch.cat(seen[:0:-1], 1)[:, :10])
    assert not model.queue.requires_grad


def test_the_queue_starts_late_and_takes_part_in_the_assignment(swav):
    model = swav(queue_length=10, queue_start=1)
    before = None
    for number, rows in enumerate((0, 0, 8, 10, 10)):
        queue = model.queue.clone()
        model.step(number)
        given = model.given[-1][2]
        if not rows:
            assert given is None
            continue
        for scores, embeddings in zip(given, queue, strict=True):
            torch.testing.assert_close(scores, embeddings[:rows] @ model.prototypes.weight.T)
            assert not scores.requires_grad
        assert before is None or not torch.equal(before, given[0])
        before = given[0]


def test_under_autocast_the_queue_keeps_float32_rows_of_unit_length(swav):
    model = swav(queue_length=2 * B)
    with torch.autocast("cpu", torch.bfloat16):
        for number in range(3):
            model.step(number)
    assert model.given[-1][0][0].dtype == model.given[-1][2][0].dtype == torch.bfloat16
    assert model.queue.dtype == torch.float32
    torch.testing.assert_close(model.queue.norm(dim=2), torch.ones(2, 2 * B))


def test_what_is_measured_is_that_of_the_codes_of_the_epoch(swav):
    model = swav(queue_length=6)
    for epoch in (0, 1):
        for number in (2 * epoch, 2 * epoch + 1):
            model.step(number)
        codes = []
        for high, _, queue in model.given[-2:]:
            rows = high[0] if queue is None else torch.cat([high[0], queue[0]])
            codes.append(reference.sinkhorn_knopp(rows.detach(), model.config.epsilon)[:B])
        codes = torch.cat(codes)
        found = model.end_epoch()
        assert found["prototypes_used"] == len(codes.argmax(1).unique())
        entropy = torch.special.entr(codes).sum(1).mean().item()
        assert found["code_entropy"] == pytest.approx(entropy, rel=1e-4)
        mean = torch.special.entr(codes.mean(0)).sum().item()
        assert found["mean_code_entropy"] == pytest.approx(mean, rel=1e-4)


def test_a_collapse_shows_in_the_codes(swav):
    model = swav()
    torch.nn.init.zeros_(model.head[-1].weight)  # every embedding is the same
    model.step(0)
    found = model.end_epoch()
    assert found["prototypes_used"] == 1
    assert found["code_entropy"] == pytest.approx(math.log(K), rel=1e-5)
