"""What torch is doing at this moment: tracing, differentiating, casting, capturing a CUDA graph, using a stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

WITHOUT_FLOAT64_OR_COMPLEX = frozenset({"mps", "npu"})
"""Types of devices that have neither float64 nor complex numbers."""

Params = ParamSpec("Params")
Result = TypeVar("Result")

# Looked up once, because they run at every hit of a cache.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_transforms = torch._C._functorch.peek_interpreter_stack
_function_modes = torch._C._len_torch_function_stack
_jit_tracing = torch._C._get_tracing_state


def in_mode() -> bool:
    """Whether tensors made now belong to a mode: tracing, a dispatch mode or a function transform.

    Such tensors may not be real (fake, functional, batched), so a cache must neither keep them nor answer with real
    ones. A dispatch mode that only watches, such as one that counts operators, declares ``only_watches = True``; it is
    ignored here.
    """
    return (
        torch.compiler.is_compiling()
        or (_dispatch_modes() > 0 and not _watched())
        or _function_transforms() is not None
    )


def in_level() -> bool:
    """Whether a level of torch.func (grad, jvp, vmap) or of dual numbers is active.

    A call under it must consist of torch's own operations: the result of a kernel would have no tangent.
    """
    return _function_transforms() is not None or forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether torch's operations are differentiated, batched, recorded or replaced.

    True under :func:`in_level`, under tracing by torch.jit, and under a torch function mode. A default device, and a
    mode that declares ``only_watches = True``, are ignored.
    """
    return in_level() or _jit_tracing() is not None or (_function_modes() > 0 and _replaces_functions())


# torch.compile takes the answers as constants of its trace. torch's decorator for this would import dynamo.
in_level._dynamo_marked_constant = True  # type: ignore[attr-defined]
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def capturing(device: torch.device | None = None) -> bool:
    """Whether this thread captures a CUDA graph, which reads the memory of its tensors again at every replay.

    ``device`` is the one that the answer is needed for: False unless it is a CUDA device. None: for any device.
    """
    on_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return on_cuda and torch.cuda.is_current_stream_capturing()


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for ``device``, so that operations choose the dtype that they compute in."""
    # Torch raises an error if it is asked about autocast on the meta device.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def stream_of(device: torch.device) -> int:
    """The id of the current stream. A cache with this id in its keys need not wait for builds."""
    return 0 if device.type in ("cpu", "meta") else torch.accelerator.current_stream(device).stream_id


def finish(device: torch.device) -> None:
    """Waits for the current stream of ``device``, so that tensors it fills can be read on any stream.

    Other streams do not wait for it by themselves.
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
    """Wraps ``function`` so that torch.compile runs it uncompiled.

    For functions whose numbers change in every call and would be compiled in as constants. ``torch.compiler.disable``
    is called only while something compiles, because it imports the compiler, which takes a second.
    """

    @functools.wraps(function)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if torch.compiler.is_compiling():
            result: Result = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call
