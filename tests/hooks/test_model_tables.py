"""The memo of tables that models build themselves: never stale, never shared, never a leak, no work on a hit."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import dit_rope
from dit_rope.hooks.adapter import ModelTables
from dit_rope.tables.caches import MODEL_TABLES
from known_classes import known, memoize
from zoo import EXAMPLES, Noise

FLUX = next(example for example in EXAMPLES if example.name == "flux")
HUNYUAN_VIDEO = next(example for example in EXAMPLES if example.name == "hunyuan-video")


pytestmark = pytest.mark.usefixtures("one_thread")


class Rope(torch.nn.Module):
    """Builds a table of positions times a frequency; counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = 2.0
        self.register_buffer("scale", torch.tensor([1.0, 3.0]))

    @property
    def built(self) -> int:
        """How often the module's own forward ran."""
        return BUILT.get(self, 0)

    def forward(self, ids: torch.Tensor, count: int | None = None) -> dict[str, torch.Tensor]:
        BUILT[self] = BUILT.get(self, 0) + 1
        return {"angles": ids.float()[:count, None] * self.scale * self.frequency}


BUILT: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
known(Rope)


def memoized(**declared: Any) -> Rope:
    """A rope module with a memo."""
    rope = Rope()
    memoize(rope, ModelTables("rope", "Rope", **declared), ("ids", "count"))
    return rope


def fresh(rope: Rope, *args: Any) -> dict[str, torch.Tensor]:
    """What an unpatched twin gives."""
    twin = Rope()
    twin.frequency, twin.scale = rope.frequency, rope.scale.clone()
    return twin(*args)


def assert_fresh(rope: Rope, *args: Any) -> None:
    assert torch.equal(rope(*args)["angles"], fresh(rope, *args)["angles"])


def test_equal_values_are_a_hit_whatever_tensor_holds_them() -> None:
    rope = memoized()
    for ids in (torch.arange(5), torch.arange(5), torch.arange(10)[:5], torch.arange(0, 10, 2).div(2).long()):
        rope(ids)
    assert rope.built == 1


def test_values_that_no_version_counts_are_seen() -> None:
    """Collectives, fused optimizers, and new tensors over memory that stays raise no version."""
    array = np.arange(5)
    rope, ids = memoized(), torch.from_numpy(array)
    for step in range(3):
        array += step
        assert_fresh(rope, ids)
        assert_fresh(rope, torch.from_numpy(array))
    rope.scale.data.mul_(2)
    assert_fresh(rope, ids)
    rope.scale.numpy()[:] = 7.0
    assert_fresh(rope, ids)
    rope.table = torch.rand(10_000)  # too large for its bytes to be a key
    first = rope(ids)["angles"]
    rope.table.numpy()[-1] = 2.0
    assert rope(ids)["angles"] is not first
    assert rope(ids)["angles"] is rope(ids)["angles"]


def test_tables_of_a_module_with_an_uncomparable_attribute_are_built_every_time() -> None:
    """An object that nobody can compare; and a method that somebody put on the object itself."""
    rope, ids = memoized(), torch.arange(5)
    rope.anything = object()
    rope(ids)
    rope(ids)
    assert rope.built == 2
    del rope.anything
    rope(ids)
    rope(ids)
    assert rope.built == 3


def test_code_that_is_replaced_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    rope, ids = memoized(), torch.arange(5)
    rope(ids)
    monkeypatch.setattr(Rope, "forward", lambda self, ids, count=None: {"angles": -ids})
    assert torch.equal(rope(ids)["angles"], -ids)
    monkeypatch.undo()
    assert_fresh(rope, ids)


def test_new_view_of_the_same_memory_is_a_hit() -> None:
    rope, ids = memoized(), torch.arange(10)
    for _ in range(3):
        rope(ids[2:7])
    assert rope.built == 1
    assert_fresh(rope, ids[3:8])
    assert_fresh(rope, ids[2:6])


