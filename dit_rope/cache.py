"""A capped first-in first-out cache of tensors that threads, devices and torch's modes can share safely."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .torch_state import capturing, finish, in_mode

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class CacheInfo:
    """Counters of one cache since it was made or last cleared.

    Attributes:
        hits: calls answered without a build, including those that waited for the build of another thread.
        misses: builds of an entry, including rebuilds. Builds that the cache must not keep are not counted.
        evictions: entries dropped to make room.
        rebuilds: entries dropped because their tensors had been written to.
        entries, bytes: entries in the cache now, and the bytes of their tensors.
        max_entries, max_bytes: the caps.
        captured_bytes: bytes kept for CUDA graphs that may read them, evicted or not. The caps do not count them.
    """

    hits: int
    misses: int
    evictions: int
    rebuilds: int
    entries: int
    bytes: int
    max_entries: int
    max_bytes: int
    captured_bytes: int = 0


class _Entry(Generic[Value]):
    """A value, the tensors it holds, and the version each had when it was built."""

    __slots__ = ("bytes", "value", "versions")

    def __init__(self, value: Value, tensors: Iterable[torch.Tensor]) -> None:
        self.value = value
        self.versions = tuple((tensor, tensor._version) for tensor in tensors)
        storages = {storage.data_ptr(): storage for storage in (t.untyped_storage() for t, _ in self.versions)}
        self.bytes = sum(storage.nbytes() for storage in storages.values())


class _Build(Generic[Value]):
    """A running build: its thread, and its value for the threads that wait for it."""

    __slots__ = ("done", "owner", "result")

    def __init__(self) -> None:
        self.owner = threading.get_ident()
        self.done = threading.Event()
        self.result: tuple[Value] | None = None


class FifoCache(Generic[Key, Value]):
    """Keeps the value that ``build`` returned for a key and a device. The oldest entry leaves first, hit or not.

    - Threads: if two threads ask for one missing key, one builds and the other waits. If that build raises, its caller
      sees the exception and each waiting thread builds for itself. A forked child keeps the entries, not the locks.
    - Modes: builds run without autograd, outside inference mode and outside every torch function mode (a default
      device is one), so an entry does not depend on the modes of the first caller. Under tracing, a dispatch mode or
      a function transform, and on the meta device, every call builds and nothing is kept.
    - Writes: an entry whose tensors were written to is dropped with a RuntimeWarning and built again. Writes that torch
      does not count (``.data``, numpy views) are not seen.
    - CUDA graphs: a graph reads the memory of an entry at every replay. So an entry that is handed out during a capture
      is kept until :meth:`clear`, evicted or not, and a miss raises, because the graph would own the built memory.

    Args:
        name: the name of this cache in warnings and errors.
        max_entries: the most entries, at least 1.
        max_bytes: the most bytes of tensor storage. A larger value is returned but not kept.
        tensors_of: the tensors of a value; their bytes count, and their version counters are checked at every hit.
        across_streams: whether calls on other streams may hit an entry. If so, a build on a GPU waits for its stream;
            a cache whose keys name the stream needs no wait.
        in_default_device: whether builds run under the default device of their caller, which keys must name then.

    Raises:
        ValueError: a cap is not positive.

    Example:
        >>> import torch
        >>> cache = FifoCache("square", max_entries=2, max_bytes=2**20, tensors_of=lambda tensor: (tensor,))
        >>> cpu = torch.device("cpu")
        >>> four = cache.get(2, cpu, lambda: torch.tensor(2.0) ** 2)
        >>> cache.get(2, cpu, lambda: torch.tensor(2.0) ** 2) is four
        True
        >>> cache.info().hits, cache.info().misses
        (1, 1)
    """

    def __init__(
        self,
        name: str,
        max_entries: int,
        max_bytes: int,
        tensors_of: Callable[[Value], Iterable[torch.Tensor]],
        across_streams: bool = True,
        in_default_device: bool = False,
    ) -> None:
        self.name = name
        self._in_default_device = in_default_device
        self._tensors_of = tensors_of
        self._across_streams = across_streams
        self._lock = threading.RLock()
        self._entries: dict[tuple[Key, torch.device], _Entry[Value]] = {}
        self._captured: dict[int, _Entry[Value]] = {}  # by identity: one key may have had several entries
        self._builds: dict[tuple[Key, torch.device], _Build[Value]] = {}
        self._zero_counters()
        self.configure(max_entries=max_entries, max_bytes=max_bytes)
        _ALL_CACHES.add(self)

    def get(self, key: Key, device: torch.device, build: Callable[[], Value]) -> Value:
        """The entry of ``key`` on ``device``: the same object at every call, built by ``build()`` if it is missing.

        Raises:
            RuntimeError: a build asks for its own key, or a CUDA graph is being captured and the entry is missing.
        """
        if in_mode():
            return build()
        slot = (key, device)
        # Without the lock, because threads that only read would queue for it. This is safe: an entry is complete before
        # it is in the dictionary, and an entry that is evicted at this moment is as valid as before.
        entry = self._entries.get(slot)
        if entry is not None:
            for tensor, version in entry.versions:
                if tensor._version != version:
                    break
            else:
                if device.type == "cuda":
                    self._hold_for_graph(slot, entry)
                next(self._hit_numbers)
                return entry.value
        return build() if device.type == "meta" else self._miss(slot, build)

    def _hold_for_graph(self, slot: tuple[Key, torch.device], entry: _Entry[Value]) -> None:
        """Keeps ``entry`` until the cache is cleared if a CUDA graph is being captured."""
        if capturing(slot[1]):
            with self._lock:
                self._captured[id(entry)] = entry

    def _miss(self, slot: tuple[Key, torch.device], build: Callable[[], Value]) -> Value:
        """Builds the entry, or waits for the thread that is building it."""
        attempt: _Build[Value] = _Build()
        try:
            while True:
                with self._lock:
                    entry = self._entries.get(slot)
                    written = entry is not None and any(tensor._version != v for tensor, v in entry.versions)
                    if entry is not None and not written:
                        self._hold_for_graph(slot, entry)
                        next(self._hit_numbers)
                        return entry.value
                    if written:
                        del self._entries[slot]
                        self._rebuilds += 1
                    running = self._builds.setdefault(slot, attempt)
                    if running is attempt:
                        self._misses += 1
                        break
                if running.owner == threading.get_ident():
                    raise RuntimeError(f"the {self.name} cache must not be asked for a key by that key's own build")
                running.done.wait()
                # A capture needs an entry, to keep it for the graph. A value too large for an entry is not enough: the
                # next round finds none and refuses to build.
                if running.result is not None and not capturing(slot[1]):
                    next(self._hit_numbers)
                    return running.result[0]
            return self._build_entry(slot, build, attempt, written)
        finally:
            try:
                self._end_build(slot, attempt)
            finally:  # again, because a KeyboardInterrupt may cut the first call short; others would wait forever
                self._end_build(slot, attempt)

    def _end_build(self, slot: tuple[Key, torch.device], attempt: _Build[Value]) -> None:
        """Ends a build and wakes the threads that wait for it; a second call does nothing more."""
        with self._lock:
            if self._builds.get(slot) is attempt:
                del self._builds[slot]
        attempt.done.set()

    def _build_entry(
        self, slot: tuple[Key, torch.device], build: Callable[[], Value], attempt: _Build[Value], written: bool
    ) -> Value:
        """Runs ``build`` without the lock, and stores its value unless the cache was cleared since."""
        device = slot[1]
        if written:
            warnings.warn(
                f"an entry of the {self.name} cache was written to in place and is built again; "
                "clone cached tables before changing them",
                RuntimeWarning,
                stacklevel=5,
            )
        if capturing(device):
            raise RuntimeError(
                f"the {self.name} cache must not build on {device} while a CUDA graph is being captured: its "
                "memory would belong to the graph; ask for the table once before the capture"
            )
        functions = contextlib.nullcontext() if self._in_default_device else torch._C.DisableTorchFunction()
        with torch.inference_mode(False), torch.no_grad(), functions:
            value = build()
        if self._across_streams:
            finish(device)
        entry = _Entry(value, self._tensors_of(value))
        with self._lock:
            if self._builds.get(slot) is attempt:
                self._store(slot, entry)
        attempt.result = (value,)
        return value

    def _store(self, slot: tuple[Key, torch.device], entry: _Entry[Value]) -> None:
        if entry.bytes > self._max_bytes:
            return
        self._make_room(self._max_entries - 1, self._max_bytes - entry.bytes)
        self._entries[slot] = entry

    def _held_bytes(self) -> int:
        """A sum at each call: a running count would stay wrong after an interrupt between an entry and its bytes."""
        return sum(entry.bytes for entry in self._entries.values())

    def _make_room(self, entries: int, size: int) -> None:
        excess = self._held_bytes() - size
        while len(self._entries) > entries or excess > 0:
            excess -= self._entries.pop(next(iter(self._entries))).bytes
            self._evictions += 1

    def configure(self, *, max_entries: int | None = None, max_bytes: int | None = None) -> None:
        """Changes the caps that are not None; evicts entries that no longer fit, the oldest first.

        Raises:
            ValueError: a cap is not positive.
        """
        for name, value in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        with self._lock:
            if max_entries is not None:
                self._max_entries = max_entries
            if max_bytes is not None:
                self._max_bytes = max_bytes
            self._make_room(self._max_entries, self._max_bytes)

    def discard(self, unwanted: Callable[[Key], bool]) -> None:
        """Drops the entries whose key is ``unwanted``. They do not count as evictions."""
        with self._lock:
            for slot in [slot for slot in self._entries if unwanted(slot[0])]:
                del self._entries[slot]

    def clear(self) -> None:
        """Drops every entry, also those kept for CUDA graphs, and zeroes the counters. Running builds are not kept."""
        with self._lock:
            self._entries = {}
            self._captured = {}
            self._builds = {}
            self._zero_counters()

    def info(self) -> CacheInfo:
        """The counters and caps at this moment."""
        with self._lock:
            hits = next(self._hit_numbers) - self._hits_looked_up
            self._hits_looked_up += 1
            return CacheInfo(
                hits,
                self._misses,
                self._evictions,
                self._rebuilds,
                len(self._entries),
                self._held_bytes(),
                self._max_entries,
                self._max_bytes,
                sum(entry.bytes for entry in self._captured.values()),
            )

    def _zero_counters(self) -> None:
        self._misses = self._evictions = self._rebuilds = 0
        # Counts hits without the lock: taking the next number is one atomic step. Reading the count takes a number too.
        self._hit_numbers = itertools.count()
        self._hits_looked_up = 0

    def _before_fork(self) -> None:
        self._lock.acquire()

    def _after_fork_in_parent(self) -> None:
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._builds = {}


_ALL_CACHES: weakref.WeakSet[FifoCache[Any, Any]] = weakref.WeakSet()


def _before_fork() -> None:
    for cache in _ALL_CACHES:
        cache._before_fork()


def _after_fork_in_parent() -> None:
    for cache in _ALL_CACHES:
        cache._after_fork_in_parent()


def _after_fork_in_child() -> None:
    for cache in _ALL_CACHES:
        cache._after_fork_in_child()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    # A fork while another thread stores an entry would leave half of it in the child. So the locks are held over it.
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
