"""Cache keys of the tables that a model builds. A key holds everything that decides them.

That is the arguments of the call, everything that the code reads, and torch's settings. Numbers and tensors on the host
count by value. A buffer on another device counts by its identity, storage and version counter. Any other tensor there
makes a key impossible: comparing its values would wait for the device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .adapter import EVERY, ModelTables
from .class_override import INSTALLED

_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
# Attributes of torch, and of libraries that wrap forwards. Code that builds tables does not read them.
_BOOKKEEPING = frozenset(vars(torch.nn.Module())) - {"training"} | {
    INSTALLED,
    "forward",
    "_hf_hook",
    "_old_forward",
    "_diffusers_hook",
    "_forward",
}
# The attribute in which diffusers keeps a model's configuration.
_CONFIG = "_internal_dict"
# A larger tensor on the host is not compared in every forward pass.
_MOST_BYTES = 8 * 2**20


class Unkeyed(Exception):
    """Something that decides the tables cannot be part of a key, or only after waiting for a device."""


def parts_of(
    target: Any,
    tables: ModelTables,
    parameters: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    held: list[torch.Tensor],
) -> tuple[Hashable, ...]:
    """The key of a call; ``parameters`` are the names of its positional arguments.

    Tensors that count by identity are appended to ``held``. The cache entry must keep them: otherwise their memory
    could become another tensor's, with the same key.

    Raises:
        Unkeyed: something that decides the result cannot be part of a key.
    """
    if tables.to_device and _default_device().type != "cpu":
        raise Unkeyed  # the method builds on the default device, and the cache expects tables on the host
    parts: list[Hashable] = [_ambient(), len(args)]
    for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
        keyed_by_shape = tables.keyed_by_shape == EVERY or name in tables.keyed_by_shape
        parts.append((name, _tree(value, _by_shape if keyed_by_shape else _by_value)))
    keep = functools.partial(_by_value_or_as_held, held)
    parts.append(_state(target, tables.sets, keep, parameters=bool(tables.path)))
    return tuple(parts)


def state_of(target: Any, tables: ModelTables, held: list[torch.Tensor]) -> tuple[Hashable, ...]:
    """The values of the attributes and buffers that the method sets: it may read what an earlier call set.

    Raises:
        Unkeyed: as :func:`parts_of`.
    """
    keep = functools.partial(_by_value_or_as_held, held)
    return tuple(_tree(getattr(target, name, None), keep) for name in tables.sets)


def _ambient() -> Hashable:
    """The settings of torch that change the results of any code."""
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    )
    return autocast, torch.get_default_dtype(), _default_device(), torch.get_float32_matmul_precision()


def _default_device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # torch 2.9, after set_default_device(None)
        return torch.device("cpu")


def _state(
    target: Any, writes: tuple[str, ...], tensor: Callable[[torch.Tensor], Hashable], parameters: bool
) -> Hashable:
    """The attributes, configuration, buffers and parameters of the object that builds the tables.

    For a whole model ``parameters`` is False: its weights decide nothing, so the key holds plain attributes and the
    configuration only.
    """
    if not parameters:
        config = vars(target).get(_CONFIG)
        return (
            _attributes(target, (*writes, _CONFIG), tensor, strict=False),
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
        if name in _BOOKKEEPING or name in writes:
            continue
        try:
            parts.append((name, _tree(value, tensor)))
        except Unkeyed:
            if strict:
                raise
    return tuple(parts)


def _tree(value: Any, tensor: Callable[[torch.Tensor], Hashable]) -> Hashable:
    """A hashable form of ``value``. It differs for two values if tables built from them may differ."""
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, _PLAIN):
        # Numbers that are equal and of different types may become tables of different dtypes.
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), *(_tree(item, tensor) for item in value))
    if isinstance(value, dict):
        return (dict, *((name, _tree(item, tensor)) for name, item in value.items()))
    raise Unkeyed


def _by_shape(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device


def _by_value(tensor: torch.Tensor) -> Hashable:
    """The numbers in a tensor on the host."""
    if type(tensor) not in _TENSORS or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise Unkeyed
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise Unkeyed  # the tables belong to one backward pass
    if tensor.numel() * tensor.itemsize > _MOST_BYTES:
        raise Unkeyed
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    values = plain.view(torch.uint8) if plain.ndim else plain.view(1).view(torch.uint8)
    return tensor.shape, tensor.dtype, values.numpy().tobytes()


class _Snapshot:
    """The values of a tensor when it was last compared, and a number that identifies them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.values = tensor.detach().clone()
        self.number = next(_numbers)


_snapshots: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_numbers = itertools.count()
# The bytes of tensors with fewer elements are the key. For larger ones a comparison with a copy is faster than hashing.
_SMALL = 4096


def _by_snapshot(tensor: torch.Tensor) -> Hashable:
    """A number that identifies the values of a large tensor that lives long, such as a buffer."""
    if type(tensor) not in _TENSORS or tensor.layout is not torch.strided:
        raise Unkeyed
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise Unkeyed
    with torch.no_grad():
        found: _Snapshot | None = _snapshots.get(tensor)
        if found is None or found.values.dtype != tensor.dtype or not torch.equal(found.values, tensor.detach()):
            found = _snapshots[tensor] = _Snapshot(tensor)
    return found.number


def _by_value_or_as_held(held: list[torch.Tensor], tensor: torch.Tensor) -> Hashable:
    """The values of a tensor on the host; elsewhere its identity, memory and version, and ``held`` gets an alias."""
    if tensor.device.type == "cpu":
        return _by_value(tensor) if tensor.numel() < _SMALL else _by_snapshot(tensor)
    if type(tensor) is not torch.Tensor or tensor.is_inference() or tensor.is_meta or tensor.requires_grad:
        raise Unkeyed
    alias = tensor.detach()
    held.append(alias)
    return id(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor._version
