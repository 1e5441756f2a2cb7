"""Losses that contrast positives with negatives by a softmax over similarities."""

import torch
from torch import Tensor, nn

from fastssl.losses.checks import check_choice, check_ids, check_temperature, check_views
from fastssl.ops import backend as backends
from fastssl.ops import similarity

REDUCTIONS = ("mean", "sum", "none")


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalised temperature-scaled cross-entropy of SimCLR, without the 2N x 2N matrix.

    Equivalent to::

        z = normalize(cat([z0, z1]))                               # 2N views
        logits = (z @ z.T / temperature).fill_diagonal_(-inf)
        loss = cross_entropy(logits, arange(2 * N).roll(N))        # view i's positive is view i + N

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
    equation 1. The mean is over the 2N views; texts that sum over both views and divide by N report
    twice this value.

    Args:
        z0: [N, D] embeddings of one view, float64, float32, bfloat16 or float16; need not be
            normalised. A row of length at most 1e-12 counts as zero and gets no gradient.
        z1: [N, D] embeddings of the other view, of z0's dtype and device.
        temperature: Positive number, or a 0-dim tensor, which then gets its gradient. A tensor's
            value is not looked at outside a CPU, since that would stop the device.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the 2N terms, those of z0's rows first.
        ids: [N] integers naming the samples. Rows of samples with the same id are not each other's
            negatives; a row's positive stays.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        0-dim loss, or [2N] terms; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> z0, z1 = torch.randn(2, 8, 16)
        >>> nt_xent(z0, z1, temperature=0.1).shape
        torch.Size([])
    """
    check_views(z0=z0, z1=z1)
    check_temperature(temperature)
    check_choice("reduction", reduction, REDUCTIONS)
    if ids is not None:
        check_ids(ids, z0)
    scale = _scale(temperature, z0)

    lse = similarity.two_view_lse(z0, z1, scale, ids, backend=backends.resolve(backend, z0))
    # log(1 + exp(lse)): relative to the positive, its own exponential is 1.
    terms = -nn.functional.logsigmoid(-lse)
    if reduction == "none":
        return terms
    return terms.mean() if reduction == "mean" else terms.sum()


class NTXentLoss(nn.Module):
    """NT-Xent of SimCLR as a module, in the place of lightly's ``NTXentLoss``.

    Args:
        temperature: Positive number, or a 0-dim tensor; a Parameter is learned.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: temperature is neither a number nor a tensor.
        ValueError: temperature, reduction or backend is not accepted.

    Example:
        >>> criterion = NTXentLoss(temperature=0.1)
        >>> z0, z1 = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z0, z1).backward()
    """

    def __init__(
        self, temperature: float | Tensor = 0.5, *, reduction: str = "mean", backend: str = "auto"
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("backend", backend, backends.BACKENDS)
        self.temperature = temperature
        self.reduction = reduction
        self.backend = backend

    def forward(self, out0: Tensor, out1: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return ``functional.nt_xent`` of two views' embeddings [N, D], with ids [N] or none."""
        return nt_xent(
            out0,
            out1,
            self.temperature,
            reduction=self.reduction,
            ids=ids,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show what was chosen."""
        options = ("temperature", "reduction", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)


def _scale(temperature: float | Tensor, z: Tensor) -> Tensor:
    """1 / temperature as a 0-dim tensor on z's device, in the type that losses of z have."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        return temperature.to(z.device, dtype).reciprocal()
    return torch.full((), 1 / temperature, dtype=dtype, device=z.device)
