"""Moves rotated keys to other positions, such as those that :mod:`dit_rope.streaming.eviction` plans.

OpenVINO GenAI calls it token rotation (``cache_eviction.cpp`` at da1db864). A key rotated at position p, and rotated
again by the angle of d positions, is a key rotated at p + d. Every rotation rounds, so 16-bit keys drift when they are
shifted again and again (see ``docs/streaming.md``). They are refused unless the caller allows it.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ..rotation import ops
from ..rotation.choice import check_backend
from ..rotation_args import RotationArgs
from ..scalars import as_int, check_flags, integer
from ..spec import RopeSpec
from ..tables.caches import SHIFTS
from ..tables.scaling import device_frequencies
from ..torch_state import capturing, finish, in_mode
from ..validation import DTYPES, check_inplace, check_memory, checked_device

_LASTING_DTYPES = (torch.float32, torch.float64)
_LEAST_ROWS = 64
_MOST_ROWS = 2**20  # so that a wrong delta does not take all memory
_LONGEST_STEP = 2**32  # float64 holds the position of the last row exactly
_LONGEST_SHIFT = _LONGEST_STEP * _MOST_ROWS


class ShiftTable:
    """Cos and sin of shifts by 0, 1, 2, ... times ``step`` positions on one axis, for all layers of a model.

    Angles are computed in float64, cos and sin rounded once. Their magnitude is 1, because the keys have the magnitude
    of a scaling already. Rows never change; :meth:`reserve` copies them into a longer tensor for longer shifts. A table
    can be copied and pickled.

    Args:
        spec: the rotation of the keys.
        axis: the axis along which keys move: 0 for the frames of a video, or the positions of a text.
        step: positions from one row to the next, such as the tokens of a cache block.
        device: the device of the rows; CPU when None.
        dtype: the dtype of the rows: float32, or float64 for float64 keys.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> import torch
        >>> from dit_rope import RopeSpec, ShiftTable, shift_keys
        >>> table = ShiftTable(RopeSpec((64,)), step=16)
        >>> deltas = torch.tensor([[1], [3]], dtype=torch.int32)
        >>> shift_keys(torch.randn(2, 16, 4, 64), table, deltas=deltas).shape
        torch.Size([2, 16, 4, 64])
    """

    def __init__(
        self,
        spec: RopeSpec,
        *,
        axis: int = 0,
        step: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(spec, RopeSpec):
            raise TypeError(f"spec must be a RopeSpec, got {type(spec).__name__}")
        axis = integer("axis", axis, 0)
        if axis >= len(spec.dims):
            raise ValueError(f"axis must be at least 0 and below {len(spec.dims)}, got {axis}")
        positions = as_int(step)
        if positions is None or not 1 <= positions <= _LONGEST_STEP:
            raise ValueError(f"step must be a positive int of at most {_LONGEST_STEP}, got {step!r}")
        if dtype not in _LASTING_DTYPES:
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        self.spec = spec
        self.axis = axis
        self.step = positions
        self.device = checked_device("cpu" if device is None else device)
        self.dtype = dtype
        self._rows = self._build(0, _LEAST_ROWS)
        self._begin()

    def _begin(self) -> None:
        """Makes the attributes that copies and pickles leave out."""
        self._lock = threading.Lock()
        self._outgrown: list[torch.Tensor] = []  # CUDA graphs may read them; together they are smaller than the rows
        _TABLES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_outgrown")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.device = self._rows.device  # which torch.load may have changed
        self._begin()

    @property
    def rows(self) -> torch.Tensor:
        """``[2, R, P]`` cos and sin; row i shifts by ``i * step``. P = max(spec.pairs), unused columns are zero."""
        return self._rows

    def reserve(self, steps: int) -> torch.Tensor:
        """Grows the table to more than ``steps`` rows, at least to twice its size, and returns the rows.

        Growing waits for the device, so the new rows are complete for every stream.

        Raises:
            ValueError: steps that are not an int of at least 0, or more than a table holds.
            RuntimeError: the table has to grow while a CUDA graph is being captured.

        Example:
            >>> from dit_rope import RopeSpec, ShiftTable
            >>> ShiftTable(RopeSpec((64,))).reserve(100).shape
            torch.Size([2, 128, 32])
        """
        number = as_int(steps)
        if number is None or number < 0:
            raise ValueError(f"steps must be an int of at least 0, got {steps!r}")
        steps = number
        if steps >= _MOST_ROWS:
            raise ValueError(f"steps must be below {_MOST_ROWS}, got {steps}; use a table of more positions a step")
        if steps < self._rows.shape[1]:
            return self._rows
        with self._lock:
            count = self._rows.shape[1]
            if steps >= count:
                if capturing(self.device):
                    raise RuntimeError(
                        f"a ShiftTable must hold row {steps} before a CUDA graph is captured, got {count} rows; call "
                        f"reserve({steps}) first"
                    )
                more = self._build(count, 1 << steps.bit_length())
                with torch.inference_mode(False):
                    grown = torch.cat((self._rows, more), dim=1)
                finish(self.device)
                if _graphs_read(self.device):
                    self._outgrown.append(self._rows)
                self._rows = grown
        return self._rows

    def _build(self, first: int, stop: int) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(first, stop, dtype=torch.float64, device="cpu") * self.step
            return _rows_of(positions, self.spec, self.axis, self.dtype).to(self.device)


_TABLES: weakref.WeakSet[ShiftTable] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Makes new locks: a thread that the child lacks may hold the old ones. Rows are replaced in one step, so whole."""
    for table in _TABLES:
        table._lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _graphs_read(device: torch.device) -> bool:
    """Whether a CUDA graph may read replaced rows on ``device`` at its replays."""
    return device.type == "cuda"


