"""The caches under attack: many threads, builders that fail, interrupts at every line, memory that runs out.

``DIT_ROPE_ATTACK=100000`` makes each of the 64 threads do that many lookups; a few hundred otherwise.
"""

from __future__ import annotations

import errno
import gc
import linecache
import mmap
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from test_cache import CPU, in_threads

import dit_rope
from dit_rope import Grid, Pairing, RopeSpec, Scaling, cache
from dit_rope.cache import FifoCache
from dit_rope.hooks import formats
from dit_rope.hooks.adapter import EVERY, ModelTables
from dit_rope.hooks.class_override import Installed, PatchState
from dit_rope.hooks.rope_modules import MemoizedMethod, TableSettings
from dit_rope.rotation.backends import eager
from dit_rope.rotation_args import RotationArgs
from dit_rope.tables.caches import MODEL_TABLES
from known_classes import known, memoize
from tolerance import all_equal

THREADS = 64
LOOKUPS = int(os.environ.get("DIT_ROPE_ATTACK", "300"))
SPEC = RopeSpec((8, 4, 4))
KEYS = 40


class Watched(FifoCache[int, torch.Tensor]):
    """A cache that looks at its own caps whenever something was stored or a cap was changed."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.most = 0
        self.broken: list[str] = []
        super().__init__("watched", max_entries, max_bytes, lambda tensor: (tensor,))

    def look(self) -> None:
        held = sum(entry.bytes for entry in self._entries.values())
        self.most = max(self.most, held)
        if held > self._max_bytes or len(self._entries) > self._max_entries:
            self.broken.append(f"{held} of {self._max_bytes} bytes, {len(self._entries)} of {self._max_entries}")

    def _store(self, *args: Any) -> None:
        super()._store(*args)
        self.look()

    def configure(self, **caps: int | None) -> None:
        with self._lock:
            super().configure(**caps)
            self.look()


@pytest.fixture
def watched() -> Watched:
    return Watched(8, 64 * 1024)


def value_of(key: int) -> torch.Tensor:
    """A tensor of 1 to 32 KiB that shows its key."""
    return torch.full((256 * (1 + key % 32),), float(key))


def test_64_threads_get_what_they_ask_for_while_others_evict_clear_configure_and_fail(watched: Watched) -> None:
    start = threading.Barrier(THREADS)

    def fail() -> torch.Tensor:
        raise ZeroDivisionError

    def attack(seed: int) -> list[str]:
        draw, wrong = random.Random(seed), []
        start.wait(timeout=60)
        for _ in range(LOOKUPS):
            act, key = draw.random(), draw.randrange(KEYS)
            if act < 0.002:
                watched.clear()
            elif act < 0.01:
                watched.configure(max_entries=draw.randint(1, 16), max_bytes=draw.randint(1, 100) * 1024)
            elif act < 0.015:
                watched.discard(lambda held, odd=key % 2: held % 2 == odd)
            elif act < 0.03:
                try:
                    watched.get(key, CPU, fail)
                except ZeroDivisionError:
                    continue
            else:
                value = watched.get(key, CPU, lambda key=key: value_of(key))
                if value.numel() != 256 * (1 + key % 32) or value[0] != key or value[-1] != key:
                    wrong.append(f"{key}: {value}")
            if act > 0.99:
                info = watched.info()
                if info.bytes > info.max_bytes or info.entries > info.max_entries or info.hits < 0:
                    wrong.append(str(info))
        return wrong

    assert in_many_threads(attack) == [[]] * THREADS
    assert watched.broken == []
    assert watched.most > 0
    assert watched._builds == {}
    assert watched.get(-1, CPU, lambda: value_of(0)).numel() == 256


def in_many_threads(call: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """As ``in_threads``, with time for a long attack; threads change hands often."""
    results: dict[int, Any] = {}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5 if LOOKUPS < 1000 else 1e-3)
    try:
        threads = [
            threading.Thread(target=lambda i=i: results.__setitem__(i, call(i)), daemon=True) for i in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60 + LOOKUPS / 20)
            assert not thread.is_alive(), "deadlock"
    finally:
        sys.setswitchinterval(interval)
    return [results[i] for i in range(count)]


def test_threads_get_the_right_tables_and_forms_while_others_clear_and_configure() -> None:
    grids = [Grid(2 + n % 5, 3, 2 + n % 3, start_frame=n) for n in range(24)]
    tables = [dit_rope.rope_table(SPEC, grid) for grid in grids]
    forms = [
        [table.rows, *table.cos_sin(), *table.cos_sin(False), table.complex(), table.positions()] for table in tables
    ]
    start = threading.Barrier(16)

    def attack(seed: int) -> list[str]:
        draw, wrong = random.Random(seed), []
        start.wait(timeout=60)
        for _ in range(max(20, LOOKUPS // 10)):
            number, act = draw.randrange(len(grids)), draw.random()
            if act < 0.02:
                dit_rope.cache_clear()
            elif act < 0.06:
                dit_rope.cache_configure(max_entries=draw.randint(1, 32), max_bytes=draw.randint(1_000, 200_000))
            table = dit_rope.rope_table(SPEC, grids[number])
            got = [table.rows, *table.cos_sin(), *table.cos_sin(False), table.complex(), table.positions()]
            if not all_equal(got, forms[number]):
                wrong.append(f"{grids[number]}")
        return wrong

    assert in_many_threads(attack, 16) == [[]] * 16
    for info in (dit_rope.cache_info().tables, dit_rope.cache_info().axes):
        assert info.bytes <= info.max_bytes
        assert info.entries <= info.max_entries


class _Rope(torch.nn.Module):
    """A rope module as models have them: tables from the shape of its argument and from a buffer."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.register_buffer("inverse", theta ** (-torch.arange(4) / 4))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.outer(torch.arange(hidden.shape[1], dtype=torch.float32), self.inverse)
        return angles.cos(), angles.sin()


