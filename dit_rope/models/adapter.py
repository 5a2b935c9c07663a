"""What a patch needs to know of a model family: where its tables are built, and where queries and keys are turned."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..spec import RopeSpec
from .formats import Align, Format


class Layout(enum.Enum):
    """How a norm, or a projection, holds the tokens and heads that it returns."""

    BSC = "[B, S, H * D]"
    BSHD = "[B, S, H, D]"
    BHSD = "[B, H, S, D]"
    BHDS = "[B, H, D, S]"
    SHD = "[S, H, D]"

    __hash__ = object.__hash__


class Rounds(enum.Enum):
    """A dtype that a model rounds normed queries and keys to."""

    INPUT = "of the attention's input"
    PROJECTION = "of the projections, which autocast may make another"

    __hash__ = object.__hash__


@dataclass(frozen=True)
class FrameRows:
    """The grid of one forward pass: ``grid`` is (T, H, W) after patching.

    ``frames``, where given, are the frame positions of the video, each below T, instead of 0, 1, ..., T - 1.
    """

    grid: tuple[int, int, int]
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True)
class GridTables:
    """A rope module whose dense tables are replaced by axis tables of ours.

    Attributes:
        path: of the module in the model.
        builder: its class name, matched exactly.
        spec: from the module to the rotation it builds.
        frames: from the module and the arguments of its forward to the grid.
        probes: from the module and a device to inputs of its forward that show every row of its tables.
    """

    path: str
    builder: str
    spec: Callable[[Any], RopeSpec]
    frames: Callable[..., FrameRows]
    probes: Callable[[Any, torch.device], list[torch.Tensor]]


EVERY = ("*",)
"""All arguments."""


@dataclass(frozen=True)
class ModelTables:
    """A rope module, or an object or method that builds tables, whose own results are memoized.

    They are keyed on the arguments of the call, on the state of the module, and on what ``sources`` names. A tensor
    counts by identity and version, unless it is named ``by_shape``.

    Attributes:
        path: of the object in the model; empty for a method of the model's own.
        builder: its class name, or those it may have, matched exactly.
        method: what builds the tables.
        by_shape: names of arguments whose tensors count by shape, dtype and device, because the tables depend on
            nothing else in them, or on nothing but ``sources``; :data:`EVERY` for all of them.
        sources: arguments of the model's forward, by identity and version, from which it makes the arguments of
            ``method`` anew in every forward pass.
        source_shapes: arguments of the model's forward whose shapes decide those arguments.
        writes: names of attributes and buffers that ``method`` itself sets, which decide nothing, and are put back.
        to_device: the tables are built on the host and moved in every use; they are kept where the model computes.
        optional: configurations without this object exist.
        live: from the object and the arguments to the first results, which are data and no tables: made anew in every
            call, and not kept.
    """

    path: str
    builder: str | tuple[str, ...]
    method: str = "forward"
    by_shape: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    source_shapes: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    to_device: bool = False
    optional: bool = False
    live: Callable[..., tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Turned:
    """What one norm, or projection, of an attention module turns.

    Attributes:
        table: number of the table among those the attention module is given; the last one where there are fewer.
        align: which end its tokens and the table have in common.
        projection: what turns where the attention module has no such norm; its result is ``[B, S, H * D]``.
        repeats: the processor may call it any number of times, none included, and turns each result.
        still: the rest of a longer table are rows that turn nothing, so that no other norm has to take them.
    """

    table: int = 0
    align: Align = Align.START
    projection: str | None = None
    repeats: bool = False
    still: bool = False


QK: Mapping[str, Turned] = {"norm_q": Turned(projection="to_q"), "norm_k": Turned(projection="to_k")}
"""Queries and keys that share one table and start with it."""


@dataclass(frozen=True)
class Rebound:
    """A function that rotates, which a processor finds among the globals of its module.

    The processor gets a call of its own, of the same code, in which that name means ours: for processors that rotate
    whatever they are given.

    Attributes:
        function: its name.
        returns: how many of its first arguments are what it rotates and returns.
        tables: how many arguments follow, which the format takes: as one tuple, where they are several.
        owner: attribute of the attention module that holds the code; empty for the attention module itself.
        method: the method in which the function is called.
    """

    function: str
    returns: int = 1
    tables: int = 1
    owner: str = "processor"
    method: str = "__call__"


@dataclass(frozen=True)
class Rotations:
    """Attention modules whose rotation moves into their norms, or into their projections where there is no norm.

    Attributes:
        attention: pattern of their paths.
        attention_class: their class name, matched exactly.
        format: of the rotary tensors they are given; None for those of the adapter's :class:`GridTables`.
        layout: of what the modules in ``turned`` return.
        turned: by attribute name of the attention module; those it lacks, or has as None, give way to a projection.
        rotary: names of the rotary arguments of the attention's forward, None passed in their place.
        processors: class names of the processors known to skip the rotation then; with another one the rotation is
            left to it. Empty for attention modules without processors.
        rebound: for processors that do not skip it: the function that rotates, which leaves its arguments as they are
            where the norms have turned them.
        seam: what turns, where it is not a plain :class:`~dit_rope.models.seams.TurnSeam`: a subclass.
        processor: for processors that do not skip it, and rotate without calling a function: a seam in place of their
            call, which does not rotate while :func:`~dit_rope.models.seams.in_flight`.
        head_dim: from the attention module to the channels of a head, where not all of them turn and heads are not
            split yet.
        rounds: to which dtype the model rounds what the norms return, before it turns.
        result: dtype to which exact mode rounds what has turned, whatever the model's dtype.
        when: from the model and an attention module of such a path to whether it is meant, where classes or
            configurations decide what turns.
    """

    attention: str
    attention_class: str
    format: Format | None
    layout: Layout
    turned: Mapping[str, Turned] = field(default_factory=lambda: QK)
    rotary: tuple[str, ...] = ("image_rotary_emb",)
    processors: tuple[str, ...] = ()
    rebound: Rebound | None = None
    seam: type | None = None
    processor: type | None = None
    head_dim: Callable[[Any], int] | None = None
    rounds: Rounds | None = None
    result: torch.dtype | None = None
    when: Callable[[Any, Any], bool] | None = None


@dataclass(frozen=True)
class ModelAdapter:
    """One model class, declared.

    Attributes:
        model: dotted name of the transformer's class; matched exactly, subclasses are other models.
        tables: where tables are built.
        rotations: where queries and keys are turned.
        left_alone: what the patch does not touch, each with the reason, as reports say it.
    """

    model: str
    tables: tuple[GridTables | ModelTables, ...] = ()
    rotations: tuple[Rotations, ...] = ()
    left_alone: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        """The transformer's class name, without its module."""
        return self.model.rpartition(".")[2]

    def matches(self, cls: type) -> bool:
        """Whether ``cls`` is this class."""
        return f"{cls.__module__}.{cls.__qualname__}" == self.model
