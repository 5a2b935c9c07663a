"""FlashInfer's rotary functions with dit_rope's kernels: same signatures, for ragged batches, with or without a cache.

Signatures and meaning are those of ``flashinfer/rope.py`` at fb28d724. Every function also takes ``backend``, as in
:func:`dit_rope.rotate_qk`. Differences:

- Queries and keys may also be float32 or float64, of any head size, with any strides and a contiguous last dim.
- A cache may be float32, or of the queries' dtype. A float16 cache has errors up to 2.4e-4 at any position. Positions
  are checked as in :func:`dit_rope.compat.vllm.rotary_embedding`.
- Without a cache, angles are computed in float64 (float32 on devices without it, such as MPS) and rounded once. So the
  error at position 1,000,000 is that at 0; ``docs/compat.md`` has a table. FlashInfer computes them in float32.
  Positions may be negative, and in host memory for queries on any device.
"""

from __future__ import annotations

import torch

from ..rotation import ops
from ..rotation.choice import check_backend
from ..scalars import as_int, check_flags, positive
from ..spec import Pairing, RopeSpec, Scaling
from ..validation import check_inplace, check_tensors
from .angles import Ints, ragged_positions, token_rows
from .dense import check_position_tensor, one_axis_args, prepare_cached, split_heads


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates each token by the row of the cache at its position; returns new tensors.

    Args:
        positions: ``[nnz]`` int32 or int64 rows of the cache.
        query, key: ``[nnz, H * head_size]`` or ``[nnz, H, head_size]``; H may differ.
        head_size: channels of a head.
        cos_sin_cache: ``[R, rotary_dim]``, cosines first. The first rotary_dim channels of a head are rotated.
        is_neox: True: channels rotary_dim / 2 apart rotate together; False: neighbours.

    Returns:
        Query and key in their shapes.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> import torch
        >>> query, key, cache = torch.randn(3, 8 * 64), torch.randn(3, 2 * 64), torch.randn(100, 64)
        >>> query, key = apply_rope_with_cos_sin_cache(torch.tensor([7, 8, 9]), query, key, 64, cache)
    """
    named = {"query": query, "key": key}
    xs, args = prepare_cached(positions, named, head_size, cos_sin_cache, is_neox=is_neox, position_dims=(1,))
    rotated_query, rotated_key = ops.rotate(xs, args, backend=backend)
    return rotated_query.reshape(query.shape), rotated_key.reshape(key.shape)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
    *,
    backend: str = "auto",
) -> None:
    """:func:`apply_rope_with_cos_sin_cache` in place: overwrites query and key.

    Example:
        >>> import torch
        >>> query, key, cache = torch.randn(3, 8 * 64), torch.randn(3, 2 * 64), torch.randn(100, 64)
        >>> apply_rope_with_cos_sin_cache_inplace(torch.tensor([7, 8, 9]), query, key, 64, cache)
    """
    named = {"query": query, "key": key}
    xs, args = prepare_cached(positions, named, head_size, cos_sin_cache, is_neox=is_neox, position_dims=(1,))
    check_inplace(tuple(named), xs, chosen=False)
    ops.rotate(xs, args, inplace=True, backend=backend)


apply_rope_inplace_with_cache = apply_rope_with_cos_sin_cache_inplace
"""The same function under a shorter name."""


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: Ints,
    offsets: Ints,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates a ragged batch without a cache; returns new tensors.

    Args:
        q, k: ``[nnz, H, D]``, the sequences of the batch one after another; H may differ.
        indptr: ``[batch + 1]``: sequence i is tokens ``indptr[i]`` to ``indptr[i + 1]``; see :func:`ragged_positions`.
        offsets: ``[batch]``: the position of the first token of each sequence.
        rotary_dim: number of rotated channels, the first ones of a head; None for all.
        interleave: True: neighbouring channels rotate together; False: channels rotary_dim / 2 apart.
        rope_scale: positions are divided by it.
        rope_theta: base of the frequencies, ``rope_theta ** (-2 j / rotary_dim)`` for pair j.

    Returns:
        New tensors ``(q, k)``.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> import torch
        >>> q, k = torch.randn(5, 4, 64), torch.randn(5, 1, 64)
        >>> q, k = apply_rope(q, k, indptr=[0, 2, 5], offsets=[7, 0])
    """
    spec = _spec(q, rotary_dim, rope_theta, _linear(rope_scale))
    return _rotate(q, k, _ragged(q, indptr, offsets), spec, interleave, backend)


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: Ints,
    offsets: Ints,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    backend: str = "auto",
) -> None:
    """:func:`apply_rope` in place: overwrites q and k.

    Example:
        >>> import torch
        >>> q, k = torch.randn(5, 4, 64), torch.randn(5, 1, 64)
        >>> apply_rope_inplace(q, k, indptr=[0, 2, 5], offsets=[7, 0])
    """
    spec = _spec(q, rotary_dim, rope_theta, _linear(rope_scale))
    _rotate(q, k, _ragged(q, indptr, offsets), spec, interleave, backend, inplace=True)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`apply_rope` with the position of every token, ``[nnz]`` int32 or int64, in place of segments.

    Example:
        >>> import torch
        >>> q, k = torch.randn(2, 4, 64), torch.randn(2, 1, 64)
        >>> q, k = apply_rope_pos_ids(q, k, torch.tensor([7, 900_000]))
    """
    spec = _spec(q, rotary_dim, rope_theta, _linear(rope_scale))
    return _rotate(q, k, pos_ids, spec, interleave, backend)


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    backend: str = "auto",
) -> None:
    """:func:`apply_rope_pos_ids` in place: overwrites q and k.

    Example:
        >>> import torch
        >>> q, k = torch.randn(2, 4, 64), torch.randn(2, 1, 64)
        >>> apply_rope_pos_ids_inplace(q, k, torch.tensor([7, 900_000]))
    """
    spec = _spec(q, rotary_dim, rope_theta, _linear(rope_scale))
    _rotate(q, k, pos_ids, spec, interleave, backend, inplace=True)


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: Ints,
    offsets: Ints,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`apply_rope` with the frequencies of Llama 3.1.

    Waves longer than ``old_context_len / low_freq_factor`` are stretched by ``rope_scale``. Waves shorter than
    ``old_context_len / high_freq_factor`` are kept, with a blend between. This is the scaling type
    :func:`~dit_rope.tables.scaling_types.llama3`.

    Example:
        >>> import torch
        >>> q, k = torch.randn(5, 4, 64), torch.randn(5, 1, 64)
        >>> q, k = apply_llama31_rope(q, k, indptr=[0, 2, 5], offsets=[7, 0])
    """
    scaling = _llama31(rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    return _rotate(q, k, _ragged(q, indptr, offsets), _spec(q, rotary_dim, rope_theta, scaling), interleave, backend)


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: Ints,
    offsets: Ints,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    backend: str = "auto",
) -> None:
    """:func:`apply_llama31_rope` in place: overwrites q and k.

    Example:
        >>> import torch
        >>> q, k = torch.randn(5, 4, 64), torch.randn(5, 1, 64)
        >>> apply_llama31_rope_inplace(q, k, indptr=[0, 2, 5], offsets=[7, 0])
    """
    scaling = _llama31(rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    _rotate(
        q, k, _ragged(q, indptr, offsets), _spec(q, rotary_dim, rope_theta, scaling), interleave, backend, inplace=True
    )


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`apply_llama31_rope` with the position of every token, ``[nnz]``, in place of segments.

    Example:
        >>> import torch
        >>> q, k = torch.randn(2, 4, 64), torch.randn(2, 1, 64)
        >>> q, k = apply_llama31_rope_pos_ids(q, k, torch.tensor([7, 900_000]))
    """
    scaling = _llama31(rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    return _rotate(q, k, pos_ids, _spec(q, rotary_dim, rope_theta, scaling), interleave, backend)


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    backend: str = "auto",
) -> None:
    """:func:`apply_llama31_rope_pos_ids` in place: overwrites q and k.

    Example:
        >>> import torch
        >>> q, k = torch.randn(2, 4, 64), torch.randn(2, 1, 64)
        >>> apply_llama31_rope_pos_ids_inplace(q, k, torch.tensor([7, 900_000]))
    """
    scaling = _llama31(rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    _rotate(q, k, pos_ids, _spec(q, rotary_dim, rope_theta, scaling), interleave, backend, inplace=True)


def _check_tokens(q: object) -> None:
    if not isinstance(q, torch.Tensor) or q.ndim != 3:
        got = tuple(q.shape) if isinstance(q, torch.Tensor) else type(q).__name__
        raise ValueError(f"q must be a tensor [nnz, heads, head_dim], got {got}")


def _ragged(q: torch.Tensor, indptr: Ints, offsets: Ints) -> torch.Tensor:
    _check_tokens(q)
    return ragged_positions(indptr, offsets, q.shape[0])


def _linear(rope_scale: float) -> Scaling | None:
    positive("rope_scale", rope_scale)
    return None if rope_scale == 1 else Scaling.of("linear", factor=float(rope_scale))


def _llama31(rope_scale: float, low: float, high: float, length: int) -> Scaling:
    named = {"rope_scale": rope_scale, "low_freq_factor": low, "high_freq_factor": high, "old_context_len": length}
    for name, value in named.items():
        positive(name, value)
    return Scaling.of(
        "llama3",
        factor=rope_scale,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=length,
    )


def _spec(q: torch.Tensor, rotary_dim: int | None, theta: float, scaling: Scaling | None) -> RopeSpec:
    _check_tokens(q)
    width = as_int(q.shape[2] if rotary_dim is None else rotary_dim)
    if width is None or not 2 <= width <= q.shape[2] or width % 2:
        got = q.shape[2] if rotary_dim is None else rotary_dim
        raise ValueError(f"rotary_dim must be even, at least 2 and at most head_dim {q.shape[2]}, got {got!r}")
    positive("rope_theta", theta)
    return RopeSpec((width,), theta, Pairing.HALF, scaling=scaling)  # both pairings have the same table


def _rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    spec: RopeSpec,
    interleave: bool,
    backend: str,
    *,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_flags(interleave=interleave)
    check_backend(backend)
    xs = _tokens(q, k, positions, spec)
    if inplace:
        check_inplace(("q", "k"), xs, chosen=False)
    rows, row_of_token = token_rows(positions, spec, q.device, q.dtype)
    args = one_axis_args(rows, row_of_token, q.shape[0], interleaved=interleave)
    rotated = ops.rotate(xs, args, inplace=inplace, backend=backend)
    return rotated[0].squeeze(0), rotated[1].squeeze(0)


def _tokens(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, spec: RopeSpec) -> list[torch.Tensor]:
    check_position_tensor("pos_ids", positions, (1,), None)
    xs = [split_heads(name, x, positions.shape, q.shape[2]) for name, x in (("q", q), ("k", k))]
    check_tensors(("q", "k"), xs, spec.rotary_dim, q.device)
    return xs
