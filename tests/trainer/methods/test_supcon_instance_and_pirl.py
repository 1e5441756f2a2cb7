"""What makes supervised contrast, instance discrimination and PIRL what they are."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torchvision")
from contrasting_methods import SHAPES, SMALL, B, D, batch_for, make, step

from fastssl.trainer import Config
from fastssl.trainer.methods import METHODS


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
