"""Rotates queries and keys: checks the arguments, chooses a backend, and calls one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import ops
from .rotation_args import RotationArgs
from .spec import NormKind, Pairing
from .tables import RopeTable
from .validation import check_inplace, check_norm, check_positions, check_tensors, check_token_count

BACKENDS = ("triton", "eager")


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
    backend: str = "auto",
) -> torch.Tensor:
    """Rotates one tensor, as :func:`rotate_qk` does two.

    Args:
        x: ``[B, S, H, D]``, last dim contiguous, any outer strides; the rest as in :func:`rotate_qk`.

    Returns:
        A new tensor, or ``x`` itself when ``inplace``.
    """
    args = _args(("x",), (x,), table, (prefix, suffix), positions, inverse, exact)
    return _rotate(("x",), (x,), args, inplace, backend)[0]


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
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys by the positions of a token grid (RoFormer, arXiv:2104.09864), in one launch.

    Args:
        q, k: ``[B, S, H, D]``, each with its own H, last dim contiguous, any outer strides; float32, float16,
            bfloat16 or float64. Channels past the table's rotary_dim do not turn.
        table: from :func:`~dit_rope.rope_table`, on the same device, shared by the batch.
        prefix, suffix: tokens before and after the grid's (text) that do not turn;
            ``prefix + table.count + suffix`` must be S.
        positions: ``[1 or B, S - prefix - suffix, axes]`` int32 rows of ``table.rows``, such as ``table.positions()``
            gives, for tokens in another order or number than the table's; a negative row does not turn.
        inverse: turn backwards.
        inplace: overwrite q and k. Refused when a gradient is wanted.
        exact: the same bits as the model's eager code gives, products rounded before they are added, in the dtype
            that the data and the table promote to. Else float32 arithmetic (float64 for float64 data), rounded once.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``; one that is named is used or refused.

    Returns:
        New tensors ``(q, k)``, or the same objects when ``inplace``.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    args = _args(("q", "k"), (q, k), table, (prefix, suffix), positions, inverse, exact)
    turned = _rotate(("q", "k"), (q, k), args, inplace, backend)
    return turned[0], turned[1]


def norm_rotate(
    x: torch.Tensor,
    table: RopeTable,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: NormKind = NormKind.PER_HEAD,
    prefix: int = 0,
    suffix: int = 0,
    positions: torch.Tensor | None = None,
    inverse: bool = False,
    inplace: bool = False,
    exact: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """RMSNorm, then rotation, of one tensor ``[B, S, H, D]``, as :func:`norm_rotate_qk` does of two."""
    args = _args(("x",), (x,), table, (prefix, suffix), positions, inverse, exact)
    return _norm_rotate(("x",), (x,), (weight,), eps, norm, args, inplace, backend)[0]


def norm_rotate_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    table: RopeTable,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: NormKind = NormKind.PER_HEAD,
    prefix: int = 0,
    suffix: int = 0,
    positions: torch.Tensor | None = None,
    inverse: bool = False,
    inplace: bool = False,
    exact: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm (arXiv:1910.07467) of every token of queries and keys, then their rotation, in one launch.

    Args:
        q_weight, k_weight: ``[D]`` per head, ``[H * D]`` across heads, or None.
        eps: added to the mean of squares.
        norm: what one mean is taken over.
        exact: ``torch.nn.functional.rms_norm`` first, then the exact rotation.

    The other arguments, the return and the errors are those of :func:`rotate_qk`.
    """
    args = _args(("q", "k"), (q, k), table, (prefix, suffix), positions, inverse, exact)
    turned = _norm_rotate(("q", "k"), (q, k), (q_weight, k_weight), eps, norm, args, inplace, backend)
    return turned[0], turned[1]


