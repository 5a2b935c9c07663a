"""The public functions that rotate queries and keys: they check their arguments, then call :func:`.ops.rotate`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..rotation_args import Norm, NormRounding, RotationArgs, layout_of
from ..scalars import check_flags
from ..spec import NormKind
from ..tables.table import RopeTable
from ..torch_state import in_level, in_mode
from ..validation import (
    check_around,
    check_inplace,
    check_norm,
    check_positions,
    check_rows,
    check_tensors,
    check_token_count,
)
from . import autograd as autograd  # registers the derivatives of the operators
from . import derivatives, ops
from .choice import Choice, check_backend, remembered_choice
from .rounding import Rounding, rounding_of

# Valid layouts of calls that a table remembers; a model has a few.
_MAX_REMEMBERED = 64

# Torch's own norms round their result alone.
_NORM_ROUNDINGS = {Rounding.MODEL: NormRounding.RESULT, Rounding.FAST: NormRounding.NONE}

_Parameters = tuple[torch.Tensor | None, ...]
_NormArguments = tuple[NormKind, float, _Parameters, _Parameters]
"""Kind, eps, and the weights and biases of each tensor as the caller passed them, unchecked; () without biases."""


def rotate(
    x: torch.Tensor,
    table: RopeTable,
    *,
    prefix: int = 0,
    suffix: int = 0,
    positions: torch.Tensor | None = None,
    inverse: bool = False,
    inplace: bool = False,
    exact: bool = False,
    rounding: Rounding | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotates one tensor, as :func:`rotate_qk` does two.

    Args:
        x: ``[B, S, H, D]``, last dim contiguous, any outer strides; the rest as in :func:`rotate_qk`.

    Returns:
        A new tensor, or ``x`` itself when ``inplace``.

    Example:
        >>> import torch, dit_rope
        >>> table = dit_rope.rope_table(dit_rope.RopeSpec((8, 4, 4)), dit_rope.Grid(2, 3, 4))
        >>> x = torch.randn(1, 24, 2, 16)
        >>> rotated = dit_rope.rotate(x, table)
        >>> torch.allclose(dit_rope.rotate(rotated, table, inverse=True), x, atol=1e-6)
        True
    """
    mode = rounding_of(exact, rounding)
    return _rotate(("x",), (x,), table, prefix, suffix, positions, inverse, mode, inplace, backend)[0]


