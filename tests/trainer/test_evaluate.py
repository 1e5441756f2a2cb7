import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, get_worker_info

from fastssl import cli
from fastssl.trainer import checkpoint, data, evaluate, networks
from fastssl.trainer.config import Config


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


def make_run(folder: Path, digits: data.Data, **options: object) -> Path:
    """A run as pretraining leaves it, of a network that has learned nothing."""
    folder.mkdir()
    Config(out=str(folder), **options).resolved().save(folder / "config.yaml")
    torch.manual_seed(0)
    networks.export_backbone(
        folder / "backbone.safetensors",
        networks.build_backbone("cnn", digits.channels, digits.size),
        architecture="cnn",
        channels=digits.channels,
        size=digits.size,
        mean=digits.mean,
        std=digits.std,
    )
    return folder


def test_effective_rank_is_the_number_of_equal_directions() -> None:
    z = torch.eye(16).repeat(4, 1)
    assert evaluate.embedding_statistics(z, z)["effective_rank"] == pytest.approx(16, rel=1e-4)


def test_collapsed_embeddings_are_seen() -> None:
    z = torch.full((32, 8), 3.0)
    found = evaluate.embedding_statistics(z, z)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert found["embedding_std"] == pytest.approx(0, abs=1e-6)
    assert found["uniformity"] == pytest.approx(0, abs=1e-5)


def test_evenly_spread_embeddings_have_unit_std_and_no_alignment() -> None:
    z0, z1 = torch.randn(2, 2000, 64)
    found = evaluate.embedding_statistics(z0, z1)
    assert found["embedding_std"] == pytest.approx(1, abs=0.01)
    assert found["alignment"] == pytest.approx(2, abs=0.05)  # |a - b|^2 = 2 - 2 a.b
    assert found["effective_rank"] > 60


def test_alignment_is_zero_for_equal_views_whatever_their_lengths() -> None:
    z = torch.randn(10, 6)
    assert evaluate.embedding_statistics(z, 5 * z)["alignment"] == pytest.approx(0, abs=1e-6)


def test_uniformity_of_two_and_of_orthogonal_points() -> None:
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # one pair, at squared distance 4
    assert evaluate.embedding_statistics(opposite, opposite)["uniformity"] == pytest.approx(-8)
    axes = torch.eye(5)  # every pair at squared distance 2
    assert evaluate.embedding_statistics(axes, 3 * axes)["uniformity"] == pytest.approx(-4)


def test_nearest_neighbours_of_separated_clusters_are_right() -> None:
    centres = torch.eye(4) * 10
    y = torch.arange(4).repeat(25)
    x = centres[y] + torch.randn(100, 4) * 0.1
    assert evaluate.knn_accuracy(x[:60], y[:60], x[60:], y[60:]) == 1
    assert evaluate.knn_accuracy(x[:60], y[:60], x[60:], (y[60:] + 1) % 4) == 0


@pytest.mark.parametrize(
    ("k", "temperature", "winner"),
    [
        (1, 0.07, 0),  # the nearest alone
        (3, 0.07, 0),  # e^(1/0.07) against 2 e^(0.8/0.07): a ratio of 17 to 2
        (3, 10.0, 1),  # nearly equal votes: two against one
        (99, 10.0, 1),  # k beyond the number of images means all of them
    ],
)
def test_votes_are_weighted_by_similarity(k: int, temperature: float, winner: int) -> None:
    train_x = torch.tensor([[2.0, 0.0], [0.8, 0.6], [8.0, -6.0]])  # cosines 1, 0.8, 0.8
    train_y = torch.tensor([0, 1, 1])
    query, truth = torch.tensor([[3.0, 0.0]]), torch.tensor([winner])
    assert evaluate.knn_accuracy(train_x, train_y, query, truth, k, temperature) == 1


