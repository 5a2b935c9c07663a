"""What a run on a GPU needs, what of it is here, and how to get the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass

TORCH_MINIMUM = (2, 9)


@dataclass(frozen=True)
class Requirement:
    """Something a check needs. ``version`` returns its version, or raises an error that names the problem."""

    name: str
    version: Callable[[], str]
    remedy: str
    optional: bool = False


@dataclass(frozen=True)
class Finding:
    """A requirement as this machine has it: its version, or the problem with it."""

    requirement: Requirement
    version: str = ""
    problem: str = ""


def requirements() -> list[Requirement]:
    """Everything that some check needs, required things first."""
    packages = [
        Requirement("torch", _torch, "pip install 'torch>=2.9' (a CUDA build)"),
        Requirement("cuda-core", _imported("cuda.core", "cuda-core"), "pip install cuda-core"),
        Requirement("cuda-bindings", _imported("cuda.bindings.driver", "cuda-bindings"), "pip install cuda-bindings"),
        Requirement("nvrtc", _nvrtc, "pip install nvidia-cuda-nvrtc, of torch's CUDA version"),
        *(
            Requirement(name, _version_of(name), f"pip install {name}")
            for name in ("triton", "numpy", "einops", "pytest", "hypothesis")
        ),
    ]
    peers = "pip install 'dit-rope[bench]', or name their folders with --peer-path"
    return [
        *packages,
        *(Requirement(name, _version_of(name), f"pip install {name}", optional=True) for name in ("typer", "rich")),
        Requirement("pytest-xdist", _version_of("xdist", "pytest-xdist"), "pip install pytest-xdist", optional=True),
        Requirement(
            "diffusers", _version_of("diffusers"), "unpack its wheel into a folder on PYTHONPATH", optional=True
        ),
        Requirement("compute-sanitizer", _sanitizer, "install the CUDA toolkit, or set CUDA_HOME", optional=True),
        Requirement("peers", _peers, peers, optional=True),
    ]


def survey(needed: list[Requirement]) -> list[Finding]:
    """Looks for each requirement on this machine."""
    findings = []
    for requirement in needed:
        try:
            findings.append(Finding(requirement, version=requirement.version()))
        except Exception as error:  # whatever a broken package raises when it is imported
            reason = str(error).strip().splitlines() or [type(error).__name__]
            findings.append(Finding(requirement, problem=reason[0]))
    return findings


def describe(findings: list[Finding]) -> list[str]:
    """One line for each requirement: its version, or what is missing and the remedy."""
    lines = []
    for finding in findings:
        requirement = finding.requirement
        if finding.problem:
            word = "optional, missing" if requirement.optional else "MISSING"
            lines.append(f"  {requirement.name:18} {word}: {finding.problem}; {requirement.remedy}")
        else:
            lines.append(f"  {requirement.name:18} {finding.version}")
    return lines


def sanitizer_path() -> str | None:
    """The compute-sanitizer of the CUDA toolkit, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), f"{home}/bin")))


def _imported(module: str, distribution: str) -> Callable[[], str]:
    def version() -> str:
        importlib.import_module(module)
        return importlib.metadata.version(distribution)

    return version


def _version_of(module: str, distribution: str | None = None) -> Callable[[], str]:
    """Looks for a module without importing it, which takes seconds: a broken one fails the checks that need it."""

    def version() -> str:
        if not _is_there(module):
            raise ModuleNotFoundError(f"No module named {module!r}")
        try:
            return importlib.metadata.version(distribution or module)
        except importlib.metadata.PackageNotFoundError:  # a folder on the path
            return "found"

    return version


def _peers() -> str:
    """Which peers are there, without importing them: some start compilers or contexts on import."""
    from benchmarks.peers import MODULES

    names = [name for name, modules in MODULES.items() if any(map(_is_there, modules))]
    if not names:
        raise ModuleNotFoundError(f"none of {', '.join(MODULES)}")
    return ", ".join(names)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that would hold it
        return False


def _torch() -> str:
    import torch

    numbers = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if numbers < TORCH_MINIMUM:
        raise RuntimeError(f"version must be at least {'.'.join(map(str, TORCH_MINIMUM))}, got {torch.__version__}")
    if torch.version.cuda is None:
        raise RuntimeError(f"it must be built for CUDA, got {torch.__version__}")
    return f"{torch.__version__}, CUDA {torch.version.cuda}"


def _nvrtc() -> str:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _sanitizer() -> str:
    path = sanitizer_path()
    if path is None:
        raise FileNotFoundError("not on PATH nor in CUDA_HOME/bin")
    return path