def _rows_of(positions: torch.Tensor, spec: RopeSpec, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """Cos and sin ``[2, n, P]`` of shifts by ``positions`` ``[n]`` on one axis, computed on their device."""
    frequencies = device_frequencies(spec, axis, positions.device)
    angles = frequencies.angles(positions.to(frequencies.inverse.dtype))
    rows = torch.stack((angles.cos(), angles.sin())).to(dtype)
    return torch.nn.functional.pad(rows, (0, max(spec.pairs) - spec.pairs[axis]))


@dataclass(frozen=True)
class _ShiftRows:
    """The rows of shifts: those of a table, or computed from a spec for each call."""

    spec: RopeSpec
    axis: int
    step: int
    device: torch.device
    dtype: torch.dtype
    table: ShiftTable | None

    def of_whole_shift(self, delta: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and the row number of all keys ``[1, 1]``; ``[0, 1]`` for a delta of 0: keys keep their bits then."""
        if delta % self.step:
            raise ValueError(f"delta_frames must be a multiple of the table's step {self.step}, got {delta}")
        if abs(delta) > _LONGEST_SHIFT:
            raise ValueError(f"delta_frames must be at most {_LONGEST_SHIFT} positions, got {delta}")
        steps = abs(delta) // self.step
        in_table = self.table is not None and steps < self.table.rows.shape[1]
        number = steps if in_table else 0
        numbers = torch.full((1 if delta else 0, 1), number, dtype=torch.int32, device=self.device)
        if self.table is not None and in_table:
            return self.table.rows, numbers
        if not delta:
            return torch.empty(0), numbers
        key = (self.spec, self.axis, abs(delta), self.dtype)
        return SHIFTS.get(key, self.device, lambda: self._row(abs(delta))), numbers

    def _row(self, position: int) -> torch.Tensor:
        positions = torch.full((1,), position, dtype=torch.float64, device="cpu")
        return _rows_of(positions, self.spec, self.axis, self.dtype).to(self.device)

    def of_deltas(self, deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and the row number of each delta. On CPU a table grows for the longest delta."""
        if self.table is not None:
            if self.device.type == "cpu" and deltas.numel() and not in_mode():
                _reserve(self.table, int(deltas.max()))
            return self.table.rows, deltas
        rows = _rows_of(deltas.flatten(), self.spec, self.axis, self.dtype)
        numbers = torch.arange(deltas.numel(), dtype=torch.int32, device=deltas.device).view(deltas.shape)
        return rows, torch.where(deltas < 0, -1, numbers)


def shift_keys(
    keys: torch.Tensor,
    table: RopeSpec | ShiftTable,
    *,
    delta_frames: int | None = None,
    deltas: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
    inplace: bool = False,
    allow_lossy: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Moves rotated keys along one axis, as if they had been rotated at their new positions; other channels keep bits.

    Args:
        keys: ``[blocks, block_size, H, D]``, or ``[B, S, H, D]``; last dim contiguous, any outer strides (pass a cache
            ``[blocks, H, block_size, D]`` transposed).
        table: a :class:`ShiftTable`; or the spec of the keys, to move them by single positions on axis 0.
        delta_frames: positions by which all keys move; negative moves towards the start. If the table has no row for
            it, one row is computed and cached.
        deltas: int32 ``[n, 1]`` (per block) or ``[n, block_size]`` (per token), on the device of the keys: steps of
            ``table`` by which each moves towards the start, 0 or more. Pass either this or ``delta_frames``.
        blocks: int32 ``[n]``, the block of each row of ``deltas``, no block twice; None for all blocks in order. Other
            blocks are neither read nor written.
        inplace: overwrite ``keys``; otherwise the result is a new tensor.
        allow_lossy: accept float16 and bfloat16 keys, which lose about one rounding in every call.
        backend: as in :func:`~dit_rope.rotate`.

    Wrong deltas (negative, or past the table) and wrong blocks raise on CPU. On a GPU the check would wait for the
    device: their keys keep their values, and nothing is read for them. So a table must be reserved for the longest
    delta before deltas on a GPU are passed; a spec needs no such call.

    Returns:
        The keys at their new positions; ``keys`` itself with ``inplace``.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        NotImplementedError: quantized keys: integers, or floats of 8 bits.

    Example:
        >>> import torch
        >>> from dit_rope import RopeSpec, shift_keys
        >>> shift_keys(torch.randn(2, 16, 4, 64), RopeSpec((64,)), delta_frames=-3).shape
        torch.Size([2, 16, 4, 64])
    """
    check_flags(inplace=inplace, allow_lossy=allow_lossy)
    check_backend(backend)
    _check_keys(keys, allow_lossy)
    if (delta_frames is None) == (deltas is None):
        raise ValueError(f"delta_frames or deltas must be given, not both, got {delta_frames!r} and {deltas!r}")
    source = _row_source(keys, table)
    if deltas is not None:
        _check_deltas(keys, deltas, blocks)
        rows, steps = source.of_deltas(deltas)
        towards_start = True
    elif blocks is not None:
        raise ValueError("blocks must come with deltas, got delta_frames; pass deltas of one value per block")
    else:
        delta = as_int(delta_frames)
        if delta is None:
            raise TypeError(f"delta_frames must be an int, got {delta_frames!r}")
        rows, steps = source.of_whole_shift(delta)
        towards_start = delta < 0
    if inplace:
        check_inplace(("keys",), (keys,))
    target = keys if inplace else keys.clone()
    if steps.numel() and target.numel():
        args = _arguments(target, source, rows, steps, blocks, towards_start)
        with torch.no_grad():
            ops.rotate([target], args, inplace=True, backend=backend)
    return target


def _row_source(keys: torch.Tensor, table: RopeSpec | ShiftTable) -> _ShiftRows:
    if isinstance(table, RopeSpec):
        source = _ShiftRows(table, 0, 1, keys.device, torch.promote_types(keys.dtype, torch.float32), None)
    elif isinstance(table, ShiftTable):
        source = _ShiftRows(table.spec, table.axis, table.step, table.rows.device, table.dtype, table)
    else:
        raise TypeError(f"table must be a RopeSpec or a ShiftTable, got {type(table).__name__}")
    if source.device != keys.device or source.spec.rotary_dim > keys.shape[-1]:
        raise ValueError(
            f"table must be on the keys' device {keys.device} and rotate at most their {keys.shape[-1]} channels, got "
            f"{source.device} and {source.spec.rotary_dim} channels"
        )
    return source


def _check_keys(keys: torch.Tensor, allow_lossy: bool) -> None:
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4:
        got = tuple(keys.shape) if isinstance(keys, torch.Tensor) else type(keys).__name__
        raise ValueError(f"keys must be a tensor [blocks, block_size, H, D], got {got}")
    if keys.dtype not in DTYPES:
        raise NotImplementedError(
            f"keys must be float32, float64, float16 or bfloat16, got {keys.dtype}; shift before quantizing"
        )
    check_memory("keys", keys)
    if keys.dtype not in _LASTING_DTYPES and not allow_lossy:
        raise ValueError(
            f"keys must be float32 or float64, got {keys.dtype}, which repeated shifts ruin; keep unrotated keys and "
            "rotate those once, or pass allow_lossy=True for a single shift"
        )
    if keys.stride(-1) != 1 and keys.shape[-1] > 1:
        raise ValueError(f"keys must be contiguous in their last dim, got strides {keys.stride()}")
    if torch.is_grad_enabled() and keys.requires_grad:
        raise ValueError("keys must not require grad, got a tensor that does; shift under torch.no_grad()")


def _reserve(table: ShiftTable, steps: int) -> None:
    if steps >= _MOST_ROWS:
        raise ValueError(
            f"deltas must be fewer than {_MOST_ROWS} steps of the table, got {steps}; use one of more positions a step"
        )
    table.reserve(steps)


def _check_deltas(keys: torch.Tensor, deltas: torch.Tensor, blocks: torch.Tensor | None) -> None:
    for name, value in (("deltas", deltas), ("blocks", blocks)):
        if value is None:
            continue
        if not (isinstance(value, torch.Tensor) and value.dtype == torch.int32):
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{name} must be an int32 tensor, got {got}")
        if value.device != keys.device:
            raise ValueError(f"{name} must be on the keys' device {keys.device}, got {value.device}")
        check_memory(name, value)
    if blocks is not None and blocks.ndim != 1:
        raise ValueError(f"blocks must have shape [n], got {tuple(blocks.shape)}")
    count = keys.shape[0] if blocks is None else blocks.shape[0]
    if deltas.ndim != 2 or deltas.shape[0] != count or deltas.shape[1] not in (1, keys.shape[1]):
        raise ValueError(
            f"deltas must have shape [{count}, 1] or [{count}, {keys.shape[1]}], got {tuple(deltas.shape)}"
        )
    if keys.device.type == "cpu" and deltas.numel() and not in_mode():  # on other devices it would wait
        if int(deltas.min()) < 0:
            raise ValueError(f"deltas must be 0 or more, got {int(deltas.min())}")
        listed = [] if blocks is None else blocks.tolist()
        if len(set(listed)) < len(listed) or any(not 0 <= block < keys.shape[0] for block in listed):
            raise ValueError(f"blocks must be different, at least 0 and below {keys.shape[0]}, got {listed}")


def _arguments(
    keys: torch.Tensor,
    source: _ShiftRows,
    rows: torch.Tensor,
    steps: torch.Tensor,
    blocks: torch.Tensor | None,
    towards_start: bool,
) -> RotationArgs:
    spec, axes = source.spec, len(source.spec.dims)
    positions = steps.unsqueeze(2)
    if axes > 1:
        positions = steps.new_full((*steps.shape, axes), -1)
        positions[..., source.axis] = steps
    return RotationArgs.of_rows(
        rows, positions, spec.pairs, keys.shape[1], spec.pairing, inverse=towards_start, entries=blocks
    )
