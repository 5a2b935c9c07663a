"""Compiling once, launching and refusing of the CUDA backend, with stand-ins for the driver: needs no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_call_cases import SMALL, WRONG_ARGUMENTS, WRONG_TENSORS

pytest.importorskip("cuda.core", exc_type=ImportError)

from dit_rope.rotation.backends import cuda_kernels, cuda_launch
from dit_rope.rotation.backends.cuda_arguments import ARGUMENTS_SIZE, Launch
from dit_rope.rotation.backends.cuda_kernels import MAX_GRID_ROWS, launch_of
from dit_rope.rotation.backends.cuda_plan import Plan
from dit_rope.spec import NormKind, Pairing

STREAM = 77
CUDA_0, CUDA_1 = torch.device("cuda", 0), torch.device("cuda", 1)
SUCCESS = cuda_launch.driver.CUresult.CUDA_SUCCESS


class Kernel:
    """A loaded kernel; its handle is a number that no other kernel has."""

    def __init__(self, handle: int) -> None:
        self.handle = handle


@dataclass
class Machine:
    """Two GPUs that launch nothing and note what they are asked."""

    compiled: list[tuple[Plan, str]] = field(default_factory=list)
    launched: list[SimpleNamespace] = field(default_factory=list)
    made_current: list[tuple[int, int]] = field(default_factory=list)
    kernels: list[weakref.ref[Kernel]] = field(default_factory=list)
    current: threading.local = field(default_factory=threading.local)
    capturing: bool = False
    error: Any = SUCCESS
    before_reading: Callable[[], object] = lambda: None

    def compile(self, plan: Plan, arch: str) -> SimpleNamespace:
        time.sleep(0.02)  # long enough for other threads to ask meanwhile
        self.compiled.append((plan, arch))
        return SimpleNamespace(get_kernel=self.load)

    def load(self, name: str) -> Kernel:
        kernel = Kernel(1000 + len(self.kernels))
        self.kernels.append(weakref.ref(kernel))
        return kernel

    def launch(self, function: int, *numbers: int) -> tuple[Any]:
        *shape, shared, stream, parameters, extra = numbers
        assert (shared, extra) == (0, 0)
        self.before_reading()
        address = ctypes.c_void_p.from_address(parameters).value
        arguments = ctypes.string_at(address, ARGUMENTS_SIZE)
        note = {"function": function, "grid": tuple(shape[:3]), "block": tuple(shape[3:])}
        self.launched.append(SimpleNamespace(**note, stream=stream, address=address, arguments=arguments))
        return (self.error,)

    def device(self, index: int) -> SimpleNamespace:
        note = (threading.get_ident(), index)
        return SimpleNamespace(arch=("90", "120")[index], set_current=lambda: self.made_current.append(note))

    def current_device(self) -> int:
        return getattr(self.current, "index", 0)

    @contextlib.contextmanager
    def guard(self, index: int) -> Iterator[None]:
        before, self.current.index = self.current_device(), index
        yield
        self.current.index = before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Stands in for torch's, cuda-core's and the driver's view of two GPUs; nothing has been compiled yet."""
    machine = Machine()
    driver = SimpleNamespace(cuLaunchKernel=machine.launch, CUresult=cuda_launch.driver.CUresult)
    monkeypatch.setattr(cuda_launch, "driver", driver)
    monkeypatch.setattr(cuda_launch, "Device", machine.device)
    monkeypatch.setattr(cuda_launch, "_compile", machine.compile)
    monkeypatch.setattr(cuda_launch, "_loaded", {})
    monkeypatch.setattr(cuda_launch, "_state", cuda_launch._ThreadState())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", machine.current_device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    monkeypatch.setattr(torch.cuda, "device", machine.guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: machine.capturing)
    return machine


