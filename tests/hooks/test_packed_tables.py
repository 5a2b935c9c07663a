"""What kernels read of dense tables: axis tables where these are the same, and nothing that was overwritten since."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import dit_rope
from dit_rope.hooks import formats
from dit_rope.hooks.class_override import add_hooks
from dit_rope.hooks.formats import AXES, INTERLEAVED
from dit_rope.hooks.forward_pass import BeginPass, EndPass, current_pass
from dit_rope.hooks.packed_tables import Align, PackedTable, axis_tables_of, is_known
from dit_rope.rotation import ops
from zoo import wan

CPU = torch.device("cpu")
Pair = tuple[torch.Tensor, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[True, False], ids=["training", "sampling"])
def with_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    """Passes without gradients look once into what this pass has packed, before anything else."""
    with torch.set_grad_enabled(request.param):
        yield


def dense(name: str = "wan", frames: int = 3) -> Pair:
    """Tables as the rope module of a patched model returns them."""
    model = wan.build(name)
    with dit_rope.patch(model):
        cos, sin = model.rope(torch.empty(1, 0, frames, 8, 12))
    return cos, sin


def rotated(table: PackedTable, seed: int = 3) -> torch.Tensor:
    x = torch.randn(1, table.tokens, 2, table.head_dim, generator=torch.Generator().manual_seed(seed))
    return ops.rotate([x], table.args(table.tokens, Align.START, exact=True))[0]


@pytest.mark.parametrize(
    ("name", "frames"), [("wan", 3), ("wan-uneven-axes", 3), ("chronoedit", 2), ("skyreels-v2", 2)]
)
@pytest.mark.parametrize("tokens", [slice(None), slice(0, 7), slice(5, 20), slice(40, None)])
def test_axis_form_of_a_table_and_of_its_parts_rotates_as_they_do(name: str, frames: int, tokens: slice) -> None:
    pair = dense(name, frames)
    assert all(type(x) is torch.Tensor for x in pair)
    views = (pair[0][:, tokens], pair[1][:, tokens])
    table = axis_tables_of(views)
    assert table is not None
    (by_token,) = AXES.tables(tuple(x.clone() for x in views), CPU)
    assert torch.equal(rotated(table), rotated(by_token))
    assert AXES.pack(views, CPU)[0].rows.data_ptr() == table.rows.data_ptr()


OTHERS: dict[str, Callable[[Pair, Pair], tuple[Any, ...]]] = {
    "every other token": lambda pair, _: tuple(table[:, ::2] for table in pair),
    "a token for all": lambda pair, _: tuple(table[:, :1].expand(-1, 8, -1, -1) for table in pair),
    "tokens back to front": lambda pair, _: tuple(table.flip(1) for table in pair),
    "negated": lambda pair, _: tuple(torch._neg_view(table) for table in pair),
    "negated sines": lambda pair, _: (pair[0], torch._neg_view(pair[1])),
    "sines of another table": lambda pair, another: (pair[0], another[1]),
    "sines of other tokens": lambda pair, _: (pair[0][:, :8], pair[1][:, 8:16]),
    "cosines alone": lambda pair, _: (pair[0], pair[0]),
    "bits as integers": lambda pair, _: tuple(table.view(torch.int32) for table in pair),
    "copies": lambda pair, _: tuple(table.clone() for table in pair),
    "some channels": lambda pair, _: tuple(table[..., :8] for table in pair),
    "other channels": lambda pair, _: tuple(table.flatten()[1:-23].view(1, -1, 1, 24) for table in pair),
    "three dims": lambda pair, _: tuple(table[:, :, 0] for table in pair),
    "no token": lambda pair, _: tuple(table[:, :0] for table in pair),
}


@pytest.mark.parametrize("change", OTHERS)
def test_changed_tables_are_not_taken_for_a_range_of_tokens(change: str) -> None:
    pair, another = dense(), dense("wan-uneven-axes" if change == "negated" else "wan", 4)
    assert axis_tables_of(OTHERS[change](pair, another)) is None
    assert axis_tables_of(pair) is not None


@pytest.mark.parametrize("through", [lambda x: x, lambda x: x[:, 3:5], lambda x: x.detach()])
@pytest.mark.parametrize("index", [0, 1], ids=["cos", "sin"])
def test_table_that_was_written_to_is_what_its_rows_say(index: int, through: Callable[..., torch.Tensor]) -> None:
    pair = dense()
    assert is_known(pair)
    through(pair[index]).mul_(0.5)
    assert axis_tables_of(pair) is None
    assert not is_known(pair)
    (by_token,) = AXES.tables(pair, CPU)
    assert torch.equal(rotated(AXES.pack(pair, CPU)[0]), rotated(by_token))


class Model(torch.nn.Module):
    """Runs what it is given in a forward pass as a patched model does."""

    def __init__(self) -> None:
        super().__init__()
        add_hooks(self, BeginPass(lambda module: None), EndPass())

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def form(tokens: int = 5, seed: int = 0) -> Pair:
    angles = torch.rand((1, tokens, 1, 4), generator=torch.Generator().manual_seed(seed))
    cos, sin = INTERLEAVED.join(angles.cos(), angles.sin())
    return cos, sin


def packed(pair: Pair) -> PackedTable:
    (table,) = INTERLEAVED.pack(pair, CPU)
    return table


def rows(pair: Pair) -> torch.Tensor:
    return INTERLEAVED.tables(pair, CPU)[0].rows


@pytest.mark.usefixtures("with_grad")
def test_table_is_packed_once_in_a_pass_unless_it_is_written_to() -> None:
    pair = form()

    def run() -> None:
        first = packed(pair)
        assert packed(pair) is first
        for table in pair:
            table.mul_(0.5)
            assert torch.equal(packed(pair).rows, rows(pair))
            assert packed(pair) is packed(pair)

    Model()(run)


@pytest.mark.usefixtures("with_grad")
def test_tables_that_share_a_tensor_are_packed_once_each() -> None:
    (cos, sin), another_sin = form(), form(seed=1)[1]

    def run() -> None:
        first, second = packed((cos, sin)), packed((cos, another_sin))
        assert not torch.equal(first.rows, second.rows)
        assert packed((cos, sin)) is first
        assert packed((cos, another_sin)) is second

    Model()(run)


@pytest.mark.usefixtures("with_grad")
def test_tensor_that_comes_where_another_was_is_not_taken_for_it() -> None:
    """Their ids and versions are the same."""
    cos, ids = form()[0], set[int]()
    repeated = []

    def run() -> None:
        for number in range(2000):
            sin = torch.full_like(cos, number / 2000)
            repeated.append(id(sin) in ids)
            ids.add(id(sin))
            assert torch.equal(packed((cos, sin)).rows, rows((cos, sin)))
            del sin
            if sum(repeated) > 5:
                break

    Model()(run)
    assert any(repeated)


@pytest.mark.usefixtures("with_grad")
def test_writes_that_no_version_counts_are_seen_by_the_next_pass() -> None:
    """Collectives, fused optimizers and other processes write so."""
    arrays = [np.ascontiguousarray(table.numpy()) for table in form()]
    pair = (torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]))
    model = Model()
    first = model(lambda: packed(pair))
    assert model(lambda: packed(pair)) is first  # of equal rows: what was made of them serves again
    for array in arrays:
        array *= 0.5
        second = model(lambda: packed(pair))
        assert torch.equal(second.rows, rows(pair))
        assert model(lambda: packed(pair)) is second


@pytest.mark.usefixtures("with_grad")
def test_pass_that_an_interrupt_has_left_open_is_not_the_next_one() -> None:
    array = form()[0].numpy()
    pair = (torch.from_numpy(array), form()[1])
    model = Model()
    begin, end = BeginPass(lambda module: None), EndPass()
    try:
        for _ in range(3):
            begin(model, (), {})
            array *= 0.5
            assert torch.equal(packed(pair).rows, rows(pair))
            assert packed(pair) is packed(pair)
    finally:
        end(model, (), None)


@pytest.mark.usefixtures("with_grad")
def test_writes_that_no_version_counts_are_seen_outside_of_passes() -> None:
    array = form()[0].numpy()
    pair = (torch.from_numpy(array), form()[1])
    for _ in range(3):
        array *= 0.5
        assert torch.equal(packed(pair).rows, rows(pair))


@pytest.mark.parametrize("error", [None, ValueError])
def test_pass_ends_with_the_forward_also_in_an_error(error: type[Exception] | None) -> None:
    model, numbers = Model(), []

    def run() -> None:
        numbers.append(current_pass())
        if error is not None:
            raise error

    for _ in range(2):
        assert current_pass() is None
        if error is None:
            model(run)
        else:
            with pytest.raises(error):
                model(run)
        assert current_pass() is None
    assert None not in numbers
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize("of", [formats.INTERLEAVED, formats.HALF, formats.MATRICES])
def test_table_whose_two_values_of_a_pair_differ_is_refused(of: formats.Format) -> None:
    from dit_rope.hooks.packed_tables import UnfitTable

    angles = torch.rand(1, 5, 1, 4)
    rotary = of.join(angles.cos(), angles.sin())
    assert len(of.pack(rotary, CPU)) == 1
    for tensor in [rotary] if isinstance(rotary, torch.Tensor) else rotary:
        for place in (0, -1):
            changed = tensor.flatten()
            assert changed.data_ptr() == tensor.data_ptr()
            value = changed[place].clone()
            changed[place] = 9.0
            with pytest.raises(UnfitTable):
                of.pack(rotary, CPU)
            changed[place] = value
    assert len(of.pack(rotary, CPU)) == 1
