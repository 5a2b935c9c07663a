"""Counts the bytes that the results of operators hold at once, by watching every operator; nothing is estimated.

A result counts from the operator that makes it until nobody holds its memory any more. Views share the memory of what
they are views of. What was there before, such as weights and inputs, does not count. An operator of dit_rope, the
attention product and ``rms_norm``, which is one kernel on CUDA, count by their results alone: their kernels have no
scratch in global memory.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .operator_counter import dtypes_agree


class LiveMemory(TorchDispatchMode):
    """The most bytes that results of operators held at once while this mode was on.

    ``only_watches`` tells the caches of dit_rope that this mode does not change tensors.

    Attributes:
        peak: the most since the mode began, or since :meth:`peak_within` did.
    """

    only_watches = True

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._before: set[int] = set()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._paused = False
        self._functions = _WholeFunctions(self)
        # It compiles itself, which no mode may watch.
        self._flex = mock.patch.object(flex_attention, "flex_attention", _attention_product)

    def __enter__(self) -> LiveMemory:
        tensors = (
            item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.layout is torch.strided
        )
        self._before = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._flex.start()
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)
        self._flex.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the operator, and counts what is alive after it."""
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self.see(result)
        return result

    def see(self, result: Any) -> None:
        """Counts the tensors in ``result`` as made now."""
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._before:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes())

    def bytes(self) -> int:
        """What is alive now."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Until it ends, results do not count: those of the parts of one kernel."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def start_peak(self) -> int:
        """Begins a new peak with what is alive now; returns the one before."""
        before, self.peak = self.peak, self.bytes()
        return before


def _attention_product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Zeros of the shape of an attention product."""
    return query.new_zeros((*query.shape[:-1], value.shape[-1]))


class _WholeFunctions(TorchFunctionMode):
    """Sees functions that are one kernel on CUDA before they are decomposed."""

    only_watches = True

    def __init__(self, memory: LiveMemory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        norm = func in (torch.rms_norm, torch.nn.functional.rms_norm) and dtypes_agree(args, kwargs)
        if not (norm or func is torch.nn.functional.scaled_dot_product_attention):
            return func(*args, **kwargs)
        with self.memory.paused():
            result = func(*args, **kwargs)
        self.memory.see(result)
        return result
