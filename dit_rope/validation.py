"""Checks of the tensors a user passes in. Every message names the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .scalars import as_int, integer
from .spec import NormKind
from .torch_state import in_mode

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST_EPS = torch.finfo(torch.float32).max  # kernels have it in float32


def checked_device(device: torch.device | str | int) -> torch.device:
    """``device`` as a torch.device.

    Raises:
        TypeError, ValueError: not the name of a device, or a device that this torch or machine does not have.
    """
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"device must be a torch.device, a string or an int, got {device!r}")
    try:
        checked = torch.device(device)
        if checked.type not in ("cpu", "meta"):
            torch.get_device_module(checked)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"device must name a device of this torch, got {device!r}: {error}") from error
    if checked.type == "cuda" and (checked.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device must be one of the {count} CUDA devices that torch sees, got {device!r}")
    return checked


def check_values(name: str, x: object) -> None:
    """Checks that memory holds the values of ``x``: a strided tensor of a supported dtype, not lazily negated.

    Raises:
        TypeError: not a tensor, or a tensor of another dtype or layout.
        ValueError: a lazily negated view, whose memory holds the opposite signs.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    check_memory(name, x)


def check_memory(name: str, x: torch.Tensor) -> None:
    """Checks that a tensor of any dtype is strided and not a lazily negated view.

    Raises:
        TypeError, ValueError: naming the argument and the method that converts it.
    """
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got {x.layout}; call {name}.to_dense()")
    if not torch.compiler.is_compiling() and x.is_neg():  # dynamo has neither such views nor is_neg
        raise ValueError(f"{name} must hold its own values, got a lazily negated view; call {name}.resolve_neg()")


