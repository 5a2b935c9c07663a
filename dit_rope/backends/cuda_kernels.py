"""The rotation, and a norm with rotation, as one CUDA C++ launch on an NVIDIA GPU.

This module decides whether the kernel of ``kernels/rope.cu`` can take a call, and remembers its launch per layout.
:mod:`dit_rope.backends.cuda_plan` chooses the constants it is compiled for, :mod:`dit_rope.backends.cuda_arguments`
packs what it is launched with, :mod:`dit_rope.backends.cuda_launch` compiles and launches it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import torch

from ..rotation_args import RotationArgs
from ..spec import NormKind, Pairing
from .cuda_arguments import POINTERS, Launch, pack_numbers
from .cuda_plan import MAX_HELD, WARP, Plan, Signature, deal_threads, plan_for, tuned_shape
from .cuda_tuning import Tuning, device_name, tuning_for
from .gpu_calls import (
    ACCESS_BYTES,
    COMMON,
    Call,
    Constraint,
    Norm,
    batch_entries,
    first_reason,
    keeps_still,
    shared_strides,
)

MIN_CAPABILITY = (8, 0)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_GRID_ROWS = 65_535
MAX_LAUNCHES = 1024

_launches: dict[object, Launch] = {}
_forced: Tuning | None = None


def declined(xs: Sequence[torch.Tensor], args: RotationArgs, norm: NormKind | None = None) -> str | None:
    """Why this backend cannot rotate ``xs`` (or, with ``norm``, norm and rotate them), or None when it can.

    The shapes of ``xs``, ``[B, S, H, D]``, and what ``args`` says of them are taken as validated.
    """
    return first_reason(CONSTRAINTS, Call(xs, args, norm))


def rotate(xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor]) -> None:
    """Rotates one or two tensors ``xs[i]`` ``[B, S, H_i, D]`` into ``outs[i]``, in one launch on the current stream.

    Every element of ``outs`` is written; ``outs`` may be ``xs``, which are then turned in place (and must be, with
    ``args.entries``). float16, bfloat16 or float32 data; float32 arithmetic, rounded once, and with the model's own
    roundings when ``args.exact``. The caller has made sure that :func:`declined` gives no reason.
    """
    _launch(xs, args, outs, None)


def norm_rotate(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] = (),
) -> None:
    """Norm of one or two tensors ``xs[i]`` ``[B, S, H_i, D]``, then their rotation, into ``outs[i]``, in one launch.

    One read and one write of the data; float32 arithmetic, rounded once. Unturned tokens and channels are normed too.
    ``weights[i]`` is ``[D]`` per head or ``[H_i * D]`` across heads, or all are None, and so is ``biases[i]``. ``outs``
    may be ``xs``.
    """
    added = [_readable(bias) for bias in biases] if biases else ()
    _launch(xs, args, outs, Norm(norm, [_readable(weight) for weight in weights], eps, added))


def launch_of(
    xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor], norm: Norm | None = None
) -> tuple[Launch, bytes]:
    """The launch of one call, the same object for equal layouts, and its pointers; the call is not validated."""
    x, y, out, y_out = xs[0], xs[-1], outs[0], outs[-1]
    rows, positions, entries = args.rows, args.positions, args.entries
    pointers = [x.data_ptr(), out.data_ptr(), 0, 0, y.data_ptr(), y_out.data_ptr(), 0, 0, rows.data_ptr(), 0, 0]
    if positions is not None:
        pointers[9] = positions.data_ptr()
    if entries is not None:
        pointers[10] = entries.data_ptr()
    key = (
        len(xs), x.dtype, x.shape, x.stride(), out.stride(), y.shape, y.stride(), y_out.stride(),
        args.numbers, rows.shape, rows.stride(), rows.dtype,
        None if positions is None else (positions.shape, positions.stride()),
        None if entries is None else entries.shape,
        None if norm is None else _norm_key(norm, pointers),
        (pointers[0] | pointers[1] | pointers[4] | pointers[5]) % ACCESS_BYTES,
        args.head_rows and pointers[8] % ACCESS_BYTES,
        pointers[0] == pointers[1], pointers[4] == pointers[5],
    )  # fmt: skip
    launch = _launches.get(key) if _forced is None else make_launch(xs, args, outs, norm)
    if launch is None:
        if len(_launches) >= MAX_LAUNCHES:
            _launches.clear()
        launch = _launches[key] = make_launch(xs, args, outs, norm)
    return launch, POINTERS.pack(*pointers)


def _norm_key(norm: Norm, pointers: list[int]) -> tuple[object, ...]:
    """What tells the launch of a norm from others; puts its weights and biases into ``pointers``."""
    weights = norm.given
    if weights:
        pointers[2], pointers[6] = weights[0].data_ptr(), weights[-1].data_ptr()
    dtypes = tuple([weight.dtype for weight in weights])
    if not norm.biases:
        return (norm.kind, norm.eps, dtypes, (pointers[2] | pointers[6]) % ACCESS_BYTES)
    biases = norm.added
    if biases:
        pointers[3], pointers[7] = biases[0].data_ptr(), biases[-1].data_ptr()
    alignment = (pointers[2] | pointers[3] | pointers[6] | pointers[7]) % ACCESS_BYTES
    return (norm.kind, norm.eps, dtypes, alignment, *[bias.dtype for bias in biases])


def make_launch(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    norm: Norm | None = None,
    tuning: Tuning | None = None,
) -> Launch:
    """The launch of one call, made anew, with the choices of ``tuning`` or with those measured for its device."""
    plan = plan_of(xs, args, outs, norm, tuning)
    batch, tokens = batch_entries(xs, args), xs[0].shape[1]
    rows = min(batch, MAX_GRID_ROWS)
    blocks = -(-tokens // plan.tokens) * (2 if plan.split else 1)
    if plan.stages:  # blocks that stay, as many as the device holds at once
        blocks = min(blocks, max(1, _processors(xs[0].device) * max(1, plan.min_blocks) // batch))
    return Launch(plan, (blocks, rows, -(-batch // rows)), pack_numbers(xs, args, outs, norm, batch))


def plan_of(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    norm: Norm | None = None,
    tuning: Tuning | None = None,
) -> Plan:
    """The constants that the kernel is compiled for in one call; the call is not validated.

    Nothing in it depends on the number of tokens, the batch, or where in the grid a token stands.
    """
    weights, biases = ([], []) if norm is None else (norm.given, norm.added)
    signature = replace(
        _signature(Call(xs, args, norm.kind if norm else None)),
        weights=_dtypes(weights),
        biases=_dtypes(biases),
        keep_still=keeps_still(xs, outs, norm),
        alignment=_alignment([*xs, *outs]),
        weight_alignment=_alignment([*weights, *biases]),
        table_alignment=_alignment([args.rows]) if args.head_rows else ACCESS_BYTES,
    )
    tuning = tuning or _forced or tuning_for(tuned_shape(signature, device_name(xs[0].device)))
    return plan_for(signature, tuning)


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """Calls inside, on any thread, have these choices, whatever was measured; what they launch is not remembered."""
    global _forced
    before, _forced = _forced, tuning
    try:
        yield
    finally:
        _forced = before


def prepare(plans: Iterable[Plan], device: torch.device) -> None:
    """Compiles the kernels of ``plans`` side by side, so that their first calls on ``device`` need not wait for it."""
    _launcher().prepare(plans, device)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _dtypes(tensors: Sequence[torch.Tensor]) -> tuple[torch.dtype, ...]:
    return tuple([tensor.dtype for tensor in tensors])


def _signature(call: Call) -> Signature:
    """The signature of a call without weights and biases, out of place, aligned."""
    xs, args = call.xs, call.args
    return Signature(
        data=xs[0].dtype,
        table=args.rows.dtype,
        weights=(),
        biases=(),
        heads=tuple(x.shape[2] for x in xs),
        head_dim=xs[0].shape[3],
        pairs=args.pairs,
        half=args.pairing is Pairing.HALF,
        exact=args.exact,
        norm=call.norm,
        own_angles=args.head_rows != 0,
        keep_still=False,
        some_entries=args.entries is not None,
        alignment=ACCESS_BYTES,
        weight_alignment=ACCESS_BYTES,
        table_alignment=ACCESS_BYTES,
    )


def _launch(xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor], norm: Norm | None) -> None:
    if xs[0].numel() == 0 or batch_entries(xs, args) == 0:
        return
    if args.entries is not None and not args.entries.is_contiguous():
        args = replace(args, entries=args.entries.contiguous())
    _launcher().run(*launch_of(xs, args, outs, norm), xs[0].device)


@functools.cache
def _launcher() -> ModuleType:
    """What needs the CUDA bindings, imported when the first call is made."""
    from . import cuda_launch

    return cuda_launch


def _readable(weight: torch.Tensor | None) -> torch.Tensor | None:
    if weight is None or (weight.dtype in WEIGHT_DTYPES and weight.is_contiguous()):
        return weight
    return (weight if weight.dtype in WEIGHT_DTYPES else weight.float()).contiguous()


def _alignment(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes, up to 16, that every row of the last dim of every tensor is aligned to."""
    bits = ACCESS_BYTES
    for tensor in tensors:
        bits |= tensor.data_ptr()
        for stride in shared_strides(tensor, tensor.ndim - 1):
            bits |= stride * tensor.element_size()
    return bits & -bits


