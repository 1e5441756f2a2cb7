"""Memory banks: rows of earlier batches that serve as negatives, or as positives, of later ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastssl.checks import check_count, check_embeddings, check_number, check_ranks
from fastssl.distributed import Group, Ranks


class MemoryBankModule(nn.Module):
    """The last rows that it was given, first in, first out; lightly's ``MemoryBankModule``.

    It begins with random unit rows. A batch that reaches past the end goes on at the beginning.

    Args:
        size: (number of rows, D); a number alone takes D from the first batch; 0 for no bank.
        gather_distributed: Whether the rows of all ranks of a process group are stored.
        feature_dim_first: Whether ``forward`` returns the bank as [D, rows].
        persistent: Whether a state dict holds the bank, which needs D to be given.
        group: The process group; None for the default one.

    Attributes:
        bank: [rows, D] float32.
        bank_ptr: [1], the place of the oldest row.

    Raises:
        TypeError: size is neither a whole number nor two of them.
        ValueError: size is negative, or lacks D where it is needed.

    Example:
        >>> memory = MemoryBankModule((100, 16))
        >>> output, negatives = memory(torch.randn(8, 16), update=True)
        >>> negatives.shape
        torch.Size([16, 100])
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
        *,
        persistent: bool = False,
        group: Group = None,
    ) -> None:
        super().__init__()
        self.size = _size(size)
        if persistent and len(self.size) == 1 and self.size[0]:
            raise ValueError(f"size must be ({self.size[0]}, D) with persistent, got {size}")
        self.gather_distributed = gather_distributed
        self.group = group
        self.feature_dim_first = feature_dim_first
        rows = torch.empty(self.size) if len(self.size) == 1 else _random_rows(*self.size)
        self.register_buffer("bank", rows, persistent=persistent)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=persistent)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return output, and the bank as it was before output's rows [N, D] joined it.

        Args:
            output: [N, D].
            labels: Not used; lightly has it.
            update: Whether output's rows take the places of the oldest.

        Returns:
            output; a copy of the bank [D, rows], or [rows, D] without feature_dim_first, that needs
            no gradient, or None if the size is 0.

        Raises:
            TypeError: output is not a floating-point tensor.
            ValueError: It is empty, or its shape is not that of the bank's rows.
        """
        if self.size[0] == 0:
            return output, None
        ranks = check_ranks("output", output, update and self.gather_distributed, self.group)
        bank = self.rows_for(output).clone()
        if update:
            self._store(output, ranks)
        return output, bank.T if self.feature_dim_first else bank

    def rows_for(self, output: Tensor) -> Tensor:
        """Return the bank itself [rows, D], made for output's D if that was not given."""
        check_embeddings("output", output)
        if len(self.size) == 1:
            self.size = (*self.size, output.shape[1])
            with torch.inference_mode(False):  # else no later training step could change it
                self.bank = _random_rows(*self.size).to(self.bank)
        elif output.shape[1] != self.size[1]:
            raise ValueError(
                f"output must have shape (N, {self.size[1]}), for a bank of size {self.size}, "
                f"got {tuple(output.shape)}"
            )
        return self.bank

    def update(self, output: Tensor) -> None:
        """Put output's rows [N, D], or those of all ranks, in the places of the oldest."""
        if self.size[0]:
            ranks = check_ranks("output", output, self.gather_distributed, self.group)
            self._store(output, ranks)

    @torch.no_grad()
    def _store(self, output: Tensor, ranks: Ranks | None) -> None:
        bank = self.rows_for(output)
        rows = output if ranks is None else ranks.gather(output)
        places = (self.bank_ptr + torch.arange(len(rows), device=bank.device)) % len(bank)
        bank[places[-len(bank) :]] = rows[-len(bank) :].to(bank)
        self.bank_ptr.copy_((self.bank_ptr + len(rows)) % len(bank))

    def extra_repr(self) -> str:
        """Show what was chosen."""
        return f"size={self.size}, gather_distributed={self.gather_distributed}"