@pytest.mark.filterwarnings("error")
def test_write_in_place_is_noticed_without_a_warning() -> None:
    rope, ids = memoized(), torch.arange(5)
    rope(ids)
    ids.add_(1)
    assert_fresh(rope, ids)
    ids[2:].mul_(2)  # through a view
    assert_fresh(rope, ids)


def test_new_tensors_in_memory_of_old_ones_are_told_apart() -> None:
    rope = memoized()
    for step in range(200):
        ids = torch.full((4096,), step)
        assert_fresh(rope, ids)
        del ids


def test_arguments_of_other_values_types_and_shapes_are_told_apart() -> None:
    rope, ids = memoized(), torch.arange(6)
    for count in (6, 4, None, 5):
        assert_fresh(rope, ids, count)
    for changed in (ids.view(2, 3).t().reshape(-1), ids.double(), ids.flip(0), ids[::2], ids.int()):
        assert_fresh(rope, changed)


def test_equal_numbers_of_two_types_are_told_apart() -> None:
    class Full(Rope):
        def forward(self, ids: torch.Tensor, count: Any = None) -> dict[str, torch.Tensor]:
            return {"angles": torch.full((3,), count)}

    rope = known(Full)()
    memoize(rope, ModelTables("rope", "Full"), ("ids", "count"))
    ids = torch.arange(3)
    assert [rope(ids, number)["angles"].dtype for number in (1, 1.0, True)] == [torch.int64, torch.float32, torch.bool]


def test_state_of_the_module_is_part_of_the_key() -> None:
    rope, ids = memoized(), torch.arange(5)
    rope(ids)
    rope.frequency = 3.0
    assert_fresh(rope, ids)
    rope.scale.mul_(2)
    assert_fresh(rope, ids)
    rope.scale = torch.tensor([5.0, 7.0])
    assert_fresh(rope, ids)
    rope.double()
    assert_fresh(rope, ids)


def test_autocast_and_default_dtype_are_part_of_the_key() -> None:
    class Matmul(Rope):
        def forward(self, ids: torch.Tensor, count: int | None = None) -> dict[str, torch.Tensor]:
            return {"angles": ids.float()[:, None] @ self.scale[None]}

    rope, ids = known(Matmul)(), torch.arange(300)
    memoize(rope, ModelTables("rope", "Matmul"), ("ids", "count"))
    plain = rope(ids)["angles"]
    with torch.autocast("cpu", torch.bfloat16):
        assert rope(ids)["angles"].dtype == torch.bfloat16
    assert rope(ids)["angles"] is not None
    assert torch.equal(rope(ids)["angles"], plain)


def test_containers_are_the_callers_own() -> None:
    rope, ids = memoized(), torch.arange(5)
    first = rope(ids)
    first["angles"] = first["angles"][-1:]
    assert rope(ids)["angles"].shape == (5, 2)
    assert rope.built == 1


def test_table_that_somebody_wrote_to_is_built_again() -> None:
    rope, ids = memoized(), torch.arange(5)
    rope(ids)["angles"].zero_()
    with pytest.warns(RuntimeWarning, match="model table cache was written to in place"):
        assert_fresh(rope, ids)


def test_tables_made_in_inference_mode_are_plain_and_serve_others() -> None:
    rope = memoized()
    with torch.inference_mode():
        ids = torch.arange(5)
        table = rope(ids)["angles"]
    assert not table.is_inference()
    assert rope(torch.arange(5))["angles"] is table
    assert rope.built == 1


def test_tables_that_a_module_kept_from_inference_mode_are_copied() -> None:
    """LongCat-Audio's are in a cache of its own, which inference tensors have no versions in."""

    class Keeps(Rope):
        def forward(self, ids: torch.Tensor, count: int | None = None) -> dict[str, torch.Tensor]:
            return {"angles": cached}

    known(Keeps)
    with torch.inference_mode():
        cached = torch.ones(3, 2)
    rope = Keeps()
    memoize(rope, ModelTables("rope", "Keeps"), ("ids", "count"))
    for _ in range(2):
        assert torch.equal(rope(torch.arange(3))["angles"], cached)