def test_neighbours_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(50, 3), torch.randint(4, (50,))
    whole = evaluate.knn_accuracy(x[:30], y[:30], x[30:], y[30:], k=5)
    seen = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda s, k: (seen.append(len(s)), topk(s, k))[1])
    big = x[:30].repeat(100_000, 1)
    evaluate.knn_accuracy(big, y[:30].repeat(100_000), x[30:], y[30:], k=5)
    assert max(seen) * len(big) <= 2**24
    assert sum(seen) == 20
    assert 0 <= whole <= 1


def test_linear_probe_finds_a_linear_rule_and_no_other() -> None:
    x = torch.randn(400, 5) * torch.tensor([1.0, 1e-3, 1.0, 1.0, 1e3])  # standardised away
    y = (x[:, 1] > 0).long()
    assert evaluate.linear_probe(x[:300], y[:300], x[300:], y[300:]) > 0.95
    xor = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    assert evaluate.linear_probe(x[:300], xor[:300], x[300:], xor[300:]) < 0.7


def test_extract_leaves_the_network_as_it_was(digits: data.Data) -> None:
    backbone = networks.build_backbone("cnn", 1, 16)
    backbone[1].eval()  # a mixture of modes
    modes = [module.training for module in backbone.modules()]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    x, y = evaluate.extract(backbone, digits.test, data=digits, device="cpu", batch_size=100)
    assert x.shape == (360, 128)
    assert x.dtype == torch.float32
    assert not x.requires_grad
    assert torch.equal(y, digits.test.labels)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    backbone.eval()
    images = digits.normalize(digits.test.images)
    torch.testing.assert_close(x, backbone(images).detach())


