"""What of torch is replaced where the launch path runs over the stub of the CUDA driver, which torch itself cannot use.

Tensors lie on the CPU; kernels are launched as for the first of two GPUs, and nothing reads what they are given.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from unittest import mock

import torch

from dit_rope.rotation.backends import cuda_kernels, cuda_launch
from dit_rope.rotation.backends.cuda_arguments import ARGUMENTS_SIZE
from stub_driver import Driver

STREAM = 0x51
DEVICES = tuple(torch.device("cuda", index) for index in range(2))


class _Current(threading.local):
    index = 0


class TorchOverStub:
    """The current device, streams and captures of two GPUs, and the driver below."""

    def __init__(self) -> None:
        self.driver = Driver(ARGUMENTS_SIZE)
        self.capturing = False
        self._current = _Current()

    def device(self) -> int:
        """Index of the thread's current device."""
        return self._current.index

    @contextlib.contextmanager
    def guard(self, index: int) -> Iterator[None]:
        """``torch.cuda.device``."""
        before = self.device()
        self._set(index)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, index: int) -> None:
        self._current.index = index
        self.driver.set_device(index)


class OnFirstDevice:
    """Stands in for :mod:`dit_rope.rotation.backends.cuda_launch`: launches calls of tensors on the CPU on a GPU."""

    @staticmethod
    def run(launch: cuda_launch.Launch, pointers: bytes, device: torch.device) -> None:
        """As the real one, on the first device."""
        cuda_launch.run(launch, pointers, DEVICES[0])


def _first_device() -> type[OnFirstDevice]:
    return OnFirstDevice


@contextlib.contextmanager
def over_stub() -> Iterator[TorchOverStub]:
    """While it is open, torch has two GPUs, and the CUDA backend takes tensors on the CPU."""
    fake = TorchOverStub()
    with (
        mock.patch.multiple(torch.cuda, device=fake.guard, is_current_stream_capturing=lambda: fake.capturing),
        mock.patch.object(torch._C, "_cuda_getDevice", fake.device, create=True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, create=True),
        mock.patch.object(cuda_kernels, "_why_no_device", return_value=None),
        mock.patch.object(cuda_kernels, "_launcher", _first_device),
    ):
        yield fake