def test_tensor_of_a_subclass_without_versions_is_not_cached() -> None:
    class Subclass(torch.Tensor):
        pass

    rope = memoized()
    ids = torch.arange(5).as_subclass(Subclass)
    rope(ids)
    rope(ids)
    assert rope.built == 2


def test_table_of_a_parameter_is_not_cached_while_gradients_are_recorded() -> None:
    rope = memoized()
    ids = torch.nn.Parameter(torch.arange(4.0))
    for _ in range(2):
        rope(ids)["angles"].sum().backward()
    assert rope.built == 2
    with torch.no_grad():
        rope(ids)
        rope(ids)
    assert rope.built == 3
    del rope
    gc.collect()
    assert MODEL_TABLES.info().entries == 0  # they go with the module


def test_entries_name_shapes_where_nothing_else_counts() -> None:
    rope = memoized(keyed_by_shape=("ids",))
    rope(torch.zeros(5))
    rope(torch.ones(5))
    assert rope.built == 1
    rope(torch.ones(6))
    rope(torch.ones(5, dtype=torch.float64))
    assert rope.built == 3


def test_two_objects_never_share_an_entry_and_a_copy_is_another_object() -> None:
    first, second = memoized(), memoized()
    second.frequency = 5.0
    ids = torch.arange(5)
    for rope in (first, second, copy.deepcopy(second)):
        assert_fresh(rope, ids)


def test_memo_does_not_keep_a_module_alive() -> None:
    rope = memoized()
    rope(torch.arange(5))
    gone = weakref.ref(rope)
    del rope
    gc.collect()
    assert gone() is None


def test_cap_on_bytes_holds_for_what_keys_hold_too() -> None:
    rope = memoized()
    dit_rope.cache_configure(max_model_bytes=100_000)
    for step in range(20):
        rope(torch.full((1000,), step))
        assert dit_rope.cache_info().models.bytes <= 100_000
    assert dit_rope.cache_info().models.evictions > 0


def test_undo_drops_the_entries_of_the_model_and_no_others() -> None:
    first, second = HUNYUAN_VIDEO.build(), HUNYUAN_VIDEO.build()
    with torch.no_grad(), dit_rope.patch(first):
        with dit_rope.patch(second):
            HUNYUAN_VIDEO.forward(first)
            HUNYUAN_VIDEO.forward(second)
            assert dit_rope.cache_info().models.entries == 2
        assert dit_rope.cache_info().models.entries == 1


def run(model: torch.nn.Module, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        return FLUX.forward(model, **changes)[0]


def test_model_follows_ids_that_are_written_to_or_replaced_between_steps() -> None:
    """The steps of a pipeline, a second pipeline call, conditional and unconditional prompts in turn."""
    model = FLUX.build()
    inputs = FLUX.inputs(model, Noise(torch.float32))
    image, text = inputs["img_ids"], inputs["txt_ids"]
    shorter = {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :4], "txt_ids": text[:4]}
    steps: list[dict[str, Any]] = [
        {"img_ids": image, "txt_ids": text},
        {"img_ids": image, **shorter},
        {"img_ids": image, "txt_ids": text},
        {"img_ids": image.clone() + 1, "txt_ids": text},
        {"img_ids": image.flip(0), **shorter},
    ]
    expected = [run(model, **step) for step in steps]
    with dit_rope.patch(model, exact=True):
        for _ in range(2):
            assert all(torch.equal(run(model, **step), output) for step, output in zip(steps, expected, strict=True))
        for _ in range(3):
            image.add_(2)
            actual = run(model, img_ids=image, txt_ids=text)
            with torch.no_grad():
                twin = FLUX.build()
            assert torch.equal(actual, run(twin, img_ids=image, txt_ids=text))
