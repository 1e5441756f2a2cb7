"""What makes MoCo, SupCon, instance discrimination and PIRL what they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("torchvision")

from fastssl import reference
from fastssl.trainer import Config, augment, networks, optim
from fastssl.trainer.methods import METHODS
from fastssl.trainer.methods.ema import follow, frozen_copy
from fastssl.trainer.methods.moco import GROUP

B, D, IMAGES = 8, 6, 20
SMALL = {
    "moco": {"projection_hidden": 16, "projection_dim": D, "queue_length": 20, "momentum": 0.75},
    "supcon": {"projection_hidden": 16, "projection_dim": D},
    "instance": {"projection_dim": D, "temperature": 0.5, "momentum": 0.25},
    "pirl": {"projection_dim": D, "temperature": 0.5, "lambda_param": 0.3, "momentum": 0.25},
}
SHAPES = {
    "moco": [(1, 16, 16)] * 2,
    "supcon": [(1, 16, 16)] * 2,
    "instance": [(1, 16, 16)],
    "pirl": [(1, 16, 16), (9, 1, 8, 8)],
}


def make(method, **options):
    """A small method for digits that keeps what its loss is given."""
    config = Config(method=method, **{**SMALL[method], **options}).resolved()
    torch.manual_seed(0)
    model = METHODS[method](networks.build_backbone("cnn", 1, 16), config, IMAGES).train()
    model.given = []
    model.loss.register_forward_pre_hook(lambda _, given: model.given.append(given))
    model.optimizer = optim.build(model, config)
    return model


def batch_for(method, size=B):
    views = [torch.randn(size, *shape) for shape in SHAPES[method]]
    return augment.Batch(views, torch.randperm(IMAGES)[:size], torch.arange(size) % 3)


def step(model, batch):
    loss, embeddings = model(batch)
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    model.after_step(0, 1)
    return loss.detach(), [z.detach() for z in embeddings]


def parameters(*networks):
    return [p.detach().clone() for network in networks for p in network.parameters()]


def softmax_over_rows(z, bank, index, temperature):
    """What tells z from all rows of a bank: equation 2 of instance discrimination."""
    return F.cross_entropy(F.normalize(z) @ bank.T / temperature, index)


@pytest.mark.parametrize("method", SMALL)
def test_views_are_what_the_method_takes(method):
    config = Config(method=method, **SMALL[method]).resolved()
    image = torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8)
    views = [transform(image) for transform in METHODS[method].views(config, 16)]
    assert [view.shape for view in views] == SHAPES[method]
    assert all(view.dtype == torch.uint8 for view in views)


@pytest.mark.parametrize("method", SMALL)
def test_a_forward_pass_changes_running_statistics_alone(method):
    model = make(method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(batch_for(method))
    changed = [name for name, value in model.state_dict().items() if (value != before[name]).any()]
    assert changed
    assert all(name.split(".")[-1].startswith(("running", "num_batches")) for name in changed)


@pytest.mark.parametrize("method", SMALL)
def test_under_autocast_rows_stay_float32(method):
    model = make(method)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(batch_for(method))
    loss.backward()
    model.after_step(0, 1)
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for name in ("queue.bank", "memory.bank"):
        if name in model.state_dict():
            assert model.state_dict()[name].dtype == torch.float32


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


def test_supcons_positives_are_those_of_a_label():
    model = make("supcon")
    assert model.labelled
    batch = batch_for("supcon")
    loss, (z0, z1) = step(model, batch)
    torch.testing.assert_close(z0.norm(dim=1), torch.ones(B))
    rows, labels = torch.cat([z0, z1]), batch.labels.repeat(2)
    logits = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    same = (labels[:, None] == labels).fill_diagonal_(False)
    terms = -(logits - logits.logsumexp(1, keepdim=True))[same]
    weights = (1 / same.sum(1, keepdim=True)).expand_as(same)[same]
    torch.testing.assert_close(loss, (terms * weights).sum() / len(rows))


def test_an_instance_is_told_from_all_rows_of_the_bank_its_own_the_positive():
    model = make("instance")
    for _ in range(2):
        batch = batch_for("instance")
        bank = model.memory.bank.clone()
        loss, (z, rows) = step(model, batch)
        torch.testing.assert_close(rows, bank[batch.index])
        torch.testing.assert_close(loss, softmax_over_rows(z, bank, batch.index, 0.5))
        moved = F.normalize(0.25 * rows + 0.75 * F.normalize(z))
        torch.testing.assert_close(model.memory.bank[batch.index], moved)
        bank[batch.index] = moved
        torch.testing.assert_close(model.memory.bank, bank)


@pytest.mark.parametrize("method", ["instance", "pirl"])
def test_a_sampled_row_of_the_same_image_is_no_negative(method):
    model = make(method, negatives=200)  # of 20 images, so that every one is drawn
    batch = batch_for(method)
    step(model, batch)
    for query, positive, negatives, ids, negative_ids in list(model.given):
        assert len(negatives) == 200
        assert torch.isin(ids, negative_ids).all()
        assert torch.equal(ids, batch.index)
        scores = F.normalize(query) @ negatives.T / 0.5
        scores[ids[:, None] == negative_ids] = -torch.inf
        own = (F.normalize(query) * positive).sum(1, keepdim=True) / 0.5
        logits = torch.cat([own, scores], 1)
        wanted = F.cross_entropy(logits, torch.zeros(B, dtype=torch.long))
        torch.testing.assert_close(
            model.loss(query, positive, negatives, ids, negative_ids), wanted
        )


def test_pirls_loss_weighs_patches_and_images_against_one_bank():
    model = make("pirl")
    batch = batch_for("pirl")
    bank = model.memory.bank.clone()
    loss, (images, patches) = step(model, batch)
    terms = [softmax_over_rows(z, bank, batch.index, 0.5) for z in (patches, images)]
    torch.testing.assert_close(loss, 0.3 * terms[0] + 0.7 * terms[1])
    moved = F.normalize(0.25 * bank[batch.index] + 0.75 * F.normalize(images))
    torch.testing.assert_close(model.memory.bank[batch.index], moved)


def test_pirl_sees_the_patches_of_each_image_in_an_order_of_its_own():
    model = make("pirl").eval()
    seen = []
    model.patches_head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    batch = batch_for("pirl")
    model(batch)
    own = torch.stack([model.patch_head(model.backbone(x)) for x in batch.views[1]])
    distances = torch.cdist(seen[0].view(B, 9, D), own)
    orders = distances.argmin(2)
    assert distances.gather(2, orders[:, :, None]).max() < 1e-5
    assert torch.equal(orders.sort(1).values, torch.arange(9).expand(B, 9))
    assert len(orders.unique(dim=0)) > 1


def coordinates(side):
    """An image whose two channels say where each pixel is."""
    rows, cols = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([rows, cols]).to(torch.uint8)


@pytest.mark.parametrize(("side", "patch", "gap"), [(30, 7, 2), (30, 10, 0), (31, 4, 3)])
def test_patches_lie_in_their_cells_with_a_gap(side, patch, gap):
    cut = augment.Patches(side, patch, gap=gap)
    found = torch.stack([cut(coordinates(side)) for _ in range(60)]).int()
    assert found.shape == (60, 9, 2, patch, patch)
    corners = found[..., 0, 0]
    torch.testing.assert_close(found, corners[..., None, None] + coordinates(patch).int())
    places = corners - torch.cartesian_prod(*[torch.arange(3) * (side // 3)] * 2)
    assert places.min() == gap // 2
    assert places.max() == side // 3 - patch - (gap - gap // 2)
    room = side // 3 - patch - gap
    assert len(places.flatten(0, 1).unique(dim=0)) == (room + 1) ** 2
    assert (places != places[:, :1]).any() == (room > 0)  # the nine are not moved as one
    grid = corners.view(-1, 3, 3, 2)
    assert (grid[:, 1:, :, 0] - grid[:, :-1, :, 0]).min() >= patch + gap
    assert (grid[:, :, 1:, 1] - grid[:, :, :-1, 1]).min() >= patch + gap


def test_each_patch_is_transformed_by_itself():
    cut = augment.Patches(9, 3, each=lambda patch: patch + torch.randint(9, ()))
    assert len((cut(coordinates(9)) - augment.Patches(9, 3)(coordinates(9))).unique()) > 2


def test_an_image_is_enlarged_to_the_size_that_is_cut():
    assert torch.equal(
        augment.Patches(6, 2)(torch.full((1, 4, 5), 7, dtype=torch.uint8)),
        torch.full((9, 1, 2, 2), 7, dtype=torch.uint8),
    )


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must fit into a cell of 10 pixels, got 8 and 3"):
        augment.Patches(30, 8, gap=3)


@pytest.mark.parametrize(
    ("dataset", "channels", "size", "side"),
    [
        ("digits", 1, 16, 8),
        ("cifar10", 3, 32, 16),
        ("folder", 3, 224, 64),
    ],
)
def test_patches_have_a_useful_size(dataset, channels, size, side):
    image = torch.randint(0, 256, (channels, size, size), dtype=torch.uint8)
    found = augment.patches(dataset, size)(image)
    assert found.shape == (9, channels, side, side)
    assert found.dtype == torch.uint8


def test_a_head_without_norm_is_a_plain_perceptron():
    head = networks.ProjectionHead(4, 8, 2, norm="none", last_norm=False)
    x = torch.randn(1, 4)
    first, last = (module for module in head if isinstance(module, nn.Linear))
    torch.testing.assert_close(head(x), last(first(x).relu()))
    assert first.bias is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "moco", "momentum": 1.5}, "momentum must be from 0 to 1, got 1.5"),
        ({"method": "pirl", "lambda_param": 1.5}, "lambda_param must be at most 1 .*, got 1.5"),
        ({"method": "instance", "negatives": -1}, "negatives must be at least 0"),
        ({"method": "instance", "projection_hidden": 8}, "projection_hidden is for method"),
        ({"method": "simclr", "momentum": 0.5}, "momentum is for method .*'moco'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)
