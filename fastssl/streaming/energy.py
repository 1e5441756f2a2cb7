"""Cross product energy of two batches, without a D x D matrix, in PyTorch.

    u^ = (u - mean(u)) / sqrt(var(u) + eps)        per feature, or u - mean(u)
    c_ij = 1/N sum_n u^_ni v^_nj                   E = sum_{i != j} c_ij^2        diagonal c_ii

Backward, with g = dE, d the gradient of the diagonal and h the sums below:

    h_ni = sum_{j != i} c_ij v^_nj                 du^ = 2 g / N h + d v^ / N
    du = (du^ - mean(du^) - u^ mean(du^ u^)) / sqrt(var(u) + eps)

and likewise for v; for v = u both halves meet in one gradient, 4 g / N h + 2 d u^ / N. There are
two exact routes to E and h: tiles of c (energy_features.py), 6 N D^2 operations and half of them
for v = u, and N x N matrices (energy_dual.py), 2 N^2 D operations forward and 4 N^2 D backward.
"""

from collections.abc import Sequence

from torch import Tensor

from fastssl.streaming.energy_dual import dual_bwd, dual_fwd
from fastssl.streaming.energy_features import features_bwd, features_fwd, is_one_tile
from fastssl.streaming.energy_statistics import statistics_fwd
from fastssl.streaming.energy_tiles import Batch


def saved_shapes(
    N: int, D: int, *, dual: bool, save: bool, two: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what ``cross_energy_fwd`` keeps for the gradients of u and, if there are two, v."""
    if dual:
        kept = (N, N)
    elif not save:
        return (0,), (0,)
    elif is_one_tile(D):
        return (D, D), (0,)
    else:
        kept = (N + 1, D)
    return kept, kept if two else (0,)


def cross_energy_fwd(
    u: Tensor, v: Tensor | None, eps: float, standardize: bool, dual: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return E [], the diagonal [D], u's mean and factor [D], v's, and what backward needs of each.

    That is v^ v^T / D and u^ u^T / D [N, N] on the dual route. On the other, and only if ``save``
    says so, it is c [D, D] without its diagonal where that is one tile, else h [N, D] with mean(h
    u^) in one more row. v = None stands for u; what would be v's is then empty.
    """
    a, b = statistics_fwd(u, v, eps, standardize)
    if dual:
        energy, diagonal, saved = dual_fwd(a, b, standardize)
    else:
        energy, diagonal, saved = features_fwd(a, b, standardize, save)
    of_v = [] if v is None else [b.mean, b.factor]
    v_mean, v_factor = of_v or [energy.new_empty(0) for _ in range(2)]
    u_saved, v_saved = saved + [energy.new_empty(0) for _ in range(2 - len(saved))]
    return energy, diagonal, a.mean, a.factor, v_mean, v_factor, u_saved, v_saved


def cross_energy_bwd(
    denergy: Tensor,
    ddiagonal: Tensor,
    u: Tensor,
    v: Tensor | None,
    u_mean: Tensor,
    u_factor: Tensor,
    v_mean: Tensor,
    v_factor: Tensor,
    diagonal: Tensor,
    u_saved: Tensor,
    v_saved: Tensor,
    standardize: bool,
    dual: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of u and v, each where ``needs`` asks for it."""
    (N, D), sides = u.shape, 2 if v is None else 1  # v = u takes part on both sides
    a = b = Batch(u, u_mean, u_factor)
    if v is not None:
        b = Batch(v, v_mean, v_factor)
    if not dual and is_one_tile(D):  # c itself, kept once for both
        v_saved = u_saved.T
    scale = 2 * sides / N * denergy  # of h
    along = sides / N * ddiagonal  # of the other batch's rows
    gradient = dual_bwd if dual else features_bwd
    du = gradient(u_saved, a, b, diagonal, scale, along, standardize) if needs[0] else None
    if v is None or not needs[1]:
        return du, None
    return du, gradient(v_saved, b, a, diagonal, scale, along, standardize)
