"""Writes the frames that the SSIM tests compare with: those of the sample pipeline without dit_rope.

Usage: ``python scripts/tiny_wan/write_reference_frames.py``. Run it again only after the sample was trained again,
and look at the frames before committing them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from dit_rope.comparison import Request, generate

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "tiny-wan"
REQUEST = Request("a red circle moving right", steps=20, frames=17, height=96, width=96, seed=4, guidance_scale=4.0)


def main() -> None:
    """Generate on CPU in float32; write one PNG a frame and the request."""
    frames = generate(DiffusionPipeline.from_pretrained(SAMPLE, use_safetensors=True), REQUEST).frames
    folder = SAMPLE / "reference"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("frame_*.png"):
        old.unlink()
    for number, frame in enumerate(frames):
        Image.fromarray(np.rint(frame * 255).astype(np.uint8)).save(folder / f"frame_{number:02}.png", optimize=True)
    (folder / "request.json").write_text(json.dumps(asdict(REQUEST), indent=2) + "\n")
    print(f"wrote {len(frames)} frames to {folder}")


if __name__ == "__main__":
    main()