def choose_backend(
    xs: Sequence[torch.Tensor], args: RotationArgs, backend: str = "auto", norm: NormKind | None = None
) -> str:
    """The name of the backend that takes the call.

    ``"auto"`` takes the first of :data:`BACKENDS` that accepts; on CPU that is eager, as Triton's interpreter is for
    tests.

    Raises:
        ValueError: an unknown backend, or one that was named and declines, with its reason.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto', 'triton' or 'eager', got {backend!r}")
    if backend == "eager" or (backend == "auto" and xs[0].device.type in ("cpu", "meta", "mps")):
        return "eager"
    from .backends import triton_kernels

    reason = triton_kernels.declined(xs, args, norm)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend must accept the call, got 'triton', which declines: {reason}")
    return "eager"


def explain_backends(device: str | torch.device) -> list[tuple[str, str]]:
    """Each backend's name and either ``"chosen"`` or why not, for a bfloat16 call on ``device``."""
    target = torch.device(device)
    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=target)
    rows = torch.zeros(2, 1, 32, device=target)
    args = RotationArgs(rows, None, (32,), (1,), (0,), 0, 0, 1, Pairing.INTERLEAVED, False, False)
    chosen = choose_backend([x], args)
    lines = []
    for name in BACKENDS:
        if name == chosen:
            lines.append((name, "chosen"))
            continue
        try:
            choose_backend([x], args, name)
            lines.append((name, "works here, but another is faster"))
        except ValueError as error:
            lines.append((name, str(error).rpartition("declines: ")[2]))
    return lines


def apply(
    xs: Sequence[torch.Tensor], args: RotationArgs, *, inplace: bool = False, backend: str = "auto"
) -> list[torch.Tensor]:
    """Rotates tensors whose arguments are known to fit, as hooks do; :func:`rotate_qk` checks, this does not."""
    name = choose_backend(xs, args, backend)
    if inplace:
        ops.rotate_(xs, args, name)
        return list(xs)
    return ops.rotate(xs, args, name)


def apply_norm(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    *,
    inplace: bool = False,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """Norms and rotates tensors whose arguments are known to fit, as :func:`apply` rotates them."""
    name = choose_backend(xs, args, backend, norm)
    if inplace:
        ops.norm_rotate_(xs, weights, eps, norm, args, name)
        return list(xs)
    return ops.norm_rotate(xs, weights, eps, norm, args, name)


def _args(
    names: Sequence[str],
    xs: Sequence[torch.Tensor],
    table: RopeTable,
    around: tuple[int, int],
    positions: torch.Tensor | None,
    inverse: bool,
    exact: bool,
) -> RotationArgs:
    if not isinstance(table, RopeTable):
        raise TypeError(f"table must be a RopeTable, got {type(table).__name__}; make one with dit_rope.rope_table")
    check_tensors(names, xs, table.spec.rotary_dim, table.device)
    prefix, suffix = around
    batch, length = xs[0].shape[:2]
    count = table.count if positions is None else length - prefix - suffix
    check_token_count(names[0], length, prefix, count, suffix)
    if positions is not None:
        check_positions(positions, batch, count, len(table.sizes), table.device)
    return table.args(prefix=prefix, inverse=inverse, exact=exact, positions=positions)


def _rotate(
    names: Sequence[str], xs: Sequence[torch.Tensor], args: RotationArgs, inplace: bool, backend: str
) -> list[torch.Tensor]:
    if inplace:
        check_inplace(names, xs)
    return apply(xs, args, inplace=inplace, backend=backend)


def _norm_rotate(
    names: Sequence[str],
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    inplace: bool,
    backend: str,
) -> list[torch.Tensor]:
    check_norm(names, xs, weights, eps, norm)
    if inplace:
        check_inplace(names, xs, [weight for weight in weights if weight is not None])
    if args.exact:
        normed = [_rms_norm(x, weight, eps, norm) for x, weight in zip(xs, weights, strict=True)]
        turned = apply(normed, args, inplace=not _needs_grad(normed), backend=backend)
        return [x.copy_(y) for x, y in zip(xs, turned, strict=True)] if inplace else turned
    return apply_norm(xs, weights, eps, norm, args, inplace=inplace, backend=backend)


def _needs_grad(xs: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in xs)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, norm: NormKind) -> torch.Tensor:
    if norm is NormKind.PER_HEAD:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    flat = x.flatten(2)
    return torch.nn.functional.rms_norm(flat, flat.shape[-1:], weight, eps).view(x.shape)
