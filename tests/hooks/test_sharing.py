"""One patched model for several threads, processes and pipelines: each gets what an unpatched model gives."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_rope
from compiled_graphs import inputs_of
from dit_rope.hooks.class_override import Override
from tolerance import all_equal
from zoo import named, tensors

# Memo of a module, of the model's own arguments, of a method; a replaced function; complex; axis tables.
FAMILIES = ("wan", "hunyuan-video", "flux", "joyimage", "anyflow-far", "qwen-image")


pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, model: torch.nn.Module, times: int = 1) -> list[torch.Tensor]:
    """One forward pass without gradients, of an image or video ``times`` as wide as the example's."""
    with torch.no_grad():
        return tensors(named(name).run(model, inputs_of(named(name), model, times)))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_threads_with_videos_of_two_sizes_do_not_meet(name: str, exact: bool) -> None:
    """In fast mode against what one thread gives, because there bits are not the unpatched model's."""
    model = named(name).build()
    unpatched = [run(name, model, times) for times in (1, 2)]
    wrong: list[object] = []
    with dit_rope.patch(model, exact=exact):
        expected = unpatched if exact else [run(name, model, times) for times in (1, 2)]
        dit_rope.cache_clear()
        start = threading.Barrier(4)

        def work(index: int) -> None:
            try:
                start.wait(timeout=30)
                for step in range(6):
                    size = (index + step) % 2
                    if not all_equal(run(name, model, 1 + size), expected[size]):
                        wrong.append((index, step))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_threads_that_build_tables_at_once_do_not_take_each_other_s_arguments() -> None:
    """Flux makes new ids from the model's arguments. Both threads are between the model and its rope module."""
    example = named("flux")
    model = example.build()
    first = inputs_of(example, model)
    inputs = [first, {**first, "img_ids": first["img_ids"] * 3}]
    with torch.no_grad():
        expected = [tensors(example.run(model, arguments)) for arguments in inputs]
    assert not all_equal(*expected)
    arrived: list[int] = []
    both_inside, first_done = threading.Event(), threading.Event()
    outputs: dict[int, list[torch.Tensor]] = {}

    def wait(*_: object) -> None:
        arrived.append(threading.get_ident())
        if len(arrived) == 1:
            both_inside.wait(timeout=60)
        else:  # the second to come in is the second to build
            both_inside.set()
            first_done.wait(timeout=60)

    def work(index: int) -> None:
        with torch.no_grad():
            outputs[index] = tensors(example.run(model, inputs[index]))
        first_done.set()

    with dit_rope.patch(model, exact=True):
        hook = model.pos_embed.register_forward_pre_hook(wait)
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        hook.remove()
        with torch.no_grad():  # and no table was kept under the other's name
            later = [tensors(example.run(model, arguments)) for arguments in inputs]
    assert all_equal(later[0], expected[0])
    assert all_equal(later[1], expected[1])
    assert all_equal(outputs[0], expected[0])
    assert all_equal(outputs[1], expected[1])


def test_cache_cleared_and_shrunk_by_another_thread_changes_nothing() -> None:
    model = named("hunyuan-video").build()
    expected = [run("hunyuan-video", model, times) for times in (1, 2)]
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(0.001):
            dit_rope.cache_clear()
            dit_rope.cache_configure(max_model_entries=1)
            dit_rope.cache_configure(max_model_entries=64)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with dit_rope.patch(model, exact=True):
            for step in range(12):
                assert all_equal(run("hunyuan-video", model, 1 + step % 2), expected[step % 2])
    finally:
        done.set()
        thread.join(timeout=30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "joyimage"])
def test_forked_worker_generates_with_the_patched_model(name: str) -> None:
    """As a DataLoader's workers do, which start while the parent's caches are full."""
    model = named(name).build()
    expected = [run(name, model, times) for times in (1, 2)]
    with dit_rope.patch(model, exact=True):
        assert all_equal(run(name, model), expected[0])
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            right = all(all_equal(run(name, model, times), expected[times - 1]) for times in (1, 2, 1))
            dit_rope.unpatch(model)
            os._exit(0 if right and all_equal(run(name, model), expected[0]) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all_equal(run(name, model, 2), expected[1])


def _spawned(folder: str, pickled: bytes, answers: Any) -> None:
    """Runs in a new process: every patched model it is sent, and the same without the patch."""
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    for name, model in pickle.loads(pickled).items():
        patched = sum(isinstance(value, Override) for module in model.modules() for value in vars(module).values())
        actual = run(name, model)
        dit_rope.unpatch(model)
        answers.put((name, patched, all_equal(actual, run(name, model)), [out.numpy() for out in actual]))


def test_spawned_worker_generates_with_the_patched_models_it_is_sent() -> None:
    """Overrides are classes made on the spot: they arrive in a process that has made none."""
    models = {name: named(name).build() for name in ("wan", "hunyuan-video")}
    expected = {name: run(name, model) for name, model in models.items()}
    handles = [dit_rope.patch(model, exact=True) for model in models.values()]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_spawned, args=(str(Path(__file__).parent), pickle.dumps(models), answers))
    worker.start()
    received = [answers.get(timeout=120) for _ in models]
    worker.join(timeout=60)
    assert worker.exitcode == 0
    assert [handle.active for handle in handles] == [True, True]
    for name, patched, equal, outs in received:
        assert patched > 1, name
        assert equal, name
        assert all_equal([torch.from_numpy(out) for out in outs], expected[name]), name


def wan_pipeline(transformer: torch.nn.Module) -> Any:
    import diffusers

    return diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


def test_pipelines_that_share_a_transformer_share_its_patch() -> None:
    model = named("wan").build()
    expected = run("wan", model)
    first, second = wan_pipeline(model), wan_pipeline(model)
    handle = dit_rope.patch(first)
    assert isinstance(second.transformer.rope, Override)
    with pytest.raises(ValueError, match="transformer must not be patched already"):
        dit_rope.patch(second)
    assert all_equal(run("wan", second.transformer), expected)
    handle.undo()
    assert not isinstance(second.transformer.rope, Override)
    with dit_rope.patch(second):
        assert all_equal(run("wan", first.transformer), expected)
        handle.undo()  # of a patch that has been undone: not of the other's
        assert isinstance(first.transformer.rope, Override)
    assert all_equal(run("wan", model), expected)


def test_pipeline_made_of_the_parts_of_a_patched_one_is_patched() -> None:
    model = named("wan").build()
    first = wan_pipeline(model)
    with dit_rope.patch(first):
        second = type(first)(**first.components)
        assert second.transformer is model
        assert isinstance(second.transformer.rope, Override)
    assert not isinstance(second.transformer.rope, Override)


def test_two_models_patched_at_once_keep_their_tables_apart() -> None:
    """Of one class and one size, but not of one configuration: equal arguments, other tables."""
    from dataclasses import replace

    example = named("hunyuan-video")
    changed = replace(example, config={**example.config, "rope_theta": 64.0})
    models = [example.build(), changed.build()]
    expected = [tensors(variant.forward(model)) for variant, model in zip((example, changed), models, strict=True)]
    assert not all_equal(*expected)
    handles = [dit_rope.patch(model, exact=True) for model in models]
    for _ in range(2):
        for model, output in zip(models, expected, strict=True):
            with torch.no_grad():
                assert all_equal(tensors(example.forward(model)), output)
    handles[0].undo()
    with torch.no_grad():
        assert all_equal(tensors(example.forward(models[1])), expected[1])
        assert all_equal(tensors(example.forward(models[0])), expected[0])
