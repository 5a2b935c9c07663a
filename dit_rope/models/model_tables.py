"""The tables that a model builds itself, built once and found again.

A key holds whatever decides the result: the arguments of the call, the state of the object that builds, autocast. A
tensor is told from another by where its memory lies, how it is laid out and how often it was written to, which costs
no device sync; its entry holds it, so that its memory cannot become another tensor's. Tensors that do not count their
writes (those of inference mode) are never keys. Writes through raw pointers, ``.data`` or numpy views are not counted,
and not seen.

Some models make the arguments of their rope anew in every forward pass, out of tensors that stay the same. There the
arguments of the model's own forward are the key, which a pre-hook of the model remembers for the time of the call, and
with them this process's place among those that each take a part of them.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..cache import in_mode, stream_of
from ..tables import MODEL_TABLES
from .adapter import EVERY, ModelTables
from .context_parallel import place
from .swapping import SETTINGS, Seam, unpatched_method

_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


class _Unkeyed(Exception):
    """Something that decides the tables cannot be told from something else."""


@dataclass
class _Call:
    """The forward pass of a patched model that runs in this thread; its arguments may be split at ``place``."""

    arguments: Mapping[str, Any]
    place: Hashable
    before: _Call | None
    calls: dict[object, int] = field(default_factory=dict)

    def number(self, token: object) -> int:
        """How often ``token`` asked before: a rope module may run several times in one forward pass."""
        number = self.calls[token] = self.calls.get(token, -1) + 1
        return number


class _Running(threading.local):
    call: _Call | None = None


_running = _Running()


@dataclass(frozen=True)
class RememberArguments:
    """Forward pre-hook of a model: what it was called with, for the keys of its tables; ``names`` of its parameters."""

    names: tuple[str, ...]

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remembers; changes nothing."""
        if not torch.compiler.is_compiling():
            arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
            _running.call = _Call(arguments, place(module), _running.call)


@dataclass(frozen=True)
class ForgetArguments:
    """Forward hook of a model, run after errors too."""

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forgets the arguments of the call that ends."""
        if not torch.compiler.is_compiling() and _running.call is not None:
            _running.call = _running.call.before


@dataclass(frozen=True, eq=False)
class _Token:
    """Stands for one patched object in keys, without holding it."""


@dataclass(frozen=True)
class MemoSettings:
    """What the tables of one object depend on, and the names of the parameters of the replaced method."""

    tables: ModelTables
    parameters: tuple[str, ...]
    token: _Token = field(default_factory=_Token)


@dataclass(frozen=True)
class _Key:
    token: _Token
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


class MemoSeam(Seam):
    """The model's own tables, from the cache."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """What the replaced method returns, in containers of the caller's own; its tensors are shared."""
        settings: MemoSettings | None = vars(self).get(SETTINGS)
        own = unpatched_method(self)
        return own(*args, **kwargs) if settings is None else _memoized(self, settings, own, args, kwargs)


class MethodMemo:
    """A method of a model, memoized, which hangs on that model under the method's name, before its class's own.

    The model keeps its class, whose name its configuration stores. The model owns this object, and not the other way
    round; a copy or a pickle of the model has one of its own.
    """

    def __init__(self, model: torch.nn.Module, method: str, settings: MemoSettings) -> None:
        self.method = method
        self.settings = settings
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns, in containers of the caller's own; its tensors are shared."""
        model = self._model()
        if model is None:
            raise ReferenceError(f"{self.method} must be called while its model lives, got a call after its end")
        own = functools.partial(getattr(type(model), self.method), model)
        return _memoized(model, self.settings, own, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=weakref.ref(state["_model"]))