def queries(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


def call(**changes: Any) -> tuple[Launch, bytes]:
    """The launch of a small rotation, and its pointers."""
    x = queries(2, 24, 3, 40)
    return launch_of([x], replace(SMALL, **changes), [x.clone()])


def test_kernel_is_compiled_once_for_each_device_and_plan(machine: Machine) -> None:
    rotate, exact = call(), call(exact=True)
    for _ in range(3):
        for device in (CUDA_0, CUDA_1):
            cuda_launch.run(*rotate, device)
            cuda_launch.run(*exact, device)
    plans = [(launch.plan, arch) for arch in ("sm_90", "sm_120") for launch, _ in (rotate, exact)]
    assert machine.compiled == plans
    assert [launched.function for launched in machine.launched] == [1000, 1001, 1002, 1003] * 3


def test_kernel_is_compiled_once_for_equal_plans_of_other_lengths(machine: Machine) -> None:
    for tokens in (24, 25, 1000):
        x = queries(1, tokens, 3, 40)
        cuda_launch.run(*launch_of([x], SMALL, [x]), CUDA_0)
    assert len(machine.compiled) == 1


def test_kernel_is_compiled_once_when_threads_ask_at_once(machine: Machine) -> None:
    rotate, start = call(), threading.Barrier(8)

    def ask(_: int) -> None:
        start.wait()
        cuda_launch.run(*rotate, CUDA_0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert len(machine.compiled) == 1
    assert len(machine.launched) == 8


def test_kernel_object_lives_as_long_as_the_process(machine: Machine) -> None:
    cuda_launch.run(*call(), CUDA_0)
    gc.collect()
    assert machine.kernels[0]() is not None


def test_first_launch_during_capture_says_what_to_do(machine: Machine) -> None:
    rotate, machine.capturing = call(), True
    with pytest.raises(RuntimeError, match=r"rotate must be compiled before .* make this call once before capturing"):
        cuda_launch.run(*rotate, CUDA_0)
    assert not machine.compiled
    assert not machine.launched

    machine.capturing = False
    cuda_launch.run(*rotate, CUDA_0)
    machine.capturing = True
    cuda_launch.run(*rotate, CUDA_0)
    assert len(machine.launched) == 2


def test_launch_error_names_the_error_the_grid_and_the_plan(machine: Machine) -> None:
    machine.error = cuda_launch.driver.CUresult.CUDA_ERROR_INVALID_VALUE
    launch, pointers = call()
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE") as raised:
        cuda_launch.run(launch, pointers, CUDA_0)
    assert str(launch.grid) in str(raised.value)
    assert str(launch.plan) in str(raised.value)


@pytest.mark.parametrize("name", ["ILLEGAL_ADDRESS", "LAUNCH_FAILED", "MISALIGNED_ADDRESS"])
def test_launch_error_that_an_earlier_kernel_left_says_so(machine: Machine, name: str) -> None:
    machine.error = getattr(cuda_launch.driver.CUresult, f"CUDA_ERROR_{name}")
    with pytest.raises(RuntimeError, match=f"{name}, which may be that of an earlier kernel; .*CUDA_LAUNCH_BLOCKING=1"):
        cuda_launch.run(*call(), CUDA_0)
    machine.error = cuda_launch.driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError) as raised:
        cuda_launch.run(*call(), CUDA_0)
    assert "earlier" not in str(raised.value)


def test_launch_hands_over_grid_block_stream_and_arguments(machine: Machine) -> None:
    launch, pointers = call()
    cuda_launch.run(launch, pointers, CUDA_1)
    (launched,) = machine.launched
    assert launched.grid == launch.grid
    assert launched.block == (launch.plan.threads, 1, 1)
    assert launched.stream == STREAM + 1
    assert launched.arguments == pointers + launch.numbers


def test_launches_of_two_threads_do_not_share_their_arguments(machine: Machine) -> None:
    """Both have written their arguments before the driver reads any."""
    calls = [call(), call(inverse=True)]
    for each in calls:
        cuda_launch.run(*each, CUDA_0)
    machine.launched.clear()
    machine.before_reading = threading.Barrier(2).wait
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: cuda_launch.run(*each, CUDA_0), calls))
    assert {launched.arguments for launched in machine.launched} == {p + launch.numbers for launch, p in calls}
    assert len({launched.address for launched in machine.launched}) == 2


