"""A stream by the definition of its policy: every frame's raw keys in a list, each rotated once from scratch.

Nothing here imports the package: a window is chosen from all frames again in every chunk, and a frame's position is
worked out from where it stands in that list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import oracle


@dataclass
class StreamByDefinition:
    """Frames of a stream, of which a chunk attends to the first ``sinks`` and the newest others, ``window`` in all.

    Args:
        policy: value of the package's PositionPolicy.
        dims: rotary channels of frame, height and width; interleaved pairs.
        frame_size: height and width in tokens.
        dtype: of the arithmetic; angles are float64 always, cos and sin are rounded to it.
    """

    policy: str
    dims: tuple[int, ...]
    frame_size: tuple[int, int]
    window: int
    sinks: int
    max_frames: int | None = None
    theta: float = 10_000.0
    dtype: torch.dtype = torch.float64
    raw: list[torch.Tensor] = field(default_factory=list)
    born: list[int] = field(default_factory=list)

    def add_chunk(self, keys: torch.Tensor) -> None:
        """Takes the raw keys ``[B, frames * tokens, H, D]`` of the next frames."""
        tokens = self.frame_size[0] * self.frame_size[1]
        frames = keys.shape[1] // tokens
        start = len(self.raw)
        if self.max_frames is not None:
            start = min(start, self.max_frames - frames)
        self.raw += keys.split(tokens, dim=1)
        self.born += range(start, start + frames)

    def window_frames(self) -> list[int]:
        """Frames in the window, oldest first."""
        sinks = list(range(min(self.sinks, len(self.raw))))
        indices = list(range(len(sinks), len(self.raw)))
        return sinks + indices[max(0, len(indices) - (self.window - self.sinks)) :]

    def position(self, frame: int) -> int:
        """Where a frame of the window stands now."""
        frames = self.window_frames()
        if self.policy == "window_relative":
            return frames.index(frame)
        if self.policy == "sink_follow" and frame < self.sinks < len(frames):
            return frames[self.sinks] - self.sinks + frame
        return self.born[frame]

    def keys(self) -> dict[int, torch.Tensor]:
        """Rotated keys ``[B, tokens, H, D]`` of each frame in the window."""
        return {frame: self.rotate(self.raw[frame], frame) for frame in self.window_frames()}

    def rotate(self, x: torch.Tensor, frame: int) -> torch.Tensor:
        """``x`` ``[B, tokens, H, D]`` at the position of a frame in the window."""
        cos, sin = oracle.full_grid_table(
            (1, *self.frame_size), self.dims, self.theta,
            dtype=torch.float64, start_frame=self.position(frame), repeat=False,
        )  # fmt: skip
        if self.dtype == torch.float64:
            return oracle.rotate(x, cos, sin, interleaved=True)
        return rounded_rotation(x, cos.to(self.dtype), sin.to(self.dtype))

    def rotate_queries(self, queries: torch.Tensor, frames: int) -> torch.Tensor:
        """Queries ``[B, frames * tokens, H, D]`` of the newest frames."""
        parts = queries.chunk(frames, dim=1)
        first = len(self.raw) - frames
        return torch.cat([self.rotate(q, first + number) for number, q in enumerate(parts)], dim=1)


def rounded_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels of ``x`` ``[B, S, H, D]`` rotated by ``[S, pairs]``, each product and sum rounded."""
    width = 2 * cos.shape[-1]
    x1, x2 = x[..., :width].to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2)
    return torch.cat((rotated, x[..., width:].to(cos.dtype)), dim=-1).to(x.dtype)
