"""Counts the operators that run within regions, and the bytes that they move.

An operator of aten that makes or writes a tensor is a kernel, one of ``dit_rope`` is one too; a view, an allocation, a
GEMM and the attention product are none. The bytes of a kernel are those of its arguments and results, each element
once: a broadcast or expanded table counts as it lies in memory. A destination that is overwritten is not read. Of a
table that operators of dit_rope gather from, they read at most what their tokens use. Parameters are left out, because
the few tokens of a small run do not outweigh them as those of a video do.

``torch.nn.RMSNorm`` is several operators on CPU; where the dtypes of data and weight agree it is counted as on CUDA,
one kernel that reads and writes once, and elsewhere operator by operator, as CUDA runs it then too.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "convolution"})
ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})
OVERWRITES = frozenset({"copy_", "fill_", "zero_"})


@dataclass
class Count:
    """What ran in one call of a module.

    Attributes:
        kernels, bytes: as the head of this file defines them.
        operators: how often each ran.
        query, key: elements of the arguments of the attention product.
        rotated: elements that each norm or projection returned.
        tables: bytes that operators of dit_rope read of each table.
        largest: elements of the largest tensor that they rotated.
    """

    kernels: int = 0
    bytes: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    query: int = 0
    key: int = 0
    rotated: Counter[str] = field(default_factory=Counter)
    tables: dict[tuple[int, ...], int] = field(default_factory=dict)
    largest: int = 0

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Counts one operator that has run."""
        namespace, _, name = func._schema.name.partition("::")
        if name in GEMMS or name in ALLOCATIONS or name.startswith("_scaled_dot_product"):
            return
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = {argument.name for argument in func._schema.arguments if _is_write(argument)}
        storages = {_storage(tensor) for tensor in _tensors(arguments)}
        outputs = [tensor for tensor in _tensors(result) if _storage(tensor) not in storages]
        changed = _tensors([arguments[name] for name in written if name in arguments])
        if not outputs and not changed:
            return
        overwritten = written if name in OVERWRITES else {a.name for a in func._schema.arguments if a.is_out}
        read = {key: value for key, value in arguments.items() if key not in overwritten}
        size = 0
        if namespace == "dit_rope":
            size = self._table(read.pop("rows"), arguments)
            read.pop("positions", None)
            self.largest = max(self.largest, *(x.numel() for x in arguments["xs"]))
        tensors = {(t.data_ptr(), t.shape, t.stride()): t for t in _tensors(read)}
        self.count(f"{namespace}::{name}", [*tensors.values(), *outputs, *changed], size)

    def count(self, name: str, moved: Iterable[torch.Tensor], more: int = 0) -> None:
        """Counts one kernel that reads or writes ``moved``, and ``more`` bytes."""
        self.kernels += 1
        self.operators[name] += 1
        self.bytes += more + sum(map(stored_bytes, moved))

    def attend(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Records the arguments of the attention product."""
        self.query += query.numel()
        self.key += key.numel()

    def _table(self, rows: torch.Tensor, arguments: dict[str, Any]) -> int:
        """Bytes of ``rows`` ``[2, R, P]`` and of positions that the tokens of one operator of dit_rope use."""
        positions = arguments.get("positions")
        batch = 1 if positions is None else positions.shape[0]
        heads = arguments["xs"][0].shape[2] if arguments.get("head_rows") else 1
        used = 2 * batch * arguments["count"] * heads * sum(arguments["pairs"]) * rows.itemsize
        size: int = min(stored_bytes(rows), used) + (0 if positions is None else stored_bytes(positions))
        start = rows.data_ptr() if positions is None else positions.data_ptr()
        self.tables[rows.data_ptr(), start, arguments["token_offset"], arguments["count"]] = size
        return size


class OperatorCounter(TorchDispatchMode):
    """Counts operators where a :meth:`region` is open, in the innermost one.

    ``only_watches`` tells the caches of dit_rope that this mode does not change tensors.
    """

    only_watches = True

    def __init__(self) -> None:
        super().__init__()
        self._regions: list[Count | None] = [None]
        self._functions = _WholeFunctions(self)

    def __enter__(self) -> OperatorCounter:
        self._functions.__enter__()
        super().__enter__()
        # It compiles itself, which no mode may watch.
        self._flex_attention = flex_attention.flex_attention
        flex_attention.flex_attention = self._instead_of_flex  # type: ignore[assignment]
        return self

    def __exit__(self, *error: Any) -> None:
        flex_attention.flex_attention = self._flex_attention
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def _instead_of_flex(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Zeros of the shape of an attention product, which counts as one."""
        if self.current is not None:
            self.current.attend(query, key)
        with self.region(None):
            return query.new_zeros((*query.shape[:-1], value.shape[-1]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the operator, and counts it; operators that an operator of dit_rope calls are not counted."""
        with self.region(None):
            result = func(*args, **(kwargs or {}))
        if self.current is not None:
            self.current.add(func, args, kwargs or {}, result)
        return result

    @property
    def current(self) -> Count | None:
        """Where operators count now."""
        return self._regions[-1]

    @contextlib.contextmanager
    def region(self, count: Count | None) -> Iterator[None]:
        """Until it ends, operators add to ``count``, or to nothing."""
        self._regions.append(count)
        try:
            yield
        finally:
            self._regions.pop()


class _WholeFunctions(TorchFunctionMode):
    """Sees functions that are one kernel on CUDA, or not counted, before they are decomposed."""

    only_watches = True

    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, count = kwargs or {}, self.counter.current
        product = func is torch.nn.functional.scaled_dot_product_attention
        norm = func in (torch.rms_norm, torch.nn.functional.rms_norm) and dtypes_agree(args, kwargs)
        if count is None or not (product or norm):
            return func(*args, **kwargs)
        with self.counter.region(None):
            result = func(*args, **kwargs)
        operands: list[Any] = [*args, *kwargs.values()]
        first, second = operands[:2]
        if norm:
            count.count("aten::_fused_rms_norm", [first, result])
        else:
            count.attend(first, second)
        return result


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of ``tensor`` as it lies in memory: none for a parameter, and an expanded dim is one element."""
    if isinstance(tensor, torch.nn.Parameter) or tensor.numel() == 0:
        return 0
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.itemsize * functools.reduce(int.__mul__, sizes, 1)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def dtypes_agree(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all tensors among the arguments have one dtype."""
    return len({tensor.dtype for tensor in _tensors((args, kwargs))}) == 1
