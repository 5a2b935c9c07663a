"""Allegro: no norm. Each third of a head's channels rotates by one axis: time, height or width.

Pairs are the halves of a third. The pipeline builds a table for each axis, and the row of each token in it, once for
all steps. The sequence has no text. Sources: ``transformer_allegro.py``, ``attention_processor.py`` and
``embeddings.apply_rotary_emb_allegro`` of diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ResultRotation
from ..hooks.formats import Format, Pair, repeat
from ..hooks.packed_tables import Align, PackedTable, require_fit
from ..rotation_args import RotationArgs
from ..spec import Pairing

_AXES = 3


class _AxisTable(PackedTable):
    """The tables of all axes, one after another. Positions ``[3, tokens, 1]`` have a row for each token and axis."""

    def make_args(self, length: int, align: Align, exact: bool) -> RotationArgs:
        args = super().make_args(self.tokens, align, exact)
        assert args.positions is not None
        return replace(args, positions=args.positions.repeat(1, length // self.tokens, 1), count=length)


class _AxisFormat(Format):
    """Three tables, one for each axis, and the row of each token in each of them."""

    def tables(self, rotary: Any, device: torch.device) -> list[PackedTable]:
        """One table of all axes."""
        pairs = self.split(rotary)
        for (cos, _), indices in zip(pairs, rotary[1], strict=True):
            require_fit(indices.dtype in (torch.int32, torch.int64) and indices.numel() > 0)
            require_fit(int(indices.min()) >= 0 and int(indices.max()) < cos.shape[1])
        rows = torch.cat([torch.stack(pair).flatten(1, 3) for pair in pairs], dim=1).to(device)
        first = [sum(cos.shape[1] for cos, _ in pairs[:axis]) for axis in range(_AXES)]
        positions = torch.stack([indices.flatten() + start for indices, start in zip(rotary[1], first, strict=True)])
        positions = positions.to(device, torch.int32).unsqueeze(2)
        return [_AxisTable(rows, positions, positions.shape[1], (rows.shape[-1],), self.pairing)]


def _split(rotary: Any) -> Sequence[Pair]:
    """Cos and sin ``[1, rows, 1, D / 6]`` of each axis."""
    half = rotary[0][0][0].shape[-1] // 2
    return [(cos[None, :, None, :half].float(), sin[None, :, None, :half].float()) for cos, sin in rotary[0]]


def _halves(rotary: Any) -> Sequence[Pair]:
    """Both halves of every table, which must be equal: only the first is read."""
    return [tuple(table.chunk(2, dim=-1)) for pair in rotary[0] for table in pair]


def _join(cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """A table for each axis, with a third of the pairs. Token i has row i of each."""
    by_axis = zip(*(x[0, :, 0].chunk(_AXES, dim=-1) for x in (cos, sin)), strict=True)
    tables = tuple((repeat(c, Pairing.HALF), repeat(s, Pairing.HALF)) for c, s in by_axis)
    rows = torch.arange(cos.shape[1], device=cos.device).unsqueeze(0)
    return tables, (rows,) * _AXES


class _RotationByAxis(AttentionRotation):
    """Each third of a head rotates by its own axis."""

    def rotate_result(self, y: torch.Tensor, rotation: ResultRotation) -> torch.Tensor:
        """Rotates a projection ``[B, S, H * D]``, as if the axes were a batch."""
        head_dim = rotation.table.head_dim
        require_fit(y.shape[-1] % (_AXES * head_dim) == 0)
        by_axis = y.unflatten(-1, (-1, _AXES, head_dim)).flatten(0, 1).permute(2, 0, 1, 3)
        return rotation.rotate_heads(by_axis).permute(1, 2, 0, 3).reshape(y.shape)


ALLEGRO = ModelAdapter(
    "diffusers.models.transformers.transformer_allegro.AllegroTransformer3DModel",
    rotations=(
        _RotationByAxis(
            attention=r"transformer_blocks\.\d+\.attn1",
            attention_class="Attention",
            format=_AxisFormat(
                "cos and sin of each axis, and rows of them", Pairing.HALF, _split, _join, doubled=_halves
            ),
            layout=Layout.BSC,
            processors=("AllegroAttnProcessor2_0",),
        ),
    ),
    not_patched=("tables, which the pipeline builds once for all steps",),
)

ADAPTERS = (ALLEGRO,)
