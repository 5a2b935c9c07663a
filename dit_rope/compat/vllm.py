"""vLLM's rotary operator over our kernels: same signature, in place, cache in either of two dtypes."""

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
    """Rotates query and key in place, each token by the row of the cache that its position names, in one launch.

    Signature and meaning are those of ``rotary_embedding`` in vLLM's ``vllm/_custom_ops.py``, whose kernel is
    ``csrc/pos_encoding_kernels.cu`` (0f5257e2). Arithmetic is float32 whatever the dtypes, rounded once; the cache is
    read where it lies, in its own dtype.

    Differences: a cache in a third dtype is refused; query and key may have any strides and any head counts, one a
    multiple of the other or not; positions may be int32, which are not converted; float64 is taken too. A position
    that is not a row of the cache is a ValueError on CPU; on a GPU, and in compiled code, its token keeps its values,
    and nothing is read.

    Args:
        positions: ``[N]`` or ``[B, S]`` int64 or int32 rows of the cache.
        query, key: ``[N, H * head_size]`` or ``[N, H, head_size]`` for positions ``[N]``, else ``[B, S, H *
            head_size]`` or ``[B, S, H, head_size]``; overwritten. Last dim contiguous, heads and tokens padded or not.
            Key may be None.
        head_size: channels of a head.
        cos_sin_cache: ``[R, rotary_dim]``, in each row rotary_dim / 2 cosines and as many sines; float32, or of the
            query's dtype.
        is_neox: channels half the rotary_dim apart turn together, else neighbours.
        rope_dim_offset: the first channel of a head that turns; those before it and past rotary_dim more do not.
        inverse: turn backwards.
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
