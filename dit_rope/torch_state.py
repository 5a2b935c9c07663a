"""What torch is doing at this moment: tracing, differentiating, capturing a graph, on which stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

WITHOUT_FLOAT64_OR_COMPLEX = frozenset({"mps", "npu"})
"""Kinds of devices."""

Params = ParamSpec("Params")
Result = TypeVar("Result")

# Looked up once: they run at every hit.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_transforms = torch._C._functorch.peek_interpreter_stack
_function_modes = torch._C._len_torch_function_stack
_jit_tracing = torch._C._get_tracing_state


def in_mode() -> bool:
    """Whether tensors made now belong to a mode of this moment rather than to everybody.

    Under tracing, a dispatch mode (fake, functional) or a function transform (vmap, grad) they may not be real: stored,
    they would reach callers for whom that mode does not exist, and a stored real tensor would not be fake where a fake
    one is needed. A mode that only watches, such as one that counts operators, says so by ``only_watches = True``.
    """
    return (
        torch.compiler.is_compiling()
        or (_dispatch_modes() > 0 and not _watched())
        or _function_transforms() is not None
    )


def in_level() -> bool:
    """Whether a level of torch.func (grad, jvp, vmap) or of dual numbers is active.

    Under it a call has to be made of operations that torch knows: one that a kernel answers would have no tangent.
    """
    return _function_transforms() is not None or forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether somebody differentiates, batches, records or replaces torch's operations.

    That is :func:`in_level`, torch.jit, or a torch function mode that is no default device and does not only watch.
    """
    return in_level() or _jit_tracing() is not None or (_function_modes() > 0 and _replaces_functions())


# torch.compile takes the answers of the moment it traces. torch's decorator for this would import dynamo.
in_level._dynamo_marked_constant = True  # type: ignore[attr-defined]
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured where this thread works: what it is given it reads at every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The stream whose work orders a build before its use: whoever keys on it need not wait for the build."""
    return 0 if device.type in ("cpu", "meta") else torch.accelerator.current_stream(device).stream_id


def finish(device: torch.device) -> None:
    """Waits for what was just made on ``device``, before it is put where calls on any stream find it.

    None of those streams waits for the one that fills the memory.
    """
    if device.type in ("cuda", "xpu"):
        torch.accelerator.current_stream(device).synchronize()


def _watched() -> bool:
    """Whether every dispatch mode only watches."""
    modes = (torch._C._get_dispatch_stack_at(index) for index in range(_dispatch_modes()))
    return all(getattr(mode, "only_watches", False) for mode in modes)


def _replaces_functions() -> bool:
    """Whether a torch function mode may change what is computed."""
    return not all(
        isinstance(mode, DeviceContext) or getattr(mode, "only_watches", False)
        for mode in _get_current_function_mode_stack()
    )


def uncompiled(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """``function``, which torch.compile leaves alone: its numbers are new in every chunk and would be compiled in.

    Disabled only when somebody compiles, because asking for that imports the compiler, which takes a second.
    """

    @functools.wraps(function)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if torch.compiler.is_compiling():
            result: Result = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call
