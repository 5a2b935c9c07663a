"""Small models whose sequence or heads several ranks can share, and what tests of split models compare."""

from __future__ import annotations

import re
import unittest.mock
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_rope.hooks import rotating_norms
from zoo import Example, Noise, named

WORLD = 4


_FOUR_HEADS = {"num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    """An example whose heads and tokens 4 ranks can share evenly.

    Attributes:
        config: what is changed of the example's.
        shapes: inputs that are made shorter: dim and size, in pairs.
        inputs: inputs that are replaced.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: _FOUR_HEADS)
    shapes: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)


def _shapes(image: int, text: int, ids: int | None) -> dict[str, tuple[tuple[int, int], ...]]:
    """Lengths of both sequences, and of their position ids along the dim ``ids``."""
    shapes: dict[str, tuple[tuple[int, int], ...]]
    shapes = {"hidden_states": ((1, image),), "encoder_hidden_states": ((1, text),)}
    return shapes if ids is None else {**shapes, "img_ids": ((ids, image),), "txt_ids": ((ids, text),)}


_MASKED = {**_shapes(28, 4, None), "encoder_hidden_states_mask": ((1, 4),)}
# diffusers splits the mask, and then gives every rank all heads of it.
_LTX_SIZES = {"num_frames": 2, "height": 2, "width": 7, "encoder_attention_mask": None}
_LTX2_HEADS = {"num_attention_heads": 4, "cross_attention_dim": 80, "caption_channels": 16}
_LTX2_AUDIO = {"audio_num_attention_heads": 4, "audio_cross_attention_dim": 56}
_HELIOS_SIZES = {"hidden_states": ((3, 4), (4, 8)), "encoder_hidden_states": ((1, 4),)}
# Without the longest history, whose two tokens would not be shared evenly.
_HELIOS_SHAPES = _HELIOS_SIZES | {f"latents_history_{length}": ((3, 4), (4, 8)) for length in ("short", "mid")}
_NO_LONG_HISTORY = {"latents_history_long": None, "indices_latents_history_long": None}
CASES = {
    "wan": Case(),
    "chronoedit": Case({**_FOUR_HEADS, "image_dim": None}),
    "flux": Case(shapes=_shapes(28, 4, 0)),
    "flux2": Case(shapes=_shapes(28, 4, 1)),
    "qwen-image": Case(shapes=_MASKED, inputs={"img_shapes": [[(1, 4, 7)]] * 2}),
    "ltx-padded": Case({**_FOUR_HEADS, "cross_attention_dim": 80}, _MASKED, _LTX_SIZES),
    "ltx2-interleaved": Case(
        {**_LTX2_HEADS, **_LTX2_AUDIO}, _MASKED, {**_LTX_SIZES, "audio_encoder_attention_mask": None}
    ),
    "helios-plain": Case(shapes=_HELIOS_SIZES),
    "helios-history": Case(shapes=_HELIOS_SHAPES, inputs=_NO_LONG_HISTORY),
    "minimax-h3": Case(),
}


# Three heads on two ranks, or four on four, and numbers of tokens that these do not divide.
UNEVEN = {
    "wan": Case(shapes={"hidden_states": ((3, 6), (4, 10))}),
    "chronoedit": Case(shapes={"hidden_states": ((3, 6), (4, 10))}),
    "flux": Case({}),
    "flux-kontext": Case({}),
    "flux2": Case({}),
    "qwen-image-layered": Case({}, inputs={"encoder_hidden_states_mask": None}),
    "ltx-padded": Case({**_FOUR_HEADS, "cross_attention_dim": 80}, inputs={"encoder_attention_mask": None}),
    "helios-plain": Case(),
}


def example_of(name: str, even: bool = True) -> Example:
    """The example, changed as its case says."""
    example, case = named(name), (CASES if even else UNEVEN)[name]

    def inputs(model: Any, noise: Noise) -> dict[str, Any]:
        arguments = {**example.inputs(model, noise), **case.inputs}
        for key, cuts in case.shapes.items():
            for dim, size in cuts if key in arguments else ():
                arguments[key] = arguments[key].narrow(dim, 0, size).contiguous()
        return arguments

    return replace(example, config={**example.config, **case.config}, inputs=inputs)


def groups_of(degree: int) -> list[list[int]]:
    """Neighbouring ranks, ``degree`` of them in each group."""
    groups: list[list[int]] = torch.arange(WORLD).view(-1, degree).tolist()
    return groups


def ulysses(groups: list[list[int]], uneven: bool = False) -> Any:
    """A configuration that splits a sequence over each of ``groups``."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", torch.tensor(groups)[:, None], mesh_dim_names=("group", "ring", "ulysses"))
    return ContextParallelConfig(ulysses_degree=len(groups[0]), ulysses_anything=uneven, mesh=mesh)


def plan_of(model: Any) -> dict[str, Any]:
    """The model's plan, without the blocks that a small model lacks, and whole."""
    plan = {path: layer for path, layer in model._cp_plan.items() if not re.search(r"\.([2-9]|\d\d)\b", path)}
    if hasattr(model, "cross_attn_rope"):
        # That of LTX-2 forgets the tables with which video attends to sound.
        plan["cross_attn_rope"] = plan["rope"]
    return plan


def split_over_ranks(model: Any, groups: list[list[int]], uneven: bool = False) -> Mapping[str, Any]:
    """Enables Ulysses over each of ``groups``; returns the plan."""
    plan = plan_of(model)
    model.enable_parallelism(config=ulysses(groups, uneven), cp_plan=plan)
    return plan


def join(model: Any, plan: Mapping[str, Any]) -> None:
    """The opposite of :func:`split_over_ranks`."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    remove_context_parallel(model, plan)
    model._parallel_config = None
    for module in model.modules():
        if getattr(module, "processor", None) is not None:
            module.processor._parallel_config = None


def run(example: Example, model: Any, inputs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
    with torch.no_grad():
        output = example.run(model, example.inputs(model, Noise(torch.float32)) if inputs is None else inputs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, in units of the largest value."""
    pairs = zip(actual, expected, strict=True)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


@contextmanager
def counted_rotations() -> Iterator[list[int]]:
    """Tokens of what the norms rotate."""
    counts: list[int] = []
    real = rotating_norms._RotatingModule.__call__

    def rotated(self: Any, x: torch.Tensor) -> torch.Tensor:
        counts.append(x.shape[1])
        return real(self, x)

    with unittest.mock.patch.object(rotating_norms._RotatingModule, "__call__", rotated):
        yield counts


def wrapped(model: torch.nn.Module) -> dict[str, Any]:
    """By module, every forward in it or in its hooks."""
    return {
        path: [vars(module).get(name) for name in ("forward", "_old_forward")]
        + [vars(ref).copy() for ref in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ())]
        for path, module in model.named_modules()
    }
