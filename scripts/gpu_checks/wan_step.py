"""Times a denoising step of Wan 1.3B's architecture at 480p and 81 frames, by what is patched.

    python -m gpu_checks.wan_step [--rounds 3] [--rehearse]        (in the folder scripts/)

Random weights, bfloat16, batch 1; eager, then two of them with the repeated blocks compiled. The variants share the
weights: ``table cached`` is the unpatched model with the output of its rope module kept; ``rotation`` fuses the
rotation with the model's own roundings, and must give its bits; ``norm and rotation`` fuses both. The share of the
rotation in the unpatched step is that of the kernels of operators on half heads ``[1, tokens, heads, head dim / 2]``,
which only the rotation has. Results go to ``wan-step-<device>.csv`` in the folder ``--results``, those of eager mode
before anything is compiled; a variant that is wrong becomes a row with the reason, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import dit_rope
from benchmarks.architectures import ARCHITECTURES
from benchmarks.results import Row
from benchmarks.rotation import one_line
from benchmarks.timing import measurement, take_turns
from zoo import wan

from .results import RESULTS, Record, result_path, table

SIZES = (21, 60, 104)
TINY_SIZES = (2, 4, 4)
FUSED = "norm and rotation"
COMPILED = ("unpatched", FUSED)
COLUMNS = ("mode", "variant", "ms_p20", "ms_median", "ms_p80", "times_faster_than_unpatched")

Step = Callable[[], torch.Tensor]


def models(model: torch.nn.Module, backend: str) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """The model, and twins that share its weights, each with one more thing replaced; and why others could not be."""
    replacements: dict[str, Callable[[torch.nn.Module], object]] = {
        "table cached": lambda twin: _cache_table(twin.rope),
        "rotation": functools.partial(dit_rope.patch, exact=True, backend=backend),
        FUSED: functools.partial(dit_rope.patch, exact=False, backend=backend),
    }
    twins, problems = {"unpatched": model}, {}
    for name, replace in replacements.items():
        twin = _twin(model)
        try:
            replace(twin)
        except Exception as error:  # such as a patch that is refused: the others are measured
            problems[name] = one_line(error)
        else:
            twins[name] = twin
    return twins, problems


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _cache_table(rope: torch.nn.Module) -> None:
    """Keeps what the rope module gave for a shape of latents."""
    build_table, known = rope.forward, {}

    def forward(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if latent.shape not in known:
            known[latent.shape] = build_table(latent)
        return known[latent.shape]

    rope.forward = forward


def steps(twins: dict[str, torch.nn.Module], latent: torch.Tensor) -> dict[str, Step]:
    """One denoising step of each model on the same noise and text."""
    text = torch.randn(1, 512, twins["unpatched"].config.text_dim, device=latent.device).to(latent.dtype)
    timestep = torch.tensor([500], device=latent.device)
    return {name: lambda twin=twin: twin(latent, timestep, text, return_dict=False)[0] for name, twin in twins.items()}


def wrong(variants: dict[str, Step]) -> dict[str, str]:
    """What is wrong with variants, by name: the fused one must come near the unpatched output, others give its bits."""
    expected = variants["unpatched"]()
    found: dict[str, str] = {}
    for name in [name for name in variants if name != "unpatched"]:
        try:
            got = variants[name]()
        except Exception as error:  # whatever a kernel or its compiler raises: the others are measured
            found[name] = one_line(error)
            continue
        error = float((got - expected).float().norm() / expected.float().norm())
        if name != FUSED and not torch.equal(got, expected):
            found[name] = f"expected the unpatched bits, got {int((got != expected).sum())} other elements"
        elif not error < 0.05:
            found[name] = f"expected an output within 5 % of the unpatched one, got {error:.1%}"
    return found


def rotary_share(step: Step, model: torch.nn.Module, latent: torch.Tensor) -> float:
    """Share of the step's kernel time (CPU time on CPU) in operators on half heads."""
    cuda = latent.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
    tokens = latent[0, 0].numel() // 4
    half_heads = [1, tokens, model.config.num_attention_heads, model.config.attention_head_dim // 2]
    total = rotary = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        # A kernel's time is also that of the operator that launched it, which alone knows the shapes.
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            total += spent
        if event.device_type == DeviceType.CPU and half_heads in event.input_shapes:
            rotary += spent
    return rotary / total


def measure(mode: str, variants: dict[str, Step], latent: torch.Tensor, rounds: int) -> list[Row]:
    """One row for each variant; the reason in place of figures for those that are wrong."""
    problems = wrong(variants)
    device = str(latent.device)
    rounds_of = {
        name: measurement([step], device, latent.nbytes, graph=False)
        for name, step in variants.items()
        if name not in problems
    }
    timings = take_turns(rounds_of, rounds, warm_up=1)  # each has run once or twice already
    rows = [
        {
            "mode": mode,
            "variant": name,
            "ms_p20": timing.p20,
            "ms_median": timing.median,
            "ms_p80": timing.p80,
            "times_faster_than_unpatched": timings["unpatched"].median / timing.median,
        }
        for name, timing in timings.items()
    ]
    return rows + [_problem(mode, name, reason) for name, reason in problems.items()]


def _problem(mode: str, variant: str, reason: str) -> Row:
    return {"mode": mode, "variant": variant, "note": reason}


def run(device: str, rounds: int, rehearse: bool, record: Record) -> None:
    """Eager, then compiled; the rows of each are written when they are known."""
    dtype = torch.float32 if rehearse else torch.bfloat16
    # Built on the CPU, as from_pretrained does: a GPU computes other last bits of some table entries.
    model = wan.build("wan") if rehearse else ARCHITECTURES["wan-1.3b"].build(None, "cpu", dtype).to(device)
    latent = torch.randn(1, model.config.in_channels, *(TINY_SIZES if rehearse else SIZES), device=device).to(dtype)
    twins, problems = models(model, "eager" if rehearse else "cuda")
    record.add([_problem("eager", name, reason) for name, reason in problems.items()])
    variants = steps(twins, latent)
    rows = measure("eager", variants, latent, rounds)
    record.add(rows)
    rows[0]["rotary_share"] = share = rotary_share(variants["unpatched"], model, latent)
    record.add([])
    if not rehearse:
        print("\n".join(table(rows, COLUMNS)), flush=True)
        print(f"rotation takes {share:.1%} of the unpatched step in eager mode", flush=True)
    torch._dynamo.config.recompile_limit = 32  # the twins' blocks are one function, compiled for each twin
    compiled = [name for name in COMPILED if name in twins]
    for name in compiled:
        twins[name].compile_repeated_blocks(fullgraph=True, backend="eager" if rehearse else "inductor")
    rows = measure("compiled", {name: variants[name] for name in compiled}, latent, rounds)
    record.add(rows)
    if not rehearse:
        print("\n".join(table(rows, COLUMNS)), flush=True)


def main() -> None:
    """Measures and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, metavar="DIR", help="a folder for the CSV file; scripts/results")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on CPU; no CSV file without --results")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    folder = options.results or (None if options.rehearse else RESULTS)
    record = Record(result_path("wan-step", device, folder) if folder else None, device)
    with torch.inference_mode():
        run(device, options.rounds, options.rehearse, record)
    failed = [row for row in record.rows if row.get("note")]
    for row in failed:
        print(f"{row['mode']}, {row['variant']}: {row['note']}")
    print(f"{len(record.rows)} rows, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
