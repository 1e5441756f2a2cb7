"""Memory for large results, on pages of 2 MiB where Linux has them to give.

What is written for the first time costs a page fault for each page. For the codes of 1024 x 65,536
scores those of 4 KiB take as long as reading and writing them twice. As NumPy does, the kernel is
told that large pages are welcome.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 2**22  # bytes from which on it is worth a call
MADV_HUGEPAGE = 14
PAGE = 4096


def fresh_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of x's shape to write a result to."""
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    advise = _madvise()
    if advise and out.device.type == "cpu" and out.nbytes >= LARGE:
        start = -(-out.data_ptr() // PAGE) * PAGE
        advise(start, out.data_ptr() + out.nbytes - start, MADV_HUGEPAGE)  # advice: it may fail
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
