"""The rotation in PyTorch, on every device, and the fast path on CPU.

The formula alone is in :mod:`dit_rope.rotation.reference`.

On CPU the work is cut into chunks of tokens whose scratch stays in the caches, so that data crosses memory once.
An interleaved pair is one complex number: a rotation multiplies it by cos + i sin, which PyTorch does in one
vectorised pass. Exact mode cannot use that pass, because compilers fuse the multiplies and adds of its scalar tail.
It forms the two products by two complex multiplies, with cos + 0 i and 0 + i sin. One operand of each sum in those is
zero, so each result is the correctly rounded product, fused or not, and the sum that follows rounds as the model's code
does. (A zero may change its sign; infinities become NaN.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...rotation_args import Memo, Norm, NormRounding, RotationArgs
from ...spec import Pairing
from ...tables.caches import EXPANDED
from ...torch_state import WITHOUT_FLOAT64_OR_COMPLEX, in_mode
from . import cos_sin

# Bytes of one chunk of tokens on CPU, in the arithmetic dtype: scratch of that size stays in the level 3 cache, and
# the Python overhead of a chunk is small beside its work. Without scratch only the cos and sin of a chunk must fit.
CHUNK_BYTES = 1 << 22
DIRECT_CHUNK_BYTES = 1 << 24


def rotate(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    norm: Norm | None = None,
    memo: Memo | None = None,
) -> None:
    """Rotates each ``xs[i]`` ``[B, S, H, D]``, after ``norm``, into ``outs[i]``, which may be ``xs[i]`` itself.

    Every element of ``outs`` is written; the layout of tokens and channels is that of :class:`RotationArgs`. A norm
    covers unrotated tokens and channels too; its arithmetic is float32 (float64 for float64 data).
    Every backend takes a ``memo``; this one does not use it.

    Raises:
        IndexError: a position is past the table, or an entry of ``args.entries`` past the batch.
    """
    _run(xs, args, outs, None if norm is None else _ChunkNorm(norm, xs[0].dtype))


class _ChunkNorm:
    """The norm of a chunk of tokens of one dtype, in float32, or float64 for float64 data.

    RMSNorm is that of Zhang and Sennrich (arXiv:1910.07467), LayerNorm that of Ba, Kiros and Hinton (arXiv:1607.06450).
    An RMSNorm takes its sums in the order of torch's own. A LayerNorm that rounds its result is torch's own, for its
    bits; another one is more accurate than torch's where the mean is large.
    """

    def __init__(self, norm: Norm, dtype: torch.dtype) -> None:
        self.norm = norm
        self.data_dtype = dtype
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.dims = (-2, -1) if norm.kind.across_heads else (-1,)
        self._squares = torch.empty(0)

    def __call__(self, x: torch.Tensor, index: int, out: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, n, H, D]`` of tensor number ``index``, normed: ``out``, which must not be x, or a new tensor.

        ``out`` may have another dtype than the norm, if the norm rounds its result to that dtype.
        """
        if out.dtype is not self.dtype:
            return out.copy_(self(x, index, torch.empty_like(out, dtype=self.dtype)))
        weight, bias = (self._of_head(each, index, x) for each in (self.norm.weights, self.norm.biases))
        if self.norm.kind.centred and self.norm.rounding is NormRounding.RESULT:
            return self._torchs_layer_norm(x, weight, bias)
        every_step = self.norm.rounding is NormRounding.EVERY_STEP
        x, squares = x.to(self.dtype), out
        if self.norm.kind.centred:  # the mean first, since a difference of two large means would lose the variance
            x = torch.sub(x, x.mean(self.dims, keepdim=True), out=out)
            squares = self._scratch_like(x)
        scale = torch.mul(x, x, out=squares).mean(self.dims, keepdim=True).add_(self.norm.eps).rsqrt_()
        torch.mul(x, scale, out=out)
        if weight is not None:
            self._round(out, every_step).mul_(weight)
        if bias is not None:
            self._round(out, every_step).add_(bias)
        return self._round(out, self.norm.rounding is not NormRounding.NONE)

    def _torchs_layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """On data as they are if weight and bias have their dtype; else on float32, as torch wants one dtype."""
        same = all(each is None or each.dtype is x.dtype for each in (weight, bias))
        dtype = x.dtype if same else self.dtype
        weight, bias = (None if each is None else each.to(dtype) for each in (weight, bias))
        normed = torch.layer_norm(x.to(dtype), x.shape[self.dims[0] :], weight, bias, self.norm.eps)
        return normed.to(self.dtype) if same else self._round(normed, True)

    def _round(self, values: torch.Tensor, rounds: bool) -> torch.Tensor:
        return values.copy_(values.to(self.data_dtype)) if rounds and self.data_dtype != self.dtype else values

    def _of_head(self, parameters: Sequence[torch.Tensor], index: int, x: torch.Tensor) -> torch.Tensor | None:
        if not parameters:
            return None
        return parameters[index].view(x.shape[-2:]) if self.norm.kind.across_heads else parameters[index]

    def _scratch_like(self, x: torch.Tensor) -> torch.Tensor:
        """Memory for the squares of ``x``, the same for every chunk."""
        if self._squares.numel() < x.numel() or self._squares.device != x.device:
            self._squares = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        return self._squares[: x.numel()].view(x.shape)


