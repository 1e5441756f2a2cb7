"""The experiments of ``fastssl reproduce``."""

import dataclasses
import functools
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import Subset
from torchvision.transforms import v2

from fastssl import NegativeCosineSimilarity
from fastssl.trainer import augment, checkpoint, evaluate, loop, networks
from fastssl.trainer.config import Config
from fastssl.trainer.data import Data
from fastssl.trainer.methods import METHODS
from fastssl.trainer.methods.base import TwoViews
from fastssl.trainer.methods.simclr import SimCLR
from fastssl.trainer.reproduce import (
    UNTRAINED,
    Arm,
    Ask,
    Experiment,
    Found,
    Panel,
    Trial,
    frozen_accuracies,
)

LINEAR = Panel("linear probe", {"linear": ""})
NEIGHBOURS = Panel("nearest neighbours", {"knn": ""})
# Those whose loss takes what one head makes of two views.
TWO_VIEWS = tuple(
    name for name, method in METHODS.items() if issubclass(method, TwoViews) and not method.labelled
)


class AttractOnly(SimCLR):
    """SimCLR without its negatives: two views of an image attract, and that is all.

    Nor does its head end with a batch norm, which would keep the embeddings of a batch apart.
    """

    def __init__(self, backbone: Any, config: Config, images: int) -> None:
        super().__init__(backbone, config, images)
        self.head = networks.ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            config.projection_dim,
            last_norm=False,
            norm=config.head_norm,
        )
        self.loss = NegativeCosineSimilarity()


class FewLabels(Experiment):
    """A part of the images is labelled; pretraining sees the rest only."""

    name = "few-labels"
    line = "Does pretraining on unlabelled images help where only some others are labelled?"
    takes = "3 minutes"
    epochs = 50
    labels = 200
    methods = tuple(name for name, method in METHODS.items() if not method.labelled)
    panels = (
        Panel("accuracy", {"from_scratch": "from scratch", "fine_tuned": "pretrained, fine-tuned"}),
    )

    def arms(self, ask: Ask) -> list[Arm]:
        """One: training from scratch is measured beside it."""
        return [Arm(f"{ask.method}, {ask.labels} labels", ask.method, ask.method)]

    def images(self, images: Data, ask: Ask, seed: int) -> Data:
        """The unlabelled rest."""
        labelled = set(self._labelled(images, ask, seed))
        rest = [i for i in range(len(images.train)) if i not in labelled]
        batch = Config(method=ask.method, dataset=ask.dataset).resolved().batch_size
        if len(rest) < batch:
            raise ValueError(
                f"labels must be at most {len(images.train) - batch}, which leaves a batch of "
                f"{batch} images to pretrain on, got {ask.labels}"
            )
        return dataclasses.replace(images, pretrain=Subset(images.train, rest))

    def _labelled(self, images: Data, ask: Ask, seed: int) -> list[int]:
        count = evaluate.label_count(ask.labels, len(images.train))
        return evaluate.draw_labels(images.train.labels, count, seed).tolist()

    def measure(self, trial: Trial) -> dict[str, float]:
        """The accuracy of both classifiers."""
        images, device, seed = trial.images, trial.device, trial.config.seed
        few = Subset(images.train, self._labelled(images, trial.ask, seed))
        start = {
            "from_scratch": evaluate.untrained(trial.config.backbone, images, seed, device),
            "fine_tuned": networks.load_backbone(trial.run.path, device),
        }
        return {
            name: evaluate.accuracy(
                evaluate.train_on_few(backbone, few, data=images, device=device, seed=seed),
                images,
                device,
            )
            for name, backbone in start.items()
        }

    def text(self, found: Found, ask: Ask) -> list[str]:
        """Which is ahead."""
        names = (
            f"The network pretrained by {ask.method} and fine-tuned on {ask.labels} labels",
            "the same network trained on them from scratch",
        )
        (arm,) = (arm.name for arm in self.arms(ask))
        return [
            found.compare(arm, arm, "fine_tuned", names, "from_scratch"),
            "Each seed draws other labelled images. Head, steps and learning rates of both are "
            "the same, and neither augments the labelled images.",
        ]


class Methods(Experiment):
    """Every method by its recipe."""

    name = "methods"
    line = "What does each method teach the backbone?"
    takes = "an hour"
    epochs = 50
    panels = (NEIGHBOURS, LINEAR)

    def arms(self, ask: Ask) -> list[Arm]:
        """All of them."""
        return [Arm(name, name, name) for name in METHODS]

    def text(self, found: Found, ask: Ask) -> list[str]:
        """Each beside the backbone as it was."""
        return [
            f"By {how}: {found.compare(method, UNTRAINED, measure)}"
            for how, measure in (("nearest neighbours", "knn"), ("linear probes", "linear"))
            for method in METHODS
        ]


