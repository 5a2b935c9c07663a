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
        hits: calls answered without a build, those that waited for another thread's build included.
        misses: builds of an entry, rebuilds included. Builds that the cache must not keep are not counted.
        evictions: entries dropped to make room.
        rebuilds: entries dropped because somebody had written to their tensors.
        entries, bytes: what is held now.
        max_entries, max_bytes: the caps.
        captured_bytes: held for CUDA graphs that may read them, in entries or not; no cap counts them.
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


class _Flight(Generic[Value]):
    """One build under way: its thread, and its value for whoever waits."""

    __slots__ = ("done", "owner", "result")

    def __init__(self) -> None:
        self.owner = threading.get_ident()
        self.done = threading.Event()
        self.result: tuple[Value] | None = None


class FifoCache(Generic[Key, Value]):
    """Keeps what ``build`` returned per key and device, the oldest entry leaving first; a hit protects nothing.

    Two threads asking for one missing key build it once; when that build raises, its caller sees the exception and
    each waiting thread builds for itself. Builds run without autograd, outside inference mode and outside every
    torch function mode (a default device is one), so a first call from such a place leaves no trace in the entry.
    Under tracing, dispatch modes and function transforms, and on the meta device, nothing is looked up or kept.
    An entry whose tensors were written to is dropped with a RuntimeWarning and built again; writes that torch does
    not count (``.data``, numpy views) go unseen. Fork-safe: a child keeps the entries and none of the locks.
    An entry handed out while a CUDA graph is captured is held until :meth:`clear`, evicted or not, because the graph
    reads its memory at every replay; a miss is refused then, because the graph would own what is built.

    Args:
        name: what warnings and errors call this cache.
        max_entries: entries held at most, at least 1.
        max_bytes: bytes of tensor storage held at most; a larger value is returned but not kept.
        tensors_of: the tensors a value holds, whose bytes count and whose mutation is watched.
        across_streams: an entry may be hit from other streams than built it, so that a build on a GPU is waited for;
            where keys name their stream, nobody has to.
        in_default_device: builds run in the default device of their caller, which keys have to name.

    Raises:
        ValueError: for caps that are not positive.
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
        self._flights: dict[tuple[Key, torch.device], _Flight[Value]] = {}
        self._zero_counters()
        self.configure(max_entries=max_entries, max_bytes=max_bytes)
        _ALL_CACHES.add(self)

    def get(self, key: Key, device: torch.device, build: Callable[[], Value]) -> Value:
        """The entry of ``key`` on ``device``, the same object at every call; ``build()`` makes a missing one.

        Raises:
            RuntimeError: when a build asks for its own key, or would run while a CUDA graph is being captured.
        """
        if in_mode():
            return build()
        slot = (key, device)
        # Without the lock, for which threads that only read would queue: an entry is whole before it is in the
        # dictionary, and one that leaves it at this moment is as good as one that left a moment later.
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
        mine: _Flight[Value] = _Flight()
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
                    flight = self._flights.setdefault(slot, mine)
                    if flight is mine:
                        self._misses += 1
                        break
                if flight.owner == threading.get_ident():
                    raise RuntimeError(f"the {self.name} cache must not be asked for a key by that key's own build")
                flight.done.wait()
                # A graph needs the entry: if it was too large to be kept, the build here is refused.
                if flight.result is not None and not capturing(slot[1]):
                    next(self._hit_numbers)
                    return flight.result[0]
            return self._build(slot, build, mine, written)
        finally:
            try:
                self._land(slot, mine)
            finally:  # once more, because a KeyboardInterrupt may have come in between; others would wait forever
                self._land(slot, mine)

    def _land(self, slot: tuple[Key, torch.device], flight: _Flight[Value]) -> None:
        """Ends a flight and wakes whoever waits for it; does nothing more a second time."""
        with self._lock:
            if self._flights.get(slot) is flight:
                del self._flights[slot]
        flight.done.set()

    def _build(
        self, slot: tuple[Key, torch.device], build: Callable[[], Value], flight: _Flight[Value], written: bool
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
            if self._flights.get(slot) is flight:
                self._store(slot, entry)
        flight.result = (value,)
        return value

    def _store(self, slot: tuple[Key, torch.device], entry: _Entry[Value]) -> None:
        if entry.bytes > self._max_bytes:
            return
        self._make_room(self._max_entries - 1, self._max_bytes - entry.bytes)
        self._entries[slot] = entry

    def _held_bytes(self) -> int:
        """Summed up anew: an interrupt between an entry and a running count of bytes would part them for good."""
        return sum(entry.bytes for entry in self._entries.values())

    def _make_room(self, entries: int, size: int) -> None:
        excess = self._held_bytes() - size
        while len(self._entries) > entries or excess > 0:
            excess -= self._entries.pop(next(iter(self._entries))).bytes
            self._evictions += 1

    def configure(self, *, max_entries: int | None = None, max_bytes: int | None = None) -> None:
        """Changes the caps that are given, evicting the oldest entries at once where they no longer fit.

        Raises:
            ValueError: for caps that are not positive.
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
        """Drops the entries whose key is ``unwanted``, which are no evictions."""
        with self._lock:
            for slot in [slot for slot in self._entries if unwanted(slot[0])]:
                del self._entries[slot]

    def clear(self) -> None:
        """Drops every entry, those held for CUDA graphs too, and zeroes the counters; a build under way is not kept."""
        with self._lock:
            self._entries = {}
            self._captured = {}
            self._flights = {}
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
        # Counts hits: taking its next number is one step, between which no other thread can come. Looking takes one.
        self._hit_numbers = itertools.count()
        self._hits_looked_up = 0

    def _before_fork(self) -> None:
        self._lock.acquire()

    def _after_fork_in_parent(self) -> None:
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._flights = {}


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
    # The locks are held over the fork, so that no entry is half stored in the child.
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
