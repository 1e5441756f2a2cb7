"""What is accepted. Each error names the argument, what was given and what is accepted."""

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad

from fastssl.distributed import Group, Ranks, ranks_of


def check_embeddings(
    name: str, z: Tensor, *, positions: bool = False, letters: str = "N and D"
) -> None:
    """Accept a floating-point matrix that is not empty.

    Args:
        name: The argument's name.
        z: The tensor.
        positions: Whether there may be dimensions between the rows and the features.
        letters: What the dimensions are called.

    Raises:
        TypeError: z is not a tensor, or not of a supported dtype.
        ValueError: Its shape does not fit.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(z).__name__}")
    if z.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {_name(z.dtype)}"
        )
    if z.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {_name(z.layout)}")
    if z.dim() < 2 or (z.dim() > 2 and not positions) or 0 in z.shape:
        shape = f"({letters.replace(' and', ',')}) with {letters} at least 1"
        if positions:
            shape = "(N, ..., D), no dimension 0"
        raise ValueError(f"{name} must have shape {shape}, got {tuple(z.shape)}")


def check_views(*, rows: int = 1, positions: bool = False, **views: Tensor) -> None:
    """Accept floating-point matrices that agree in shape and device and are not empty.

    Args:
        rows: How many rows each must have; more than one where statistics are taken over them.
        positions: Whether there may be dimensions between the rows and the features.
        views: Two tensors by their arguments' names.

    Raises:
        TypeError: One is not a tensor, or not of a supported dtype.
        ValueError: Shapes or devices do not fit.
    """
    for name, z in views.items():
        check_embeddings(name, z, positions=positions)
        if len(z) < rows:
            raise ValueError(
                f"{name} must have at least {rows} rows, since statistics over the batch need "
                f"{rows} samples, got shape {tuple(z.shape)}"
            )
    (name_a, a), (name_b, b) = views.items()
    both = f"{name_a} and {name_b} must"
    if a.shape != b.shape:
        raise ValueError(f"{both} have equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"{both} be on the same device, got {a.device} and {b.device}")


def check_ranks(name: str, z: Tensor, gather: bool, group: Group) -> Ranks | None:
    """Accept rows on every rank, and return the ranks; None if there are no others to gather from.

    It comes before all other checks, since every rank must hear of one that has no rows.

    Raises:
        TypeError: Dtypes differ between ranks.
        ValueError: A rank has no rows, or rows of another size.
    """
    return ranks_of(z, group, name) if gather and isinstance(z, Tensor) else None


def check_gather(name: str, gather: bool) -> None:
    """Accept an option that gathers from other ranks, unless PyTorch was built without any.

    Raises:
        ValueError: gather is asked for there.
    """
    if gather and not dist.is_available():
        raise ValueError(
            f"{name} must be False, since torch.distributed is not available, got True"
        )


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Accept a tensor on another's device."""
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def check_ids(name: str, ids: Tensor, z: Tensor, dims: int = 1) -> None:
    """Accept integers for the rows of z, of its first dimensions and on its device."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of integers or None, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {_name(ids.dtype)}")
    if ids.shape != z.shape[:dims]:
        raise ValueError(
            f"{name} must have shape {tuple(z.shape[:dims])}, one for each row, "
            f"got {tuple(ids.shape)}"
        )
    if ids.device != z.device:
        raise ValueError(f"{name} must be on the embeddings' device {z.device}, got {ids.device}")


def check_scalar(
    name: str, value: float | Tensor, z: Tensor | None = None, *, positive: bool = True
) -> None:
    """Accept a number or a floating-point tensor of one element, as ``check_number`` does.

    With z, a tensor must be on its device or on a CPU.
    """
    if not isinstance(value, Tensor):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(
                f"{name} must be a number or a tensor of one element, got {type(value).__name__}"
            )
    else:
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_name(value.dtype)}")
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor of one element, got shape "
                f"{tuple(value.shape)}"
            )
        if z is not None and value.device.type != "cpu" and value.device != z.device:
            raise ValueError(
                f"{name} must be on the embeddings' device {z.device}, got {value.device}"
            )
        # To read the value would stop an accelerator and break a graph that is being compiled.
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = value.item()
    check_number(name, value, z, positive=positive)


def check_number(
    name: str, value: float, z: Tensor | None = None, *, positive: bool = False
) -> None:
    """Accept a finite number; with positive, one above 0 whose inverse is finite.

    Args:
        name: The argument's name.
        value: The number.
        z: Embeddings, in the type of whose losses the number must be finite; None for float64.
        positive: Whether it must be above 0.

    Raises:
        TypeError: value is not a number.
        ValueError: It is not finite, or not positive.
    """
    if not isinstance(value, Real) or isinstance(value, (bool, Fraction)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    dtype = torch.float64 if z is None else torch.promote_types(z.dtype, torch.float32)
    largest = torch.finfo(dtype).max
    accepted = "positive and finite" if positive else "finite"
    # A comparison can be compiled where the float is symbolic; math.isfinite cannot.
    if not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{name} must be {accepted}, got {value}")
    if not -largest <= value <= largest or (positive and value < 1 / largest):
        inverse = ", and so its inverse" if positive else ""
        raise ValueError(f"{name} must be {accepted} in {_name(dtype)}{inverse}, got {value}")


def check_count(name: str, value: int, least: float = 0) -> None:
    """Accept a whole number from the least on.

    Raises:
        TypeError: value is not a whole number.
        ValueError: It is less.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_no_tangents(*values: object) -> None:
    """Refuse inputs of forward-mode differentiation, whose tangents the operators would drop.

    Raises:
        NotImplementedError: One of the values has a tangent, or may have within another transform.
    """
    if getattr(forward_ad, "_current_level", -1) < 0:
        return
    for x in values:
        if isinstance(x, Tensor) and (
            torch._C._functorch.is_functorch_wrapped_tensor(x)
            or forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        ):
            raise NotImplementedError(
                "forward-mode differentiation is not supported: use a backward pass, "
                "not torch.func.jvp or jacfwd"
            )


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Accept one of some words."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _name(of: torch.dtype | torch.layout) -> str:
    return str(of).removeprefix("torch.")
