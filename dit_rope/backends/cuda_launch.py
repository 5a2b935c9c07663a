"""Compiles the CUDA kernel with NVRTC on first use, keeps what it compiled, and launches it on torch's current stream.

Imported by :mod:`dit_rope.backends.cuda_kernels` on first use, so that nothing else needs the CUDA bindings. Kernels
are compiled and loaded by cuda-core; they are launched by the driver function that cuda-core itself calls, because
``cuda.core.launch`` takes no structs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from cuda.bindings import driver
from cuda.core import Device, Kernel, ObjectCode, Program, ProgramOptions

from .cuda_arguments import ARGUMENTS_SIZE, Launch
from .cuda_plan import Plan, kernel_sources


@dataclass(frozen=True)
class _Loaded:
    """A kernel on one device; ``function`` is its driver handle, valid while ``kernel`` lives."""

    kernel: Kernel
    function: int


class _ThreadState(threading.local):
    """Where a thread keeps the arguments of the launch it is making: the driver reads them while others run."""

    def __init__(self) -> None:
        self.arguments = ctypes.create_string_buffer(ARGUMENTS_SIZE)
        self.address = ctypes.addressof(self.arguments)
        self._parameters = (ctypes.c_void_p * 1)(self.address)
        self.parameters = ctypes.addressof(self._parameters)
        self.devices: set[int] = set()


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
        RuntimeError: the kernel is new and a CUDA graph is being captured; or NVRTC or the driver reports an error.
    """
    index = device.index
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            run(launch, pointers, device)
        return
    if index not in _state.devices:  # a thread that has called nothing of CUDA yet has no context
        Device(index).set_current()
        _state.devices.add(index)
    loaded = _loaded.get((index, launch.plan)) or _load(index, launch.plan)
    ctypes.memmove(_state.address, pointers + launch.numbers, ARGUMENTS_SIZE)
    stream = torch.cuda.current_stream(index).cuda_stream
    (error,) = driver.cuLaunchKernel(
        loaded.function, *launch.grid, launch.plan.threads, 1, 1, launch.plan.stage_bytes, stream, _state.parameters, 0
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver must accept a launch, got {error.name} for grid {launch.grid} of {launch.plan}")


def compile_plan(plan: Plan, arch: str) -> bytes:
    """Machine code (cubin) of the kernel of ``plan`` for ``arch``, such as ``"sm_90"``. Needs no GPU.

    Raises:
        RuntimeError: NVRTC cannot compile it, with NVRTC's log.
    """
    return bytes(_compile(plan, arch).code)


def prepare(plans: Iterable[Plan], device: torch.device) -> None:
    """Compiles and loads kernels, side by side on all cores: NVRTC runs without Python's lock.

    Raises:
        RuntimeError: NVRTC cannot compile one; none of them is loaded then.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    arch = f"sm_{Device(index).arch}"
    new = [plan for plan in plans if (index, plan) not in _loaded]
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda plan: _compile(plan, arch), new))
    with _lock, torch.cuda.device(index):
        Device(index).set_current()
        for plan, code in zip(new, codes, strict=True):
            _keep(index, plan, code)


def _compile(plan: Plan, arch: str) -> ObjectCode:
    options = ProgramOptions(arch=arch, std="c++17", include_path=[str(kernel_sources())])
    return Program(plan.source(), "c++", options).compile("cubin")


def _load(index: int, plan: Plan) -> _Loaded:
    """Compiles and loads one kernel, once, however many threads ask for it."""
    with _lock:
        loaded = _loaded.get((index, plan))
        if loaded is not None:
            return loaded
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{plan.operation} must be compiled before a CUDA graph is captured, got a first call with "
                f"{plan.heads} heads of {plan.head_dim} {plan.data} channels during capture; make this call once "
                "before capturing"
            )
        return _keep(index, plan, _compile(plan, f"sm_{Device(index).arch}"))


def _keep(index: int, plan: Plan, code: ObjectCode) -> _Loaded:
    """Loads a kernel on the current device, with leave to have its dynamic shared memory; under the lock."""
    kernel = code.get_kernel(plan.operation)
    loaded = _Loaded(kernel, int(kernel.handle))
    if plan.stage_bytes:
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(most, plan.stage_bytes, loaded.function, index)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(
                f"a block must have {plan.stage_bytes} bytes of shared memory, got {error.name} for {plan}"
            )
    _loaded[index, plan] = loaded
    return loaded
