"""The rotation, and a norm with rotation, as one CUDA C++ launch on an NVIDIA GPU.

This module decides whether the kernel of ``kernels/rope.cu`` can take a call, and remembers its launch per layout.
``cuda_plan`` chooses the constants it is compiled for, ``cuda_arguments`` packs what it is launched with,
``cuda_launch`` compiles and launches it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import torch

from ...rotation_args import Memo, Norm, NormRounding, RotationArgs
from ...spec import NormKind, Pairing
from .cuda_arguments import POINTERS, Launch, pack_numbers
from .cuda_plan import MAX_HELD, WARP, Plan, Signature, distribute, plan_for, tuned_shape
from .cuda_tuning import Tuning, device_name, tuning_for
from .gpu_calls import (
    ACCESS_BYTES,
    COMMON,
    Call,
    Constraint,
    batch_entries,
    first_reason,
    shared_strides,
    skips_unrotated,
)

MIN_CAPABILITY = (8, 0)
MIN_CUDA_CORE = (0, 6)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_GRID_ROWS = 65_535

_forced: Tuning | None = None


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

    One read and one write of the data, on the current stream: every element of ``outs`` is written, and ``outs`` may be
    ``xs``, which are then rotated in place (and must be, with ``args.entries``). float16, bfloat16 or float32 data;
    float32 arithmetic, rounded once, and with the model's own roundings when ``args.exact`` and where ``norm`` says so.
    A norm covers unrotated tokens and channels too. The caller has made sure that :func:`declined` gives no reason.
    Calls that share a ``memo`` must be alike in all but the addresses of their tensors, and whether they are in place.
    """
    if norm is not None:
        norm = _readable(norm)
    if args.entries is not None and not args.entries.is_contiguous():
        args = replace(args, entries=args.entries.contiguous())
    launch, pointers = launch_of(xs, args, outs, norm, memo)
    if launch.shape:
        _launcher().run(launch, pointers, xs[0].device)


def launch_of(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    norm: Norm | None = None,
    memo: Memo | None = None,
) -> tuple[Launch, bytes]:
    """The launch of one call, and its pointers; the call is not validated.

    Calls that share a ``memo`` get one launch for each alignment of their addresses, in place and out of place.
    """
    x, out, y, y_out = xs[0].data_ptr(), outs[0].data_ptr(), xs[-1].data_ptr(), outs[-1].data_ptr()
    rows = args.rows.data_ptr()
    positions = 0 if args.positions is None else args.positions.data_ptr()
    entries = 0 if args.entries is None else args.entries.data_ptr()
    weight = bias = y_weight = y_bias = 0
    if norm is not None:
        weight, y_weight = _ends(norm.weights)
        bias, y_bias = _ends(norm.biases)
    pointers = POINTERS.pack(x, out, weight, bias, y, y_out, y_weight, y_bias, rows, positions, entries)
    if memo is None or _forced is not None:
        return make_launch(xs, args, outs, norm), pointers
    data, parameters = (x | out | y | y_out) % ACCESS_BYTES, (weight | bias | y_weight | y_bias) % ACCESS_BYTES
    key = (data, parameters, rows % ACCESS_BYTES, x == out, y == y_out)
    launch = memo.get(key)
    if launch is None:
        launch = memo[key] = make_launch(xs, args, outs, norm)
    return launch, pointers


def _ends(parameters: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Addresses of the first and the last weight or bias, 0 where there are none."""
    return (parameters[0].data_ptr(), parameters[-1].data_ptr()) if parameters else (0, 0)


def make_launch(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    norm: Norm | None = None,
    tuning: Tuning | None = None,
) -> Launch:
    """A new launch of one call, with the choices of ``tuning``, else with those measured for its device."""
    plan = plan_of(xs, args, outs, norm, tuning)
    batch, tokens = batch_entries(xs, args), xs[0].shape[1]
    rows = min(batch, MAX_GRID_ROWS)
    blocks = -(-tokens // plan.tokens) * (2 if plan.split else 1)
    if plan.stages:  # persistent blocks, as many as the device holds at once
        blocks = min(blocks, max(1, _processors(xs[0].device) * max(1, plan.min_blocks) // max(batch, 1)))
    return Launch(plan, (blocks, rows, -(-batch // max(rows, 1))), pack_numbers(xs, args, outs, norm, batch))


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
    weights, biases = ((), ()) if norm is None else (norm.weights, norm.biases)
    signature = replace(
        _signature(Call(xs, args, norm.kind if norm else None)),
        weights=_dtypes(weights),
        biases=_dtypes(biases),
        rounding=norm.rounding if norm else NormRounding.NONE,
        skip_unrotated=skips_unrotated(xs, outs, norm),
        alignment=_alignment([*xs, *outs]),
        weight_alignment=_alignment([*weights, *biases]),
        table_alignment=_alignment([args.rows]) if args.head_rows else ACCESS_BYTES,
    )
    tuning = tuning or _forced or tuning_for(tuned_shape(signature, device_name(xs[0].device)))
    return plan_for(signature, tuning)


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """Calls inside, on any thread, use these choices instead of the measured ones; their launches are not kept."""
    global _forced
    before, _forced = _forced, tuning
    try:
        yield
    finally:
        _forced = before


def prepare(plans: Iterable[Plan], device: torch.device) -> None:
    """Compiles the kernels of ``plans`` in parallel, so that their first calls on ``device`` do not wait.

    A kernel that fails is compiled again by its first call, which raises the error.
    """
    _launcher().prepare(plans, device)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _dtypes(tensors: Sequence[torch.Tensor]) -> tuple[torch.dtype, ...]:
    return tuple([tensor.dtype for tensor in tensors])


def _signature(call: Call) -> Signature:
    """The signature of a call without weights, biases and rounding of its norm, out of place, aligned."""
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
        rounding=NormRounding.NONE,
        own_angles=args.head_rows != 0,
        skip_unrotated=False,
        some_entries=args.entries is not None,
        alignment=ACCESS_BYTES,
        weight_alignment=ACCESS_BYTES,
        table_alignment=ACCESS_BYTES,
    )


@functools.cache
def _launcher() -> ModuleType:
    """The module that needs the CUDA bindings, imported by the first call."""
    from . import cuda_launch

    return cuda_launch


def _readable(norm: Norm) -> Norm:
    """``norm`` with weights and biases that a kernel can read: the same where it can read those that it has."""
    if all(map(_is_readable, norm.weights)) and all(map(_is_readable, norm.biases)):
        return norm
    weights, biases = (
        [(x if x.dtype in WEIGHT_DTYPES else x.float()).contiguous() for x in parameters]
        for parameters in (norm.weights, norm.biases)
    )
    return norm._replace(weights=weights, biases=biases)


def _is_readable(parameter: torch.Tensor) -> bool:
    return parameter.dtype in WEIGHT_DTYPES and parameter.is_contiguous()


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
    threads = distribute(signature)
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
    if missing:
        return f"{' and '.join(missing)} must be installed; pip install 'dit-rope[cuda]'"
    version = _version("cuda-core")
    if version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) < MIN_CUDA_CORE:
        least = ".".join(map(str, MIN_CUDA_CORE))
        return f"cuda-core must be at least {least}, got {version}; pip install 'dit-rope[cuda]'"
    return None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is not installed
        return False


def _version(distribution: str) -> str | None:
    """Version of a distribution, or None without its metadata."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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
