"""Which checks a run consists of, in which order, and how long each part takes."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import PATHS, ROOT
from .requirements import sanitizer_path
from .runner import Check, Part
from .targets import PEERS_RUN, SHARES_RUN

FIRST_BEHAVIOURS = ("small-shapes", "graph-replay", "two-threads", "one-kernel")
"""Say whether the kernels of a backend run at all."""
OTHER_BEHAVIOURS = ("two-streams", "long-sequence-and-batch", "past-2^31-elements", "torch-compile")
WAN_BEHAVIOUR = "wan-without-copies"
CONTRACT = tuple(str(path) for path in sorted((ROOT / "tests" / "backends").glob("backend_contract*.py")))

# Seconds, all estimates: nothing has been measured on a GPU yet.
# Importing torch and making a CUDA context, which every check does.
START = 8.0
# Of one core: building a plan of the CUDA kernel with NVRTC, and a specialisation of a Triton kernel.
COMPILATION = {"cuda": 0.14, "triton": 0.47}
# Compilations of the contract tests, and Triton's launchers, which a C compiler builds.
CONTRACT_COMPILATIONS = {"cuda": 460, "triton": 522}
LAUNCHERS, LAUNCHER_SECONDS = {"cuda": 0, "triton": 48}, 1.0
CONTRACT_TESTS, TEST_SECONDS = 583, 0.2
WORKERS = 6
SWEEP_SECONDS = 60.0
# The longest that whole benchmarks measure; they begin no operation after it and finish what they have begun.
PEERS_SECONDS, TRITON_SECONDS = 120.0, 40.0
# Imports 15, building 1.4 billion weights 20, 39 eager passes of 0.75 s, compiling two models 40, 10 passes more.
WAN_STEP_SECONDS = 110.0
# How much longer than estimated a check may take while there is time.
PATIENCE = 3.0

_CUDA = ("cuda-core", "cuda-bindings", "nvrtc")
_NEEDS = {"cuda": _CUDA, "triton": ("triton",)}
_PYTEST = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short")
_TESTS = ("numpy", "einops", "pytest", "hypothesis")


def contract_seconds(backend: str) -> float:
    """How long the contract tests of a backend take in ``WORKERS`` processes."""
    work = CONTRACT_COMPILATIONS[backend] * COMPILATION[backend] + LAUNCHERS[backend] * LAUNCHER_SECONDS
    return 2 * START + (work + CONTRACT_TESTS * TEST_SECONDS) / WORKERS


def environment() -> dict[str, str]:
    """Environment variables of every check: the project runs from the checkout, and downloads nothing."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([*PATHS, *paths]), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def parts(results: Path, peer_paths: Sequence[str] = ()) -> list[Part]:
    """All parts on a GPU, what matters most first; figures go to the folder ``results``."""
    into = f"--results={results}"
    peers = [f"--peer-path={path}" for path in peer_paths]
    return [
        _part("kernel", START + 12, _behaviours("cuda", FIRST_BEHAVIOURS)),
        _part("headline", START + 17, _benchmark("headline", _CUDA, f"--run={SHARES_RUN}", into)),
        _part(
            "sweep", START + SWEEP_SECONDS, _benchmark("sweep", _CUDA, "--sweep", f"--seconds={SWEEP_SECONDS}", into)
        ),
        _part("contract", contract_seconds("cuda"), _contract("cuda")),
        _part(
            "behaviours",
            START + 60,
            _behaviours("cuda", OTHER_BEHAVIOURS),
            _behaviours("cuda", (WAN_BEHAVIOUR,), ("diffusers",)),
            _gpu_tests(),
            *(_sanitized(tool) for tool in ("memcheck", "racecheck")),
        ),
        _part(
            "peers",
            START + PEERS_SECONDS,
            _benchmark("peers", _CUDA, f"--run={PEERS_RUN}", f"--seconds={PEERS_SECONDS}", into, *peers),
        ),
        _part(
            "triton",
            contract_seconds("triton"),
            _contract("triton"),
            _behaviours("triton", (*FIRST_BEHAVIOURS, *OTHER_BEHAVIOURS)),
        ),
        _part(
            "triton-times",
            START + TRITON_SECONDS,
            _benchmark("triton-times", ("triton",), "--run=triton", f"--seconds={TRITON_SECONDS}", into),
        ),
        _part("wan-step", WAN_STEP_SECONDS, _wan_step(into)),
    ]


