"""Times building and finding the tables of one grid, against building them token by token as upstream code does.

    python scripts/bench_tables.py                       # on CPU, Wan at 720p and 81 frames, float64 as FastVideo
    python scripts/bench_tables.py --grid 21x30x52 --dtype float32 --device cuda

Results are checked before anything is timed: dense tables must equal the full-grid build to the bit, and repeated calls
must return the same object. A cold build starts from empty caches. Memory comes as the C library hands it out: a table
stays in the cache while a model runs, so that its pages are fresh when it is built. Hits are timed by the thousand, on
the way through the lock and the check that nobody wrote to the entry. Hits per second are those of one thread and of
eight together, which share one table.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from benchmarking import Timing, interleave, write_results

from dit_rope import Grid, RopeSpec, cache_clear, cache_info, rope_table
from dit_rope.compat.fastvideo import get_rotary_pos_embed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from oracle import full_grid_table

HITS = 1000
THREADS = (1, 8)
HITS_OF_THREADS = 40_000
COLD_TABLES = 10
DTYPES = {"float32": torch.float32, "float64": torch.float64}

Tensors = tuple[torch.Tensor, torch.Tensor]


class Subject:
    """One grid's tables, built in every way that is compared."""

    def __init__(self, sizes: tuple[int, ...], head_dim: int, dtype: torch.dtype, device: str) -> None:
        side = 2 * (head_dim // 6)
        self.dims = (head_dim - 2 * side, side, side)
        self.spec, self.grid = RopeSpec(self.dims, frequency_dtype=dtype), Grid(*sizes)
        self.head_dim, self.dtype, self.device = head_dim, dtype, device

    def full_grid(self) -> Tensors:
        """Every token's angles on their own, on CPU, then moved: FastVideo's way."""
        cos, sin = full_grid_table(self.grid.sizes, self.dims, 10_000.0, dtype=self.dtype)
        return cos.to(self.device), sin.to(self.device)

    def table(self) -> object:
        """The axis tables."""
        return rope_table(self.spec, self.grid, device=self.device, dtype=self.dtype)

    def dense(self) -> Tensors:
        """The dense form that replaces FastVideo's function."""
        pair = get_rotary_pos_embed(self.grid.sizes, self.head_dim, 1, self.dims, 10_000.0, dtype=self.dtype)
        return pair if self.device == "cpu" else (pair[0].to(self.device), pair[1].to(self.device))

    def check(self) -> None:
        """Exits without a figure unless every way gives the same bits and repeated calls the same object."""
        cache_clear()
        expected = self.full_grid()
        table = rope_table(self.spec, self.grid, device=self.device, dtype=self.dtype)
        for name, ours in (("get_rotary_pos_embed", self.dense()), ("RopeTable.cos_sin", table.cos_sin())):
            if not all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True)):
                sys.exit(f"{name} differs from the full-grid build: no figures")
        if self.table() is not table or table.cos_sin()[0] is not table.cos_sin()[0]:
            sys.exit("a repeated call built its table again: no figures")


def cold(build: Callable[[], object], times: int = 1) -> Callable[[], None]:
    """``build`` from empty caches, so many times."""

    def run() -> None:
        for _ in range(times):
            cache_clear()
            build()

    return run


def hits(call: Callable[[], object]) -> Callable[[], None]:
    """A thousand calls of what is cached already."""

    def run() -> None:
        for _ in range(HITS):
            call()

    return run


def time_builds(subject: Subject, rounds: int) -> list[dict[str, object]]:
    """One row per way to build, in milliseconds, and how many times faster than the full grid."""
    cases: dict[str, Callable[[], object]] = {
        "full grid": subject.full_grid,
        "axis tables": cold(subject.table, COLD_TABLES),
        "dense drop-in": cold(subject.dense),
    }
    timings = interleave(cases, rounds)
    timings["axis tables"] = scaled(timings["axis tables"], 1 / COLD_TABLES)
    full = timings["full grid"].median
    return [row("cold build", name, "ms", timing, full / timing.median) for name, timing in timings.items()]