def check_tensors(names: Sequence[str], xs: Sequence[torch.Tensor], rotary_dim: int, device: torch.device) -> None:
    """Checks queries and keys ``[B, S, H, D]`` against each other and against the table that rotates them.

    Raises:
        TypeError: an argument that is not a tensor, or of an unsupported or different dtype.
        ValueError: a wrong number of dims, a D below ``rotary_dim``, a strided last dim, or another B, S, D or device.
    """
    for name, x in zip(names, xs, strict=True):
        check_values(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape [B, S, H, D], got {tuple(x.shape)}")
        if x.shape[-1] < rotary_dim:
            raise ValueError(f"{name} must have at least the table's {rotary_dim} channels per head, got {x.shape[-1]}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name} must be contiguous in its last dim, got strides {x.stride()}; call {name}.contiguous()"
            )
        if x.device != device:
            raise ValueError(f"{name} must be on the table's device {device}, got {x.device}; move one of the two")
    first = xs[0]
    for name, x in zip(names[1:], xs[1:], strict=True):
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {names[0]}, {first.dtype}, got {x.dtype}")
        if (x.shape[0], x.shape[1], x.shape[3]) != (first.shape[0], first.shape[1], first.shape[3]):
            raise ValueError(
                f"{name} must have the B, S and D of {names[0]}, got {tuple(x.shape)} and {tuple(first.shape)}"
            )


def check_around(length: int, prefix: int, suffix: int) -> None:
    """Checks the numbers of tokens before and after the rotated ones in a sequence of ``length`` tokens.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    for label, value in (("prefix", prefix), ("suffix", suffix)):
        if as_int(value) is None and not isinstance(value, torch.SymInt):
            raise TypeError(f"{label} must be an int, got {value!r}")
        if value < 0:
            raise ValueError(f"{label} must be at least 0, got {value}")
    if prefix + suffix > length:
        raise ValueError(f"prefix and suffix must be at most the {length} tokens, got {prefix} and {suffix}")


def check_token_count(name: str, length: int, prefix: int, count: int, suffix: int) -> None:
    """Checks that prefix, the table's tokens and suffix make up the sequence.

    Raises:
        ValueError: naming the rule, the counts and the remedy.
    """
    if prefix + count + suffix != length:
        raise ValueError(
            f"{name} must have prefix + table tokens + suffix = {prefix} + {count} + {suffix} = "
            f"{prefix + count + suffix} tokens, got {length}; pass the grid, shard, prefix and suffix of this sequence"
        )


def check_positions(positions: torch.Tensor, batch: int, count: int, axes: int, device: torch.device) -> None:
    """Checks ``[1 or B, count, axes]`` int32 rows of a table.

    Raises:
        TypeError, ValueError: naming the rule that is broken.
    """
    if not isinstance(positions, torch.Tensor) or positions.dtype != torch.int32:
        got = positions.dtype if isinstance(positions, torch.Tensor) else type(positions).__name__
        raise TypeError(f"positions must be an int32 tensor, got {got}")
    if positions.ndim != 3 or positions.shape[0] not in (1, batch) or tuple(positions.shape[1:]) != (count, axes):
        raise ValueError(f"positions must have shape [1 or {batch}, {count}, {axes}], got {tuple(positions.shape)}")
    if positions.device != device:
        raise ValueError(f"positions must be on the table's device {device}, got {positions.device}")
    check_memory("positions", positions)


def check_rows(positions: torch.Tensor, blocks: Sequence[tuple[int, int]]) -> None:
    """Checks positions on CPU: each must be a row of its axis, or negative. Reading them on a GPU would wait for it.

    Args:
        positions: ``[1 or B, count, axes]``.
        blocks: first row of each axis, and the row after its last.

    Raises:
        ValueError: a position past the table, or a row of another axis.
    """
    if positions.device.type != "cpu" or not positions.numel() or in_mode():
        return
    if len(blocks) == 1:
        highest = int(positions.max())
        if highest >= blocks[0][1]:
            raise ValueError(
                f"positions must be rows of the table, below {blocks[0][1]}, or negative, got {highest}; "
                "table.positions_at(position) makes them"
            )
        return
    lowest, highest_rows = (ends.tolist() for ends in positions.flatten(0, 1).aminmax(dim=0))
    for axis, (first, end) in enumerate(blocks):
        low, high = lowest[axis], highest_rows[axis]
        if high < end and low >= first:
            continue
        rows = positions[..., axis]
        wrong = rows[(rows >= end) | ((rows >= 0) & (rows < first))]
        if wrong.numel():
            raise ValueError(
                f"positions must be rows of their own axis, {first} to {end - 1} on axis {axis}, or negative, got "
                f"{int(wrong[0])}; table.positions_at(*coordinates) makes them"
            )


def coordinate_rows(
    axis: int, coordinate: object, first: int, end: int, base: int, device: torch.device
) -> torch.Tensor:
    """The int32 rows ``base + coordinate`` of one axis; -1 for a negative coordinate.

    Args:
        axis: the number of the axis, for messages.
        coordinate: an int, or an int32 or int64 tensor ``[S]`` or ``[B, S]`` on ``device``.
        first, end: coordinates are ``first <= c < end``. Others raise on CPU; on other devices they give -1.
        base: the row of coordinate 0.
        device: the device of the table.

    Raises:
        TypeError, ValueError: naming the axis, the rule and the value.
    """
    name = f"coordinates of axis {axis}"
    if not isinstance(coordinate, torch.Tensor):
        number = integer(name, coordinate, -(2**31))
        coordinate = torch.full((1,), min(number, 2**62), dtype=torch.int64, device=device)
    if coordinate.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be ints, or an int32 or int64 tensor, got {coordinate.dtype}")
    if coordinate.ndim not in (0, 1, 2):
        raise ValueError(f"{name} must have shape [S] or [B, S], got {tuple(coordinate.shape)}")
    if coordinate.device != device:
        raise ValueError(f"{name} must be on the table's device {device}, got {coordinate.device}")
    check_memory(name, coordinate)
    inside = (coordinate >= first) & (coordinate < end)
    if device.type == "cpu" and not in_mode():
        wrong = coordinate[~inside & (coordinate >= 0)]
        if wrong.numel():
            raise ValueError(f"{name} must be {first} to {end - 1}, or negative, got {int(wrong[0])}")
    return torch.where(inside, coordinate + base, -1).to(torch.int32).reshape(coordinate.shape or (1,))


def check_norm(
    names: Sequence[str],
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    biases: Sequence[torch.Tensor | None] = (),
) -> None:
    """Checks eps, weights and biases of a norm: None, or ``[D]`` per head, ``[H * D]`` across heads.

    Only a LayerNorm has biases.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    if not isinstance(norm, NormKind):
        raise TypeError(f"norm must be a NormKind, got {norm!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {eps!r}")
    if not 0 <= eps <= _LARGEST_EPS:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    for role, parameters in (("weight", weights), ("bias", biases or [None] * len(xs))):
        for name, x, parameter in zip(names, xs, parameters, strict=True):
            if parameter is None:
                continue
            label = role if len(xs) == 1 else f"{name}_{role}"
            if role == "bias" and not norm.centred:
                raise ValueError(f"{label} must be None for {norm}, got {parameter!r:.60}; only a LayerNorm has a bias")
            _check_parameter(label, parameter, name, x, norm)


def _check_parameter(label: str, parameter: torch.Tensor, name: str, x: torch.Tensor, norm: NormKind) -> None:
    """Checks a weight or bias of the norm of ``x``."""
    size = x.shape[2] * x.shape[3] if norm.across_heads else x.shape[3]
    if not isinstance(parameter, torch.Tensor):
        raise TypeError(f"{label} must be a torch.Tensor or None, got {type(parameter).__name__}")
    if parameter.dtype not in DTYPES:
        raise TypeError(f"{label} must be floating point of 16, 32 or 64 bits, got {parameter.dtype}")
    if tuple(parameter.shape) != (size,):
        raise ValueError(f"{label} must have shape [{size}] for {norm}, got {tuple(parameter.shape)}")
    if parameter.device != x.device:
        raise ValueError(f"{label} must be on the device of {name}, {x.device}, got {parameter.device}")
    check_memory(label, parameter)


def check_inplace(
    names: Sequence[str], xs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor] = (), *, chosen: bool = True
) -> None:
    """Checks that tensors may be overwritten: autograd does not need their values, and no two elements share memory.

    Args:
        names: the names of the arguments.
        xs: the tensors that are overwritten.
        parameters: weights and biases of the norm, which are read.
        chosen: whether the caller passed ``inplace=True``. If not, the function always overwrites, and messages do not
            name that argument.

    Raises:
        ValueError: grad is enabled and a tensor or parameter of the norm requires it; a tensor overlaps itself,
            another tensor or a parameter.
    """
    when, instead = ("when inplace=True", "use inplace=False or") if chosen else ("as it is overwritten", "pass")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*xs, *parameters)):
        if not chosen:
            wanted = " and ".join(name for name, x in zip(names, xs, strict=True) if x.requires_grad)
            raise ValueError(
                f"{wanted} must not require grad where it is overwritten, got a tensor that does; call under "
                "torch.no_grad() where no gradient is wanted"
            )
        raise ValueError(
            f"inplace must be False when {' or '.join(names)} or a weight requires grad, got True; "
            "use inplace=False, or torch.no_grad() where no gradient is wanted"
        )
    if torch.compiler.is_compiling():
        return
    for name, x in zip(names, xs, strict=True):
        if _overlaps_itself(x):
            raise ValueError(
                f"{name} must not share memory between its own elements {when}, got strides "
                f"{x.stride()} for shape {tuple(x.shape)}; {instead} {name}.clone()"
            )
    if len(xs) == 2 and not _disjoint(*xs):
        raise ValueError(
            f"{names[0]} and {names[1]} must not share memory {when.replace('it is', 'they are')}, got overlapping "
            f"views of one storage; {instead} {'clone one of them' if chosen else 'a clone of one of them'}"
        )
    for parameter in parameters:
        for name, x in zip(names, xs, strict=True):
            if not _disjoint(x, parameter):
                raise ValueError(
                    f"{name} must not share memory with a weight or bias {when}, got views of one storage; "
                    f"{instead} {'clone one of them' if chosen else 'a clone of one of them'}"
                )


