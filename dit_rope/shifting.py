"""Moves keys that are rotated already to other positions, and plans by how much when cache blocks are evicted.

OpenVINO GenAI calls it token rotation (``cache_eviction.cpp`` at da1db864). A key rotated at position p and turned by
the angle of d positions more is a key rotated at p + d. Every turn rounds: a 16-bit key that is turned again and again
drifts (see ``docs/streaming.md``), which is why such dtypes are refused unless asked for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection
from dataclasses import dataclass

import torch

from . import rotation
from .backend_choice import check_backend
from .cache import in_mode
from .rotation_args import RotationArgs
from .scaling import axis_frequencies
from .spec import RopeSpec, integer
from .validation import DTYPES, check_flags, check_inplace, checked_device

_LASTING_DTYPES = (torch.float32, torch.float64)
_LEAST_ROWS = 64
_MOST_ROWS = 2**20  # a wrong delta should not take all memory
_MOST_BLOCKS = 2**24  # a plan is made block by block
_LONGEST_STEP = 2**32  # float64 counts to the last row in such steps


class ShiftTable:
    """Cos and sin of the angles of 0, 1, 2, ... times ``step`` positions on one axis: one for all layers of a model.

    Angles are formed in float64 and rounded once. Always a unit rotation: a scaling's magnitude is in the keys already.
    Rows that exist never change; :meth:`reserve` copies them into a longer tensor when a longer shift comes, and the
    old tensor stays as it is for whoever still reads it.

    Args:
        spec: the rotation that the keys have.
        axis: the axis along which keys move: 0 for the frames of a video, or the positions of a text.
        step: positions from one row to the next, such as the tokens of a cache block.
        device: where the rows are; CPU when None.
        dtype: of the rows; float32, or float64 for float64 keys.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
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
        if integer("axis", axis, 0) >= len(spec.dims):
            raise ValueError(f"axis must be at least 0 and below {len(spec.dims)}, got {axis}")
        if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= _LONGEST_STEP:
            raise ValueError(f"step must be a positive int of at most {_LONGEST_STEP}, got {step!r}")
        if dtype not in _LASTING_DTYPES:
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        self.spec = spec
        self.axis = axis
        self.step = step
        self.device = checked_device("cpu" if device is None else device)
        self.dtype = dtype
        self._lock = threading.Lock()
        self._rows = self._build(0, _LEAST_ROWS)
        self._outgrown: list[torch.Tensor] = []  # a CUDA graph may read them; all of them are less than rows

    @property
    def rows(self) -> torch.Tensor:
        """``[2, R, P]`` cos and sin, row i of a shift by ``i * step``; P = max(spec.pairs), unused columns are zero."""
        return self._rows

    def reserve(self, steps: int) -> torch.Tensor:
        """The rows, of which there are now more than ``steps``; their number doubles when it has to grow.

        Raises:
            ValueError: for steps that are no int of at least 0, or more than a table holds.
            RuntimeError: when it has to grow while a CUDA graph is being captured.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be an int of at least 0, got {steps!r}")
        if steps >= _MOST_ROWS:
            raise ValueError(f"steps must be below {_MOST_ROWS}, got {steps}; use a table of more positions a step")
        if steps < self._rows.shape[1]:
            return self._rows
        with self._lock:
            have = self._rows.shape[1]
            if steps >= have:
                if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"a ShiftTable must hold row {steps} before a CUDA graph is captured, got {have} rows; call "
                        f"reserve({steps}) first"
                    )
                more = self._build(have, 1 << steps.bit_length())
                with torch.inference_mode(False):
                    grown = torch.cat((self._rows, more), dim=1)
                self._outgrown.append(self._rows)
                self._rows = grown
        return self._rows

    def _build(self, first: int, stop: int) -> torch.Tensor:
        pairs = self.spec.pairs
        with torch.inference_mode(False), torch.no_grad():
            rows = torch.zeros(2, stop - first, max(pairs), dtype=self.dtype, device="cpu")
            positions = torch.arange(first, stop, dtype=torch.float64, device="cpu") * self.step
            angles = axis_frequencies(self.spec, self.axis).angles(positions)
            rows[..., : pairs[self.axis]] = torch.stack((angles.cos(), angles.sin()))
            return rows.to(self.device)


@dataclass(frozen=True)
class EvictionPlan:
    """What evicting blocks does to those that stay: they close ranks, and the next token follows them.

    Attributes:
        kept: old numbers of the blocks that stay, in order: new block i is old block ``kept[i]``.
        blocks: new numbers of the blocks that move, ascending.
        steps: by how many blocks each of them moves towards the start.
        next_position: position of the next token, when all blocks that stay are full.
    """

    kept: tuple[int, ...]
    blocks: tuple[int, ...]
    steps: tuple[int, ...]
    next_position: int


def plan_eviction(evicted: Collection[int], blocks: int, block_size: int) -> EvictionPlan:
    """Plans the shift after ``evicted`` of ``blocks`` cache blocks of ``block_size`` tokens each.

    Raises:
        TypeError: evicted is no collection of ints.
        ValueError: an evicted block that is not there, or named twice; sizes that are not positive.
    """
    for name, value in (("blocks", blocks), ("block_size", block_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"blocks must be at most {_MOST_BLOCKS}, got {blocks}")
    if not isinstance(evicted, Collection) or any(isinstance(b, bool) or not isinstance(b, int) for b in evicted):
        raise TypeError(f"evicted must be a collection of block numbers, got {evicted!r}")
    gone = set(evicted)
    outside = sorted(block for block in gone if not 0 <= block < blocks)
    if outside or len(gone) != len(evicted):
        wrong = f"{outside} outside" if outside else "repeated ones"
        raise ValueError(f"evicted must be different blocks below {blocks}, got {sorted(evicted)} with {wrong}")
    kept = tuple(block for block in range(blocks) if block not in gone)
    moved = [(new, old - new) for new, old in enumerate(kept) if old != new]
    return EvictionPlan(
        kept=kept,
        blocks=tuple(new for new, _ in moved),
        steps=tuple(steps for _, steps in moved),
        next_position=len(kept) * block_size,
    )


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
        table: the angles; or the spec of the keys, for a table of single positions on axis 0 that all calls share.
        delta_frames: by how many positions all keys move; negative is towards the start.
        deltas: int32 ``[n, 1]`` (per block) or ``[n, block_size]`` (per token), on the device of the keys: by how many
            steps of ``table`` each moves towards the start, 0 or more. Either this or ``delta_frames``.
        blocks: int32 ``[n]``, which blocks the rows of ``deltas`` are of, each once; None for all, in order. Others are
            neither read nor written.
        inplace: overwrite ``keys``; else the result is a new tensor.
        allow_lossy: take float16 and bfloat16 keys, which lose about as much as one rounding in every call.
        backend: as in :func:`~dit_rope.rotate`.

    Channels of other axes, and channels past the rotary ones, keep their bits. On a GPU a delta past the table, or a
    block that is not there, leaves its keys as they are and reads nothing; on CPU, where looking costs no wait, it
    raises. A table that is passed in must have been reserved for the longest delta when the deltas are on a GPU.

    Returns:
        The keys at their new positions; ``keys`` itself when ``inplace``.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        NotImplementedError: for quantized keys: integers, or floats of 8 bits.
    """
    check_flags(inplace=inplace, allow_lossy=allow_lossy)
    check_backend(backend)
    _check_keys(keys, allow_lossy)
    if (delta_frames is None) == (deltas is None):
        raise ValueError(f"delta_frames or deltas must be given, not both, got {delta_frames!r} and {deltas!r}")
    table = _table(keys, table)
    if deltas is not None:
        steps, towards_start = _check_deltas(keys, table, deltas, blocks), True
    elif blocks is None:
        steps, towards_start = _whole_shift(keys, table, delta_frames), delta_frames is not None and delta_frames < 0
    else:
        raise ValueError("blocks must come with deltas, got delta_frames; pass deltas of one value per block")
    if inplace:
        check_inplace(("keys",), (keys,))
    target = keys if inplace else keys.clone()
    if steps.numel() and target.numel():
        args = _arguments(target, table, steps, blocks, towards_start)
        with torch.no_grad():
            rotation.apply([target], args, inplace=True, backend=backend)
    return target


