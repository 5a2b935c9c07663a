#!/usr/bin/env python3
"""Writes ``dit_rope/hooks/known_code.json``: digests of the diffusers code that adapters were written for.

Run it after an adapter was written or checked against a version of diffusers, whose tests must pass: the code of the
installed diffusers becomes known code. ``--keep`` adds to what the file holds, so that several versions are known.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

from dit_rope.hooks.adapter_code import Digests, methods_of
from dit_rope.hooks.fused_norms import KNOWN_NORMS
from dit_rope.hooks.known_code import LIBRARY
from dit_rope.models import ADAPTERS

TARGET = Path(__file__).parents[2] / "dit_rope" / "hooks" / "known_code.json"


def norm_classes() -> Iterator[type]:
    """The norms of the installed diffusers that kernels compute."""
    for name in KNOWN_NORMS:
        module, _, cls = name.rpartition(".")
        if module.startswith(f"{LIBRARY}."):
            try:
                yield getattr(importlib.import_module(module), cls)
            except (ModuleNotFoundError, AttributeError):
                continue


def collect() -> tuple[dict[str, str], list[str]]:
    """Digests by slot, and the models that the installed diffusers does not have."""
    digests: dict[str, str] = {}
    missing: list[str] = []
    packages = frozenset({LIBRARY})
    for adapter in ADAPTERS:
        try:
            methods = list(methods_of(adapter))
        except ModuleNotFoundError:
            missing.append(adapter.model_class)
            continue
        for _, cls, method in methods:
            if cls is not None and hasattr(cls, method):
                digests |= Digests(cls, method, packages).digests
    for norm in norm_classes():
        digests |= Digests(norm, "forward", packages).digests
    return digests, missing


def write(keep: bool) -> str:
    """Writes the file, with what it holds already if ``keep``; returns a line that says what it holds now."""
    sources: dict[str, list[str]] = json.loads(TARGET.read_text()) if keep and TARGET.exists() else {}
    digests, missing = collect()
    for slot, digest in digests.items():
        sources[slot] = sorted({*sources.get(slot, []), digest})
    TARGET.write_text(json.dumps(dict(sorted(sources.items())), indent=0) + "\n")
    return f"{len(sources)} functions, {sum(map(len, sources.values()))} sources; without {len(missing)} models"


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="add to what the file holds")
    print(write(parser.parse_args().keep))


if __name__ == "__main__":
    main()
