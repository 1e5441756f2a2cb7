"""How good a backbone is: collapse monitors, nearest neighbours, a linear probe, few labels."""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, default_collate

from fastssl.distributed import world_size
from fastssl.trainer import checkpoint, data, given, guard, networks, parallel
from fastssl.trainer.config import Config, read_options
from fastssl.trainer.data import Data, in_memory, labels_of
from fastssl.trainer.environment import default_workers

LABEL_COUNTS = (20, 50, 100, 200)
DRAWS = 5
# What a network is trained with on few labels, whatever it starts from. On digits, neither learning
# rates three times higher or lower nor twice as many steps gain either side more than deviation.
FEW_LABELS = {"steps": 100, "batch_size": 32, "lr": 1e-3, "head_lr": 1e-2, "weight_decay": 1e-2}


def embedding_statistics(z0: Tensor, z1: Tensor) -> dict[str, float]:
    """Four numbers that show a collapse, of the embeddings of two views scaled to unit length.

    Args:
        z0: Embeddings [N, D] of one view of N images, N at least 2.
        z1: Embeddings [N, D] of another view of the same images.

    Returns:
        embedding_std: Mean over features of the standard deviation, times sqrt(D): 1 when the
            embeddings are spread evenly over the sphere, 0 when they are all the same (Chen & He,
            SimSiam, 2021, section 4.1).
        effective_rank: exp of the entropy of the singular values, taken as shares of their sum:
            between 1, a line, and D (Roy & Vetterli 2007; RankMe, Garrido et al. 2023).
        alignment: Mean squared distance between the two views of an image, 0 at best.
        uniformity: log of the mean of exp(-2 d^2) over all pairs of images, d their distance: 0
            when all are the same, lower when they are spread (both Wang & Isola 2020).
    """
    z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    z = torch.cat([z0, z1])
    shares = torch.linalg.svdvals(z)
    shares = shares / shares.sum()
    # By products, since Macs have no pdist; |a - b|^2 = 2 - 2 a.b at unit length.
    pairs = torch.ones(len(z0), len(z0), dtype=torch.bool, device=z.device).triu(1)
    potentials = [(4 * (view @ view.T - 1)[pairs]).exp().mean().log() for view in (z0, z1)]
    return {
        "embedding_std": (z.std(dim=0).mean() * z.shape[1] ** 0.5).item(),
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
        "alignment": (z0 - z1).square().sum(dim=1).mean().item(),
        "uniformity": torch.stack(potentials).mean().item(),
    }


def collapsed(embedding_std: float, effective_rank: float) -> bool:
    """Whether these two of the `embedding_statistics` show a collapse."""
    return embedding_std <= 0.3 or effective_rank <= 3


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; RuntimeError if a weight or running statistic still changes."""
    modes = {module: module.training for module in network.modules()}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.eval()
    try:
        with torch.no_grad():
            yield
        if any(module.training for module in modes):
            raise RuntimeError("the network left eval mode while its features were extracted")
        for name, value in network.state_dict().items():
            if not torch.equal(value, before[name]):
                raise RuntimeError(f"{name} of a frozen network changed")
    finally:
        for module, training in modes.items():
            module.training = training


def extract(
    backbone: nn.Module,
    dataset: Any,
    *,
    data: Data,
    device: torch.device | str,
    batch_size: int = 512,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """The features of a frozen network.

    Args:
        backbone: The network, on ``device``. It is left in the mode it came in.
        dataset: One split of ``data``.
        data: Knows how to normalise the images.
        device: Where the network is.
        batch_size: Images at a time.
        workers: Processes that read images, where these are not in memory and fill a batch.

    Returns:
        The features, float32 [N, F], and the labels, int64 [N], both on the CPU.

    Raises:
        RuntimeError: A weight or a running statistic of the network changed.
    """
    features, labels = [], []
    loader = DataLoader(
        dataset,
        batch_size,
        num_workers=0 if in_memory(dataset) or len(dataset) <= batch_size else workers,
        worker_init_fn=guard.start_worker,
        generator=torch.Generator(),  # one of its own: a loader otherwise draws from the global one
    )
    with frozen(backbone):
        for images, of_batch in loader:
            features.append(backbone(data.normalize(images.to(device))).float().cpu())
            labels.append(of_batch)
            if data.classes and of_batch.max() >= len(data.classes):
                raise ValueError(
                    f"labels of data set {data.name!r} must be at most {len(data.classes) - 1}, "
                    f"the last of its classes, got {of_batch.max()}"
                )
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test images that their nearest training images classify correctly.

    The k nearest by cosine similarity vote with weight exp(similarity / temperature), as in Wu et
    al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018, section
    3.4.

    Args:
        train_x: Features [N, F] that vote.
        train_y: Their classes [N], whole numbers from 0; those of -1, here and below, are left out.
        test_x: Features [M, F].
        test_y: Their classes [M].
        k: Neighbours that vote; all of them where there are fewer.
        temperature: Of the votes.

    Returns:
        The accuracy, between 0 and 1.
    """
    (train_x, train_y), (test_x, test_y) = _known(train_x, train_y), _known(test_x, test_y)
    return _voted(*_nearest(train_x, train_y, test_x, k), test_y, k, temperature)