def rotate_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    table: RopeTable,
    *,
    prefix: int = 0,
    suffix: int = 0,
    positions: torch.Tensor | None = None,
    inverse: bool = False,
    inplace: bool = False,
    exact: bool = False,
    rounding: Rounding | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys by the positions of a token grid (RoFormer, arXiv:2104.09864), in one launch.

    Args:
        q, k: ``[B, S, H, D]``, each with its own H, last dim contiguous, any outer strides; float32, float16,
            bfloat16 or float64. Channels past the table's rotary_dim are copied.
        table: from :func:`~dit_rope.rope_table`, on the same device, shared by the batch.
        prefix, suffix: tokens before and after the grid's (text), which are copied;
            ``prefix + table.count + suffix`` must be S.
        positions: ``[1 or B, S - prefix - suffix, axes]`` int32 rows of ``table.rows``, as ``table.positions()`` and
            ``table.positions_at(...)`` return them, for tokens in another order or number than the table's. A negative
            row leaves the pairs of its axis unrotated. On a CPU the rows are checked: one of another axis is refused.
            They are checked again after a write that torch counts; it does not count writes through ``.data`` or numpy.
        inverse: rotate backwards.
        inplace: overwrite q and k. Refused where a gradient is wanted.
        exact: the same as ``rounding=Rounding.EXACT`` (True) or ``Rounding.FAST`` (False).
        rounding: where results are rounded. ``Rounding.EXACT`` gives the bits of the model's eager code: products are
            rounded before they are added, in the dtype that the data and the table promote to; without a norm
            ``Rounding.MODEL`` does too. ``Rounding.FAST`` computes in float32 (float64 for float64 data) and rounds
            once. None leaves it to ``exact``.
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"eager"``. A named backend rotates or is refused. Under
            torch.func and with dual numbers torch's own operations rotate, whatever the backend.

    Returns:
        New tensors ``(q, k)``, or the same objects when ``inplace``.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        Five tokens of text stand before the 24 of the grid:

        >>> import torch, dit_rope
        >>> table = dit_rope.rope_table(dit_rope.RopeSpec((8, 4, 4)), dit_rope.Grid(2, 3, 4))
        >>> q, k = torch.randn(2, 1, 5 + 24, 4, 16)
        >>> q_rotated, k_rotated = dit_rope.rotate_qk(q, k, table, prefix=5)
        >>> torch.equal(q_rotated[:, :5], q[:, :5])
        True
    """
    mode = rounding_of(exact, rounding)
    rotated = _rotate(("q", "k"), (q, k), table, prefix, suffix, positions, inverse, mode, inplace, backend)
    return rotated[0], rotated[1]


def norm_rotate(
    x: torch.Tensor,
    table: RopeTable,
    weight: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm: NormKind = NormKind.PER_HEAD,
    prefix: int = 0,
    suffix: int = 0,
    positions: torch.Tensor | None = None,
    inverse: bool = False,
    inplace: bool = False,
    exact: bool = False,
    rounding: Rounding | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Norms and rotates one tensor, as :func:`norm_rotate_qk` does two.

    Args:
        x: ``[B, S, H, D]``, last dim contiguous, any outer strides.
        weight, bias: ``[D]`` per head, ``[H * D]`` across heads, or None; the rest as in :func:`norm_rotate_qk`.

    Returns:
        A new tensor, or ``x`` itself when ``inplace``.

    Example:
        >>> import torch, dit_rope
        >>> table = dit_rope.rope_table(dit_rope.RopeSpec((8, 4, 4)), dit_rope.Grid(2, 3, 4))
        >>> x = torch.randn(1, 24, 2, 16)
        >>> rotated = dit_rope.norm_rotate(x, table, torch.ones(16))
        >>> expected = dit_rope.rotate(torch.nn.functional.rms_norm(x, (16,), eps=1e-6), table)
        >>> torch.allclose(rotated, expected, atol=1e-6)
        True
    """
    normed = (norm, eps, (weight,), () if bias is None else (bias,))
    mode = rounding_of(exact, rounding)
    return _rotate(("x",), (x,), table, prefix, suffix, positions, inverse, mode, inplace, backend, normed)[0]


