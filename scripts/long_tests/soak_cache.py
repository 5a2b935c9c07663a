"""Asks the caches for a million different tables in one process, and watches its resident memory.

    python scripts/long_tests/soak_cache.py [--requests 1000000]

Requests are drawn from tables of grids, shards, scalings and start frames, their dense, complex and position forms, the
memoized tables of rope modules that come and go, and packed tables of tensors that live on beside others that do not.
Most are new, some come again; now and then a request clears the caches, sets other caps or writes into a table. Every
hundredth answer is compared with one that is built again, bit for bit.

Writes ``scripts/results/soak-cache.csv``, a row for each hundredth of the requests, at each of those (a soak that is
stopped leaves what it has seen), and the curve, ``docs/soak.svg``. Fails where memory keeps growing after the first
fifth: by more than 4 MiB, 7 bytes a request, from the mean of the second fifth to that of the last.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot

import dit_rope
from dit_rope import Grid, Pairing, RopeSpec, Scaling, Shard
from dit_rope.hooks import formats
from dit_rope.hooks.adapter import EVERY, ModelTables
from dit_rope.hooks.class_override import release_all
from dit_rope.tables import table as tables

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.results import write_results
from known_classes import known, memoize

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "soak.svg"
SAMPLES = 100
CAP = 8 * 2**20
CHECKED_EVERY = 100
MOST_GROWN_MIB = 4
DIMS = ((8, 4, 4), (44, 42, 42), (16, 24, 24), (12, 12), (32,))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    """What was seen after so many requests."""

    requests: int
    resident_mib: float
    cached_mib: float
    entries: int
    hits: int
    misses: int
    evictions: int


@known
class Rope(torch.nn.Module):
    """A rope module as models have them, whose code a patch takes for known."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.register_buffer("inverse", theta ** (-torch.arange(16) / 16))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin of as many tokens as ``hidden`` has."""
        angles = torch.outer(torch.arange(hidden.shape[1], dtype=torch.float32), self.inverse)
        return angles.cos(), angles.sin()


