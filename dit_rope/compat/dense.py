"""Helpers of ``compat``: dense tables as the rows of one axis, tokens as ``[B, S, H, D]``, both without copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..rotation_args import RotationArgs
from ..scalars import as_int, check_flags
from ..spec import Pairing
from ..torch_state import in_mode
from ..validation import check_memory, check_tensors


def one_axis_args(
    rows: torch.Tensor,
    positions: torch.Tensor | None,
    count: int,
    *,
    interleaved: bool,
    inverse: bool = False,
    exact: bool = False,
) -> RotationArgs:
    """The rotation of ``count`` tokens by ``rows`` ``[2, R, n]``.

    ``positions`` int32 ``[B or 1, count, 1]`` holds the row of each token. With None, token i has row i, and the rows
    are those of this call alone.
    """
    if positions is None and rows.device.type == "cpu":
        # For rows without positions the eager backend caches expanded cos and sin. Rows of one call gain nothing by it.
        positions = torch.arange(count, dtype=torch.int32, device=rows.device)[None, :, None]
    pairing = Pairing.INTERLEAVED if interleaved else Pairing.HALF
    return RotationArgs.of_rows(rows, positions, (rows.shape[2],), count, pairing, inverse=inverse, exact=exact)


def cache_rows(cache: torch.Tensor, queries: torch.dtype) -> torch.Tensor:
    """``cos_sin_cache`` ``[R, 2 n]``, cosines first, as ``[2, R, n]``: the same memory.

    Raises:
        TypeError: a cache that is neither float32 nor of the dtype of the queries.
        ValueError: a cache of another shape, or with a strided last dim.
    """
    if cache.dtype not in (torch.float32, queries):
        raise TypeError(
            f"cos_sin_cache must be float32 or of the query's dtype {queries}, got {cache.dtype}; convert it once, "
            "when it is made"
        )
    check_memory("cos_sin_cache", cache)
    if cache.stride(1) != 1:
        raise ValueError(
            f"cos_sin_cache must be contiguous in its last dim, got strides {cache.stride()}; make it contiguous once"
        )
    rows: torch.Tensor = cache.unflatten(1, (2, -1)).transpose(0, 1)
    return rows


def cache_width(cache: object) -> int:
    """The rotary_dim of ``cos_sin_cache`` ``[R, rotary_dim]``.

    Raises:
        TypeError, ValueError: not a matrix with an even number of columns.
    """
    if not isinstance(cache, torch.Tensor):
        raise TypeError(f"cos_sin_cache must be a torch.Tensor, got {type(cache).__name__}")
    if cache.ndim != 2 or cache.shape[1] < 2 or cache.shape[1] % 2:
        raise ValueError(f"cos_sin_cache must have shape [positions, even rotary_dim], got {tuple(cache.shape)}")
    return cache.shape[1]


def split_heads(name: str, x: torch.Tensor, tokens: Sequence[int], head_size: int) -> torch.Tensor:
    """``x`` as ``[B, S, H, D]``, a view: ``tokens`` are its first dims, ``[N]`` (a batch of one) or ``[B, S]``.

    Args:
        name: the name of the argument.
        x: ``[*tokens, H * head_size]`` or ``[*tokens, H, head_size]``.
        tokens: the shape of the positions.
        head_size: D.

    Raises:
        TypeError, ValueError: naming the rule that is broken.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    dims = len(tokens)
    if x.ndim not in (dims + 1, dims + 2) or tuple(x.shape[:dims]) != tuple(tokens):
        first = ", ".join(map(str, tokens))
        raise ValueError(
            f"{name} must have shape [{first}, heads * head_size] or [{first}, heads, head_size] for positions of "
            f"shape {tuple(tokens)}, got {tuple(x.shape)}"
        )
    if x.shape[-1] % head_size if x.ndim == dims + 1 else x.shape[-1] != head_size:
        raise ValueError(f"head_size must fit the last dim of {name} ({x.shape[-1]}), got {head_size}")
    heads = x.unflatten(-1, (-1, head_size)) if x.ndim == dims + 1 else x
    return heads if dims == 2 else heads.unsqueeze(0)


