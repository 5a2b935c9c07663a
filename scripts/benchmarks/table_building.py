"""Tables of a grid: building them, finding them again, and the bytes that they take.

Compared are axis tables and the dense drop-in for FastVideo's function with what that function does: a table of every
token of the grid separately.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dit_rope.compat.fastvideo import get_rotary_pos_embed
from dit_rope.spec import Grid, RopeSpec
from dit_rope.tables.caches import cache_clear, cache_info
from dit_rope.tables.table import RopeTable, rope_table

from .results import Row
from .sections import Case, Settings, Wrong
from .timing import Timing, interleave

FULL, AXES, DENSE = "full grid", "axis tables", "dense drop-in"
BUILD, HIT, RATE, BYTES = "cold build", "hit", "hits by threads", "bytes"
ENTRIES = "bytes of entries"
VIDEO = "wan-720p-81-frames"
HITS, COLD_TABLES = 1000, 100
THREADS, HITS_OF_THREADS = (1, 8), 40_000
RESOLUTIONS = {"240p": (15, 26), "480p": (30, 52), "720p": (45, 80), "1080p": (68, 120), "4K": (135, 240)}
"""Tokens in height and width; a token is 16 x 16 pixels."""
FRAMES = 21
"""Of latents, for 81 of video."""
GRIDS = ((1, 15, 26), (1, 30, 52), (5, 30, 52), (21, 30, 52), (21, 45, 80))
QUICK_GRIDS = ((1, 8, 8), (3, 8, 8))
ENTRY_COUNTS = (1, 2, 4, 8, 16)

Tensors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """One grid's tables in float64, as FastVideo builds them for Wan, in every way that is compared."""

    grid: Grid
    device: str
    dims: tuple[int, ...] = (44, 42, 42)

    @functools.cached_property
    def spec(self) -> RopeSpec:
        """What the tables are of."""
        return RopeSpec(self.dims, frequency_dtype=torch.float64)

    def full_grid(self) -> Tensors:
        """Every token's angles separately, on the host as FastVideo does, then moved."""
        return self._moved(full_grid_table(self.grid.sizes, self.dims))

    def table(self) -> RopeTable:
        """The axis tables."""
        return rope_table(self.spec, self.grid, device=self.device, dtype=torch.float64)

    def dense(self) -> Tensors:
        """The dense form that replaces FastVideo's function, which builds on the host."""
        width = self.spec.rotary_dim
        return self._moved(get_rotary_pos_embed(self.grid.sizes, width, 1, self.dims, 10_000.0, dtype=torch.float64))

    def _moved(self, pair: Tensors) -> Tensors:
        return pair if self.device == "cpu" else (pair[0].to(self.device), pair[1].to(self.device))

    def dense_bytes(self) -> int:
        """Bytes of dense cos and sin, each number twice in a row."""
        return 2 * 8 * self.grid.tokens * sum(self.dims)

    def check(self) -> None:
        """Compares every way with the full grid, and a second call with the first.

        Raises:
            Wrong: a bit differs, or a table was built twice.
        """
        cache_clear()
        expected, table = self.full_grid(), self.table()
        for name, built in ((DENSE, self.dense()), (f"{AXES}, expanded", table.cos_sin())):
            if not all(map(torch.equal, built, expected)):
                raise Wrong(f"{name} differs from the {FULL} of {self.grid.sizes}")
        if self.table() is not table or table.cos_sin()[0] is not table.cos_sin()[0]:
            raise Wrong(f"a second call built the tables of {self.grid.sizes} again")


