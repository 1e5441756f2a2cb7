"""NT-Xent, SimCLR's loss: each view finds the other among all views of a batch."""

from collections.abc import Sequence

from torch import Tensor

from fastssl.checks import (
    check_choice,
    check_gather,
    check_ids,
    check_no_tangents,
    check_ranks,
    check_scalar,
    check_views,
)
from fastssl.distributed import EXCHANGES, Group
from fastssl.losses.common_type import in_common_type
from fastssl.losses.info_nce import info_nce
from fastssl.losses.module import LossModule
from fastssl.losses.multiplier import scale_of
from fastssl.losses.negatives import negatives_lse
from fastssl.losses.terms import REDUCTIONS, cross_entropy, reduced
from fastssl.losses.unit_rows import unit_rows
from fastssl.memory_bank import MemoryBankModule
from fastssl.ops import backend as backends


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    ids: Tensor | None = None,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
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
        z1: [N, D] embeddings of the other view, on z0's device; two types count as the wider one.
        temperature: Positive number, or a tensor of one element, which then gets its gradient. A
            tensor's value is not looked at outside a CPU, since that would stop the device.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the 2N terms, those of z0's rows first.
        ids: [N] integers naming the samples. Rows of samples with the same id are not each other's
            negatives; a row's positive stays.
        gather_distributed: Whether the batch is that of all ranks of a process group, of which
            z0 and z1 are a part; without one it makes no difference.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"`` for all at once, ``"ring"`` for
            one rank's after another's, or ``"auto"``, by their size.
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
    ranks = check_ranks("z0", z0, gather_distributed, group)
    check_views(z0=z0, z1=z1)
    check_scalar("temperature", temperature, z0)
    check_no_tangents(z0, z1, temperature)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("exchange", exchange, EXCHANGES)
    if ids is not None:
        check_ids("ids", ids, z0)
    z0, z1 = in_common_type(z0, z1)
    backend = backends.resolve(backend, z0)
    lse = negatives_lse(z0, z1, scale_of(temperature, z0), ids, ranks, exchange, backend)
    return reduced(cross_entropy(lse), reduction, ranks)


class NTXentLoss(LossModule):
    """NT-Xent of SimCLR as a module, in the place of lightly's ``NTXentLoss``.

    With a memory bank it is MoCo's loss: out0's rows against their positives in out1 and the
    negatives in the bank, which takes out1's unit rows after each step (when out0 needs a
    gradient).

    Args:
        temperature: Positive number, or a tensor of one element; a Parameter is learned.
        memory_bank_size: (number of negatives, D); a number alone takes D from the first batch; 0
            for no memory bank.
        gather_distributed: Whether the batch is that of all ranks of a process group; without one
            it makes no difference.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: temperature is neither a number nor a tensor.
        ValueError: temperature, memory_bank_size, reduction or backend is not accepted, or
            gather_distributed where torch.distributed is not available.

    Example:
        >>> criterion = NTXentLoss(temperature=0.1)
        >>> z0, z1 = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z0, z1).backward()
    """

    temperature: float | Tensor
    gather_distributed: bool
    reduction: str
    group: Group
    exchange: str
    backend: str

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_scalar("temperature", temperature)
        check_gather("gather_distributed", gather_distributed)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("exchange", exchange, EXCHANGES)
        super().__init__(
            temperature=temperature,
            gather_distributed=gather_distributed,
            reduction=reduction,
            group=group,
            exchange=exchange,
            backend=backend,
        )
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed, group=group)

    def forward(self, out0: Tensor, out1: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the loss of two views' embeddings [N, D], with ids [N] as ``functional.nt_xent``.

        With a memory bank, whose rows have no ids, ids must be None.
        """
        if self.memory_bank.size[0]:
            if ids is not None:
                raise ValueError("ids must be None with a memory bank, whose rows have no ids")
            ranks = check_ranks("out0", out0, self.gather_distributed, self.group)
            check_views(out0=out0, out1=out1)
            bank = self.memory_bank.rows_for(out1)
            terms = info_nce(
                out0,
                out1,
                bank.to(out0.device, out0.dtype),
                self.temperature,
                reduction="none",
                backend=self.backend,
            )
            if out0.requires_grad:
                self.memory_bank.update(unit_rows(out1.detach()))
            return reduced(terms, self.reduction, ranks)
        return nt_xent(
            out0,
            out1,
            self.temperature,
            reduction=self.reduction,
            ids=ids,
            gather_distributed=self.gather_distributed,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )
