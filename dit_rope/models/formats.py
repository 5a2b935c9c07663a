"""The forms in which models hand rotary tables to their attention, and the one form that our rotation reads.

Upstream holds the same cos and sin in a dozen shapes: each value twice, complex numbers, two-by-two matrices, angles,
one table per head. A :class:`Format` packs any of them into a :class:`PackedTable` of rows ``[2, R, P]``, and makes the
upstream form from cos and sin, which the probe of a patch and the tests use.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..backends import eager
from ..cache import capturing, in_mode, stream_of
from ..rotation_args import RotationArgs
from ..spec import Pairing, RopeSpec
from .context_parallel import Split, part_of

Pair = tuple[torch.Tensor, torch.Tensor]


class Align(enum.Enum):
    """Which end a sequence and its table have in common, where one is longer than the other."""

    START = "start"
    END = "end"

    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False)
class PackedTable:
    """The rotation of ``tokens`` tokens, as every backend reads it.

    Attributes:
        rows: ``[2, R, P]`` cos and sin.
        positions: ``[1 or B, tokens, axes]`` int32 rows of ``rows``; None where token i has row i.
        tokens: length of the table.
        pairs, pairing, head_rows: as in :class:`~dit_rope.rotation_args.RotationArgs`.
    """

    rows: torch.Tensor
    positions: torch.Tensor | None
    tokens: int
    pairs: tuple[int, ...]
    pairing: Pairing
    head_rows: int = 0
    _made: dict[tuple[int, Align, bool], RotationArgs] = field(default_factory=dict, repr=False)
    _narrowed: dict[torch.dtype, PackedTable] = field(default_factory=dict, repr=False)

    @property
    def head_dim(self) -> int:
        """Channels of a head, where all of them turn."""
        return 2 * sum(self.pairs)

    def narrowed(self, dtype: torch.dtype) -> PackedTable:
        """The same table with its rows rounded to ``dtype``."""
        if self.rows.dtype == dtype:
            return self
        found = self._narrowed.get(dtype)
        if found is None:
            found = self._narrowed[dtype] = replace(self, rows=self.rows.to(dtype), _made={}, _narrowed={})
        return found

    def args(self, length: int, align: Align, exact: bool) -> RotationArgs:
        """The rotation of a sequence of ``length`` tokens that shares its start or its end with the table.

        A longer sequence holds tokens that do not turn; a shorter one takes its part of the table.
        """
        found = self._made.get((length, align, exact))
        if found is None:
            found = self._made[length, align, exact] = self._make_args(length, align, exact)
        return found

    def _make_args(self, length: int, align: Align, exact: bool) -> RotationArgs:
        count = min(length, self.tokens)
        first = self.tokens - count if align is Align.END else 0
        return RotationArgs(
            rows=self.rows,
            positions=None if self.positions is None else self.positions[:, first : first + count],
            pairs=self.pairs,
            sizes=(self.tokens,) if self.positions is None else (0,) * len(self.pairs),
            first_rows=(0,) * len(self.pairs),
            token_offset=first if self.positions is None else 0,
            prefix=length - count if align is Align.END else 0,
            count=count,
            pairing=self.pairing,
            inverse=False,
            exact=exact,
            head_rows=self.head_rows,
        )


def pack(cos: torch.Tensor, sin: torch.Tensor, pairing: Pairing, device: torch.device) -> PackedTable:
    """Packs cos and sin ``[1 or B, S, 1 or H, P]`` of every token, one value per pair, onto ``device``."""
    batch, tokens, heads, pairs = cos.shape
    # Tokens of one head follow one another, so that the row of a token is its number.
    rows = torch.stack((cos, sin)).transpose(2, 3).reshape(2, -1, pairs).to(device)
    positions = None
    if batch > 1:
        starts = torch.arange(batch, device=device, dtype=torch.int32).mul_(heads * tokens)
        positions = (starts[:, None] + torch.arange(tokens, device=device, dtype=torch.int32))[..., None]
    return PackedTable(rows, positions, tokens, (pairs,), pairing, tokens if heads > 1 else 0)


@dataclass(frozen=True, eq=False)
class Format:
    """One upstream form of rotary tables.

    Attributes:
        name: how reports call it.
        pairing: which channels turn together.
        split: from what the attention is given to cos and sin ``[1 or B, S, 1 or H, P]``, one pair per table in it.
        join: from cos and sin ``[B, S, H, P]`` to what the attention is given.
        exact: whether the model rounds both products and their sum, as exact mode does. What multiplies complex
            numbers or accumulates does not, and is left to the model in exact mode.
        upcasts: whether the model makes float32 of a 16-bit pair once, and not once for each product, so that the
            gradients of both products are added before they are rounded.
        exact_backward: whether exact mode gives the model's gradients too; where not, because the model adds them up in
            another order, forward passes that want some are left to the model in exact mode.
        narrows: whether the model rounds cos and sin to the dtype of its data before it multiplies, as exact mode does.
    """

    name: str
    pairing: Pairing
    split: Callable[[Any], Sequence[Pair]]
    join: Callable[[torch.Tensor, torch.Tensor], Any]
    exact: bool = True
    upcasts: bool = False
    exact_backward: bool = True
    narrows: bool = False

    def accepts(self, rotary: Any) -> bool:
        """Whether ``rotary`` is tensors, or tuples or dictionaries of them, that no gradient is wanted of."""
        if isinstance(rotary, torch.Tensor):
            return not (rotary.requires_grad and torch.is_grad_enabled())
        parts = rotary.values() if isinstance(rotary, dict) else rotary
        return isinstance(rotary, (tuple, dict)) and all(map(self.accepts, parts))

    def pack(self, rotary: Any, device: torch.device, split: Split | None = None) -> list[PackedTable]:
        """The tables in ``rotary``, packed once for as long as its tensors live and are not written to.

        ``split`` says which part of them is meant; all of them without.
        """
        parts = list(_parts(rotary))
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        numbers = tuple(part for part in parts if not isinstance(part, torch.Tensor))
        with torch.inference_mode(False), torch.no_grad():
            if capturing(device):
                # A replay packs what the tensors hold then: a graph's inputs are written anew for every replay.
                return self.tables(part_of(rotary, split), device)
            return _remembered(
                (self, device, numbers, split, stream_of(device)),
                tensors,
                lambda: self.tables(part_of(rotary, split), device),
            )

    def tables(self, rotary: Any, device: torch.device) -> list[PackedTable]:
        """The tables in ``rotary``, packed anew."""
        return [pack(cos, sin, self.pairing, device) for cos, sin in self.split(rotary)]


@dataclass(frozen=True)
class AxisRows:
    """Our own form, which travels through a model whose rope module is replaced: positions and packed axis tables."""

    spec: RopeSpec
    exact: bool = True
    upcasts: bool = False
    exact_backward: bool = True
    narrows: bool = False

    @property
    def pairing(self) -> Pairing:
        """Which channels turn together."""
        return self.spec.pairing

    def accepts(self, rotary: Any) -> bool:
        """Whether ``rotary`` is of this form, rather than cos and sin of the model's own."""
        return bool(rotary[0].dtype == torch.int32)

    def pack(self, rotary: Any, device: torch.device, split: Split | None = None) -> list[PackedTable]:
        """The one table in ``rotary``, int32 positions ``[1 or B, S, 1, axes]`` and rows ``[2, R, P]``.

        Rows may be ``[1, S, 1, 2 * R * P]`` instead, the same for every token. ``split`` says which part of the tokens
        is meant.
        """
        return _remembered((self, device, split), tuple(rotary), lambda: [self._table(*part_of(rotary, split))])

    def _table(self, positions: torch.Tensor, rows: torch.Tensor) -> PackedTable:
        if rows.ndim == 4:
            rows = rows[0, 0, 0].view(2, -1, max(self.spec.pairs))
        elif rows.stride(0) != rows.shape[1] * rows.shape[2]:
            raise ValueError(
                "rows must be whole, [2, R, P], because positions count in all of them, got a part: "
                f"{list(rows.shape)} of strides {list(rows.stride())}; split the positions alone"
            )
        return PackedTable(rows, positions.squeeze(2), positions.shape[1], self.spec.pairs, self.spec.pairing)

    def traceable(self, rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin ``[1 or B, S, 1, rotary_dim]``, as the model's own rope module gives them."""
        positions, rows = rotary
        table = self._table(positions, rows)
        # Made anew: a length that is a compiler's symbol would become a number in the dictionary of those made.
        args = table._make_args(table.tokens, Align.START, True)
        cos, sin = eager.dense_angles(args, table.tokens)
        return repeat(cos, self.pairing), repeat(sin, self.pairing)


def repeat(x: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """``[..., P]`` to ``[..., 2 P]``, each value at both channels of its pair."""
    return x.repeat_interleave(2, dim=-1) if pairing is Pairing.INTERLEAVED else torch.cat((x, x), dim=-1)


# By the first tensor of a table: what is packed from it lives no longer than it does.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# A table of images that stays, beside one of text that is new in every step, would gather what was packed of each.
_MOST_PACKED = 16


def _remembered(
    key: tuple[object, ...], tensors: Sequence[torch.Tensor], build: Callable[[], list[PackedTable]]
) -> list[PackedTable]:
    """What ``build`` gives, remembered by ``key`` and the identity of ``tensors``, unless torch cannot tell writes."""
    if any(tensor.is_inference() for tensor in tensors) or in_mode():
        return build()
    versions = tuple(tensor._version for tensor in tensors)
    rest = tuple(map(id, tensors[1:]))
    known = _packed.setdefault(tensors[0], {})
    found = known.get((key, rest))
    # An id may be of another tensor by now, but not while a weak reference to the first one still answers.
    if found is not None and found[0] == versions and all(r() is t for r, t in zip(found[1], tensors[1:], strict=True)):
        packed: list[PackedTable] = found[2]
        return packed
    built = build()
    known[key, rest] = (versions, [weakref.ref(tensor) for tensor in tensors[1:]], built)
    for oldest in list(known)[:-_MOST_PACKED]:
        known.pop(oldest, None)
    return built


def _parts(rotary: Any) -> Iterator[Any]:
    if isinstance(rotary, (tuple, list, dict)):
        for part in rotary.values() if isinstance(rotary, dict) else rotary:
            yield from _parts(part)
    else:
        yield rotary


def four_dims(x: torch.Tensor) -> torch.Tensor:
    """``[S, P]``, ``[B, S, P]`` or ``[B, S, H, P]`` as ``[B, S, H, P]``."""
    if x.ndim == 2:
        return x[None, :, None]
    return x.unsqueeze(2) if x.ndim == 3 else x


def _split_interleaved(rotary: Any) -> list[Pair]:
    cos, sin = map(four_dims, rotary)
    return [(cos[..., 0::2].float(), sin[..., 1::2].float())]


def _join_interleaved(cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    return repeat(cos[0, :, 0], Pairing.INTERLEAVED), repeat(sin[0, :, 0], Pairing.INTERLEAVED)


def _split_half(rotary: Any) -> list[Pair]:
    cos, sin = map(four_dims, rotary)
    half = cos.shape[-1] // 2
    return [(cos[..., :half].float(), sin[..., :half].float())]


def _join_half(cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    return repeat(cos[0, :, 0], Pairing.HALF), repeat(sin[0, :, 0], Pairing.HALF)


def _split_stacked(rotary: Any) -> list[Pair]:
    cos, sin = four_dims(rotary).chunk(2, dim=-1)
    return [(cos[..., 0::2], sin[..., 1::2])]


def _join_stacked(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.cat((repeat(cos[:, :, 0], Pairing.INTERLEAVED), repeat(sin[:, :, 0], Pairing.INTERLEAVED)), dim=-1)


def _split_complex(rotary: Any) -> list[Pair]:
    numbers = (rotary,) if isinstance(rotary, torch.Tensor) else rotary
    return [(four_dims(each.real).float(), four_dims(each.imag).float()) for each in numbers]


def _split_complex_bhsd(rotary: torch.Tensor) -> list[Pair]:
    return [(rotary.real.transpose(1, 2).float(), rotary.imag.transpose(1, 2).float())]


def _join_complex_bhsd(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.complex(cos, sin).transpose(1, 2)


def _join_complex(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.complex(cos[0, :, 0], sin[0, :, 0])


def _split_matrices(rotary: Any) -> list[Pair]:
    """``[..., P, 2, 2]`` with one dim of size 1 for heads, before the pairs or before the tokens."""
    cos, sin = rotary[..., 0, 0].float(), rotary[..., 1, 0].float()
    tokens = rotary.numel() // (4 * cos.shape[-1])
    batch = rotary.shape[0] if rotary.ndim == 6 else 1
    shape = (batch, tokens // batch, 1, cos.shape[-1])
    return [(cos.reshape(shape), sin.reshape(shape))]


def _join_matrices(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.stack((cos, -sin, sin, cos), dim=-1).view(*cos.shape, 2, 2)[:1, :, :1]


def _split_channels(rotary: Any) -> list[Pair]:
    cos, sin = (x.unflatten(-1, (-1, _head_dim(x.shape[-1])))[..., 0::2].float() for x in rotary)
    return [(cos, sin)]


def _head_dim(channels: int) -> int:
    """A head size that divides ``channels`` and that every backend takes: the angles of pairs say nothing of heads."""
    return next(dim for dim in range(128, 0, -2) if channels % dim == 0)


def _join_channels(cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    return repeat(cos, Pairing.INTERLEAVED).flatten(2), repeat(sin, Pairing.INTERLEAVED).flatten(2)


def _split_head_pairs(rotary: Any) -> list[Pair]:
    cos, sin = rotary
    return [(cos[None].float(), sin[None].float())]


def _join_head_pairs(cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    return cos[0], sin[0]


def _split_head_halves(rotary: Any) -> list[Pair]:
    cos, sin = rotary
    return [(cos.transpose(1, 2).float(), sin.transpose(1, 2).float())]


def _join_head_halves(cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    return cos.transpose(1, 2), sin.transpose(1, 2)


INTERLEAVED = Format("cos and sin, each at two neighbours", Pairing.INTERLEAVED, _split_interleaved, _join_interleaved)
"""``[S, D]`` or ``[B, S, D]``, multiplied in float32: ``embeddings.apply_rotary_emb`` of diffusers 0.42.1."""

HALF = Format("cos and sin, each at both halves", Pairing.HALF, _split_half, _join_half)
"""The same with ``use_real_unbind_dim=-2``."""

HALF_NARROWED = Format(
    "cos and sin, each at both halves, in the dtype of the data", Pairing.HALF, _split_half, _join_half, narrows=True
)
"""The same, rounded to the dtype of the data and multiplied in it: ``transformer_minimax_h3.py``."""

STACKED = Format("cos and then sin, each at two neighbours", Pairing.INTERLEAVED, _split_stacked, _join_stacked)
"""One tensor ``[B, S, 2 D]``, in the dtype that data and table promote to: ``transformer_helios.py``."""

COMPLEX = Format("complex numbers", Pairing.INTERLEAVED, _split_complex, _join_complex, exact=False)
"""``[S, D / 2]`` or ``[B, S, D / 2]``, one table or a tuple of tables: ``transformer_qwenimage.py``, Z-Image."""

COMPLEX_BHSD = Format(
    "complex numbers, heads before tokens", Pairing.INTERLEAVED, _split_complex_bhsd, _join_complex_bhsd, exact=False
)
"""``[1 or B, 1, S, D / 2]``: ``transformer_anyflow.py``, ``transformer_sana_wm.py``."""

MATRICES = Format("rotation matrices", Pairing.INTERLEAVED, _split_matrices, _join_matrices, upcasts=True)
"""``[B, S, 1, D / 2, 2, 2]``, ``[B, 1, S, D / 2, 2, 2]`` or ``[S, 1, D / 2, 2, 2]``: Kandinsky, HiDream, PRX."""

CHANNELS = Format("cos and sin of every channel", Pairing.INTERLEAVED, _split_channels, _join_channels)
"""``[B, S, H * D]``, neighbours turn, each head by other angles: ``transformer_ltx.py``."""

HEAD_PAIRS = Format("cos and sin of every pair", Pairing.INTERLEAVED, _split_head_pairs, _join_head_pairs, upcasts=True)
"""``[S, H, D / 2]``, neighbours turn, each head by other angles: ``MochiAttnProcessor2_0``."""

HEAD_HALVES = Format(
    "cos and sin of every pair and head", Pairing.HALF, _split_head_halves, _join_head_halves, exact=False
)
"""``[B, H, S, D / 2]``, halves turn, each head by other angles, by fused multiply-adds: ``transformer_ltx2.py``."""
