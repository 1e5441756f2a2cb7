"""What makes MoCo what it is."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
from contrasting_methods import B, batch_for, make, step

from fastssl import reference
from fastssl.trainer import augment
from fastssl.trainer.methods.ema import follow, frozen_copy
from fastssl.trainer.methods.moco import GROUP


def parameters(*networks):
    return [p.detach().clone() for network in networks for p in network.parameters()]


def test_a_follower_is_a_running_mean_of_weights_with_statistics_of_its_own():
    online = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    target = frozen_copy(online)
    start = parameters(target)
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
        online[1].running_mean.add_(1.0)
    for momentum in (0.9, 0.5):
        follow(target, online, momentum)
    for p, first in zip(target.parameters(), start, strict=True):
        assert not p.requires_grad
        torch.testing.assert_close(p.detach(), first + 0.1 * 0.5 + 0.5)
    assert torch.equal(target[1].running_mean, torch.zeros(2))


def test_mocos_key_encoder_follows_without_a_gradient():
    model = make("moco")
    online, keys = (model.backbone, model.head), (model.key_backbone, model.key_head)
    trained = {id(p) for group in model.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for network in online for p in network.parameters()}
    for _ in range(2):
        before = parameters(*keys)
        step(model, batch_for("moco"))
        assert all(p.grad is None for network in keys for p in network.parameters())
        for was, now, ours in zip(before, parameters(*keys), parameters(*online), strict=True):
            torch.testing.assert_close(now, 0.75 * was + 0.25 * ours)


def test_mocos_queries_meet_keys_of_the_other_view_and_the_queue_as_it_was():
    model = make("moco").eval()  # so that an embedding is the same in any group
    expected = model.queue.bank.clone()
    for number in range(4):
        batch = batch_for("moco")
        queries = model.head(model.backbone(batch.views[0]))
        keys = model.key_head(model.key_backbone(batch.views[1]))
        loss, embeddings = step(model, batch)
        for found, wanted in zip(model.given[-1], (queries, keys, expected), strict=True):
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(loss, reference.info_nce(queries, keys, expected, 0.2).detach())
        torch.testing.assert_close(embeddings, [queries.detach(), keys])
        places = torch.arange(number * B, (number + 1) * B) % 20  # the oldest rows
        expected[places] = keys
        torch.testing.assert_close(model.queue.bank, expected)


def test_without_a_queue_mocos_negatives_are_the_other_keys():
    model = make("moco", queue_length=0)
    loss, (queries, keys) = step(model, batch_for("moco"))
    torch.testing.assert_close(loss, reference.info_nce(queries, keys, temperature=0.2))


@pytest.mark.parametrize(("size", "groups"), [(B, 1), (GROUP, 1), (3 * GROUP, 3)])
def test_batch_norm_sees_mocos_keys_in_groups_of_other_images_than_its_queries(size, groups):
    model = make("moco", batch_size=size)
    seen = {"backbone": [], "key_backbone": []}
    for name, inputs in seen.items():
        network = getattr(model, name)
        network.register_forward_pre_hook(lambda _, given, to=inputs: to.append(given[0]))
    images = torch.arange(size) / size
    views = [images.view(-1, 1, 1, 1).expand(-1, 1, 16, 16)] * 2
    model(augment.Batch(views, torch.arange(size), torch.arange(size)))
    queries, keys = ([x[:, 0, 0, 0] for x in inputs] for inputs in seen.values())
    assert len(queries) == len(keys) == groups
    assert torch.equal(torch.cat(queries), images)
    assert torch.equal(torch.cat(keys).sort().values, images)
    if groups > 1:
        shares = [torch.isin(k, q).float().mean() for k, q in zip(keys, queries, strict=True)]
        assert max(shares) < 0.7  # a third, were it not for chance
