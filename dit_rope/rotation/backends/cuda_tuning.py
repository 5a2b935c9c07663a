"""Choices of the CUDA kernel that change its speed and not its result, and the fastest ones where it was measured.

``cuda_tuning.json`` holds the choices by device and shape. ``scripts/gpu_checks/write_cuda_tuning.py`` writes it from
what ``scripts/gpu_checks/sweep.py`` has measured; choices that it does not name have the defaults of :class:`Tuning`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

LOADS = ("evict_first", "cached", "no_allocate", "no_allocate_evict_first")
STORES = ("write_back", "streaming", "past_level_one")

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Tuning:
    """One value for every choice. A plan ignores the choices that its call cannot use.

    Attributes:
        thread_chunks: chunks of 16 bytes that a thread holds: as many loads are under way before its first store.
        min_threads: a block is as small as one token needs, but no smaller than this.
        min_blocks: blocks that an SM must hold at once, for which the compiler saves registers; 0 leaves it free. With
            ``stages``, as many blocks are launched for each SM.
        late_weights: for a norm across heads: each head's weights are read just before it is written, not held from
            the start.
        split: a block handles queries or keys, not both.
        loads: cache policy of reads of queries and keys, one of :data:`LOADS`.
        stores: cache policy of writes, one of :data:`STORES`.
        stages: for a norm across heads: blocks are persistent, and bulk copies prefetch this many tokens into shared
            memory; 0 launches a block for every token. Needs compute capability 9.0.
    """

    thread_chunks: int = 4
    min_threads: int = 128
    min_blocks: int = 0
    late_weights: bool = False
    split: bool = False
    loads: str = LOADS[0]
    stores: str = STORES[0]
    stages: int = 0


DEFAULT = Tuning()


@dataclass(frozen=True)
class Tuned:
    """The key of measured choices: a device by its name, an operation, heads of each tensor, and their channels.

    ``operation`` is ``"rotate"``, ``"rotate in place"``, ``"norm per head"`` or ``"norm across heads"``; ``itemsize``
    the bytes of a channel.
    """

    device: str
    operation: str
    heads: tuple[int, ...]
    head_dim: int
    itemsize: int


def tuning_for(tuned: Tuned) -> Tuning:
    """The fastest choices measured there, or the defaults without a measurement."""
    return _measured().get(tuned, DEFAULT)


@functools.cache
def device_name(device: torch.device) -> str:
    """The name of a CUDA device, such as ``"NVIDIA H200"``; of any other device its type."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


@functools.cache
def _measured() -> dict[Tuned, Tuning]:
    return read(json.loads(FILE.read_text(encoding="utf-8")))


def read(entries: list[dict[str, Any]]) -> dict[Tuned, Tuning]:
    """The table that ``cuda_tuning.json`` holds, one entry for each :class:`Tuned` with the choices that differ.

    Raises:
        ValueError: an entry has an unknown member or choice, or stands twice.
    """
    table: dict[Tuned, Tuning] = {}
    names = {field.name for field in fields(Tuned)}
    for entry in entries:
        where = {name: value for name, value in entry.items() if name in names}
        try:
            tuned = Tuned(**{**where, "heads": tuple(where["heads"])})
            tuning = Tuning(**{name: value for name, value in entry.items() if name not in names})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{FILE.name} must name the members of Tuned and Tuning, got {entry}: {error}") from error
        if tuning.loads not in LOADS or tuning.stores not in STORES or tuned in table:
            raise ValueError(f"{FILE.name} must hold each shape once with known choices, got {entry}")
        table[tuned] = tuning
    return table
