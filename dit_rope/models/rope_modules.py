"""The tables that a model builds itself, built once and found again.

A key holds whatever decides the result: the arguments of the call, all that the code reads of its object, and the
modes of torch that change arithmetic. Numbers and tensors on the host count by value. A buffer on another device is
known as the tensor that it is, by its storage and by the writes that torch counts; any other tensor there is not known
at all, since to look at it would mean waiting for the device: what depends on it is built in every forward pass, as
without a patch.

Only code that is known (see ``known_code``) is memoized, and what it returns is what the model's own code returned.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from ..cache import capturing, in_mode, in_transform, stream_of
from ..spec import Grid, RopeSpec, Scalings
from ..tables import MODEL_TABLES, RopeTable, rope_table
from .adapter import EVERY, AxisForm, FrameRows, ModelTables
from .class_override import INSTALLED, Installed, Override, unpatched_class, unpatched_method
from .known_code import guard_of
from .packed_tables import PackedTable, know, know_axis_form

_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
# What torch and the libraries that wrap forwards keep on every module; none of it is read by code that builds tables.
_BOOKKEEPING = frozenset(vars(torch.nn.Module())) - {"training"} | {
    INSTALLED,
    "forward",
    "_hf_hook",
    "_old_forward",
    "_diffusers_hook",
    "_forward",
}
# Of arguments, and of what one object holds; more than that is not compared in every forward pass.
_MOST_BYTES = 8 * 2**20


class _Unkeyed(Exception):
    """Something that decides the tables cannot be told from something else, or not without waiting for a device."""


class _Token:
    """Stands for one patched object in keys; the entries go when it does, with the object that holds it."""

    def __init__(self) -> None:
        self.number = next(_token_numbers)
        weakref.finalize(self, _forget, self.number).atexit = False

    def __reduce__(self) -> tuple[type[_Token], tuple[()]]:
        return _Token, ()  # a copy is another object


_token_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class TableSettings:
    """How the tables of one object are built: as declared, scaled if asked, and keyed under ``token``.

    ``scaled`` and ``choose`` are the rotation that is asked for, once or by a function in every forward pass.
    """

    tables: ModelTables
    parameters: tuple[str, ...]
    spec: RopeSpec | None = None
    scaled: RopeSpec | None = None
    choose: Callable[[], Scalings] | None = None
    token: _Token = field(default_factory=_Token)

    @property
    def scales(self) -> bool:
        """Whether the tables are others than the model's own."""
        return self.scaled is not None or self.choose is not None


