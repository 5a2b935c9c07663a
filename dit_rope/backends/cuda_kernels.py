"""Finds the CUDA sources that ship with the package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def kernel_sources() -> Path:
    """The folder with the CUDA headers and sources: ``kernels/`` of the repository, as this installation carries it.

    A wheel installs it as ``dit_rope/_kernels``; in a checkout, and in an editable install of one, it stands beside
    the package. ``importlib.resources`` does not find the second, which is why the two places are looked up by path.

    Raises:
        FileNotFoundError: when neither place has it, naming both.
    """
    candidates = (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels")
    for folder in candidates:
        if (folder / "rope.cuh").is_file():
            return folder
    raise FileNotFoundError(f"rope.cuh must be in {candidates[0]} or {candidates[1]}; reinstall dit_rope")
