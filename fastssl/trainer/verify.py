"""The proof that the fused losses train as the plain ones do, step by step from the same seeds.

The network runs in float64 and only the loss in the precision under test, so that what differs
comes from the loss. Its ReLUs are replaced by SiLUs: at the kink of a ReLU a rounding error becomes
a jump, at whatever step it happens. The truth is the reference loss in float64. The yardstick is
the reference loss in the precision under test, given the rows in reverse order: the same
mathematics, rounded differently. A fused loss may stray from the truth at most ``ALLOWANCE`` times
as far as the yardstick has strayed by that step. Both start at rounding error and both are
amplified by the same training, so the ratio stays near 1 for a right loss, whatever the step; a
loss that is wrong by one part in a thousand is off by a factor of thousands in float32. The
optimiser is SGD with momentum because its weights, unlike Adam's, follow the gradient's scale.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastssl import reference
from fastssl.trainer import augment, checkpoint, data, networks
from fastssl.trainer.config import Config
from fastssl.trainer.methods import METHODS

ALLOWANCE = 16.0


def _info_nce(config: Config) -> Callable[..., Tensor]:
    """InfoNCE whose ids may be given by position, as the module takes them."""

    def loss(
        query: Tensor,
        positive: Tensor,
        negatives: Tensor | None,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> Tensor:
        return reference.info_nce(
            query, positive, negatives, config.temperature, ids=ids, negative_ids=negative_ids
        )

    return loss


KERNEL_FREE = ("byol", "simsiam")  # their loss is PyTorch on every device
# The plain form of the loss of each method that has one of ours, called with what the method gives
# its own. The others, rotation for example, train with PyTorch's cross-entropy.
REFERENCES: dict[str, Callable[[Config], Callable[..., Tensor]]] = {
    "simclr": lambda config: partial(reference.nt_xent, temperature=config.temperature),
    "barlow": lambda config: partial(reference.barlow_twins, lambda_param=config.lambda_param),
    "vicreg": lambda config: partial(
        reference.vicreg,
        lambda_param=config.lambda_param,
        mu_param=config.mu_param,
        nu_param=config.nu_param,
    ),
    "swav": lambda config: partial(
        reference.swav, temperature=config.temperature, epsilon=config.epsilon
    ),
    **dict.fromkeys(("moco", "instance", "pirl"), _info_nce),
    **{method: lambda config: reference.negative_cosine_similarity for method in KERNEL_FREE},
    "supcon": lambda config: partial(
        reference.supcon, temperature=config.temperature, base_temperature=config.temperature
    ),
}
# So that a few steps see all of a method: prototypes that learn, a queue half full and full.
OPTIONS: dict[str, dict[str, Any]] = {
    "swav": {"freeze_epochs": 0, "queue_length": 150, "queue_start": 0},
    "moco": {"queue_length": 150},
}


@dataclass
class Comparison:
    """One fused loss against the truth, step by step.

    Attributes:
        name: Backend and precision.
        loss: |loss - true loss| / |true loss| at each step.
        weights: Largest |weight - true weight| after each step, over the largest |true weight|.
        loss_bound: What ``loss`` may be at each step.
        weights_bound: What ``weights`` may be.
    """

    name: str
    loss: list[float]
    weights: list[float]
    loss_bound: list[float]
    weights_bound: list[float]

    @property
    def passed(self) -> bool:
        """Whether every step is within its bound; a difference that is not a number is not."""
        found, bounds = self.loss + self.weights, self.loss_bound + self.weights_bound
        return all(difference <= bound for difference, bound in zip(found, bounds, strict=True))


class _LossIn(nn.Module):
    """A loss evaluated in one precision."""

    def __init__(
        self, loss: Callable[..., Tensor], dtype: torch.dtype, reverse: bool = False
    ) -> None:
        super().__init__()
        self.loss, self.dtype, self.reverse = loss, dtype, reverse

    def forward(self, *arguments: Any) -> Tensor:
        return self.loss(*map(self._converted, arguments))

    def _converted(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            argument = argument.flip(0) if self.reverse else argument
            return argument.to(self.dtype) if argument.is_floating_point() else argument
        return None if argument is None else [self._converted(part) for part in argument]


def verify(
    method: str = "simclr",
    *,
    steps: int = 40,
    batch_size: int | None = None,
    out: Path | None = None,
) -> bool:
    """Train a small network on digits with the reference loss and each fused one, and compare.

    The torch backend runs everywhere, in float64 and float32; the Triton backend in float32 on a
    GPU, or in Triton's interpreter if TRITON_INTERPRET=1 is set, where the loss has a kernel.

    Args:
        method: A name in ``REFERENCES``: a method whose loss is one of ours.
        steps: Steps of the optimiser.
        batch_size: Images per step; 100 if None, or 12 in the interpreter, which is slow.
        out: Folder for the plot ``verify-METHOD.png``; no plot if None.

    Returns:
        Whether every backend stayed within its tolerance. A table that says so is printed.

    Raises:
        ValueError: The method is unknown or has no such loss, steps or batch_size is out of range,
            or out cannot be written.
    """
    if method not in REFERENCES:
        raise ValueError(
            f"method must be one whose loss is fastssl's, {', '.join(REFERENCES)}, got {method!r}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if out is not None:
        out = checkpoint.writable(out)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    batch_size = (12 if interpreted else 100) if batch_size is None else batch_size
    digits = data.load("digits")
    if not 2 <= batch_size <= len(digits.pretrain):
        raise ValueError(f"batch_size must be 2 to {len(digits.pretrain)}, got {batch_size}")
    device = torch.device("cuda" if torch.cuda.is_available() and not interpreted else "cpu")
    backends = [("torch", torch.float64), ("torch", torch.float32)]
    if (interpreted or device.type == "cuda") and method not in KERNEL_FREE:
        backends.append(("triton", torch.float32))
    taken = METHODS[method].defaults.keys() & {"projection_hidden", "projection_dim"}
    widths: dict[str, Any] = dict.fromkeys(taken, 64)
    config = Config(
        method=method,
        batch_size=batch_size,
        **widths,
        **OPTIONS.get(method, {}),
    ).resolved()
    batches = _batches(digits, config, steps, device)

    def train(backend: str, dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(config.seed)
        own = dataclasses.replace(config, backend="auto" if "reference" in backend else backend)
        backbone = networks.build_backbone("cnn", digits.channels, digits.size)
        model = METHODS[method](backbone, own, len(digits.pretrain))
        loss = REFERENCES[method](config) if "reference" in backend else model.loss
        model.loss = _LossIn(loss, dtype, reverse=backend == "reversed reference")
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(parent, name, nn.SiLU())
        model.to(device, torch.float64).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses, weights = [], []
        per_epoch = len(digits.pretrain) // batch_size
        for step, batch in enumerate(batches):
            torch.manual_seed(augment.mix(config.seed, step))
            model.before_step(step, per_epoch)
            value, _ = model(batch)
            optimizer.zero_grad()
            value.backward()
            model.after_backward()
            optimizer.step()
            model.after_step(step, per_epoch)
            losses.append(value.item())
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).cpu())
        return losses, weights

    true_losses, true_weights = train("reference", torch.float64)

    def differences(backend: str, dtype: torch.dtype) -> tuple[list[float], list[float]]:
        losses, weights = train(backend, dtype)
        return (
            [abs(a - b) / abs(b) for a, b in zip(losses, true_losses, strict=True)],
            [
                ((a - b).abs().max() / b.abs().max()).item()
                for a, b in zip(weights, true_weights, strict=True)
            ],
        )

    yardsticks = {
        dtype: [_bound(found, dtype) for found in differences("reversed reference", dtype)]
        for dtype in {dtype for _, dtype in backends}
    }
    comparisons = [
        Comparison(f"{backend}, {str(dtype)[6:]}", *differences(backend, dtype), *yardsticks[dtype])
        for backend, dtype in backends
    ]
    _print(method, comparisons, steps, batch_size, device)
    if out is not None:
        _plot(method, comparisons, out)
    return all(comparison.passed for comparison in comparisons)


def _batches(
    digits: data.Data, config: Config, steps: int, device: torch.device
) -> list[augment.Batch]:
    """What every step sees, made once so that it is the same for every loss."""
    transforms = METHODS[config.method].views(config, digits.size)
    dataset = augment.Views(digits.pretrain, transforms, config.seed)
    keys = augment.Batches(len(digits.pretrain), config.batch_size, config.seed, 0, steps)
    batches = []
    for views, index, labels in DataLoader(dataset, batch_sampler=keys):
        normal = [digits.normalize(view).to(device, torch.float64) for view in views]
        batches.append(augment.Batch(normal, index.to(device), labels.to(device)))
    return batches


def _bound(yardstick: list[float], dtype: torch.dtype) -> list[float]:
    """What a difference may be at each step: so many times the yardstick, or rounding, so far."""
    largest, bounds = torch.finfo(dtype).eps, []
    for difference in yardstick:
        largest = max(largest, difference)
        bounds.append(ALLOWANCE * largest)
    return bounds


def _print(
    method: str, comparisons: list[Comparison], steps: int, batch_size: int, device: torch.device
) -> None:
    table = Table(
        title=f"{method}: largest difference from the float64 reference in {steps} steps of "
        f"{batch_size} images on {device}"
    )
    for column in ("fused loss", "loss", "allowed", "weights", "allowed", ""):
        table.add_column(column)
    for c in comparisons:
        table.add_row(
            c.name,
            *(f"{max(x):.1e}" for x in (c.loss, c.loss_bound, c.weights, c.weights_bound)),
            "[green]pass[/]" if c.passed else "[bold red]FAIL[/]",
        )
    console = Console()
    console.print(table)
    for c in comparisons:
        pairs = ((c.loss, c.loss_bound, "loss"), (c.weights, c.weights_bound, "weights"))
        for found, bound, what in pairs:
            step = next((i for i in range(steps) if not found[i] <= bound[i]), None)
            if step is not None:
                console.print(
                    f"{c.name}: {what} off by {found[step]:.1e} at step {step + 1}, "
                    f"{bound[step]:.1e} is allowed"
                )


def _plot(method: str, comparisons: list[Comparison], out: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from fastssl.trainer.report import COLORS

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, c in enumerate(comparisons):
        steps = range(1, len(c.loss) + 1)
        pairs = ((c.loss, c.loss_bound), (c.weights, c.weights_bound))
        for ax, (found, bound) in zip(axes, pairs, strict=True):
            shown = [max(x, 1e-17) for x in found]  # a logarithmic axis has no place for "the same"
            ax.plot(steps, shown, color=COLORS[i], marker="os^"[i], ms=4, label=c.name)
            ax.plot(steps, bound, color=COLORS[i], ls=":", label=f"{c.name}: allowed")
    for ax, what in zip(axes, ("loss", "weights"), strict=True):
        ax.set(title=f"{method}: difference of {what}", xlabel="step", ylabel="relative difference")
        ax.set_yscale("log")
        ax.grid(color="#e4e7eb")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    path = out / f"verify-{method}.png"
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")
