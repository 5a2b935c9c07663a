"""Measures the error of rotation, and of norm with rotation: of this package and of the models' own code.

    python scripts/measure/measure_errors.py

Writes ``scripts/results/errors-cpu.csv``: the largest and the root-mean-square error per operation, dtype and pairing,
over 1,024 tokens of 4 heads of 128 channels, whose last position is the one named. Values are normal, of variance 1,
seeded; weights of the norm lie between 0.5 and 1.5. Tables are formed in float64, kept so for float64 data and else
rounded to float32, the same for all. True values take the tables in float64 and compute in numpy's longdouble, which on
x86 has 11 bits more than float64. Nothing is timed.

The models' own code is ``apply_rotary_emb`` of diffusers after ``torch.nn.functional.rms_norm`` over the channels of a
head, as Flux and HunyuanVideo (interleaved pairs) and Cosmos (half) call them: eager, and compiled by
``torch.compile``. Exact mode must equal the eager code to the bit before anything is written, but for float64, which
diffusers rotates in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers.models.embeddings import apply_rotary_emb

from dit_rope import Grid, Pairing, RopeSpec, norm_rotate, rope_table, rotate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results

TOKENS, HEADS, CHANNELS, EPS = 1024, 4, 128, 1e-6
LAST_POSITIONS = (1_023, 10_000, 100_000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OPERATIONS = ("rotate", "norm and rotate")
UNBIND_DIM = {Pairing.INTERLEAVED: -1, Pairing.HALF: -2}

Wide = np.ndarray[tuple[int, ...], np.dtype[np.longdouble]]
Tables = tuple[torch.Tensor, torch.Tensor]
Code = Callable[[torch.Tensor, torch.Tensor | None, Tables], torch.Tensor]
"""``[1, S, H, D]``, the weight ``[D]`` of a norm or None for no norm, and tables ``[S, D]``, to the rotated tensor."""


def models_code(pairing: Pairing) -> Code:
    """What the models run."""
    unbind_dim = UNBIND_DIM[pairing]

    def rotate(x: torch.Tensor, weight: torch.Tensor | None, tables: Tables) -> torch.Tensor:
        if weight is not None:
            x = torch.nn.functional.rms_norm(x, (CHANNELS,), weight, EPS)
        rotated = apply_rotary_emb(x, tables, use_real_unbind_dim=unbind_dim, sequence_dim=1)
        return cast(torch.Tensor, rotated)

    return rotate


def reference(x: torch.Tensor, weight: torch.Tensor | None, tables: Tables, pairing: Pairing) -> Wide:
    """The same from tables in float64, written out in numpy's longest floats."""
    wide: Wide = x.double().numpy().astype(np.longdouble)
    if weight is not None:
        wide = wide / np.sqrt(np.mean(np.square(wide), axis=-1, keepdims=True) + EPS) * weight.double().numpy()
    cos, sin = (table.numpy()[:, None] for table in tables)
    crossed = np.empty_like(wide)
    if pairing is Pairing.INTERLEAVED:
        crossed[..., ::2], crossed[..., 1::2] = -wide[..., 1::2], wide[..., ::2]
    else:
        half = CHANNELS // 2
        crossed[..., :half], crossed[..., half:] = -wide[..., half:], wide[..., :half]
    return wide * cos + crossed * sin


def measure(pairing: Pairing, dtype: torch.dtype, normed: bool) -> list[dict[str, object]]:
    """One row for each last position and each code."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, HEADS, CHANNELS, dtype=torch.float64, generator=generator).to(dtype)
    weight = (torch.rand(CHANNELS, dtype=torch.float64, generator=generator) + 0.5).to(dtype) if normed else None
    spec, eager = RopeSpec((CHANNELS,), pairing=pairing), models_code(pairing)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    rows: list[dict[str, object]] = []
    for last in LAST_POSITIONS:
        grid = Grid(TOKENS, start_frame=last + 1 - TOKENS)
        table = rope_table(spec, grid, dtype=torch.promote_types(dtype, torch.float32))
        tables = table.cos_sin()
        exact, fast = (
            norm_rotate(x, table, weight, eps=EPS, exact=mode) if normed else rotate(x, table, exact=mode)
            for mode in (True, False)
        )
        results = {"eager": eager(x, weight, tables), "exact": exact, "fast": fast}
        if dtype != torch.float64 and not torch.equal(results["exact"], results["eager"]):
            raise SystemExit(f"exact mode differs from the eager code in {dtype}, {pairing}: nothing was written")
        results["compiled"] = compiled(x, weight, tables)
        true = reference(x, weight, rope_table(spec, grid, dtype=torch.float64).cos_sin(), pairing)
        for code, result in results.items():
            error = np.abs(result.double().numpy() - true)
            rows.append(
                {
                    "operation": OPERATIONS[normed],
                    "dtype": str(dtype).removeprefix("torch."),
                    "pairing": pairing.value,
                    "last position": last,
                    "code": code,
                    "largest error": f"{error.max():.2e}",
                    "rms error": f"{np.sqrt(np.mean(np.square(error))):.2e}",
                }
            )
    return rows


def main() -> None:
    """Measures everything and writes the table."""
    torch.set_num_threads(1)  # a reduction adds in an order that depends on their number
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for pairing in Pairing:
            for dtype in DTYPES:
                for normed in (False, True):
                    torch.compiler.reset()  # it keeps a few versions of one function
                    rows += measure(pairing, dtype, normed)
                    print(*rows[-1].values())
    print(f"wrote {write_results('errors-cpu', rows)}")


if __name__ == "__main__":
    main()