def _is_even(call: Call) -> bool:
    half = call.args.pairing is Pairing.HALF
    return call.xs[0].shape[3] % 2 == 0 and not (half and sum(call.args.pairs) % 2)


def _fits_threads(call: Call) -> bool:
    signature = _signature(call)
    threads = deal_threads(signature)
    whole = signature.head_dim % threads.chunk == 0 and not (signature.half and sum(signature.pairs) % threads.chunk)
    one_warp = call.norm is None or call.norm.across_heads or threads.lanes <= WARP
    return whole and one_warp and threads.held <= MAX_HELD


@functools.cache
def _why_no_device(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return f"device must be an NVIDIA GPU, got {device}"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"compute capability must be at least {'.'.join(map(str, MIN_CAPABILITY))}, got {capability}"
    missing = [name for name in ("cuda.core", "cuda.bindings") if not _is_installed(name)]
    return f"{' and '.join(missing)} must be installed; pip install 'dit-rope[cuda]'" if missing else None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that holds it
        return False


CONSTRAINTS = (
    Constraint(
        lambda call: _why_no_device(call.xs[0].device) is None,
        lambda call: str(_why_no_device(call.xs[0].device)),
    ),
    *COMMON,
    Constraint(
        _is_even,
        lambda call: (
            f"head dim, and the pairs of half pairing, must be even, got {call.xs[0].shape[3]} and "
            f"{sum(call.args.pairs)}"
        ),
    ),
    Constraint(
        _fits_threads,
        lambda call: (
            f"the heads of a token must fit the registers of one block, got {[x.shape[2] for x in call.xs]} heads "
            f"of {call.xs[0].shape[3]} channels"
        ),
    ),
)
