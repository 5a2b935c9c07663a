"""What decides the tables of a model is their key: what is read beside the arguments, and what is on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.hooks import table_keys
from dit_rope.hooks.adapter import ModelTables
from dit_rope.hooks.class_override import Installed, PatchState
from dit_rope.hooks.rope_modules import MemoizedMethod, TableSettings
from known_classes import known, memoize
from tolerance import all_equal

pytestmark = pytest.mark.usefixtures("one_thread")


class Built(torch.nn.Module):
    """A model that builds its tables in a method of its own, of its configuration and a number."""

    def __init__(self) -> None:
        super().__init__()
        self._internal_dict = {"theta": 2.0}
        self.unlike = object()
        self.frequency = 2.0

    def tables(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float()[:, None] * self.frequency * self._internal_dict["theta"]


def test_configuration_and_attributes_of_a_model_are_part_of_the_key_of_its_method() -> None:
    model, ids = known(Built, "tables")(), torch.arange(5)
    settings = TableSettings(ModelTables("", "Built", "tables"), ("ids",))
    memo = MemoizedMethod(model, "tables", Installed(settings, PatchState()))

    def check() -> None:
        assert torch.equal(memo(ids), model.tables(ids))
        assert memo(ids) is memo(ids)

    check()
    model._internal_dict = {"theta": 3.0}
    check()
    model.frequency = 5.0
    check()


def test_default_device_that_torch_cannot_name_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch 2.9: ``set_default_device(None)`` leaves an object without a device."""
    settings = TableSettings(ModelTables("", "Built", "tables", to_device=True), ("ids",))
    model = known(Built, "tables")()
    memo = MemoizedMethod(model, "tables", Installed(settings, PatchState()))
    expected = memo(torch.arange(5))
    monkeypatch.setattr(torch, "get_default_device", lambda: None.device)
    assert memo(torch.arange(5)) is expected


def test_unhashable_configuration_is_read_in_every_call() -> None:
    model, ids = known(Built, "tables")(), torch.arange(5)
    settings = TableSettings(ModelTables("", "Built", "tables"), ("ids",))
    memo = MemoizedMethod(model, "tables", Installed(settings, PatchState()))
    for theta in (2.0, 3.0, 5.0):
        model._internal_dict = {"theta": theta, "scheduler": object()}
        assert torch.equal(memo(ids), model.tables(ids))
    assert dit_rope.cache_info().models.entries == 0


def test_arguments_of_the_same_numbers_in_other_shapes_are_told_apart() -> None:
    class Shaped(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids.float().cos()

    rope, ids = known(Shaped)(), torch.arange(6)
    memoize(rope, ModelTables("rope", "Shaped"), ("ids",))
    shapes = [(6,), (2, 3), (3, 2), (1, 6)]
    assert [tuple(rope(ids.view(shape)).shape) for shape in shapes] == shapes


def test_tables_that_are_moved_are_not_kept_where_the_default_device_decides_them() -> None:
    class Ones(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.ones(3)

    rope, ids = known(Ones)(), torch.arange(3)
    memoize(rope, ModelTables("rope", "Ones", to_device=True), ("ids",))
    for _ in range(2):
        with torch.device("meta"):
            assert rope(ids).device.type == "meta"
        assert rope(ids).device.type == "cpu"


def test_tables_are_built_on_the_default_device_of_the_call() -> None:
    class Ones(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.ones(3) * 2

    rope, ids = known(Ones)(), torch.arange(3)
    memoize(rope, ModelTables("rope", "Ones"), ("ids",))
    for _ in range(2):
        with torch.device("meta"):
            assert rope(ids).device.type == "meta"
        assert rope(ids).device.type == "cpu"


class HalvedCosines(torch.overrides.TorchFunctionMode):
    """Changes what a function of torch computes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result / 2 if func is torch.Tensor.cos else result


def test_torch_function_mode_has_its_effect_and_leaves_none() -> None:
    class Cosines(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids.float().cos()

    rope, ids = known(Cosines)(), torch.arange(3)
    memoize(rope, ModelTables("rope", "Cosines"), ("ids",))
    expected = ids.float().cos()
    for _ in range(2):
        with HalvedCosines():
            assert torch.equal(rope(ids), expected / 2)
        assert torch.equal(rope(ids), expected)


def test_what_the_method_sets_is_set_by_a_hit_too_and_read_by_the_next_call() -> None:
    """As in rope modules that keep frequencies of their first call, whatever becomes of the numbers they came from."""

    class Lazy(torch.nn.Module):
        theta, cached = 2.0, None

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if self.cached is None:
                self.cached = torch.tensor(self.theta)
            return ids * self.cached

    def steps(rope: Any) -> list[torch.Tensor]:
        results = []
        for theta, forget, count in (
            (2, False, 3),
            (2, False, 3),
            (5, False, 3),
            (5, True, 3),
            (5, False, 4),
            (2, True, 3),
        ):
            rope.theta = float(theta)
            if forget:
                rope.cached = None
            results += [rope(torch.arange(count)), rope.cached]
        return results

    plain, rope = known(Lazy)(), known(Lazy)()
    memoize(rope, ModelTables("rope", "Lazy", sets=("cached",)), ("ids",))
    for _ in range(2):
        assert all_equal(steps(rope), steps(plain))
    rope.theta, rope.cached = 2.0, None
    misses = dit_rope.cache_info().models.misses
    for _ in range(3):
        rope(torch.arange(3))
    assert dit_rope.cache_info().models.misses == misses


def test_building_leaves_an_object_whose_value_stays() -> None:
    """A hit leaves it too, so that other code may hold it."""

    class Renewing(torch.nn.Module):
        cached = None

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            self.cached = torch.tensor(2.0)
            return ids * self.cached

    rope = known(Renewing)()
    memoize(rope, ModelTables("rope", "Renewing", sets=("cached",)), ("ids",))
    rope(torch.arange(3))
    cached = rope.cached
    for count in (4, 3, 4):
        rope(torch.arange(count))
        assert rope.cached is cached


def test_buffer_on_a_device_is_known_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its memory and the writes to it, without a look at what it holds; the entry keeps it."""
    buffer, copy = torch.arange(6.0), torch.arange(6.0)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: torch.device("cuda", 0)), raising=False)
    held: list[torch.Tensor] = []
    key = table_keys._by_value_or_as_held(held, buffer)
    assert table_keys._by_value_or_as_held(held, buffer) == key
    assert table_keys._by_value_or_as_held(held, copy) != key
    assert [tensor.data_ptr() for tensor in held] == [tensor.data_ptr() for tensor in (buffer, buffer, copy)]
    buffer.mul_(2)
    written = table_keys._by_value_or_as_held(held, buffer)
    assert written != key
    buffer.data = buffer.clone()  # as offloading does, which counts no write
    assert table_keys._by_value_or_as_held(held, buffer) != written
    for unknown in (buffer.clone().requires_grad_(), torch.nn.Parameter(buffer)):
        with pytest.raises(table_keys.Unkeyed):
            table_keys._by_value_or_as_held(held, unknown)
