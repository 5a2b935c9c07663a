"""vLLM's rotary operator with dit_rope's kernels: same signature, in place, cache in either of two dtypes."""

from __future__ import annotations

import torch

from ..rotation import ops
from ..validation import check_inplace
from .dense import prepare_cached


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
    *,
    backend: str = "auto",
) -> None:
    """Rotates query and key in place, each token by the row of the cache at its position, in one launch.

    Signature and meaning are those of ``rotary_embedding`` in vLLM's ``vllm/_custom_ops.py``, whose kernel is
    ``csrc/pos_encoding_kernels.cu`` (0f5257e2). Arithmetic is float32 for every dtype, rounded once. The cache is read
    in its own dtype, without a copy.

    Differences: a cache in a third dtype is refused. Query and key may have any strides and any numbers of heads.
    Positions may be int32, without a conversion. float64 is supported. A position that is not a row of the cache raises
    ValueError on CPU; on a GPU, and in compiled code, its token keeps its values and nothing is read.

    Args:
        positions: ``[N]`` or ``[B, S]`` int64 or int32 rows of the cache.
        query, key: overwritten. ``[N, H * head_size]`` or ``[N, H, head_size]`` for positions ``[N]``; ``[B, S, H *
            head_size]`` or ``[B, S, H, head_size]`` for positions ``[B, S]``. The last dim must be contiguous. Key may
            be None.
        head_size: channels of a head.
        cos_sin_cache: ``[R, rotary_dim]``, each row rotary_dim / 2 cosines and then as many sines; float32, or of the
            query's dtype.
        is_neox: True: channels rotary_dim / 2 apart rotate together; False: neighbours.
        rope_dim_offset: the first rotated channel of a head. Channels before it, and after rotary_dim channels, keep
            their values.
        inverse: rotate backwards.
        backend: as in :func:`dit_rope.rotate_qk`.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> import torch
        >>> query, cache = torch.randn(3, 2 * 64), torch.randn(100, 64)
        >>> rotary_embedding(torch.tensor([7, 8, 9]), query, None, 64, cache, is_neox=True)
    """
    named = {"query": query} if key is None else {"query": query, "key": key}
    xs, args = prepare_cached(
        positions,
        named,
        head_size,
        cos_sin_cache,
        is_neox=is_neox,
        rope_dim_offset=rope_dim_offset,
        inverse=inverse,
    )
    check_inplace(tuple(named), xs, chosen=False)
    ops.rotate(xs, args, inplace=True, backend=backend)
