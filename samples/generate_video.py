"""Generate a video with a diffusers pipeline of your own, its rotary embedding computed by dit_rope.

    python samples/generate_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat on a skateboard"
        --height 480 --width 832 --frames 81 --steps 50 --out cat.mp4

Without --model it runs the small sample of this repository. The three lines that matter in your own program are
``import dit_rope``, ``handle = dit_rope.patch(pipe)`` and, to take it out again, ``handle.undo()``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

import dit_rope

SAMPLE = Path(__file__).resolve().parent / "tiny-wan"


def main() -> None:
    """Load, patch, generate, save."""
    args = read_arguments()

    pipe = DiffusionPipeline.from_pretrained(
        args.model,
        # Wan's authors keep the autoencoder in float32; in bfloat16 its frames show blocks.
        torch_dtype={"default": getattr(torch, args.dtype), "vae": torch.float32},
        use_safetensors=True,
    ).to(args.device)

    handle = dit_rope.patch(pipe)
    print(handle.report())

    frames = pipe(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(args.seed),
    ).frames[0]

    export_to_video(list(frames), str(args.out), fps=args.fps)
    print(f"wrote {args.out}")
    print(dit_rope.cache_info().models)
    handle.undo()


def read_arguments() -> argparse.Namespace:
    """Return the command line; the defaults suit the sample."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=str(SAMPLE), help="folder or hub id of a text-to-video pipeline")
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--height", type=int, default=96, help="pixels")
    parser.add_argument("--width", type=int, default=96, help="pixels")
    parser.add_argument("--frames", type=int, default=17, help="a multiple of 4, plus 1")
    parser.add_argument("--fps", type=int, default=16, help="frames a second of the file")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of all but the autoencoder")
    parser.add_argument("--out", type=Path, default=Path("video.mp4"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