class Requests:
    """Draws requests and answers them; :meth:`one` compares the answer where it is told to."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.ropes = [self._rope() for _ in range(4)]
        self.image = self._pair(64)
        self.kinds: tuple[Callable[[bool], None], ...] = (self.table, self.dense, self.model_table, self.packed)

    def check_request(self, checked: bool) -> None:
        """One request; one in two thousand first clears, sets other caps, or writes into a table."""
        if self.draw.random() < 0.0005:
            self.disturb()
        self.draw.choice(self.kinds)(checked)

    def _drawn(self) -> tuple[RopeSpec, Grid, Shard | None, torch.dtype]:
        draw = self.draw
        dims = draw.choice(DIMS)
        sizes = [draw.randint(1, 6) for _ in dims]
        scaling = Scaling.of("linear", factor=draw.randint(1, 50) / 10) if draw.random() < 0.05 else None
        spec = RopeSpec(dims, pairing=draw.choice(list(Pairing)), scaling=scaling)
        world = draw.randint(1, 4)
        shard = Shard(draw.randrange(world), world) if draw.random() < 0.3 else None
        start = draw.randrange(100_000 if draw.random() < 0.1 else 8)
        return spec, Grid(*sizes, start_frame=start), shard, draw.choice((torch.float32, torch.float64))

    def table(self, checked: bool) -> None:
        """The rows of a table."""
        spec, grid, shard, dtype = self._drawn()
        table = dit_rope.rope_table(spec, grid, shard=shard, dtype=dtype)
        if checked:
            rebuilt = tables.build_table(spec, grid, device=CPU, dtype=dtype)
            assert torch.equal(table.rows, rebuilt.rows)  # a shard shares the rows of the whole

    def dense(self, checked: bool) -> None:
        """A table and one of its forms."""
        spec, grid, shard, dtype = self._drawn()
        table = dit_rope.rope_table(spec, grid, shard=shard, dtype=dtype)
        form = self.draw.randrange(3)
        if form == 0:
            cos, sin = table.cos_sin(self.draw.random() < 0.5)
            assert cos.shape == sin.shape
            assert cos.shape[0] == table.count
        elif form == 1:
            numbers = table.complex()
            if checked:
                cos, sin = table.cos_sin(False)
                assert torch.equal(numbers, torch.complex(cos, sin))
        else:
            positions = table.positions()
            if checked:
                assert torch.equal(positions, tables.build_positions(table))

    def model_table(self, checked: bool) -> None:
        """What a patched rope module gives; one in fifty is undone, and another takes its place."""
        at = self.draw.randrange(len(self.ropes))
        if self.draw.random() < 0.02:
            release_all(self.ropes[at])
            self.ropes[at] = self._rope()
        rope, hidden = self.ropes[at], torch.empty(1, self.draw.randint(1, 600), 0)
        outputs = rope(hidden)
        if checked:
            assert all(map(torch.equal, outputs, Rope.forward(rope, hidden)))

    def packed(self, checked: bool) -> None:
        """Packed tables of tensors that die, alone and beside one that stays."""
        text = self._pair(self.draw.randint(1, 40))
        for pair in (text, (self.image[0], text[1].new_ones(self.image[1].shape))):
            (table,) = formats.INTERLEAVED.pack(pair, CPU)
            if checked:
                assert torch.equal(table.rows, formats.INTERLEAVED.tables(pair, CPU)[0].rows)

    def disturb(self) -> None:
        """What a program does to the caches from outside."""
        act = self.draw.randrange(3)
        if act == 0:
            dit_rope.cache_clear()
        elif act == 1:
            entries, size = self.draw.randint(1, 64), self.draw.randint(1, CAP)
            dit_rope.cache_configure(max_entries=entries, max_bytes=size, max_model_bytes=size)
        else:
            dit_rope.rope_table(RopeSpec((8, 4, 4)), Grid(2, 2, 2)).rows.add_(1.0)

    def _rope(self) -> Rope:
        rope = Rope(self.draw.uniform(10.0, 10_000.0))
        memoize(rope, ModelTables("rope", "Rope", keyed_by_shape=EVERY), ("hidden",))
        return rope

    def _pair(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (formats.repeat(torch.rand(tokens, 8), Pairing.INTERLEAVED) for _ in range(2))
        return cos, sin


def resident_mib() -> float:
    """The process's resident memory, as Linux tells it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(count: int, seed: int) -> Iterator[Sample]:
    """Answers ``count`` requests; a sample after each hundredth of them. Counters are those since the last clear."""
    requests = Requests(seed)
    every = max(1, count // SAMPLES)
    for number in range(1, count + 1):
        requests.check_request(number % CHECKED_EVERY == 0)
        if number % every == 0:
            gc.collect()
            infos = dit_rope.cache_info()
            caches = (infos.tables, infos.axes, infos.expanded, infos.models)
            assert all(info.bytes <= info.max_bytes and info.entries <= info.max_entries for info in caches)
            totals = [
                sum(getattr(info, name) for info in caches) for name in ("entries", "hits", "misses", "evictions")
            ]
            yield Sample(number, resident_mib(), sum(info.bytes for info in caches) / 2**20, *totals)


def growth(samples: list[Sample]) -> float:
    """MiB of resident memory gained from the second fifth of the soak to its last."""
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    return statistics.fmean(s.resident_mib for s in late) - statistics.fmean(s.resident_mib for s in early)


def plot(samples: list[Sample], path: Path = PICTURE) -> None:
    """Draws resident memory and what the caches hold over the number of requests."""
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "soak"})
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    at = [sample.requests / 1e3 for sample in samples]
    axes.plot(at, [sample.resident_mib for sample in samples], label="process, resident")
    axes.plot(at, [sample.cached_mib for sample in samples], label="caches")
    axes.set(xlabel="thousand requests", ylabel="MiB", ylim=(0, None))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def rows_of(samples: list[Sample]) -> list[dict[str, object]]:
    """Samples as they are written."""
    return [
        vars(sample) | {name: f"{getattr(sample, name):.1f}" for name in ("resident_mib", "cached_mib")}
        for sample in samples
    ]


def main() -> None:
    """Soak, write, draw, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "an entry of the .* cache was written", RuntimeWarning)
    dit_rope.cache_configure(max_bytes=CAP, max_model_bytes=CAP)
    begun, samples = time.monotonic(), list[Sample]()
    for sample in soak(options.requests, options.seed):
        samples.append(sample)
        print(
            *itertools.chain.from_iterable(rows_of([sample])[0].items()),
            f"{time.monotonic() - begun:.0f} s",
            flush=True,
        )
        write_results("soak-cache", rows_of(samples))
    plot(samples)
    grown = growth(samples)
    print(f"grew by {grown:.1f} MiB after the first fifth; wrote {PICTURE}")
    if grown > MOST_GROWN_MIB:
        raise SystemExit("memory must not grow")


if __name__ == "__main__":
    main()
