"""A patch goes in and comes out whatever was done to the model before, between and after, and leaves nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import dit_rope
from dit_rope.hooks.class_override import INSTALLED, Override
from tolerance import all_equal
from twins import BEFORE_AND_AFTER, Outcome, assert_like, attentions, check, run
from zoo import Noise, named, tensors

WHEN = pytest.mark.parametrize("when", BEFORE_AND_AFTER)
MODE = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
KINDS = pytest.mark.parametrize("name", ["wan", "flux", "anyflow-far", "sana-wm", "joyimage"])


@pytest.fixture(autouse=True)
def _quiet(one_thread: None) -> Iterator[None]:
    yield
    torch._dynamo.reset()


def changed(model: Any) -> list[Any]:
    """Everything of ``model`` that a patch has left a mark on."""
    objects = [x for module in model.modules() for x in (module, *vars(module).values())]
    return [x for x in objects if isinstance(x, Override) or INSTALLED in getattr(x, "__dict__", {})]


class Wrapper(torch.nn.Module):
    """A block in a module that nobody knows."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def blocks_of(model: Any) -> Any:
    return getattr(model, "blocks", None) or model.transformer_blocks


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "checkpoint": checkpoint_wrapper,
    "compile": lambda block: torch.compile(block, backend="eager"),
    "unknown": Wrapper,
    "copy": copy.deepcopy,
}


