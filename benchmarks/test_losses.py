"""Every loss and primitive of ``cases.py``, forward and backward and forward alone."""

from collections.abc import Callable

from fastssl.benchmarks.cases import Case, Size


def test_loss(
    compare: Callable[[Case, Size, str, str], None],
    case: Case,
    size: Size,
    direction: str,
    provider: str,
) -> None:
    compare(case, size, direction, provider)
