"""SwAV: views of an image are assigned to the same prototypes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastssl.checks import (
    check_count,
    check_device,
    check_embeddings,
    check_gather,
    check_no_tangents,
    check_number,
    check_ranks,
)
from fastssl.distributed import Group
from fastssl.losses.common_type import in_common_type
from fastssl.losses.module import LossModule
from fastssl.ops import backend as backends
from fastssl.ops.sinkhorn import sinkhorn
from fastssl.ops.soft_cross_entropy import soft_cross_entropy


def swav(
    high_resolution_outputs: Sequence[Tensor],
    low_resolution_outputs: Sequence[Tensor] = (),
    queue_outputs: Sequence[Tensor] | None = None,
    *,
    temperature: float = 0.1,
    iterations: int = 3,
    epsilon: float = 0.05,
    gather_distributed: bool = False,
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """Swapped prediction of SwAV: each crop predicts the codes of the global crops.

    Equivalent to::

        for i, scores in enumerate(high_resolution_outputs):
            rows = scores if queue_outputs is None else cat([scores, queue_outputs[i]])
            codes = sinkhorn_knopp(rows, epsilon, iterations)[:B]               # no gradient
            for j, crop in enumerate(high_resolution_outputs + low_resolution_outputs):
                if j != i:
                    terms += -(codes * log_softmax(crop / temperature, 1)).sum(1).mean()

    and their mean. Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments", 2020, equations 1 and 2. The cross-entropy is linear in its targets: a crop is
    read once, against the sum of the codes that it predicts.

    Args:
        high_resolution_outputs: Two or more [B, K] prototype scores, one of each global crop. Of
            several types all scores count as the widest.
        low_resolution_outputs: Any number of [B, K] scores, one of each local crop.
        queue_outputs: For each global crop [M, K] scores of earlier samples, which take part in the
            assignment and are dropped from the result; or None.
        temperature: Positive number, of the predictions.
        iterations: Of Sinkhorn-Knopp.
        epsilon: Positive number, of Sinkhorn-Knopp.
        gather_distributed: Whether samples of all ranks take part in the assignment, those of the
            queue too, of which each rank then has its own. Without a process group it makes no
            difference.
        group: Process group, the default one for None.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        0-dim loss; float64 for float64 scores, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, numbers of crops or values do not fit.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> crops = torch.randn(8, 4, 5).unbind()
        >>> swav(crops[:2], crops[2:]).shape
        torch.Size([])
    """
    high = _listed("high_resolution_outputs", high_resolution_outputs)
    low = _listed("low_resolution_outputs", low_resolution_outputs)
    queue = None if queue_outputs is None else _listed("queue_outputs", queue_outputs)
    first = "high_resolution_outputs[0]"
    ranks = check_ranks(first, high[0], gather_distributed, group) if high else None
    _check_crops(high, low, queue)
    check_number("temperature", temperature, high[0], positive=True)
    check_number("epsilon", epsilon, high[0], positive=True)
    check_no_tangents(*high, *low)
    check_count("iterations", iterations)
    every = list(in_common_type(*high, *low, *(queue or ())))
    high, rest = every[: len(high)], every[len(high) :]
    low, queue = rest[: len(low)], None if queue is None else rest[len(low) :]
    chosen = backends.resolve(backend, high[0])

    codes = []
    for i, scores in enumerate(high):
        assigned = scores.detach()
        holders = [ranks]
        if queue is not None:
            assigned = torch.cat([assigned, queue[i].detach()])
            name = f"queue_outputs[{i}]"
            holders.append(check_ranks(name, queue[i], gather_distributed, group))
        found = sinkhorn(
            assigned,
            epsilon=float(epsilon),
            iterations=iterations,
            backend=chosen,
            samples=sum(sum(each.sizes) for each in holders if each),
            group=group,
        )
        codes.append(found[: len(scores)])

    others = [[x for j, x in enumerate(codes) if j != i] for i in range(len(high))]
    pairs = [(crop, sum(them[1:], them[0])) for crop, them in zip(high, others, strict=True)]
    everything = sum(codes[1:], codes[0])
    pairs += [(crop, everything) for crop in low]
    total = torch.stack(
        [
            soft_cross_entropy(crop, target, temperature=float(temperature), backend=chosen).sum()
            for crop, target in pairs
        ]
    ).sum()
    rows = ranks.mean_size if ranks else len(high[0])
    return total / (len(high) * (len(pairs) - 1) * rows)


class SwaVLoss(LossModule):
    """SwAV as a module, in the place of lightly's ``SwaVLoss``.

    Args:
        temperature: Positive number, of the predictions.
        sinkhorn_iterations: Whole number.
        sinkhorn_epsilon: Positive number.
        sinkhorn_gather_distributed: Whether samples of all ranks take part in the assignment.
            Without a process group it makes no difference.
        group: Process group, the default one for None.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's value is not accepted, or sinkhorn_gather_distributed where
            torch.distributed is not available.

    Example:
        >>> criterion = SwaVLoss()
        >>> crops = torch.randn(8, 4, 5, requires_grad=True).unbind()
        >>> criterion(crops[:2], crops[2:]).backward()
    """

    temperature: float
    sinkhorn_iterations: int
    sinkhorn_epsilon: float
    sinkhorn_gather_distributed: bool
    group: Group
    backend: str

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
        *,
        group: Group = None,
        backend: str = "auto",
    ) -> None:
        check_number("temperature", temperature, positive=True)
        check_count("sinkhorn_iterations", sinkhorn_iterations)
        check_number("sinkhorn_epsilon", sinkhorn_epsilon, positive=True)
        check_gather("sinkhorn_gather_distributed", sinkhorn_gather_distributed)
        super().__init__(
            temperature=temperature,
            sinkhorn_iterations=sinkhorn_iterations,
            sinkhorn_epsilon=sinkhorn_epsilon,
            sinkhorn_gather_distributed=sinkhorn_gather_distributed,
            group=group,
            backend=backend,
        )

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor],
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return ``functional.swav`` of the crops' scores [B, K], in shape (1,) as lightly does."""
        return swav(
            high_resolution_outputs,
            low_resolution_outputs,
            queue_outputs,
            temperature=self.temperature,
            iterations=self.sinkhorn_iterations,
            epsilon=self.sinkhorn_epsilon,
            gather_distributed=self.sinkhorn_gather_distributed,
            group=self.group,
            backend=self.backend,
        ).reshape(1)


