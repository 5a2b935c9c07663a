"""The forms in which models pass rotary tables to their attention, and their conversion to packed tables.

Models hold the same cos and sin in a dozen forms: each value twice, complex numbers, two-by-two matrices, angles, one
table per head. A :class:`Format` packs one of these forms into a
:class:`~dit_rope.hooks.packed_tables.PackedTable`. It can also make the form from cos and sin, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..spec import Pairing
from ..torch_state import capturing
from .packed_tables import (
    PackedTable,
    UnfitTable,
    axis_tables_of,
    is_known,
    pack,
    packed_once,
    recall,
    remember,
    require_fit,
)

Pair = tuple[torch.Tensor, torch.Tensor]
_WIDE = frozenset({torch.float64, torch.complex128})


@dataclass(frozen=True, eq=False)
class Format:
    """One form of rotary tables. The rotary argument is what the model passes to its attention.

    Attributes:
        name: its name in reports.
        pairing: which channels rotate together.
        split: computes cos and sin ``[1 or B, S, 1 or H, P]`` of each table in a rotary argument.
        join: computes a rotary argument from cos and sin ``[B, S, H, P]``.
        exact: whether the model rounds both products and their sum, as exact mode does. A model that multiplies complex
            numbers or accumulates may not.
        formula: for a form that is not ``exact``: the operations by which the model rotates heads ``[B, S, H, D]`` by
            cos and sin ``[1 or B, S, 1 or H, P]``. Exact mode tries which arithmetic has their bits. Without one, or if
            none has, the model rotates by itself.
        narrows: whether the model rounds cos and sin to the dtype of its data before it multiplies, as exact mode does.
        doubled: for a form that holds each value twice: computes pairs of tensors from a rotary argument, one with the
            first and one with the second of these values. The two must be equal, because only one is read.
        every_sample: whether the table has rows for each sample, even if all samples have the same rows.
        every_head: whether the table has rows for each head, even if all heads have the same rows.
        axes: whether it is a pair ``[1, S, 1, D]`` that may be the dense form of an axis table.
    """

    name: str
    pairing: Pairing
    split: Callable[[Any], Sequence[Pair]]
    join: Callable[[torch.Tensor, torch.Tensor], Any]
    exact: bool = True
    formula: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    narrows: bool = False
    doubled: Callable[[Any], Sequence[Pair]] | None = None
    every_sample: bool = False
    every_head: bool = False
    axes: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Format:
        return self  # tables are packed by format, so a copy of a model reuses what was packed for the original

    def accepts(self, rotary: Any) -> bool:
        """Whether ``rotary`` is a tensor, or a tuple or dictionary of tensors, without gradients."""
        if isinstance(rotary, torch.Tensor):
            return not (rotary.requires_grad and torch.is_grad_enabled())
        items = rotary.values() if isinstance(rotary, dict) else rotary
        return isinstance(rotary, (tuple, dict)) and len(items) > 0 and all(map(self.accepts, items))

    def pack(self, rotary: Any, device: torch.device, exact: bool = False) -> list[PackedTable]:
        """The packed tables of the rotary argument ``rotary``; packed again only if it may have changed.

        Raises:
            UnfitTable: it has another form or needs a gradient, or exact mode cannot have the bits of the model: the
                model rounds otherwise (see ``exact``), or multiplies in float64 because the tables are float64.
        """
        if not torch.is_grad_enabled():
            packed = recall((self, exact), rotary if type(rotary) is tuple else (rotary,), device)
            if packed is not None:
                return packed
        require_fit(self.accepts(rotary))
        leaves = list(_leaves(rotary))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        exactable = self.exact or self.formula is not None
        require_fit(not exact or (exactable and all(tensor.dtype not in _WIDE for tensor in tensors)))
        numbers = tuple(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))
        with torch.inference_mode(False), torch.no_grad():
            tables = packed_once((self, numbers), tensors, device, lambda: self._packed(rotary, tensors, device))
        if not numbers and (isinstance(rotary, torch.Tensor) or len(rotary) == len(tensors)):
            remember((self, exact), tensors, device, tables)
        return tables

    def _packed(self, rotary: Any, tensors: list[torch.Tensor], device: torch.device) -> list[PackedTable]:
        try:
            table = axis_tables_of(tensors) if self.axes and tensors[0].device == device else None
            if table is not None:
                return [table]
            if self.doubled is not None and not is_known(tensors):
                self._check_doubled(rotary, device)
            return self.tables(rotary, device)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise UnfitTable from error

    def _check_doubled(self, rotary: Any, device: torch.device) -> None:
        assert self.doubled is not None
        if capturing(device):
            return  # comparing values would wait for the device
        for first, second in self.doubled(rotary):
            require_fit(torch.equal(first, second))

    def tables(self, rotary: Any, device: torch.device) -> list[PackedTable]:
        """The tables in ``rotary``, packed."""
        return [pack(cos, sin, self.pairing, device) for cos, sin in self.split(rotary)]


def repeat(x: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """``[..., P]`` to ``[..., 2 P]``, each value at both channels of its pair."""
    return x.repeat_interleave(2, dim=-1) if pairing is Pairing.INTERLEAVED else torch.cat((x, x), dim=-1)


def _leaves(rotary: Any) -> Iterator[Any]:
    if isinstance(rotary, (tuple, list, dict)):
        for item in rotary.values() if isinstance(rotary, dict) else rotary:
            yield from _leaves(item)
    else:
        yield rotary


def four_dims(x: torch.Tensor) -> torch.Tensor:
    """``[S, P]``, ``[B, S, P]`` or ``[B, S, H, P]`` as ``[B, S, H, P]``."""
    if x.ndim == 2:
        return x[None, :, None]
    return x.unsqueeze(2) if x.ndim == 3 else x


def neighbours(rotary: Any) -> list[Pair]:
    """The first and the second channel of every pair of each tensor."""
    return [(x[..., 0::2], x[..., 1::2]) for x in rotary]


def halves(rotary: Any) -> list[Pair]:
    """The first and the second half of each tensor."""
    return [(first, second) for first, second in (x.chunk(2, dim=-1) for x in rotary)]


def _split_interleaved(rotary: Any) -> list[Pair]:
    cos, sin = map(four_dims, rotary)
    return [(cos[..., 0::2].float(), sin[..., 1::2].float())]


def _split_axes(rotary: Any) -> list[Pair]:
    cos, sin = rotary
    return [(cos[..., 0::2], sin[..., 1::2])]


def _join_axes(cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    return repeat(cos[:1, :, :1], Pairing.INTERLEAVED), repeat(sin[:1, :, :1], Pairing.INTERLEAVED)


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


def _columns(rotary: Any) -> list[Pair]:
    """Cos of both columns, and sin of both: the second column repeats the first."""
    return [(rotary[..., 0, 0], rotary[..., 1, 1]), (rotary[..., 1, 0], -rotary[..., 0, 1])]


def _join_matrices(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.stack((cos, -sin, sin, cos), dim=-1).view(*cos.shape, 2, 2)[:1, :, :1]


def _split_channels(rotary: Any) -> list[Pair]:
    cos, sin = (x.unflatten(-1, (-1, _head_dim(x.shape[-1])))[..., 0::2].float() for x in rotary)
    return [(cos, sin)]


def _head_dim(channels: int) -> int:
    """A head size that divides ``channels`` and that every backend takes; cos and sin do not depend on it."""
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


def _multiply_complex(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By one product of complex numbers: ``apply_rotary_emb_qwen`` and ``embeddings.apply_rotary_emb``."""
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * torch.complex(cos, sin)).flatten(3).type_as(x)


