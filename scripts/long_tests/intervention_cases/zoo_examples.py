"""Every example model: those of tests/support/zoo, and the Wan family's, with inputs that can be made again."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SUPPORT = str(Path(__file__).resolve().parents[3] / "tests" / "support")
if _SUPPORT not in sys.path:
    sys.path.insert(0, _SUPPORT)


@dataclass(frozen=True)
class _Recorder:
    """Stands for a model, and keeps what it is called with; looks like one to :func:`wan_models.forward`."""

    _orig_mod: Any

    @property
    def config(self) -> Any:
        return self._orig_mod.config

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"hidden_states": hidden_states, **kwargs}]


@dataclass(frozen=True)
class AnyExample:
    """An example of either kind, with one interface."""

    name: str
    zoo: Any = None

    def build(self, dtype: torch.dtype) -> Any:
        """The same seeded model at every call."""
        if self.zoo is not None:
            return self.zoo.build(dtype)
        model = importlib.import_module("wan_models").build(self.name, dtype)
        return model.double() if dtype == torch.float64 else model

    def noise(self, dtype: torch.dtype, seed: int) -> Any:
        """Seeded inputs."""
        return importlib.import_module("zoo").Noise(dtype, seed)

    def inputs(self, model: Any, noise: Any) -> dict[str, Any]:
        """Arguments of one forward pass."""
        if self.zoo is not None:
            return self.zoo.inputs(model, noise)
        wan_models = importlib.import_module("wan_models")
        given = wan_models.forward(_Recorder(model), noise.dtype, frames=2 if self.name == "chronoedit" else 3)
        seed = noise.generator.initial_seed()
        shift = 0 if seed == 1 else 0.25 * noise(*given["hidden_states"].shape)
        return {**given, "hidden_states": given["hidden_states"] + shift}

    def run(self, callee: Any, inputs: Mapping[str, Any]) -> Any:
        """One forward pass."""
        return callee(**{"return_dict": False, **inputs}) if self.zoo is None else self.zoo.run(callee, inputs)


@functools.cache
def examples() -> tuple[AnyExample, ...]:
    """The Wan family's, then all of the zoo."""
    wan_models, zoo = importlib.import_module("wan_models"), importlib.import_module("zoo")
    return (*map(AnyExample, wan_models.MODELS), *(AnyExample(one.name, one) for one in zoo.EXAMPLES))


def named(name: str) -> AnyExample:
    """The example of that name."""
    return next(example for example in examples() if example.name == name)
