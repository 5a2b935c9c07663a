"""The cache contract: one test per clause, on plain tensors; nothing here knows about RoPE."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_rope.cache import FifoCache
from dit_rope.torch_state import finish

CPU = torch.device("cpu")
KIB = 256  # float32 elements in 1 KiB


class PassThrough(TorchDispatchMode):
    """A dispatch mode that changes nothing, as a counting or profiling one does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cache() -> FifoCache[object, torch.Tensor]:
    return FifoCache("test", max_entries=3, max_bytes=10 * 1024, tensors_of=lambda tensor: (tensor,))


def ones(kib: int = 1) -> Callable[[], torch.Tensor]:
    return lambda: torch.ones(kib * KIB)


def forbidden() -> torch.Tensor:
    raise AssertionError("built although the entry was there")


def in_threads(count: int, call: Callable[[int], object]) -> list[object]:
    """Runs ``call(0..count-1)`` at once; fails instead of hanging."""
    pool = ThreadPoolExecutor(count)
    futures = [pool.submit(call, i) for i in range(count)]
    try:
        return [future.result(timeout=20) for future in futures]
    finally:
        pool.shutdown(wait=False)


def test_get_returns_the_same_object_and_counts(cache) -> None:
    first = cache.get("a", CPU, ones())
    assert cache.get("a", CPU, forbidden) is first
    info = cache.info()
    assert (info.hits, info.misses, info.entries, info.bytes) == (1, 1, 1, 1024)
    assert (info.evictions, info.rebuilds, info.max_entries, info.max_bytes) == (0, 0, 3, 10 * 1024)


def test_eviction_is_first_in_first_out_although_the_oldest_was_hit(cache) -> None:
    for key in "abc":
        cache.get(key, CPU, ones())
    cache.get("a", CPU, forbidden)
    cache.get("d", CPU, ones())
    for key in "bcd":
        cache.get(key, CPU, forbidden)
    built = []
    cache.get("a", CPU, lambda: built.append("a") or torch.ones(1))
    assert built == ["a"]


def test_entries_are_capped(cache) -> None:
    for key in range(20):
        cache.get(key, CPU, ones())
    info = cache.info()
    assert (info.entries, info.bytes, info.evictions) == (3, 3 * 1024, 17)


def test_bytes_are_capped(cache) -> None:
    cache.get("a", CPU, ones(5))
    cache.get("b", CPU, ones(5))
    cache.get("c", CPU, ones(1))
    info = cache.info()
    assert (info.entries, info.bytes, info.evictions) == (2, 6 * 1024, 1)
    cache.get("b", CPU, forbidden)


def test_value_above_the_byte_cap_is_returned_but_not_kept_and_evicts_nothing(cache) -> None:
    cache.get("a", CPU, ones())
    assert cache.get("big", CPU, ones(11)).numel() == 11 * KIB
    cache.get("a", CPU, forbidden)
    assert cache.info().entries == 1


def test_bytes_count_whole_storages_once() -> None:
    def views_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensor[:1], tensor[1:2]

    cache = FifoCache("test", 3, 10 * 1024, views_of)
    cache.get("a", CPU, ones())
    assert cache.info().bytes == 1024


def test_devices_have_entries_of_their_own(cache) -> None:
    on_cpu = cache.get("a", CPU, ones())
    on_xla = cache.get("a", torch.device("xla:0"), ones())
    assert on_xla is not on_cpu
    assert cache.get("a", torch.device("xla:1"), ones()) is not on_xla
    assert cache.get("a", torch.device("xla:0"), forbidden) is on_xla


def test_threads_that_ask_for_one_missing_key_build_it_once(cache) -> None:
    built, barrier = [], threading.Barrier(8)

    def build() -> torch.Tensor:
        built.append(1)
        time.sleep(0.05)
        return torch.ones(1)

    def ask(_: int) -> torch.Tensor:
        barrier.wait()
        return cache.get("a", CPU, build)

    values = in_threads(8, ask)
    assert len(built) == 1
    assert all(value is values[0] for value in values)
    assert (cache.info().hits, cache.info().misses) == (7, 1)


def test_threads_build_different_keys_at_the_same_time(cache) -> None:
    barrier = threading.Barrier(2)

    def build() -> torch.Tensor:
        barrier.wait(timeout=10)  # passes only while both builds are under way
        return torch.ones(1)

    in_threads(2, lambda i: cache.get(i, CPU, build))


