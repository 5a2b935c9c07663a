"""Compiles the CUDA kernel with NVRTC on first use, keeps what it compiled, and launches it on torch's current stream.

Imported by ``cuda_kernels`` on first use, so that nothing else needs the CUDA bindings. Kernels are compiled and loaded
by cuda-core. They are launched by the driver function that cuda-core itself calls, because ``cuda.core.launch`` takes
no structs.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from cuda.bindings import driver
from cuda.core import Device, Kernel, ObjectCode, Program, ProgramOptions

from .cuda_arguments import ARGUMENTS_SIZE, POINTERS, Launch
from .cuda_plan import Plan, kernel_sources


@dataclass(frozen=True)
class _Loaded:
    """A kernel on one device; ``function`` is its driver handle, valid while ``kernel`` lives."""

    kernel: Kernel
    function: int


class _ThreadState(threading.local):
    """The arguments of a thread's launch: the driver reads them without Python's lock, while other threads launch."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(ARGUMENTS_SIZE)
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._buffer))
        devices = set[int]()  # those whose context this thread has made current
        self.parts = memoryview(self._buffer).cast("B"), ctypes.addressof(self._parameters), devices


_SPLIT = POINTERS.size
# After a kernel has faulted, every later call of the process returns its error.
_FAULTS = (
    "ASSERT", "ECC_UNCORRECTABLE", "HARDWARE_STACK_ERROR", "ILLEGAL_ADDRESS", "ILLEGAL_INSTRUCTION",
    "INVALID_ADDRESS_SPACE", "INVALID_PC", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "MISALIGNED_ADDRESS", "UNKNOWN",
)  # fmt: skip
_loaded: dict[tuple[int, Plan], _Loaded] = {}
_lock = threading.Lock()
_state = _ThreadState()


def run(launch: Launch, pointers: bytes, device: torch.device) -> None:
    """Launches a kernel on the current stream of ``device``, compiling it first where it is new.

    Args:
        launch: the kernel, its grid, and its arguments after the pointers.
        pointers: to tensors that live until the stream has passed the launch, as torch's allocator makes sure.
        device: a CUDA device, whatever the current one is.

    Raises:
        RuntimeError: the kernel is new and a CUDA graph is being captured; or NVRTC or the driver reports an error,
            which may be that of an earlier kernel.
    """
    index = device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            run(launch, pointers, device)
        return
    arguments, parameters, devices = _state.parts
    if index not in devices:  # a new thread has no context
        with _explained(f"make the context of {device} current"):
            Device(index).set_current()
        devices.add(index)
    function = launch.functions.get(index) or _load(index, launch)
    arguments[:_SPLIT], arguments[_SPLIT:] = pointers, launch.numbers
    stream = torch._C._cuda_getCurrentRawStream(index)
    (error,) = driver.cuLaunchKernel(function, *launch.shape, stream, parameters, 0)
    if error:
        raise RuntimeError(_message(f"accept a launch of grid {launch.grid} of {launch.plan}", error.name))


@contextlib.contextmanager
def _explained(task: str) -> Iterator[None]:
    """Names the task that an error of cuda-core or NVRTC has interrupted."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(_message(task, f"{type(error).__name__}: {error}")) from error


def _message(task: str, error: str) -> str:
    if not any(f"CUDA_ERROR_{fault}" in error for fault in _FAULTS):
        return f"the driver must {task}, got {error}"
    return (
        f"the driver must {task}, got {error}, which may be that of an earlier kernel; run with CUDA_LAUNCH_BLOCKING=1 "
        "to see which"
    )


def compile_plan(plan: Plan, arch: str) -> bytes:
    """Machine code (cubin) of the kernel of ``plan`` for ``arch``, such as ``"sm_90"``. Needs no GPU.

    Raises:
        RuntimeError: NVRTC cannot compile it, with NVRTC's log.
    """
    return bytes(_compile(plan, arch).code)


def prepare(plans: Iterable[Plan], device: torch.device) -> None:
    """Compiles and loads kernels in parallel on all cores: NVRTC runs without Python's lock.

    A kernel that fails is compiled again by its first call, which raises the error.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    arch = f"sm_{Device(index).arch}"
    new = [plan for plan in plans if (index, plan) not in _loaded]
    with ThreadPoolExecutor() as pool:
        compiling = {plan: pool.submit(_compile, plan, arch) for plan in new}
    with _lock, torch.cuda.device(index):
        Device(index).set_current()
        for plan, code in compiling.items():
            with contextlib.suppress(Exception):  # of NVRTC or the driver
                _loaded[index, plan] = _on_device(index, plan, code.result())


def _compile(plan: Plan, arch: str) -> ObjectCode:
    options = ProgramOptions(arch=arch, std="c++17", include_path=[str(kernel_sources())])
    return Program(plan.source(), "c++", options).compile("cubin")


def _load(index: int, launch: Launch) -> int:
    """The handle of a kernel on one device, compiled and loaded once for all threads."""
    with _lock:
        loaded = _loaded.get((index, launch.plan))
        if loaded is None:
            loaded = _loaded[index, launch.plan] = _compiled(index, launch.plan)
    launch.functions[index] = loaded.function
    return loaded.function


def _compiled(index: int, plan: Plan) -> _Loaded:
    """Compiles and loads one kernel."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{plan.operation} must be compiled before a CUDA graph is captured, got a first call with "
            f"{plan.heads} heads of {plan.head_dim} {plan.data} channels during capture; make this call once "
            "before capturing"
        )
    with _explained(f"compile and load {plan}"):
        return _on_device(index, plan, _compile(plan, f"sm_{Device(index).arch}"))


def _on_device(index: int, plan: Plan, code: ObjectCode) -> _Loaded:
    """Loads a kernel on the current device, and allows its dynamic shared memory."""
    kernel = code.get_kernel(plan.operation)
    loaded = _Loaded(kernel, int(kernel.handle))
    if plan.stage_bytes:
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(most, plan.stage_bytes, loaded.function, index)
        if error:
            raise RuntimeError(f"{error.name} for {plan.stage_bytes} bytes of shared memory a block")
    return loaded