def _overlaps_itself(x: torch.Tensor) -> bool:
    if x.is_contiguous():
        return False
    span = 1
    for stride, size in sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride < span:
            return True
        span += stride * (size - 1)
    return False


def _disjoint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views, neither of which overlaps itself, share no element.

    Separate ranges of memory are disjoint. So are views whose large strides are all multiples of one period, if their
    remaining extents are separate ranges modulo that period; slices of packed QKV are such views. All other views are
    taken to overlap.
    """
    if a.device.type == "meta" or a.numel() == 0 or b.numel() == 0:
        return True
    a, b = _in_memory(a), _in_memory(b)
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return True
    if a.dtype.itemsize != b.dtype.itemsize:
        return False
    distance = b.storage_offset() - a.storage_offset()
    if distance >= _span(a, None) or -distance >= _span(b, None):
        return True
    for period in {s for x in (a, b) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1 and s > 1}:
        gap = distance % period
        if gap >= _span(a, period) and period - gap >= _span(b, period):
            return True
    return False


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """The tensor inside the wrappers of torch.func, which has memory and the batched dims; ``x`` if not wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _span(x: torch.Tensor, period: int | None) -> int:
    """Elements from the first to the last of ``x``, without dims whose stride is a multiple of ``period``."""
    return 1 + sum(
        stride * (size - 1)
        for stride, size in zip(x.stride(), x.shape, strict=True)
        if period is None or stride % period != 0
    )
