"""Compiled models: as many graphs as unpatched at every size, and the same bits; operators in graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing

import dit_rope
from compiled_graphs import compiled, equal, inputs_of, one_layer
from dit_rope import Grid, NormKind, RopeSpec, rope_table
from tolerance import all_equal
from zoo import Example, Noise, tensors

KINDS = {
    "axis tables": "wan",
    "memo, norms": "ltx-coords",
    "memo, projections": "longcat-audio-no-norm",
    "replaced function": "minimax-music-3",
    "method memo": "joyimage",
    "complex": "qwen-image",
    "processor of dit_rope": "ideogram4",
    "override of its own": "allegro",
}
"""An example of each kind of override; scripts/measure/count_graphs.py counts all of them."""
BY_KIND = pytest.mark.parametrize("name", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(autouse=True)
def _quiet(one_thread: None) -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(example: Example, model: Any, times: int = 1) -> list[torch.Tensor]:
    """One forward pass without gradients."""
    with torch.no_grad():
        return tensors(example.run(model, inputs_of(example, getattr(model, "_orig_mod", model), times)))


@BY_KIND
def test_patch_breaks_no_graph_and_changes_no_bit(name: str) -> None:
    example = one_layer(name)
    actual, expected = (compiled(example, patched=patched) for patched in (True, False))
    assert actual.graphs == expected.graphs
    assert actual.breaks == expected.breaks
    assert equal(actual, expected)


@pytest.mark.parametrize("blocks", [False, True], ids=["model", "blocks"])
def test_new_resolution_compiles_no_more_graphs_than_unpatched(blocks: bool) -> None:
    """The second size makes lengths symbols, so that the third compiles nothing, in exact mode or fast mode."""
    example, sizes = one_layer("wan"), (1, 2, 3)
    actual = compiled(example, sizes, patched=True, blocks=blocks, exact=None)
    expected = compiled(example, sizes, patched=False, blocks=blocks)
    assert actual.graphs == expected.graphs
    assert equal(actual, expected)


@pytest.mark.parametrize("name", ["wan", "minimax-music-3"])
def test_patch_and_undo_after_compile_are_right_each_time(name: str) -> None:
    """Graphs are kept or compiled again; a rotation never runs twice, and always once."""
    example = one_layer(name)
    model = example.build()
    expected = run(example, model)
    fast = torch.compile(model, backend="eager")
    for _ in range(2):
        assert all_equal(run(example, fast), expected)
        with dit_rope.patch(fast, exact=True):
            assert all_equal(run(example, fast), expected)
            assert all_equal(run(example, model), expected)  # the same module called as it is
        assert all_equal(run(example, model), expected)


def test_patch_and_undo_after_compiling_blocks_are_right() -> None:
    """The rope module outside of the compiled blocks gives them positions while patched, and tables otherwise."""
    example = one_layer("wan")
    model = example.build()
    expected = run(example, model)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert all_equal(run(example, model), expected)
    for _ in range(2):
        with dit_rope.patch(model):
            assert all_equal(run(example, model), expected)
        assert all_equal(run(example, model), expected)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


SPEC = RopeSpec((8, 6, 4))


def _rotate(q: torch.Tensor, k: torch.Tensor, table: dit_rope.RopeTable) -> tuple[torch.Tensor, torch.Tensor]:
    return dit_rope.rotate_qk(q, k, table, positions=table.positions(), inplace=True)


def _norm_rotate(q: torch.Tensor, k: torch.Tensor, table: dit_rope.RopeTable) -> tuple[torch.Tensor, torch.Tensor]:
    return dit_rope.norm_rotate_qk(q, k, table, positions=table.positions(), norm=NormKind.PER_HEAD, inplace=True)


@pytest.mark.parametrize(
    ("operation", "backend"),
    [(_rotate, "aot_eager"), (_rotate, "inductor"), (_norm_rotate, "inductor")],
    ids=["rotate-aot_eager", "rotate-inductor", "norm_rotate-inductor"],
)
def test_in_place_operators_compile_with_arguments_that_share_a_symbolic_length(
    operation: Callable[..., Any], backend: str
) -> None:
    """Queries and keys of one length, which one symbol stands for in the graph, are both written."""

    def step(q: torch.Tensor, k: torch.Tensor, table: dit_rope.RopeTable) -> tuple[torch.Tensor, ...]:
        q, k = q * 2, k + 1
        rotated = operation(q, k, table)
        return (*rotated, rotated[0] + rotated[1], q, k)

    fast = torch.compile(step, backend=backend, dynamic=True, fullgraph=True)
    for grid in (Grid(2, 3, 4), Grid(3, 3, 5), Grid(2, 5, 7)):
        table = rope_table(SPEC, grid)
        table.positions()
        q, k = noise(2, grid.tokens, 3, 18), noise(2, grid.tokens, 3, 18) * 2
        copies = q.clone(), k.clone()
        outs, expected = fast(q, k, table), step(q, k, table)
        for actual, exact in zip(outs, expected, strict=True):
            torch.testing.assert_close(actual, exact)
        assert not torch.allclose(outs[0], copies[0] * 2)
        assert torch.equal(q, copies[0])
        assert torch.equal(k, copies[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_place_operator_writes_the_inputs_of_a_compiled_function(backend: str) -> None:
    """Inputs of the graph themselves are written, and views of one tensor beside each other."""

    def step(q: torch.Tensor, k: torch.Tensor, table: dit_rope.RopeTable) -> torch.Tensor:
        dit_rope.rotate_qk(q, k, table, inplace=True)
        return q + k

    if tuple(map(int, torch.__version__.split(".")[:2])) < (
        2,
        10,
    ):  # for any operator, torch's own too: tests/rotation/test_ops.py compiles for fixed shapes
        pytest.skip("torch 2.9 cannot trace writes to views of one tensor whose shape may change")
    fast = torch.compile(step, backend=backend, dynamic=True, fullgraph=True)
    for grid in (Grid(2, 3, 4), Grid(3, 3, 5)):
        table = rope_table(SPEC, grid)
        packed = noise(1, grid.tokens, 2, 4, 18)
        twin = packed.clone()
        out = fast(*packed.unbind(2), table)
        expected = step(*twin.unbind(2), table)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(packed, twin)


def test_patched_block_exports_as_the_model_s_own_code() -> None:
    """``torch.export`` traces as a compiler does: the program holds neither operators nor hooks of dit_rope."""
    model = one_layer("wan").build()
    block = model.blocks[0]
    tokens, heads, dim = 6, 2, 24
    rotary = noise(1, tokens, 1, dim), noise(1, tokens, 1, dim)
    args = (noise(1, tokens, heads * dim), noise(1, 5, heads * dim), noise(1, 6, heads * dim), rotary)
    with torch.no_grad():
        expected = block(*args)
        with dit_rope.patch(model):
            program = torch.export.export(block, args)
    assert torch.equal(program.module()(*args), expected)
    assert "dit_rope" not in str(program.graph)


def test_patched_model_exports_and_computes_the_same() -> None:
    example = one_layer("ltx-coords")
    model = example.build()
    inputs = example.inputs(model, Noise(torch.float32))
    with torch.no_grad():
        expected = tensors(example.run(model, inputs))
        with dit_rope.patch(model):
            program = torch.export.export(model, (), {**inputs, "return_dict": False})
    assert all_equal(tensors(program.module()(**inputs, return_dict=False)), expected)
    assert "dit_rope" not in str(program.graph)


def test_error_in_a_compiled_model_leaves_the_next_call_as_it_is() -> None:
    example = one_layer("wan")
    model = example.build()
    expected = run(example, model)
    with dit_rope.patch(model):
        fast = torch.compile(model, backend="eager")
        inputs = inputs_of(example, model)
        with pytest.raises(Exception, match="."), torch.no_grad():
            example.run(fast, {**inputs, "encoder_hidden_states": noise(1, 12, 5)})
        assert all_equal(run(example, model), expected)