def _nearest(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The cosines [M, k] of the test images' nearest training images, and the classes of these."""
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    rows = max(1, 2**24 // max(1, len(train_x)))  # at most 64 MiB of similarities at a time
    found = [
        (queries @ train_x.T).topk(min(k, len(train_x))) for queries in torch.split(test_x, rows)
    ]
    return torch.cat([x.values for x in found]), train_y[torch.cat([x.indices for x in found])]


def _voted(
    cosines: Tensor, classes: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of the test images whose class the k nearest of those that are given vote for."""
    if cosines.shape[1] > k:
        cosines, order = cosines.topk(k)
        classes = classes.take_along_dim(order, 1)
    votes = cosines.new_zeros(len(cosines), int(classes.max()) + 1)
    votes.scatter_add_(1, classes, ((cosines - 1) / temperature).exp())
    return int((votes.argmax(dim=1) == test_y).sum()) / len(test_y)


def knn_check(
    backbone: nn.Module, data: Data, device: torch.device | str, workers: int = 0, k: int = 20
) -> float:
    """The ``knn_accuracy`` of a frozen network on the splits of a data set.

    Of several processes each reads its share of the images and looks among its own training images
    for the nearest; all of them return the same.

    Args:
        backbone: The network, on ``device``.
        data: The data set.
        device: Where the network is.
        workers: Processes, of each process, that read images.
        k: Neighbours that vote.

    Raises:
        Exception: What went wrong here; RuntimeError for what went wrong in another process.
    """
    ranks, rank = min(world_size(), len(data.train), len(data.test)), parallel.rank()
    options: dict[str, Any] = {"data": data, "device": device, "workers": workers}
    train, test, nearest = None, None, None
    with guard.agreed():
        if rank < ranks:
            train, test = (
                _known(*extract(backbone, Subset(x, range(rank, len(x), ranks)), **options))
                for x in (data.train, data.test)
            )
    shares = filter(None, parallel.gathered(test))
    test_x, test_y = (torch.cat(parts) for parts in zip(*shares, strict=True))
    with guard.agreed():
        nearest = train and _nearest(*train, test_x, k)
    shares = filter(None, parallel.gathered(nearest))
    cosines, classes = (torch.cat(parts, 1) for parts in zip(*shares, strict=True))
    return _voted(cosines, classes, test_y, k)


def _known(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Features and labels of those whose label is known."""
    return x[y >= 0], y[y >= 0]


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Test accuracy of logistic regression on the training features [N, F], standardised.

    Images with a label of -1 are left out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(*(x.numpy() for x in _known(train_x, train_y)))
    return float(probe.score(*(x.numpy() for x in _known(test_x, test_y))))


def draw_labels(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` random images, as many of each class while there are enough.

    A label of -1 is no class. With the same seed a larger draw contains the smaller one.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order] >= 0]
    classes = int(labels.max()) + 1
    turn = torch.randperm(classes, generator=generator)[labels[order]]  # of each image's class
    round_ = torch.empty_like(order)
    for c in range(classes):
        of_class = labels[order] == c
        round_[of_class] = torch.arange(int(of_class.sum()))
    return order[(round_ * classes + turn).argsort()[:count]]


def label_count(asked: str | int, images: int) -> int:
    """How many of ``images`` labels are asked for: a number, or a share such as ``1%``."""
    text = str(asked)
    try:
        share = text.endswith("%")
        count = round(images * float(text[:-1]) / 100) if share else int(text)
    except (OverflowError, ValueError):
        raise ValueError(
            f"labels must be numbers or shares such as 200 or 1%, got {text!r}"
        ) from None
    if not 2 <= count <= images:
        raise ValueError(
            f"labels must be 2 to {images}, the number of labelled images, got {text!r}"
            + (f", which is {count}" if share else "")
        )
    return count


def train_on_few(
    backbone: Any,
    labelled: Any,
    *,
    data: Data,
    device: torch.device | str,
    seed: int,
) -> nn.Sequential:
    """Train a backbone with a new linear classifier by ``FEW_LABELS``, without augmentation.

    Args:
        backbone: Where to start from, on ``device``; it is trained in place.
        labelled: The labelled images, a data set.
        data: Knows how to normalise them and how many classes there are.
        device: Where the backbone is.
        seed: Of the classifier and of the batches.

    Returns:
        The backbone with the classifier, images -> [B, classes].
    """
    recipe = FEW_LABELS
    steps, batch_size = int(recipe["steps"]), int(recipe["batch_size"])
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(backbone.out_features, len(data.classes))
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    network = nn.Sequential(backbone, head.to(device)).train()
    groups = [
        {"params": list(backbone.parameters()), "lr": recipe["lr"]},
        {"params": list(head.parameters()), "lr": recipe["head_lr"]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe["weight_decay"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randperm(len(labelled), generator=generator)[:batch_size]
        images, labels = default_collate([labelled[i] for i in batch.tolist()])
        logits = network(data.normalize(images.to(device)))
        loss = F.cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return network


def run_config(run: Path) -> Config:
    """The resolved options of a run, from its config.yaml."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"run must be a folder that fastssl pretrain wrote, found no {path}"
            f"{checkpoint.remedy(run)}"
        )
    return Config.from_dict(read_options(path)).resolved()


def refuse_other_data(run: Path) -> None:
    """Raise ValueError for a run that was given its data: its options do not name them."""
    if "data" in (read_json(run / "environment.json") or {}):
        raise ValueError(
            f"data: the run in {run} was given its data from Python, and its options name others; "
            f"pass data there again, to pretrain, evaluate_run or write_report"
        )


def load_data(run: Path, data_dir: Path | None = None, own: Data | None = None) -> Data:
    """The data set of a run, from where it lies now if that is another folder, or its own."""
    if own is not None:
        given.check(own)
        return own
    refuse_other_data(run)
    found = data.of_config(run_config(run), data_dir)
    for note in found.notes:
        print(note)
    return found


def device_for(config: Config) -> torch.device:
    """This machine's accelerator, unless there is none or the run kept to the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator and config.device != "cpu" else torch.device("cpu")


def untrained(architecture: str, images: Data, seed: int, device: torch.device | str) -> Any:
    """A backbone as the pretraining with that seed found it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return networks.build_backbone(architecture, images.channels, images.size).to(device)


def workers_for(config: Config, device: torch.device) -> int:
    """How many processes read the images of a run."""
    return default_workers(device) if config.workers is None else config.workers


def accuracy(
    network: nn.Module, images: Data, device: torch.device | str, workers: int = 0
) -> float:
    """Share of the test images that a classifier gets right."""
    logits, labels = _known(
        *extract(network, images.test, data=images, device=device, workers=workers)
    )
    return int((logits.argmax(dim=1) == labels).sum()) / len(labels)


def evaluate_run(
    run: Path,
    *,
    labels: Sequence[str | int] = (),
    data: Data | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Evaluate the backbone of a run and write the results to its ``evaluation.json``.

    Nearest neighbours and a linear probe see frozen features of the whole training split, those of
    the pretrained backbone, of one that is random and, if there were any, of that with the weights
    that pretraining began with; the linear probe sees every stage of them. Then ``DRAWS`` draws
    each of a few class-balanced labelled images train the pretrained backbone, fine-tuned, the same
    network from scratch by the very same recipe, and a linear classifier on each frozen backbone.

    Args:
        run: The folder that ``pretrain`` wrote.
        labels: How many labelled images: numbers, or shares of the training split such as "1%".
            ``LABEL_COUNTS``, as far as there are images, if empty.
        data: What was given to ``pretrain`` in place of its data set.
        data_dir: Where the data set lies now, if not where the run found it.

    Returns:
        What was written: accuracies between 0 and 1; or ``{"skipped": why}`` for a data set without
        labels.

    Raises:
        ValueError: The folder is not a run, its backbone is missing or damaged, or labels cannot be
            that many.
    """
    started = time.perf_counter()
    run = checkpoint.expanded(run)
    config = run_config(run)
    device = device_for(config)
    workers = workers_for(config, device)
    pretrained = networks.load_backbone(run, device)
    images = load_data(run, data_dir, data)
    if images.train is None:
        results: dict[str, Any] = {"skipped": f"data set {images.name!r} has no labels"}
        _write(run, results)
        return results

    known = labels_of(images.train)
    available = len(images.train) if known is None else int((known >= 0).sum())
    counts = sorted({label_count(asked, available) for asked in labels})
    if not labels:
        counts = [count for count in LABEL_COUNTS if count <= available]
        left_out = ", ".join(str(count) for count in LABEL_COUNTS if count > available)
        if left_out:
            print(f"left out {left_out} labels: the training split has {available} images")

    architecture = pretrained.about["architecture"]
    backbones = {
        "pretrained": pretrained,
        "random": untrained(architecture, images, config.seed, device),
    }
    if config.weights:
        begun = untrained(architecture, images, config.seed, "cpu")
        try:
            networks.load_weights(begun, architecture, config.weights, images.channels, images.size)
            backbones["weights"] = begun.to(device)
        except ValueError as error:
            print(f"left out what pretraining began with: {error}")
    features: dict[str, Any] = {}
    of_stages: dict[str, Any] = {}
    for name, backbone in backbones.items():
        every_stage = networks.StageFeatures(backbone)
        (train_x, train_y), (test_x, test_y) = (
            extract(every_stage, split, data=images, device=device, workers=workers)
            for split in (images.train, images.test)
        )
        widths = every_stage.widths
        parts = (torch.split(x, list(widths.values()), dim=1) for x in (train_x, test_x))
        of_stages[name] = [(a, train_y, b, test_y) for a, b in zip(*parts, strict=True)]
        features[name] = of_stages[name][-1]

    available = int((train_y >= 0).sum())
    counts = [count for count in counts if count <= available]
    stages: list[dict[str, Any]] = [{"name": s, "width": w} for s, w in widths.items()]
    todo = [(row, i, arm) for i, row in enumerate(stages) for arm in features]
    for row, i, arm in _progress(todo, "linear probes"):
        row[arm] = linear_probe(*of_stages[arm][i])
    results = {
        "train_images": available,
        "test_images": int((test_y >= 0).sum()),
        "classes": len(images.classes),
        "draws": DRAWS,
        "recipe": FEW_LABELS,
        "knn": {name: knn_accuracy(*x) for name, x in features.items()},
        "linear": {name: stages[-1][name] for name in features},
        "stages": stages,
        "few_labels": [],
    }

    scores: dict[int, dict[str, list[float]]] = {count: {} for count in counts}
    draws = [(count, draw) for count in counts for draw in range(DRAWS)]
    for count, draw in _progress(draws, "few labels"):
        chosen = draw_labels(train_y, count, seed=draw)
        few = Subset(images.train, chosen.tolist())
        of_draw = {}
        for name, backbone in (
            ("fine_tuned", networks.load_backbone(run, device)),
            ("from_scratch", untrained(architecture, images, draw, device)),
        ):
            network = train_on_few(backbone, few, data=images, device=device, seed=draw)
            of_draw[name] = accuracy(network, images, device, workers)
        for name, (train_x, _, test_x, _) in features.items():
            of_draw[f"{name}_frozen"] = linear_probe(
                train_x[chosen], train_y[chosen], test_x, test_y
            )
        for name, found in of_draw.items():
            scores[count].setdefault(name, []).append(found)
    for count, arms in scores.items():
        results["few_labels"].append(
            {
                "labels": count,
                **{
                    name: {
                        "mean": statistics.mean(accuracies),
                        "std": statistics.stdev(accuracies),
                        "accuracies": accuracies,
                    }
                    for name, accuracies in arms.items()
                },
            }
        )
    results["seconds"] = time.perf_counter() - started
    _write(run, results)
    return results


def _progress(todo: list[Any], what: str) -> Iterable[Any]:
    return track(todo, what, disable=not sys.stdout.isatty())


def read_results(run: Path) -> dict[str, Any] | None:
    """What ``evaluate_run`` wrote, or None if the run was not evaluated yet."""
    results = read_json(run / "evaluation.json")
    whole = {"knn", "linear", "stages", "few_labels"}
    if results and "skipped" not in results and not whole <= set(results):
        raise ValueError(
            f"{run / 'evaluation.json'} is damaged (results are missing); "
            f"fastssl evaluate {shlex.quote(str(run))} writes it anew"
        )
    return results


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file, or None if there is no such file."""
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to go on without it") from None


def _write(run: Path, results: dict[str, Any]) -> None:
    checkpoint.write(run / "evaluation.json", (json.dumps(results, indent=2) + "\n").encode())