def _accumulate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One product added to the other by ``addcmul``: ``apply_split_rotary_emb`` of LTX-2."""
    halves = x.unflatten(-1, (2, -1)).float()
    first, second = halves[..., :1, :], halves[..., 1:, :]
    out: torch.Tensor = halves * cos.unsqueeze(-2)
    out[..., :1, :].addcmul_(-sin.unsqueeze(-2), second)
    out[..., 1:, :].addcmul_(sin.unsqueeze(-2), first)
    return out.flatten(-2).to(x.dtype)


INTERLEAVED = Format(
    "cos and sin, each at two neighbours",
    Pairing.INTERLEAVED,
    _split_interleaved,
    _join_interleaved,
    doubled=neighbours,
)
"""``[S, D]`` or ``[B, S, D]``, multiplied in float32: ``embeddings.apply_rotary_emb`` of diffusers 0.42.1."""

AXES = Format("cos and sin, each at two neighbours, of a grid", Pairing.INTERLEAVED, _split_axes, _join_axes, axes=True)
"""``[1, S, 1, D]``; the model reads the cosines of even and the sines of odd channels: ``transformer_wan.py``."""

HALF = Format("cos and sin, each at both halves", Pairing.HALF, _split_half, _join_half, doubled=halves)
"""The same as :data:`INTERLEAVED` with ``use_real_unbind_dim=-2``."""

HALF_NARROWED = replace(HALF, name=f"{HALF.name}, in the dtype of the data", narrows=True)
"""The same, rounded to the dtype of the data and multiplied in it: ``transformer_minimax_h3.py``."""

STACKED = Format("cos and then sin, each at two neighbours", Pairing.INTERLEAVED, _split_stacked, _join_stacked)
"""One tensor ``[B, S, 2 D]``, in the dtype that data and table promote to: ``transformer_helios.py``."""

COMPLEX = Format(
    "complex numbers",
    Pairing.INTERLEAVED,
    _split_complex,
    _join_complex,
    exact=False,
    formula=_multiply_complex,
)
"""``[S, D / 2]`` or ``[B, S, D / 2]``, one table or a tuple of tables: ``transformer_qwenimage.py``, Z-Image."""

COMPLEX_BHSD = Format(
    "complex numbers, heads before tokens",
    Pairing.INTERLEAVED,
    _split_complex_bhsd,
    _join_complex_bhsd,
    exact=False,
    formula=_multiply_complex,
)
"""``[1 or B, 1, S, D / 2]``: ``transformer_anyflow.py``, ``transformer_sana_wm.py``."""

MATRICES = Format("rotation matrices", Pairing.INTERLEAVED, _split_matrices, _join_matrices, doubled=_columns)
"""``[B, S, 1, D / 2, 2, 2]``, ``[B, 1, S, D / 2, 2, 2]`` or ``[S, 1, D / 2, 2, 2]``: Kandinsky, HiDream, PRX."""

CHANNELS = Format(
    "cos and sin of every channel",
    Pairing.INTERLEAVED,
    _split_channels,
    _join_channels,
    doubled=neighbours,
    every_head=True,
)
"""``[B, S, H * D]``, neighbours rotate, each head by other angles: ``transformer_ltx.py``."""

HEAD_PAIRS = Format("cos and sin of every pair", Pairing.INTERLEAVED, _split_head_pairs, _join_head_pairs)
"""``[S, H, D / 2]``, neighbours rotate, each head by other angles: ``MochiAttnProcessor2_0``."""

HEAD_HALVES = Format(
    "cos and sin of every pair and head",
    Pairing.HALF,
    _split_head_halves,
    _join_head_halves,
    exact=False,
    formula=_accumulate,
    every_sample=True,
    every_head=True,
)
"""``[B, H, S, D / 2]``, halves rotate, each head by other angles, by fused multiply-adds: ``transformer_ltx2.py``."""
