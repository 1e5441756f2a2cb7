"""Cross product energy on the GPU: the D x D cross-correlation of two views is never stored.

Rows u_n, v_n of N samples with D features each, standardised per feature over the samples:

    û_ni = (u_ni - mean_i) factor_i      c_ij = 1/N sum_n û_ni v̂_nj      E = sum_{i != j} c_ij^2

Barlow Twins (Zbontar et al. 2021, equation 1) takes factor = 1 / std of both views, the covariance
term of VICReg (Bardes et al. 2022, equation 3) one factor for all features, and v = u. Two routes:

    features    panels of rows of c, its diagonal left out; 2 N D^2 operations, 1 where v is u
                h_u = v̂ c^T, h_v = û c                    6 N D^2 with both, 3 where v is u
    dual        K = û û^T, L = v̂ v̂^T, the upper half of their tiles;    N^2 D operations each
                E = <K, L> / N^2 - sum_i c_ii^2
                h_u = L û / N - diag(c) v̂, h_v = K v̂ / N - diag(c) û    2 N^2 D operations each
                with one factor, outliers o are no part of K, and E and h gain their rows c_oj
    backward    dû = dE 2/N h_u + ddiag v̂ / N      (v = u: twice that)
                du = factor (dû - mean(dû) - û mean(dû û))      without the last term for one factor

The features route keeps h [N, D] for the backward pass and a panel of c meanwhile, the dual route
K and L [N, N]. Inputs are read as they are and standardised on load. Each step has a file:
energy_statistics.py, energy_features.py, energy_dual.py with energy_outliers.py, and what these
share is in energy_tiles.py. README.md has the derivations.
"""

import torch

from fastssl.kernels.energy_dual import dual_bwd, dual_fwd
from fastssl.kernels.energy_features import features_fwd
from fastssl.kernels.energy_statistics import statistics_bwd, statistics_fwd
from fastssl.kernels.energy_tiles import Batch, Plan


def saved_shapes(N, D, *, dual, save, two):
    """Shapes of what ``cross_energy_fwd`` keeps of u and, if there are two inputs, of v."""
    kept = (N, N) if dual else (N, D) if save else (0,)
    return kept, kept if two else (0,)


def cross_energy_fwd(u, v, eps, standardize, dual, save):
    """Sum of the squares of the cross-correlation matrix off its diagonal, and that diagonal.

    Args:
        u: [N, D] float32, bfloat16 or float16, any strides.
        v: [N, D] likewise, or None for v = u.
        eps: float, added to a variance.
        standardize: divide each feature by its deviation; or all by one power of two.
        dual: take the route over [N, N] rather than over panels of [D, D].
        save: keep on the features route what the backward pass needs.

    Returns:
        energy [], diagonal, u_mean, u_factor, v_mean and v_factor [D]; u_saved and v_saved, which
        are K / D and L / D [N, N] on the dual route and else h_u and h_v [N, D]. All are float32,
        and empty where there is nothing to keep.
    """
    plan = Plan.of(u, v)
    shapes = saved_shapes(*u.shape, dual=dual, save=save, two=v is not None)
    with torch.cuda.device_of(u):
        a, b, diagonal = statistics_fwd(u, v, eps, standardize, plan)
        saved = [torch.empty(shape, dtype=torch.float32, device=u.device) for shape in shapes]
        if dual:
            energy = dual_fwd(a, b, diagonal, *saved, standardize, plan)
        else:
            energy = features_fwd(a, b, *saved, save, plan)
    v_stats = b[1:] if v is not None else [diagonal.new_empty(0) for _ in range(2)]
    return energy, diagonal, a.mean, a.factor, *v_stats, *saved


def cross_energy_bwd(
    denergy, ddiagonal, u, v, u_mean, u_factor, v_mean, v_factor, diagonal, u_saved, v_saved,
    standardize, dual, needs,
):  # fmt: skip
    """Gradients of ``cross_energy_fwd``.

    Args:
        denergy: [] float32.
        ddiagonal: [D] float32, any stride.
        u: [N, D] as in the forward pass, like v, standardize and dual.
        v: [N, D] or None.
        u_mean: [D] float32, from the forward pass, like all up to v_saved.
        u_factor: [D].
        v_mean: [D].
        v_factor: [D].
        diagonal: [D].
        u_saved: [N, N] or [N, D].
        v_saved: [N, N] or [N, D].
        standardize: bool.
        dual: bool.
        needs: which of du, dv to compute.

    Returns:
        du and dv [N, D] in the input's dtype; None where not needed.
    """
    plan = Plan.of(u, v)
    a = b = Batch(u, u_mean, u_factor)
    if v is not None:
        b = Batch(v, v_mean, v_factor)
        if dual:  # where h takes the other's
            u_saved, v_saved = v_saved, u_saved

    def gradient(z, other, saved):
        h = dual_bwd(saved, z, other, diagonal, standardize, plan) if dual else saved
        return statistics_bwd(h, z, other, denergy, ddiagonal, standardize, plan)

    with torch.cuda.device_of(u):
        du = gradient(a, b, u_saved) if needs[0] else None
        dv = gradient(b, a, v_saved) if v is not None and needs[1] else None
    return du, dv
