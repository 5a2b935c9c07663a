"""The rotary functions of diffusers and transformers with dit_rope's kernels: same signatures, and the same bits.

Differences from both: results have the dtype of queries and keys. Tables may be narrower than a head; the other
channels keep their values. A table that requires grad is refused, because no gradient would reach it. Queries and keys
must be contiguous in their last dim. A zero may have the other sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..rotation import ops
from ..rotation_args import RotationArgs
from ..scalars import as_int, check_flags
from ..validation import DTYPES, check_tensors
from .dense import one_axis_args


def apply_rotary_emb(
    x: torch.Tensor,
    freqs_cis: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    use_real: bool = True,
    use_real_unbind_dim: int = -1,
    sequence_dim: int = 2,
    *,
    exact: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotates one tensor, like the function of this name in diffusers 0.42.1, ``models/embeddings.py``.

    Exact arithmetic is that of diffusers: float32 (float64 for float64 tables), each product rounded, one cast. Complex
    tables are an exception. diffusers uses PyTorch's complex product for them, which rounds differently between
    versions and lanes; the result here is within these roundings. float64 data stays float64; diffusers rounds it to
    float32.

    Args:
        x: ``[B, H, S, D]``, or ``[B, S, H, D]`` with ``sequence_dim`` 1 or complex tables.
        freqs_cis: with ``use_real`` ``(cos, sin)``, ``[S, D]`` each; both channels of a pair hold one value, and the
            first is read. Without it complex ``[S, D / 2]`` or ``[1 or B, S, D / 2]``. Moved to the device of x.
        use_real: whether ``freqs_cis`` is ``(cos, sin)``.
        use_real_unbind_dim: -1: neighbouring channels rotate together; -2: channels half the table's width apart. With
            complex tables always neighbours.
        sequence_dim: the dim of tokens in x, 1 or 2. With complex tables it is ignored and is 1, as in diffusers.
        exact: False for float32 arithmetic that rounds once, with fused multiply-adds on devices that have them.
        backend: as in :func:`dit_rope.rotate`.

    Returns:
        A new tensor of the shape and dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> import torch
        >>> angles = torch.randn(6, 8).repeat_interleave(2, dim=1)
        >>> apply_rotary_emb(torch.randn(1, 2, 6, 16), (angles.cos(), angles.sin())).shape
        torch.Size([1, 2, 6, 16])
    """
    check_flags(use_real=use_real, exact=exact)
    if as_int(use_real_unbind_dim) not in (-1, -2):
        raise ValueError(f"use_real_unbind_dim must be -1 or -2, got {use_real_unbind_dim}")
    if as_int(sequence_dim) not in (1, 2):
        raise ValueError(f"sequence_dim must be 1 or 2, got {sequence_dim}")
    interleaved = not use_real or use_real_unbind_dim == -1
    cos, sin = _real_tables(freqs_cis, interleaved) if use_real else _complex_tables(freqs_cis)
    _check_four_dims("x", x)
    heads_first = use_real and sequence_dim == 2
    tokens = x.transpose(1, 2) if heads_first else x
    # At least float32: diffusers multiplies in float32, also by tables of 16 bits.
    rows = _rows(cos, sin, torch.promote_types(cos.dtype, torch.float32), x.device)
    args = _args(("freqs_cis",), ("x",), (tokens,), rows, interleaved, exact)
    (rotated,) = ops.rotate([tokens], args, backend=backend)
    return rotated.transpose(1, 2) if heads_first else rotated


def apply_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    *,
    exact: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys, like the function of this name in transformers 5.23, ``modeling_llama.py``.

    Exact arithmetic is that of transformers: in the dtype that data and tables promote to, so that with both in
    bfloat16 each product is rounded to bfloat16. ``exact=False`` computes in float32 and rounds once, which is more
    accurate than the model's own arithmetic. With tables wider than the data, transformers returns the dtype of the
    tables; here the same values are cast to the dtype of the data.

    Args:
        q, k: ``[B, H, S, D]``, or ``[B, S, H, D]`` with ``unsqueeze_dim`` 2; H may differ.
        cos, sin: ``[1 or B, S, D]``. The second half of D repeats the first, and the first is read.
        unsqueeze_dim: the dim of heads in q and k, 1 or 2.
        exact: as described above.
        backend: as in :func:`dit_rope.rotate_qk`.

    Returns:
        New tensors ``(q, k)``, rotated in one launch.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> import torch
        >>> angles = torch.randn(1, 6, 8).repeat(1, 1, 2)
        >>> q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)
        >>> q, k = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    """
    check_flags(exact=exact)
    if as_int(unsqueeze_dim) not in (1, 2):
        raise ValueError(f"unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    for name, x in (("q", q), ("k", k)):
        _check_four_dims(name, x)
    _check_tables(("cos", "sin"), (cos, sin), dims=(3,))
    half = cos.shape[-1] // 2
    rows = _rows(cos[..., :half], sin[..., :half], torch.promote_types(cos.dtype, q.dtype), q.device)
    xs = [q.transpose(1, 2), k.transpose(1, 2)] if unsqueeze_dim == 1 else [q, k]
    args = _args(("cos", "sin"), ("q", "k"), xs, rows, False, exact)
    rotated = ops.rotate(xs, args, backend=backend)
    if unsqueeze_dim == 1:
        return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)
    return rotated[0], rotated[1]


def _real_tables(freqs: object, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[S, n]``, one value per pair, of tables ``[S, 2 n]``: views."""
    if not isinstance(freqs, (tuple, list)) or len(freqs) != 2:
        raise TypeError(f"freqs_cis must be (cos, sin) with use_real=True, got {type(freqs).__name__}")
    _check_tables(("freqs_cis[0]", "freqs_cis[1]"), freqs, dims=(2,))
    half = freqs[0].shape[1] // 2
    cos, sin = (table[:, ::2] if interleaved else table[:, :half] for table in freqs)
    return cos, sin


