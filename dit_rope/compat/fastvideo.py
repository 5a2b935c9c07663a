"""FastVideo's table builder with dit_rope's cache: same signature, same bits."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..scalars import as_number, check_flags, integer, positive
from ..spec import FREQUENCY_DTYPES, MAX_AXES, Grid, Pairing, RopeSpec, Scaling, Shard
from ..tables.shards import MAX_POSITION
from ..tables.table import dense_table


def get_rotary_pos_embed(
    rope_sizes: Sequence[int],
    hidden_size: int,
    heads_num: int,
    rope_dim_list: Sequence[int] | None,
    rope_theta: float,
    theta_rescale_factor: float | Sequence[float] = 1.0,
    interpolation_factor: float | Sequence[float] = 1.0,
    shard_dim: int = 0,
    do_sp_sharding: bool = False,
    dtype: torch.dtype = torch.float32,
    start_frame: int = 0,
    use_real: bool = True,
    *,
    sp_rank: int | None = None,
    sp_world_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of a (T, H, W) grid on CPU, bitwise equal to FastVideo's function of this name.

    Source: ``fastvideo/layers/rotary_embedding.py`` at 2f3d4074. Differences: the cache evicts first in, first out. A
    number and the list that repeats it share one entry. A negative start_frame is refused, not ignored. Errors are
    ValueError and TypeError. With interpolation and float64, positions from 4,096 on are not rounded to float32. Rank
    and world are read only with ``do_sp_sharding``: from the keyword arguments, or from torch.distributed's default
    group if it is initialized, or 0 and 1.

    Args:
        rope_sizes: tokens per axis, frame first.
        hidden_size, heads_num: their quotient is the head dim, the sum of ``rope_dim_list``.
        rope_dim_list: channels per axis; None for a third of the head dim each.
        rope_theta: base of the frequencies.
        theta_rescale_factor, interpolation_factor: one for all axes, or one per axis; the options of
            :func:`~dit_rope.tables.scaling_types.fastvideo`.
        shard_dim: the axis that ``do_sp_sharding`` divides among ranks.
        do_sp_sharding: return the tokens of this rank only.
        dtype: dtype of the frequencies; the result is float64 for float64, else float32.
        start_frame: position of the first frame.
        use_real: ``[S, head_dim]`` with each value twice, at neighbouring channels; else ``[S, head_dim / 2]``.
        sp_rank, sp_world_size: this rank and the number of ranks.

    Returns:
        cos and sin, shared with all other callers: clone before writing.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> cos, sin = get_rotary_pos_embed((3, 4, 5), 256, 2, (44, 42, 42), 10_000.0)
        >>> cos.shape
        torch.Size([60, 128])
    """
    check_flags(do_sp_sharding=do_sp_sharding, use_real=use_real)
    head_dim = integer("hidden_size", hidden_size, 1) // integer("heads_num", heads_num, 1)
    sizes = _integers("rope_sizes", rope_sizes)
    dims = (head_dim // 3,) * 3 if rope_dim_list is None else _integers("rope_dim_list", rope_dim_list)
    if sum(dims) != head_dim:
        raise ValueError(f"rope_dim_list must sum to hidden_size // heads_num ({head_dim}), got {dims}")
    shard_dim = integer("shard_dim", shard_dim, 0)
    if shard_dim >= len(dims):
        raise ValueError(f"shard_dim must be at least 0 and below the number of axes ({len(dims)}), got {shard_dim}")
    # Dynamo ignores lru_cache with a warning, so traced code calls the function inside.
    request_of = _request.__wrapped__ if torch.compiler.is_compiling() else _request
    theta = _numbers("rope_theta", rope_theta)
    if len(theta) > 1:
        raise TypeError(f"rope_theta must be a number, got {rope_theta!r}")
    factors = (
        _numbers("theta_rescale_factor", theta_rescale_factor),
        _numbers("interpolation_factor", interpolation_factor),
    )
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    numbers = theta[0], *factors, dtype, sizes
    spec, grid, table_dtype = request_of(dims, *numbers, integer("start_frame", start_frame, 0))
    shard = _shard(sizes, shard_dim, sp_rank, sp_world_size) if do_sp_sharding else None
    return dense_table(spec, grid, shard, None, table_dtype, use_real).flat


@functools.lru_cache(maxsize=64)
def _request(
    dims: tuple[int, ...],
    theta: float,
    theta_rescale: tuple[float, ...],
    interpolation: tuple[float, ...],
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    start_frame: int,
) -> tuple[RopeSpec, Grid, torch.dtype]:
    """The checked spec and grid, and the result's dtype; cached because the checks take longer than a cache hit."""
    if len(dims) > MAX_AXES or any(dim % 2 for dim in dims):
        raise ValueError(
            f"rope_dim_list must have 1 to {MAX_AXES} even numbers, got {dims}; two channels rotate together"
        )
    if len(sizes) != len(dims):
        raise ValueError(f"rope_sizes must have one size per axis of rope_dim_list {dims}, got {sizes}")
    if max(start_frame + sizes[0], *sizes) > MAX_POSITION:
        raise ValueError(
            f"rope_sizes and start_frame must end at or before position {MAX_POSITION}, got {sizes} and {start_frame}; "
            "float32 counts no further"
        )
    for name, values in (("theta_rescale_factor", theta_rescale), ("interpolation_factor", interpolation)):
        if len(values) not in (1, len(dims)):
            raise ValueError(f"{name} must be a number or have one value per axis ({len(dims)}), got {values}")
    if any(dim == 2 and theta_rescale[axis % len(theta_rescale)] != 1 for axis, dim in enumerate(dims)):
        raise ValueError(
            f"theta_rescale_factor must be 1 on an axis of 2 channels, got {theta_rescale} for rope_dim_list {dims}"
        )
    if dtype not in FREQUENCY_DTYPES:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    factors = [values * len(dims) if len(values) == 1 else values for values in (theta_rescale, interpolation)]
    scaling = [
        None if rescale == factor == 1 else Scaling.of("fastvideo", theta_rescale=rescale, interpolation=factor)
        for rescale, factor in zip(*factors, strict=True)
    ]
    spec = RopeSpec(dims, theta, Pairing.INTERLEAVED, scaling=scaling, frequency_dtype=dtype)
    return spec, Grid(*sizes, start_frame=start_frame), torch.promote_types(dtype, torch.float32)


def _numbers(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    """One number, or one per axis, each positive and finite."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, bytes) else (value,)
    numbers = [as_number(v) for v in values]
    if not numbers or None in numbers:
        raise TypeError(f"{name} must be a number or numbers, got {value!r}")
    return tuple(positive(name, v) for v in values)


def _integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of ints, one per axis, got {values!r}")
    return tuple(integer(name, value, 1) for value in values)


def _shard(sizes: tuple[int, ...], shard_dim: int, sp_rank: int | None, sp_world_size: int | None) -> Shard:
    rank, world = _rank_and_world(sp_rank, sp_world_size)
    if sizes[shard_dim] % world:
        raise ValueError(
            f"sp_world_size must divide rope_sizes[{shard_dim}] ({sizes[shard_dim]}), got {world}; this is rank "
            f"{rank} of {world}"
        )
    return Shard(rank, world, axis=shard_dim)


def _rank_and_world(rank: int | None, world: int | None) -> tuple[int, int]:
    if (rank is None) != (world is None):
        raise ValueError(f"sp_rank and sp_world_size must be given together, got {rank} and {world}")
    if rank is not None and world is not None:
        rank, world = integer("sp_rank", rank, 0), integer("sp_world_size", world, 1)
        if rank >= world:
            raise ValueError(f"sp_rank must be below sp_world_size ({world}), got {rank}")
        return rank, world
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
