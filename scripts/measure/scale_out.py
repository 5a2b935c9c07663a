"""Computes and measures the cost of rotation for one rank when a sequence is split over many.

    python scripts/measure/scale_out.py

For grids of 10^4 to 10^8 tokens on 1 to 1,024 ranks, with Wan's head of 128 channels, 40 heads and float32 tables.
Bytes are those of the tensors that a rank really holds, wherever its part fits in memory here: the script stops if a
formula is off by one byte. Times are of a rotation of queries and keys of two heads on one core of this CPU; the
formula takes the time of one token from the largest part measured. Writes ``scripts/results/scale-out.csv`` and
``docs/scale-out.svg``.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_rope import Grid, RopeSpec, Shard, cache_clear, rope_table, rotate_qk
from dit_rope.tables.axes import ROW_BLOCK

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results
from benchmarks.timing import interleave

SPEC = RopeSpec((44, 42, 42))
HEADS, MEASURED_HEADS = 40, 2
GRIDS = (Grid(7, 30, 52), Grid(21, 45, 80), Grid(81, 90, 160), Grid(321, 180, 160), Grid(1000, 320, 320))
RANKS = (1, 8, 64, 1024)
MEASURED_TOKENS = 200_000
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "scale-out.svg"
_FLOAT, _HALF = 4, 2


@dataclass(frozen=True)
class Cost:
    """One rank's share, in bytes; traffic is of one layer.

    Attributes:
        tokens: of the rank, padding included.
        dense_part, dense_whole: cos and sin, each value twice, of the rank's tokens, or of all, as after an exchange.
        axis: packed rows, of any part and of the whole alike.
        positions: int32 rows of the rank's tokens, where a model passes them on.
        queries_and_keys: in 16 bits, read and written.
    """

    tokens: int
    dense_part: int
    dense_whole: int
    axis: int
    positions: int
    queries_and_keys: int


def cost(grid: Grid, ranks: int) -> Cost:
    """The formulas."""
    tokens = math.ceil(grid.tokens / ranks)
    dense = 2 * SPEC.rotary_dim * _FLOAT
    return Cost(
        tokens=tokens,
        dense_part=tokens * dense,
        dense_whole=grid.tokens * dense,
        axis=2 * max(SPEC.pairs) * _FLOAT * packed_rows(grid),
        positions=tokens * len(SPEC.dims) * _FLOAT,
        queries_and_keys=2 * 2 * tokens * HEADS * SPEC.rotary_dim * _HALF,
    )


def packed_rows(grid: Grid) -> int:
    """Rows of the packed axes, which come in blocks."""
    return sum(ROW_BLOCK * math.ceil(size / ROW_BLOCK) for size in grid.sizes)


def size(*tensors: torch.Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured(grid: Grid, ranks: int) -> Cost | None:
    """What the last rank but one holds; None where its part is too large for this machine."""
    formula = cost(grid, ranks)
    if formula.tokens > MEASURED_TOKENS:
        return None
    cache_clear()
    table = rope_table(SPEC, grid, shard=Shard(max(0, ranks - 2), ranks))
    dense = size(*table.cos_sin())
    whole = size(*rope_table(SPEC, grid).cos_sin()) if grid.tokens <= MEASURED_TOKENS else formula.dense_whole
    return Cost(table.count, dense, whole, size(table.rows), size(table.positions()), formula.queries_and_keys)


def rotation_times(rounds: int = 7) -> dict[int, float]:
    """Milliseconds by number of tokens of a part, of grids and ranks as they are measured."""
    cases = {}
    for grid in GRIDS:
        for ranks in RANKS:
            tokens = cost(grid, ranks).tokens
            if 1_000 <= tokens <= 40_000 and tokens not in cases:
                table = rope_table(SPEC, grid, shard=Shard(0, ranks))
                q, k = torch.randn(2, 1, tokens, MEASURED_HEADS, SPEC.rotary_dim).bfloat16()
                cases[tokens] = functools.partial(rotate_qk, q, k, table)
    timings = interleave({str(tokens): case for tokens, case in cases.items()}, rounds)
    return {int(tokens): timing.median for tokens, timing in timings.items()}


def rows() -> list[dict[str, object]]:
    """One row per grid and number of ranks; exits where a formula is not what was measured."""
    times, results = rotation_times(), []
    per_token = times[max(times)] / max(times)
    for grid in GRIDS:
        for ranks in RANKS:
            formula, real = cost(grid, ranks), measured(grid, ranks)
            if real is not None and real != formula:
                sys.exit(f"{grid} on {ranks} ranks: {real} was measured, {formula} is the formula")
            time = times.get(formula.tokens)
            results.append(
                {
                    "grid": "x".join(map(str, grid.sizes)),
                    "grid_tokens": grid.tokens,
                    "ranks": ranks,
                    **vars(formula),
                    "bytes_measured": real is not None,
                    "rotation_ms": round(per_token * formula.tokens, 3),
                    "rotation_ms_measured": "" if time is None else round(time, 3),
                }
            )
    return results


def plot(results: list[dict[str, object]]) -> None:
    """Bytes of tables over ranks for the smallest, a middle and the largest grid."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scale-out"})
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for number, grid in enumerate((GRIDS[0], GRIDS[2], GRIDS[-1])):
        grid_rows = [row for row in results if row["grid_tokens"] == grid.tokens]
        for column, style in (("dense_whole", ":"), ("dense_part", "-o"), ("axis", "--")):
            label = f"{grid.tokens:,} tokens, {column.replace('_', ' ')}"
            axes.loglog(RANKS, [float(str(row[column])) for row in grid_rows], style, color=f"C{number}", label=label)
    axes.set(xlabel="ranks", ylabel="bytes of tables on a rank")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """Measure, print, draw, write."""
    torch.set_num_threads(1)
    results = rows()
    for row in results:
        print(*(f"{value!s:>13}" for value in row.values()))
    plot(results)
    print(f"wrote {PICTURE} and {write_results('scale-out', results)}")


if __name__ == "__main__":
    main()