def _table(keys: torch.Tensor, table: RopeSpec | ShiftTable) -> ShiftTable:
    if isinstance(table, RopeSpec):
        make = ShiftTable if in_mode() else _shared_table  # what a mode makes is not for everybody
        table = make(table, device=keys.device, dtype=torch.promote_types(keys.dtype, torch.float32))
    elif not isinstance(table, ShiftTable):
        raise TypeError(f"table must be a RopeSpec or a ShiftTable, got {type(table).__name__}")
    device = table.rows.device
    if device != keys.device or table.spec.rotary_dim > keys.shape[-1]:
        raise ValueError(
            f"table must be on the keys' device {keys.device} and turn at most their {keys.shape[-1]} channels, got "
            f"{device} and {table.spec.rotary_dim} channels"
        )
    return table


def _check_keys(keys: torch.Tensor, allow_lossy: bool) -> None:
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4:
        got = tuple(keys.shape) if isinstance(keys, torch.Tensor) else type(keys).__name__
        raise ValueError(f"keys must be a tensor [blocks, block_size, H, D], got {got}")
    if keys.dtype not in DTYPES:
        raise NotImplementedError(
            f"keys must be float32, float64, float16 or bfloat16, got {keys.dtype}; shift before quantizing"
        )
    if keys.layout is not torch.strided:
        raise TypeError(f"keys must be a strided tensor, got {keys.layout}")
    if keys.dtype not in _LASTING_DTYPES and not allow_lossy:
        raise ValueError(
            f"keys must be float32 or float64, got {keys.dtype}, which repeated shifts ruin; keep unrotated keys and "
            "rotate those once, or pass allow_lossy=True for a single shift"
        )
    if keys.stride(-1) != 1 and keys.shape[-1] > 1:
        raise ValueError(f"keys must be contiguous in their last dim, got strides {keys.stride()}")
    if torch.is_grad_enabled() and keys.requires_grad:
        raise ValueError("keys must not require grad, got a tensor that does; shift under torch.no_grad()")


