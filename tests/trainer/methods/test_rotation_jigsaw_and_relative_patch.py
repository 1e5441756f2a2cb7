"""What makes the pretext tasks what they are."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
from fastssl.trainer import Config, augment
from fastssl.trainer.methods import METHODS
from fastssl.trainer.methods.jigsaw import permutations

B = 8
WIDTHS = {"projection_hidden": 16, "projection_dim": 8}


def batch(*shape, count=1):
    views = [torch.randn(B, *shape) for _ in range(count)]
    return augment.Batch(views, torch.arange(B), torch.full((B,), -1))


def test_rotation_sees_every_image_in_all_four_rotations(make):
    model = make("rotation", projection_hidden=16)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    views = batch(1, 16, 16)
    model(views)
    rotated, (logits, labels) = seen[0], model.given[0]
    assert rotated.shape == (4 * B, 1, 16, 16)
    assert logits.shape == (4 * B, 4)
    assert labels.bincount().tolist() == [B] * 4
    for image, label in zip(rotated, labels, strict=True):
        upright = image.rot90(-int(label), (1, 2))
        assert (views.views[0] == upright).flatten(1).all(1).any()


def test_permutations_are_far_apart_and_always_the_same():
    chosen = permutations(50)
    assert torch.equal(chosen[0], torch.arange(9))
    assert torch.equal(chosen.sort(1).values, torch.arange(9).expand(50, 9))
    distances = (chosen[:, None] != chosen).sum(2)[~torch.eye(50, dtype=torch.bool)]
    drawn = torch.stack([torch.randperm(9) for _ in range(50)])
    of_drawn = (drawn[:, None] != drawn).sum(2)[~torch.eye(50, dtype=torch.bool)]
    assert distances.min() >= 7 > of_drawn.min()
    assert torch.equal(permutations(20), chosen[:20])
    assert torch.equal(permutations.__wrapped__(20), chosen[:20])


def test_jigsaw_says_in_which_order_the_patches_are(make):
    model = make("jigsaw", **WIDTHS, permutations=6)
    model.head = nn.Identity()
    given = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    patches = batch(9, 1, 8, 8)
    model.classifier[0] = nn.Linear(9 * 128, 16)
    model(patches)
    (flat,), (logits, which) = given, model.given[0]
    features = model.backbone(normal(patches.views[0]).flatten(0, 1)).unflatten(0, (B, 9))
    assert logits.shape == (B, 6)
    assert len(which.unique()) > 1
    for row, place, own in zip(flat.unflatten(1, (9, -1)), which, features, strict=True):
        torch.testing.assert_close(row, own[model.order[place]].relu())


def normal(patches):
    std, mean = torch.std_mean(patches, (2, 3, 4), keepdim=True)
    return (patches - mean) / (std + 1e-2)


def test_jigsaw_normalises_each_patch_by_itself(make):
    model = make("jigsaw", **WIDTHS, permutations=6)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    patches = batch(9, 1, 8, 8)
    patches.views[0][:, 3] = 7.0  # without contrast
    patches.views[0] = patches.views[0] * torch.rand(B, 9, 1, 1, 1).add(0.5) + 3
    model(patches)
    for i, patch in enumerate(seen[0]):
        assert patch.mean().abs() < 1e-4
        assert (patch.std() < 1e-3) if i % 9 == 3 else (0.9 < patch.std() < 1.0)


def test_relative_patch_pairs_the_middle_with_each_neighbour(make):
    model = make("relative-patch", **WIDTHS)
    model.head = nn.Identity()
    model.classifier[0] = nn.Linear(2 * 128, 16)
    given = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    patches = batch(9, 1, 6, 6)
    _, (centre, right) = model(patches)
    z = model.backbone(patches.views[0].flatten(0, 1)).unflatten(0, (B, 9))
    logits, places = model.given[0]
    assert logits.shape == (8 * B, 8)
    assert places.bincount().tolist() == [B] * 8
    neighbours = [0, 1, 2, 3, 5, 6, 7, 8]
    for i, (pair, place) in enumerate(zip(given[0], places, strict=True)):
        expected = torch.cat([z[i // 8, 4], z[i // 8, neighbours[place]]])
        torch.testing.assert_close(pair, expected)
    torch.testing.assert_close((centre, right), (z[:, 4], z[:, 5]))


@pytest.mark.parametrize("method", ["jigsaw", "relative-patch"])
@pytest.mark.parametrize(("dataset", "size"), [("digits", 16), ("mnist", 28), ("folder", 224)])
def test_patches_have_gaps_and_move(method, dataset, size):
    config = Config(method=method, dataset=dataset).resolved()
    (transform,) = METHODS[method].views(config, size)
    cut = transform.transforms[-1]
    cell = cut.size // 3
    assert cut.patch < cell
    assert cut.room > 0
    if method == "relative-patch":
        assert cut.gap >= cell // 5
    image = torch.randint(0, 256, (1 if dataset != "folder" else 3, size, size), dtype=torch.uint8)
    assert transform(image).shape == (9, len(image), cut.patch, cut.patch)


@pytest.mark.parametrize("method", ["rotation", "jigsaw", "relative-patch"])
def test_a_pretext_task_learns_from_one_batch(make, method):
    options = {
        "rotation": {"projection_hidden": 16},
        "jigsaw": {**WIDTHS, "permutations": 4},
        "relative-patch": WIDTHS,
    }
    model = make(method, **options[method])
    example = batch(1, 16, 16) if method == "rotation" else batch(9, 1, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss, _ = model(example)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
