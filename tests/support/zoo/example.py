"""Small random diffusers models with inputs for one forward pass of each, which tests and scripts share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.random_models import Noise, random_model


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor in the output of a model."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


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
        """A seeded random model, as :func:`benchmarks.random_models.random_model` makes it."""
        return random_model(self.model_class, {**self.config, **(self.released if released else {})}, dtype)

    def forward(self, model: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """One forward pass; ``changes`` replace inputs."""
        return self.run(model, {**self.inputs(model, Noise(dtype)), **changes})

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """One forward pass with these inputs, as a tuple."""
        return model(**{"return_dict": False, **inputs})
