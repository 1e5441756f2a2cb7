"""Statistics of a batch whose rows are spread over ranks."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastssl.distributed import Ranks
from fastssl.ops.energy import cross_energy
from fastssl.ops.reduced_energy import reduced_cross_energy

STATISTICS_EXCHANGES = ("auto", "gather", "reduce")


def of_whole_batch(
    z_a: Tensor, z_b: Tensor, ranks: Ranks | None, exchange: str, backend: str
) -> tuple[Tensor, Tensor, int, Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Return rows to take statistics of, how many samples they are of, and what takes them."""
    energy_of = partial(cross_energy, backend=backend)
    if ranks is None:
        return z_a, z_b, len(z_a), energy_of
    samples = sum(ranks.sizes)
    if exchange == "auto":
        # Of W ranks, each sends (W - 1) / W of the rows of both views, or twice that of c.
        of_sums = torch.promote_types(z_a.dtype, torch.float32).itemsize
        fewer = samples * z_a.itemsize <= z_a.shape[-1] * of_sums
        exchange = "gather" if fewer else "reduce"
    if exchange == "reduce":
        energy_of = partial(
            reduced_cross_energy, samples=samples, backend=backend, group=ranks.group
        )
        return z_a, z_b, samples, energy_of
    both = ranks.gather(torch.stack((z_a.detach(), z_b.detach()), 1))
    before, after = both[: ranks.own.start], both[ranks.own.stop :]
    all_a, all_b = (torch.cat([before[:, i], z, after[:, i]]) for i, z in enumerate((z_a, z_b)))
    return all_a, all_b, samples, energy_of