@WHEN
@MODE
@pytest.mark.parametrize("every", [False, True], ids=["some", "all"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_wrapped_and_exchanged_blocks(name: str, wrapper: str, every: bool, exact: bool, when: str) -> None:
    def wrap(model: Any) -> None:
        blocks = blocks_of(model)
        for index in range(len(blocks) if every else 1):
            blocks[index] = WRAPPERS[wrapper](blocks[index])

    check(name, wrap, when, exact, changes=False)


@pytest.mark.parametrize("wrapper", ["checkpoint", "compile"])
def test_wrapped_blocks_are_patched_and_unknown_wrappers_are_named(wrapper: str) -> None:
    model = named("wan").build()
    model.blocks[0] = WRAPPERS[wrapper](model.blocks[0])
    assert "blocks.*.attn1 (2 modules): norm_q, norm_k norm and rotate" in dit_rope.patching.inspect(model)
    for index in range(2):
        model.blocks[index] = Wrapper(model.blocks[index])
    assert "such as blocks.0.block.attn1" in dit_rope.patching.inspect(model)


@WHEN
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_attention_modules_that_are_compiled_or_of_a_derived_class(name: str, when: str) -> None:
    def compiled(model: Any) -> None:
        for block in blocks_of(model):
            key = "attn1" if name == "wan" else "attn"
            setattr(block, key, torch.compile(getattr(block, key), backend="eager"))

    def derived(model: Any) -> None:
        for attention in attentions(model):
            attention.__class__ = type(f"FSDP{type(attention).__name__}", (type(attention),), {})

    for act in (compiled, derived):
        for exact in (True, False):
            check(name, act, when, exact, changes=False)


@WHEN
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_blocks_exchanged_for_exported_programs(name: str, when: str) -> None:
    """Blocks compiled ahead of time read what the rope module returns as the tables that it returns unpatched."""
    example = named(name)
    outputs: list[Any] = []
    twin = example.build()
    block = blocks_of(twin)[0]
    block.register_forward_pre_hook(lambda module, args, kwargs: outputs.append((args, kwargs)), with_kwargs=True)
    run(example, twin)
    args, kwargs = outputs[0]
    block._forward_pre_hooks.clear()

    def exchanged(model: Any) -> None:
        block = blocks_of(model)[0]
        program = torch.export.export(block, args, kwargs).module()
        block.forward = types.MethodType(lambda self, *a, **k: program(*a, **k), block)

    check(name, exchanged, when, exact=True, changes=False)


@KINDS
def test_parts_taken_out_while_patched_and_put_back_after_undo(name: str) -> None:
    example = named(name)
    model = example.build()
    expected = run(example, model)
    handle = dit_rope.patch(model, exact=False)
    modules = [(module, key, value) for module in model.modules() for key, value in module._modules.items()]
    processors = [(module, module.processor) for module in model.modules() if hasattr(module, "processor")]
    for module, key, value in modules:
        if key in ("rope", "pos_embed") or "norm" in key:
            module._modules[key] = copy.deepcopy(value)
    for module, processor in processors:
        module.processor = copy.copy(processor)
    handle.undo()
    for module, key, value in modules:
        module._modules[key] = value
    for module, processor in processors:
        module.processor = processor
    assert not changed(model)
    assert all_equal(run(example, model), expected)
    with dit_rope.patch(model, exact=True):
        assert all_equal(run(example, model), expected)
    assert not changed(model)


@KINDS
def test_handles_in_any_order(name: str) -> None:
    example = named(name)
    model = example.build()
    expected = run(example, model)
    first = dit_rope.patch(model, exact=True)
    dit_rope.unpatch(model)
    assert not first.active
    second = dit_rope.patch(model, exact=True)
    first.undo()
    assert second.active
    assert changed(model)
    assert all_equal(run(example, model), expected)
    twin = pickle.loads(pickle.dumps(model))
    second.undo()
    second.undo()
    assert not changed(model)
    assert all_equal(run(example, twin), expected)
    dit_rope.unpatch(twin)
    assert not changed(twin)


def test_attention_shared_by_two_patched_models() -> None:
    example = named("flux")
    model_a, model_b = example.build(), example.build()
    expected = run(example, model_a)
    model_b.transformer_blocks = model_a.transformer_blocks
    first, second = dit_rope.patch(model_a, exact=True), dit_rope.patch(model_b, exact=True)
    first.undo()
    assert changed(model_b.transformer_blocks[0])
    for model in (model_a, model_b):
        assert all_equal(run(example, model), expected)
    second.undo()
    assert not changed(model_a)
    assert not changed(model_b)


def test_processor_shared_by_all_attention_modules() -> None:
    def shared(model: Any) -> None:
        model.set_attn_processor(attentions(model)[0].processor)

    for when in BEFORE_AND_AFTER:
        check("flux", shared, when, exact=True, changes=False)


def test_tables_go_with_the_model() -> None:
    """One that dies patched, without an undo."""
    from dit_rope.tables.caches import cache_info

    model = named("hunyuan-video").build()
    dit_rope.patch(model)
    run(named("hunyuan-video"), model)
    assert cache_info().models.entries == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert cache_info().models.entries == 0


def test_interrupts_keep_nothing_alive_and_the_next_call_is_right() -> None:
    example = named("flux")
    model = example.build()
    inputs = example.inputs(model, Noise(torch.float32))
    expected = run(example, model, inputs)
    handle = dit_rope.patch(model, exact=True)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    alive = []
    for module in (attentions(model)[1].norm_k, model.transformer_blocks[0], model.proj_out):
        for _ in range(3):
            hook = module.register_forward_pre_hook(interrupt)
            arguments = {**inputs, "hidden_states": inputs["hidden_states"].clone()}
            alive.append(weakref.ref(arguments["hidden_states"]))
            with pytest.raises(KeyboardInterrupt):
                run(example, model, arguments)
            hook.remove()
            del arguments
    gc.collect()
    assert all(ref() is None for ref in alive)
    with torch.no_grad():
        assert all_equal(tensors(model.forward(**inputs)), expected)
    handle.undo()


@MODE
def test_undo_while_another_thread_is_inside_an_attention_module(exact: bool) -> None:
    example = named("flux")
    model = example.build()
    expected = run(example, model)
    handle = dit_rope.patch(model, exact=exact)
    inside, undone = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        undone.wait(timeout=30)

    hook = attentions(model)[0].norm_k.register_forward_pre_hook(wait)
    outputs: list[Any] = []
    thread = threading.Thread(target=lambda: outputs.extend(run(example, model)))
    thread.start()
    assert inside.wait(timeout=30)
    handle.undo()
    undone.set()
    thread.join(timeout=60)
    hook.remove()
    assert_like(Outcome(outputs, None), Outcome(expected, None), exact)
    assert not changed(model)


@pytest.mark.parametrize("name", ["flux", "wan", "omnigen", "allegro", "stable-audio"])
def test_patch_under_modes_of_torch_and_with_random_parts(name: str) -> None:
    """A default device; inference mode; attention without parameters; adapters that drop at random in training."""
    example = named(name)
    model = example.build()
    expected = run(example, model)
    for mode in (torch.device("meta"), torch.inference_mode(), torch.autocast("cpu")):
        with mode:
            handle = dit_rope.patch(model)
        assert all_equal(run(example, model), expected)
        handle.undo()
        assert not changed(model)
    for attention in attentions(model):
        for submodule in attention.modules():
            if isinstance(submodule, torch.nn.Linear):
                submodule.register_forward_hook(lambda module, args, out: torch.nn.functional.dropout(out, 0.5))
    torch.manual_seed(3)
    dropped = run(example, model)
    with dit_rope.patch(model):
        torch.manual_seed(3)
        assert all_equal(run(example, model), dropped)


@MODE
def test_parts_on_disk_until_they_are_used(exact: bool, tmp_path: Any) -> None:
    """Buffers hold anything until then, and are not looked at when patching."""
    cpu = torch.device("cpu")

    def offload(model: Any) -> None:
        folder = str(tmp_path / str(id(model)))
        model.enable_group_offload(
            onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=folder
        )

    for when in BEFORE_AND_AFTER:
        check("wan", offload, when, exact, changes=False)


def test_class_that_cannot_be_derived_from_for_an_object_is_left_alone() -> None:
    """As those with slots of their own: nothing of the patch stays on such an object, and the rest is patched."""
    example = named("flux")
    model = example.build()
    expected = run(example, model)
    attention = attentions(model)[0]
    base = type(attention.processor)

    class Slotted(base):  # type: ignore[misc, valid-type]
        __slots__ = ("extra",)

    attention.processor = Slotted()
    with dit_rope.patch(model, exact=True) as handle:
        assert type(attention.processor) is Slotted or isinstance(attention.processor, Slotted)
        assert all_equal(run(example, model), expected)
        assert "norm and rotate" in handle.report()
    assert type(attention.processor) is Slotted
    assert not changed(model)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", ["sana-wm", "joyimage", "wan"])
def test_classes_that_were_derived_from_a_patched_one_call_what_they_were_derived_from(name: str, levels: int) -> None:
    """A wrapper of the forward in a derived class, put on while patched, outlives the patch and a second one."""
    patched, twin = (named(name).build() for _ in range(2))
    handle = dit_rope.patch(patched, exact=True)
    for model in (patched, twin):
        for module in [*attentions(model), *(x for x in model.modules() if "Rope" in type(x).__name__)]:
            for _ in range(levels):
                base = type(module)
                forward = lambda self, *args, base=base, **kwargs: base.forward(self, *args, **kwargs)  # noqa: E731
                module.__class__ = type(base.__name__, (base,), {"forward": forward})
    expected = run(named(name), twin)
    for _ in range(3):
        assert all_equal(run(named(name), patched), expected)
        handle.undo()
        assert changed(patched) == []
        assert all_equal(run(named(name), patched), expected)
        handle = dit_rope.patch(patched, exact=True)
    handle.undo()