@dataclass(frozen=True)
class _Key:
    token: int
    parts: tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class _Built:
    """Tables as leaves and structure, so that each caller gets containers of its own, and the tensors of the key."""

    leaves: Sequence[Any]
    structure: pytree.TreeSpec
    held: Sequence[torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything the entry keeps in memory."""
        return [*(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)), *self.held]


class RopeOverride(Override):
    """The method of a rope module that builds tables."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """What the replaced method returns, in containers of the caller's own; its tensors are shared."""
        own = unpatched_method(self, type(self).method if isinstance(self, Override) else "forward")
        record: Installed | None = vars(self).get(INSTALLED)
        if record is None or not record.active:
            return own(*args, **kwargs)
        settings: TableSettings = record.settings
        if settings.scales:
            return _scaled(self, settings, args, kwargs)
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        return _memoized(self, settings, own, args, kwargs)


class MemoizedMethod:
    """A method of a model, memoized, which hangs on that model under the method's name, before its class's own.

    The model keeps its class, whose name its configuration stores. The model owns this object, and not the other way
    round; a copy or a pickle of the model has one of its own.
    """

    def __init__(self, model: torch.nn.Module, method: str, record: Installed) -> None:
        self.method = method
        self.record = record
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns, in containers of the caller's own; its tensors are shared."""
        model = self._model()
        if model is None:
            raise ReferenceError(f"{self.method} must be called while its model lives, got a call after its end")
        own = functools.partial(getattr(type(model), self.method), model)
        if torch.compiler.is_compiling() or not self.record.active:
            return own(*args, **kwargs)
        return _memoized(model, self.record.settings, own, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=weakref.ref(state["_model"]))


def why_not_memoized(target: Any, tables: ModelTables) -> str | None:
    """Why the tables of ``target`` are left to its own code; None where they are memoized."""
    cls = unpatched_class(target)
    guard = guard_of(cls, tables.method)
    if guard.unknown is not None:
        return guard.unknown
    if tables.path:
        builders = (tables.builder,) if isinstance(tables.builder, str) else tables.builder
        owner = guard.slot.rpartition(".")[0].rpartition(".")[2]
        if owner not in builders:
            return f"{owner} is not the module that it knows there"
    names = guard.methods - {tables.method}
    held = next((name for name in names if name in vars(target)), None)
    return None if held is None else f"{cls.__name__} holds a {held} of its own"


def _memoized(
    target: Any, settings: TableSettings, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What ``own``, a method of ``target``, returns, in containers of the caller's own."""
    tables = settings.tables
    if in_mode() or in_transform() or _capturing() or why_not_memoized(target, tables) is not None:
        return own(*args, **kwargs)
    held: list[torch.Tensor] = []
    try:
        parts = _parts(target, settings, args, kwargs, held)
    except _Unkeyed:
        with torch.inference_mode(False):
            result = own(*args, **kwargs)
        know([leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        return result
    live = () if tables.live is None else tables.live(target, *args, **kwargs)
    device = _device(args, kwargs)

    def build() -> _Built:
        # Put back, so that a miss leaves no more behind than a hit.
        written = {name: getattr(target, name) for name in tables.writes if hasattr(target, name)}
        result = own(*args, **kwargs)
        for name, value in written.items():
            setattr(target, name, value)
        leaves, structure = pytree.tree_flatten(result[len(live) :] if live else result)
        leaves = [_kept(leaf, device if tables.to_device else None) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        know(tensors)
        if tables.axes is not None and settings.spec is not None:
            _find_axis_form(target, tables.axes, settings.spec, tensors, args, kwargs)
        return _Built(leaves, structure, held)

    built = MODEL_TABLES.get(_Key(settings.token.number, (parts, stream_of(device))), device, build)
    assert isinstance(built, _Built)
    result = pytree.tree_unflatten(list(built.leaves), built.structure)
    return (*live, *result) if live else result


def _kept(leaf: Any, device: torch.device | None) -> Any:
    """A leaf as the cache keeps it: on ``device`` if one is named, and with a counter of its writes."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf if device is None else leaf.to(device)
    return leaf.clone() if leaf.is_inference() else leaf


def _find_axis_form(
    target: Any,
    axes: AxisForm,
    spec: RopeSpec,
    tensors: list[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Notes the axis form of the dense tables just built, if it expands to them bit for bit."""
    place = axes.frames(target, *args, **kwargs)
    if 0 in place.grid or tensors[0].device.type == "meta":
        return
    table = rope_table(spec, Grid(*place.grid), device=tensors[0].device, dtype=tensors[0].dtype)
    expanded = [_of_frames(x, place) for x in table.cos_sin(broadcast=True)]
    if all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(expanded, tensors, strict=True)):
        know_axis_form(tensors, functools.partial(_part_of, table, _positions(table, place)))


def _positions(table: RopeTable, place: FrameRows) -> torch.Tensor | None:
    """Rows of every token, where they are not those of a whole grid."""
    return None if place.frames is None else _of_frames(table.positions(), place)


def _part_of(table: RopeTable, positions: torch.Tensor | None, first: int, count: int) -> PackedTable:
    """``count`` tokens of a table from number ``first`` on, as kernels read them."""
    return PackedTable(
        table.rows,
        None if positions is None else positions[:, first : first + count],
        count,
        table.spec.pairs,
        table.spec.pairing,
        sizes=table.sizes,
        first_rows=table.first_rows,
        token_offset=first,
    )


def _scaled(target: Any, settings: TableSettings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cos and sin ``[1, S, 1, rotary_dim]`` of the scaling that is asked for, instead of the model's own."""
    if settings.choose is not None and torch.compiler.is_compiling():
        # What it returns is new at any call, and would be compiled in.
        return torch.compiler.disable(_scaled_tables)(target, settings, args, kwargs)
    return _scaled_tables(target, settings, args, kwargs)


def _scaled_tables(
    target: Any, settings: TableSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    axes = settings.tables.axes
    assert axes is not None
    assert settings.spec is not None
    spec = settings.scaled if settings.choose is None else settings.spec.with_scaling(settings.choose())
    assert spec is not None
    place = axes.frames(target, *args, **kwargs)
    latent = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    dtype = next(buffer.dtype for buffer in target.buffers())
    table = rope_table(spec, Grid(*place.grid), device=latent.device, dtype=dtype)
    cos, sin = table.cos_sin(broadcast=True)
    if place.frames is not None:
        cos, sin = _of_frames(cos, place), _of_frames(sin, place)
    if not (in_mode() or in_transform() or capturing(latent.device)):
        know_axis_form((cos, sin), functools.partial(_part_of, table, _positions(table, place)))
    return cos, sin


def _of_frames(x: torch.Tensor, place: FrameRows) -> torch.Tensor:
    """``[1, frames H W, ...]`` from ``[1, T H W, ...]`` of the whole grid, without a device sync."""
    if place.frames is None:
        return x
    by_frame = x.unflatten(1, (place.grid[0], -1)).unbind(1)
    return torch.cat([by_frame[frame] for frame in place.frames], dim=1)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the tables are wanted: the device this call names, or that of a tensor in it."""
    leaves = pytree.tree_leaves((args, kwargs))
    # Frame indices may lie on the host beside the name of the device.
    named = (leaf for leaf in leaves if isinstance(leaf, torch.device))
    tensors = (leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
    return next(itertools.chain(named, tensors), torch.device("cpu"))


def forget(settings: TableSettings) -> None:
    """Drops the entries of one patched object."""
    _forget(settings.token.number)


def _forget(token: int) -> None:
    MODEL_TABLES.discard(lambda key: isinstance(key, _Key) and key.token == token)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, which must own the tables that it reads."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _parts(
    target: Any, settings: TableSettings, args: tuple[Any, ...], kwargs: dict[str, Any], held: list[torch.Tensor]
) -> tuple[Hashable, ...]:
    tables = settings.tables
    if tables.to_device and torch.get_default_device().type != "cpu":
        raise _Unkeyed  # the cache builds outside of the default device, on which the model would have built
    parts: list[Hashable] = [_ambient(), len(args)]
    for name, value in (*zip(settings.parameters, args, strict=False), *kwargs.items()):
        by_shape = tables.by_shape == EVERY or name in tables.by_shape
        parts.append((name, _tree(value, _by_shape if by_shape else _by_value)))
    keep = functools.partial(_by_value_or_as_held, held)
    parts.append(_state(target, tables.writes, keep, parameters=bool(tables.path)))
    parts += [_state(getattr(target, name), (), keep, parameters=True) for name in tables.reads]
    return tuple(parts)


def _ambient() -> Hashable:
    """What changes the arithmetic of any code."""
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    )
    return autocast, torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()


def _state(
    target: Any, writes: tuple[str, ...], tensor: Callable[[torch.Tensor], Hashable], parameters: bool
) -> Hashable:
    """The attributes, the configuration, the buffers and parameters of the object that builds the tables.

    Of a whole model (without ``parameters``), whose weights decide nothing, these are the plain attributes and the
    configuration.
    """
    if not parameters:
        config = vars(target).get("_internal_dict")
        return (
            _attributes(target, writes, tensor, strict=False),
            None if config is None else _tree(dict(config), tensor),
        )
    if not isinstance(target, torch.nn.Module):
        return _attributes(target, writes, tensor, strict=True)
    parts: list[Hashable] = []
    for path, module in target.named_modules():
        parts.append((path, _attributes(module, writes, tensor, strict=True)))
        held: Mapping[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
        parts += [(name, None if x is None else tensor(x)) for name, x in held.items() if name not in writes]
    return tuple(parts)


def _attributes(
    target: Any, writes: tuple[str, ...], tensor: Callable[[torch.Tensor], Hashable], strict: bool
) -> Hashable:
    parts: list[Hashable] = []
    for name, value in vars(target).items():
        if name in _BOOKKEEPING or name in writes or isinstance(value, MemoizedMethod):
            continue
        try:
            parts.append((name, _tree(value, tensor)))
        except _Unkeyed:
            if strict:
                raise
    return tuple(parts)


def _tree(value: Any, tensor: Callable[[torch.Tensor], Hashable]) -> Hashable:
    """A hashable stand-in for ``value``, which tells whatever decides a table apart."""
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, _PLAIN):
        # Numbers that are equal and of different types may become tables of different dtypes.
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), *(_tree(part, tensor) for part in value))
    if isinstance(value, dict):
        return (dict, *((name, _tree(part, tensor)) for name, part in value.items()))
    raise _Unkeyed


def _by_shape(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device


def _by_value(tensor: torch.Tensor) -> Hashable:
    """The numbers in a tensor on the host."""
    if type(tensor) not in _TENSORS or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise _Unkeyed
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise _Unkeyed  # the tables belong to one backward pass
    if tensor.numel() * tensor.itemsize > _MOST_BYTES:
        raise _Unkeyed
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    values = plain.view(torch.uint8) if plain.ndim else plain.view(1).view(torch.uint8)
    return tensor.shape, tensor.dtype, values.numpy().tobytes()


class _Snapshot:
    """The values that a tensor had when it was last looked at, and a number for them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.values = tensor.detach().clone()
        self.number = next(_numbers)


_snapshots: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_numbers = itertools.count()
# Elements of a tensor whose bytes are a key of their own: comparing larger ones with a copy is faster than hashing.
_SMALL = 4096


def _by_snapshot(tensor: torch.Tensor) -> Hashable:
    """A number for the values of a larger tensor that stays, such as a buffer."""
    if type(tensor) not in _TENSORS or tensor.layout is not torch.strided:
        raise _Unkeyed
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise _Unkeyed
    with torch.no_grad():
        found: _Snapshot | None = _snapshots.get(tensor)
        if found is None or found.values.dtype != tensor.dtype or not torch.equal(found.values, tensor.detach()):
            found = _snapshots[tensor] = _Snapshot(tensor)
    return found.number


def _by_value_or_as_held(held: list[torch.Tensor], tensor: torch.Tensor) -> Hashable:
    """The numbers on the host; elsewhere the buffer itself, which the entry keeps with the memory that it has now."""
    if tensor.device.type == "cpu":
        return _by_value(tensor) if tensor.numel() < _SMALL else _by_snapshot(tensor)
    if type(tensor) is not torch.Tensor or tensor.is_inference() or tensor.is_meta or tensor.requires_grad:
        raise _Unkeyed
    alias = tensor.detach()
    held.append(alias)
    return id(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor._version
