"""Which checks a run consists of."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import PATHS, ROOT
from .requirements import sanitizer_path
from .runner import Check

BACKENDS = ("cuda", "triton")
BEHAVIOURS = (
    "small-shapes",
    "past-2^31-elements",
    "long-sequence-and-batch",
    "graph-replay",
    "torch-compile",
    "two-streams",
    "two-threads",
    "one-kernel",
)
CONTRACT = tuple(str(path) for path in sorted((ROOT / "tests").glob("backend_contract*.py")))
BENCHMARK, WAN_STEP = "benchmark", "wan-step"
# The rest of a run's time goes to the checks before them.
BENCHMARK_SECONDS, WAN_STEP_SECONDS = 150.0, 110.0

_CORE = ("triton", "cuda-core", "cuda-bindings", "nvrtc", "numpy", "einops")
_BENCHMARK_NEEDS = (*_CORE, "diffusers")
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short")


def environment() -> dict[str, str]:
    """What every check runs with: nothing installed of the project, and no download."""
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([*PATHS, *given]), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def checks(peer_paths: Sequence[str]) -> list[Check]:
    """All checks on a GPU; the longest first, so that the short ones fill the time beside them."""
    return [
        *(_contract(backend) for backend in BACKENDS),
        Check("results of what is timed", _benchmark(peer_paths, "--check-only"), 200, _BENCHMARK_NEEDS),
        _gpu_tests(),
        *(_sanitized(tool) for tool in ("memcheck", "racecheck")),
        *(_behaviour(name, backend) for backend in BACKENDS for name in BEHAVIOURS),
        _behaviour("wan-without-copies", "cuda", ("diffusers",)),
        # It begins nothing after its own limit, but finishes what it has begun, such as a compilation.
        Check(
            BENCHMARK,
            _benchmark(peer_paths, f"--seconds={BENCHMARK_SECONDS - 25:.0f}"),
            BENCHMARK_SECONDS,
            _BENCHMARK_NEEDS,
            alone=True,
        ),
        Check(WAN_STEP, _module("wan_step"), WAN_STEP_SECONDS, _BENCHMARK_NEEDS, alone=True),
    ]


def rehearsal() -> list[Check]:
    """The same programs on CPU at tiny sizes; the contract tests, which have CPU runs of their own, are collected."""
    one_thread = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "5"}
    rehearse = "--rehearse"
    contract = {**one_thread, "DIT_ROPE_BACKEND": "eager", "DIT_ROPE_DEVICE": "cpu"}
    return [
        Check(WAN_STEP, _module("wan_step", rehearse), 60, environment=one_thread),
        Check("contract", (*_PYTEST, "--collect-only", *CONTRACT), 60, environment=contract),
        Check("behaviours", _module("behaviours", rehearse), 60, environment=one_thread),
        Check(BENCHMARK, _benchmark((), rehearse), 60, environment=one_thread),
    ]


def _contract(backend: str) -> Check:
    chosen = {"DIT_ROPE_BACKEND": backend, "DIT_ROPE_DEVICE": "cuda"}
    return Check(f"contract, {backend}", (*_PYTEST, *CONTRACT), 200, (*_CORE, "pytest", "hypothesis"), chosen)


def _behaviour(name: str, backend: str, needs: Sequence[str] = ()) -> Check:
    return Check(f"{name}, {backend}", _module("behaviours", name, "--backend", backend), 90, (*_CORE, *needs))


def _sanitized(tool: str) -> Check:
    """The small shapes under compute-sanitizer, our kernels alone; torch must not hide bounds in its own blocks."""
    sanitizer = (sanitizer_path() or "compute-sanitizer", "--tool", tool, "--kernel-name", "kns=rotate")
    command = (*sanitizer, "--error-exitcode", "9", *_module("behaviours", "small-shapes", "--backend", "cuda"))
    return Check(
        f"{tool}, cuda",
        command,
        150,
        (*_CORE, "compute-sanitizer"),
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        skips=("Device not supported",),
    )


def _gpu_tests() -> Check:
    """The tests with a GPU path; the contract, which some of them run, is a check of its own."""
    command = (*_PYTEST, "-m", "gpu", "-k", "not contract", str(ROOT / "tests"))
    return Check("gpu-tests", command, 150, (*_CORE, "pytest", "hypothesis"))


def _benchmark(peer_paths: Sequence[str], *options: str) -> tuple[str, ...]:
    script = str(ROOT / "scripts" / "bench_kernels.py")
    return (sys.executable, script, *options, *(f"--peer-path={path}" for path in peer_paths))


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"gpu_checks.{name}", *arguments)