class _Rotation:
    """The cos and sin of the rotated tokens, and the multiplication of channels by them.

    ``tables`` are ``[B or 1, count, 1, pairs]``, or ``[B or 1, count, heads, pairs]`` where every head has its own: one
    complex table in fast mode, two in exact mode, or real cos and sin where pairs are not adjacent, the arithmetic is
    16-bit, or the device has no complex numbers. ``unrotated`` says which channels keep their values, None where none
    does.
    """

    def __init__(self, args: RotationArgs, dtype: torch.dtype, heads: int) -> None:
        if args.exact:
            self.dtype = torch.promote_types(dtype, args.rows.dtype)
        else:
            self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.args = args
        self.heads = heads if args.head_rows else 1
        self.width = 2 * sum(args.pairs)
        self.adjacent = args.pairing is Pairing.INTERLEAVED
        self.complex = (
            self.adjacent
            and self.dtype in (torch.float32, torch.float64)
            and args.rows.device.type not in WITHOUT_FLOAT64_OR_COMPLEX
        )
        self.exact_complex = self.complex and args.exact
        tables, number = self._remembered(), 1 if self.complex and not args.exact else 2
        self.tables = tables[:number]
        self.unrotated = tables[number] if len(tables) > number else None
        self.count = self.tables[0].shape[1]

    def _remembered(self) -> Sequence[torch.Tensor]:
        """The tables, from the cache on CPU, where every layer of a model asks for them again.

        Tables of positions on one axis are not cached: they take one gather, and a text server passes new positions in
        each call. With a table for each head that gather is as large as the data, so those are cached.
        """
        args = self.args
        once = len(args.pairs) == 1 and args.positions is not None and not args.head_rows
        if once or args.rows.device.type != "cpu" or args.rows.is_inference() or in_mode():
            return self._gathered()
        where = (args.pairs, args.sizes, args.first_rows, args.token_offset, args.count, args.head_rows, self.heads)
        tensors = (_identity(args.rows), _values(args.positions))
        key = (tensors, where, args.pairing, args.inverse, self.exact_complex, self.dtype)
        # The entry holds the rows: their memory is not reused while it lives, and a write to them invalidates it.
        return EXPANDED.get(key, args.rows.device, lambda: [*self._gathered(), args.rows.detach()])[:-1]

    def _gathered(self) -> list[torch.Tensor]:
        """The tables, and after them, where some pairs of some tokens do not rotate, the mask of their channels."""
        args = self.args
        indices = cos_sin.row_indices(args, self.heads)
        table, rows = cos_sin.needed_rows(args.rows, indices)
        cos, sin = cos_sin.identity_row(table.to(self.dtype)).unbind(0)
        sin = -sin if args.inverse else sin
        if not self.complex:
            tables: tuple[torch.Tensor, ...] = (cos, sin)
        elif self.exact_complex:
            zero = torch.zeros_like(cos)
            tables = (torch.complex(cos, zero), torch.complex(zero, sin))
        else:
            tables = (torch.complex(cos, sin),)
        gathered = [torch.cat(cos_sin.gather(table, rows, args.pairs), dim=-1) for table in tables]
        first = indices[:, :, :1]  # the negative rows of one head are those of all
        # Reading them on another device than a CPU would wait for it.
        if not cos_sin.may_be_unrotated(args) or (first.device.type == "cpu" and not bool((first < 0).any())):
            return gathered
        return [*gathered, cos_sin.channels_of_negative_rows(first, args)]

    def __call__(self, x: torch.Tensor, out: torch.Tensor, start: int, stop: int, scratch: torch.Tensor) -> None:
        """Rotates the tokens ``start <= j < stop``, ``x`` ``[B, n, H, width]``, into ``out``, which may be x."""
        if self.unrotated is None:
            self._rotate(x, out, start, stop, scratch)
            return
        kept = x.clone() if x.data_ptr() == out.data_ptr() else x
        self._rotate(x, out, start, stop, scratch)
        # Multiplied by (1, 0), an infinity would make its partner NaN, and a negative zero would lose its sign.
        out.copy_(torch.where(self.unrotated[:, start:stop], kept, out))

    def _rotate(self, x: torch.Tensor, out: torch.Tensor, start: int, stop: int, scratch: torch.Tensor) -> None:
        tables = self.tables
        if stop - start != self.count:
            tables = [table[:, start:stop] for table in tables]
        if self.heads > x.shape[2]:
            tables = [table[:, :, : x.shape[2]] for table in tables]
        if not self.complex:
            self._rotate_real(x, out, *tables)
            return
        source, target = _as_complex(x), _as_complex(out)
        if self.exact_complex:
            across = torch.mul(source, tables[1], out=_as_complex(scratch[:, : stop - start]))
            torch.mul(source, tables[0], out=target).add_(across)
        else:
            torch.mul(source, tables[0], out=target)

    def _rotate_real(self, x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        if self.adjacent:
            (x1, x2), (out1, out2) = (t.unflatten(-1, (-1, 2)).unbind(-1) for t in (x, out))
        else:
            (x1, x2), (out1, out2) = (t.chunk(2, dim=-1) for t in (x, out))
        if self.args.exact:
            y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
        else:
            y1 = (x1 * cos).addcmul_(x2, sin, value=-1)
            y2 = (x2 * cos).addcmul_(x1, sin)
        out1.copy_(y1)
        out2.copy_(y2)


def _run(xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor], norm: _ChunkNorm | None) -> None:
    if args.entries is not None:
        _run_entries(xs, args.entries.long(), replace(args, entries=None), norm)
        return
    rotation = _Rotation(args, xs[0].dtype, max(xs[0].shape[2], xs[-1].shape[2]))
    rotated = slice(args.prefix, args.prefix + rotation.count)
    for index, (x, out) in enumerate(zip(xs, outs, strict=True)):
        if rotation.count == x.shape[1]:
            _rotate_tokens(x, out, rotation, norm, index)
            continue
        for unrotated in (slice(0, rotated.start), slice(rotated.stop, None)):
            _copy_unrotated(x[:, unrotated], out[:, unrotated], rotation.dtype, norm, index)
        _rotate_tokens(x[:, rotated], out[:, rotated], rotation, norm, index)


