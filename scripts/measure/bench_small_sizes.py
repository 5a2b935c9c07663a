"""Times steps of few tokens, unpatched and patched by default, to find where a patch costs more than it saves.

    python scripts/measure/bench_small_sizes.py [--rounds 40]

One layer of each kind of five architectures of released width, and ``samples/tiny-wan`` as its pipeline runs it at
96 x 96, in float32 and bfloat16, on a CPU. Unpatched and patched take turns; the outputs must be equal to the bit.
Writes ``scripts/results/small-sizes-cpu.csv``: milliseconds (median, 20th and 80th percentile) and their ratio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import dit_rope

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.end_to_end import ARCHITECTURES, Step, architecture_step, pipeline_step, verdict
from benchmarks.results import Row, write_results
from benchmarks.timing import interleave

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "tiny-wan"
GRIDS = {64: (1, 8, 8), 128: (2, 8, 8), 256: (1, 16, 16), 512: (2, 16, 16), 1024: (1, 32, 32), 2048: (2, 32, 32)}
TEXT = 32
DTYPES = (torch.float32, torch.bfloat16)


def steps(dtype: torch.dtype) -> Iterator[tuple[str, int, Step]]:
    """Names and tokens of the steps, and the steps."""
    pipe = DiffusionPipeline.from_pretrained(
        str(SAMPLE), torch_dtype={"default": dtype, "vae": torch.float32}, use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    yield "tiny-wan", 5 * 12 * 12 // 4, pipeline_step(pipe, height=96, width=96, num_frames=17)
    for name, architecture in ARCHITECTURES.items():
        for tokens, grid in GRIDS.items():
            yield name, tokens, architecture_step(architecture, dtype=dtype, layers=1, grid=grid, text=TEXT)


def measure(name: str, tokens: int, step: Step, dtype: torch.dtype, rounds: int) -> Row:
    """One row.

    Raises:
        SystemExit: the patched step has other bits.
    """
    twin = step.twin()
    for model in twin.models:
        dit_rope.patch(model)
    if not all(map(torch.equal, twin.run(), step.run())):
        raise SystemExit(f"{name} of {tokens} tokens in {dtype} has other bits when patched: nothing was written")
    timings = interleave({"unpatched": step.run, "patched": twin.run}, rounds, warm_up=3)
    unpatched, patched = timings["unpatched"], timings["patched"]
    return {
        "model": name,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "unpatched_p20": unpatched.p20,
        "unpatched_ms": unpatched.median,
        "unpatched_p80": unpatched.p80,
        "patched_p20": patched.p20,
        "patched_ms": patched.median,
        "patched_p80": patched.p80,
        "ratio": unpatched.median / patched.median,
        "verdict": verdict(unpatched, patched),
    }


def main() -> None:
    """Measures everything and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    rows: list[Row] = []
    for dtype in DTYPES:
        for name, tokens, step in steps(dtype):
            rows.append(measure(name, tokens, step, dtype, rounds))
            print(*(rows[-1][column] for column in ("model", "tokens", "dtype", "ratio", "verdict")), flush=True)
            dit_rope.cache_clear()
    print(f"wrote {write_results('small-sizes-cpu', rows)}")


if __name__ == "__main__":
    main()
