"""Autoregressive video: chunks of frames, and the positions of a rolling window of keys.

Causal video transformers (Self-Forcing, CausVid, LongLive and others) generate a few frames at a time. Each chunk runs
several denoising forwards and one last clean forward at the same positions. It attends to a window of earlier frames.
:meth:`RopeStream.commit` ends a chunk; only it changes the start frame, the frames of the window and the positions of
the sinks. :mod:`dit_rope.streaming.rolling_cache` holds the keys and values of each layer.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..rotation import ops
from ..rotation.choice import check_backend
from ..rotation_args import RotationArgs
from ..scalars import integer
from ..spec import Grid, RopeSpec
from ..tables.axes import build_axis
from ..tables.scaling import axis_frequencies
from ..tables.shards import MAX_POSITION, grid_coordinates
from ..tables.table import RopeTable, rope_table
from ..torch_state import uncompiled
from ..validation import check_values, checked_device

_TABLE_STEP = 512
"""Frames from one table of a stream to the next."""


class PositionPolicy(enum.Enum):
    """The frame positions of the keys of a window.

    - ``ABSOLUTE``: the position of a frame in the stream, which never changes.
    - ``SINK_FOLLOW``: absolute, but the sinks move to right before the other frames of the window. Unrotated copies of
      the sinks are rotated once per chunk.
    - ``WINDOW_RELATIVE``: counted from the oldest frame of the window. Keys are stored unrotated, and the whole window
      is rotated in every forward. Queries see the same distances as under ``SINK_FOLLOW``.
    - ``CLAMP``: absolute up to ``max_frames``; later chunks all have the last positions below it.
    """

    ABSOLUTE = "absolute"
    SINK_FOLLOW = "sink_follow"
    WINDOW_RELATIVE = "window_relative"
    CLAMP = "clamp"


@dataclass(frozen=True)
class Chunk:
    """The plan of one chunk, the same in every forward until it is committed.

    Attributes:
        start_frame, frames: the chunk is frames ``start_frame <= f < start_frame + frames`` of the stream.
        positions: frame position of each of them, for queries and new keys.
        slots: frame slots of the cache that the chunk fills: runs of (first slot, first frame of the chunk, frames).
        window: frame position of each filled slot after the chunk is stored.
        moved_sinks: new positions of the sinks if their keys must be rotated again for this chunk; else None.
    """

    start_frame: int
    frames: int
    positions: tuple[int, ...]
    slots: tuple[tuple[int, int, int], ...]
    window: tuple[int, ...]
    moved_sinks: tuple[int, ...] | None


class RopeStream:
    """The positions of a stream of chunks, for all layers of a model.

    Args:
        spec: the model's rotation, whose first axis is the frame.
        frame_size: tokens of one frame along the other axes, such as (height, width).
        window_frames: the most frames that a chunk attends to: sinks, kept frames and the chunk.
        sink_frames: first frames of the stream that never leave the window.
        policy: the positions of keys.
        max_frames: with ``CLAMP``, the number of positions.
        device: the device of the model; CPU when None.
        backend: as in :func:`~dit_rope.rotate`.

    Attributes:
        start_frame: frames committed so far; the next chunk starts there.
        frame_tokens: tokens of one frame.
        resets: number of calls of :meth:`reset`; caches compare it to notice a reset.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> import torch
        >>> from dit_rope import RollingCache, RopeSpec, RopeStream
        >>> stream = RopeStream(RopeSpec((8, 4, 4)), (3, 4), window_frames=6, sink_frames=1)
        >>> layer = RollingCache(stream, batch=1, heads=2, head_dim=16, dtype=torch.float32)
        >>> for _ in range(4):
        ...     chunk = stream.begin_chunk(2)
        ...     query, key, value = torch.randn(3, 1, 2 * 12, 2, 16)
        ...     query, window = stream.rotate(query), layer.append(key, value)
        ...     stream.commit()
        >>> window.keys.shape, window.positions
        (torch.Size([1, 72, 2, 16]), (2, 6, 7, 3, 4, 5))
    """

    def __init__(
        self,
        spec: RopeSpec,
        frame_size: tuple[int, ...],
        *,
        window_frames: int,
        sink_frames: int = 0,
        policy: PositionPolicy = PositionPolicy.SINK_FOLLOW,
        max_frames: int | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(spec, RopeSpec):
            raise TypeError(f"spec must be a RopeSpec, got {type(spec).__name__}")
        if not isinstance(policy, PositionPolicy):
            raise TypeError(f"policy must be a PositionPolicy, got {policy!r}")
        if not isinstance(frame_size, Sequence):
            raise TypeError(f"frame_size must be a tuple of ints, got {frame_size!r}")
        if len(frame_size) != len(spec.dims) - 1:
            raise ValueError(
                f"frame_size must have one size for each axis but the first of {spec.dims}, got {frame_size}"
            )
        window_frames = integer("window_frames", window_frames, 1)
        sink_frames = integer("sink_frames", sink_frames, 0)
        if sink_frames >= window_frames:
            raise ValueError(f"sink_frames must be below window_frames {window_frames}, got {sink_frames}")
        if (max_frames is None) == (policy is PositionPolicy.CLAMP):
            raise ValueError(f"max_frames must be given with CLAMP and only there, got {max_frames} with {policy.name}")
        if max_frames is not None:
            max_frames = integer("max_frames", max_frames, 1)
        if window_frames > MAX_POSITION - _TABLE_STEP:
            raise ValueError(f"window_frames must be at most {MAX_POSITION - _TABLE_STEP}, got {window_frames}")
        check_backend(backend)
        for axis in range(len(spec.dims)):
            axis_frequencies(spec, axis)  # refuses an unknown scaling here, not in the first chunk
        self.spec = spec
        self.frame_size = tuple(integer("frame_size", size, 1) for size in frame_size)
        self.frame_tokens = Grid(1, *self.frame_size).tokens
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.policy = policy
        self.max_frames = max_frames
        self.device = checked_device("cpu" if device is None else device)
        self.backend = backend
        self.start_frame = 0
        self.resets = 0
        self._chunk: Chunk | None = None
        self._positions: dict[int, int] = {}  # by slot, the position of its key
        self._tables: dict[int, RopeTable] = {}
        self._args: dict[tuple[int, ...], RotationArgs] = {}  # of this chunk
        self._scratch: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    @property
    def chunk(self) -> Chunk:
        """The chunk that has begun and is not committed.

        Raises:
            RuntimeError: no chunk has begun.
        """
        if self._chunk is None:
            raise RuntimeError("a chunk must be begun before it is used, got none; call begin_chunk(frames)")
        return self._chunk

    def begin_chunk(self, frames: int) -> Chunk:
        """Plans the next ``frames`` frames; every forward of the chunk then uses the same plan.

        If it raises, no chunk has begun, and it can be called again.

        Raises:
            RuntimeError: the last chunk is not committed.
            ValueError: the chunk does not fit the window beside the sinks.

        Example:
            >>> from dit_rope import RopeSpec, RopeStream
            >>> stream = RopeStream(RopeSpec((8, 4, 4)), (3, 4), window_frames=6)
            >>> stream.begin_chunk(2).positions
            (0, 1)
        """
        if self._chunk is not None:
            raise RuntimeError(
                f"the chunk at frame {self._chunk.start_frame} must be committed before another begins, got "
                f"begin_chunk({frames}); call commit()"
            )
        frames = integer("frames", frames, 1)
        start, end = self.start_frame, self.start_frame + frames
        room = self.window_frames - max(0, min(self.sink_frames, start))
        if frames > room:
            raise ValueError(
                f"frames must fit the window beside the sinks, {room} frames (window_frames {self.window_frames}, "
                f"sink_frames {self.sink_frames}), got {frames}"
            )
        if self.max_frames is not None and frames > self.max_frames:
            raise ValueError(f"frames must be at most max_frames {self.max_frames}, got {frames}")
        chunk = self._plan(start, end)
        if chunk.positions[-1] >= MAX_POSITION:
            raise ValueError(
                f"frames must end at or before position {MAX_POSITION}, where float32 stops counting, got "
                f"{chunk.positions[-1] + 1}; reset() the stream, or use WINDOW_RELATIVE"
            )
        # Tables are built here, because a capture of a CUDA graph in the chunk must not build them. They are built
        # before the chunk begins, because a build may fail.
        args = {positions: self._args_at(positions) for positions in filter(None, (chunk.positions, chunk.moved_sinks))}
        self._chunk, self._args = chunk, args
        return chunk

    def commit(self) -> None:
        """Ends the chunk: its frames stay in the window, and the next chunk starts after them.

        Raises:
            RuntimeError: no chunk has begun.
        """
        chunk = self.chunk
        self._positions = dict(enumerate(chunk.window))
        self.start_frame += chunk.frames
        self._chunk = None

    def reset(self) -> None:
        """Starts again at frame 0. The caches of the stream drop their frames at their next ``append``."""
        self.start_frame = 0
        self.resets += 1
        self._chunk = None
        self._positions = {}

    @uncompiled
    def rotate(self, queries: torch.Tensor) -> torch.Tensor:
        """New ``[B, frames * tokens, H, D]`` queries of the chunk, rotated at its positions.

        Raises:
            RuntimeError: no chunk has begun.
            TypeError: not a tensor, or a dtype that :func:`~dit_rope.rotate` does not take.
            ValueError: naming the argument and the sizes; a lazily negated view.
        """
        chunk = self.chunk
        args = self.args(chunk.positions)
        self._check_queries(queries, chunk.frames, args.rows.device)
        return ops.rotate([queries], args, backend=self.backend)[0]

    def args(self, positions: tuple[int, ...]) -> RotationArgs:
        """The rotation of whole frames at consecutive frame positions; kept for all layers of the chunk."""
        args = self._args.get(positions)
        if args is None:
            args = self._args[positions] = self._args_at(positions)
        return args

    def _args_at(self, positions: tuple[int, ...]) -> RotationArgs:
        table = self._table_of(positions[0])
        return table.args().of_frames(positions[0] - table.grid.start_frame, len(positions))

    def scratch(self, like: torch.Tensor) -> torch.Tensor:
        """Memory of the shape and dtype of ``like``, shared by all layers."""
        key = (like.shape, like.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty_like(like)
        return self._scratch[key]

    def position_rows(self) -> tuple[RopeTable, torch.Tensor]:
        """A table, and for the chunk's tokens int32 ``[1, frames * tokens, axes]`` rows of it.

        For compiled code, as ``rotate_qk(q, k, table, positions=rows)``: tensors are data there, while a start frame
        would be compiled in as a constant.

        Example:
            >>> from dit_rope import RopeSpec, RopeStream
            >>> stream = RopeStream(RopeSpec((8, 4, 4)), (1, 2), window_frames=6)
            >>> chunk = stream.begin_chunk(1)
            >>> table, rows = stream.position_rows()
            >>> rows.shape
            torch.Size([1, 2, 3])
        """
        first = self.chunk.positions[0]
        table = self._table_of(first)
        sizes, offset = (self.chunk.frames, *self.frame_size), first - table.grid.start_frame
        coordinates = grid_coordinates(sizes, 0, self.chunk.frames * self.frame_tokens, self.device)
        firsts = (table.first_rows[0] + offset, *table.first_rows[1:])
        rows = [coordinate + row for coordinate, row in zip(coordinates, firsts, strict=True)]
        return table, torch.stack(rows, dim=-1).to(torch.int32)[None]

    def _table_of(self, first: int) -> RopeTable:
        """The table of frame position ``first`` and a window after it. Two are kept, as a window may need both."""
        base = first // _TABLE_STEP * _TABLE_STEP
        table = self._tables.get(base)
        if table is None:
            newest = list(self._tables.items())[-1:]
            table = self._build_table(base)
            self._tables = dict([*newest, (base, table)])
        return table

    def _build_table(self, base: int) -> RopeTable:
        """The table from frame ``base`` on: the cached table from frame 0, with other rows for the frames.

        It is not in the cache of tables, because a stream needs it once and it would evict tables of other code.
        """
        frames = _TABLE_STEP + self.window_frames
        first = rope_table(self.spec, Grid(frames, *self.frame_size), device=self.device)
        if base == 0:
            return first
        with torch.inference_mode(False), torch.no_grad():
            rows = first.rows.clone()
            moved = build_axis(axis_frequencies(self.spec, 0), base, base + frames, rows.dtype)
            rows[:, first.first_rows[0] : first.first_rows[0] + frames, : self.spec.pairs[0]] = moved
        return replace(first, grid=Grid(*first.grid.sizes, start_frame=base), rows=rows)

    def _check_queries(self, queries: torch.Tensor, frames: int, device: torch.device) -> None:
        check_values("queries", queries)
        tokens = frames * self.frame_tokens
        if queries.ndim != 4 or queries.shape[1] != tokens or queries.shape[3] < self.spec.rotary_dim:
            raise ValueError(
                f"queries must be [B, {frames} frames * {self.frame_tokens} tokens = {tokens}, H, at least "
                f"{self.spec.rotary_dim}], got {tuple(queries.shape)}"
            )
        if queries.device != device:
            raise ValueError(f"queries must be on the stream's device {device}, got {queries.device}")

    def _plan(self, start: int, end: int) -> Chunk:
        # The cache has a slot for each sink, then a ring of the other slots. A frame that enters the ring overwrites
        # the oldest, so slots are not in the order of frames. Positions of slots change under two policies:
        # WINDOW_RELATIVE renumbers all of them, and SINK_FOLLOW those of the sinks once a frame has left the ring.
        sinks, ring = min(self.sink_frames, end), self.window_frames - self.sink_frames
        oldest = max(sinks, end - ring)  # first frame after the sinks that is still kept
        filled = [self._slot(frame) for frame in range(oldest, end)]
        positions = tuple(range(start, end))
        window = {slot: self._positions.get(slot, -1) for slot in range(sinks + len(filled))}
        moved = None
        if self.policy is PositionPolicy.CLAMP and self.max_frames is not None:
            first = min(start, self.max_frames - (end - start))
            positions = tuple(range(first, first + end - start))
        if self.policy is PositionPolicy.WINDOW_RELATIVE:
            positions = tuple(frame - oldest + sinks if frame >= sinks else frame for frame in range(start, end))
            window |= {frame: frame for frame in range(sinks)}
            window |= {self._slot(frame): frame - oldest + sinks for frame in range(oldest, end)}
        for frame, position in zip(range(start, end), positions, strict=True):
            window[self._slot(frame)] = position
        if self.policy is PositionPolicy.SINK_FOLLOW and sinks and oldest > sinks:
            moved = tuple(range(oldest - sinks, oldest))
            window |= dict(enumerate(moved))
        slots = tuple(runs([self._slot(frame) for frame in range(start, end)]))
        return Chunk(start, end - start, positions, slots, tuple(window[slot] for slot in sorted(window)), moved)

    def _slot(self, frame: int) -> int:
        """The slot of a frame in the cache: sinks first, then a ring."""
        ring = self.window_frames - self.sink_frames
        return frame if frame < self.sink_frames else self.sink_frames + (frame - self.sink_frames) % ring


def runs(numbers: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first number, its index, length) of each run of consecutive numbers.

    Example:
        >>> list(runs([4, 5, 6, 1, 2]))
        [(4, 0, 3), (1, 3, 2)]
    """
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], first, i - first
            first = i
