"""Names of an earlier version that still work, with a warning, and pickles that were made under them."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
import torch

import dit_rope
from dit_rope import deprecated
from tolerance import all_equal

PUBLIC = {
    "eviction": "EvictionPlan",
    "rolling_cache": "Window",
    "scaling_types": "riflex",
    "shifting": "ShiftTable",
    "table_caches": "TableCacheInfo",
}


@pytest.mark.parametrize(("path", "name"), PUBLIC.items())
def test_module_that_moved_gives_the_same_objects_and_warns(path: str, name: str) -> None:
    old = importlib.import_module(f"dit_rope.{path}")
    new = deprecated.MOVED[path]
    with pytest.warns(DeprecationWarning, match=f"dit_rope.{path}.{name} is {new.__name__}.{name} now"):
        assert getattr(old, name) is getattr(new, name)
    assert getattr(dit_rope, path) is old
    with pytest.raises(AttributeError, match="never"):
        old.never  # noqa: B018


def test_module_that_moved_lets_itself_be_listed() -> None:
    """As ``inspect`` does with every module of a process, without a warning."""
    assert [name for name in PUBLIC if hasattr(sys.modules[f"dit_rope.{name}"], "__file__")] == []


def test_packages_have_the_public_names_of_the_modules_they_were() -> None:
    assert dit_rope.tables.RopeTable is dit_rope.RopeTable
    assert dit_rope.tables.TableCacheInfo is type(dit_rope.cache_info())
    assert dit_rope.rotation.rotate_qk is dit_rope.rotate_qk
    assert dit_rope.streaming.RopeStream is dit_rope.RopeStream
    assert dit_rope.streaming.Chunk.__name__ == "Chunk"


def test_pickle_of_a_table_from_before_the_move_is_read() -> None:
    """It names ``dit_rope.tables`` and ``dit_rope.spec`` alone."""
    table = dit_rope.rope_table(dit_rope.RopeSpec((8, 4, 4)), dit_rope.Grid(2, 3, 4))
    before = pickle.dumps(table, protocol=0).replace(b"dit_rope.tables.table\n", b"dit_rope.tables\n")
    loaded = pickle.loads(before)
    assert type(loaded) is dit_rope.RopeTable
    assert all_equal(loaded.cos_sin(), table.cos_sin())


def test_pickle_of_a_shift_table_from_before_the_move_is_read() -> None:
    table = dit_rope.ShiftTable(dit_rope.RopeSpec((8, 4, 4)), step=2)
    before = pickle.dumps(table, protocol=0).replace(b"dit_rope.streaming.shift\n", b"dit_rope.shifting\n")
    with pytest.warns(DeprecationWarning, match=r"dit_rope\.shifting\.ShiftTable is"):
        loaded = pickle.loads(before)
    assert torch.equal(loaded.rows, table.rows)


@pytest.mark.filterwarnings("ignore:rotary_dim goes in 0.3:DeprecationWarning")
@pytest.mark.parametrize(
    ("head_dim", "factor", "expected"),
    [(128, 0.5, 64), (64, 0.25, 16), (80, 0.4, 32), (10, 0.5, 4), (64, 0.01, 2), (64, 0.0, 64), (64, 1.5, 64)],
)
def test_rotary_dim_is_a_share_of_the_head_clamped_and_even(head_dim, factor, expected) -> None:
    assert dit_rope.rotary_dim(head_dim, factor) == expected


@pytest.mark.filterwarnings("ignore:rotary_dim goes in 0.3:DeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 0.5), ValueError, "head_dim must be at least 2, got 1"),
        ((64.0, 0.5), TypeError, "head_dim must be an int, got 64.0"),
        ((True, 0.5), TypeError, "head_dim must be an int, got True"),
        ((64, float("nan")), ValueError, "partial_rotary_factor must be finite, got nan"),
    ],
)
def test_rotary_dim_refuses(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        dit_rope.rotary_dim(*arguments)


def test_rotary_dim_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="rotary_dim goes in 0.3"):
        dit_rope.rotary_dim(64)


def test_angles_of_cache_info_is_the_old_name_of_expanded() -> None:
    info = dit_rope.cache_info()
    with pytest.warns(DeprecationWarning, match=r"cache_info\(\)\.angles is cache_info\(\)\.expanded now"):
        assert info.angles is info.expanded