@functools.lru_cache(maxsize=32)
def _shared_table(spec: RopeSpec, *, device: torch.device, dtype: torch.dtype) -> ShiftTable:
    return ShiftTable(spec, device=device, dtype=dtype)


def _whole_shift(keys: torch.Tensor, table: ShiftTable, delta: int | None) -> torch.Tensor:
    """One step count ``[1, 1]`` for all keys; a delta of 0 is none at all, so that keys keep their bits."""
    if isinstance(delta, bool) or not isinstance(delta, int):
        raise TypeError(f"delta_frames must be an int, got {delta!r}")
    if delta % table.step:
        raise ValueError(f"delta_frames must be a multiple of the table's step {table.step}, got {delta}")
    steps = abs(delta) // table.step
    _reserve("delta_frames", table, steps)
    return torch.full((1, 1) if steps else (0, 1), steps, dtype=torch.int32, device=keys.device)


def _reserve(name: str, table: ShiftTable, steps: int) -> None:
    if steps >= _MOST_ROWS:
        raise ValueError(
            f"{name} must be fewer than {_MOST_ROWS} steps of the table, got {steps}; use one of more positions a step"
        )
    table.reserve(steps)


def _check_deltas(
    keys: torch.Tensor, table: ShiftTable, deltas: torch.Tensor, blocks: torch.Tensor | None
) -> torch.Tensor:
    for name, value in (("deltas", deltas), ("blocks", blocks)):
        if value is not None and not (isinstance(value, torch.Tensor) and value.dtype == torch.int32):
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{name} must be an int32 tensor, got {got}")
        if value is not None and value.device != keys.device:
            raise ValueError(f"{name} must be on the keys' device {keys.device}, got {value.device}")
    if blocks is not None and blocks.ndim != 1:
        raise ValueError(f"blocks must have shape [n], got {tuple(blocks.shape)}")
    count = keys.shape[0] if blocks is None else blocks.shape[0]
    if deltas.ndim != 2 or deltas.shape[0] != count or deltas.shape[1] not in (1, keys.shape[1]):
        raise ValueError(
            f"deltas must have shape [{count}, 1] or [{count}, {keys.shape[1]}], got {tuple(deltas.shape)}"
        )
    if keys.device.type == "cpu" and deltas.numel():
        _check_values(keys, table, deltas, blocks)
    return deltas


def _check_values(keys: torch.Tensor, table: ShiftTable, deltas: torch.Tensor, blocks: torch.Tensor | None) -> None:
    """Looks at the numbers, which only on CPU takes no wait for the device."""
    if int(deltas.min()) < 0:
        raise ValueError(f"deltas must be 0 or more, got {int(deltas.min())}")
    _reserve("deltas", table, int(deltas.max()))
    listed = [] if blocks is None else blocks.tolist()
    if len(set(listed)) < len(listed) or any(not 0 <= block < keys.shape[0] for block in listed):
        raise ValueError(f"blocks must be different, at least 0 and below {keys.shape[0]}, got {listed}")


def _arguments(
    keys: torch.Tensor, table: ShiftTable, steps: torch.Tensor, blocks: torch.Tensor | None, towards_start: bool
) -> RotationArgs:
    axes = len(table.spec.dims)
    positions = steps.unsqueeze(2)
    if axes > 1:
        positions = steps.new_full((*steps.shape, axes), -1)
        positions[..., table.axis] = steps
    none = (0,) * axes
    return RotationArgs(
        rows=table.rows,
        positions=positions,
        pairs=table.spec.pairs,
        sizes=none,
        first_rows=none,
        token_offset=0,
        prefix=0,
        count=keys.shape[1],
        pairing=table.spec.pairing,
        inverse=towards_start,
        exact=False,
        entries=blocks,
    )