def test_failed_build_reaches_its_caller_and_the_next_call_builds(cache) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.get("a", CPU, lambda: 1 / 0)
    assert cache.get("a", CPU, ones()).numel() == KIB
    assert cache.info().entries == 1


def test_threads_that_waited_for_a_failed_build_build_for_themselves(cache) -> None:
    attempts, waiting = [], threading.Event()

    def build() -> torch.Tensor:
        attempts.append(1)
        if len(attempts) == 1:
            waiting.wait(timeout=10)
            raise ZeroDivisionError
        return torch.ones(1)

    def ask(i: int) -> object:
        if i:
            while not attempts:
                time.sleep(0.001)
            if i == 3:
                time.sleep(0.05)
                waiting.set()
        try:
            return cache.get("a", CPU, build)
        except ZeroDivisionError as error:
            return error

    results = in_threads(4, ask)
    assert isinstance(results[0], ZeroDivisionError)
    assert all(value is results[1] for value in results[2:])
    assert len(attempts) == 2


def test_many_threads_on_a_full_cache_agree_with_the_keys(cache) -> None:
    def ask(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randint(0, 6, (200,), generator=generator).tolist()
        return all(cache.get(key, CPU, lambda key=key: torch.full((KIB,), float(key)))[0] == key for key in keys)

    assert all(in_threads(8, ask))
    info = cache.info()
    assert info.entries == 3
    assert info.bytes == 3 * 1024
    assert info.hits + info.misses == 1600
    assert info.misses - info.evictions == 3


def test_fake_tensors_are_neither_stored_nor_given_real_ones(cache) -> None:
    with FakeTensorMode():
        assert isinstance(cache.get("a", CPU, ones()), FakeTensor)
    assert cache.info().entries == 0
    assert type(cache.get("a", CPU, ones())) is torch.Tensor
    with FakeTensorMode():
        assert isinstance(cache.get("a", CPU, ones()), FakeTensor)


def test_tensors_made_in_a_dispatch_mode_are_not_stored(cache) -> None:
    with PassThrough():
        cache.get("a", CPU, ones())
    assert cache.info().entries == 0


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_tensors_made_in_a_function_transform_are_not_stored(cache, transform) -> None:
    transform(lambda x: x * cache.get("a", CPU, lambda: torch.ones(2)))(torch.ones(2))
    assert cache.info().entries == 0


def test_meta_tensors_are_not_stored(cache) -> None:
    meta = torch.device("meta")
    assert cache.get("a", meta, lambda: torch.ones(1, device=meta)).is_meta
    assert cache.info().entries == 0


def test_tensors_traced_by_compile_are_not_stored(cache) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + cache.get("a", CPU, ones())

    assert torch.equal(add(torch.zeros(KIB)), torch.ones(KIB))
    assert cache.info().entries == cache.info().misses == 0


def test_entry_built_first_in_inference_mode_serves_autograd_later(cache) -> None:
    with torch.inference_mode():
        value = cache.get("a", CPU, ones())
    assert not value.is_inference()
    x = torch.ones(KIB, requires_grad=True)
    (x * cache.get("a", CPU, forbidden)).sum().backward()
    assert torch.equal(x.grad, torch.ones(KIB))


def test_entry_built_first_in_a_default_device_context_is_on_the_asked_device(cache) -> None:
    with torch.device("meta"):
        assert cache.get("a", CPU, ones()).device == CPU


def test_entry_does_not_hold_a_graph(cache) -> None:
    weight = torch.ones(KIB, requires_grad=True)
    assert not cache.get("a", CPU, lambda: weight * 2).requires_grad


def write(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


def write_in_inference_mode(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(2)


def write_through_a_view(tensor: torch.Tensor) -> None:
    tensor[3:5].zero_()


@pytest.mark.parametrize("change", [write, write_in_inference_mode, write_through_a_view])
def test_entry_written_to_is_noticed_and_rebuilt_with_a_warning(cache, change) -> None:
    value = cache.get("a", CPU, ones())
    change(value)
    with pytest.warns(RuntimeWarning, match="test cache was written to in place"):
        repeated = cache.get("a", CPU, ones())
    assert repeated is not value
    assert torch.equal(repeated, torch.ones(KIB))
    assert cache.get("a", CPU, forbidden) is repeated
    info = cache.info()
    assert (info.rebuilds, info.entries, info.bytes, info.evictions) == (1, 1, 1024, 0)


def test_entry_written_to_is_rebuilt_also_where_warnings_are_errors(cache) -> None:
    cache.get("a", CPU, ones()).mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            cache.get("a", CPU, ones())
        assert torch.equal(cache.get("a", CPU, ones()), torch.ones(KIB))


def test_clear_drops_entries_and_counters(cache) -> None:
    cache.get("a", CPU, ones())
    cache.get("a", CPU, ones())
    cache.clear()
    info = cache.info()
    assert (info.hits, info.misses, info.entries, info.bytes) == (0, 0, 0, 0)
    cache.get("a", CPU, ones())
    assert cache.info().misses == 1


def test_build_under_way_while_the_cache_is_cleared_is_not_stored(cache) -> None:
    def build() -> torch.Tensor:
        cache.clear()
        return torch.ones(1)

    assert cache.get("a", CPU, build).item() == 1
    assert cache.info().entries == 0


def test_configure_evicts_the_oldest_at_once(cache) -> None:
    for key in "abc":
        cache.get(key, CPU, ones(2))
    cache.configure(max_entries=2)
    assert cache.info().entries == 2
    cache.configure(max_bytes=3 * 1024)
    assert (cache.info().entries, cache.info().bytes, cache.info().max_entries) == (1, 2048, 2)
    cache.get("c", CPU, forbidden)


@pytest.mark.parametrize("caps", [{"max_entries": 0}, {"max_bytes": 0}, {"max_entries": -1}])
def test_configure_refuses_caps_that_are_not_positive(cache, caps) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(caps))} must be at least 1"):
        cache.configure(**caps)
    assert (cache.info().max_entries, cache.info().max_bytes) == (3, 10 * 1024)


def test_build_may_ask_another_cache_and_other_keys(cache) -> None:
    second = FifoCache("other", 3, 1024, lambda tensor: (tensor,))

    def build() -> torch.Tensor:
        return cache.get("b", CPU, lambda: torch.ones(1)) + second.get("a", CPU, lambda: torch.ones(1))

    assert in_threads(1, lambda _: cache.get("a", CPU, build).item()) == [2]


def test_build_that_asks_for_its_own_key_is_refused_and_leaves_no_trace(cache) -> None:
    def build() -> torch.Tensor:
        return cache.get("a", CPU, build)

    with pytest.raises(RuntimeError, match="by that key's own build"):
        cache.get("a", CPU, build)
    assert cache.get("a", CPU, ones()).numel() == KIB


def test_build_during_cuda_graph_capture_is_refused_but_a_hit_is_not(cache, monkeypatch) -> None:
    device = torch.device("cuda:0")
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: torch.cpu.current_stream())
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)
    value = cache.get("a", device, ones())
    capturing = True
    assert cache.get("a", device, forbidden) is value
    with pytest.raises(RuntimeError, match="once before the capture"):
        cache.get("b", device, ones())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_waits_for_no_thread_of_its_parent(cache) -> None:
    entry = cache.get("kept", CPU, ones())
    building, release = threading.Event(), threading.Event()

    def build() -> torch.Tensor:
        building.set()
        release.wait(timeout=20)
        return torch.ones(1)

    thread = threading.Thread(target=cache.get, args=("a", CPU, build))
    thread.start()
    building.wait(timeout=10)
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        fresh = cache.get("a", CPU, lambda: entry)
        os._exit(0 if fresh is entry and cache.get("kept", CPU, forbidden) is entry else 1)
    release.set()
    thread.join(timeout=10)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cache.info().entries == 2


def test_finish_waits_for_the_current_stream_of_devices_that_have_streams(monkeypatch) -> None:
    waited = []

    def current_stream(device):
        return SimpleNamespace(synchronize=lambda: waited.append(device.type))

    monkeypatch.setattr(torch.accelerator, "current_stream", current_stream)
    for name in ("cpu", "cuda:1", "meta", "xpu"):
        finish(torch.device(name))
    assert waited == ["cuda", "xpu"]
