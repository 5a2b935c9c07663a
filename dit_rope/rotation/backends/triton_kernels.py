"""The rotation, and a norm with rotation, as one Triton launch: NVIDIA, AMD and Intel GPUs, or Triton's interpreter.

This module decides whether Triton can take a call, and packs the call into the arguments of the one kernel in
:mod:`dit_rope.rotation.backends.triton_device`, which is imported, with Triton, on first use.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...rotation_args import Memo, Norm, RotationArgs
from ...spec import MAX_AXES, NormKind, Pairing
from .gpu_calls import (
    ACCESS_BYTES,
    COMMON,
    Call,
    Constraint,
    batch_entries,
    first_reason,
    power_of_two,
    rotated_tokens,
    shared_strides,
    skips_unrotated,
)

DEVICE_TYPES = ("cuda", "xpu", "hip")
# Padded channels of a token that a norm across heads keeps in registers: at most 64 a thread of 8 warps.
MAX_NORM_ROW = 16384
MAX_TABLE_ELEMENTS = 2**31 - 1

# Lanes of a warp; AMD's server GPUs have 64. A tile with fewer elements than its lanes want narrows their accesses.
WARP_LANES = 64 if torch.version.hip else 32
MAX_WARPS = 8


@dataclass(frozen=True)
class _Tile:
    """The shape of one program: heads of a tile, tokens, warps, and padded pairs and tail channels."""

    heads: int
    tokens: int
    warps: int
    padded: int
    tail: int


def declined(xs: Sequence[torch.Tensor], args: RotationArgs, norm: NormKind | None = None) -> str | None:
    """Why this backend cannot rotate ``xs`` (or, with ``norm``, norm and rotate them), or None when it can.

    The shapes of ``xs``, ``[B, S, H, D]``, and what ``args`` says of them are taken as validated.
    """
    return first_reason(CONSTRAINTS, Call(xs, args, norm))


def rotate(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    norm: Norm | None = None,
    memo: Memo | None = None,
) -> None:
    """Rotates one or two tensors ``xs[i]`` ``[B, S, H_i, D]`` into ``outs[i]``, after ``norm``, in one launch.

    One read and one write of the data: every element of ``outs`` is written, and ``outs`` may be ``xs``, which are then
    rotated in place (and must be, with ``args.entries``). float16, bfloat16 or float32 data; float32 arithmetic,
    rounded once, and with the model's own roundings when ``args.exact`` and where ``norm`` says so. A norm covers
    unrotated tokens and channels too; its weights and biases may have any float dtype. Calls that share a ``memo`` must
    be alike in all but the addresses of their tensors, and whether they are in place.

    Raises:
        ValueError: when :func:`declined` gives a reason.
    """
    key = tuple([x.data_ptr() == out.data_ptr() for x, out in zip(xs, outs, strict=True)])
    launch = None if memo is None else memo.get(key)
    tensors = _tensors(xs, args, outs, norm)
    if launch is None:
        reason = declined(xs, args, norm.kind if norm else None)
        if reason is not None:
            raise ValueError(f"the Triton backend cannot take this call: {reason}")
        programs, arguments, options = launch_arguments(xs, args, outs, norm)
        launch = (programs, {name: value for name, value in arguments.items() if name not in tensors} | options)
        if memo is not None:
            memo[key] = launch
    programs, numbers = launch
    if programs == 0:
        return
    from .triton_device import norm_rotate_kernel

    with _on_device(xs[0].device):
        norm_rotate_kernel[(programs,)](**tensors, **numbers)


def launch_arguments(
    xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor], norm: Norm | None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Size of the grid, arguments and compile options of the kernel for one call; the call is not validated.

    Everything that varies with length, position or address is a run-time argument: Triton compiles for the constants,
    the dtypes, and whether the pointers are 16-byte aligned.
    """
    tokens, dim = xs[0].shape[1], xs[0].shape[3]
    skip_unrotated = skips_unrotated(xs, outs, norm)
    width = 2 * sum(args.pairs) if skip_unrotated else dim
    tile = _tile(xs, args, width, norm)
    align = math.gcd(ACCESS_BYTES // xs[0].element_size(), *(s for x in (*xs, *outs) for s in shared_strides(x, 3)))
    arguments = {
        **_tensors(xs, args, outs, norm),
        **_tensor_arguments(xs, outs, align),
        **_table_arguments(args, tokens),
        **_entry_arguments(args, xs[0].shape[0]),
        "tokens": tokens,
        "eps": norm.eps if norm else 0.0,
        "TILE": tile.heads,
        "TOKENS": tile.tokens,
        "DIM": dim,
        "WIDTH": width,
        "BOUNDS": tuple(sum(args.pairs[:a]) for a in range(len(args.pairs) + 1)),
        "AXES": len(args.pairs),
        "PADDED": tile.padded,
        "TAIL": tile.tail,
        "HALF": args.pairing is Pairing.HALF,
        "INVERSE": args.inverse,
        "EXACT": args.exact,
        "SKIP_UNROTATED": skip_unrotated,
        "ALIGN": align,
        "NORM": "none" if norm is None else "across_heads" if norm.kind.across_heads else "per_head",
        "CENTRED": norm is not None and norm.kind.centred,
        "ROUNDING": norm.rounding.value if norm else "none",
        "OWN_ANGLES": args.head_rows != 0,
    }
    # One stage: loads go to registers at once; a software pipeline would take them through shared memory.
    options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": not args.exact}
    return batch_entries(xs, args) * -(-tokens // tile.tokens), arguments, options


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def cache_problem() -> str | None:
    """Why Triton's cache on disk is unsafe, or None: Triton runs the machine code in it, which others may have written.

    Makes a folder that does not exist yet, for the user alone.
    """
    if not hasattr(os, "geteuid"):  # Windows
        return None
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME") or "~", ".triton", "cache"))
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # a folder that cannot be made holds no code, and Triton reports it
        return None
    writable = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid())
    if status.st_uid in (os.geteuid(), 0) and not writable:
        return None
    return (
        f"Triton's cache folder must belong to this user, and others must not write to it, got {folder} of user "
        f"{status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}; set TRITON_CACHE_DIR to a private folder"
    )


def _interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, as decided when their module was imported."""
    if not os.environ.get("TRITON_INTERPRET"):
        return False
    from triton import JITFunction

    from .triton_device import norm_rotate_kernel

    return not isinstance(norm_rotate_kernel, JITFunction)


def _takes(device: torch.device) -> bool:
    return device.type in DEVICE_TYPES or (device.type == "cpu" and _interpreting())


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` current: Triton launches on the current device, whatever the tensors' is."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)  # type: ignore[no-any-return]


def _tile(xs: Sequence[torch.Tensor], args: RotationArgs, width: int, norm: Norm | None) -> _Tile:
    """Chooses the tile of one program by shape alone, so that a new length compiles nothing.

    Every lane has 16 bytes of a row; a row read in two halves takes half as many lanes.

    Rotation and norm per head: 4 warps along tokens, so that a thread has the cos and sin of a single token, and 4
    accesses of a thread in flight (4 heads; 2 in half pairing, which reads two parts of each, and 2 with a table for
    each head, which is read too). At the 64 registers of the plain rotation 8 programs share a multiprocessor, with
    64 kB in flight, twice what covers memory's latency.

    Norm across heads: a program has all heads of a token, in parts of 8 (or 4, where 8 would pad the heads by more),
    and as many warps as one part fills: 24 and 40 heads of 128 are 3 and 5 parts for 4 warps, with no lane idle.
    """
    heads = max(x.shape[2] for x in xs)
    half = args.pairing is Pairing.HALF
    padded = power_of_two(sum(args.pairs) if half else -(-width // 2))
    rest = width - 2 * sum(args.pairs)
    tail = power_of_two(rest) if half and rest else 0
    row_lanes = (padded if half else 2 * padded) * xs[0].element_size() // ACCESS_BYTES
    if norm is not None and norm.kind.across_heads:
        tile = min(power_of_two(heads), 4 if 0 < heads % 8 <= 4 and heads <= 32 else 8)
        warps = min(max(tile * row_lanes // WARP_LANES, 1), MAX_WARPS)
        tokens = max(warps * WARP_LANES // max(tile * row_lanes, 1), 1)
    else:
        in_flight = 4 if norm is None and not half and not args.head_rows else 2
        tile, warps = min(power_of_two(heads), in_flight), 4
        tokens = max(warps * WARP_LANES // max(row_lanes, 1), 1)
    return _Tile(heads=tile, tokens=tokens, warps=warps, padded=padded, tail=tail)


def _tensors(
    xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor], norm: Norm | None
) -> dict[str, Any]:
    """The tensors that the kernel reads and writes, None for those that a call lacks."""
    weights, biases = (norm.weights, norm.biases) if norm else ((), ())
    tensors: dict[str, Any] = {"rows": args.rows, "positions": args.positions, "entries": args.entries}
    for i, name in enumerate("qk"):
        tensors[name], tensors[f"{name}_out"] = (xs[i], outs[i]) if i < len(xs) else (None, None)
        for kind, parameters in (("weight", weights), ("bias", biases)):
            tensors[f"{name}_{kind}"] = parameters[i].contiguous() if i < len(parameters) else None
    return tensors


def _tensor_arguments(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], align: int) -> dict[str, Any]:
    """Strides in units of ``align`` elements, and head counts, of q and k; none of a missing k."""
    arguments: dict[str, Any] = {}
    for i, name in enumerate("qk"):
        x, out = (xs[i], outs[i]) if i < len(xs) else (None, None)
        arguments[f"{name.upper()}_HEADS"] = 0 if x is None else x.shape[2]
        for side, tensor in ((name, x), (f"{name}_out", out)):
            strides = (0, 0, 0) if tensor is None else shared_strides(tensor, 3)
            for dim, stride in zip(("batch", "token", "head"), strides, strict=True):
                arguments[f"{side}_{dim}"] = stride // align
    return arguments


def _table_arguments(args: RotationArgs, tokens: int) -> dict[str, Any]:
    """The rows of each token: the tables, the positions or the grid, and which tokens rotate."""
    strides: tuple[int, ...] = (0, 0, 0)
    firsts, spans = [0] * MAX_AXES, [1] * MAX_AXES
    token_offset = 0  # with positions it may be too large for the kernel, which ignores it
    if args.positions is not None:
        strides = shared_strides(args.positions, 3)
    else:
        token_offset = args.token_offset
        for a, first in enumerate(args.first_rows):
            firsts[a], spans[a] = first, math.prod(args.sizes[a + 1 :])
    align = math.gcd(ACCESS_BYTES // args.rows.element_size(), *args.rows.stride()[:2]) if args.head_rows else 1
    return {
        "rows_plane": args.rows.stride(0) // align,
        "rows_row": args.rows.stride(1) // align,
        "head_rows": args.head_rows,
        "TABLE_ALIGN": align,
        **dict(zip(("positions_batch", "positions_token", "positions_axis"), strides, strict=True)),
        "row_count": args.rows.shape[1],
        "prefix": args.prefix,
        "rotated_tokens": rotated_tokens(args, tokens),
        "token_offset": token_offset,
        **{f"span{a}": spans[a] for a in range(MAX_AXES - 1)},
        **{f"first{a}": firsts[a] for a in range(MAX_AXES)},
    }


def _entry_arguments(args: RotationArgs, batch: int) -> dict[str, Any]:
    """Which of the ``batch`` entries of the tensors rotate."""
    return {
        "entries_batch": 0 if args.entries is None else args.entries.stride(0),
        "entry_count": batch,
    }


def _norm_row(call: Call) -> int:
    """Channels of a token, heads and channels padded to powers of two, as a norm across heads keeps them."""
    return power_of_two(max(x.shape[2] for x in call.xs)) * power_of_two(call.xs[0].shape[3])


CONSTRAINTS = (
    Constraint(lambda call: _has_triton(), lambda call: "triton is not installed"),
    Constraint(
        lambda call: _takes(call.xs[0].device),
        lambda call: (
            f"device must be a GPU ({', '.join(DEVICE_TYPES)}), got {call.xs[0].device}; the CPU needs "
            "TRITON_INTERPRET=1"
        ),
    ),
    Constraint(
        lambda call: call.xs[0].device.type == "cpu" or cache_problem() is None,
        lambda call: str(cache_problem()),
    ),
    *COMMON,
    Constraint(
        lambda call: call.args.rows.numel() <= MAX_TABLE_ELEMENTS,
        lambda call: f"tables must have fewer than 2**31 elements, got {call.args.rows.numel()}",
    ),
    Constraint(
        lambda call: call.norm is None or not call.norm.across_heads or _norm_row(call) <= MAX_NORM_ROW,
        lambda call: (
            f"a norm across heads must have at most {MAX_NORM_ROW} channels, padded to powers of two, got "
            f"{_norm_row(call)}"
        ),
    ),
)
