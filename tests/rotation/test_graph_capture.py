"""CUDA graphs: what a captured graph reads stays where it is, and says what its inputs say when it is replayed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import dit_rope
from dit_rope import Grid, RopeSpec, rope_table
from dit_rope.cache import FifoCache
from dit_rope.hooks import formats, forward_pass
from dit_rope.streaming import shift as shifting
from dit_rope.streaming.shift import ShiftTable
from zoo import EXAMPLES, Noise, wan

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
KIB = 1024


class Capture:
    """Stands in for a stream that may be captured, in one thread or in all of them."""

    under_way = False
    thread: int | None = None

    def is_capturing(self) -> bool:
        return self.under_way and self.thread in (None, threading.get_ident())


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Builds for ``cuda:0`` run on CPU, and a capture is under way whenever a test says so."""
    state = Capture()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", state.is_capturing)
    stream = SimpleNamespace(stream_id=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream)
    return state


@pytest.fixture
def cache() -> FifoCache[str, torch.Tensor]:
    return FifoCache("test", 2, 2 * KIB, lambda value: [value])


def of_bytes(count: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.ones(count, dtype=torch.uint8)


def forbidden() -> torch.Tensor:
    raise AssertionError("built again")


def is_alive(reference: weakref.ref[torch.Tensor]) -> bool:
    gc.collect()
    return reference() is not None


def entry_of(cache: FifoCache[str, torch.Tensor], key: str, device: torch.device = GPU) -> weakref.ref[torch.Tensor]:
    """A weak reference to the entry of ``key``."""
    return weakref.ref(cache.get(key, device, of_bytes(KIB)))


def test_captured_entry_outlives_its_eviction(cache: FifoCache[str, torch.Tensor], capture: Capture) -> None:
    cache.get("a", GPU, of_bytes(KIB))
    capture.under_way = True
    captured = entry_of(cache, "a")
    capture.under_way = False
    plain = entry_of(cache, "b")
    for key in ("c", "d"):
        cache.get(key, GPU, of_bytes(KIB))
    assert cache.info().evictions == 2
    assert is_alive(captured)
    assert not is_alive(plain)
    info = cache.info()
    assert (info.entries, info.bytes, info.captured_bytes) == (2, 2 * KIB, KIB)
    cache.clear()
    assert not is_alive(captured)
    assert cache.info().captured_bytes == 0


@pytest.mark.parametrize("leaves", ["configure", "discard", "rebuild"])
def test_captured_entry_outlives_every_way_out_of_the_cache(
    leaves: str, cache: FifoCache[str, torch.Tensor], capture: Capture
) -> None:
    cache.get("a", GPU, of_bytes(KIB))
    capture.under_way = True
    captured = entry_of(cache, "a")
    capture.under_way = False
    if leaves == "configure":
        cache.configure(max_bytes=KIB - 1)
    elif leaves == "discard":
        cache.discard(lambda key: key == "a")
    else:
        value = captured()
        assert value is not None
        value.zero_()
        del value
        with pytest.warns(RuntimeWarning, match="written to"):
            assert cache.get("a", GPU, of_bytes(KIB)).all()
    assert is_alive(captured)
    assert cache.info().captured_bytes == KIB


def test_captured_bytes_leave_the_caps_to_others(cache: FifoCache[str, torch.Tensor], capture: Capture) -> None:
    for number in range(5):
        cache.get(f"captured {number}", GPU, of_bytes(KIB))
        capture.under_way = True
        for _ in range(3):
            cache.get(f"captured {number}", GPU, forbidden)
        capture.under_way = False
    assert cache.info().captured_bytes == 5 * KIB
    entries = [cache.get(key, GPU, of_bytes(KIB)) for key in "ab"]
    assert [cache.get(key, GPU, forbidden) for key in "ab"] == entries


def test_entries_on_the_host_are_not_held(cache: FifoCache[str, torch.Tensor], capture: Capture) -> None:
    """A graph reads the device's memory; what was copied from the host is not read again."""
    cache.get("a", CPU, of_bytes(KIB))
    capture.under_way = True
    passing = entry_of(cache, "a", CPU)
    capture.under_way = False
    assert cache.info().captured_bytes == 0
    cache.clear()
    assert not is_alive(passing)


def test_capture_that_waits_for_a_build_holds_its_entry(cache: FifoCache[str, torch.Tensor], capture: Capture) -> None:
    """The other thread's stream is not the captured one; its value reaches the graph by way of the cache alone."""
    capture.under_way, capture.thread = True, threading.get_ident()
    started, release = threading.Event(), threading.Event()

    def build() -> torch.Tensor:
        started.set()
        assert release.wait(timeout=20)
        return torch.ones(KIB, dtype=torch.uint8)

    thread = threading.Thread(target=cache.get, args=("a", GPU, build))
    thread.start()
    assert started.wait(timeout=20)
    threading.Timer(0.1, release.set).start()
    value = cache.get("a", GPU, forbidden)
    thread.join()
    assert cache.info().captured_bytes == value.nbytes


def test_capture_is_refused_a_value_that_the_cache_cannot_hold(
    cache: FifoCache[str, torch.Tensor], capture: Capture
) -> None:
    cache.get("large", GPU, of_bytes(3 * KIB))
    capture.under_way = True
    with pytest.raises(RuntimeError, match="must not build .* while a CUDA graph is being captured"):
        cache.get("large", GPU, forbidden)


FLUX = next(example for example in EXAMPLES if example.name == "flux")


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Each value at two neighbours, as models hold cos and sin."""
    return x.repeat_interleave(2, dim=-1)


def rows_packed(rotary: object) -> torch.Tensor:
    (table,) = formats.INTERLEAVED.pack(rotary, GPU)
    return table.rows


@pytest.fixture
def packs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed for ``cuda:0`` stays on CPU; a forward pass is under way."""
    monkeypatch.setattr(forward_pass._current, "number", 0)
    real = formats.pack
    monkeypatch.setattr(formats, "pack", lambda cos, sin, pairing, device: real(cos, sin, pairing, CPU))


def test_packed_rows_are_made_in_the_graph_that_reads_them(capture: Capture, packs_on_cpu: None) -> None:
    """Static inputs are written between replays: rows packed before the capture would be those of the first video."""
    rotary = doubled(torch.randn(5, 4)), doubled(torch.randn(5, 4))
    before = rows_packed(rotary)
    assert rows_packed(rotary) is before
    capture.under_way = True
    first, second = rows_packed(rotary), rows_packed(rotary)
    assert first is not before
    assert second is not first  # two graphs may capture in turn, and neither may read the other's memory
    capture.under_way = False
    assert rows_packed(rotary) is before
    assert torch.equal(first, before)


def test_packed_rows_serve_the_stream_that_packs_them(
    capture: Capture, packs_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another stream waits for nobody, and would read rows that are not written yet."""
    stream = SimpleNamespace(stream_id=1)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream)
    rotary = doubled(torch.randn(5, 4)), doubled(torch.randn(5, 4))
    first = rows_packed(rotary)
    stream.stream_id = 2
    second = rows_packed(rotary)
    assert second is not first
    assert torch.equal(second, first)
    assert rows_packed(rotary) is second
    stream.stream_id = 1
    assert rows_packed(rotary) is first


def test_shift_table_keeps_the_rows_it_has_outgrown_where_graphs_read_them(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shifting, "_graphs_read", lambda device: True)
    table = ShiftTable(RopeSpec((4, 2, 2)))
    first = weakref.ref(table.rows)
    expected = table.rows.clone()
    grown = table.reserve(4 * expected.shape[1])
    assert grown.shape[1] > expected.shape[1]
    assert is_alive(first)
    captured = first()
    assert captured is not None
    assert torch.equal(captured, expected)
    assert torch.equal(grown[:, : expected.shape[1]], expected)


def replayed(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A CUDA graph of ``call`` after a run outside of it, and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def fill_memory() -> None:
    """Turns whatever was freed into NaN."""
    torch.full((64 * 2**20,), torch.nan, device="cuda")
    for size in (2**8, 2**12, 2**16, 2**20):
        for _ in range(64):
            torch.full((size,), torch.nan, device="cuda")


@pytest.mark.gpu
def test_graph_of_a_rotation_survives_the_eviction_of_its_table() -> None:
    dit_rope.cache_clear()
    spec, grid = RopeSpec((44, 42, 42)), Grid(3, 5, 7)
    x = torch.randn(1, grid.tokens, 4, 128, device="cuda")
    replay, out = replayed(lambda: dit_rope.rotate(x, rope_table(spec, grid, device="cuda")))
    expected = out.clone()
    for frames in range(4, 40):
        rope_table(spec, Grid(frames, 5, 7), device="cuda")
    fill_memory()
    replay()
    assert torch.equal(out, expected)
    assert dit_rope.cache_info().tables.captured_bytes > 0
    del replay
    dit_rope.cache_clear()
    assert dit_rope.cache_info().tables.captured_bytes == 0


@pytest.mark.gpu
def test_graph_of_a_patched_model_follows_its_inputs_and_survives_eviction() -> None:
    model = wan.build("wan").cuda()
    latents, text = torch.randn(1, 4, 3, 8, 12, device="cuda"), torch.randn(1, 12, 16, device="cuda")
    step = torch.tensor([500], device="cuda")
    latents_2 = torch.randn_like(latents)

    def call() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(latents, step, text, return_dict=False)[0]
            return out

    dit_rope.cache_clear()
    with dit_rope.patch(model):
        replay, out = replayed(call)
        latents.copy_(latents_2)
        expected = call()
        dit_rope.cache_configure(max_entries=1)
        rope_table(RopeSpec((4,)), Grid(3), device="cuda")
        dit_rope.cache_configure(max_entries=16)
        fill_memory()
        replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
def test_graph_of_a_model_with_tables_of_its_own_follows_its_position_ids() -> None:
    model = FLUX.build().cuda()
    inputs = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in FLUX.inputs(model, Noise(torch.float32)).items()
    }

    def call() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = FLUX.run(model, inputs)[0]
            return out

    dit_rope.cache_clear()
    with dit_rope.patch(model):
        replay, out = replayed(call)
        inputs["img_ids"].add_(3)
        inputs["img_ids"][:, 1].mul_(2)
        expected = call()
        before = out.clone()
        replay()
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(before, expected)
