"""Runs the CUDA kernels on CPU: builds each with g++ over ``cuda_on_cpu/`` and calls it on host memory.

What stands between a call and its kernel is the real thing: the plan, the arguments packed for the driver, the grid.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dit_rope.rotation.backends import cuda_kernels
from dit_rope.rotation.backends.cuda_arguments import Launch
from dit_rope.rotation.backends.cuda_plan import Plan, kernel_sources

CUDA, PTX = (Path(__file__).resolve().parent / "cuda_on_cpu" / name for name in ("cuda.hpp", "ptx.cuh"))
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-fPIC")
COMPILER = shutil.which("g++") or shutil.which("clang++")
# Few, so that blocks which stay take several tokens.
PROCESSORS = 2

# One kernel whose name differs from plan to plan, behind one function whose name does not.
ENTRY = """
extern "C" const char* run(const unsigned* grid, int threads, const void* args, const uintptr_t* allowed, int count) {{
  return cuda_on_cpu::run(
      [](const void* args) {{ {operation}(*static_cast<const dit_rope::RotationArgs*>(args)); }},
      {{grid[0], grid[1], grid[2]}}, threads, args, allowed, count);
}}
"""


class EmulatedKernels:
    """Stands in for :mod:`dit_rope.rotation.backends.cuda_launch`; keeps what it builds in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges: list[tuple[int, int]] = []
        self.build = functools.cache(self._build)
        self.header = functools.cache(self._header)

    def run(self, launch: Launch, pointers: bytes, device: torch.device) -> None:
        """Runs every block before it returns; raises RuntimeError for an access the kernel must not make."""
        grid = (ctypes.c_uint * 3)(*launch.grid)
        allowed = (ctypes.c_size_t * (2 * len(self.ranges)))(*(end for pair in self.ranges for end in pair))
        kernel = self.build(launch.plan)
        error = kernel(grid, launch.plan.threads, pointers + launch.numbers, allowed, len(self.ranges))
        if error:
            raise RuntimeError(f"{error.decode()} in {launch.plan}")

    def _build(self, plan: Plan) -> Any:
        sources = {path.name: path.read_bytes() for path in (*kernel_sources().glob("*.cu*"), PTX)}
        text = f'#include "{CUDA.name}"\n{plan.source()}{ENTRY.format(operation=plan.operation)}'
        library = self.folder / f"{_digest(text.encode(), CUDA.read_bytes(), *sources.values())}.so"
        if not library.exists():
            header = self.header()
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                for name, source in {**sources, "kernel.cpp": text.encode()}.items():
                    (Path(folder) / name).write_bytes(source)
                _compile(["-shared", f"-I{header}", "-I.", "kernel.cpp", "-o", "kernel.so"], folder)
                (Path(folder) / "kernel.so").replace(library)
        run = ctypes.CDLL(str(library)).run
        run.restype = ctypes.c_char_p
        return run

    def _header(self) -> Path:
        """The folder of ``cuda.hpp``, precompiled where the compiler is g++: parsing it is half of a kernel's build."""
        header = self.folder.resolve() / _digest(CUDA.read_bytes())
        if not header.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                built = Path(folder) / "built"
                built.mkdir()
                shutil.copy(CUDA, built)
                if Path(str(COMPILER)).name == "g++":
                    _compile(["-x", "c++-header", CUDA.name, "-o", f"{CUDA.name}.gch"], built)
                with contextlib.suppress(OSError):  # another process was first
                    built.rename(header)
        return header


def _compile(arguments: list[str], folder: str | Path) -> None:
    done = subprocess.run([str(COMPILER), *FLAGS, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{COMPILER} failed:\n{done.stderr[:8000]}")


def _digest(*texts: bytes) -> str:
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


@contextmanager
def emulated(folder: Path) -> Iterator[EmulatedKernels]:
    """While it is open, the CUDA backend takes tensors on CPU and runs their kernels there."""
    kernels = EmulatedKernels(folder)
    real = cuda_kernels.launch_of

    def launch_of(xs: Sequence[torch.Tensor], args: Any, outs: Sequence[torch.Tensor], norm: Any, memo: Any) -> Any:
        parameters = (*norm.weights, *norm.biases) if norm else ()
        tensors = [*xs, *outs, *parameters, args.positions, args.rows]
        kernels.ranges = [_range(tensor) for tensor in tensors if tensor is not None]
        return real(xs, args, outs, norm, memo)

    with (
        mock.patch.object(cuda_kernels, "_why_no_device", return_value=None),
        mock.patch.object(cuda_kernels, "launch_of", launch_of),
        mock.patch.object(cuda_kernels, "_launcher", return_value=kernels),
        mock.patch.object(cuda_kernels, "_processors", return_value=PROCESSORS),
    ):
        yield kernels


def _range(x: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first byte of a view to past the last."""
    if x.numel() == 0:
        return (x.data_ptr(), x.data_ptr())
    span = 1 + sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return (x.data_ptr(), x.data_ptr() + span * x.element_size())