def full_grid_table(sizes: tuple[int, ...], dims: tuple[int, ...], theta: float = 10_000.0) -> Tensors:
    """Cos and sin ``[tokens, channels]``, float64, each number twice in a row, every token separately.

    The arithmetic of FastVideo's builder (fastvideo/layers/rotary_embedding.py at 2f3d4074): float32 positions of the
    whole grid, float64 frequencies, and their products.
    """
    lines = [torch.arange(size, dtype=torch.float32) for size in sizes]
    angles = [
        torch.outer(positions.flatten(), 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        for positions, dim in zip(torch.meshgrid(*lines, indexing="ij"), dims, strict=True)
    ]
    cos, sin = (
        torch.cat([function(angle).repeat_interleave(2, dim=-1) for angle in angles], dim=1)
        for function in (torch.cos, torch.sin)
    )
    return cos, sin


def cases(settings: Settings) -> Iterator[Case]:
    """Builds at growing grids, the largest with its hits; then bytes by resolution and by number of entries."""
    grids = QUICK_GRIDS if settings.quick else GRIDS
    for sizes in grids:
        subject = Subject(Grid(*sizes), settings.device)
        yield Case(f"tables, {subject.grid.tokens:,} tokens", functools.partial(_time_builds, subject, settings.rounds))
    yield Case("tables, found again", functools.partial(_time_hits, subject, settings.rounds))
    yield Case("tables, found by threads", functools.partial(_time_threads, subject, settings.rounds))
    yield Case("tables, bytes", functools.partial(_count_bytes, settings.device))


def _time_builds(subject: Subject, rounds: int) -> list[Row]:
    subject.check()
    timings = interleave(
        {FULL: subject.full_grid, AXES: cold(subject.table, COLD_TABLES), DENSE: cold(subject.dense)}, rounds
    )
    timings[AXES] = timings[AXES].times(1 / COLD_TABLES)
    full = timings[FULL].median
    return [_row(subject, BUILD, name, "ms", timing, full / timing.median) for name, timing in timings.items()]


def _time_hits(subject: Subject, rounds: int) -> list[Row]:
    cache_clear()
    table = subject.table()
    calls: dict[str, Callable[[], object]] = {
        "rope_table": subject.table,
        "RopeTable.cos_sin": table.cos_sin,
        "get_rotary_pos_embed": subject.dense,
    }
    for call in calls.values():
        call()
    timings = interleave({name: repeated(call, HITS) for name, call in calls.items()}, rounds)
    return [_row(subject, HIT, name, "us", timing.times(1e3 / HITS)) for name, timing in timings.items()]


def _time_threads(subject: Subject, rounds: int) -> list[Row]:
    cache_clear()
    subject.table()
    with ThreadPoolExecutor(max(THREADS)) as pool:

        def ask(threads: int) -> None:
            list(pool.map(lambda _: repeated(subject.table, HITS_OF_THREADS // threads)(), range(threads)))

        timings = interleave({f"threads: {n}": functools.partial(ask, n) for n in THREADS}, rounds)
    # The 20th percentile of a rate is the 80th of its time.
    rates = {
        n: Timing(*(round(1e3 * HITS_OF_THREADS / ms) for ms in (t.p80, t.median, t.p20))) for n, t in timings.items()
    }
    return [_row(subject, RATE, name, "1/s", rate) for name, rate in rates.items()]


def _count_bytes(device: str) -> list[Row]:
    """Bytes that one entry holds, axis arrays and packed rows together, by resolution; then those of many entries."""
    rows = []
    for name, (height, width) in RESOLUTIONS.items():
        subject = Subject(Grid(FRAMES, height, width), device)
        cache_clear()
        subject.table()
        rows += _byte_rows(subject, BYTES, name, subject.dense_bytes(), entry_bytes())
    cache_clear()
    dense = 0
    for number in range(1, max(ENTRY_COUNTS) + 1):
        subject = Subject(Grid(FRAMES, 45, 80 - number), device)
        subject.table()
        dense += subject.dense_bytes()
        if number in ENTRY_COUNTS:
            rows += _byte_rows(subject, ENTRIES, str(number), dense, entry_bytes())
    cache_clear()
    return rows


def _byte_rows(subject: Subject, quantity: str, case: str, dense: int, axes_bytes: int) -> list[Row]:
    sizes = ((FULL, dense), (AXES, axes_bytes))
    return [{**_row(subject, quantity, name, "bytes", Timing(n, n, n), dense / n), "case": case} for name, n in sizes]


def entry_bytes() -> int:
    """Bytes of all tables that the caches hold."""
    info = cache_info()
    return info.tables.bytes + info.axes.bytes + info.models.bytes


def cold(build: Callable[[], object], times: int = 1) -> Callable[[], None]:
    """``build`` from empty caches, so many times."""

    def run() -> None:
        for _ in range(times):
            cache_clear()
            build()

    return run


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """``call``, so many times."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def _row(subject: Subject, quantity: str, variant: str, unit: str, timing: Timing, ratio: float | None = None) -> Row:
    """A line of the results; ``times_better`` compares with the full grid."""
    case = VIDEO if subject.grid.sizes == GRIDS[-1] else "x".join(map(str, subject.grid.sizes))
    return {
        "case": case,
        "tokens": subject.grid.tokens,
        "dtype": "float64",
        "quantity": quantity,
        "variant": variant,
        "unit": unit,
        **vars(timing),
        "times_better": ratio,
    }
