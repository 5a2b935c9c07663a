"""The rolling window of keys and values of one layer of a causal video transformer."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from ..rotation import ops
from ..scalars import integer
from ..torch_state import uncompiled
from ..validation import DTYPES, check_memory
from .stream import Chunk, PositionPolicy, RopeStream, runs

_MOST = 2**20
"""The largest batch, heads and head_dim. Larger sizes are mistakes, and their product may overflow in torch."""


class Window(NamedTuple):
    """The keys and values that a chunk attends to: those of the kept frames and of the chunk.

    ``keys`` ``[B, frames * tokens, H, D]``, rotated, and ``values`` are in the order of the slots of the cache, which
    is not the order of time. ``positions`` has the frame position of the keys of each slot.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: tuple[int, ...]


class RollingCache:
    """Keys and values of one layer: a window of frames in memory that is allocated once.

    Sinks have the first slots. The other slots are a ring, in which a new frame overwrites the oldest. All forwards of
    a chunk write the same slots, so the last forward decides.

    Args:
        stream: the stream whose chunks are appended.
        batch, heads, head_dim: sizes of the keys.
        dtype: dtype of keys and values.
        value_dim: deprecated, gone in 0.3; channels of a value's head, ``head_dim`` when None.

    Attributes:
        rotated_frames: frames of keys rotated so far, to compare policies.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> import torch
        >>> from dit_rope import RollingCache, RopeSpec, RopeStream
        >>> stream = RopeStream(RopeSpec((8, 4, 4)), (3, 4), window_frames=6)
        >>> layer = RollingCache(stream, batch=1, heads=2, head_dim=16, dtype=torch.float32)
        >>> chunk = stream.begin_chunk(2)
        >>> layer.append(torch.randn(1, 24, 2, 16), torch.randn(1, 24, 2, 16)).keys.shape
        torch.Size([1, 24, 2, 16])
    """

    def __init__(
        self,
        stream: RopeStream,
        *,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        value_dim: int | None = None,
    ) -> None:
        if not isinstance(stream, RopeStream):
            raise TypeError(f"stream must be a RopeStream, got {type(stream).__name__}")
        named = {"batch": batch, "heads": heads, "head_dim": head_dim}
        if value_dim is not None:
            warnings.warn(
                "value_dim of RollingCache goes in 0.3; it is head_dim then", DeprecationWarning, stacklevel=2
            )
        named["value_dim"] = head_dim if value_dim is None else value_dim
        batch, heads, head_dim, value_dim = (integer(name, value, 1) for name, value in named.items())
        for name, value in named.items():
            if value > _MOST:
                raise ValueError(f"{name} must be at most {_MOST}, got {value}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
        if head_dim < stream.spec.rotary_dim:
            raise ValueError(f"head_dim must be at least the spec's {stream.spec.rotary_dim} channels, got {head_dim}")
        tokens = stream.window_frames * stream.frame_tokens
        self.stream = stream
        self.rotated_frames = 0
        self._keys = torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device=stream.device)
        self._values = torch.empty(batch, tokens, heads, value_dim, dtype=dtype, device=stream.device)
        self._raw_sinks = self._scratch = None
        if stream.policy is PositionPolicy.SINK_FOLLOW and stream.sink_frames:
            self._raw_sinks = torch.empty_like(self._keys[:, : stream.sink_frames * stream.frame_tokens])
        if stream.policy is PositionPolicy.WINDOW_RELATIVE:
            self._scratch = stream.scratch(self._keys)
        self._resets = stream.resets
        self._end = 0  # frames of the stream that are stored
        self._sinks_at: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of this cache, without the scratch memory that all layers share under ``WINDOW_RELATIVE``."""
        sinks = 0 if self._raw_sinks is None else self._raw_sinks.nbytes
        return self._keys.nbytes + self._values.nbytes + sinks

    @uncompiled
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Window:
        """Stores the chunk's unrotated keys and values; returns the keys and values that its queries attend to.

        Args:
            keys, values: ``[B, frames * tokens, H, D]`` of the cache's sizes and dtype, frame after frame.

        Returns:
            Views of the cache's memory, valid until the next call. Under ``WINDOW_RELATIVE`` the keys are valid until
            the next call on any cache of the stream.

        Raises:
            RuntimeError: no chunk has begun, or this cache missed one.
            TypeError, ValueError: naming the argument and the sizes.
        """
        stream, chunk = self.stream, self.stream.chunk
        self._check(chunk, keys, values)
        if self._resets != stream.resets:
            self._resets, self._end, self._sinks_at = stream.resets, 0, None
        if self._end not in (chunk.start_frame, chunk.start_frame + chunk.frames):
            raise RuntimeError(
                f"the cache must be given every chunk, got frame {chunk.start_frame} after {self._end} frames; append "
                "in every layer before commit(), or reset() the stream"
            )
        with torch.no_grad():
            for slot, first, count in chunk.slots:
                new = slice(first * stream.frame_tokens, (first + count) * stream.frame_tokens)
                self._store(slot, chunk.positions[first : first + count], keys[:, new], values[:, new])
            if chunk.moved_sinks is not None and chunk.moved_sinks != self._sinks_at and self._raw_sinks is not None:
                self._rotate(self._raw_sinks, chunk.moved_sinks, self._keys[:, : self._raw_sinks.shape[1]])
                self._sinks_at = chunk.moved_sinks
            window = self._rotated_window(chunk)
        self._end = chunk.start_frame + chunk.frames
        filled = len(chunk.window) * stream.frame_tokens
        return Window(window[:, :filled], self._values[:, :filled], chunk.window)

    def _store(self, slot: int, positions: tuple[int, ...], keys: torch.Tensor, values: torch.Tensor) -> None:
        tokens = self.stream.frame_tokens
        place = slice(slot * tokens, (slot + len(positions)) * tokens)
        self._values[:, place] = values
        if self._scratch is not None:
            self._keys[:, place] = keys
        else:
            self._rotate(keys, positions, self._keys[:, place])
        sinks = min(slot + len(positions), self.stream.sink_frames) - slot
        if self._raw_sinks is not None and sinks > 0:
            self._raw_sinks[:, slot * tokens : (slot + sinks) * tokens] = keys[:, : sinks * tokens]

    def _rotated_window(self, chunk: Chunk) -> torch.Tensor:
        if self._scratch is None:
            return self._keys
        tokens = self.stream.frame_tokens
        for position, slot, count in runs(list(chunk.window)):
            place = slice(slot * tokens, (slot + count) * tokens)
            self._rotate(self._keys[:, place], tuple(range(position, position + count)), self._scratch[:, place])
        return self._scratch

    def _rotate(self, keys: torch.Tensor, positions: tuple[int, ...], out: torch.Tensor) -> None:
        ops.rotate_into([keys], self.stream.args(positions), [out], backend=self.stream.backend)
        self.rotated_frames += len(positions)

    def _check(self, chunk: Chunk, keys: torch.Tensor, values: torch.Tensor) -> None:
        for name, x, cache in (("keys", keys, self._keys), ("values", values, self._values)):
            expected = (cache.shape[0], chunk.frames * self.stream.frame_tokens, *cache.shape[2:])
            if not isinstance(x, torch.Tensor) or x.dtype != cache.dtype or x.device != cache.device:
                got = f"{x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise TypeError(f"{name} must be {cache.dtype} on {cache.device}, got {got}")
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"{name} must be {expected}, [B, {chunk.frames} frames * {self.stream.frame_tokens} tokens, H, D], "
                    f"got {tuple(x.shape)}"
                )
            check_memory(name, x)
            if torch.is_grad_enabled() and x.requires_grad:
                raise ValueError(f"{name} must not require grad, got a tensor that does; stream under torch.no_grad()")