class _Model(torch.nn.Module):
    """A model that builds its tables in a method of its own."""

    def tables(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float().cos()


def test_memoized_model_tables_are_right_under_threads_and_writes() -> None:
    known(_Rope)
    known(_Model, "tables")
    ropes, twins = [_Rope(10.0 + n) for n in range(3)], [_Rope(10.0 + n) for n in range(3)]
    for rope in ropes:
        memoize(rope, ModelTables("rope", "_Rope", keyed_by_shape=EVERY), ("hidden",))
    model = _Model()
    settings = TableSettings(ModelTables("", "_Model", "tables"), ("ids",))
    memo = MemoizedMethod(model, "tables", Installed(settings, PatchState()))
    start = threading.Barrier(16)

    def attack(seed: int) -> list[str]:
        draw, wrong = random.Random(seed), []
        ids = torch.full((3,), float(seed))
        start.wait(timeout=60)
        for _ in range(max(30, LOOKUPS // 5)):
            number, length = draw.randrange(3), draw.randint(1, 30)
            hidden = torch.empty(1, length, 0)
            if not all_equal(ropes[number](hidden), twins[number](hidden)):
                wrong.append(f"rope {number}, {length} tokens")
            if draw.random() < 0.1:
                ids.add_(1.0)  # counted by its version, and nobody else's
            if not torch.equal(memo(ids), ids.cos()):
                wrong.append(f"ids {ids}")
            if draw.random() < 0.02:
                dit_rope.cache_configure(
                    max_model_entries=draw.randint(1, 64), max_model_bytes=draw.randint(100, 9_999)
                )
        return wrong

    assert in_many_threads(attack, 16) == [[]] * 16
    assert MODEL_TABLES.info().hits > 0
    assert MODEL_TABLES.info().bytes <= MODEL_TABLES.info().max_bytes


def form(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand((1, tokens, 1, 4), generator=torch.Generator().manual_seed(seed))
    cos, sin = formats.INTERLEAVED.join(angles.cos(), angles.sin())
    return cos, sin


def test_packed_tables_are_right_under_threads_that_share_them_and_write_to_them() -> None:
    shared = [form(3 + n, n) for n in range(6)]
    expected = [formats.INTERLEAVED.tables(pair, CPU)[0].rows for pair in shared]
    start = threading.Barrier(16)

    def attack(seed: int) -> list[str]:
        draw, wrong = random.Random(seed), []
        private = form(5, 100 + seed)
        start.wait(timeout=60)
        for _ in range(max(30, LOOKUPS // 5)):
            number = draw.randrange(len(shared))
            (table,) = formats.INTERLEAVED.pack(shared[number], CPU)
            if not torch.equal(table.rows, expected[number]):
                wrong.append(f"shared {number}")
            if draw.random() < 0.2:
                private[draw.randrange(2)].mul_(0.5)
            if not torch.equal(
                formats.INTERLEAVED.pack(private, CPU)[0].rows, formats.INTERLEAVED.tables(private, CPU)[0].rows
            ):
                wrong.append("written")
            passing = form(4, draw.randrange(1000))  # dies at once: its id may be the next one's
            if not torch.equal(
                formats.INTERLEAVED.pack(passing, CPU)[0].rows, formats.INTERLEAVED.tables(passing, CPU)[0].rows
            ):
                wrong.append("passing")
        return wrong

    assert in_many_threads(attack, 16) == [[]] * 16


def test_packed_tables_die_with_the_tensor_they_were_packed_from() -> None:
    pair = form(6, 0)
    (table,) = formats.INTERLEAVED.pack(pair, CPU)
    assert formats.INTERLEAVED.pack(pair, CPU)[0] is table
    rows = weakref.ref(table.rows)
    del pair, table
    gc.collect()
    assert rows() is None


def test_tensor_that_stays_gathers_no_packed_tables_of_those_that_change() -> None:
    cos = torch.ones(3, 8)
    alive = []
    for number in range(100):
        sin = torch.full((3, 8), float(number))
        alive.append(weakref.ref(formats.INTERLEAVED.pack((cos, sin), CPU)[0].rows))
    del sin
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 16


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit, GeneratorExit, ZeroDivisionError])
def test_builder_that_raises_wakes_all_who_wait_and_each_builds_for_itself(watched: Watched, error: type) -> None:
    begun, attempts = threading.Event(), []

    def build() -> torch.Tensor:
        attempts.append(1)
        if len(attempts) == 1:
            begun.wait(timeout=20)
            raise error
        return value_of(1)

    def ask(number: int) -> object:
        if number == 7:  # by now the others wait, or soon do
            begun.set()
        try:
            return watched.get(1, CPU, build)
        except error as raised:
            return raised

    results = in_threads(8, ask)
    failed = [result for result in results if isinstance(result, BaseException)]
    assert len(failed) == 1
    assert len(attempts) == 2
    assert watched.info().entries == 1
    assert watched._builds == {}


def test_value_of_just_the_byte_cap_is_kept_and_one_byte_more_is_not(watched: Watched) -> None:
    watched.get(1, CPU, lambda: torch.zeros(64 * 1024, dtype=torch.uint8))
    assert (watched.info().entries, watched.info().bytes) == (1, 64 * 1024)
    watched.get(2, CPU, lambda: torch.zeros(64 * 1024 + 1, dtype=torch.uint8))
    assert list(watched._entries) == [(1, CPU)]


def rotated(args: RotationArgs) -> torch.Tensor:
    """Eight tokens rotated by the eager backend."""
    x = torch.ones(1, 8, 1, 16)
    out = torch.empty_like(x)
    eager.rotate([x], args, [out])
    return out


def test_angles_of_other_offsets_in_one_table_are_told_apart() -> None:
    whole = dit_rope.rope_table(SPEC, Grid(2, 3, 4)).args()
    parts = [replace(whole, token_offset=offset, count=8) for offset in (0, 8, 16)]
    together = [rotated(args) for args in parts]
    for args, actual in zip(parts, together, strict=True):
        dit_rope.cache_clear()
        assert torch.equal(actual, rotated(args))
    assert not torch.equal(together[0], together[1])


def test_angles_of_two_views_of_one_memory_are_told_apart() -> None:
    memory = torch.rand(2, 24, 4)
    views = memory[:, :12], memory.flatten()[:96].view(2, 12, 4)
    whole = dit_rope.rope_table(SPEC, Grid(2, 2, 2)).args()
    calls = [replace(whole, rows=view, first_rows=(0, 2, 4)) for view in views]
    together = [rotated(call) for call in calls]
    for call, actual in zip(calls, together, strict=True):
        dit_rope.cache_clear()
        assert torch.equal(actual, rotated(call))
    assert not torch.equal(*together)


class _NoMemory(list):  # type: ignore[type-arg]
    """Runs out of memory when it is asked what it holds."""

    def __iter__(self) -> Iterator[Any]:
        raise MemoryError


def test_memory_that_runs_out_after_the_build_leaves_the_key_free() -> None:
    hungry = True
    cache = FifoCache("test", 3, 1024, lambda tensor: _NoMemory() if hungry else (tensor,))
    with pytest.raises(MemoryError):
        cache.get(1, CPU, lambda: torch.ones(1))
    hungry = False
    assert in_threads(1, lambda _: cache.get(1, CPU, lambda: torch.ones(1)).item()) == [1.0]
    assert (cache.info().entries, cache.info().bytes) == (1, 4)


def test_host_without_memory_says_so_and_the_next_call_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    table = dit_rope.rope_table(SPEC, Grid(64, 64, 32))
    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", refuse)
        with pytest.raises(MemoryError, match="131072 tokens must fit in memory, got 8,388,608 bytes"):
            table.cos_sin()
    assert dit_rope.cache_info().tables.entries == 1
    assert torch.equal(table.cos_sin()[0][-1], table.cos_sin(False)[0][-1].repeat_interleave(2))


def test_allocator_without_memory_leaves_no_key_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    table = dit_rope.rope_table(SPEC, Grid(2, 2, 2))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            table.cos_sin()
    assert in_threads(1, lambda _: table.cos_sin()[0].shape) == [(8, 16)]


# Lines on which a tracer's exception can come where no interrupt can: Python looks at signals after calls and jumps,
# and neither entering a try nor leaving a with, which a tracer sees as its line once more, is one.
_NO_CALL = ("try:", "finally:", "with ", "else:")


class _InterruptAt:
    """Raises KeyboardInterrupt at the n-th line that runs in cache.py, in this thread."""

    def __init__(self, line: int) -> None:
        self.left = line
        self.came = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> _InterruptAt | None:
        if frame.f_code.co_filename != cache.__file__:
            return None
        text = linecache.getline(cache.__file__, frame.f_lineno).strip()
        if event == "line" and not self.came and not text.startswith(_NO_CALL):
            self.left -= 1
            if self.left == 0:
                self.came = True
                raise KeyboardInterrupt
        return self


def interrupted(line: int, call: Callable[[], object]) -> bool:
    """Runs ``call``, interrupted at its ``line``-th line in cache.py; whether it has so many."""
    tracer, before = _InterruptAt(line), sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return tracer.came


def prepare_miss(watched: Watched) -> Callable[[], object]:
    for key in range(2):
        watched.get(key, CPU, lambda: value_of(15))  # 16 KiB each
    watched.configure(max_bytes=33 * 1024)
    return lambda: watched.get(5, CPU, lambda: value_of(9))


def prepare_hit(watched: Watched) -> Callable[[], object]:
    watched.get(5, CPU, lambda: value_of(9))
    return lambda: watched.get(5, CPU, lambda: value_of(9))


def prepare_rebuild(watched: Watched) -> Callable[[], object]:
    watched.get(5, CPU, lambda: value_of(9)).add_(1)
    return lambda: watched.get(5, CPU, lambda: value_of(9))


def prepare_configure(watched: Watched) -> Callable[[], object]:
    for key in range(6):
        watched.get(key, CPU, lambda: value_of(9))
    return lambda: watched.configure(max_entries=2, max_bytes=15 * 1024)


def prepare_clear(watched: Watched) -> Callable[[], object]:
    watched.get(5, CPU, lambda: value_of(9))
    return lambda: (watched.discard(lambda key: True), watched.clear())


@pytest.mark.filterwarnings("ignore:an entry of the watched cache:RuntimeWarning")
@pytest.mark.parametrize("prepare", [prepare_miss, prepare_hit, prepare_rebuild, prepare_configure, prepare_clear])
def test_interrupt_at_any_line_leaves_a_cache_that_works(prepare: Callable[[Watched], Callable[[], object]]) -> None:
    line = 0
    while True:
        line += 1
        watched = Watched(8, 256 * 1024)
        came = interrupted(line, prepare(watched))
        assert watched._builds == {}, f"line {line}: others would wait for this key forever"
        watched.configure(max_entries=2, max_bytes=20 * 1024)
        # From another thread, which a lock that was not given back would stop; more than fits, so that some leave.
        values = in_threads(
            1, lambda _, cache=watched: [cache.get(key, CPU, lambda: value_of(9)) for key in range(4, 9)]
        )
        assert all(torch.equal(value, value_of(9)) for value in values[0])
        assert watched.info().bytes == sum(entry.bytes for entry in watched._entries.values()) == 20 * 1024
        assert watched.broken == []
        if not came:
            break
    assert line > 3


def test_interrupt_of_a_thread_that_waits_leaves_the_build_of_the_other_alone(watched: Watched) -> None:
    building, release = threading.Event(), threading.Event()

    def build() -> torch.Tensor:
        building.set()
        release.wait(timeout=20)
        return value_of(3)

    thread = threading.Thread(target=watched.get, args=(3, CPU, build))
    thread.start()
    building.wait(timeout=20)
    (attempt,) = watched._builds.values()

    class Interrupting:
        def wait(self) -> None:
            raise KeyboardInterrupt

    done, attempt.done = attempt.done, Interrupting()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        watched.get(3, CPU, build)
    attempt.done = done
    assert list(watched._builds.values()) == [attempt]
    release.set()
    thread.join(timeout=20)
    assert watched.get(3, CPU, build)[0] == 3.0
    assert watched.info().misses == 1


def test_pairing_and_every_other_field_of_a_spec_are_keys_of_their_own() -> None:
    specs = [
        SPEC,
        RopeSpec((8, 4, 4), theta=100.0),
        RopeSpec((8, 4, 4), pairing=Pairing.HALF),
        RopeSpec((8, 4, 4), scaling=(Scaling.of("fastvideo", interpolation=0.5), None, None)),
        RopeSpec((8, 4, 4), scaling=(Scaling.of("fastvideo", theta_rescale=2.0), None, None)),
        RopeSpec((8, 4, 4), frequency_dtype=torch.float32),
        RopeSpec((4, 8, 4)),
    ]
    tables = [dit_rope.rope_table(spec, Grid(2, 3, 4)) for spec in specs]
    tables.append(dit_rope.rope_table(SPEC, Grid(2, 3, 4), dtype=torch.float64))
    tables.append(dit_rope.rope_table(SPEC, Grid(2, 3, 4, start_frame=1)))
    tables.append(dit_rope.rope_table(SPEC, Grid(2, 3, 4), shard=dit_rope.Shard(0, 2)))
    assert len({id(table) for table in tables}) == len(tables)
