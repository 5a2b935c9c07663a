"""The error a result may have, derived from its computation instead of chosen."""

from __future__ import annotations

import torch


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