class Collapse(Experiment):
    """Attraction alone, and with each of four remedies."""

    name = "collapse"
    line = "Does a network collapse if it only has to agree with itself, and what prevents it?"
    takes = "9 minutes"
    epochs = 20
    panels = (
        Panel("standard deviation of the embeddings", {"embedding_std": ""}, percent=False),
        Panel("effective rank", {"effective_rank": ""}, percent=False),
        NEIGHBOURS,
    )

    def arms(self, ask: Ask) -> list[Arm]:
        """The remedies by what they are, after no remedy at all."""
        return [
            Arm("attraction alone", "attraction alone", AttractOnly),
            Arm("simsiam", "predictor and stop-gradient (simsiam)", "simsiam"),
            Arm("byol", "slower target network (byol)", "byol"),
            Arm("simclr", "negatives (simclr)", "simclr"),
            Arm("barlow", "decorrelation (barlow)", "barlow"),
        ]

    def text(self, found: Found, ask: Ask) -> list[str]:
        """Who collapsed, and what it cost."""
        sentences = []
        for arm in self.arms(ask):
            stds, ranks = found[arm.name]["embedding_std"], found[arm.name]["effective_rank"]
            times = sum(map(evaluate.collapsed, stds, ranks))
            how = f"collapsed with {times} of {len(stds)} seeds" if times else "did not collapse"
            std, rank = (
                found.told(arm.name, measure, percent=False)
                for measure in ("embedding_std", "effective_rank")
            )
            place = str(arm.place)
            sentences.append(
                f"{place[0].upper()}{place[1:]}: {how}. Its embeddings end with a standard "
                f"deviation of {std}, where 1 is spread evenly and 0 all the same, and an "
                f"effective rank of {rank}. By nearest neighbours, "
                f"{found.compare(arm.name, UNTRAINED, 'knn')}"
            )
        return sentences


class BatchSize(Experiment):
    """A contrastive method and two without negatives, over batch sizes."""

    name = "batch-size"
    line = "Who needs large batches: simclr with its negatives, or byol and barlow without?"
    takes = "11 minutes"
    epochs = 10
    axis = "batch size"
    panels = (NEIGHBOURS, LINEAR)
    sizes: ClassVar = (16, 64, 256)

    def arms(self, ask: Ask) -> list[Arm]:
        """Every method with every size."""
        return [
            Arm(f"{method} {size}", size, method, method, {"batch_size": size})
            for method in ("simclr", "byol", "barlow")
            for size in self.sizes
        ]

    def text(self, found: Found, ask: Ask) -> list[str]:
        """The ends of each line, and the methods with the smallest batch."""
        small, large = min(self.sizes), max(self.sizes)
        return [
            *(
                found.compare(f"{method} {small}", f"{method} {large}", "linear")
                for method in ("simclr", "byol", "barlow")
            ),
            *(
                found.compare(f"{method} {small}", f"simclr {small}", "linear")
                for method in ("byol", "barlow")
            ),
            "These are linear probes. All are trained for as many epochs, in smaller batches for "
            "more steps; a method's learning rate is the same in all of them.",
        ]


class ProjectionWidth(Experiment):
    """Barlow Twins over widths of its projection, beside SimCLR."""

    name = "projection-width"
    line = "Does Barlow Twins gain from a wider projection, and does simclr?"
    takes = "8 minutes"
    epochs = 10
    axis = "width of the projection"
    panels = (NEIGHBOURS, LINEAR)
    widths: ClassVar = (16, 64, 256, 1024)

    def arms(self, ask: Ask) -> list[Arm]:
        """Both methods with every width."""
        return [
            Arm(f"{method} {width}", width, method, method, {"projection_dim": width})
            for method in ("barlow", "simclr")
            for width in self.widths
        ]

    def text(self, found: Found, ask: Ask) -> list[str]:
        """The ends of each line, and the methods at the widest."""
        narrow, wide = min(self.widths), max(self.widths)
        return [
            *(
                found.compare(f"{method} {wide}", f"{method} {narrow}", "linear")
                for method in ("barlow", "simclr")
            ),
            found.compare(f"barlow {wide}", f"simclr {wide}", "linear"),
            "These are linear probes.",
        ]


class Augmentation(Experiment):
    """Each part of the data set's default augmentation alone, and left out."""

    name = "augmentation"
    line = "Which part of the augmentation does a method learn from?"
    takes = "5 minutes"
    epochs = 10
    methods = TWO_VIEWS
    panels = (NEIGHBOURS, LINEAR)

    def arms(self, ask: Ask) -> list[Arm]:
        """All parts, none, one, and all but one."""
        parts = _parts(ask.dataset)
        choices = {
            "all": parts,
            "none": (),
            **{f"{part} alone": (part,) for part in parts},
            **{f"without {part}": tuple(p for p in parts if p != part) for part in parts},
        }
        return [
            Arm(
                f"{ask.method}, {name}",
                name,
                type(
                    "Augmented",
                    (METHODS[ask.method],),
                    {"views": staticmethod(functools.partial(_some_views, chosen))},
                ),
            )
            for name, chosen in choices.items()
        ]

    def text(self, found: Found, ask: Ask) -> list[str]:
        """What is missed when it is left out, and what one part does alone."""
        parts = _parts(ask.dataset)
        every, none = f"{ask.method}, all", f"{ask.method}, none"
        without = {part: f"{ask.method}, without {part}" for part in parts}
        cost = {part: found.lead(every, arm, "knn") for part, arm in without.items()}
        missed = max(parts, key=lambda part: cost[part])
        return [
            "What follows is told of nearest neighbours.",
            found.compare(every, UNTRAINED, "knn"),
            found.compare(none, UNTRAINED, "knn"),
            *(found.compare(every, arm, "knn") for arm in without.values()),
            f"What is missed most is {missed}."
            if cost[missed] > 0
            else "Of no single part is it shown that it is missed.",
            *(found.compare(f"{ask.method}, {part} alone", none, "knn") for part in parts),
        ]


