"""What rows of two views are held against, on this rank and on others."""

from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import Ranks
from fastssl.losses.unit_rows import cosines_of
from fastssl.ops.ring import ring_lse
from fastssl.ops.similarity import similarity_lse
from fastssl.ops.two_views import two_view_lse


def samples_seen(z: Tensor, ids: Tensor | None, views: int = 1) -> dict[str, Any]:
    """What ``ring_lse`` is told of rows: those of samples z [N, D], or with ids, are not seen."""
    samples = torch.arange(len(z), device=z.device) if ids is None else ids
    samples = samples.repeat(views)
    return {"row_ids": samples, "col_ids": samples, "everywhere": ids is not None}


def negatives_lse(
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    ranks: Ranks | None,
    exchange: str,
    backend: str,
) -> Tensor:
    """``two_view_lse`` of this rank's rows, over the rows of all ranks."""
    if ranks is None:
        return two_view_lse(z0, z1, scale, ids, backend=backend)
    z, both = torch.cat([z0, z1]), ranks.times(2)
    if both.in_ring(exchange, z):
        pairs = (scale * cosines_of(z0, z1)).repeat(2)
        seen = samples_seen(z0, ids, views=2)
        return ring_lse(z, z, scale, pairs, **seen, ranks=both, backend=backend)[0]
    keys = ranks.gather(torch.stack([z0, z1], 1)).flatten(0, 1)  # sample by sample
    samples = torch.arange(len(keys) // 2, device=z.device) if ids is None else ranks.gather(ids)
    row_ids, col_ids = samples[ranks.own].repeat(2), samples.repeat_interleave(2)
    partners = torch.cat([z1, z0])
    return similarity_lse(z, keys, scale, row_ids, col_ids, pair=partners, backend=backend)
