"""Times rotation, and norm with rotation, against the model's own code and a copy of the same tensors.

    python scripts/bench_rotation.py                     # on CPU, Wan 1.3B at 480p and 25 frames
    python scripts/bench_rotation.py --device cuda --grid 21x45x80 --heads 40

Results are checked before anything is timed: exact modes must equal the model's code to the bit, fast modes must be
no further from it than its own rounding. Every variant allocates its outputs, as the model's code does. With
``--allocator system`` the C library hands large blocks back to the system after every call and every variant pays for
their zeroed pages; with ``keep``, the default, none does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from benchmarking import Timing, interleave, keep_freed_memory, write_results

import dit_rope
from dit_rope import Grid, NormKind, RopeSpec
from dit_rope.cli.bench import wan_rotate

Tensors = tuple[torch.Tensor, torch.Tensor]


def cases(grid: Grid, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Tensors]]:
    """Variants that all turn the same q and k ``[1, S, heads, head_dim]``."""
    side = 2 * (head_dim // 6)
    table = dit_rope.rope_table(RopeSpec((head_dim - 2 * side, side, side)), grid, device=device)
    cos, sin = table.cos_sin(broadcast=True)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, grid.tokens, heads, head_dim)
    q, k = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    norms = [torch.nn.RMSNorm(heads * head_dim, eps=1e-6, device=device, dtype=dtype) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.1, generator=generator)
    weights = [norm.weight.detach() for norm in norms]
    across = NormKind.ACROSS_HEADS

    def model_norm_rotate() -> Tensors:
        q_normed, k_normed = (norm(x.flatten(2)).view(shape) for norm, x in zip(norms, (q, k), strict=True))
        return wan_rotate(q_normed, cos, sin), wan_rotate(k_normed, cos, sin)

    return {
        "copy": lambda: (q.clone(), k.clone()),
        "model rotate": lambda: (wan_rotate(q, cos, sin), wan_rotate(k, cos, sin)),
        "rotate": lambda: dit_rope.rotate_qk(q, k, table),
        "rotate exact": lambda: dit_rope.rotate_qk(q, k, table, exact=True),
        "model norm, rotate": model_norm_rotate,
        "norm_rotate": lambda: dit_rope.norm_rotate_qk(q, k, table, *weights, norm=across),
        "norm_rotate exact": lambda: dit_rope.norm_rotate_qk(q, k, table, *weights, norm=across, exact=True),
    }


def check(variants: dict[str, Callable[[], Tensors]], dtype: torch.dtype) -> None:
    """Stops the program when a variant does not give what the model's code gives."""
    for exact, model in (("rotate exact", "model rotate"), ("norm_rotate exact", "model norm, rotate")):
        if not all(torch.equal(a, b) for a, b in zip(variants[exact](), variants[model](), strict=True)):
            raise SystemExit(f"{exact} differs from {model}: nothing was timed")
    # One rounding apart, where the model has one (rotate) or three (norm, weight, rotate).
    for fast, model, roundings in (("rotate", "model rotate", 1), ("norm_rotate", "model norm, rotate", 3)):
        for a, b in zip(variants[fast](), variants[model](), strict=True):
            allowed = roundings * 2 * torch.finfo(dtype).eps * b.float().abs().max()
            if (a.float() - b.float()).abs().max() > allowed:
                raise SystemExit(f"{fast} is further than {allowed:.2e} from {model}: nothing was timed")


def report(timings: dict[str, Timing], dtype: torch.dtype, shape: tuple[int, ...]) -> list[dict[str, object]]:
    """Prints one line per variant and returns them as rows, with ratios to the model's code and to the copy."""
    rows: list[dict[str, object]] = []
    for name, timing in timings.items():
        model = timings["model norm, rotate" if "norm" in name else "model rotate"]
        row = {
            "shape": "x".join(map(str, shape)),
            "dtype": str(dtype).removeprefix("torch."),
            "variant": name,
            "ms_p20": round(timing.p20, 3),
            "ms_median": round(timing.median, 3),
            "ms_p80": round(timing.p80, 3),
            "times_faster_than_model": round(model.median / timing.median, 2),
            "times_slower_than_copy": round(timing.median / timings["copy"].median, 2),
        }
        rows.append(row)
        print(
            f"{row['dtype']:9} {name:20} {timing.median:9.2f} ms  [{timing.p20:.2f}, {timing.p80:.2f}]"
            f"  model / this {row['times_faster_than_model']:6}  this / copy {row['times_slower_than_copy']:6}"
        )
    return rows


def main() -> None:
    """Runs every dtype on one shape and writes ``results/rotation-<cpu or cuda>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="7x30x39", help="frames x height x width in tokens")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--allocator", choices=["keep", "system"], default="keep")
    options = parser.parse_args()
    if options.allocator == "keep":
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    grid = Grid(*(int(size) for size in options.grid.split("x")))
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for name in options.dtype:
            dtype = getattr(torch, name)
            variants = cases(grid, options.heads, options.head_dim, dtype, options.device)
            check(variants, dtype)
            timings = interleave(variants, options.rounds)
            rows += report(timings, dtype, (1, math.prod(grid.sizes), options.heads, options.head_dim))
    name = f"rotation-{options.device.partition(':')[0]}"
    print(write_results(name if options.allocator == "keep" else f"{name}-system-allocator", rows, options.device))


if __name__ == "__main__":
    main()
