"""Measures how far each rounding of a patched model is from the bits of the unpatched one.

    python scripts/measure/measure_rounding.py

Three files under ``scripts/results/``, all of one thread on a CPU; nothing is timed:

- ``rounding-of-models.csv``: for every example in ``tests/support/zoo``, in float32, bfloat16 and float16, the share of
  the elements of queries and keys that differ when they reach the first attention that rotates, and the largest
  difference in units in the last place of the largest element of its head. Everything before that attention is equal to
  the bit. A model that calls no attention of torch is compared by its outputs. Beside it how exact mode computes:
  whether norm and rotation are one pass, and which arithmetic rotates, as shown on this machine.
- ``rounding.csv``: the same over all models, for each dtype and rounding.
- ``rounding-tiny-wan.csv``: videos of ``samples/tiny-wan`` in bfloat16, 20 steps, against the unpatched pipeline.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

import dit_rope
from dit_rope import Rounding
from dit_rope.comparison import Frames, Request, frame_ssim, generate
from dit_rope.hooks import exact_bits
from dit_rope.models import ADAPTERS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from attended import differences
from benchmarks.results import Row, write_results
from zoo import EXAMPLES, Example

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "tiny-wan"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REQUEST = Request("a red circle moving right", steps=20)


def measured(example: Example, dtype: torch.dtype) -> list[Row]:
    """A row for each rounding."""
    for shown in (exact_bits.SHOWN_NORMS, exact_bits.SHOWN_ROTATIONS):
        shown.clear()
    by_rounding = differences(example, dtype)
    return [
        {
            "example": example.name,
            "class": example.model.rpartition(".")[2],
            "dtype": str(dtype).removeprefix("torch."),
            "rounding": rounding.value,
            "different": difference.share,
            "largest difference": difference.steps,
            "one pass": ", ".join(sorted({_passes(shown) for shown in exact_bits.SHOWN_NORMS.values()})),
            "arithmetic": ", ".join(sorted({_arithmetic(shown) for shown in exact_bits.SHOWN_ROTATIONS.values()})),
        }
        for rounding, difference in by_rounding.items()
    ]


def _passes(one: bool) -> str:
    return "yes" if one else "no"


def _arithmetic(exact: bool | None) -> str:
    return "the model's own" if exact is None else "rounded products" if exact else "fast"


def summary(rows: list[Row]) -> list[Row]:
    """One row for each dtype and rounding."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["dtype"], row["rounding"]), []).append(row)
    return [
        {
            "dtype": dtype,
            "rounding": rounding,
            "examples": len(of_kind),
            "equal": sum(row["different"] == 0 for row in of_kind),
            "median different": statistics.median(row["different"] for row in of_kind),
            "most different": max(row["different"] for row in of_kind),
            "largest difference": max(row["largest difference"] for row in of_kind),
        }
        for (dtype, rounding), of_kind in kinds.items()
    ]


def videos() -> list[Row]:
    """A row for each rounding of the sample pipeline in bfloat16."""
    pipe = DiffusionPipeline.from_pretrained(
        str(SAMPLE), torch_dtype={"default": torch.bfloat16, "vae": torch.float32}, use_safetensors=True
    )
    unpatched = _frames(pipe)
    rows: list[Row] = []
    for rounding in Rounding:
        with dit_rope.patch(pipe, rounding=rounding):
            patched = _frames(pipe)
        ssim = frame_ssim(unpatched, patched)
        rows.append(
            {
                "rounding": rounding.value,
                "steps": REQUEST.steps,
                "frames": len(patched),
                "ssim min": float(np.min(ssim)),
                "ssim mean": float(np.mean(ssim)),
                "largest difference": float(np.abs(unpatched - patched).max()),
            }
        )
    return rows


def _frames(pipe: DiffusionPipeline) -> Frames:
    frames = generate(pipe, REQUEST).frames
    assert frames is not None
    return frames


def main() -> None:
    """Measures everything and writes the tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"wrote {write_results('rounding-tiny-wan', videos())}")
    known = {adapter.model for adapter in ADAPTERS}
    rows: list[Row] = []
    for example in EXAMPLES:
        if example.model in known:
            rows += [row for dtype in DTYPES for row in measured(example, dtype)]
            print(example.name, *(f"{row['rounding']} {row['different']:.5f}" for row in rows[-3:]))
    print(f"wrote {write_results('rounding-of-models', rows)}")
    print(f"wrote {write_results('rounding', summary(rows))}")


if __name__ == "__main__":
    main()