def test_context_is_made_current_once_for_each_thread_and_device(machine: Machine) -> None:
    rotate, start = call(), threading.Barrier(2)

    def use_both(_: int) -> int:
        start.wait()  # neither thread takes both tasks
        for device in (CUDA_0, CUDA_1, CUDA_0, CUDA_1):
            cuda_launch.run(*rotate, device)
        return threading.get_ident()

    with ThreadPoolExecutor(2) as pool:
        threads = list(pool.map(use_both, range(2)))
    assert sorted(machine.made_current) == sorted((thread, index) for thread in threads for index in (0, 1))
    assert len(set(threads)) == 2


def test_launch_leaves_the_current_device_as_it_was(machine: Machine) -> None:
    cuda_launch.run(*call(), CUDA_1)
    assert machine.current_device() == 0


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [(1, 1), (2, 24), (1, 75_600), (3, 65_536), (65_535, 2), (65_536, 2), (70_000, 3), (2**20, 4096), (3, 2**30)],
)
def test_grid_covers_every_token_of_every_batch_entry_within_the_driver_s_limits(batch: int, tokens: int) -> None:
    x = queries(batch, tokens, 12, 128, device="meta")
    launch, pointers = launch_of([x, x], replace(SMALL, pairs=(22, 21, 21)), [x, x])
    columns, rows, layers = launch.grid
    assert columns * launch.plan.tokens >= tokens > (columns - 1) * launch.plan.tokens
    assert rows * layers >= batch > rows * (layers - 1)
    assert columns < 2**31
    assert rows <= MAX_GRID_ROWS == 65_535
    assert layers <= 65_535
    assert len(pointers + launch.numbers) == ARGUMENTS_SIZE


def test_launch_in_place_serves_no_call_that_is_so_for_one_tensor_only() -> None:
    """In place, channels past the rotated ones are neither read nor written; into other memory they are copied."""
    q, k, other = (queries(1, 24, 3, 40) for _ in range(3))
    widths = [launch_of([q, k], SMALL, outs)[0].plan.width for outs in ([q, k], [q, other], [other, k], [q, k])]
    assert widths == [32, 40, 40, 32]


def test_positions_are_taken_of_a_shard_past_what_the_kernel_counts_in() -> None:
    x, positions = torch.zeros(1, 4, 2, 64), torch.zeros(1, 4, 3, dtype=torch.int32)
    args = replace(SMALL, positions=positions, sizes=(2**20, 2**10, 2**10), pairs=(12, 10, 10), first_rows=(0, 0, 0))
    near, far = (launch_of([x], replace(args, token_offset=offset), [x])[0] for offset in (0, 2**35))
    assert far.numbers == near.numbers


def test_grid_has_a_row_for_each_entry_that_rotates() -> None:
    x = queries(100, 24, 3, 40)
    launch, _ = launch_of([x], replace(SMALL, entries=torch.zeros(5, dtype=torch.int32)), [x])
    assert launch.grid[1:] == (5, 1)


