"""Names of an earlier version that still work, with a warning, and pickles that were made under them."""

from __future__ import annotations

import pickle

import pytest
import torch

import dit_rope
from dit_rope.tables import scaling_types


@pytest.mark.parametrize("name", ["AxisFrequencies", "ScalingType", "yarn", "riflex", "TYPES"])
def test_module_that_moved_gives_the_same_objects_and_warns(name: str) -> None:
    import dit_rope.scaling_types as old

    with pytest.warns(DeprecationWarning, match=f"dit_rope.tables.scaling_types.{name} now"):
        assert getattr(old, name) is getattr(scaling_types, name)
    with pytest.raises(AttributeError, match="never"):
        old.never  # noqa: B018


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
    again = pickle.loads(before)
    assert type(again) is dit_rope.RopeTable
    assert all(map(torch.equal, again.cos_sin(), table.cos_sin()))
