"""Measures the error of cos, sin and a rotated vector at long positions, by the source of the angles.

    python scripts/measure/long_context_error.py

Writes ``scripts/results/long-context-error.csv``: for each source and each largest position, the largest error over
2,048 positions spread evenly up to it. Nothing is random, and nothing is timed.

Sources: a cache in float32, float16 or bfloat16, formed in float64 and rounded once; angles formed in float32, for a
cache or on the fly; and no cache, with angles formed in float64, as
``dit_rope.compat.flashinfer.apply_rope_pos_ids`` forms them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dit_rope.compat.flashinfer import apply_rope_pos_ids, apply_rope_with_cos_sin_cache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results

HEAD_DIM = 128
THETA = 1e4
SAMPLES = 2048
LAST_POSITIONS = (1_000, 10_000, 100_000, 1_000_000)

Rotation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Positions ``[n]`` and vectors ``[n, 1, D]`` to rotated vectors."""


def frequencies(dtype: torch.dtype) -> torch.Tensor:
    """``[D / 2]`` (RoFormer, arXiv:2104.09864), formed in ``dtype``."""
    return 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=dtype) / HEAD_DIM)


def cache_at(positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cos and sin ``[n, D]`` of positions ``[n]``, formed in ``dtype``."""
    angles = torch.outer(positions.to(dtype), frequencies(dtype))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def with_cache(dtype: torch.dtype, angles: torch.dtype) -> Rotation:
    """Rotates by a cache in ``dtype`` of angles formed in ``angles``; of the cache, only the rows in use are made."""

    def rotate(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # Back to float32, which loses nothing, because float32 vectors take no 16-bit cache.
        cache = cache_at(positions, angles).to(dtype).float()
        rows = torch.arange(len(positions))
        return apply_rope_with_cos_sin_cache(rows, x, x, HEAD_DIM, cache)[0]

    return rotate


def without_cache(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rotates by angles formed in float64 for the positions of this call."""
    return apply_rope_pos_ids(x, x, positions, rope_theta=THETA)[0]


SOURCES: dict[str, Rotation] = {
    "float32 cache": with_cache(torch.float32, torch.float64),
    "float16 cache": with_cache(torch.float16, torch.float64),
    "bfloat16 cache": with_cache(torch.bfloat16, torch.float64),
    "angles in float32": with_cache(torch.float32, torch.float32),
    "no cache": without_cache,
}


def vectors(count: int) -> torch.Tensor:
    """``[n, 1, D]`` float32 of length 1, the first halves of pairs first: every pair has another angle."""
    phases = torch.outer(torch.arange(count) + 1.0, torch.arange(HEAD_DIM // 2) + 1.0)
    return torch.cat((phases.cos(), phases.sin()), dim=-1)[:, None] / (HEAD_DIM // 2) ** 0.5


def errors(rotate: Rotation, positions: torch.Tensor) -> tuple[float, float]:
    """The largest error of cos and sin, and of the rotated vectors, both against float64."""
    cos, sin = (values[:, None] for values in cache_at(positions, torch.float64).chunk(2, dim=-1))
    ones = torch.zeros(len(positions), 1, HEAD_DIM)
    ones[..., : HEAD_DIM // 2] = 1.0  # rotated, each pair (1, 0) is (cos, sin)
    angle_error = (rotate(positions, ones).double() - torch.cat((cos, sin), dim=-1)).abs().max()
    x = vectors(len(positions))
    first, second = x.double().chunk(2, dim=-1)
    exact = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return float(angle_error), float((rotate(positions, x).double() - exact).abs().max())


def main() -> None:
    """Measures every source at every length and writes the table."""
    rows: list[dict[str, object]] = []
    for last in LAST_POSITIONS:
        positions = torch.linspace(0, last, SAMPLES, dtype=torch.float64).long()
        for name, rotate in SOURCES.items():
            angle_error, vector_error = errors(rotate, positions)
            row = {"last position": last, "source": name, "head dim": HEAD_DIM, "theta": THETA}
            rows.append(row | {"error of cos, sin": f"{angle_error:.1e}", "error of a vector": f"{vector_error:.1e}"})
            print(f"{last:>9,} {name:<18} {angle_error:.1e} {vector_error:.1e}")
    print(f"wrote {write_results('long-context-error', rows)}")


if __name__ == "__main__":
    main()
