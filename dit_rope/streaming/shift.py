"""Moves keys that are rotated already to other positions, such as those :mod:`dit_rope.streaming.eviction` plans.

OpenVINO GenAI calls it token rotation (``cache_eviction.cpp`` at da1db864). A key rotated at position p and turned by
the angle of d positions more is a key rotated at p + d. Every turn rounds: a 16-bit key that is turned again and again
drifts (see ``docs/streaming.md``), which is why such dtypes are refused unless asked for.
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
_MOST_ROWS = 2**20  # a wrong delta should not take all memory
_LONGEST_STEP = 2**32  # float64 counts to the last row in such steps
_LONGEST_SHIFT = _LONGEST_STEP * _MOST_ROWS


class ShiftTable:
    """Cos and sin of the angles of 0, 1, 2, ... times ``step`` positions on one axis: one for all layers of a model.

    Angles are formed in float64 and rounded once. Always a unit rotation: a scaling's magnitude is in the keys already.
    Rows that exist never change; :meth:`reserve` copies them into a longer tensor when longer deltas come. A table can
    be copied and pickled.

    Args:
        spec: the rotation that the keys have.
        axis: the axis along which keys move: 0 for the frames of a video, or the positions of a text.
        step: positions from one row to the next, such as the tokens of a cache block.
        device: where the rows are; CPU when None.
        dtype: of the rows; float32, or float64 for float64 keys.

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
        """What belongs to a table in this process alone."""
        self._lock = threading.Lock()
        self._outgrown: list[torch.Tensor] = []  # a CUDA graph may read them; all of them are less than rows
        _TABLES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_outgrown")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.device = self._rows.device  # which torch.load may have changed
        self._begin()

    @property
    def rows(self) -> torch.Tensor:
        """``[2, R, P]`` cos and sin, row i of a shift by ``i * step``; P = max(spec.pairs), unused columns are zero."""
        return self._rows

    def reserve(self, steps: int) -> torch.Tensor:
        """The rows, of which there are now more than ``steps``; their number doubles when it has to grow.

        Rows that are new are complete when they are seen: growing waits for the device.

        Raises:
            ValueError: for steps that are no int of at least 0, or more than a table holds.
            RuntimeError: when it has to grow while a CUDA graph is being captured.
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
            have = self._rows.shape[1]
            if steps >= have:
                if capturing(self.device):
                    raise RuntimeError(
                        f"a ShiftTable must hold row {steps} before a CUDA graph is captured, got {have} rows; call "
                        f"reserve({steps}) first"
                    )
                more = self._build(have, 1 << steps.bit_length())
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
            return _rows_at(positions, self.spec, self.axis, self.dtype).to(self.device)


_TABLES: weakref.WeakSet[ShiftTable] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """A thread that is not in the child may hold a lock; rows are replaced in one step, so that none is half grown."""
    for table in _TABLES:
        table._lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _graphs_read(device: torch.device) -> bool:
    """Whether a CUDA graph may read rows on ``device`` at every replay, long after they have been replaced."""
    return device.type == "cuda"


def _rows_at(positions: torch.Tensor, spec: RopeSpec, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """Cos and sin ``[2, n, P]`` of shifts by ``positions`` ``[n]`` on one axis, formed where these are."""
    frequencies = device_frequencies(spec, axis, positions.device)
    angles = frequencies.angles(positions.to(frequencies.inverse.dtype))
    rows = torch.stack((angles.cos(), angles.sin())).to(dtype)
    return torch.nn.functional.pad(rows, (0, max(spec.pairs) - spec.pairs[axis]))


@dataclass(frozen=True)
class _Angles:
    """Whose angles a shift is by: of a table, or of a spec alone, for which rows are made as they are needed."""

    spec: RopeSpec
    axis: int
    step: int
    device: torch.device
    dtype: torch.dtype
    table: ShiftTable | None

    def of_whole_shift(self, delta: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and one row number ``[1, 1]`` for all keys; none for a delta of 0, so that keys keep their bits."""
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
        return _rows_at(positions, self.spec, self.axis, self.dtype).to(self.device)

    def of_deltas(self, deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and the row number of each delta; on CPU a table grows where it has to."""
        if self.table is not None:
            if self.device.type == "cpu" and deltas.numel() and not in_mode():
                _reserve(self.table, int(deltas.max()))
            return self.table.rows, deltas
        rows = _rows_at(deltas.flatten(), self.spec, self.axis, self.dtype)
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
    """Turns rotated keys to where they would be had they been rotated at other positions of one axis.

    Args:
        keys: ``[blocks, block_size, H, D]``, or ``[B, S, H, D]``; last dim contiguous, any outer strides (a cache
            ``[blocks, H, block_size, D]`` is passed transposed).
        table: the angles; or the spec of the keys, which move by single positions on axis 0, by angles made as needed.
        delta_frames: by how many positions all keys move; negative is towards the start. One row of angles is made for
            it where the table has none, and kept in a cache.
        deltas: int32 ``[n, 1]`` (per block) or ``[n, block_size]`` (per token), on the device of the keys: by how many
            steps of ``table`` each moves towards the start, 0 or more. Either this or ``delta_frames``.
        blocks: int32 ``[n]``, which blocks the rows of ``deltas`` are of, each once; None for all, in order. Others are
            neither read nor written.
        inplace: overwrite ``keys``; else the result is a new tensor.
        allow_lossy: take float16 and bfloat16 keys, which lose about as much as one rounding in every call.
        backend: as in :func:`~dit_rope.rotate`.

    Channels of other axes, and channels past the rotary ones, keep their bits. On a GPU a delta past the table, a
    negative one, or a block that is not there, leaves its keys as they are and reads nothing; on CPU, where looking
    costs no wait, it raises. A table that is passed in must have been reserved for the longest delta when the deltas
    are on a GPU; with a spec there is no longest delta.

    Returns:
        The keys at their new positions; ``keys`` itself when ``inplace``.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        NotImplementedError: for quantized keys: integers, or floats of 8 bits.

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
    angles = _angles(keys, table)
    if deltas is not None:
        _check_deltas(keys, deltas, blocks)
        rows, steps = angles.of_deltas(deltas)
        towards_start = True
    elif blocks is not None:
        raise ValueError("blocks must come with deltas, got delta_frames; pass deltas of one value per block")
    else:
        delta = as_int(delta_frames)
        if delta is None:
            raise TypeError(f"delta_frames must be an int, got {delta_frames!r}")
        rows, steps = angles.of_whole_shift(delta)
        towards_start = delta < 0
    if inplace:
        check_inplace(("keys",), (keys,))
    target = keys if inplace else keys.clone()
    if steps.numel() and target.numel():
        args = _arguments(target, angles, rows, steps, blocks, towards_start)
        with torch.no_grad():
            ops.rotate([target], args, inplace=True, backend=backend)
    return target


def _angles(keys: torch.Tensor, table: RopeSpec | ShiftTable) -> _Angles:
    if isinstance(table, RopeSpec):
        angles = _Angles(table, 0, 1, keys.device, torch.promote_types(keys.dtype, torch.float32), None)
    elif isinstance(table, ShiftTable):
        angles = _Angles(table.spec, table.axis, table.step, table.rows.device, table.dtype, table)
    else:
        raise TypeError(f"table must be a RopeSpec or a ShiftTable, got {type(table).__name__}")
    if angles.device != keys.device or angles.spec.rotary_dim > keys.shape[-1]:
        raise ValueError(
            f"table must be on the keys' device {keys.device} and turn at most their {keys.shape[-1]} channels, got "
            f"{angles.device} and {angles.spec.rotary_dim} channels"
        )
    return angles


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
    if keys.device.type == "cpu" and deltas.numel() and not in_mode():  # where looking takes no wait for the device
        if int(deltas.min()) < 0:
            raise ValueError(f"deltas must be 0 or more, got {int(deltas.min())}")
        listed = [] if blocks is None else blocks.tolist()
        if len(set(listed)) < len(listed) or any(not 0 <= block < keys.shape[0] for block in listed):
            raise ValueError(f"blocks must be different, at least 0 and below {keys.shape[0]}, got {listed}")


def _arguments(
    keys: torch.Tensor,
    angles: _Angles,
    rows: torch.Tensor,
    steps: torch.Tensor,
    blocks: torch.Tensor | None,
    towards_start: bool,
) -> RotationArgs:
    spec, axes = angles.spec, len(angles.spec.dims)
    positions = steps.unsqueeze(2)
    if axes > 1:
        positions = steps.new_full((*steps.shape, axes), -1)
        positions[..., angles.axis] = steps
    return RotationArgs.of_rows(
        rows, positions, spec.pairs, keys.shape[1], spec.pairing, inverse=towards_start, entries=blocks
    )
