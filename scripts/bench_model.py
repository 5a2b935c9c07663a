"""Times whole forward passes of a Wan transformer with random weights, unpatched and patched in several ways.

    python scripts/bench_model.py                        # 2 layers of Wan 1.3B (12 heads of 128), CPU, small grid
    python scripts/bench_model.py --device cuda --layers 30 --latent 21x60x104 --dtype bfloat16

Patched exactly, the output must equal the unpatched one to the bit before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import diffusers
import torch
from benchmarking import interleave, keep_freed_memory, write_results

import dit_rope


def build(layers: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Wan 1.3B's architecture (12 heads of 128 channels) with ``layers`` blocks; its rope tables stay float32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=layers).eval()
    tables = {name: buffer.float() for name, buffer in model.rope.named_buffers()}
    model.to(dtype)
    for name, buffer in tables.items():
        setattr(model.rope, name, buffer)
    return model


def cases(
    model: torch.nn.Module, latent: torch.Tensor, text: torch.Tensor, compiled: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """One denoising forward of the model, and of patched twins that share its weights."""
    timestep = torch.tensor([500], device=latent.device)

    def forward_of(transformer: torch.nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: transformer(latent, timestep, text, return_dict=False)[0]

    def patched(exact: bool) -> torch.nn.Module:
        twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        dit_rope.patch(twin, exact=exact)
        return twin

    variants = {
        "unpatched": forward_of(model),
        "patched exact": forward_of(patched(exact=True)),
        "patched fast": forward_of(patched(exact=False)),
    }
    if compiled:
        variants["compiled unpatched"] = forward_of(torch.compile(model, fullgraph=True))
    return variants


def measure(options: argparse.Namespace, dtype_name: str) -> list[dict[str, object]]:
    """Checks, times and prints every variant in one dtype; one row each."""
    dtype = getattr(torch, dtype_name)
    model = build(options.layers, dtype, options.device)
    frames, height, width = (int(size) for size in options.latent.split("x"))
    latent = torch.randn(1, 16, frames, height, width, device=options.device).to(dtype)
    text = torch.randn(1, 512, 4096, device=options.device).to(dtype)
    with torch.inference_mode():
        variants = cases(model, latent, text, options.compile)
        if not torch.equal(variants["patched exact"](), variants["unpatched"]()):
            raise SystemExit("patched exact differs from unpatched: nothing was timed")
        timings = interleave(variants, options.rounds)
    rows: list[dict[str, object]] = []
    for name, timing in timings.items():
        ratio = round(timings["unpatched"].median / timing.median, 3)
        rows.append(
            {
                "layers": options.layers,
                "latent": options.latent,
                "dtype": dtype_name,
                "variant": name,
                "ms_p20": round(timing.p20, 2),
                "ms_median": round(timing.median, 2),
                "ms_p80": round(timing.p80, 2),
                "times_faster_than_unpatched": ratio,
            }
        )
        print(f"{dtype_name:9} {name:20} {timing.median:10.1f} ms  unpatched / this {ratio}")
    return rows


def main() -> None:
    """Runs one shape and writes ``results/model-<cpu or cuda>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--latent", default="5x30x52", help="latent frames x height x width, before patching")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the unpatched model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = [row for dtype in options.dtype for row in measure(options, dtype)]
    print(write_results(f"model-{options.device.partition(':')[0]}", rows, options.device))


if __name__ == "__main__":
    main()
