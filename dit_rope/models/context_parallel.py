"""What diffusers' context parallelism does to a module's arguments, as the hooks that it puts there say.

Its hooks wrap a module's forward. Ours are torch's own, and run before that: they see the arguments of every rank
whole, and have to know which part this rank keeps. Nothing here calls diffusers or asks another rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_SPLIT_HOOK = "ContextParallelSplitHook"


@dataclass(frozen=True)
class Part:
    """The part of a tensor that one of ``world`` ranks keeps.

    Attributes:
        name: of the argument, for messages.
        rank, world: whose part of how many.
        dim: which is split.
        dims: how many dims a tensor must have to be split; None for any number.
        uneven: the first parts may be longer by one; else all are equal.
    """

    name: str
    rank: int
    world: int
    dim: int
    dims: int | None
    uneven: bool

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of ``whole``, a view.

        Raises:
            ValueError: the dim cannot be split so.
        """
        if self.dims is not None and whole.ndim != self.dims:
            return whole
        size = whole.shape[self.dim]
        if size < self.world if self.uneven else size % self.world:
            raise ValueError(
                f"{self.name} must have {'at least' if self.uneven else 'a multiple of'} {self.world} rows on dim "
                f"{self.dim} to be split over {self.world} ranks, got {size} of {list(whole.shape)} on rank {self.rank}"
            )
        return whole.tensor_split(self.world, dim=self.dim)[self.rank]


@dataclass(frozen=True)
class Split:
    """The parts of one argument: of a tensor, or one for each tensor of a tuple."""

    parts: tuple[Part, ...]

    def of(self, whole: Any) -> Any:
        """The parts of ``whole``, in a tuple where it is one."""
        if isinstance(whole, torch.Tensor):
            return self.parts[0].of(whole)
        return tuple(part.of(each) for part, each in zip(self.parts, whole, strict=True))


def part_of(whole: Any, split: Split | None) -> Any:
    """The part of ``whole`` that ``split`` keeps; all of it without one."""
    return whole if split is None else split.of(whole)


def split_of(module: torch.nn.Module, name: str) -> Split | None:
    """How the argument ``name`` of ``module`` is split before its forward runs; None where it is not."""
    for hook in _split_hooks(module):
        declared = hook.metadata.get(name)
        if declared is None:
            continue
        each = declared if isinstance(declared, (list, tuple)) else (declared,)
        rank, world = _place(hook)
        uneven = hook.parallel_config.ulysses_anything or hook.parallel_config.ring_anything
        return Split(tuple(Part(name, rank, world, one.split_dim, one.expected_dims, uneven) for one in each))
    return None


def splits_outputs(module: torch.nn.Module) -> bool:
    """Whether what ``module`` returns is split over ranks."""
    return any(isinstance(name, int) for hook in _split_hooks(module) for name in hook.metadata)


def place(module: torch.nn.Module) -> Hashable:
    """Tells apart every way in which the arguments of ``module`` are split, and every rank of each.

    One process may enable, take out and enable again, with other ranks, while the tensors that it passes stay.
    """
    return tuple((weakref.ref(hook), *_place(hook)) for hook in _split_hooks(module))


def _split_hooks(module: torch.nn.Module) -> Iterator[Any]:
    registry = vars(module).get("_diffusers_hook")
    if registry is not None:
        yield from (hook for hook in registry.hooks.values() if type(hook).__name__ == _SPLIT_HOOK)


def _place(hook: Any) -> tuple[int, int]:
    mesh = hook.parallel_config._flattened_mesh
    return torch.distributed.get_rank(mesh.get_group()), mesh.size()
