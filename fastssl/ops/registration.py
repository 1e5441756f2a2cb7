"""How operators are registered with PyTorch, and the operators of their gradients with autograd.

``torch.library.custom_op`` would do, but its first call imports the compiler, for a second and
more, whether anything is compiled or not.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastssl", "FRAGMENT")


def operator(function: Callable[..., Any]) -> Any:
    """Return ``torch.ops.fastssl``'s operator of the function's name, which runs it on any device.

    It changes none of its inputs and returns tensors that share no memory with them or each other.
    ``differentiate`` must give it a derivative.
    """
    name = function.__name__.lstrip("_")

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        # Whoever compiles a caller shall not compile this too.
        compiles = "torch._dynamo" in sys.modules
        return (_not_compiled(function) if compiles else function)(*args)

    schema = torch.library.infer_schema(function, mutates_args=())
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.fastssl, name).default


def operator_without_derivative(function: Callable[..., Any]) -> Any:
    """Return an operator whose backward pass raises: a derivative is never silently zero."""
    made = operator(function)

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{made.name()} has no derivative: a second one is not computed")

    differentiate(made, refuse, lambda ctx, inputs, output: None)
    return made


@functools.cache
def _not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


def fake_of(operator: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what is decorated as the shapes and types that an operator returns."""
    return torch.library.register_fake(operator, lib=LIBRARY)


def differentiate(operator: Any, gradient: Callable[..., Any], save: Callable[..., None]) -> None:
    """Register an operator's derivative, and what it saves for it."""
    torch.library.register_autograd(operator, gradient, setup_context=save, lib=LIBRARY)


def connect(forward: Any, backward: Any, outputs: int, differentiable: int, tensors: int) -> None:
    """Register ``backward`` as the derivative of ``forward``.

    Forward takes so many tensors, the first so many of them differentiable, then options and the
    backend; it returns so many differentiable outputs and what backward needs. Backward takes
    their gradients, the tensors, what it needs, the options, which gradients to return, and the
    backend.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *ctx.options, ctx.backend = inputs[tensors:]
        ctx.mark_non_differentiable(*output[outputs:])
        ctx.save_for_backward(*inputs[:tensors], *output[outputs:])

    def gradient(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:differentiable]
        doutputs = doutputs[:outputs]
        found = iter(backward(*doutputs, *ctx.saved_tensors, *ctx.options, needs, ctx.backend))
        others = ctx.needs_input_grad[differentiable:]
        return (*(next(found) if need else None for need in needs), *(None for _ in others))

    def fake(*given: Any) -> list[Tensor]:
        *_, needs, _ = given
        like = given[outputs : outputs + differentiable]
        return [x.new_empty(x.shape) for x, need in zip(like, needs, strict=True) if need]

    differentiate(forward, gradient, save)
    fake_of(backward)(fake)
