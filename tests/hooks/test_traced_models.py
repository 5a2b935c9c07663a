"""A patch with ``compiled=True`` puts its operators into the graphs of compiled models, and changes no bit more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import dit_rope
from compiled_graphs import inputs_of, one_layer
from dit_rope import Rounding
from dit_rope.hooks.class_override import record_of
from dit_rope.models import ADAPTERS
from tolerance import all_equal
from zoo import EXAMPLES, Example, named, tensors

FIRST = list({example.model: example for example in reversed(EXAMPLES)}.values())[::-1]
PATCHED = [example for example in FIRST if example.model in {adapter.model for adapter in ADAPTERS}]
COUNTS_LAYERS = ("hidream", "vace", "animate")
"""Further values of their configurations follow from the number of layers."""
BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, graph: GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    @property
    def operators(self) -> int:
        """Calls of operators of dit_rope in all graphs."""
        return sum("dit_rope" in str(node.target) for graph in self.graphs for node in graph.graph.nodes)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(example: Example, model: Any, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(example.forward(model, dtype))


def traced(model: torch.nn.Module) -> int:
    """Attention modules whose rotation is an operator of graphs."""
    records = [record_of(module) for module in model.modules()]
    return sum(getattr(record.settings, "traced", None) is not None for record in records if record is not None)


@pytest.mark.parametrize("example", PATCHED, ids=lambda example: example.name)
def test_compiled_models_have_the_operators_and_the_bits(example: Example) -> None:
    """In one graph, if the unpatched model is one. One layer of each kind shows it."""
    if example.name not in COUNTS_LAYERS:
        example = one_layer(example.name)
    model, graphs = example.build(BF16), Graphs()
    expected = run(example, model)
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True) as handle:
        try:
            actual = run(example, torch.compile(model, backend=graphs, fullgraph=True))
        except Exception as error:  # what torch raises for code that it cannot compile as one graph
            actual = compiled_in_parts(example, model, graphs, error)
        assert all_equal(actual, expected)
        assert bool(traced(model)) == bool(graphs.operators)
        if traced(model):
            assert "  under torch.compile: " in handle.report()
        else:
            assert "not patched under torch.compile: everything" in handle.report()


def compiled_in_parts(example: Example, model: torch.nn.Module, graphs: Graphs, error: Exception) -> list[torch.Tensor]:
    """The outputs in several graphs, if the unpatched model is not one graph either."""
    dit_rope.unpatch(model)
    torch._dynamo.reset()
    with pytest.raises(type(error)):
        run(example, torch.compile(model, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    try:
        run(example, torch.compile(model, backend="eager"))
    except Exception:
        pytest.skip("the unpatched model does not compile")
    torch._dynamo.reset()
    graphs.graphs.clear()
    dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True)
    return run(example, torch.compile(model, backend=graphs))


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan-video", "kandinsky5", "minimax-h3", "cogview4", "ltx-padded"])
def test_exact_mode_keeps_its_bits_in_a_graph(name: str) -> None:
    example, graphs = named(name), Graphs()
    model = example.build(BF16)
    expected = run(example, model)
    with dit_rope.patch(model, exact=True, compiled=True):
        assert all_equal(run(example, torch.compile(model, backend=graphs, fullgraph=True)), expected)
    assert graphs.operators


def test_without_the_option_compiled_code_is_the_models() -> None:
    example, graphs = named("wan"), Graphs()
    model = example.build(BF16)
    with dit_rope.patch(model, rounding=Rounding.MODEL):
        run(example, torch.compile(model, backend=graphs, fullgraph=True))
    assert graphs.operators == 0


@pytest.mark.parametrize("blocks", [False, True], ids=["model", "blocks"])
@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan-video"])
def test_patch_and_undo_around_a_compile(name: str, blocks: bool) -> None:
    example, graphs = named(name), Graphs()
    model = example.build(BF16)
    expected = run(example, model)
    if blocks:
        model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    compiled = model if blocks else torch.compile(model, backend=graphs, fullgraph=True)
    assert all_equal(run(example, compiled), expected)
    assert not graphs.operators
    with dit_rope.patch(model, exact=True, compiled=True):
        for _ in range(2):
            assert all_equal(run(example, compiled), expected)
        assert graphs.operators
    graphs.graphs.clear()
    assert all_equal(run(example, compiled), expected)
    assert not graphs.operators


@pytest.mark.parametrize("rounding", [Rounding.EXACT, Rounding.MODEL, Rounding.FAST])
@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "qwen-image"])
def test_ahead_of_time_autograd_keeps_the_bits_of_the_eager_patch(name: str, rounding: Rounding) -> None:
    example = named(name)
    model = example.build(BF16)
    with dit_rope.patch(model, rounding=rounding, compiled=True):
        expected = run(example, model)
        assert all_equal(run(example, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


def test_inductor_is_as_close_as_unpatched() -> None:
    example = named("wan")
    model = example.build(torch.float32)
    expected = run(example, model, torch.float32)
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        actual = run(example, torch.compile(model, fullgraph=True), torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_new_sizes_compile_no_more_graphs_than_unpatched(name: str, dynamic: bool | None) -> None:
    example, counts = named(name), []
    for patched in (False, True):
        torch._dynamo.reset()
        model, graphs = example.build(), Graphs()
        handle = dit_rope.patch(model, exact=True, compiled=True) if patched else contextlib.nullcontext()
        compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=dynamic)
        with handle, torch.no_grad():
            for times in (1, 2, 3):
                inputs = inputs_of(example, model, times)
                assert all_equal(tensors(example.run(compiled, inputs)), tensors(example.run(model, inputs)))
        counts.append(len(graphs.graphs))
    assert counts[1] <= counts[0]


def test_gradients_are_those_of_the_eager_patch() -> None:
    example = named("wan")
    model = example.build()
    gradients = []
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            sum(output.square().sum() for output in tensors(example.forward(call, torch.float32))).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_exported_block_has_the_operators() -> None:
    example = named("wan")
    model = example.build()
    calls: list[Any] = []
    block = model.blocks[0]
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    expected = run(example, model, torch.float32)
    handle.remove()
    assert expected
    args, kwargs = calls[0]
    with torch.no_grad(), dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        program = torch.export.export(block, args, kwargs)
        names = [str(node.target) for node in program.graph.nodes]
        assert sum("dit_rope" in name for name in names) == 2
        torch.testing.assert_close(program.module()(*args, **kwargs), block(*args, **kwargs))


# Whatever is not as it was when the model was patched runs as the model's own code.


def test_a_processor_of_other_code_runs_by_itself() -> None:
    example, graphs = named("wan"), Graphs()
    model = example.build(BF16)

    class Processor(type(model.blocks[0].attn1.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().__call__(*args, **kwargs)

    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        for block in model.blocks:
            block.attn1.set_processor(Processor())
        expected = run(example, model)
        assert all_equal(run(example, torch.compile(model, backend=graphs, fullgraph=True)), expected)
    assert not graphs.operators


def test_code_that_was_replaced_since_runs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    example, graphs = named("wan"), Graphs()
    model = example.build(BF16)
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        from diffusers.models.transformers import transformer_wan

        original = transformer_wan._get_qkv_projections
        monkeypatch.setattr(
            transformer_wan, "_get_qkv_projections", lambda *args: tuple(2 * x for x in original(*args))
        )
        expected = run(example, model)
        assert all_equal(run(example, torch.compile(model, backend=graphs, fullgraph=True)), expected)
    assert not graphs.operators


def test_norms_taken_away_or_exchanged_are_seen() -> None:
    example = named("flux")
    for change in (None, torch.nn.LayerNorm(20).to(BF16), torch.nn.Identity()):
        torch._dynamo.reset()
        graphs = Graphs()
        model: Any = example.build(BF16)
        with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
            for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                block.attn.norm_k = change
            try:
                expected = run(example, model)
            except TypeError:  # the model itself does not run without
                continue
            assert all_equal(run(example, torch.compile(model, backend=graphs, fullgraph=True)), expected)
            assert not graphs.operators


def test_a_hook_on_a_norm_runs() -> None:
    example = named("wan")
    model = example.build(BF16)
    model.blocks[0].attn1.norm_q.register_forward_hook(lambda module, args, output: output * 2)
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        expected = run(example, model)
        assert all_equal(run(example, torch.compile(model, backend="eager", fullgraph=True)), expected)


def test_a_pre_hook_on_a_norm_runs() -> None:
    example = named("flux")
    model: Any = example.build(BF16)
    model.transformer_blocks[0].attn.norm_k.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        expected = run(example, model)
        assert all_equal(run(example, torch.compile(model, backend="eager", fullgraph=True)), expected)


def test_a_norm_that_is_compiled_itself_runs() -> None:
    example = named("wan")
    model: Any = example.build(BF16)
    for block in model.blocks:
        block.attn1.norm_q.compile(backend="eager")
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        expected = run(example, model)
        assert all_equal(run(example, torch.compile(model, backend="eager", fullgraph=True)), expected)


def test_a_backward_hook_on_a_norm_sees_its_gradient() -> None:
    example = named("wan")
    model: Any = example.build()
    seen: list[torch.Tensor] = []
    model.blocks[0].attn1.norm_q.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        for call in (model, torch.compile(model, backend="aot_eager")):
            sum(output.square().sum() for output in tensors(example.forward(call, torch.float32))).backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


def test_autocast_rounds_as_the_model() -> None:
    example = named("wan")
    model = example.build(torch.float32)
    with torch.autocast("cpu", BF16):
        expected = run(example, model, torch.float32)
        with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
            assert all_equal(
                run(example, torch.compile(model, backend="eager", fullgraph=True), torch.float32), expected
            )


def test_scaled_tables_rotate_in_the_graph() -> None:
    example, graphs = named("wan"), Graphs()
    model = example.build()
    plain = run(example, model, torch.float32)
    with dit_rope.patch(model, exact=True, compiled=True, scaling=dit_rope.Scaling.of("linear", factor=2.0)):
        expected = run(example, model, torch.float32)
        assert all_equal(run(example, torch.compile(model, backend=graphs, fullgraph=True), torch.float32), expected)
    assert graphs.operators
    assert not all_equal(plain, expected)


def test_the_option_is_a_bool() -> None:
    with pytest.raises(TypeError, match="compiled must be a bool, got 1"):
        dit_rope.patch(named("wan").build(), compiled=1)  # type: ignore[arg-type]


def test_a_copy_of_a_patched_model_is_traced_too() -> None:
    import copy

    example, graphs = named("flux"), Graphs()
    model = example.build(BF16)
    expected = run(example, model)
    with dit_rope.patch(model, rounding=Rounding.MODEL, compiled=True):
        twin = copy.deepcopy(model)
        assert all_equal(run(example, torch.compile(twin, backend=graphs, fullgraph=True)), expected)
    assert graphs.operators