def _memoized(
    target: Any, settings: MemoSettings, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What ``own``, a method of ``target``, returns, in containers of the caller's own."""
    if in_mode() or _capturing():
        return own(*args, **kwargs)
    held: list[torch.Tensor] = []
    try:
        parts = _parts(target, settings, args, kwargs, held)
    except _Unkeyed:
        with torch.inference_mode(False):
            return own(*args, **kwargs)
    live = () if settings.tables.live is None else settings.tables.live(target, *args, **kwargs)
    device = _device(args, kwargs)
    key = _Key(settings.token, (parts, stream_of(device)))

    def build() -> _Built:
        # Put back, so that a miss leaves no more behind than a hit.
        written = {name: getattr(target, name) for name in settings.tables.writes if hasattr(target, name)}
        result = own(*args, **kwargs)
        for name, value in written.items():
            setattr(target, name, value)
        leaves, structure = pytree.tree_flatten(result[len(live) :] if live else result)
        if settings.tables.to_device:
            leaves = [leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return _Built(leaves, structure, held)

    built = MODEL_TABLES.get(key, device, build)
    assert isinstance(built, _Built)
    tables = pytree.tree_unflatten(list(built.leaves), built.structure)
    return (*live, *tables) if live else tables


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the model computes: the device this call names, or that of a tensor in it or in the model's forward."""
    around = _running.call.arguments if _running.call is not None else {}
    leaves = pytree.tree_leaves((args, kwargs, dict(around)))
    # Frame indices may lie on the host beside the name of the device.
    named = (leaf for leaf in leaves if isinstance(leaf, torch.device))
    tensors = (leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
    return next(itertools.chain(named, tensors), torch.device("cpu"))


def forget(token: _Token) -> None:
    """Drops the entries of one patched object."""
    MODEL_TABLES.discard(lambda key: isinstance(key, _Key) and key.token is token)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, which must own the tables that it reads."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _parts(
    target: Any, settings: MemoSettings, args: tuple[Any, ...], kwargs: dict[str, Any], held: list[torch.Tensor]
) -> tuple[Hashable, ...]:
    if settings.tables.to_device and torch.get_default_device().type != "cpu":
        raise _Unkeyed  # the cache builds outside of the default device, on which the model would have built
    parts: list[Hashable] = [_ambient(), len(args)]
    for name, value in (*zip(settings.parameters, args, strict=False), *kwargs.items()):
        parts.append((name, _tree(value, settings.tables.by_shape == EVERY or name in settings.tables.by_shape, held)))
    if settings.tables.sources or settings.tables.source_shapes:
        call = _running.call
        if call is None:
            raise _Unkeyed
        parts += [call.place, call.number(settings.token)]
        parts += [_tree(call.arguments.get(name), False, held) for name in settings.tables.sources]
        parts += [_tree(call.arguments.get(name), True, held) for name in settings.tables.source_shapes]
    parts.append(_state(target, settings, held))
    return tuple(parts)


def _ambient() -> Hashable:
    """What changes the arithmetic of any code."""
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    )
    return autocast, torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()


def _state(target: Any, settings: MemoSettings, held: list[torch.Tensor]) -> Hashable:
    """The tensors and the plain attributes of the object that builds the tables."""
    parts = {name: value for name, value in vars(target).items() if _decides(value)}
    # Of a whole model the weights decide nothing.
    if settings.tables.path and isinstance(target, torch.nn.Module):
        parts |= itertools.chain(target.named_parameters(), target.named_buffers())
    ours = (SETTINGS, *settings.tables.writes)
    return tuple((name, _tree(value, False, held)) for name, value in parts.items() if name not in ours)


def _decides(value: object) -> bool:
    """Whether an attribute is a number, a word, a tensor or a list of such, rather than torch's own bookkeeping."""
    if isinstance(value, (tuple, list)):
        return all(map(_decides, value))
    return isinstance(value, (int, float, str, torch.Tensor))


def _tree(value: Any, by_shape: bool, held: list[torch.Tensor]) -> Hashable:
    """A hashable stand-in for ``value``, which tells whatever decides a table apart."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.dtype, value.device) if by_shape else _identity(value, held)
    if isinstance(value, _PLAIN):
        # Numbers that are equal and of different types may become tables of different dtypes.
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), *(_tree(part, by_shape, held) for part in value))
    if isinstance(value, dict):
        return (dict, *((name, _tree(part, by_shape, held)) for name, part in value.items()))
    raise _Unkeyed


def _identity(tensor: torch.Tensor, held: list[torch.Tensor]) -> Hashable:
    if type(tensor) not in _TENSORS or tensor.is_inference() or tensor.is_meta:
        raise _Unkeyed
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise _Unkeyed  # the tables belong to one backward pass
    held.append(tensor)
    layout = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return (*layout, tensor.is_conj(), tensor.is_neg(), tensor._version)
