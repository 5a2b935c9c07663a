"""What the tests of the serving signatures share: caches by definition, memory layouts, and the bound of a result.

Nothing here imports dit_rope.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import oracle
from tolerance import assert_within

HEAD_SIZES = (32, 64, 80, 108, 112, 120, 128, 256)
HEADS = 17


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine, waiting for other threads takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frequencies(rotary_dim: int, theta: float = 1e4) -> torch.Tensor:
    """``[rotary_dim / 2]`` in float64 (RoFormer, arXiv:2104.09864)."""
    return theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def angles_at(positions: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[..., n]`` in float64 of ``positions`` ``[...]`` and frequencies ``[n]``."""
    angles = positions.double()[..., None] * inverse
    return angles.cos(), angles.sin()


def cos_sin_cache(rows: int, rotary_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, rotary_dim]``, cosines first, rounded once from float64."""
    return torch.cat(angles_at(torch.arange(rows), frequencies(rotary_dim)), dim=-1).to(dtype)


def naive(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, inverse: bool = False
) -> torch.Tensor:
    """The rotation of ``x`` ``[B, S, H, D]`` in float32, each product and each sum rounded; float32."""
    out, pairs = x.float().clone(), cos.shape[-1]
    cos, sin = (table.float().unsqueeze(-2) for table in (cos, -sin if inverse else sin))
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    x1, x2 = x[..., first].float(), x[..., second].float()
    out[..., first] = x1 * cos - x2 * sin
    out[..., second] = x1 * sin + x2 * cos
    return out


def assert_rotated(
    actual: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool,
    inverse: bool = False,
) -> None:
    """Checks ``actual`` ``[B, S, H, D]`` in bits past the table's channels, within float32 arithmetic on the others.

    Args:
        actual: the result, in the dtype of x.
        x: what was rotated.
        cos, sin: ``[S, n]`` or ``[B, S, n]``, the table as it was given, or float64 angles where there was none.
        interleaved, inverse: of the rotation.
    """
    truth = oracle.rotate(x, cos, sin, interleaved=interleaved, inverse=inverse)
    assert actual.shape == x.shape
    assert actual.dtype == x.dtype
    assert_within(actual, truth, naive(x, cos, sin, interleaved=interleaved, inverse=inverse))
    assert torch.equal(actual[..., 2 * cos.shape[-1] :], x[..., 2 * cos.shape[-1] :])
