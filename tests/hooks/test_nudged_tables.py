"""Tables that another device made, whose cosines and sines differ by an ulp here and there: they are the model's."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.adapters import adapter_of
from dit_rope.hooks import exact_bits
from dit_rope.hooks.formats import AXES
from dit_rope.hooks.packed_tables import Align, PackedTable, axis_rows, axis_tables_of, pack
from dit_rope.rotation import ops
from dit_rope.spec import Pairing
from tolerance import all_equal
from twins import BEFORE_AND_AFTER, attentions, check, run
from zoo import named, wan

CPU = torch.device("cpu")
WHEN = pytest.mark.parametrize("when", BEFORE_AND_AFTER)
MODE = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
Change = Callable[[torch.Tensor], torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def one_ulp_up(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def some_ulps(x: torch.Tensor) -> torch.Tensor:
    """A third of the entries, one up, two or three down."""
    number = torch.arange(x.numel()).view(x.shape)
    up = torch.where(number % 3 == 0, one_ulp_up(x), x)
    return torch.where(number % 6 == 0, -one_ulp_up(one_ulp_up(-x)), up)


def one_entry(x: torch.Tensor) -> torch.Tensor:
    """The cosine or sine of the second frame, row or column, at one channel that is read."""
    changed = x.clone()
    changed[1, -2:] = one_ulp_up(x)[1, -2:]
    return changed


def by_16_bits(x: torch.Tensor) -> torch.Tensor:
    """A model that was cast and cast back."""
    return x.bfloat16().float()


def nudge(rope: Any, change: Change) -> None:
    """Changes every table, or what tables are made of, that a rope module holds."""
    held = {**rope._buffers, **vars(rope)}
    for buffer in [x for x in held.values() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]:
        buffer.copy_(change(buffer))
    for numbers in [x for x in held.values() if isinstance(x, torch.Tensor) and x.dtype.is_complex]:
        parts = torch.view_as_real(numbers)
        parts.copy_(change(parts))


def nudged(name: str, change: Change, when: str, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense tables of a patched model of the Wan family that was changed before or after the patch."""
    model = wan.build(name)
    latent = torch.empty(1, 0, frames, 8, 12)
    if when == "before":
        nudge(model.rope, change)
    with dit_rope.patch(model) as handle:
        if when == "after":
            model.rope(latent)
            nudge(model.rope, change)
        cos, sin = model.rope(latent)
        assert handle.report().splitlines()[1].endswith("kernels read a small array per axis")
    assert all_equal((cos, sin), model.rope(latent))
    return cos, sin


@WHEN
@pytest.mark.parametrize("change", [one_entry, one_ulp_up, some_ulps, by_16_bits, torch.neg, torch.zeros_like])
@pytest.mark.parametrize(
    ("name", "frames"),
    [("wan", 3), ("wan-uneven-axes", 3), ("vace", 3), ("animate", 3), ("chronoedit", 2), ("skyreels-v2", 2)],
)
def test_axis_tables_are_of_the_models_own_values(name: str, frames: int, change: Change, when: str) -> None:
    pair = nudged(name, change, when, frames)
    table = axis_tables_of(pair)
    assert table is not None
    assert table.rows.shape[1] == frames + 4 + 6
    (by_token,) = AXES.tables(tuple(x.clone() for x in pair), CPU)
    for exact in (True, False):
        assert torch.equal(rotated(table, exact), rotated(by_token, exact))


def rotated(table: PackedTable, exact: bool) -> torch.Tensor:
    x = torch.randn(1, table.tokens, 2, table.head_dim, generator=torch.Generator().manual_seed(3))
    return ops.rotate([x], table.args(table.tokens, Align.START, exact))[0]


@MODE
@WHEN
@pytest.mark.parametrize("name", ["wan", "sana-video", "cosmos3", "helios-plain", "stable-audio-3", "qwen-image"])
def test_model_of_nudged_tables_gives_what_it_gives_unpatched(name: str, when: str, exact: bool) -> None:
    def act(model: Any) -> None:
        adapter = adapter_of(model)
        assert adapter is not None
        for tables in adapter.tables:
            nudge(operator.attrgetter(tables.path)(model), some_ulps)

    check(name, act, when, exact)


@MODE
def test_patched_steps_of_nudged_tables_build_them_once_and_rotate(exact: bool, rotations: list[str]) -> None:
    example = named("wan")
    model = example.build()
    nudge(model.rope, some_ulps)
    with dit_rope.patch(model, exact=exact):
        for _ in range(3):
            run(example, model)
    assert dit_rope.cache_info().models.misses == 1
    one_pass = not exact or all(exact_bits.SHOWN_NORMS.values())
    assert rotations == 3 * 2 * len(attentions(model)) * ["norm_rotate" if one_pass else "rotate"]


GRID, PAIRS = (2, 3, 4), (4, 2, 1)


def of_grid() -> torch.Tensor:
    """``[1, 24, 1, 7]`` values of a grid: each axis has numbers of its own."""
    axes = [torch.randn(size, count) for size, count in zip(GRID, PAIRS, strict=True)]
    parts = [
        values.view(*(size if dim == axis else 1 for dim in range(3)), -1).expand(*GRID, -1)
        for axis, (size, values) in enumerate(zip(GRID, axes, strict=True))
    ]
    return torch.cat(parts, dim=-1).reshape(1, math.prod(GRID), 1, sum(PAIRS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_axes_expand_to_the_table_they_were_taken_from(dtype: torch.dtype) -> None:
    cos, sin = of_grid().to(dtype), of_grid().to(dtype)
    rows = axis_rows((cos, sin), GRID, PAIRS)
    assert rows is not None
    assert (rows.shape, rows.dtype) == ((2, sum(GRID), max(PAIRS)), dtype)
    table = PackedTable(rows, None, 24, PAIRS, Pairing.INTERLEAVED, sizes=GRID, first_rows=(0, 2, 5))
    assert torch.equal(rotated(table, True), rotated(pack(cos, sin, Pairing.INTERLEAVED, CPU), True))


@pytest.mark.parametrize("token", [0, 1, 4, 12, 23])
@pytest.mark.parametrize("pair", range(7))
@pytest.mark.parametrize("index", [0, 1], ids=["cos", "sin"])
def test_tables_of_which_one_token_differs_by_an_ulp_are_not_of_axes(token: int, pair: int, index: int) -> None:
    values = [of_grid(), of_grid()]
    values[index][0, token, 0, pair] = one_ulp_up(values[index][0, token, 0, pair])
    assert axis_rows(values, GRID, PAIRS) is None


def test_zeros_of_two_signs_are_two_values() -> None:
    values = [torch.zeros(1, 24, 1, 7), torch.zeros(1, 24, 1, 7)]
    values[1][0, 5] = -0.0
    assert axis_rows(values, GRID, PAIRS) is None


@pytest.mark.parametrize("shape", [(1, 23, 1, 7), (1, 24, 1, 8), (2, 24, 1, 7), (1, 24, 2, 7)])
def test_tables_of_another_shape_are_not_of_axes(shape: tuple[int, ...]) -> None:
    assert axis_rows((torch.zeros(shape), torch.zeros(shape)), GRID, PAIRS) is None
