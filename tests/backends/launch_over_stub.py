"""What the launch path must do over any version of cuda-core and cuda-bindings, with a stub below as the driver.

``test_launch_over_stub.py`` runs this file with the installed versions,
``scripts/long_tests/cuda_core_versions.py`` with others. cuda-core, cuda-bindings and NVRTC are the real ones.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch

from dit_rope import Grid, NormKind, RopeSpec, norm_rotate_qk, rope_table, rotate_qk
from dit_rope.rotation.backends import cuda_kernels, cuda_launch
from dit_rope.rotation.backends.cuda_arguments import Launch
from dit_rope.rotation.backends.cuda_kernels import launch_of
from dit_rope.rotation.backends.cuda_tuning import Tuning
from dit_rope.rotation_args import Norm
from gpu_call_cases import SMALL
from torch_over_stub import DEVICES, STREAM, TorchOverStub, over_stub

CUDA_0, CUDA_1 = DEVICES
ILLEGAL_ADDRESS, OUT_OF_MEMORY, INVALID_IMAGE = 700, 2, 200
SMALL_TENSORS = (2, 24, 3, 40)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchOverStub]:
    """Two GPUs on which nothing has been loaded yet; where the backend declines this cuda-core, nothing to test."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = cuda_kernels._why_no_device.__wrapped__(CUDA_0)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(cuda_launch, "_loaded", {})
    monkeypatch.setattr(cuda_launch, "_state", cuda_launch._ThreadState())
    with over_stub() as torch_over_stub:
        yield torch_over_stub


class Noted:
    """Launches and calls of the driver from now on."""

    def __init__(self, machine: TorchOverStub) -> None:
        self._driver = machine.driver
        self._since = self._driver.launched
        self._before = self._driver.calls()

    def launches(self) -> list[tuple[int, tuple[int, ...], tuple[int, ...], int, bytes]]:
        """Device, grid, block, stream and arguments of each."""
        return [
            (each.device, tuple(each.grid), tuple(each.block), each.stream, self._driver.arguments(each))
            for each in self._driver.launches(self._since)
        ]

    def calls(self) -> dict[str, int]:
        """How often each function was called."""
        counts = {name: count - self._before.get(name, 0) for name, count in self._driver.calls().items()}
        return {name: count for name, count in counts.items() if count}


def rotation(**changes: object) -> tuple[Launch, bytes]:
    """The launch of a small rotation, and its pointers."""
    x = torch.zeros(SMALL_TENSORS, dtype=torch.bfloat16)
    return launch_of([x], replace(SMALL, **changes), [x.clone()])  # type: ignore[arg-type]


def expected(launch: Launch, pointers: bytes, device: int = 0) -> tuple[object, ...]:
    """What the driver must be given."""
    block = (launch.plan.threads, 1, 1)
    return (device, launch.grid, block, STREAM + device, pointers + launch.numbers)


def test_context_that_cannot_be_had_is_named_and_asked_for_again(machine: TorchOverStub) -> None:
    """The first test that uses the second device: cuda-core asks for its context once."""
    with (
        machine.driver.failing("cuDevicePrimaryCtxRetain", OUT_OF_MEMORY),
        pytest.raises(RuntimeError, match="the driver must make the context of cuda:1 current, got"),
    ):
        cuda_launch.run(*rotation(), CUDA_1)
    each, noted = rotation(), Noted(machine)
    cuda_launch.run(*each, CUDA_1)
    assert noted.launches() == [expected(*each, 1)]


def test_driver_gets_the_grid_block_stream_and_arguments(machine: TorchOverStub) -> None:
    noted, (launch, pointers) = Noted(machine), rotation()
    cuda_launch.run(launch, pointers, CUDA_0)
    assert noted.launches() == [expected(launch, pointers)]