def norm_rotate_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    table: RopeTable,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    *,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm: NormKind = NormKind.PER_HEAD,
    prefix: int = 0,
    suffix: int = 0,
    positions: torch.Tensor | None = None,
    inverse: bool = False,
    inplace: bool = False,
    exact: bool = False,
    rounding: Rounding | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms every token of queries and keys, then rotates them, in one launch (two passes for exact bits).

    The norm is an RMSNorm (Zhang and Sennrich, arXiv:1910.07467), or, of a layer kind, a LayerNorm (Ba, Kiros and
    Hinton, arXiv:1607.06450): the mean is subtracted, the variance is biased, the bias comes after the weight.
    Unrotated tokens and channels are normed too.

    Args:
        q_weight, k_weight: ``[D]`` per head, ``[H * D]`` across heads, or None.
        q_bias, k_bias: of the same shapes, or None; of a LayerNorm alone.
        eps: added to the mean of squares, or to the variance.
        norm: the kind of norm, which says whether a mean is taken over a head or over all heads.
        rounding: ``Rounding.EXACT`` runs ``torch.nn.functional.rms_norm`` or ``layer_norm`` first, then the exact
            rotation. ``Rounding.MODEL`` rounds at the same places in one pass: the norm once, after weight and bias,
            then the products and sums of the rotation. ``Rounding.FAST`` computes both in float32 (float64 for float64
            data) and rounds once at the end.

    The other arguments, the return and the errors are those of :func:`rotate_qk`.

    Example:
        >>> import torch, dit_rope
        >>> table = dit_rope.rope_table(dit_rope.RopeSpec((8, 4, 4)), dit_rope.Grid(2, 3, 4))
        >>> q, k, weight = torch.randn(1, 24, 4, 16), torch.randn(1, 24, 2, 16), torch.ones(16)
        >>> q_rotated, k_rotated = dit_rope.norm_rotate_qk(q, k, table, weight, weight)
        >>> q_rotated.square().mean(-1).round().unique()
        tensor([1.])
    """
    normed = (norm, eps, (q_weight, k_weight), () if q_bias is None and k_bias is None else (q_bias, k_bias))
    mode = rounding_of(exact, rounding)
    rotated = _rotate(("q", "k"), (q, k), table, prefix, suffix, positions, inverse, mode, inplace, backend, normed)
    return rotated[0], rotated[1]


def _rotate(
    names: Sequence[str],
    xs: Sequence[torch.Tensor],
    table: RopeTable,
    prefix: int,
    suffix: int,
    positions: torch.Tensor | None,
    inverse: bool,
    rounding: Rounding,
    inplace: bool,
    backend: str,
    norm: _NormArguments | None = None,
) -> list[torch.Tensor]:
    """Checks a call, then makes it. ``names`` are those of ``xs`` in messages."""
    args, choice = _check(names, xs, table, prefix, suffix, positions, inverse, rounding, inplace, backend, norm)
    if inplace:
        check_inplace(names, xs, _parameters(norm))
    if norm is None:
        return ops.rotate(xs, args, inplace=inplace, choice=choice)
    kind, eps, weights, biases = norm
    if rounding is not Rounding.EXACT:
        applied = Norm.of(xs, kind, float(eps), weights, biases, _NORM_ROUNDINGS[rounding])
        return ops.rotate(xs, args, applied, inplace=inplace, choice=choice)
    affine = zip(xs, weights, biases or [None] * len(xs), strict=True)
    normed = [_torch_norm(x, weight, bias, float(eps), kind) for x, weight, bias in affine]
    # Chosen again: a norm's result may have another layout than its input.
    rotated = ops.rotate(normed, args, inplace=not _needs_grad(normed), backend=choice.backend)
    return [x.copy_(y) for x, y in zip(xs, rotated, strict=True)] if inplace else rotated


class _ValidCall:
    """The memory of valid calls of one layout: their arguments without positions, and their backend."""

    __slots__ = ("args", "checked", "checks_rows", "choice")

    def __init__(self, args: RotationArgs, choice: Choice) -> None:
        positions = args.positions
        self.args = replace(args, positions=None)
        self.choice = choice
        self.checks_rows = positions is not None and positions.device.type == "cpu"
        self.checked: tuple[weakref.ref[torch.Tensor], int] | None = None

    def at(self, positions: torch.Tensor, table: RopeTable) -> RotationArgs:
        """The arguments with ``positions``, whose rows are checked unless they were last, and are unwritten since."""
        if self.checks_rows:
            checked = self.checked
            if checked is None or checked[0]() is not positions or checked[1] != positions._version:
                check_rows(positions, table.blocks)
                counted = not (positions.is_inference() or in_mode())  # else torch does not count writes to them
                self.checked = (weakref.ref(positions), positions._version) if counted else None
        return self.args.at(positions)


def _check(
    names: Sequence[str],
    xs: Sequence[torch.Tensor],
    table: RopeTable,
    prefix: int,
    suffix: int,
    positions: torch.Tensor | None,
    inverse: bool,
    rounding: Rounding,
    inplace: bool,
    backend: str,
    norm: _NormArguments | None,
) -> tuple[RotationArgs, Choice]:
    """The arguments of a validated call and its backend; every layer repeats a call, so one lookup returns both."""
    if not isinstance(table, RopeTable):
        raise TypeError(f"table must be a RopeTable, got {type(table).__name__}; make one with dit_rope.rope_table")
    if torch.compiler.is_compiling():  # the operator chooses when it runs, on real tensors
        args = _validated(names, xs, table, prefix, suffix, positions, inverse, rounding, inplace, backend, norm)
        return args, Choice(backend)
    normed = None
    if norm is not None:
        kind, eps, weights, biases = norm
        normed = (kind, eps, type(eps), *map(layout_of, (*weights, *biases)))
    key = (
        *map(layout_of, xs), layout_of(positions), prefix, suffix, inverse, rounding, inplace, backend, normed,
        # True equals 1: without the types a call with one would pass as a call with the other.
        type(prefix), type(suffix), type(inverse), type(inplace),
    )  # fmt: skip
    try:
        valid = table.validated.get(key)
    except TypeError:  # an unhashable argument, which validation names
        valid = None
    if valid is None:
        args = _validated(names, xs, table, prefix, suffix, positions, inverse, rounding, inplace, backend, norm)
        applied = None
        if norm is not None and rounding is not Rounding.EXACT:
            applied = Norm.of(xs, *norm, _NORM_ROUNDINGS[rounding])
        choice = remembered_choice(xs, args, applied, backend)
        if in_level() or in_mode():  # their tensors and choice are not valid for other calls
            return args, choice
        if len(table.validated) >= _MAX_REMEMBERED:
            table.validated.clear()
        valid = table.validated[key] = _ValidCall(args, choice)
    return (valid.args if positions is None else valid.at(positions, table)), valid.choice


def _validated(
    names: Sequence[str],
    xs: Sequence[torch.Tensor],
    table: RopeTable,
    prefix: int,
    suffix: int,
    positions: torch.Tensor | None,
    inverse: bool,
    rounding: Rounding,
    inplace: bool,
    backend: str,
    norm: _NormArguments | None,
) -> RotationArgs:
    check_backend(backend)
    check_tensors(names, xs, table.spec.rotary_dim, table.device)
    if norm is not None:
        kind, eps, weights, biases = norm
        check_norm(names, xs, weights, eps, kind, biases)
    check_flags(inverse=inverse, inplace=inplace)
    batch, length = xs[0].shape[:2]
    check_around(length, prefix, suffix)
    count = table.count if positions is None else length - prefix - suffix
    check_token_count(names[0], length, prefix, count, suffix)
    if positions is not None:
        check_positions(positions, batch, count, len(table.sizes), table.device)
    return table.args(prefix=prefix, inverse=inverse, exact=rounding is not Rounding.FAST, positions=positions)


def _parameters(norm: _NormArguments | None) -> list[torch.Tensor]:
    """The weights and biases that a norm has."""
    return [] if norm is None else [parameter for parameter in (*norm[2], *norm[3]) if parameter is not None]


def _needs_grad(xs: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in xs)


def _torch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, norm: NormKind
) -> torch.Tensor:
    """Torch's own norm, which models call; its LayerNorm takes one dtype, the widest of the arguments."""
    flat = x.flatten(2) if norm.across_heads else x
    if norm.centred:
        wide = functools.reduce(torch.promote_types, (t.dtype for t in (weight, bias) if t is not None), x.dtype)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
        if in_level():  # torch's own LayerNorm gives wrong gradients of its tangents
            return derivatives.normed(x.to(wide), Norm.of([x], norm, eps, [weight], [bias])).to(x.dtype)
        normed = torch.nn.functional.layer_norm(flat.to(wide), flat.shape[-1:], weight, bias, eps).to(x.dtype)
    else:
        normed = torch.nn.functional.rms_norm(flat, flat.shape[-1:], weight, eps)
    return normed.view(x.shape)
