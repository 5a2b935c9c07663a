"""What a patch needs to know of a model family: where its tables are built, and where queries and keys are rotated."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..spec import RopeSpec
from .formats import Format
from .packed_tables import Align


class Layout(enum.Enum):
    """How a norm, or a projection, holds the tokens and heads that it returns."""

    BSC = "[B, S, H * D]"
    BSHD = "[B, S, H, D]"
    BHSD = "[B, H, S, D]"
    BHDS = "[B, H, D, S]"
    SHD = "[S, H, D]"

    __hash__ = object.__hash__


class CastTo(enum.Enum):
    """A dtype that a model rounds normed queries and keys to."""

    INPUT = "of the attention's input"
    PROJECTION = "of the projections, which autocast may make another"

    __hash__ = object.__hash__


@dataclass(frozen=True)
class ForwardGrid:
    """The grid of one forward pass: ``grid`` is (T, H, W) after patching.

    ``frames``, where given, are the frame positions of the video, each below T, instead of 0, 1, ..., T - 1.
    """

    grid: tuple[int, int, int]
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AxisTables:
    """Tables ``[1, S, 1, D]`` of a grid, of which kernels read one small array per axis instead of a row per token.

    Attributes:
        spec: from the module that builds the tables to the rotation it builds.
        frames: from that module and the arguments of its forward to the grid.
    """

    spec: Callable[[Any], RopeSpec]
    frames: Callable[..., ForwardGrid]


EVERY = ("*",)
"""All arguments."""


@dataclass(frozen=True)
class ModelTables:
    """A rope module, or a method of a model, that builds tables, whose own results are memoized.

    They are keyed on the arguments of the call and on all that the code reads: its object's attributes, buffers and
    configuration. Tensors count by value where that needs no wait for a device. Where it would, tables that depend on
    the values of an argument are built in every call, as the model does without a patch.

    Attributes:
        path: of the object in the model; empty for a method of the model's own.
        builder: its class name, or those it may have, as documents name it.
        method: what builds the tables.
        keyed_by_shape: names of arguments whose tensors count by shape, dtype and device, because the tables depend on
            nothing else in them; :data:`EVERY` for all of them.
        reads: names of modules of the model that a method of the model reads.
        sets: names of attributes and buffers that ``method`` itself sets, which decide nothing, and are put back.
        to_device: the tables are built on the host and moved in every use; they are kept where the model computes.
        optional: configurations without this object exist.
        not_cached: from the object and the arguments to the first results, which are data and no tables: made in every
            call, and not kept.
        axes: the grid that the tables are of, whose axes kernels read; without it they read a row per token.
    """

    path: str
    builder: str | tuple[str, ...]
    method: str = "forward"
    keyed_by_shape: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    to_device: bool = False
    optional: bool = False
    not_cached: Callable[..., tuple[Any, ...]] | None = None
    axes: AxisTables | None = None


@dataclass(frozen=True)
class Tokens:
    """How many tokens one table has rows for, as arguments of the attention tell it.

    Attributes:
        names: of arguments ``[B, S, C]`` (``[S, C]`` in layout SHD); one that is None has no tokens.
        first_of: the first of them that is given counts, instead of their sum.
        at_least: the table may have more rows; the rotation takes the end of it.
        optional: without any of these arguments the table is not used, and may have any number of rows.
    """

    names: tuple[str, ...] = ("hidden_states",)
    first_of: bool = False
    at_least: bool = False
    optional: bool = False

    def fit(self, arguments: Mapping[str, Any], dim: int, rows: int) -> bool:
        """Whether a table of ``rows`` rows belongs to ``arguments``, whose tokens stand on ``dim``."""
        given = [arguments[name] for name in self.names if arguments.get(name) is not None]
        if not given:
            return self.optional
        if not all(isinstance(x, torch.Tensor) and x.ndim == 2 + dim for x in given):
            return False
        counts = [x.shape[dim] for x in given]
        count = counts[0] if self.first_of else sum(counts)
        return bool(0 < count <= rows if self.at_least else 0 < count == rows)


@dataclass(frozen=True)
class NormRotation:
    """How the result of one norm, or projection, of an attention module rotates.

    Attributes:
        table: number of the table among those the attention module is given; the last one where there are fewer.
        align: which end its tokens and the table have in common.
        projection: what rotates where the attention module has no such norm; its result is ``[B, S, H * D]``.
        repeats: the processor may call it any number of times, none included, and rotates each result.
        rest_is_identity: the rest of a longer table must be rows that rotate nothing: no other norm takes them.
        only_with: the submodule without which an attention module does not need this norm; None where it always does.
    """

    table: int = 0
    align: Align = Align.START
    projection: str | None = None
    repeats: bool = False
    rest_is_identity: bool = False
    only_with: str | None = None


QK: Mapping[str, NormRotation] = {"norm_q": NormRotation(projection="to_q"), "norm_k": NormRotation(projection="to_k")}
"""Queries and keys that share one table and start with it."""


@dataclass(frozen=True)
class ReplacedFunction:
    """A function that rotates, which a processor finds among the globals of its module.

    The processor's code runs with that one name bound to something else: for processors that rotate whatever they are
    given.

    Attributes:
        name: its name.
        returns: how many of its first arguments are what it rotates and returns.
        tables: how many arguments follow, which the format takes: as one tuple, where they are several.
    """

    name: str
    returns: int = 1
    tables: int = 1


@dataclass(frozen=True)
class AttentionRotation:
    """Attention modules whose rotation moves into their norms, or into their projections where there is no norm.

    Attributes:
        attention: pattern of their paths.
        attention_class: their class name, as documents name it.
        format: of the rotary tensors they are given.
        layout: of what the modules in ``rotated`` return.
        norms: by attribute name of the attention module; those it lacks, or has as None, give way to a projection.
        rotary: names of the rotary arguments of the processor, or of the attention's forward where there is none.
        covers: which tokens each of the tables has rows for; the last one where there are more tables.
        later_default_to_first: a later rotary argument that is None means the first one.
        processors: class names of the processors the declaration was written for; empty for attention modules that
            attend in their own forward.
        may_skip: a call may do without queries and keys, and so without all of these norms.
        replaced_function: for code that does not skip a rotation of None: the function that rotates. It returns its
            arguments as they are where the norms have rotated them.
        unrotated: for code that does not skip it, and rotates without calling a function: the same attention without
            the rotation, from the processor, its method, the attention module and the other arguments.
        rotate: from what a projection returned, the table and a function that rotates heads, to its rotation, where
            that is more than one rotation of all heads.
        head_dim: from the attention module to the channels of a head, where not all of them rotate and heads are not
            split yet.
        partial: the tables may be narrower than the heads, whose other channels do not rotate.
        cast_to: to which dtype the model rounds what the norms return, before it rotates.
        result: dtype to which exact mode rounds what has been rotated, whatever the model's dtype.
        when: from the model and an attention module of such a path to whether it is meant, where classes or
            configurations decide what rotates.
    """

    attention: str
    attention_class: str
    format: Format
    layout: Layout
    norms: Mapping[str, NormRotation] = field(default_factory=lambda: QK)
    rotary: tuple[str, ...] = ("image_rotary_emb",)
    covers: tuple[Tokens, ...] = (Tokens(),)
    later_default_to_first: bool = False
    processors: tuple[str, ...] = ()
    may_skip: bool = False
    replaced_function: ReplacedFunction | None = None
    unrotated: Callable[..., Any] | None = None
    rotate: Callable[..., torch.Tensor] | None = None
    head_dim: Callable[[Any], int] | None = None
    partial: bool = False
    cast_to: CastTo | None = None
    result: torch.dtype | None = None
    when: Callable[[Any, Any], bool] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionRotation:
        return self  # a copy of a patched model is told of the same declaration


@dataclass(frozen=True)
class ModelAdapter:
    """One model class, declared.

    Attributes:
        model: dotted name of the transformer's class; classes that derive from it are patched as it is.
        tables: where tables are built.
        rotations: where queries and keys are rotated.
        not_patched: what the patch does not touch, each with the reason, as reports say it.
    """

    model: str
    tables: tuple[ModelTables, ...] = ()
    rotations: tuple[AttentionRotation, ...] = ()
    not_patched: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        """The transformer's class name, without its module."""
        return self.model.rpartition(".")[2]

    def matches(self, cls: type) -> bool:
        """Whether ``cls`` is this class."""
        return f"{cls.__module__}.{cls.__qualname__}" == self.model
