"""What a patch needs to know of a model family: where it builds its tables, and where it norms queries and keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..spec import NormKind, RopeSpec


@dataclass(frozen=True)
class FrameRows:
    """The grid of one forward pass: ``grid`` is (T, H, W) after patching.

    ``frames``, where given, are the frame positions of the video, each below T, instead of 0, 1, ..., T - 1.
    """

    grid: tuple[int, int, int]
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ModelAdapter:
    """One model family, declared.

    Attributes:
        model: dotted name of the transformer's class; matched exactly, subclasses are other models.
        rope_class, attention_class: names of the classes found at the paths below, matched exactly.
        rope: path of the module whose forward builds the dense tables.
        attention: pattern of the paths of the attention modules that rotate.
        norm: what their ``norm_q`` and ``norm_k`` average over.
        spec: from the rope module to the rotation it builds.
        frames: from the rope module and the arguments of its forward to the grid.
        probes: from the rope module and a device to inputs of its forward that show every row of its tables.
        rotary_argument: name and place of the rotary tensors among the arguments of the attention's forward.
    """

    model: str
    rope_class: str
    attention_class: str
    rope: str
    attention: str
    norm: NormKind
    spec: Callable[[Any], RopeSpec]
    frames: Callable[..., FrameRows]
    probes: Callable[[Any, torch.device], list[torch.Tensor]]
    rotary_argument: tuple[str, int] = ("rotary_emb", 3)

    @property
    def model_class(self) -> str:
        """The transformer's class name, without its module."""
        return self.model.rpartition(".")[2]

    def matches(self, model: torch.nn.Module) -> bool:
        """Whether ``model`` is of this family's class."""
        return f"{type(model).__module__}.{type(model).__qualname__}" == self.model

    def attentions(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        """Paths and modules of the attentions that rotate, in order."""
        pattern = re.compile(self.attention)
        return ((name, module) for name, module in model.named_modules() if pattern.fullmatch(name))