def check_position_tensor(name: str, positions: object, dims: Sequence[int], device: torch.device | None) -> None:
    """Checks int32 or int64 positions with a number of dims in ``dims``, on ``device`` unless that is None.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    if not isinstance(positions, torch.Tensor) or positions.dtype not in (torch.int32, torch.int64):
        got = positions.dtype if isinstance(positions, torch.Tensor) else type(positions).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if positions.ndim not in dims:
        allowed = " or ".join({1: "[tokens]", 2: "[batch, tokens]"}[dim] for dim in dims)
        raise ValueError(f"{name} must have shape {allowed}, got {tuple(positions.shape)}")
    if device is not None and positions.device != device:
        raise ValueError(f"{name} must be on the device of the queries {device}, got {positions.device}")
    check_memory(name, positions)


def position_rows(positions: torch.Tensor, rows: int, queries: torch.dtype) -> torch.Tensor:
    """Positions ``[N]`` or ``[B, S]`` as the int32 ``[1 or B, tokens, 1]`` that kernels read.

    int64 positions are converted to int32. On CPU each must be a row of the cache. On a GPU that check would wait for
    the device: there, and in compiled code, tokens of other positions keep their values and nothing is read for them.
    CUDA kernels check int32 positions themselves. Other positions past the cache become -1 here, because the conversion
    to int32 could make them rows.

    Raises:
        ValueError: on CPU, a position that is not a row.
    """
    if positions.device.type == "cpu" and positions.numel() and not in_mode():
        lowest, highest = (int(end) for end in positions.aminmax())
        if lowest < 0 or highest >= rows:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"positions must be rows of cos_sin_cache, 0 to {rows - 1}, got {wrong}")
    elif positions.dtype == torch.int64 or positions.device.type != "cuda" or queries == torch.float64:
        positions = torch.where((positions >= 0) & (positions < rows), positions, -1)
    rows_of_tokens = positions.to(torch.int32).unsqueeze(-1)
    return rows_of_tokens if rows_of_tokens.ndim == 3 else rows_of_tokens.unsqueeze(0)


def prepare_cached(
    positions: torch.Tensor,
    named: dict[str, torch.Tensor],
    head_size: int,
    cache: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
    position_dims: Sequence[int] = (1, 2),
) -> tuple[list[torch.Tensor], RotationArgs]:
    """Checks a call with a dense cache, and makes the arguments of its rotation.

    Args:
        positions: ``[N]``, or ``[B, S]`` if ``position_dims`` has 2.
        named: queries and keys by the names of their arguments; keys may be missing.
        head_size, cache, is_neox, rope_dim_offset, inverse: as in :func:`dit_rope.compat.vllm.rotary_embedding`.
        position_dims: allowed numbers of dims of positions.

    Returns:
        The tensors as ``[B, S, H, D]`` views, without the channels before the offset, and the arguments.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    check_flags(is_neox=is_neox, inverse=inverse)
    width = cache_width(cache)
    check_position_tensor("positions", positions, position_dims, cache.device)
    channels, offset = as_int(head_size), as_int(rope_dim_offset)
    if channels is None or channels < 1:
        raise ValueError(f"head_size must be a positive int, got {head_size!r}")
    if offset is None:
        raise TypeError(f"rope_dim_offset must be an int, got {rope_dim_offset!r}")
    if offset < 0 or offset + width > channels:
        raise ValueError(
            f"rope_dim_offset must be at least 0 and leave {width} of head_size {channels} channels to rotate, got "
            f"{offset}"
        )
    views = [split_heads(name, x, positions.shape, channels) for name, x in named.items()]
    xs = [view[..., offset:] for view in views] if offset else views
    check_tensors(tuple(named), xs, width, cache.device)
    rows = cache_rows(cache, xs[0].dtype)
    rows_of_tokens = position_rows(positions, rows.shape[1], xs[0].dtype)
    return xs, one_axis_args(rows, rows_of_tokens, rows_of_tokens.shape[1], interleaved=not is_neox, inverse=inverse)
