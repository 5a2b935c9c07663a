"""Counts the peak memory of activations in a block and in a step of every supported class, before and after a patch.

    python scripts/measure/count_memory.py            # every supported class, by its first example in tests/support/zoo
    python scripts/measure/count_memory.py Wan Flux   # classes whose name holds one of these; writes nothing

Models have released widths with one layer of each kind, run in bfloat16 on CPU, unpatched and with
``dit_rope.patch(model, rounding=Rounding.MODEL)``, as on a GPU. Counted is the second of two forward passes, by
``scripts/benchmarks/live_memory.py``: the most bytes that results of operators hold at once, in the whole pass and
while the first block of each kind that rotates runs. The unit is one tensor of the hidden states of the first such
attention module.
Tables that a patch keeps between the passes do not count; the bytes of them stand beside it.

Writes ``scripts/results/peak-memory.csv``, which comes out the same at every run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import dit_rope
from dit_rope import Rounding
from dit_rope.adapters import adapter_of
from dit_rope.hooks.plan import make_plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.live_memory import LiveMemory
from benchmarks.operator_counts import constant_weights
from benchmarks.results import Row, write_results
from measure.count_operators import chosen, inputs_of
from zoo import Example

DTYPE = torch.bfloat16


def measure(example: Example) -> list[Row]:
    """A row for each kind of block that rotates, and one for the whole step; none where nothing rotates."""
    dit_rope.cache_clear()
    with constant_weights():
        model = example.build(DTYPE, released=True)
    adapter = adapter_of(model)
    assert adapter is not None
    inputs = inputs_of(example, model)
    blocks: dict[str, torch.nn.Module] = {}
    rotations = make_plan("model", model, adapter).rotations
    if not rotations:
        return []
    for rotation in rotations:
        path = block_of(rotation.path)
        blocks.setdefault(re.sub(r"\d+", "*", path), model.get_submodule(path))

    def forward() -> None:
        example.run(model, inputs)

    unit = _hidden_bytes(rotations[0].attention, forward)
    unpatched = peaks(blocks, forward)
    with dit_rope.patch(model, rounding=Rounding.MODEL):
        patched = peaks(blocks, forward)
        info = dit_rope.cache_info()
        kept = sum(cache.bytes for cache in (info.tables, info.models))
    return [
        {
            "model": adapter.model_class,
            "example": example.name,
            "part": part or "step",
            "units_before": round(unpatched[part] / unit, 2),
            "units_after": round(patched[part] / unit, 2),
            "unit_bytes": unit,
            "kept_bytes": kept,
            "diffusers": version("diffusers"),
        }
        for part in unpatched
    ]


def block_of(path: str) -> str:
    """The path of the block that the attention module at ``path`` is part of: up to the last number in it."""
    match = re.match(r".*\.\d+(?=\.)", path)
    return match[0] if match else path.rpartition(".")[0]


def peaks(blocks: dict[str, torch.nn.Module], forward: Callable[[], object]) -> dict[str, int]:
    """The peak of the second of two forward passes, in bytes; of the whole one by the name ""."""
    with torch.no_grad():
        forward()
    memory = LiveMemory()
    peak: dict[str, int] = {}
    outer: list[int] = []

    def begin(*_: Any) -> None:
        outer.append(memory.start_peak())

    def end(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            peak[name] = max(peak.get(name, 0), memory.peak)
            memory.peak = max(memory.peak, outer.pop())

        return note

    handles = []
    for name, block in blocks.items():
        handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end(name))]
    try:
        with torch.no_grad(), memory:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return {"": memory.peak, **peak}


def _hidden_bytes(attention: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the largest tensor that an attention module is given in a forward pass: its hidden states."""
    sizes: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.extend(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dtype is DTYPE)

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
    return max(sizes)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Parts of class names. Default: all.")] = None,
) -> None:
    """Counts the peak memory of activations, unpatched and patched."""
    rows: list[Row] = []
    for example in track(chosen(names or [], every=False), "counting", transient=True):
        for row in measure(example):
            rows.append(row)
            print(row["model"], row["part"], f"{row['units_before']} → {row['units_after']}")
    if not names:
        print(f"wrote {write_results('peak-memory', rows)}")


if __name__ == "__main__":
    typer.run(main)