@pytest.mark.parametrize("shape", [(0, 24, 3, 40), (2, 0, 3, 40)])
def test_call_without_tokens_launches_nothing(machine: Machine, shape: tuple[int, ...]) -> None:
    x = queries(*shape)
    cuda_kernels.rotate([x], SMALL, [x])
    assert not machine.launched


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A tensor on CPU, which for once is a device that the backend takes."""
    monkeypatch.setattr(cuda_kernels, "_why_no_device", lambda device: None)
    return queries(1, 24, 3, 40).zero_()


def test_declined_accepts_what_the_kernel_takes(x: torch.Tensor) -> None:
    packed = torch.zeros(1, 24, 3, 3, 40, dtype=torch.bfloat16).unbind(2)
    assert cuda_kernels.declined([x], SMALL) is None
    assert cuda_kernels.declined([x, x[:, :, :1]], SMALL) is None
    assert cuda_kernels.declined(packed[:2], SMALL, NormKind.ACROSS_HEADS) is None
    assert cuda_kernels.declined([x.transpose(1, 2).contiguous().transpose(1, 2)], replace(SMALL, exact=True)) is None
    assert cuda_kernels.declined([x], replace(SMALL, rows=SMALL.rows.bfloat16())) is None


WRONG_FOR_CUDA = [
    (lambda x: [x.new_zeros(1, 24, 3, 41)], "must be even, got 41 and 16"),
    (lambda x: [x.new_zeros(1, 1, 129, 512)], "registers of one block, got [129] heads of 512 channels"),
]
ODD_PAIRS = (
    {"pairing": Pairing.HALF, "pairs": (8, 4, 3)},
    "the pairs of half pairing, must be even, got 40 and 15",
)


@pytest.mark.parametrize(("change", "reason"), [*WRONG_TENSORS, *WRONG_FOR_CUDA])
def test_declined_names_what_is_wrong_with_the_tensors(x: torch.Tensor, change: Any, reason: str) -> None:
    assert reason in str(cuda_kernels.declined(change(x), SMALL))


@pytest.mark.parametrize(("changes", "reason"), [*WRONG_ARGUMENTS, ODD_PAIRS])
def test_declined_names_what_is_wrong_with_the_arguments(x: torch.Tensor, changes: Any, reason: str) -> None:
    assert reason in str(cuda_kernels.declined([x], replace(SMALL, **changes)))


def why_no_device(device: torch.device) -> str | None:
    """What the backend says of a device now, whatever it said before."""
    return cuda_kernels._why_no_device.__wrapped__(device)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of capability 9.0, of which a test changes one thing."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_kernels, "_is_installed", lambda name: True)
    monkeypatch.setattr(cuda_kernels, "_version", lambda name: "1.2.2")
    return monkeypatch


def test_declined_takes_a_gpu_and_no_other_device(gpu: pytest.MonkeyPatch) -> None:
    assert why_no_device(CUDA_0) is None
    assert why_no_device(torch.device("cpu")) == "device must be an NVIDIA GPU, got cpu"
    assert why_no_device(torch.device("meta")) == "device must be an NVIDIA GPU, got meta"


def test_declined_names_a_build_for_amd(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.4")
    assert why_no_device(CUDA_0) == "device must be an NVIDIA GPU, got cuda:0"


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_declined_names_a_capability_below_8(gpu: pytest.MonkeyPatch, capability: tuple[int, int], taken: bool) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    expected = None if taken else "compute capability must be at least 8.0, got 7.5"
    assert why_no_device(CUDA_0) == expected


def test_declined_says_what_must_be_installed(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(cuda_kernels, "_is_installed", lambda name: name != "cuda.core")
    assert why_no_device(CUDA_0) == "cuda.core must be installed; pip install 'dit-rope[cuda]'"
    gpu.setattr(cuda_kernels, "_is_installed", lambda name: False)
    assert str(why_no_device(CUDA_0)).startswith("cuda.core and cuda.bindings must be installed")


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("0.1.1", False),
        ("0.5.1", False),
        ("0.6.0", True),
        ("0.10", True),
        ("1.0.0rc1", True),
        ("12.1", True),
        (None, True),
    ],
)
def test_declined_names_a_cuda_core_without_handles_of_kernels(
    gpu: pytest.MonkeyPatch, version: str | None, taken: bool
) -> None:
    gpu.setattr(cuda_kernels, "_version", lambda name: version)
    expected = None if taken else f"cuda-core must be at least 0.6, got {version}; pip install 'dit-rope[cuda]'"
    assert why_no_device(CUDA_0) == expected


def test_versions_are_those_of_installed_packages() -> None:
    assert cuda_kernels._version("torch") == importlib.metadata.version("torch")
    assert cuda_kernels._version("no-such-package") is None


def test_package_that_is_not_there_counts_as_not_installed() -> None:
    assert cuda_kernels._is_installed("cuda.core")
    assert not cuda_kernels._is_installed("no_such_package.core")
