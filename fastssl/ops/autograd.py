"""How an operator and the operator of its gradients are registered with autograd."""

from typing import Any

from torch import Tensor


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

    forward.register_autograd(gradient, setup_context=save)
    backward.register_fake(fake)
