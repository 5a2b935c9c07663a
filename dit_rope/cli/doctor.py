"""``dit-rope doctor``: what is installed, on which devices, and which backend is chosen."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..rotation.backends.cuda_plan import kernel_sources
from ..rotation.choice import explain_backends

GPU_PACKAGES = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "triton")
PACKAGES = ("torch", *GPU_PACKAGES, "diffusers", "transformers", "accelerate", "peft", "einops")


def run() -> None:
    """Print versions, devices, the backend chosen on each device, and why the others are not."""
    console = Console()
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("dit-rope", __version__)
    versions.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        versions.add_row(package, _version(package))
    versions.add_row("CUDA of torch", torch.version.cuda or "none: a build without CUDA")
    versions.add_row("CUDA kernel sources", _kernels())
    console.print(versions)
    for device, description in devices().items():
        backends = Table("backend", "verdict", title=f"{device}: {description}", title_justify="left")
        for backend, verdict in explain_backends(device):
            backends.add_row(backend, verdict)
        console.print(backends)


def devices() -> dict[str, str]:
    """Every torch device of this machine, with a description."""
    descriptions = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        descriptions[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.backends.mps.is_available():
        descriptions["mps"] = "Apple GPU"
    return descriptions


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    try:
        return str(kernel_sources())
    except FileNotFoundError as error:
        return str(error)
