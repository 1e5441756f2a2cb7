"""Random views of images, and the order in which images are seen."""

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("torchvision")
from fastssl.trainer import augment, data
from fastssl.trainer.datasets import STATISTICS


@pytest.mark.parametrize("name", STATISTICS)
def test_default_views_have_the_size_of_the_network(name):
    channels = len(STATISTICS[name][0])
    size = {"digits": 16, "mnist": 28, "fashion-mnist": 28, "stl10": 96}.get(name, 32)
    shape = (channels, 40, 50) if name == "folder" else (channels, size, size)
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    transform = augment.default(name, size)
    views = [transform(image) for _ in range(6)]
    assert all(view.dtype == torch.uint8 for view in views)
    assert all(view.shape == (channels, size, size) for view in views)
    assert len({view.numpy().tobytes() for view in views}) == 6


def views_of_digits(seed=0):
    transforms = [augment.default("digits", 16)] * 2
    return augment.Views(data.load("digits").train, transforms, seed)


def test_views_follow_from_seed_epoch_and_index_alone():
    views = views_of_digits()
    first, index, label = views[3, 5]
    assert (index, label) == (5, views.originals.images[5][1])
    torch.rand(1)
    again = views[3, 5][0]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], views[4, 5][0][0])
    assert not torch.equal(first[0], views_of_digits(seed=1)[3, 5][0][0])


def test_views_of_several_sizes_are_batched_by_transform():
    transforms = [augment.default("digits", size, (0.2, 0.5)) for size in (16, 9, 12, 9)]
    views = augment.Views(data.load("digits").train, transforms, seed=0)
    sampler = augment.Batches(20, 4, 0, 0, 1)
    batch = augment.Batch(*next(iter(DataLoader(views, batch_sampler=sampler))))
    assert [view.shape for view in batch.views] == [(4, 1, size, size) for size in (16, 9, 12, 9)]
    assert not torch.equal(batch.views[1], batch.views[3])
    assert batch.index.tolist() == [index for _, index in next(iter(sampler))]
    assert batch.labels.tolist() == [views.originals.images[i][1] for i in batch.index.tolist()]


def test_where_an_item_is_several_images_transforms_take_turns():
    pairs = [((torch.full((1, 4, 4), i), torch.full((1, 4, 4), i + 10)), 7) for i in range(3)]
    views, index, label = augment.Views(pairs, [torch.nn.Identity()] * 3, seed=0)[0, 2]
    assert [view.unique().item() for view in views] == [2, 12, 2]
    assert (index, label) == (2, 7)


def test_a_crop_shows_as_much_of_a_digit_as_was_asked():
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    crop = augment.default("mnist", 64, (0.2, 0.4))
    for seed in range(20):
        spans = []  # of the columns, and by the same crop of the rows
        for image in (ramp, ramp.mT):
            torch.manual_seed(seed)
            view = crop(image).int()
            spans.append((view.max() - view.min() + 1) / 64)
        assert 0.17 < spans[0] * spans[1] < 0.43  # to whole pixels


def test_a_digit_of_which_all_shall_be_seen_is_moved_as_by_default():
    image = data.load("digits").train[0][0]
    for seed in range(3):
        views = []
        for scale in (None, (1.0, 1.0)):
            torch.manual_seed(seed)
            views.append(augment.default("digits", 16, scale)(image))
        assert torch.equal(*views)


@pytest.mark.parametrize("name", STATISTICS)
def test_crops_have_the_size_that_was_asked(name):
    channels = len(STATISTICS[name][0])
    image = torch.randint(0, 256, (channels, 32, 40), dtype=torch.uint8)
    assert augment.default(name, 9, (0.1, 0.4))(image).shape == (channels, 9, 9)


def test_making_views_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    views_of_digits()[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_views_do_not_depend_on_the_number_of_workers():
    batches = augment.Batches(images=20, batch_size=4, seed=0, start=3, stop=7)
    alone, together = (
        list(DataLoader(views_of_digits(), batch_sampler=batches, num_workers=workers))
        for workers in (0, 2)
    )
    assert len(alone) == 4
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(torch.stack(a[0]), torch.stack(b[0]))
        assert torch.equal(a[1], b[1])


def test_each_epoch_is_another_order_of_the_images():
    batches = list(augment.Batches(images=10, batch_size=3, seed=0, start=0, stop=6))
    for epoch in (0, 1):
        keys = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {key[0] for key in keys} == {epoch}
        assert len({key[1] for key in keys}) == 9
    assert [i for _, i in batches[0]] != [i for _, i in batches[3]]


def test_order_does_not_depend_on_where_it_starts():
    whole = list(augment.Batches(images=10, batch_size=3, seed=0, start=0, stop=9))
    for start in range(9):
        assert list(augment.Batches(10, 3, 0, start, 9)) == whole[start:]


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