class ByWorker(Dataset):
    """Images with the number of the worker that read them, 0 for none, as label."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> data.Item:
        worker = get_worker_info()
        return torch.full((1, 16, 16), index, dtype=torch.uint8), worker.id + 1 if worker else 0


def test_workers_read_images_that_are_not_in_memory(digits: data.Data) -> None:
    backbone = networks.build_backbone("cnn", 1, 16)
    found = {}
    for workers, batch_size in ((2, 3), (2, 10), (0, 3)):
        options = {"data": digits, "device": "cpu", "workers": workers, "batch_size": batch_size}
        found[workers, batch_size], readers = evaluate.extract(backbone, ByWorker(), **options)
        assert set(readers.tolist()) == ({1, 2} if (workers, batch_size) == (2, 3) else {0})
    assert torch.equal(found[2, 3], found[0, 3])
    few = Subset(digits.test, range(20))
    options = {"data": digits, "device": "cpu", "batch_size": 5}
    for workers in (0, 10**6):  # which nobody could start
        evaluate.extract(backbone, few, **options, workers=workers)


def test_a_frozen_network_that_changes_is_caught(digits: data.Data) -> None:
    class Leaky(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.running_mean += 1
            return super().forward(x).mean((2, 3))

    with pytest.raises(RuntimeError, match="running_mean of a frozen network changed"):
        evaluate.extract(Leaky(1), digits.test, data=digits, device="cpu")


def test_a_frozen_network_that_leaves_eval_mode_is_caught(digits: data.Data) -> None:
    class Stubborn(nn.Flatten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.train()
            return super().forward(x)

    with pytest.raises(RuntimeError, match="left eval mode"):
        evaluate.extract(Stubborn(), digits.test, data=digits, device="cpu")


@pytest.mark.parametrize("count", [20, 50, 57, 200])
def test_draws_are_balanced_and_reproducible(digits: data.Data, count: int) -> None:
    labels = digits.train.labels
    chosen = evaluate.draw_labels(labels, count, seed=3)
    of_class = torch.bincount(labels[chosen], minlength=10)
    assert len(chosen.unique()) == count
    assert of_class.max() - of_class.min() <= 1
    assert torch.equal(chosen, evaluate.draw_labels(labels, count, seed=3))
    assert not torch.equal(chosen, evaluate.draw_labels(labels, count, seed=4))


def test_a_draw_takes_what_a_small_class_has() -> None:
    labels = torch.tensor([0] * 2 + [1] * 20)
    chosen = evaluate.draw_labels(labels, 10, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [2, 8]


def test_few_labels_are_learned_in_place_and_reproducibly(digits: data.Data) -> None:
    chosen = evaluate.draw_labels(digits.train.labels, 20, seed=0)
    few = Subset(digits.train, chosen.tolist())

    def train(seed: int) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(1)
        backbone = networks.build_backbone("cnn", 1, 16)
        before = backbone[0].weight.detach().clone()
        network = evaluate.train_on_few(backbone, few, data=digits, device="cpu", seed=seed)
        assert not torch.equal(backbone[0].weight, before)
        return network, network[0][0].weight.detach()

    network, weight = train(0)
    images = digits.normalize(digits.train.images[chosen])
    assert torch.equal(network.eval()(images).argmax(1), digits.train.labels[chosen])
    assert torch.equal(weight, train(0)[1])
    assert not torch.equal(weight, train(1)[1])


def test_evaluation_of_a_run(
    tmp_path: Path,
    digits: data.Data,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run", digits)
    monkeypatch.setattr(evaluate, "LABEL_COUNTS", (20, 5000))
    monkeypatch.setattr(evaluate, "DRAWS", 2)
    monkeypatch.setitem(evaluate.FEW_LABELS, "steps", 3)
    results = evaluate.evaluate_run(run)
    assert "left out 5000 labels: the training split has 1437 images" in capsys.readouterr().out
    assert (
        json.loads((run / "evaluation.json").read_text()) == results == evaluate.read_results(run)
    )
    assert results["knn"]["pretrained"] > 0.5  # even random features are better than chance
    assert [stage["name"] for stage in results["stages"]] == [
        "block1",
        "block2",
        "block3",
        "block4",
    ]
    assert [stage["width"] for stage in results["stages"]] == [32, 64, 64, 128]
    for stage in results["stages"]:
        assert 0.3 < stage["pretrained"] == stage["random"] <= 1
    assert results["linear"]["random"] == results["stages"][-1]["random"]
    (row,) = results["few_labels"]
    assert row["labels"] == 20
    for arm in ("fine_tuned", "from_scratch", "pretrained_frozen", "random_frozen"):
        first, second = row[arm]["accuracies"]
        assert row[arm]["mean"] == pytest.approx((first + second) / 2)
        assert row[arm]["std"] == pytest.approx(abs(first - second) / math.sqrt(2))
    # This "pretrained" backbone is an untrained one of seed 0, as is the random one.
    assert results["knn"]["pretrained"] == results["knn"]["random"]


def test_what_pretraining_began_with_is_evaluated_beside(tmp_path, digits, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "DRAWS", 2)
    monkeypatch.setitem(evaluate.FEW_LABELS, "steps", 1)
    monkeypatch.setattr(evaluate, "linear_probe", lambda _, __, x, ___: x.mean().item())
    first = make_run(tmp_path / "first", digits)
    run = make_run(tmp_path / "run", digits, weights=str(first), seed=1)
    results = evaluate.evaluate_run(run, labels=[20])
    for name in ("knn", "linear"):  # both files hold the same
        assert results[name]["weights"] == results[name]["pretrained"] != results[name]["random"]
    assert set(results["stages"][0]) == {"name", "width", "pretrained", "random", "weights"}
    cli._print_learned(results)
    assert "as it began" in capsys.readouterr().out
    (first / "backbone.safetensors").unlink()
    assert "weights" not in evaluate.evaluate_run(run, labels=[20])["knn"]
    assert f"left out what pretraining began with: weights '{first}'" in capsys.readouterr().out


def test_labels_are_numbers_or_shares(tmp_path, digits, monkeypatch):
    run = make_run(tmp_path / "run", digits)
    monkeypatch.setattr(evaluate, "DRAWS", 2)
    monkeypatch.setitem(evaluate.FEW_LABELS, "steps", 1)
    monkeypatch.setattr(evaluate, "linear_probe", lambda *_: 0.5)
    results = evaluate.evaluate_run(run, labels=["2%", 14, "1%"])
    assert [row["labels"] for row in results["few_labels"]] == [14, 29]  # of 1437


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("many", "labels must be numbers or shares such as 200 or 1%, got 'many'"),
        ("2.5", "numbers or shares .* got '2.5'"),
        ("nan%", "numbers or shares .* got 'nan%'"),
        ("inf%", "numbers or shares .* got 'inf%'"),
        ("0.1%", "labels must be 2 to 1437, .* got '0.1%', which is 1"),
        ("101%", "labels must be 2 to 1437, .* got '101%', which is 1451"),
        (1438, "labels must be 2 to 1437, the number of labelled images, got '1438'"),
        (-5, "labels must be 2 to 1437, .* got '-5'"),
    ],
)
def test_labels_that_cannot_be_had_are_an_error(asked, says):
    with pytest.raises(ValueError, match=says):
        evaluate.label_count(asked, 1437)


@pytest.mark.parametrize(
    ("name", "channels", "size", "widths"),
    [
        ("cnn", 1, 16, [32, 64, 64, 128]),
        ("resnet18", 1, 16, [64, 64, 128, 256, 512]),
        ("resnet50", 3, 65, [64, 256, 512, 1024, 2048]),
    ],
)
def test_stages_are_seen_in_order_and_the_last_is_the_backbones_own(name, channels, size, widths):
    backbone = networks.build_backbone(name, channels, size).eval()
    stages = networks.StageFeatures(backbone)
    images = torch.rand(2, channels, size, size)
    with torch.no_grad():
        parts = stages(images).split(widths, dim=1)
        assert list(stages.widths.values()) == widths
        assert torch.equal(parts[-1], backbone(images))
        x = images
        for module in backbone if name == "cnn" else ():
            x = module(x)
            if isinstance(module, nn.ReLU):
                break
        if name != "cnn":
            x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
    torch.testing.assert_close(parts[0], x.mean((2, 3)))
    assert not any(module._forward_hooks for module in backbone.modules())


def test_an_exported_resnet_is_torchvisions(tmp_path):
    from safetensors.torch import load_file
    from torchvision.models import resnet18

    for channels, size in ((3, 65), (1, 16)):
        backbone = networks.build_backbone("resnet18", channels, size).eval()
        path = tmp_path / f"{size}.safetensors"
        about = {"architecture": "resnet18", "channels": channels, "size": size}
        networks.export_backbone(path, backbone, **about, mean=(0.5,), std=(0.5,))
        network = resnet18(num_classes=7).eval()
        if size <= 64:
            network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        missing, unexpected = network.load_state_dict(load_file(path), strict=False)
        assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
        images = torch.rand(2, channels, size, size)
        with torch.no_grad():
            assert torch.equal(network(images), network.fc(backbone(images)))


def test_a_data_set_without_labels_is_skipped(
    tmp_path: Path,
    digits: data.Data,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path / "run", digits)
    digits = data.load("digits")
    digits.train = digits.test = None
    monkeypatch.setattr(data, "load", lambda *_, **__: digits)
    assert evaluate.evaluate_run(run) == {"skipped": "data set 'digits' has no labels"}


def test_errors_name_the_path(tmp_path: Path, digits: data.Data) -> None:
    with pytest.raises(ValueError, match=r"found no .*nowhere/config\.yaml"):
        evaluate.evaluate_run(tmp_path / "nowhere")
    run = make_run(tmp_path / "run", digits)
    for damaged in ("{", "[1]", "3", '{"knn": {}}'):
        (run / "evaluation.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"run/evaluation\.json is damaged"):
            evaluate.read_results(run)
    (run / "backbone.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"truncated or not a safetensors file .*[)]$"):
        evaluate.evaluate_run(run)
    checkpoint.save(run, {})
    with pytest.raises(ValueError, match=r"missing, fastssl pretrain --resume --out .*/run writes"):
        evaluate.evaluate_run(run)
    (run / "backbone.safetensors").unlink()
    says = r"run in .*/run is not finished, .*; fastssl pretrain --resume --out .*/run goes on"
    with pytest.raises(ValueError, match=says):
        evaluate.evaluate_run(run)
