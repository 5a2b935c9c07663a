"""Times a denoising step of Wan 1.3B's architecture at 480p and 81 frames, with what dit_rope replaces added piecewise.

    python -m gpu_checks.wan_step [--rounds 5] [--rehearse]        (in the folder scripts/)

Random weights, bfloat16, batch 1; eager, and with the repeated blocks compiled. The variants share the weights:
``table cached`` is the unpatched model with the output of its rope module kept; ``rotation`` fuses the rotation with
the model's own roundings, and must give its bits; ``norm and rotation`` fuses both. The share of the rotation in the
unpatched step is that of the kernels of operators on half heads ``[1, tokens, heads, head dim / 2]``, which only the
rotation has. Results go to ``scripts/results/wan-step-<device>.csv``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
import wan_models
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import dit_rope
from dit_rope.benchmark.architectures import ARCHITECTURES
from dit_rope.benchmark.results import Row
from dit_rope.benchmark.timing import measurement, take_turns

from .results import environment, result_path, table, write_rows

SIZES = (21, 60, 104)
TINY_SIZES = (2, 4, 4)
COLUMNS = ("mode", "variant", "ms_p20", "ms_median", "ms_p80", "times_faster_than_unpatched")

Step = Callable[[], torch.Tensor]


def models(model: torch.nn.Module, backend: str) -> dict[str, torch.nn.Module]:
    """The model, and twins that share its weights, each with one more thing replaced."""
    twins = {name: _twin(model) for name in ("table cached", "rotation", "norm and rotation")}
    _cache_table(twins["table cached"].rope)
    dit_rope.patch(twins["rotation"], exact=True, backend=backend)
    dit_rope.patch(twins["norm and rotation"], exact=False, backend=backend)
    return {"unpatched": model, **twins}


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


def check(variants: dict[str, Step]) -> None:
    """Stops the program unless the exact variants give the unpatched model's bits and the other comes near them."""
    expected = variants["unpatched"]()
    for name in ("table cached", "rotation"):
        got = variants[name]()
        if not torch.equal(got, expected):
            sys.exit(f"expected the unpatched bits from {name!r}, got {int((got != expected).sum())} other elements")
    got = variants["norm and rotation"]()
    error = float((got - expected).float().norm() / expected.float().norm())
    if not error < 0.05:
        sys.exit(f"expected 'norm and rotation' within 5 % of the unpatched output, got {error:.1%}: no figures")


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
    """One row for each variant."""
    device = str(latent.device)
    rounds_of = {name: measurement([step], device, latent.nbytes, graph=False) for name, step in variants.items()}
    timings = take_turns(rounds_of, rounds)
    return [
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


def run(device: str, rounds: int, rehearse: bool) -> list[Row]:
    """Eager, then compiled; rows of both."""
    dtype = torch.float32 if rehearse else torch.bfloat16
    model = wan_models.build("wan") if rehearse else ARCHITECTURES["wan-1.3b"].build(None, device, dtype)
    sizes = TINY_SIZES if rehearse else SIZES
    latent = torch.randn(1, model.config.in_channels, *sizes, device=device).to(dtype)
    twins = models(model, "eager" if rehearse else "cuda")
    variants = steps(twins, latent)
    check(variants)
    rows = measure("eager", variants, latent, rounds)
    share = rotary_share(variants["unpatched"], model, latent)
    rows[0]["rotary_share"] = share
    if not rehearse:
        print("\n".join(table(rows, COLUMNS)), flush=True)
        print(f"rotation takes {share:.1%} of the unpatched step in eager mode", flush=True)
    torch._dynamo.config.recompile_limit = 32  # the twins' blocks are one function, compiled for each twin
    for twin in twins.values():
        twin.compile_repeated_blocks(fullgraph=True, backend="eager" if rehearse else "inductor")
    compiled = measure("compiled", variants, latent, rounds)
    if not rehearse:
        print("\n".join(table(compiled, COLUMNS)), flush=True)
    return rows + compiled


def main() -> None:
    """Measures and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on CPU, without figures")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    with torch.inference_mode():
        rows = run(device, 2 if options.rehearse else options.rounds, options.rehearse)
    if options.rehearse:
        print(f"rehearsed {len(rows)} variants without figures")
        return
    print(write_rows(result_path("wan-step", device), rows, environment(device)))


if __name__ == "__main__":
    main()