@pytest.mark.parametrize("norm", [None, *NormKind], ids=str)
def test_public_functions_hand_over_what_the_kernels_are_run_with_on_a_cpu(
    machine: TorchOverStub, norm: NormKind | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes reach the driver that the emulation of the kernels reads, in the first call and in later ones."""
    handed: list[tuple[Launch, bytes]] = []
    real = cuda_launch.run
    monkeypatch.setattr(cuda_launch, "run", lambda *a: handed.append(a[:2]) or real(*a))
    table = rope_table(RopeSpec((8, 4, 4)), Grid(2, 3, 4))
    noted, weight = Noted(machine), torch.ones(64)
    for _ in range(3):
        q, k = torch.randn(2, 1, 24, 4, 16).unbind()
        if norm is None:
            rotate_qk(q, k, table, backend="cuda")
        else:
            norm_rotate_qk(q, k, table, *2 * [weight[: None if norm.across_heads else 16]], norm=norm, backend="cuda")
        assert int.from_bytes(handed[-1][1][:8], "little") == q.data_ptr()
    assert noted.launches() == [expected(*each) for each in handed]
    assert len({id(launch) for launch, _ in handed}) == 1
    assert noted.calls()["cuLibraryLoadData"] == 1


def test_second_call_asks_the_driver_for_the_launch_alone(machine: TorchOverStub) -> None:
    each = rotation()
    cuda_launch.run(*each, CUDA_0)
    noted = Noted(machine)
    cuda_launch.run(*each, CUDA_0)
    assert noted.calls() == {"cuLaunchKernel": 1}


# Functions of the driver that every first call of a thread needs, and what the caller is told they were for.
NEEDED = {
    "cuCtxSetCurrent": "make the context of cuda:0 current",
    "cuLibraryLoadData": "compile and load Plan(",
    "cuLibraryGetKernel": "compile and load Plan(",
    "cuLaunchKernel": "accept a launch of grid",
}


@pytest.mark.parametrize("function", NEEDED)
def test_error_of_the_driver_names_itself_and_what_it_was_for(machine: TorchOverStub, function: str) -> None:
    """In a thread that has no context yet; the next call finds nothing half done."""

    def fail_then_succeed() -> str:
        with machine.driver.failing(function, OUT_OF_MEMORY), pytest.raises(RuntimeError) as raised:
            cuda_launch.run(*rotation(), CUDA_0)
        noted = Noted(machine)
        cuda_launch.run(*rotation(), CUDA_0)
        assert len(noted.launches()) == 1
        return str(raised.value)

    with ThreadPoolExecutor(1) as pool:
        message = pool.submit(fail_then_succeed).result()
    assert NEEDED[function] in message
    assert "CUDA_ERROR_OUT_OF_MEMORY" in message
    assert "earlier kernel" not in message


def test_every_function_of_the_driver_may_fail(machine: TorchOverStub) -> None:
    """Whatever a first call asks the driver for: the launch is made, or a RuntimeError says why not."""

    def first_call() -> str | None:
        cuda_launch._loaded.clear()
        try:
            cuda_launch.run(*rotation(), CUDA_0)
        except RuntimeError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(1) as pool:
        pool.submit(first_call).result()  # cuda-core retains the context once for all threads
    noted = Noted(machine)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(first_call).result() is None
    functions = noted.calls()
    assert functions.keys() >= NEEDED.keys()
    for function in functions:
        with machine.driver.failing(function, OUT_OF_MEMORY), ThreadPoolExecutor(1) as pool:
            message = pool.submit(first_call).result()
        assert message is None or "the driver must" in message
        assert message is not None or function not in NEEDED


@pytest.mark.parametrize("warm", [False, True], ids=["first-call", "later-call"])
def test_fault_of_an_earlier_kernel_is_not_blamed_on_this_one(machine: TorchOverStub, warm: bool) -> None:
    if warm:
        cuda_launch.run(*rotation(), CUDA_0)
    with machine.driver.broken(ILLEGAL_ADDRESS), pytest.raises(RuntimeError) as raised:
        cuda_launch.run(*rotation(), CUDA_0)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(raised.value)
    assert "may be that of an earlier kernel; run with CUDA_LAUNCH_BLOCKING=1" in str(raised.value)


def test_code_that_a_device_does_not_take_is_no_fault_of_an_earlier_kernel(machine: TorchOverStub) -> None:
    with machine.driver.failing("cuLibraryLoadData", INVALID_IMAGE), pytest.raises(RuntimeError) as raised:
        cuda_launch.run(*rotation(), CUDA_0)
    assert "CUDA_ERROR_INVALID_IMAGE" in str(raised.value)
    assert "earlier" not in str(raised.value)


def test_thread_that_called_nothing_of_cuda_launches(machine: TorchOverStub) -> None:
    """A context is current in each thread for itself."""
    each, noted = rotation(), Noted(machine)
    cuda_launch.run(*each, CUDA_0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cuda_launch.run, *each, CUDA_0).result()
    assert noted.launches() == 2 * [expected(*each)]
    assert noted.calls()["cuLibraryLoadData"] == 1


def test_threads_at_once_load_one_kernel_and_keep_their_arguments_apart(machine: TorchOverStub) -> None:
    calls = [rotation(inverse=bool(number % 2)) for number in range(8)]
    noted, start = Noted(machine), threading.Barrier(8)

    def launch(each: tuple[Launch, bytes]) -> None:
        start.wait()
        for _ in range(3):
            cuda_launch.run(*each, CUDA_0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(launch, calls))
    assert sorted(noted.launches()) == sorted(3 * [expected(*each) for each in calls])
    assert noted.calls()["cuLibraryLoadData"] == 1


def test_first_call_under_capture_is_refused_and_leaves_no_trace(machine: TorchOverStub) -> None:
    cuda_launch.run(*rotation(exact=True), CUDA_0)  # the thread has a context
    each, noted = rotation(), Noted(machine)
    machine.capturing = True
    with pytest.raises(RuntimeError, match="make this call once before capturing"):
        cuda_launch.run(*each, CUDA_0)
    assert noted.calls() == {}
    machine.capturing = False
    cuda_launch.run(*each, CUDA_0)
    machine.capturing = True
    cuda_launch.run(*each, CUDA_0)
    assert noted.launches() == 2 * [expected(*each)]


def test_devices_have_kernels_of_their_own_and_the_current_one_stays(machine: TorchOverStub) -> None:
    """Of compute capability 9.0 and 12.0."""
    each, noted = rotation(), Noted(machine)
    for device in (CUDA_0, CUDA_1, CUDA_0, CUDA_1):
        cuda_launch.run(*each, device)
        assert machine.device() == 0
    assert noted.launches() == 2 * [expected(*each), expected(*each, 1)]
    kernels = {(launch.device, launch.kernel) for launch in machine.driver.launches(machine.driver.launched - 4)}
    assert len(kernels) == 2
    assert noted.calls()["cuLibraryLoadData"] == 2


def test_many_plans_stay_loaded_and_apart(machine: TorchOverStub) -> None:
    calls = [
        rotation(exact=exact, pairs=pairs) for exact in (False, True) for pairs in ((8, 4, 4), (8, 4, 2), (4, 4, 4))
    ]
    for _ in range(2):
        noted = Noted(machine)
        for each in calls:
            cuda_launch.run(*each, CUDA_0)
        assert noted.launches() == [expected(*each) for each in calls]
        gc.collect()
    assert "cuLibraryLoadData" not in noted.calls()
    assert len({launch.kernel for launch in machine.driver.launches(machine.driver.launched - 6)}) == 6


def test_garbage_collection_unloads_no_library(machine: TorchOverStub) -> None:
    before = machine.driver.unloaded
    cuda_launch.run(*rotation(), CUDA_0)
    gc.collect()
    cuda_launch.run(*rotation(), CUDA_0)  # over an unloaded library, the stub refuses it
    assert machine.driver.unloaded == before


def norm_across_heads(tuning: Tuning) -> tuple[Launch, bytes]:
    """The launch of a small norm across heads with a rotation, compiled with some choices, and its pointers."""
    x = torch.zeros(SMALL_TENSORS, dtype=torch.bfloat16)
    with cuda_kernels.tuned(tuning), mock.patch.object(cuda_kernels, "_processors", return_value=2):
        return launch_of([x], SMALL, [x.clone()], Norm(NormKind.ACROSS_HEADS, 1e-6))


def test_kernel_with_stages_gets_its_shared_memory(machine: TorchOverStub) -> None:
    each, noted = norm_across_heads(Tuning(stages=3)), Noted(machine)
    assert each[0].plan.stage_bytes > 0
    for _ in range(2):
        cuda_launch.run(*each, CUDA_0)
    assert noted.launches() == 2 * [expected(*each)]
    assert {launch.shared for launch in machine.driver.launches(machine.driver.launched - 2)} == {
        each[0].plan.stage_bytes
    }
    assert noted.calls()["cuKernelSetAttribute"] == 1
    cuda_launch.run(*norm_across_heads(Tuning()), CUDA_0)
    assert machine.driver.launches(machine.driver.launched - 1)[0].shared == 0
    assert noted.calls()["cuKernelSetAttribute"] == 1


def test_shared_memory_that_a_device_does_not_have_is_named_and_asked_for_again(machine: TorchOverStub) -> None:
    each = norm_across_heads(Tuning(stages=2))
    with machine.driver.failing("cuKernelSetAttribute", OUT_OF_MEMORY), pytest.raises(RuntimeError) as raised:
        cuda_launch.run(*each, CUDA_0)
    assert f"CUDA_ERROR_OUT_OF_MEMORY for {each[0].plan.stage_bytes} bytes of shared memory" in str(raised.value)
    noted = Noted(machine)
    cuda_launch.run(*each, CUDA_0)
    assert noted.launches() == [expected(*each)]


def test_kernels_that_were_prepared_are_only_launched(machine: TorchOverStub) -> None:
    calls = [norm_across_heads(Tuning(stages=stages)) for stages in (0, 2, 3)]
    cuda_launch.prepare([launch.plan for launch, _ in calls], CUDA_0)
    noted = Noted(machine)
    cuda_launch.prepare([launch.plan for launch, _ in calls], CUDA_0)
    machine.capturing = True
    for each in calls:
        cuda_launch.run(*each, CUDA_0)
    assert noted.launches() == [expected(*each) for each in calls]
    assert "cuLibraryLoadData" not in noted.calls()


def test_kernel_that_cannot_be_prepared_is_left_to_its_first_call(machine: TorchOverStub) -> None:
    """One that NVRTC refuses, between two that it takes; and one that the driver refuses."""
    calls = [norm_across_heads(Tuning(stages=stages)) for stages in (0, 3)]
    (launch, pointers), last = norm_across_heads(Tuning(stages=2)), rotation()
    refused = Launch(replace(launch.plan, access=3), launch.grid, launch.numbers)
    cuda_launch.prepare([calls[0][0].plan, refused.plan, calls[1][0].plan], CUDA_0)
    with machine.driver.failing("cuLibraryLoadData", OUT_OF_MEMORY):
        cuda_launch.prepare([last[0].plan], CUDA_0)
    noted = Noted(machine)
    for each in calls:
        cuda_launch.run(*each, CUDA_0)
    assert "cuLibraryLoadData" not in noted.calls()
    with pytest.raises(RuntimeError, match="the driver must compile and load Plan"):
        cuda_launch.run(refused, pointers, CUDA_0)
    cuda_launch.run(*last, CUDA_0)
    assert noted.launches() == [expected(*each) for each in (*calls, last)]
