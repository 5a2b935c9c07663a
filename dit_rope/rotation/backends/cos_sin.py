"""The rows of a table that the tokens of a rotation have, and their cos and sin, in torch's own operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...rotation_args import RotationArgs
from ...spec import Pairing
from ...tables.shards import grid_coordinates


def dense_cos_sin(args: RotationArgs, length: int, heads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[B or 1, length, 1, pairs]`` of every token of a sequence, (1, 0) where it does not rotate.

    B is the batch of ``args.positions``: with ``args.entries``, the number of entries. With ``args.head_rows`` the
    shape is ``[B or 1, length, heads, pairs]``.
    """
    table, rows = needed_rows(args.rows, row_indices(args, heads))
    gathered = torch.cat(gather(identity_row(table), rows, args.pairs), dim=-1)
    around = (0, 0, 0, 0, args.prefix, length - args.prefix - rows.shape[1])
    cos, sin = (
        torch.nn.functional.pad(part, around, value=identity)
        for part, identity in zip(gathered.unbind(0), (1.0, 0.0), strict=True)
    )
    return cos, -sin if args.inverse else sin


def unrotated_channels(args: RotationArgs, length: int) -> torch.Tensor | None:
    """Which channels of a sequence's tokens keep their values, ``[B or 1, length, 1, 2 * pairs]`` bool.

    None where every token rotates, as far as can be said without reading the positions.
    """
    if args.count == length and not may_be_unrotated(args):
        return None
    rows = row_indices(args, 1)
    around = (0, 0, 0, 0, args.prefix, length - args.prefix - rows.shape[1])
    return torch.nn.functional.pad(channels_of_negative_rows(rows, args), around, value=True)


def may_be_unrotated(args: RotationArgs) -> bool:
    """Whether some of the grid's tokens may have negative rows. Positions are not read: on a GPU that would wait."""
    return args.positions is not None or args.token_offset + args.count > math.prod(args.sizes)


def row_indices(args: RotationArgs, heads: int) -> torch.Tensor:
    """Row of each rotated token on each axis, ``[1 or B, n, 1, axes]`` int64; by head where ``args.head_rows``."""
    if args.positions is not None:
        rows = args.positions.long().expand(-1, args.count, -1)
    else:
        coordinates = grid_coordinates(args.sizes, args.token_offset, args.count, args.rows.device)
        columns = [coordinate + first for coordinate, first in zip(coordinates, args.first_rows, strict=True)]
        rows = torch.stack(columns, dim=-1)[None]
    rows = rows.unsqueeze(2)
    if not args.head_rows:
        return rows
    further = torch.arange(heads, device=rows.device)[:, None] * args.head_rows
    return torch.where(rows < 0, rows, rows + further)


def needed_rows(table: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table ``[2, R, P]`` no longer than ``rows`` ``[B or 1, n, heads, axes]``, and the row numbers in it.

    The rows of a few tokens are gathered first, in the table's dtype, so that a cache for a million positions is not
    converted for them.
    """
    if table.shape[1] <= rows.numel():
        return table, rows
    flat = rows.flatten()
    numbers = torch.where(flat < 0, -1, torch.arange(flat.shape[0], device=flat.device))
    where = flat.clamp(min=0)
    # One by one: index_select of both copies the whole table where cosines and sines share a row of memory.
    return torch.stack([part.index_select(0, where) for part in table.unbind(0)]), numbers.view(rows.shape)


def gather(table: torch.Tensor, rows: torch.Tensor, pairs: Sequence[int]) -> list[torch.Tensor]:
    """``[..., *rows.shape[:3], pairs[a]]`` of each axis from ``table`` ``[..., 1 + R, P]``.

    ``rows`` are ``[B or 1, n, heads, axes]``. The first row of the table is the identity, for negative rows; row 0
    comes after it.
    """
    flat = (rows.flatten(0, 2) + 1).clamp(min=0)
    gathered = (table.index_select(-2, flat[:, axis]) for axis in range(len(pairs)))
    return [part[..., :width].unflatten(-2, rows.shape[:3]) for part, width in zip(gathered, pairs, strict=True)]


def channels_of_negative_rows(rows: torch.Tensor, args: RotationArgs) -> torch.Tensor:
    """``[B or 1, n, 1, 2 * pairs]``: which channels of which tokens have the negative rows among ``rows``."""
    negative = torch.cat(
        [(rows[..., a : a + 1] < 0).expand(*rows.shape[:3], width) for a, width in enumerate(args.pairs)], dim=-1
    )
    if args.pairing is Pairing.HALF:
        return torch.cat((negative, negative), dim=-1)
    return torch.stack((negative, negative), dim=-1).flatten(-2)


def identity_row(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` ``[2, R, P]`` after a row (1, 0): ``[2, 1 + R, P]``."""
    identity = rows.new_zeros(2, 1, rows.shape[2])
    identity[0] = 1.0
    return torch.cat((identity, rows), dim=1)
