"""Patch a diffusers pipeline, generate, and take the patch out again.

python samples/patch_a_pipeline.py [folder or hub id of a Wan pipeline]
"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import dit_rope

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "tiny-wan"
pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)


def generate() -> torch.Tensor:
    """Latents of a small clip, always from the same noise."""
    return pipe(
        prompt="a red circle moving right",
        height=96,
        width=96,
        num_frames=17,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


unpatched = generate()

with dit_rope.patch(pipe) as handle:
    print(handle.report())
    patched = generate()

# On CPU the patch keeps every rounding of the model's own code.
print("bitwise equal:", torch.equal(unpatched, patched))

tables = dit_rope.cache_info().models
print(f"cached tables: {tables.misses} built, {tables.hits} reused, {tables.bytes:,} bytes")
