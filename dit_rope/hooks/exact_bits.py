"""Whether a kernel gives the bits of a model's own code, shown on the machine at hand.

Two things cannot be read from the code of a model: the order in which torch adds up a norm, and whether a compiler
joined the multiplications and additions of a rotation. So the first call of a kind runs the model's operations and the
kernel on the same random numbers. Exact mode takes the kernel where all bits are equal.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..rotation import ops
from ..rotation.backends.cos_sin import dense_cos_sin
from ..rotation_args import Norm, RotationArgs
from ..spec import Pairing
from ..torch_state import capturing, in_mode
from .adapter import Layout
from .formats import Format
from .fused_norms import FusedNorm, fused_norm
from .heads import as_heads, from_heads
from .packed_tables import UnfitTable

# In float32 a sum in another order shows in about every third token, in 16 bits in one of thousands: both are tried.
_TOKENS = 64
_MOST_KINDS = 1024

_Shown = TypeVar("_Shown")
SHOWN_NORMS: dict[tuple[object, ...], bool] = {}
"""Whether one pass has the bits of the model, by kind of call."""
SHOWN_ROTATIONS: dict[tuple[object, ...], bool | None] = {}
"""The arithmetic that has them, exact or not, by kind of call; None where neither has."""


def one_pass_is_exact(module: Any, norm: FusedNorm, heads: torch.Tensor, layout: Layout, backend: str) -> bool:
    """Whether a kernel gives the bits of ``module``, a norm of a known class, for tensors such as ``heads``.

    Args:
        module: the norm.
        norm: its numbers, for the dtype of ``heads``.
        heads: what it norms, as ``[B, S, H, D]``.
        layout: the layout in which the module gets that.
        backend: the backend that takes the call.
    """
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (norm.weight, norm.bias))
    kind = (type(module), norm.eps, *dtypes, heads.dtype, heads.device, *heads.shape[2:], layout, backend)
    shown = SHOWN_NORMS.get(kind)
    if shown is None:
        if not _can_be_shown(heads):
            return False
        shown = all(_norms_are_equal(module, heads, dtype, layout, backend) for dtype in {torch.float32, heads.dtype})
        _keep(SHOWN_NORMS, kind, shown)
    return shown


def exact_arithmetic(form: Format, heads: torch.Tensor, args: RotationArgs, backend: str) -> bool | None:
    """The ``RotationArgs.exact`` that gives the bits of a model, for tensors like ``heads``; None if neither does.

    Args:
        form: the form of the model's tables, which is not ``exact``.
        heads: what rotates, ``[B, S, H, D]``.
        args: the rotation.
        backend: the backend that takes the call.

    Raises:
        UnfitTable: it cannot be shown now.
    """
    # Where a thread of a CPU begins decides which numbers take vector instructions, so that shapes and strides count.
    shape = (heads.shape, heads.stride()) if heads.device.type == "cpu" else heads.shape[2:]
    layout = (heads.dtype, heads.device, shape, torch.get_num_threads())
    kind = (form, *layout, args.numbers, args.rows.dtype, args.positions is None, backend)
    if kind not in SHOWN_ROTATIONS:
        if not _can_be_shown(heads):
            raise UnfitTable
        _keep(SHOWN_ROTATIONS, kind, _equal_arithmetic(form, heads, args, backend))
    return SHOWN_ROTATIONS[kind]


def _can_be_shown(x: torch.Tensor) -> bool:
    """Whether numbers can be made, run and read now: not on meta, in a mode, or while a graph is captured."""
    return not (x.is_meta or in_mode() or torch._C._len_torch_dispatch_stack() or capturing(x.device))


def _keep(shown: dict[tuple[object, ...], _Shown], kind: tuple[object, ...], value: _Shown) -> None:
    if len(shown) >= _MOST_KINDS:
        shown.clear()
    shown[kind] = value


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal float32 numbers on the CPU, whatever torch's defaults are; its global generator is not used."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@torch.no_grad()
def _norms_are_equal(module: Any, like: torch.Tensor, dtype: torch.dtype, layout: Layout, backend: str) -> bool:
    """Whether both give the same bits for random numbers of ``dtype``, whose tokens differ in size."""
    if dtype is not like.dtype:
        module = copy.deepcopy(module).to(dtype)
    norm = fused_norm(module, dtype)
    if norm is None:
        return False
    sizes = _random(1, _TOKENS, 1, 1, seed=1).clamp(-1, 1).mul(6).exp2()
    x = from_heads((_random(1, _TOKENS, *like.shape[2:]) * sizes).to(like.device, dtype), layout)
    heads = as_heads(x, layout, like.shape[3])
    identity = (
        torch.tensor([1.0, 0.0], dtype=torch.float32, device=like.device)[:, None, None]
        .expand(2, _TOKENS, 1)
        .contiguous()
    )
    args = RotationArgs.of_rows(identity, None, (1,), _TOKENS, Pairing.INTERLEAVED, exact=True)
    kind = norm.kind(layout is Layout.BSC)
    applied = Norm.of([heads], kind, norm.eps, [norm.weight], [norm.bias], norm.rounding)
    (normed,) = ops.rotate([heads], args, applied, backend=backend)
    return torch.equal(normed, as_heads(module(x), layout, like.shape[3]))


@torch.no_grad()
def _equal_arithmetic(form: Format, like: torch.Tensor, args: RotationArgs, backend: str) -> bool | None:
    """``RotationArgs.exact`` with which a kernel has the bits of ``form.formula``, for random numbers like ``like``."""
    if form.formula is None:
        return None
    if like.device.type != "cpu":  # the bits of a GPU do not depend on where a number stands: few tokens show them
        like = like.new_empty(1, _TOKENS, *like.shape[2:])
        angles = _random(_TOKENS, sum(args.pairs), seed=1)
        rows = torch.stack((angles.cos(), angles.sin())).to(args.rows)
        args = RotationArgs.of_rows(rows, None, (sum(args.pairs),), _TOKENS, args.pairing)
    numbers = _random(*like.shape)
    cos, sin = dense_cos_sin(args, *like.shape[1:3])
    equal = {False, True}
    for dtype in {torch.float32, like.dtype}:  # 16 bits hide most differences of what is rounded to them
        x = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device).copy_(numbers)
        expected = form.formula(x, cos, sin)
        for exact in list(equal):
            (rotated,) = ops.rotate([x], replace(args, exact=exact), backend=backend)
            if not torch.equal(rotated, expected):
                equal.remove(exact)
    return min(equal, default=None)  # fast arithmetic where both have them