def _parts(dataset: str) -> tuple[str, ...]:
    return tuple(_named_parts(dataset, size=32))  # whose names do not depend on it


def _named_parts(dataset: str, size: int) -> dict[str, v2.Transform]:
    """The steps of a data set's default augmentation, each by its name."""
    named = {}
    for step in augment.default(dataset, size).transforms:
        inner = step.transforms[0] if isinstance(step, v2.RandomApply) else step
        named[type(inner).__name__.removeprefix("Random").lower()] = step
    return named


def _some_views(chosen: tuple[str, ...], config: Config, size: int) -> list[v2.Transform]:
    steps = [step for name, step in _named_parts(config.dataset, size).items() if name in chosen]
    return [v2.Compose(steps or [v2.Identity()])] * 2


class Head(Experiment):
    """The loss of the features themselves, of a linear map, and of a perceptron's output."""

    name = "head"
    line = "Does a projection head, thrown away afterwards, make better features?"
    takes = "5 minutes"
    epochs = 20
    methods = TWO_VIEWS
    panels = (NEIGHBOURS, LINEAR)

    def arms(self, ask: Ask) -> list[Arm]:
        """No head, a linear one, and the method's own."""
        made = METHODS[ask.method]

        def without(self: Any, backbone: Any, config: Config, images: int) -> None:
            made.__init__(self, backbone, config, images)
            self.head = nn.Identity()

        def linear(self: Any, backbone: Any, config: Config, images: int) -> None:
            made.__init__(self, backbone, config, images)
            self.head = nn.Linear(backbone.out_features, config.projection_dim, bias=False)

        heads: dict[str, Any] = {
            "no head": type("NoHead", (made,), {"__init__": without}),
            "linear head": type("LinearHead", (made,), {"__init__": linear}),
            "perceptron": ask.method,
        }
        return [Arm(f"{ask.method}, {name}", name, method) for name, method in heads.items()]

    def text(self, found: Found, ask: Ask) -> list[str]:
        """Each pair."""
        pairs = (
            ("perceptron", "no head"),
            ("linear head", "no head"),
            ("perceptron", "linear head"),
        )
        return [
            f"By {how}: {found.compare(f'{ask.method}, {a}', f'{ask.method}, {b}', measure)}"
            for how, measure in (("linear probes", "linear"), ("nearest neighbours", "knn"))
            for a, b in pairs
        ]


class BackboneOrHead(Experiment):
    """What a probe finds before and after the projection head."""

    name = "backbone-or-head"
    line = "Which are the better features: the backbone's, or those the loss sees?"
    takes = "9 minutes"
    epochs = 20
    panels = tuple(
        Panel(label, {measure: "of the backbone", f"head_{measure}": "of the head"})
        for label, measure in (("nearest neighbours", "knn"), ("linear probe", "linear"))
    )

    def arms(self, ask: Ask) -> list[Arm]:
        """Some methods."""
        names = ("simclr", "barlow", "vicreg", "byol", "simsiam")
        return [Arm(name, name, name) for name in names]

    def measure(self, trial: Trial) -> dict[str, float]:
        """The accuracies of backbone and of backbone with head."""
        trainer = loop.Trainer(trial.config, trial.images)
        trainer.restore(checkpoint.load(trial.run.path / checkpoint.NAME))
        backbone, head = trainer.backbone, trainer.method.head
        after = frozen_accuracies(nn.Sequential(backbone, head), trial.images, trial.device)
        return {
            **frozen_accuracies(backbone, trial.images, trial.device),
            **{f"head_{measure}": value for measure, value in after.items()},
        }

    def text(self, found: Found, ask: Ask) -> list[str]:
        """Before against after, of each method."""
        return [
            f"By linear probes, {method}: "
            + found.compare(
                method, method, "linear", ("the backbone", "its head's output"), "head_linear"
            )
            for method in found
            if method != UNTRAINED
        ]


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        FewLabels(),
        Methods(),
        Collapse(),
        BatchSize(),
        ProjectionWidth(),
        Augmentation(),
        Head(),
        BackboneOrHead(),
    )
}