def _run_entries(
    xs: Sequence[torch.Tensor], entries: torch.Tensor, args: RotationArgs, norm: _ChunkNorm | None
) -> None:
    """Rotates some batch entries of ``xs`` in place: gathers them, rotates them together, and puts them back."""
    picked = [x.index_select(0, entries) for x in xs]
    _run(picked, args, picked, norm)
    for x, rotated in zip(xs, picked, strict=True):
        x.index_copy_(0, entries, rotated)


def _copy_unrotated(
    x: torch.Tensor, out: torch.Tensor, dtype: torch.dtype, norm: _ChunkNorm | None, index: int
) -> None:
    """Copies tokens that do not rotate, normed where there is a norm."""
    if x.shape[1] == 0:
        return
    if norm is not None:
        out.copy_(norm(x, index, torch.empty_like(x, dtype=norm.dtype)))
    elif x.data_ptr() != out.data_ptr():
        out.copy_(x)


def _rotate_tokens(
    x: torch.Tensor, out: torch.Tensor, rotation: _Rotation, norm: _ChunkNorm | None, index: int
) -> None:
    """Rotates the tokens ``[B, n, H, D]`` of tensor number ``index``, chunk by chunk."""
    width = rotation.width
    direct_in, direct_out = norm is None and _readable(x, rotation), _readable(out, rotation)
    in_place = x.data_ptr() == out.data_ptr()
    scratch_free = direct_in and direct_out and not rotation.exact_complex
    step = _chunk_tokens(x, rotation.dtype, DIRECT_CHUNK_BYTES if scratch_free else CHUNK_BYTES)
    shape = (x.shape[0], min(step, x.shape[1]), *x.shape[2:])
    wide = across = x  # stand-ins: what needs scratch replaces them
    if not (direct_in and direct_out):
        even = (*shape[:3], shape[3] + shape[3] % 2)  # complex numbers start at even channels
        wide = torch.empty(even, dtype=rotation.dtype, device=x.device)[..., : shape[3]]
    if rotation.exact_complex:
        across = torch.empty((*shape[:3], width), dtype=rotation.dtype, device=x.device)
    for start in range(0, x.shape[1], step):
        stop = min(start + step, x.shape[1])
        whole = stop - start == x.shape[1]
        source, target = (x, out) if whole else (x[:, start:stop], out[:, start:stop])
        if norm is not None:
            source = norm(source, index, wide[:, : stop - start])
        elif not direct_in:
            source = wide[:, : stop - start].copy_(source)
        rotated = target[..., :width] if direct_out else wide[:, : stop - start, :, :width]
        rotation(source[..., :width], rotated, start, stop, across)
        if not direct_out:
            target[..., :width].copy_(rotated)
        if width < x.shape[-1] and not (in_place and norm is None):
            target[..., width:].copy_(source[..., width:])


