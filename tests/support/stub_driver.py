"""Builds a CUDA driver without a GPU: a ``libcuda.so.1`` with every function that cuda-bindings declares.

``stub_driver/libcuda.c`` is what the launch path needs of it; the other functions do nothing and succeed. With its
folder first on LD_LIBRARY_PATH, the real cuda-core, cuda-bindings and NVRTC run over it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "stub_driver" / "libcuda.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class Launch(ctypes.Structure):
    """One call of cuLaunchKernel, as the stub keeps it."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("parameter", ctypes.c_void_p),
        ("arguments", ctypes.c_ubyte * 512),
    )


def why_not() -> str | None:
    """Why the stub cannot be built or used here, or None where it can."""
    if COMPILER is None:
        return "no C compiler (cc, gcc or clang) to build the stub of the CUDA driver"
    missing = [name for name in ("cuda.core", "cuda.bindings") if not _is_there(name)]
    return f"{' and '.join(missing)} must be installed, with NVRTC" if missing else None


def _is_there(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that holds it
        return False


def declared() -> list[str]:
    """Names of the driver's functions, as cuda-bindings declares them."""
    spec = util.find_spec("cuda.bindings")
    assert spec is not None
    assert spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / "cydriver.pxd").read_text()
    return sorted(set(re.findall(r"^cdef CUresult (cu\w+)\(", text, re.M)))


def build(folder: Path) -> Path:
    """Builds ``libcuda.so.1`` in ``folder``, which goes on LD_LIBRARY_PATH.

    Raises:
        RuntimeError: the compiler failed, with what it said.
    """
    text = SOURCE.read_text()
    written = set(re.findall(r"^CUresult (cu\w+)\(", text, re.M))
    stubs = "".join(f"CUresult {name}() {{ ENTER; return SUCCESS; }}\n" for name in declared() if name not in written)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libcuda.c").write_text(text + stubs + _error_names())
    options = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
    done = subprocess.run(
        [str(COMPILER), "libcuda.c", *options, "-lpthread", "-ldl"], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{COMPILER} failed:\n{done.stderr[:8000]}")
    return folder


def _error_names() -> str:
    from cuda.bindings import driver

    cases = "".join(f'case {int(error)}: return "{error.name}"; ' for error in driver.CUresult)
    return f"const char* error_name(CUresult error) {{ switch (error) {{ {cases}default: return NULL; }} }}\n"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that is to find the stub in ``folder``."""
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


class Driver:
    """The stub, in a process that runs over it."""

    def __init__(self, argument_bytes: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.stub_function.restype = ctypes.c_char_p
        self._library.stub_argument_bytes(ctypes.c_size_t(argument_bytes))
        self._argument_bytes = argument_bytes

    @contextmanager
    def failing(self, name: str, error: int) -> Iterator[None]:
        """While it is open, a function of the driver fails."""
        self._library.stub_fail(name.encode(), error)
        try:
            yield
        finally:
            self._library.stub_fail(name.encode(), 0)

    @contextmanager
    def broken(self, error: int) -> Iterator[None]:
        """While it is open, every function fails, as all do once a kernel has faulted."""
        self._library.stub_break(error)
        try:
            yield
        finally:
            self._library.stub_break(0)

    def set_device(self, index: int) -> None:
        """What CUDA's runtime does when torch makes a device current."""
        self._library.stub_set_device(index)

    def calls(self) -> dict[str, int]:
        """How often each function was called, of those that were."""
        names = [self._library.stub_function(number) for number in range(self._library.stub_functions())]
        counts = {name.decode(): self._library.stub_calls(name) for name in names}
        return {name: count for name, count in counts.items() if count}

    @property
    def unloaded(self) -> int:
        """Libraries that were unloaded."""
        return int(self._library.stub_unloaded())

    @property
    def launched(self) -> int:
        """Launches so far."""
        return int(self._library.stub_launches())

    def launches(self, since: int = 0) -> list[Launch]:
        """The launches after the first ``since``; the last 64 are kept."""
        records = []
        for number in range(since, self.launched):
            launch = Launch()
            self._library.stub_launch(number, ctypes.byref(launch))
            records.append(launch)
        return records

    def arguments(self, launch: Launch) -> bytes:
        """The struct that a kernel was launched with."""
        return bytes(launch.arguments)[: self._argument_bytes]
