"""Comparisons of tensors: equal, or within an error that is derived from the computation instead of chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def all_equal(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether both hold the same number of tensors, at least one, and each equals its counterpart."""
    return len(actual) == len(expected) > 0 and all(map(torch.equal, actual, expected))


def bound(exact: torch.Tensor, naive: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Largest allowed error of each element of a result in ``dtype``, same shape as ``exact``, float64.

    It is the largest error anywhere of the same computation done naively in the working precision from the same
    inputs (``naive``), plus one rounding to ``dtype``: half the distance between neighbours at the exact value, or
    half the least subnormal.
    """
    exact = exact.double()
    error = (naive.double() - exact).abs().max()
    info = torch.finfo(dtype)
    return error + (exact.abs() + error) * (info.eps / 2) + info.tiny * info.eps / 2


def assert_within(actual: torch.Tensor, exact: torch.Tensor, naive: torch.Tensor, context: str = "") -> None:
    """Fails, saying where and by how much, if an element of ``actual`` is off by more than :func:`bound` (or NaN)."""
    allowed = bound(exact, naive, actual.dtype)
    error = (actual.double() - exact.double()).abs()
    wrong = ~(error <= allowed)
    if wrong.any():
        excess = torch.where(wrong, (error / allowed).nan_to_num(torch.inf), 0.0)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off by more than the bound; worst at {worst}: "
            f"got {actual[worst].item()}, exact {exact[worst].item()}, allowed {allowed[worst].item():.3g} {context}"
        )
