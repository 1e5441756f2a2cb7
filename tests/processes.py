"""What each process of tests/test_parallel.py runs: a module that processes can import."""

import dataclasses
import datetime
import os
import time
from pathlib import Path

import torch
from torch import distributed as dist

from fastssl.trainer import Config, data, loop, parallel

IMAGES = 50


class Watched(loop.Trainer):
    """A trainer that keeps the loss of every step."""

    def run(self) -> loop.Run:
        self.losses: list[float] = []
        return super().run()

    def _train_step(self, loaded: object) -> tuple[float, object]:
        value, embeddings = super()._train_step(loaded)
        self.losses.append(value)
        return value, embeddings


def train(options: dict[str, object]) -> dict[str, object]:
    """The losses, the history and the state at the end of a run on a few digits."""
    digits = data.load("digits")
    few = data.Images(digits.train.images[:IMAGES], digits.train.labels[:IMAGES])
    trainer = Watched(
        Config(**options), dataclasses.replace(digits, pretrain=few, train=few, test=few)
    )
    history = trainer.run().history
    state = {name: x.clone() for name, x in trainer.method.state_dict().items()}
    return {"losses": trainer.losses, "history": history, "state": state}


def join(rank: int, ranks: int, port: int) -> None:
    """Become one of several processes, as torchrun tells it."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost", **{name: str(x) for name, x in own.items()}}
    torch.set_num_threads(1)


def run(rank: int, ranks: int, port: int, folder: Path, runs: dict[str, dict]) -> None:
    """Train each of the runs as one of several processes and write what came of it."""
    join(rank, ranks, port)
    with parallel.process_group(torch.device("cpu")):
        results = {name: train(options) for name, options in runs.items()}
    torch.save(results, folder / f"{rank}.pt")


class Slow(torch.utils.data.Dataset):
    """A few digits. To read one again takes long if its number is even, as in the lead's share."""

    def __init__(self, images: data.Images, seconds: float, broken: int | None = None) -> None:
        self.images, self.seconds, self.broken = images, seconds, broken
        self.read: set[int] = set()

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> data.Item:
        if index in self.read:
            if index == self.broken:
                raise ValueError(f"digit {index} cannot be read")
            time.sleep(self.seconds if index % 2 == 0 else 0)
        self.read.add(index)
        return self.images[index]


def check(rank: int, ranks: int, port: int, folder: Path, options: dict[str, object]) -> None:
    """Train with checks that take longer than the processes wait for one another, then fail."""
    join(rank, ranks, port)
    digits = data.load("digits")
    few = data.Images(digits.train.images[:IMAGES], digits.train.labels[:IMAGES])
    own = dataclasses.replace(digits, pretrain=few, train=Slow(digits.train, 0.1))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
    history = loop.pretrain(Config(**options), data=own).history
    own.train = Slow(digits.train, 0.0, broken=1)  # of the other process alone
    options = {**options, "epochs": 2}
    history += loop.pretrain(Config(**options), data=own, resume=True).history
    dist.destroy_process_group()
    torch.save(history, folder / f"{rank}.pt")


def go_on(rank: int, ranks: int, port: int, options: dict[str, object]) -> None:
    """Resume a run as one of several processes, to its end."""
    join(rank, ranks, port)
    assert loop.pretrain(Config(**options), resume=True).complete
