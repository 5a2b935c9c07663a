"""The rotary functions of diffusers and transformers over our kernels: same signatures, and by default the same bits.

Differences from both: results have the dtype of what was rotated; tables may be narrower than a head, whose other
channels then keep their values; a table that requires grad is refused, as no gradient would reach it; queries and keys
must be contiguous in their last dim. A zero may come out with the other sign.
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
    """Rotates one tensor, as the function of this name in diffusers 0.42.1, ``models/embeddings.py``, does.

    Exact arithmetic is what diffusers' is: float32 (float64 where a table is), each product rounded, one cast. Complex
    tables are the exception: PyTorch's complex product, which diffusers calls there, rounds differently from one
    version and one lane to another, and the result is within those roundings of it. float64 data stays float64, where
    diffusers goes through float32.

    Args:
        x: ``[B, H, S, D]``, or ``[B, S, H, D]`` with ``sequence_dim`` 1 or complex tables.
        freqs_cis: ``(cos, sin)``, ``[S, D]`` each, the two channels of a pair holding one value, of which the first is
            read; or complex ``[S, D / 2]`` or ``[1 or B, S, D / 2]`` without ``use_real``. Moved to the device of x.
        use_real: which of the two ``freqs_cis`` is.
        use_real_unbind_dim: -1: neighbouring channels turn together; -2: those half the table's width apart. Complex
            tables turn neighbours.
        sequence_dim: where tokens are in x, 1 or 2; always 1 with complex tables, whatever it says, as in diffusers.
        exact: False for arithmetic in float32 that is rounded once, with a fused multiply-add where there is one.
        backend: as in :func:`dit_rope.rotate`.

    Returns:
        A new tensor of the shape and dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
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
    # Wider than 16 bits, as diffusers multiplies in float32 whatever the dtype of its tables.
    rows = _rows(cos, sin, torch.promote_types(cos.dtype, torch.float32), x.device)
    args = _args(("freqs_cis",), ("x",), (tokens,), rows, interleaved, exact)
    (turned,) = ops.rotate([tokens], args, backend=backend)
    return turned.transpose(1, 2) if heads_first else turned


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
    """Rotates queries and keys, as the function of this name in transformers 5.23, ``modeling_llama.py``, does.

    Exact arithmetic is what transformers' is: in the dtype that data and tables promote to, so that with both in
    bfloat16 each product is rounded to bfloat16. ``exact=False`` computes in float32 and rounds once, which is nearer
    to the truth and not what the model was run with. With tables wider than the data, transformers returns the dtype
    of the tables; the result here is that, cast to the dtype of the data.

    Args:
        q, k: ``[B, H, S, D]``, each with its own H; ``[B, S, H, D]`` with ``unsqueeze_dim`` 2.
        cos, sin: ``[1 or B, S, D]``, the second half of D repeating the first, which is read.
        unsqueeze_dim: the dim of heads in q and k, 1 or 2.
        exact: see above.
        backend: as in :func:`dit_rope.rotate_qk`.

    Returns:
        New tensors ``(q, k)``, rotated in one launch.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
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
    turned = ops.rotate(xs, args, backend=backend)
    if unsqueeze_dim == 1:
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)
    return turned[0], turned[1]


def _real_tables(freqs: object, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[S, n]``, one value per pair, of tables ``[S, 2 n]``: views."""
    if not isinstance(freqs, (tuple, list)) or len(freqs) != 2:
        raise TypeError(f"freqs_cis must be (cos, sin) with use_real=True, got {type(freqs).__name__}")
    _check_tables(("freqs_cis[0]", "freqs_cis[1]"), freqs, dims=(2,))
    half = freqs[0].shape[1] // 2
    cos, sin = (part[:, ::2] if interleaved else part[:, :half] for part in freqs)
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
    """``[2, 1 or B, S, n]``: the one copy that is made, as kernels read cos and sin from one tensor."""
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
    """The rotation of ``xs`` ``[B, S, H, D]`` by ``rows`` ``[2, 1 or B, S, n]``, each checked against the other."""
    _, batches, count, pairs = rows.shape
    check_tensors(names, xs, 2 * pairs, rows.device)
    batch, length = xs[0].shape[:2]
    if count != length or batches not in (1, batch):
        raise ValueError(
            f"{' and '.join(tables)} must have the {length} tokens of {names[0]}, and 1 or its {batch} batch entries, "
            f"got {count} tokens and {batches} entries"
        )
    positions = None
    if not batches:  # of a batch of 0: rows for whoever reads some, of which nobody does
        rows = rows.new_zeros(2, 1, count, pairs)
    if batches > 1:  # a table per batch entry: their rows, one entry after another
        numbers = torch.arange(batches * count, dtype=torch.int32, device=rows.device)
        positions = numbers.view(batches, count, 1)
    return one_axis_args(rows.flatten(1, 2), positions, count, interleaved=interleaved, exact=exact)


def _check_four_dims(name: str, x: object) -> None:
    if isinstance(x, torch.Tensor) and x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor of 4 dims, batch first and channels last, got {got}")


def _check_tables(names: Sequence[str], parts: Sequence[object], dims: Sequence[int]) -> None:
    """Checks cos and sin against one another: real, of one dtype and shape, as many dims, channels in pairs."""
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, torch.Tensor) or not part.is_floating_point():
            got = part.dtype if isinstance(part, torch.Tensor) else type(part).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {got}")
        if part.layout is not torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got {part.layout}; call {name}.to_dense()")
        if part.ndim not in dims or part.shape[-1] < 2 or part.shape[-1] % 2:
            shape = {2: "[S, even D]", 3: "[1 or B, S, even D]"}[dims[0]]
            raise ValueError(f"{name} must have shape {shape}, got {tuple(part.shape)}")
    cos, sin = (part for part in parts if isinstance(part, torch.Tensor))
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
