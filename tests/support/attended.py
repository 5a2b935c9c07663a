"""What reaches the first attention of a model that rotates: queries and keys, without and with a patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.nn.attention import flex_attention
from torch.utils import _pytree as pytree

import dit_rope
from dit_rope import Rounding
from zoo import Example, Noise, tensors

Call = tuple[torch.Tensor, ...]


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Copies of the queries and keys of every attention in it, in order of the calls."""
    calls: list[Call] = []

    def recording(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def record(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append((query.clone(), key.clone()))
            return attend(query, key, *args, **kwargs)

        return record

    with (
        mock.patch.object(
            functional, "scaled_dot_product_attention", recording(functional.scaled_dot_product_attention)
        ),
        mock.patch.object(flex_attention, "flex_attention", recording(flex_attention.flex_attention)),
    ):
        yield calls


def attention_inputs(
    example: Example, dtype: torch.dtype, rounding: Rounding | None, device: str = "cpu"
) -> list[Call]:
    """The queries and keys of every attention of one forward pass; None is the unpatched model.

    A model that attends by other means than torch's function, or not at all, has its outputs in their place.
    """
    model = example.build(dtype).to(device)
    inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), example.inputs(model, Noise(dtype)))
    patched = nullcontext() if rounding is None else dit_rope.patch(model, rounding=rounding)
    with torch.no_grad(), recorded() as calls, patched:
        output = example.run(model, inputs)
    return calls or [tuple(tensors(output))]


class Difference:
    """How queries and keys of the first attention that rotates differ from those of the unpatched model.

    Attributes:
        share: of their elements.
        steps: the largest difference of two elements, in units in the last place of the largest in their head.
    """

    def __init__(self, unpatched: Call, patched: Call) -> None:
        pairs = list(zip(unpatched, patched, strict=True))
        different = sum(int((one != other).sum()) for one, other in pairs)
        self.share = different / sum(one.numel() for one, _ in pairs)
        self.steps = max(map(_steps, *zip(*pairs, strict=True)))


def _steps(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other, eps = one.double(), other.double(), torch.finfo(one.dtype).eps
    unit = eps * torch.exp2(one.abs().amax(-1, keepdim=True).clamp_min(1e-30).log2().floor())
    return float(((one - other).abs() / unit).max())


def differences(example: Example, dtype: torch.dtype, device: str = "cpu") -> dict[Rounding, Difference]:
    """Of each rounding: how the first attention that rotates differs from the unpatched model's.

    Everything before it is equal to the bit, so that it is the first that differs in some rounding.
    """
    unpatched = attention_inputs(example, dtype, None, device)
    patched = {rounding: attention_inputs(example, dtype, rounding, device) for rounding in Rounding}
    first = next((i for i, call in enumerate(unpatched) if not _same(call, patched[Rounding.FAST][i])), 0)
    return {rounding: Difference(unpatched[first], calls[first]) for rounding, calls in patched.items()}


def _same(one: Call, other: Call) -> bool:
    return all(map(torch.equal, one, other))
