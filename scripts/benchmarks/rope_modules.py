"""diffusers' own rope modules, as they are and with the memo that ``dit_rope.patch`` gives them.

Each belongs to a model with one layer, without weights, and is called as the model calls it in every forward pass.
Unpatched it builds its tables in every call; patched it builds them in the first call, and later calls find them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dit_rope.patching import patch
from dit_rope.tables.caches import cache_clear

from .random_models import EmptyOptions
from .results import Row
from .sections import Case, Settings, Wrong
from .table_building import cold, entry_bytes, repeated
from .timing import Timing, interleave

EVERY_PASS, FIRST_PASS, LATER_PASSES = "diffusers, every pass", "dit_rope, first pass", "dit_rope, later passes"
MODULE, MODULE_BYTES = "rope module", "bytes of a rope module"
HITS = 100


@dataclass(frozen=True)
class Family:
    """A model's rope module, and a call of it.

    Attributes:
        name: what the family is called.
        model: class of ``diffusers``.
        config: what differs from the defaults of that class, which are of a released model.
        size: what is generated, in words.
        tokens: rows of its table.
        inputs: from the device to the arguments of the call, at that size. Latents have no channels, since a rope
            module asks for no more than their size.
        rope: attribute of the model that holds the module.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    size: str
    tokens: int
    inputs: Callable[[str], tuple[Any, ...]]
    rope: str = field(default="rope", kw_only=True)

    def build(self, device: str) -> torch.nn.Module:
        """The model, with its weights on the meta device: rope modules have none."""
        import diffusers

        with torch.device(device), EmptyOptions(device="meta"):
            model: torch.nn.Module = getattr(diffusers, self.model)(**self.config).eval()
        return model


FAMILIES = (
    Family(
        "Wan",
        "WanTransformer3DModel",
        {"num_layers": 1},
        "720p, 81 frames",
        21 * 45 * 80,
        lambda device: (torch.empty(1, 0, 21, 90, 160, device=device),),
    ),
    Family(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 1, "num_single_layers": 1},
        "720p, 129 frames",
        33 * 45 * 80,
        lambda device: (torch.empty(1, 0, 33, 90, 160, device=device),),
    ),
    Family(
        "LTX",
        "LTXVideoTransformer3DModel",
        {"num_layers": 1},
        "512 x 768, 97 frames",
        13 * 16 * 24,
        lambda device: (torch.empty(1, 13 * 16 * 24, 0, device=device), 13, 16, 24, (8 / 25, 32.0, 32.0)),
    ),
    Family(
        "QwenImage",
        "QwenImageTransformer2DModel",
        {"num_layers": 1},
        "1328 x 1328",
        83 * 83 + 512,
        lambda device: ([(1, 83, 83)], torch.device(device), 512),
        rope="pos_embed",
    ),
    Family(
        "CogView4",
        "CogView4Transformer2DModel",
        {"num_layers": 1, "num_attention_heads": 32, "attention_head_dim": 128},
        "1024 x 1024",
        64 * 64,
        lambda device: (torch.empty(1, 0, 128, 128, device=device),),
    ),
    Family(
        "Cosmos",
        "CosmosTransformer3DModel",
        {"num_layers": 1},
        "704 x 1280, 121 frames",
        16 * 44 * 80,
        lambda device: (torch.empty(1, 0, 16, 88, 160, device=device), 24),
    ),
)


def cases(settings: Settings) -> Iterator[Case]:
    """Every family; in a quick run as well, since tables are small beside what else is measured."""
    for family in FAMILIES:
        yield Case(f"rope module of {family.name}", functools.partial(_rows, family, settings))


def _rows(family: Family, settings: Settings) -> list[Row]:
    model, twin = (family.build(settings.device) for _ in range(2))
    rope, patched = (getattr(model, family.rope) for model in (model, twin))
    inputs = family.inputs(settings.device)
    with patch(twin):
        cache_clear()
        unpatched, memoized = rope(*inputs), patched(*inputs)
        entry_size = entry_bytes()
        _check(family, model, unpatched, memoized)
        call = functools.partial(patched, *inputs)
        timings = interleave(
            {EVERY_PASS: functools.partial(rope, *inputs), FIRST_PASS: cold(call), LATER_PASSES: repeated(call, HITS)},
            settings.rounds,
        )
    timings[LATER_PASSES] = timings[LATER_PASSES].times(1 / HITS)
    dense = sum(leaf.nbytes for leaf in pytree.tree_leaves(unpatched) if isinstance(leaf, torch.Tensor))
    rows = [_row(family, MODULE, name, "ms", timing, timings[EVERY_PASS]) for name, timing in timings.items()]
    sizes = {EVERY_PASS: Timing(*3 * (dense,)), LATER_PASSES: Timing(*3 * (entry_size,))}
    return rows + [_row(family, MODULE_BYTES, name, "bytes", size, sizes[EVERY_PASS]) for name, size in sizes.items()]


def _check(family: Family, model: torch.nn.Module, unpatched: Any, memoized: Any) -> None:
    pairs = zip(pytree.tree_leaves(unpatched), pytree.tree_leaves(memoized), strict=True)
    if not all(torch.equal(expected, actual) for expected, actual in pairs):
        raise Wrong(f"the tables of {family.name} with the memo differ from its own")


def _row(family: Family, quantity: str, variant: str, unit: str, timing: Timing, unpatched: Timing) -> Row:
    return {
        "case": f"{family.name}, {family.size}",
        "tokens": family.tokens,
        "quantity": quantity,
        "variant": variant,
        "unit": unit,
        **vars(timing),
        "times_better": unpatched.median / timing.median,
    }
