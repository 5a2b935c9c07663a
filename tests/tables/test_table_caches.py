"""Every cache of the package is cleared by ``cache_clear`` and shown by ``cache_info``, those made in future too."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import dit_rope
from dit_rope import Grid, RopeSpec, Scaling, cache_clear, cache_configure, cache_info, rope_table, rotate, shift_keys
from dit_rope.cache import FifoCache
from dit_rope.compat import flashinfer

SOURCES = sorted(Path(dit_rope.__file__).parent.rglob("*.py"))


def use_everything() -> None:
    spec = RopeSpec((8, 4, 4), scaling=Scaling.of("linear", factor=3.0))
    table = rope_table(spec, Grid(2, 3, 4))
    rotate(torch.randn(1, 24, 2, 16), table)
    table.cos_sin()
    q = torch.randn(3, 2, 16)
    flashinfer.apply_rope_pos_ids(q, q, torch.tensor([0, 10_000, -5]))  # angles on the device
    shift_keys(torch.randn(2, 4, 2, 16), spec, delta_frames=70_000)


def caches() -> dict[str, FifoCache]:
    """Every cache that a module of the package has, by module and name."""
    counters = {}
    for path in SOURCES:
        if "FifoCache(" not in path.read_text() or path.name == "cache.py":
            continue
        name = ".".join(path.relative_to(Path(dit_rope.__file__).parent.parent).with_suffix("").parts)
        for attribute, value in vars(importlib.import_module(name)).items():
            if isinstance(value, FifoCache):
                counters[f"{name}.{attribute}"] = value
    return counters


def test_clear_leaves_no_entry_and_no_byte_in_any_cache() -> None:
    use_everything()
    cache_clear()
    for name, cache in caches().items():
        info = cache.info()
        assert (info.entries, info.bytes, info.captured_bytes, info.hits, info.misses) == (0, 0, 0, 0, 0), name


def test_info_shows_every_entry_of_every_cache() -> None:
    cache_clear()
    use_everything()
    shown = [getattr(cache_info(), field.name) for field in dataclasses.fields(cache_info())]
    every = {id(cache): cache.info() for cache in caches().values()}
    assert len(shown) == len(every)
    assert sum(info.bytes for info in shown) == sum(info.bytes for info in every.values()) > 0
    for name in ("tables", "axes", "expanded", "frequencies", "shifts"):
        assert getattr(cache_info(), name).entries > 0, name
    assert cache_info().frequencies.bytes > 0
    cache_clear()


def test_no_function_remembers_tensors_on_its_own() -> None:
    """``lru_cache`` keeps what nobody counts and nobody can clear; it may keep plans, specs, launches and names."""
    allowed = {"cuda_kernels.py", "cuda_plan.py", "cuda_tuning.py", "triton_kernels.py", "fastvideo.py"}
    allowed |= {"known_code.py"}
    users = {path.name for path in SOURCES if re.search(r"^@functools\.(lru_)?cache\b", path.read_text(), re.MULTILINE)}
    assert users == allowed


def test_every_cache_is_made_where_all_are_listed() -> None:
    assert [path.name for path in SOURCES if re.search(r"^\w.* = FifoCache\(", path.read_text(), re.MULTILINE)] == [
        "caches.py"
    ]


def test_every_module_of_the_package_is_looked_at() -> None:
    names = {module.name for module in pkgutil.walk_packages(dit_rope.__path__, "dit_rope.")}
    assert len(SOURCES) >= len(names)
    assert {name.rpartition(".")[2] for name in caches()} >= {"TABLES", "AXES", "EXPANDED", "FREQUENCIES", "SHIFTS"}


def test_caps_may_be_integers_of_numpy() -> None:
    cache_configure(max_entries=np.int64(3), max_bytes=np.int64(2**20))
    assert (cache_info().tables.max_entries, cache_info().tables.max_bytes) == (3, 2**20)
    with pytest.raises(TypeError, match="max_entries must be an int, got "):
        cache_configure(max_entries=np.bool_(True))
