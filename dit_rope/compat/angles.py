"""Cos and sin for calls without a cache: the positions of a ragged batch, and rows at any positions.

Rows come from the smaller of two sources: a table of all positions from the lowest to the highest, which is cached and
shared by all layers, or one row for each token, computed for the call. The table needs the values of the positions, so
it is used only for positions in host memory: on CPU, or lists and CPU tensors for queries on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..scalars import as_int, integer
from ..spec import Grid, RopeSpec
from ..tables.axes import ROW_BLOCK
from ..tables.scaling import device_frequencies
from ..tables.table import rope_table
from ..torch_state import in_mode
from .dense import check_position_tensor

Ints = torch.Tensor | Sequence[int]

_TABLE_POSITIONS = 2**24  # tables have positions in float32, which holds every integer below it


def ragged_positions(indptr: Ints, offsets: Ints, nnz: int) -> torch.Tensor:
    """The position of every token of a ragged batch: sequence i counts up from ``offsets[i]``.

    It does not wait for the device.

    Args:
        indptr: ``[batch + 1]`` int32 or int64, ascending from 0 to nnz; values are checked on CPU only.
        offsets: ``[batch]``, on the same device. Both may be sequences of ints.
        nnz: tokens of all sequences together.

    Returns:
        ``[nnz]``, int64, on the device of indptr.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> ragged_positions([0, 1, 5, 10], [4, 6, 3], 10).tolist()
        [4, 6, 7, 8, 9, 3, 4, 5, 6, 7]
    """
    nnz = integer("nnz", nnz, 0)
    starts, firsts = _as_tensor("indptr", indptr), _as_tensor("offsets", offsets)
    check_position_tensor("indptr", starts, (1,), None)
    check_position_tensor("offsets", firsts, (1,), starts.device)
    if starts.shape[0] != firsts.shape[0] + 1:
        raise ValueError(
            f"indptr must have one value more than offsets ({firsts.shape[0]}), got {starts.shape[0]} values"
        )
    starts, firsts = starts.long(), firsts.long()
    lengths = starts.diff()
    if starts.device.type == "cpu" and not in_mode():
        ends = int(starts[0]), int(starts[-1])
        if ends != (0, nnz) or (lengths < 0).any():
            raise ValueError(f"indptr must rise from 0 to the {nnz} tokens of q, got {starts.tolist()}")
    shift = torch.repeat_interleave(firsts - starts[:-1], lengths, output_size=nnz)
    return shift + torch.arange(nnz, device=starts.device)


def _as_tensor(name: str, values: Ints) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values
    if (
        not isinstance(values, Sequence)
        or isinstance(values, (str, bytes))
        or not all((number := as_int(value)) is not None and -(2**63) <= number < 2**63 for value in values)
    ):
        raise TypeError(f"{name} must be an int32 or int64 tensor, or a sequence of ints, got {values!r}")
    return torch.tensor([int(value) for value in values], dtype=torch.int64, device="cpu")


def token_rows(
    positions: torch.Tensor, spec: RopeSpec, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cos and sin ``[2, R, n]`` on ``device``, and the row of each token ``[1, nnz, 1]``; None if token i has row i."""
    wide = torch.promote_types(dtype, torch.float32)
    if positions.device.type == "cpu" and positions.numel() and not in_mode():
        lowest, highest = (int(end) for end in positions.aminmax())
        # In whole blocks, so that the steps of a decoding loop share tables.
        first = lowest // ROW_BLOCK * ROW_BLOCK
        length = -(-(highest + 1 - first) // ROW_BLOCK) * ROW_BLOCK
        if first >= 0 and highest < _TABLE_POSITIONS and length <= positions.shape[0]:
            table = rope_table(spec, Grid(length, start_frame=first), device=device, dtype=wide)
            return table.rows, (positions - first).to(device, torch.int32)[None, :, None]
    return _rows_of_tokens(positions.to(device), spec, wide), None


def _rows_of_tokens(positions: torch.Tensor, spec: RopeSpec, dtype: torch.dtype) -> torch.Tensor:
    """Cos and sin ``[2, nnz, n]`` of every token, from angles in float64 if the device has it."""
    frequencies = device_frequencies(spec, 0, positions.device)
    angles = frequencies.angles(positions.to(frequencies.inverse.dtype))
    return (torch.stack((angles.cos(), angles.sin())) * frequencies.magnitude).to(dtype)