class SampleMemoryBank(nn.Module):
    """One unit row for each sample of a data set, a running mean of its embeddings.

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018;
    Misra and van der Maaten, "Self-Supervised Learning of Pretext-Invariant Representations", 2020.
    With ``info_nce`` the row of a query's sample is its positive and other samples' its negatives::

        loss = info_nce(query, memory(index), memory.bank, ids=index, negative_ids=memory.ids)
        memory.update(query, index)

    or, for a part of the negatives, ``negatives, negative_ids = memory.sample(4096)``.

    Args:
        num_samples: How many samples there are.
        dim: D.
        momentum: What part of a row an update keeps, from 0 to 1.

    Attributes:
        bank: [num_samples, D] float32, random unit rows at first; part of the state dict.
        ids: [num_samples], the index of each row.

    Raises:
        TypeError: num_samples or dim is not a whole number, or momentum not a number.
        ValueError: num_samples or dim is less than 1, or momentum is not from 0 to 1.

    Example:
        >>> memory = SampleMemoryBank(100, 16)
        >>> memory.update(torch.randn(2, 16), torch.tensor([3, 5]))
        >>> memory(torch.tensor([3, 5])).shape
        torch.Size([2, 16])
    """

    bank: Tensor
    ids: Tensor

    def __init__(self, num_samples: int, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        check_count("num_samples", num_samples, 1)
        check_count("dim", dim, 1)
        check_number("momentum", momentum)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
        self.momentum = momentum
        self.register_buffer("bank", _random_rows(num_samples, dim))
        self.register_buffer("ids", torch.arange(num_samples), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows [B, D] of the samples index [B], int64 or int32.

        What index holds is not looked at outside a CPU, since that would stop the device.

        Raises:
            TypeError: index is not of integers of these types.
            ValueError: It is of another shape, or names samples that there are not.
        """
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be an int64 or int32 tensor, got {got}")
        if index.dim() != 1:
            raise ValueError(f"index must have shape (B,), got {tuple(index.shape)}")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = index[(index < 0) | (index >= len(self.bank))]
            if len(wrong):
                raise ValueError(
                    f"index must be from 0 to {len(self.bank) - 1}, got {wrong[0].item()}"
                )
        return self.bank[index]

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return count rows [count, D] drawn with replacement, and whose they are [count]."""
        check_count("count", count)
        device = self.bank.device if generator is None else generator.device
        ids = torch.randint(len(self.bank), (count,), generator=generator, device=device)
        ids = ids.to(self.bank.device)
        return self.bank[ids], ids

    @torch.no_grad()
    def update(self, z: Tensor, index: Tensor) -> None:
        """Move the rows of the samples index [B] towards their embeddings z [B, D].

        A row becomes momentum row + (1 - momentum) z at unit length, with z at unit length; of a
        sample that is there several times, the mean of its embeddings counts.

        Raises:
            TypeError: index is not of int64 or int32, or z not of a supported dtype.
            ValueError: z and index do not go together, or with the bank.
        """
        check_embeddings("z", z)
        if z.shape[1] != self.bank.shape[1]:
            raise ValueError(
                f"z must have shape (B, {self.bank.shape[1]}), as the bank's rows, "
                f"got {tuple(z.shape)}"
            )
        before = self.forward(index)
        if len(index) != len(z):
            raise ValueError(
                f"index must have shape ({len(z)},), one for each row of z, "
                f"got {tuple(index.shape)}"
            )
        z = nn.functional.normalize(z.to(self.bank), dim=1)
        group = _groups(index)
        z = torch.cat([z, torch.ones_like(z[:, :1])], 1)  # the last column counts
        sums = torch.zeros_like(z).index_put_((group,), z, accumulate=True)[group]
        mean = sums[:, :-1] / sums[:, -1:]
        rows = self.momentum * before + (1 - self.momentum) * mean
        self.bank[index] = nn.functional.normalize(rows, dim=1)

    def extra_repr(self) -> str:
        """Show what was chosen."""
        num_samples, dim = self.bank.shape
        return f"num_samples={num_samples}, dim={dim}, momentum={self.momentum}"


def _size(size: int | Sequence[int]) -> tuple[int, ...]:
    """(rows,) or (rows, D)."""
    found = tuple(size) if isinstance(size, Sequence) else (size,)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in found):
        raise TypeError(f"size must be a whole number or two of them, got {size!r}")
    if len(found) not in (1, 2) or min(found) < 0 or (found[0] and found[-1] == 0):
        raise ValueError(
            f"size must be 0, a number of rows or (number of rows, D), none negative, got {size}"
        )
    return found if found[0] else (0,)


def _groups(index: Tensor) -> Tensor:
    """Numbers from 0 for the values of index [B], without looking at how many there are."""
    order = index.argsort()
    values = index[order]
    group = torch.empty_like(order)
    group[order] = (values.diff(prepend=values[:1]) != 0).cumsum(0)
    return group


def _random_rows(count: int, dim: int) -> Tensor:
    return nn.functional.normalize(torch.randn(count, dim), dim=1)
