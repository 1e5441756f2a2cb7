"""The pretraining loop: from a Config to a run folder with a backbone in it."""

import csv
import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, default_collate

from fastssl.distributed import gather_rows, world_size
from fastssl.ops.backend import resolve
from fastssl.trainer import (
    augment,
    checkpoint,
    evaluate,
    given,
    guard,
    logs,
    networks,
    optim,
    parallel,
)
from fastssl.trainer.config import Config
from fastssl.trainer.data import Data, checksum, of_config
from fastssl.trainer.environment import cores, default_workers, environment
from fastssl.trainer.folders import told
from fastssl.trainer.methods import METHODS

LATER = {"about", "checksum"}  # what early checkpoints do not have
# Options that a resumed run may change: they say where and how it runs, not what it computes.
FREE = (
    *("data_dir", "damaged", "device", "out", "workers"),
    *("knn_every", "keep_best", "keep_every"),
)


@dataclass
class Run:
    """A run on disk.

    Attributes:
        path: Its folder.
        complete: False if it was interrupted, be it in its last step.
        history: The rows of metrics.csv, a dict for each epoch.
        data: What it was pretrained on.
    """

    path: Path
    complete: bool
    history: list[dict[str, Any]]
    data: Data


def pretrain(config: Config, *, resume: bool = False, data: Data | None = None) -> Run:
    """Pretrain a backbone.

    The run's folder, ``config.out``, then holds backbone.safetensors, metrics.csv, TensorBoard
    logs, the config and the last two checkpoints. SIGINT (Ctrl-C) or SIGTERM ends the run after the
    current step and saves it.

    Args:
        config: The options.
        resume: Continue the run in ``config.out``, to the result it would have had without the
            interruption; start it if there is none. With more epochs than it had it is trained for
            longer, finished or not, by the schedule of so many epochs from there on.
        data: What to pretrain on in place of ``config.dataset``, whose recipe and augmentation are
            taken. An item of ``data.pretrain`` may be several images that show the same thing.

    Returns:
        The Run.

    Raises:
        TypeError: config is not a Config.
        ValueError: An option cannot be used, or differs from those of the run to resume; or another
            process writes to the folder.
        FloatingPointError: The loss or its gradient became NaN or infinite; the last good state is
            saved.
        OSError: The folder cannot be written any more.

    Example:
        >>> run = pretrain(Config(epochs=1, out="runs/try"))  # doctest: +SKIP
    """
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, got {type(config).__name__}")
    device = _device(config.device)
    with (
        parallel.process_group(device),
        guard.alone(checkpoint.writable(config.resolved().out)) as out,
    ):
        return _pretrain(config, out, resume, data)


def _pretrain(config: Config, out: Path, resume: bool, data: Data | None) -> Run:
    found = checkpoint.latest(out)
    # Looked for before the processes meet in Trainer: later, the lead may have written its own.
    if not resume and (found or (out / "config.yaml").exists()):
        raise ValueError(
            f"out: {out} holds a run already; continue it with resume (--resume), "
            f"or name another folder"
        )
    if data is None:
        evaluate.refuse_other_data(out)
    state = checkpoint.load(found) if found else None
    if state:
        started = state.get("config", {})
        if (epochs := config.resolved().epochs) < started.get("epochs", 0):
            raise ValueError(
                f"epochs must be at least {started['epochs']}, those that the run in {out} was "
                f"started with, got {epochs}"
            )
        if config.warmup_epochs is None:  # by default a longer run keeps that of the shorter one
            config = dataclasses.replace(config, warmup_epochs=started.get("warmup_epochs"))
    trainer = Trainer(config, data, fresh=state is None)
    if state:
        trainer.restore(state)
        whole = all((out / name).exists() for name in ("backbone.safetensors", "config.yaml"))
        if trainer.step == trainer.steps and whole:
            trainer.say(f"{out} is complete ({trainer.config.epochs} epochs)")
            if trainer.rank == 0 and (out / "config.yaml").read_bytes() != trainer.config.text():
                trainer.config.save(out / "config.yaml")
            return Run(out, True, trainer.history, trainer.data)
    threads = torch.get_num_threads()
    try:
        return trainer.run()
    finally:
        torch.set_num_threads(threads)


class Trainer:
    """Everything that a run is made of; `step` and what `state` returns change as it goes on."""

    def __init__(self, config: Config, data: Data | None = None, fresh: bool = True) -> None:
        self.config = config = config.resolved()
        networks.check_backbone(config.backbone)
        self.device = _device(config.device)
        try:
            resolve(config.backend, torch.empty(0, device=self.device))
        except RuntimeError as error:
            raise ValueError(f"backend: {error}") from None
        if config.precision == "float16" and self.device.type == "cpu":
            raise ValueError(
                "precision must be float32 or bfloat16 on a CPU, which computes 'float16' far too "
                "slowly"
            )
        self.out = checkpoint.writable(config.out)
        self.given = data is not None  # which no command line can repeat
        self.again = checkpoint.resume_command(self.out)
        if self.given:
            self.again = "the same call of pretrain and resume=True"
        with parallel.lead_first():  # who downloads what is not there
            self.data = data or of_config(config)
        if self.given:
            given.check(self.data)
        method = METHODS[config.method]
        self.images = self.data.train if method.labelled else self.data.pretrain
        if self.images is None:
            raise ValueError(
                f"method {config.method!r} needs labels, and data set {self.data.name!r} has none"
            )
        if config.batch_size > len(self.images):
            raise ValueError(
                f"batch_size must be at most {len(self.images)}, the number of images, "
                f"got {config.batch_size}"
            )
        self.rank, self.ranks = parallel.rank(), world_size()
        if config.batch_size % self.ranks:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, {self.ranks}, got "
                f"{config.batch_size}"
            )
        self.checksum = checksum(self.images)
        self.per_epoch = len(self.images) // config.batch_size
        self.steps = config.epochs * self.per_epoch

        torch.manual_seed(config.seed)
        self.backbone = networks.build_backbone(config.backbone, self.data.channels, self.data.size)
        if config.weights and fresh:
            left = networks.load_weights(
                self.backbone, config.backbone, config.weights, self.data.channels, self.data.size
            )
            rest = f", but for {told(left)}" if left else ""
            self.say(f"beginning with the weights of {config.weights}{rest}")
        self.about: dict[str, Any] = {
            "architecture": config.backbone,
            "channels": self.data.channels,
            "size": self.data.size,
            "mean": [float(x) for x in self.data.mean],
            "std": [float(x) for x in self.data.std],
        }
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.method = method(self.backbone, config, len(self.images))
        self.method.to(self.device, memory_format=self.layout)
        if method.whole_batch_norm:
            parallel.convert_batch_norm(self.method, self.device)
        if config.compile:
            self.method.compile()
        self.network = parallel.wrap(self.method, self.device)
        self.calls: list[Any] = []  # what the loss was given in this step
        self.method.loss.register_forward_pre_hook(lambda _, given: self.calls.append(given))
        transforms = augment.chosen(self.method.views(config, self.data.size), self.data)
        self.views = augment.Views(self.images, transforms, config.seed)
        if config.backbone.startswith(networks.TIMM):  # which may be made for one size alone
            for shape in {view.shape[-3:] for view in self.views[0, 0][0]}:
                networks.try_on(self.backbone, config.backbone, shape)
        self.optimizer = optim.build(self.method, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.workers = config.workers
        if self.workers is None:
            self.workers = default_workers(self.device, self.ranks)
        if self.given:
            given.check_views(self.views, self.data, self.workers)
        # Without an accelerator the workers and the network share the cores. The last bits of a
        # result depend on the number of threads, so a checkpoint remembers it.
        self.threads = torch.get_num_threads()
        if self.device.type == "cpu":
            self.threads = min(self.threads, max(1, cores() - self.workers))
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.loss_sum, self.seconds = 0.0, 0.0  # of the current epoch

    def run(self) -> Run:
        """Train to the end or until a signal, from wherever the state stands."""
        config = self.config
        torch.set_num_threads(self.threads)
        writer: Any = nullcontext(lambda *_: None)
        if self.rank == 0:  # the lead alone writes
            self._set_aside()
            config.save(self.out / "config.yaml")
            about = environment()
            if self.given:
                about["data"] = f"{self.data.name}, given from Python"
            text = json.dumps(about, indent=2) + "\n"
            checkpoint.write(self.out / "environment.json", text.encode())
            writer = logs.tensorboard(self.out, self.step + 1, self.again)
        parameters = sum(parameter.numel() for parameter in self.method.parameters())
        processes = f", {self.ranks} processes" if self.ranks > 1 else ""
        self.say(
            f"{config.method} on {self.data.name}: {len(self.images)} images, "
            f"{config.backbone} and head of {parameters / 1e6:.2f} M parameters, "
            f"{config.epochs} epochs of {self.per_epoch} steps on {self.device}{processes}"
        )
        for line in self.data.described():
            self.say(line)
        if self.step:
            self.say(f"continuing {self.out} at step {self.step} of {self.steps}")
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty() or self.rank > 0,
        )
        stopped = False
        with guard.stoppable() as stop, progress, writer as self.log:
            if self.history and self.step == self.history[-1]["epoch"] * self.per_epoch:
                self._finish_epoch()  # the last process may have ended before it
            bar = progress.add_task("starting", total=self.steps, completed=self.step, told="")
            last = time.perf_counter()
            for loaded in self._loader():
                loss, embeddings = self._train_step(loaded)
                now = time.perf_counter()
                self.seconds, last = self.seconds + now - last, now
                done = (self.step - 1) % self.per_epoch + 1
                rate = done * config.batch_size / self.seconds
                epoch = (self.step - 1) // self.per_epoch + 1
                progress.update(
                    bar,
                    completed=self.step,
                    description=f"epoch {epoch}/{config.epochs}",
                    told=f"loss {loss:.4f}  {rate:.0f} images/s",
                )
                if done == self.per_epoch:
                    line = self._end_epoch(epoch, rate, embeddings)
                    if self.rank == 0:
                        progress.console.print(line, highlight=False, soft_wrap=True)
                    last = time.perf_counter()
                stopped = parallel.any_of(stop.is_set(), self.device)
                if stopped:
                    break
        if self.step < self.steps:
            self._save()
        elif self.rank == 0:
            networks.export_backbone(self.out / "backbone.safetensors", self.backbone, **self.about)
        if stopped:
            self.say(f"stopped after step {self.step} of {self.steps}; continue with:")
            self.say(f"  {self.again}")
        return Run(self.out, not stopped, self.history, self.data)

    def _set_aside(self) -> None:
        """Keep the backbone of a run that had ended; what was told of it is void now."""
        backbone, epoch = self.out / "backbone.safetensors", self.step // self.per_epoch
        if self.step < self.steps and backbone.exists():
            kept = backbone.replace(self.out / f"backbone.epoch-{epoch}.safetensors")
            for name in ("evaluation.json", "report.html"):
                (self.out / name).unlink(missing_ok=True)
            self.say(f"the backbone after epoch {epoch} is kept as {kept.name}")

    def say(self, line: str) -> None:
        """Print a line, in the lead."""
        if self.rank == 0:
            print(line)

    def _save(self, keep: bool = True) -> None:
        """Write metrics and checkpoint, in the lead: the state is the same in all processes."""
        if self.rank > 0:
            return
        if self.history:
            table = io.StringIO()
            lines = csv.DictWriter(table, self.history[-1])
            lines.writeheader()
            lines.writerows(self.history)
            checkpoint.write(self.out / "metrics.csv", table.getvalue().encode())
        checkpoint.save(self.out, self.state(), keep=keep)

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "config": dataclasses.asdict(self.config),
            "about": self.about,
            "images": len(self.images),
            "checksum": self.checksum,
            "threads": self.threads,
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, if it is one of this very run."""
        path = checkpoint.latest(self.out) or self.out / checkpoint.NAME
        if missing := self.state().keys() - state.keys() - LATER:
            raise checkpoint.damaged(path, f"it has no {', '.join(sorted(missing))}")
        options = dataclasses.asdict(self.config)
        # An option that the run does not know had its default.
        started = {name: getattr(Config, name) for name in options} | state["config"]
        check_same(options, started, options.keys() - {*FREE, "epochs"}, self.out)
        if state["images"] != len(self.images):
            raise ValueError(
                f"data_dir: the data set has {len(self.images)} images, but the run in "
                f"{self.out} was started with {state['images']}"
            )
        if None not in (now := self.checksum, was := state.get("checksum")) and now != was:
            raise ValueError(
                f"data_dir: the data set has as many images as the run in {self.out} was started "
                f"with, but not the same ones"
            )
        try:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise checkpoint.damaged(path, " ".join(str(error).split())) from None
        self.threads = state["threads"]
        self.step, self.history = state["step"], state["history"]
        self.loss_sum, self.seconds = state["loss_sum"], state["seconds"]

    def _loader(self) -> DataLoader[Any]:
        config = self.config
        on_device = config.augment_on == "device"
        return DataLoader(
            self.views.originals if on_device else self.views,
            collate_fn=list if on_device else None,
            batch_sampler=augment.Batches(
                len(self.images),
                config.batch_size,
                config.seed,
                self.step,
                self.steps,
                self.rank,
                self.ranks,
            ),
            num_workers=self.workers,
            worker_init_fn=guard.start_worker,
            pin_memory=self.device.type == "cuda",
        )

    def _train_step(self, loaded: Any) -> tuple[float, Any]:
        """One step of the optimiser; what is not finite raises before it reaches the weights."""
        factor = optim.schedule(self.step, self.steps, self.config.warmup_epochs * self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (factor if group["scheduled"] else 1)
        # A forward pass writes running statistics: what they were is kept until the step is good.
        norms = [m for m in self.method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        batch = self._placed(loaded)
        self.calls.clear()
        # Whatever a method draws, each process for its own images.
        own = (self.rank,) if self.rank else ()
        torch.manual_seed(augment.mix(self.config.seed, self.step, *own))
        self.method.train()
        self.method.before_step(self.step, self.per_epoch)
        precision = getattr(torch, self.config.precision)
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            loss, embeddings = self.network(batch)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.method.after_backward()
        finite = loss.detach()
        if not self.scaler.is_enabled():  # the scaler itself skips a step whose gradient overflows
            gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
            finite = finite + torch.nn.utils.get_total_norm(gradients)
        value, finite = parallel.mean(torch.stack([loss.detach(), finite])).tolist()
        if not math.isfinite(finite):
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)
            self._save()
            what = "loss" if not math.isfinite(value) else "gradient"
            raise FloatingPointError(
                f"the {what} is not finite at step {self.step + 1} "
                f"(epoch {self.step // self.per_epoch + 1}); the state after step {self.step} is "
                f"saved in {self.out / checkpoint.NAME}. To start anew with a lower lr (now "
                f"{self.config.lr:g}), more warmup_epochs or another precision, and another out, "
                f"may help"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step(self.step, self.per_epoch)
        self.step += 1
        self.loss_sum += value
        self.log("train/loss", value, self.step)
        self.log("train/lr", self.optimizer.param_groups[0]["lr"], self.step)
        return value, embeddings

    def _placed(self, loaded: Any) -> augment.Batch:
        """What the loader gave, on the device, and its views as the networks take them."""
        if self.config.augment_on == "device":
            loaded = default_collate(
                [
                    (self.views.of([image.to(self.device) for image in images], key), key[1], label)
                    for images, key, label in loaded
                ]
            )
        views, *rest = loaded
        ready = []
        for view in views:
            images = self.data.normalize(view.to(self.device, non_blocking=True))
            ready.append(
                images.contiguous(memory_format=self.layout) if view.dim() == 4 else images
            )
        return augment.Batch(ready, *(x.to(self.device, non_blocking=True) for x in rest))

    def _loss_seconds(self) -> float:
        """What the loss alone took of the last step, forward and backward: measured anew."""

        def alone(x: Any) -> Any:
            return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

        precision = getattr(torch, self.config.precision)
        taken = []
        for _ in range(3):
            calls = tree_map(alone, self.calls.copy())
            self._synchronize()
            start = time.perf_counter()
            with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
                loss = sum(self.method.loss(*given).sum() for given in calls)
            loss.backward()
            self._synchronize()
            taken.append(time.perf_counter() - start)
        return min(taken)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _end_epoch(self, epoch: int, rate: float, embeddings: Any) -> str:
        """Measure, log and save; returns the line that says so."""
        row: dict[str, Any] = {
            "epoch": epoch,
            "loss": self.loss_sum / self.per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": rate,
            "seconds": self.seconds,
            "loss_share": self._loss_seconds() / (self.seconds / self.per_epoch),
            "knn_accuracy": None,
        }
        z0, z1 = (gather_rows(z.detach().float())[0] for z in embeddings)
        measured = self.method.end_epoch()
        row |= evaluate.embedding_statistics(z0, z1) | measured
        self.history.append(row)
        self.loss_sum, self.seconds = 0.0, 0.0

        for name, value in row.items():
            if name != "epoch" and value is not None:
                self.log(f"epoch/{name}", value, self.step)
        self._save()
        self._finish_epoch()
        knn = "" if row["knn_accuracy"] is None else f"  kNN {row['knn_accuracy']:.1%}"
        own = "".join(f"{name.replace('_', ' ')} {x:.3g}  " for name, x in measured.items())
        return (
            f"epoch {epoch}/{self.config.epochs}  loss {row['loss']:.4f}{knn}  "
            f"effective rank {row['effective_rank']:.0f}  {own}{rate:.0f} images/s  "
            f"loss {row['loss_share']:.1%} of a step"
        )

    def _finish_epoch(self) -> None:
        """What follows when an epoch has been saved, and may be done again."""
        self._check()
        if self.rank > 0:
            return
        last, every = self.history[-1], self.config.keep_every
        if every and last["epoch"] % every == 0:
            checkpoint.keep(self.out, f"epoch-{last['epoch']}")
        measured = [row for row in self.history if row["knn_accuracy"] is not None]
        best = max(measured, key=lambda row: row["knn_accuracy"], default=None)
        if self.config.keep_best and last is best:
            checkpoint.keep(self.out, "best")

    def _check(self) -> None:
        """Nearest neighbours after the last epoch, if they are due and were not looked for yet.

        Whatever goes wrong here costs no more than the number.
        """
        row, every = self.history[-1], self.config.knn_every
        due = every and (row["epoch"] % every == 0 or row["epoch"] == self.config.epochs)
        if self.data.train is None or not due or row["knn_accuracy"] is not None:
            return
        try:
            found = evaluate.knn_check(self.backbone, self.data, self.device, self.workers)
        except Exception as error:
            self.say(
                f"no nearest neighbours after epoch {row['epoch']} ({guard.reason(error)}); "
                f"training goes on"
            )
            return
        row["knn_accuracy"] = found
        self.log("epoch/knn_accuracy", found, self.step)
        self._save(keep=False)


def check_same(
    options: dict[str, Any], started: dict[str, Any], names: Iterable[str], out: Path
) -> None:
    """Raise ValueError if one of the named options is not what a run was started with."""
    for name, now in options.items():
        if name in names and now != started.get(name):
            raise ValueError(
                f"{name} is {now!r}, but the run in {out} was started with {started.get(name)!r}; "
                f"leave it so, or name another folder with out"
            )


def _device(name: str) -> torch.device:
    """The device of that name, if this machine has it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return parallel.local_device(accelerator or torch.device("cpu"))
    try:
        device = parallel.local_device(torch.device(name))
        if device.type not in ("cpu", accelerator and accelerator.type):
            raise RuntimeError(f"there is no {device.type} here")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        known = f"auto, cpu or {accelerator}" if accelerator else "auto or cpu"
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be {known} on this machine, got {name!r} ({reason})"
        ) from None
    return device