def time_hits(subject: Subject, rounds: int) -> list[dict[str, object]]:
    """One row per cached call, in microseconds."""
    cache_clear()
    table = rope_table(subject.spec, subject.grid, device=subject.device, dtype=subject.dtype)
    cases: dict[str, Callable[[], object]] = {
        "rope_table": hits(subject.table),
        "RopeTable.cos_sin": hits(table.cos_sin),
    }
    if subject.device == "cpu":
        cases["get_rotary_pos_embed"] = hits(subject.dense)
    for case in cases.values():
        case()
    return [
        row("hit", name, "us", scaled(timing, 1e3 / HITS), None) for name, timing in interleave(cases, rounds).items()
    ]


def time_threads(subject: Subject, rounds: int) -> list[dict[str, object]]:
    """One row per number of threads that ask for one table: hits per second, of all of them together."""
    cache_clear()
    subject.table()
    with ThreadPoolExecutor(max(THREADS)) as pool:

        def ask(threads: int) -> None:
            def work(_: int) -> None:
                for _ in range(HITS_OF_THREADS // threads):
                    subject.table()

            list(pool.map(work, range(threads)))

        cases: dict[str, Callable[[], object]] = {f"threads: {n}": functools.partial(ask, n) for n in THREADS}
        timings = interleave(cases, rounds)
    return [row("hits", name, "1/s", rate(timing, HITS_OF_THREADS), None) for name, timing in timings.items()]


def count_bytes(subject: Subject) -> list[dict[str, object]]:
    """The bytes one entry holds, axis arrays and packed rows together, and how many times less than the full grid."""
    dense = sum(tensor.numel() * tensor.element_size() for tensor in subject.full_grid())
    cache_clear()
    subject.table()
    info = cache_info()
    held = info.tables.bytes + info.axes.bytes
    return [
        {"what": "entry", "variant": name, "unit": "bytes", "p20": size, "median": size, "p80": size, "ratio": ratio}
        for name, size, ratio in (("full grid", dense, 1.0), ("axis tables", held, round(dense / held, 1)))
    ]


def scaled(timing: Timing, factor: float) -> Timing:
    """The same timing in another unit."""
    return Timing(timing.p20 * factor, timing.median * factor, timing.p80 * factor)


def rate(timing: Timing, calls: int) -> Timing:
    """Calls per second; the 20th percentile of a rate is the 80th of its time."""
    return Timing(*(round(1e3 * calls / time) for time in (timing.p80, timing.median, timing.p20)))


def row(what: str, variant: str, unit: str, timing: Timing, ratio: float | None) -> dict[str, object]:
    """A line of the results; ``ratio`` says how many times better than the full grid."""
    numbers = {name: round(getattr(timing, name), 4) for name in ("p20", "median", "p80")}
    return {
        "what": what,
        "variant": variant,
        "unit": unit,
        **numbers,
        "ratio": "" if ratio is None else round(ratio, 1),
    }


def main() -> None:
    """Checks, times, prints and writes ``results/tables-<device>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="21x45x80", help="tokens, FRAMESxHEIGHTxWIDTH after patching")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="float64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    sizes = tuple(int(size) for size in options.grid.split("x"))
    subject = Subject(sizes, options.head_dim, DTYPES[options.dtype], options.device)
    subject.check()
    rounds = options.rounds
    rows = [*time_builds(subject, rounds), *time_hits(subject, rounds), *time_threads(subject, rounds)]
    rows += count_bytes(subject)
    print(f"{options.grid} tokens, {options.head_dim} channels, {options.dtype} on {options.device}")
    print(f"{'':34}{'p20':>14}{'median':>14}{'p80':>14}   times better")
    for line in rows:
        print(
            f"{line['what']:11}{line['variant']:23}{line['p20']:14,}{line['median']:14,}{line['p80']:14,} "
            f"{line['unit']:6}{line['ratio']}"
        )
    case = {"grid": options.grid, "head_dim": options.head_dim, "dtype": options.dtype}
    print(
        f"written to {write_results(f'tables-{options.device}', [{**case, **line} for line in rows], options.device)}"
    )


if __name__ == "__main__":
    main()