def _complex_tables(freqs: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[.., S, n]``, the parts of a complex table of that shape."""
    if not isinstance(freqs, torch.Tensor) or not freqs.is_complex():
        got = freqs.dtype if isinstance(freqs, torch.Tensor) else type(freqs).__name__
        raise TypeError(f"freqs_cis must be a complex tensor with use_real=False, got {got}")
    if freqs.layout is not torch.strided:
        raise TypeError(f"freqs_cis must be a strided tensor, got {freqs.layout}; call freqs_cis.to_dense()")
    if freqs.ndim not in (2, 3):
        raise ValueError(f"freqs_cis must have shape [S, D / 2] or [1 or B, S, D / 2], got {tuple(freqs.shape)}")
    _check_no_grad(("freqs_cis",), (freqs,))
    return freqs.real, freqs.imag


def _rows(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Cos and sin ``[2, 1 or B, S, n]``: a copy, because kernels read both from one tensor."""
    rows = torch.stack((cos, sin)).to(device, dtype)
    return rows if rows.ndim == 4 else rows.unsqueeze(1)


def _args(
    tables: Sequence[str],
    names: Sequence[str],
    xs: Sequence[torch.Tensor],
    rows: torch.Tensor,
    interleaved: bool,
    exact: bool,
) -> RotationArgs:
    """The rotation of ``xs`` ``[B, S, H, D]`` by ``rows`` ``[2, 1 or B, S, n]``, after a check that they fit."""
    _, batches, count, pairs = rows.shape
    check_tensors(names, xs, 2 * pairs, rows.device)
    batch, length = xs[0].shape[:2]
    if count != length or batches not in (1, batch):
        raise ValueError(
            f"{' and '.join(tables)} must have the {length} tokens of {names[0]}, and 1 or its {batch} batch entries, "
            f"got {count} tokens and {batches} entries"
        )
    positions = None
    if not batches:  # a batch of 0: backends expect at least one entry of rows, which they do not read
        rows = rows.new_zeros(2, 1, count, pairs)
    if batches > 1:  # one table per batch entry: rows of all entries, one entry after another
        numbers = torch.arange(batches * count, dtype=torch.int32, device=rows.device)
        positions = numbers.view(batches, count, 1)
    return one_axis_args(rows.flatten(1, 2), positions, count, interleaved=interleaved, exact=exact)


def _check_four_dims(name: str, x: object) -> None:
    if isinstance(x, torch.Tensor) and x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor of 4 dims, batch first and channels last, got {got}")


def _check_tables(names: Sequence[str], tables: Sequence[object], dims: Sequence[int]) -> None:
    """Checks that cos and sin are real, of one dtype, shape and device, with channels in pairs."""
    for name, table in zip(names, tables, strict=True):
        if not isinstance(table, torch.Tensor) or not table.is_floating_point():
            got = table.dtype if isinstance(table, torch.Tensor) else type(table).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {got}")
        if table.layout is not torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got {table.layout}; call {name}.to_dense()")
        if table.ndim not in dims or table.shape[-1] < 2 or table.shape[-1] % 2:
            shape = {2: "[S, even D]", 3: "[1 or B, S, even D]"}[dims[0]]
            raise ValueError(f"{name} must have shape {shape}, got {tuple(table.shape)}")
    cos, sin = (table for table in tables if isinstance(table, torch.Tensor))
    if (cos.shape, cos.dtype, cos.device) != (sin.shape, sin.dtype, sin.device):
        raise ValueError(
            f"{names[1]} must have the shape, dtype and device of {names[0]}, {tuple(cos.shape)} {cos.dtype} on "
            f"{cos.device}, got {tuple(sin.shape)} {sin.dtype} on {sin.device}"
        )
    _check_no_grad(names, (cos, sin))


def _check_no_grad(names: Sequence[str], tables: Sequence[torch.Tensor]) -> None:
    for name, table in zip(names, tables, strict=True):
        if torch.is_grad_enabled() and table.requires_grad:
            raise ValueError(f"{name} must not require grad, which would not reach it, got one that does; detach it")
