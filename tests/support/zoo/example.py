"""Small random diffusers models with inputs for one forward pass of each, which tests and scripts share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor in the output of a model."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


class Noise:
    """Seeded inputs in one dtype; ``noise(2, 3)`` is a normal ``[2, 3]`` tensor."""

    def __init__(self, dtype: torch.dtype, seed: int = 1) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)


@dataclass(frozen=True)
class Example:
    """One class of transformer in one configuration.

    Attributes:
        name: unique, as test ids show it.
        model: dotted name of the class.
        config: of the smallest model that runs everything its rotation meets.
        inputs: from the built model and :class:`Noise` to keyword arguments of its forward. Sizes follow from
            ``model.config``, so that the same function feeds the model at released width.
        released: what ``config`` becomes with ``{**config, **released}``: head count, head dim and widths of the
            released checkpoint, one layer of each kind.
        trains: whether a backward pass runs.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    inputs: Callable[[Any, Noise], dict[str, Any]]
    released: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True

    @property
    def model_class(self) -> type[torch.nn.Module]:
        """The class itself."""
        module, _, name = self.model.rpartition(".")
        cls: type[torch.nn.Module] = getattr(importlib.import_module(module), name)
        return cls

    def build(self, dtype: torch.dtype = torch.float32, released: bool = False) -> torch.nn.Module:
        """A seeded random model as ``from_pretrained(torch_dtype=dtype)`` gives it: parts kept in float32 stay so.

        Norm weights are not ones, nor biases zeros, so that one that is left out or swapped shows.
        """
        torch.manual_seed(0)
        model = self.model_class(**{**self.config, **(self.released if released else {})}).eval()
        kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.rand(parameter.shape, generator=generator).to(parameter.dtype) - 0.5)
                elif not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
                if parameter.is_floating_point() and not any(part in kept for part in path.split(".")):
                    parameter.data = parameter.data.to(dtype)
            for path, module in model.named_modules():
                for name in module._buffers.keys() - module._non_persistent_buffers_set:
                    buffer = module._buffers[name]
                    if (
                        buffer is not None
                        and buffer.is_floating_point()
                        and not any(p in kept for p in path.split("."))
                    ):
                        module._buffers[name] = buffer.to(dtype)
        return model

    def forward(self, model: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """One forward pass; ``changes`` replace inputs."""
        return self.run(model, {**self.inputs(model, Noise(dtype)), **changes})

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """One forward pass with these inputs, as a tuple."""
        return model(**{"return_dict": False, **inputs})
