"""What makes BYOL, SimSiam and the pretext tasks what they are."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("torchvision")
from torchvision.transforms import v2

from fastssl.trainer import Config, augment, networks, optim
from fastssl.trainer.methods import METHODS
from fastssl.trainer.methods.jigsaw import permutations

B = 8
WIDTHS = {"projection_hidden": 16, "projection_dim": 8}
PREDICTOR = {**WIDTHS, "prediction_hidden": 4}


@pytest.fixture
def make():
    """A small method for batches of 8 of 16 images, that is for two steps an epoch."""

    def build(method, **options):
        config = Config(method=method, batch_size=B, epochs=5, **options).resolved()
        model = METHODS[method](networks.build_backbone("cnn", 1, 16), config, 2 * B).train()
        model.given = []
        model.loss.register_forward_pre_hook(lambda _, given: model.given.append(given))
        return model

    return build


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


def test_a_learning_rate_tuned_for_adamw_is_for_adamw_alone():
    for method in ("byol", "simsiam", "rotation", "jigsaw", "relative-patch"):
        tuned = Config(method=method).resolved()
        assert (tuned.batch_size, tuned.lr) == (64, METHODS[method].recipes["digits"]["lr"])
        assert Config(method=method, optimizer="sgd").resolved().lr == 0.06 * 64 / 256
        assert Config(method=method, lr=0.7).resolved().lr == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "jigsaw", "permutations": 1}, "permutations must be at least 2 .* got 1"),
        (
            {"method": "jigsaw", "permutations": 362881},
            "permutations must be at most 362880, all of nine patches, got 362881",
        ),
        ({"permutations": 9}, "permutations is for method 'jigsaw' only, got 9"),
        ({"method": "byol", "momentum": 1.5}, "momentum must be from 0 to 1, got 1.5"),
        ({"method": "byol", "temperature": 0.1}, "temperature is for method .* 'byol'"),
        ({"method": "barlow", "prediction_hidden": 9}, "for method 'byol' or 'simsiam' only, got"),
        ({"method": "rotation", "projection_dim": 9}, "projection_dim is for method 'simclr'"),
        ({"method": "swav", "augmentation": "byol"}, "augmentation is for method 'simclr', "),
        ({"augmentation": "moco"}, "augmentation cannot be 'moco'.*default, simclr, byol"),
    ],
)
def test_a_bad_option_says_what_is_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


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
