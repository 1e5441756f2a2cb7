"""Rows of several floating types, as autocast makes them, in one."""

from functools import reduce

import torch
from torch import Tensor


def in_common_type(*rows: Tensor) -> tuple[Tensor, ...]:
    """The rows in the type that all of theirs promote to; gradients have the types of before."""
    dtype = reduce(torch.promote_types, (x.dtype for x in rows))
    return tuple(x.to(dtype) for x in rows)
