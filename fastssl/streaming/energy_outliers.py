"""Features that hold much of all variance, in PyTorch, and their rows of c.

What the dual route subtracts, the squared diagonal of c, is small beside the rest, but where a few
features hold nearly all variance. Those, at most OUTLIERS of them, then stay out of the N x N
matrix, and their rows of c are computed: c_oj = 1/N sum_n u^_no u^_nj.
"""

from torch import Tensor

OUTLIERS = 16
SHARE = 1 / 64  # of all squared variances, from which on a feature is an outlier


def find_outliers(variances: Tensor) -> list[int]:
    """Features with much of all squared variances: to ask is free on a CPU alone."""
    if variances.device.type != "cpu":
        return []
    squares = (variances / variances.max()).square()
    largest = squares.topk(min(OUTLIERS, len(squares)))
    found = largest.indices[largest.values > SHARE * squares.sum()]
    return sorted(found.tolist())


def outlier_rows(far: Tensor, x: Tensor, outliers: list[int], features: slice) -> Tensor:
    """Rows of c of the outliers [O, P], at some features; 0 on the diagonal.

    Args:
        far: [N, O] the outliers, standardised.
        x: [N, P] the features, standardised.
        outliers: where they are in c.
        features: where those are.
    """
    c = far.T @ x / len(x)
    for row, feature in enumerate(outliers):
        if features.start <= feature < features.stop:
            c[row, feature - features.start] = 0
    return c