def _listed(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(tensors).__name__}")
    return list(tensors)


def _check_crops(high: list[Tensor], low: list[Tensor], queue: list[Tensor] | None) -> None:
    """Accept crops of one shape and device, and a queue that goes with them."""
    if len(high) < 2:
        raise ValueError(
            f"high_resolution_outputs must hold at least 2 tensors, one a crop, got {len(high)}"
        )
    for name, crops in (("high_resolution_outputs", high), ("low_resolution_outputs", low)):
        for i, crop in enumerate(crops):
            check_embeddings(f"{name}[{i}]", crop, letters="B and K")
            for what in ("shape", "device"):
                got, expected = getattr(crop, what), getattr(high[0], what)
                if got != expected:
                    raise ValueError(
                        f"{name}[{i}] must have the {what} of high_resolution_outputs[0], "
                        f"{_shown(expected)}, got {_shown(got)}"
                    )
    if queue is None:
        return
    if len(queue) != len(high):
        raise ValueError(
            f"queue_outputs must hold {len(high)} tensors, one for each of "
            f"high_resolution_outputs, got {len(queue)}"
        )
    for i, scores in enumerate(queue):
        check_embeddings(f"queue_outputs[{i}]", scores, letters="M and K")
        if scores.shape[1] != high[0].shape[1]:
            raise ValueError(
                f"queue_outputs[{i}] must have {high[0].shape[1]} columns, one a prototype, as the "
                f"crops have, got shape {tuple(scores.shape)}"
            )
        check_device(f"queue_outputs[{i}]", scores, "the crops", high[0])


def _shown(x: object) -> object:
    return tuple(x) if isinstance(x, torch.Size) else x
