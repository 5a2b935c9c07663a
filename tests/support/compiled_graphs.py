"""How many graphs torch.compile makes of a model, which tests and a script compare with and without the patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo.testing
from torch._dynamo.utils import counters

import dit_rope
from tolerance import all_equal
from zoo import Example, Noise, named, tensors


@dataclass(frozen=True)
class Compiled:
    """What one compiled model came to.

    Attributes:
        graphs: how many there were after each call.
        breaks: why graphs were broken.
        outputs: of each call.
    """

    graphs: tuple[int, ...]
    breaks: frozenset[str]
    outputs: list[list[torch.Tensor]]


def inputs_of(example: Example, model: torch.nn.Module, times: int = 1) -> dict[str, Any]:
    """Inputs whose image, video or sound is ``times`` as wide or long as the example's.

    Raises:
        ValueError: it is not known how to widen them.
    """
    inputs = example.inputs(model, Noise(torch.float32))
    hidden = inputs.get("hidden_states")
    if times == 1:
        return inputs
    if isinstance(hidden, list):
        return {**inputs, "hidden_states": [torch.cat([hidden_state] * times, dim=-1) for hidden_state in hidden]}
    if not isinstance(hidden, torch.Tensor):
        raise ValueError(f"{example.name} must take hidden_states that are tensors")
    if "img_shapes" in inputs or "img_ids" in inputs:
        return {**inputs, "hidden_states": torch.cat([hidden] * times, dim=1), **_wider_image(inputs, times)}
    if hidden.ndim < 4:
        raise ValueError(f"{example.name} must take an image, a video or positions, got {list(hidden.shape)}")
    return {**inputs, "hidden_states": torch.cat([hidden] * times, dim=-1)}


def _wider_image(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    """Shapes or ids of images side by side."""
    if "img_ids" in inputs:
        ids = inputs["img_ids"]
        return {"img_ids": torch.cat([ids + 100 * number for number in range(times)], dim=-2)}
    return {
        "img_shapes": [
            [(f, h, w * times) for f, h, w in shape] if isinstance(shape, list) else (*shape[:2], shape[2] * times)
            for shape in inputs["img_shapes"]
        ]
    }


def compiled(
    example: Example,
    times: Sequence[int] = (1,),
    *,
    patched: bool,
    blocks: bool = False,
    exact: bool | None = True,
    backend: str = "eager",
    **options: Any,
) -> Compiled:
    """Compiles a new model of ``example``, or its repeated blocks, and calls it at each width."""
    torch._dynamo.reset()
    counters.clear()
    dit_rope.cache_clear()
    model = example.build()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    if patched:
        dit_rope.patch(model, exact=exact)
    run: Any = model
    if blocks:
        model.compile_repeated_blocks(backend=counter, **options)
    else:
        run = torch.compile(model, backend=counter, **options)
    graphs, outputs = [], []
    with torch.no_grad():
        for size in times:
            outputs.append(tensors(example.run(run, inputs_of(example, model, size))))
            graphs.append(counter.frame_count)
    return Compiled(tuple(graphs), frozenset(counters["graph_break"]), outputs)


def one_layer(name: str) -> Example:
    """The example of that name with one layer of each kind: further layers run the same code."""
    example = named(name)
    fewer = {key: 1 for key in ("num_layers", "num_single_layers") if key in example.config}
    return replace(example, config={**example.config, **fewer})


def equal(actual: Compiled, expected: Compiled) -> bool:
    """Whether all outputs are equal."""
    return len(actual.outputs) == len(expected.outputs) and all(map(all_equal, actual.outputs, expected.outputs))
