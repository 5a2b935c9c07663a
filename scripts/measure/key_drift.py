"""Measures the drift of rotated keys that are shifted again and again, against one rotation of unrotated keys.

    python scripts/measure/key_drift.py

Keys of Wan's frame axis (44 channels) move on by 3 frames at a time, as those of a sink do when chunks have 3 frames.
After so many moves the error of their frame channels is taken relative to a float64 rotation of the raw keys, and the
largest error of an attention logit (query times key over the root of the channels) with it. Writes
``scripts/results/key-drift.csv`` and the curves, ``docs/key-drift.svg``; both come out the same at every run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib import pyplot

import dit_rope
from dit_rope import RopeSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results

SPEC = RopeSpec((44,))
FRAMES = 3
SHIFTS = (1, 8, 32, 128, 512, 1024)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "key-drift.svg"
KEYS = (1, 64, 4, SPEC.rotary_dim)


def errors(keys: torch.Tensor, exact: torch.Tensor, queries: torch.Tensor) -> tuple[float, float]:
    """Relative error of ``keys`` ``[1, S, H, D]``, and the largest error of a logit."""
    off = keys.double() - exact
    logits = torch.einsum("bqhd,bkhd->bhqk", queries, off) / SPEC.rotary_dim**0.5
    return float(off.norm() / exact.norm()), float(logits.abs().max())


def drift(dtype: torch.dtype) -> list[dict[str, object]]:
    """One row for each number of shifts."""
    generator = torch.Generator().manual_seed(0)
    raw, queries = (torch.randn(KEYS, generator=generator, dtype=torch.float64) for _ in range(2))
    raw = raw.to(dtype)
    shifted, rows = raw.clone(), []
    for count in range(1, max(SHIFTS) + 1):
        dit_rope.shift_keys(shifted, SPEC, delta_frames=FRAMES, inplace=True, allow_lossy=True)
        if count not in SHIFTS:
            continue
        exact = dit_rope.shift_keys(raw.double(), SPEC, delta_frames=FRAMES * count)
        once = dit_rope.shift_keys(raw, SPEC, delta_frames=FRAMES * count, allow_lossy=True)
        (relative, logit), (relative_once, logit_once) = (errors(keys, exact, queries) for keys in (shifted, once))
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "shifts": count,
                "relative_error": f"{relative:.2e}",
                "worst_logit_error": f"{logit:.2e}",
                "relative_error_from_raw": f"{relative_once:.2e}",
                "worst_logit_error_from_raw": f"{logit_once:.2e}",
            }
        )
    return rows


def plot(rows: list[dict[str, object]]) -> None:
    """Draws the relative error over the number of shifts, dashed where keys were rotated once."""
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "key-drift"})
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for number, dtype in enumerate(DTYPES):
        name = str(dtype).removeprefix("torch.")
        dtype_rows = [row for row in rows if row["dtype"] == name]
        for column, style in (("relative_error", "-o"), ("relative_error_from_raw", "--")):
            label = name if column == "relative_error" else f"{name}, rotated once"
            axes.loglog(SHIFTS, [float(str(row[column])) for row in dtype_rows], style, color=f"C{number}", label=label)
    axes.set(xlabel="shifts of 3 frames", ylabel="relative error of the keys")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """Measure, print, draw, write."""
    rows = [row for dtype in DTYPES for row in drift(dtype)]
    for row in rows:
        print(*(f"{value!s:>10}" for value in row.values()))
    plot(rows)
    print(f"wrote {PICTURE} and {write_results('key-drift', rows)}")


if __name__ == "__main__":
    main()
