"""Similarity log-sum-exps as differentiable operators, for autograd, autocast and torch.compile.

A backend's launchers do the work (``kernels/similarity.py``, ``streaming/similarity.py``).
Registered as custom operators, they stay whole in a compiled graph. Autocast changes nothing: rows
are multiplied in their own type and all that follows is float32. A second derivative raises,
because the backward operators have none.
"""

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.ops.fixed_keys import fixed_keys_lse
from fastssl.ops.registration import connect, fake_of, operator, operator_without_derivative
from fastssl.streaming.tiles import pair_gradient


def similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    *,
    pair: Tensor | None = None,
    normalize: bool = True,
    backend: str,
) -> Tensor:
    """L_i = log sum_j exp(scale sim(q_i, k_j)) over the j whose id differs from row i's.

    With pairs, L_i less scale sim(q_i, pair_i): taken off here the difference keeps its digits, and
    so do gradients. Keys that need no gradient are not kept for the backward pass: they may change
    before it.

    Args:
        q: [M, D] rows.
        k: [N, D] rows.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        row_ids: [M] integers, or None where every row sees every column.
        col_ids: [N] integers, likewise.
        pair: [M, D], a row for each of q; None for none.
        normalize: Whether sim is the cosine; else the plain product.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        [M], of scale's type; -inf for a row that sees no column.
    """
    if normalize and not k.requires_grad:
        return fixed_keys_lse(q, k, scale, row_ids, col_ids, pair=pair, backend=backend)
    lse: Tensor = _similarity_lse(q, k, scale, pair, row_ids, col_ids, normalize, backend)[0]
    return lse


def class_lse(
    z: Tensor,
    scale: Tensor,
    classes: Tensor,
    weights: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    """Log-sum-exp over the other rows, less the mean score of the row's positives.

    With x_ij = scale <z_i, z_j> and the other rows p of row i's class, n_i of them,
    R_i = log sum_(j != i) exp(x_ij) - sum_p x_ip / n_i; 0 for a row without positives. What is
    taken off here keeps its digits, as in ``two_view_lse``, and so do gradients.

    Args:
        z: [N, D] rows.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        classes: [N] integers, equal for rows that are each other's positives.
        weights: [C, C], how much of a positive a row of class j is for one of class i, where
            classes are from 0 to C - 1; n_i is then the sum of weights. No gradient.
        backend: ``"triton"`` or ``"torch"``, resolved; with weights ``"torch"``.

    Returns:
        [N], of scale's type.
    """
    lse: Tensor = _class_lse(z, scale, classes, weights, backend)[0]
    return lse


@operator
def _similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pair: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return launchers(backend, "similarity").similarity_lse_fwd(
            q, k, scale, pair, row_ids, col_ids, normalize
        )


@operator_without_derivative
def _similarity_lse_bwd(
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pair: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    top: Tensor,
    total: Tensor,
    q_rnorm: Tensor,
    k_rnorm: Tensor,
    normalize: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        grads = list(
            launchers(backend, "similarity").similarity_lse_bwd(
                dlse, q, k, scale, pair, row_ids, col_ids, top, total, q_rnorm, k_rnorm,
                normalize, needs[:3],
            )
        )  # fmt: skip
        if pair is not None and needs[3]:
            seen = dlse.masked_fill(total == 0, 0)
            grads.append(pair_gradient(seen, q, pair, scale, normalize))
    return [grad for grad in grads if grad is not None]


@operator
def _class_lse(
    z: Tensor, scale: Tensor, classes: Tensor, weights: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(z.device.type, enabled=False):
        return launchers(backend, "similarity").class_lse_fwd(z, scale, classes, weights)


@operator_without_derivative
def _class_lse_bwd(
    dlse: Tensor,
    z: Tensor,
    scale: Tensor,
    classes: Tensor,
    weights: Tensor | None,
    top: Tensor,
    total: Tensor,
    count: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(z.device.type, enabled=False):
        grads = launchers(backend, "similarity").class_lse_bwd(
            dlse, z, scale, classes, weights, top, total, count, needs
        )
    return [grad for grad in grads if grad is not None]


@fake_of(_similarity_lse)
def _similarity_lse_fake(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pair: object,
    row_ids: object,
    col_ids: object,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    rnorms = (scale.new_empty(x.shape[0] if normalize else 0) for x in (q, k))
    return (*(scale.new_empty(q.shape[0]) for _ in range(3)), *rnorms)


@fake_of(_class_lse)
def _class_lse_fake(
    z: Tensor, scale: Tensor, classes: object, weights: object, backend: str
) -> tuple[Tensor, ...]:
    return tuple(scale.new_empty(z.shape[0]) for _ in range(4))


connect(_similarity_lse, _similarity_lse_bwd, outputs=1, differentiable=4, tensors=6)
connect(_class_lse, _class_lse_bwd, outputs=1, differentiable=2, tensors=4)