def _readable(x: torch.Tensor, rotation: _Rotation) -> bool:
    """Whether the arithmetic can read and write ``x`` without scratch: as it is, or as complex numbers."""
    if not rotation.complex:
        return rotation.args.exact or x.dtype == rotation.dtype
    even = all(stride % 2 == 0 for stride in x.stride()[:-1])
    return x.dtype == rotation.dtype and x.stride(-1) == 1 and even and x.storage_offset() % 2 == 0


def _identity(x: torch.Tensor) -> tuple[object, ...]:
    """The part of a cache key that no other tensor shares while an alias of ``x`` lives.

    The address alone is not enough: two tensors over the memory of one numpy array have separate storages and version
    counters, so that a write through one does not show in the other.
    """
    return (x.untyped_storage()._cdata, x.data_ptr(), x.shape, x.stride(), x.dtype)


def _values(positions: torch.Tensor | None) -> object:
    """Positions by value, as part of a cache key: callers may pass new ones in each call, in memory used before.

    A few bytes a token, beside hundreds of its cos and sin.
    """
    return None if positions is None else (tuple(positions.shape), positions.numpy().tobytes())


def _chunk_tokens(x: torch.Tensor, dtype: torch.dtype, chunk_bytes: int) -> int:
    """Tokens of ``x`` ``[B, n, H, D]`` in one chunk; all of them on other devices than a CPU."""
    if x.device.type != "cpu":
        return max(1, x.shape[1])
    return max(1, chunk_bytes // max(1, x.shape[0] * x.shape[2] * x.shape[3] * dtype.itemsize))


def _as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