def rehearsal(results: Path) -> list[Part]:
    """The same programs on CPU at tiny sizes; contract tests are only collected: the test suite runs them."""
    into, names = f"--results={results}", (*FIRST_BEHAVIOURS, *OTHER_BEHAVIOURS, WAN_BEHAVIOUR)
    contract = (*_PYTEST, "--collect-only", "-q", *CONTRACT)
    return [
        _part("kernel", 10, _on_cpu(_behaviours("cuda", names, (), "--rehearse"))),
        _part("headline", 10, _on_cpu(_benchmark("headline", (), "--rehearse", f"--run={SHARES_RUN}", into))),
        _part("sweep", 10, _on_cpu(_benchmark("sweep", (), "--rehearse", "--sweep", into))),
        _part("contract", 10, _on_cpu(Check("contract, cuda", contract, 0))),
        _part("peers", 20, _on_cpu(_benchmark("peers", (), "--rehearse", f"--run={PEERS_RUN}", into))),
        _part("wan-step", 15, _on_cpu(_wan_step("--rehearse", into))),
    ]


def _part(name: str, seconds: float, *checks: Check) -> Part:
    return Part(name, seconds, tuple(replace(check, seconds=PATIENCE * seconds) for check in checks))


def _on_cpu(check: Check) -> Check:
    without_gpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "5"}
    return replace(check, environment={**without_gpu, "DIT_ROPE_BACKEND": "eager", "DIT_ROPE_DEVICE": "cpu"})


def _contract(backend: str) -> Check:
    chosen = {"DIT_ROPE_BACKEND": backend, "DIT_ROPE_DEVICE": "cuda"}
    return Check(f"contract, {backend}", (*_PYTEST, *_workers(), *CONTRACT), 0, (*_NEEDS[backend], *_TESTS), chosen)


def _behaviours(backend: str, names: Sequence[str], needs: Sequence[str] = (), *options: str) -> Check:
    """Behaviours of a backend in one process, one result for each."""
    return Check(
        f"behaviours, {backend}",
        _module("behaviours", "--backend", backend, *options),
        0,
        (*_NEEDS[backend], *needs) if "--rehearse" not in options else (),
        reports={name: f"{name}, {backend}" for name in names},
    )


def _sanitized(tool: str) -> Check:
    """The small shapes under compute-sanitizer, kernels of dit_rope alone; torch must not hide bounds in its blocks."""
    sanitizer = (sanitizer_path() or "compute-sanitizer", "--tool", tool, "--kernel-name", "kns=rotate")
    command = (*sanitizer, "--error-exitcode", "9", *_module("behaviours", "small-shapes", "--backend", "cuda"))
    return Check(
        f"{tool}, cuda",
        command,
        0,
        (*_CUDA, "compute-sanitizer"),
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        skips=("Device not supported",),
    )


def _gpu_tests() -> Check:
    """The tests with a GPU path; the contract, which some of them run, is a separate check."""
    command = (*_PYTEST, *_workers(), "-m", "gpu", "-k", "not contract", *gpu_test_files())
    return Check("gpu-tests", command, 0, (*_CUDA, "triton", *_TESTS, "diffusers", "typer"))


def gpu_test_files() -> list[str]:
    """The files whose tests have the marker ``gpu`` or take the fixture ``device``; reading the others takes longer."""
    marked = re.compile(r"mark\.gpu\b|\bdef \w+\([^)]*\bdevice\b")
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if marked.search(path.read_text())]


def _workers() -> tuple[str, ...]:
    """Several processes, where pytest can have them."""
    return ("-n", str(WORKERS)) if importlib.util.find_spec("xdist") else ()


def _benchmark(name: str, needs: Sequence[str], *options: str) -> Check:
    script = str(ROOT / "scripts" / "measure" / "bench_kernels.py")
    return Check(name, (sys.executable, script, *options), 0, needs, shown=True)


def _wan_step(*options: str) -> Check:
    needs = () if "--rehearse" in options else (*_CUDA, "diffusers")
    return Check("wan-step", _module("wan_step", *options), 0, needs, shown=True)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"gpu_checks.{name}", *arguments)
