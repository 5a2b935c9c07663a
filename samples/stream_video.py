"""Stream a video of any length from a Wan pipeline: block-causal attention over a rolling window, in constant memory.

    python samples/stream_video.py                       # 50 latent frames from the sample, which was trained on 5
    python samples/stream_video.py --frames 500 --policy window_relative --window 8 --sinks 2

Frames come in chunks. Each chunk is denoised by several forwards and run once more when it is clean, all at the same
positions; its self-attention sees the sinks, the frames that are kept and the chunk itself. Frames are decoded and
written as they come. The folder ``--out`` gets the video, a contact sheet and a plot of time and memory per chunk,
``scripts/results/streaming-<device>.csv`` the figures behind it. Needs the extra ``dev``, for matplotlib.

The model must have been trained to stream for the video to be good. The sample was not: see ``docs/streaming.md``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import psutil
import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from matplotlib import pyplot
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dit_rope
from dit_rope import PositionPolicy, RollingCache, RopeSpec, RopeStream
from dit_rope.comparison import save_contact_sheet

SAMPLE = Path(__file__).resolve().parent / "tiny-wan"
SHEET_FRAMES = 24
CLEAN = 0
"""Timestep of the forward that leaves the keys and values of finished frames in the caches."""


class StreamingAttention:
    """Self-attention of one Wan block over a stream, in place of diffusers' ``WanAttnProcessor``."""

    def __init__(self, cache: RollingCache) -> None:
        self.cache = cache

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """Rotates the chunk's queries and keys at the stream's positions, and attends to the window."""
        projections = (attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (*projections, attn.to_v(hidden_states)))
        window = self.cache.append(key, value)
        parts = (x.transpose(1, 2) for x in (self.cache.stream.rotate(query), window.keys, window.values))
        attended = torch.nn.functional.scaled_dot_product_attention(*parts)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


@contextmanager
def streaming(transformer: Any, stream: RopeStream, batch: int) -> Iterator[list[RollingCache]]:
    """While it is open, every block of ``transformer`` attends to a rolling cache of its own; yields the caches."""
    config = transformer.config
    blocks = [block.attn1 for block in transformer.blocks]
    before = [attention.processor for attention in blocks]
    sizes = {"batch": batch, "heads": config.num_attention_heads, "head_dim": config.attention_head_dim}
    caches = [RollingCache(stream, **sizes, dtype=transformer.dtype) for _ in blocks]
    try:
        for attention, cache in zip(blocks, caches, strict=True):
            attention.set_processor(StreamingAttention(cache))
        yield caches
    finally:
        for attention, processor in zip(blocks, before, strict=True):
            attention.set_processor(processor)


def stream_of(pipe: Any, options: argparse.Namespace) -> RopeStream:
    """The positions of the video: the model's rotation, its tokens of a frame, and the window."""
    config = pipe.transformer.config
    side = 2 * (config.attention_head_dim // 6)
    _, patch_height, patch_width = config.patch_size
    pixels = pipe.vae_scale_factor_spatial
    return RopeStream(
        RopeSpec((config.attention_head_dim - 2 * side, side, side)),
        (options.height // pixels // patch_height, options.width // pixels // patch_width),
        window_frames=options.window,
        sink_frames=options.sinks,
        policy=PositionPolicy(options.policy),
        max_frames=options.max_frames,
        device=pipe.device,
    )


@torch.no_grad()
def denoise_chunk(
    pipe: Any, stream: RopeStream, frames: int, text: torch.Tensor, noise: torch.Generator, options: argparse.Namespace
) -> torch.Tensor:
    """The latents ``[1, C, frames, h, w]`` of the next frames. ``text`` has the negative prompt first."""
    pixels, channels = pipe.vae_scale_factor_spatial, pipe.transformer.config.in_channels
    shape = (1, channels, frames, options.height // pixels, options.width // pixels)
    latents = torch.randn(shape, generator=noise).to(stream.device)

    def forward(timestep: torch.Tensor | int) -> torch.Tensor:
        times = torch.as_tensor(timestep, device=stream.device).expand(2)
        x = latents.to(pipe.transformer.dtype).expand(2, -1, -1, -1, -1)
        predicted = pipe.transformer(x, times, text, return_dict=False)[0]
        negative, positive = predicted.float().chunk(2)
        return negative + options.guidance_scale * (positive - negative)

    stream.begin_chunk(frames)
    pipe.scheduler.set_timesteps(options.steps, device=stream.device)
    for timestep in pipe.scheduler.timesteps:
        latents = pipe.scheduler.step(forward(timestep), timestep, latents, return_dict=False)[0]
    forward(CLEAN)
    stream.commit()
    return latents


class StreamingDecoder:
    """Decodes latents as they come: Wan's autoencoder is causal, and keeps the frames its convolutions look back to."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.kept: list[Any] = [None] * len(list(vae.decoder.modules()))  # one for each convolution is enough
        self.first = True
        self.mean, self.std = (
            torch.tensor(numbers, device=vae.device, dtype=vae.dtype)[:, None, None, None]
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> np.ndarray:
        """Pixels ``[frames, height, width, 3]`` float32 in 0..1 of the next latents ``[1, C, frames, h, w]``."""
        x = self.vae.post_quant_conv(latents.to(self.vae.dtype) * self.std + self.mean)
        parts = []
        for frame in x.split(1, dim=2):
            parts.append(self.vae.decoder(frame, feat_cache=self.kept, feat_idx=[0], first_chunk=self.first))
            self.first = False
        video, patch = torch.cat(parts, dim=2), self.vae.config.patch_size or 1
        video = rearrange(video, "1 (c p2 p1) f h w -> f (h p1) (w p2) c", p1=patch, p2=patch)
        return (video.clamp(-1, 1).float().cpu().numpy() + 1) / 2


@dataclass(frozen=True)
class ChunkFigures:
    """What denoising one chunk took, and the memory after it; CPU seconds are those of all threads."""

    chunk: int
    start_frame: int
    frames: int
    seconds: float
    cpu_seconds: float
    resident_mib: float
    key_value_mib: float
    table_kib: float


def stream_video(pipe: Any, options: argparse.Namespace) -> Iterator[tuple[ChunkFigures, np.ndarray]]:
    """Yields the figures and the pixels of chunk after chunk."""
    text = torch.cat(pipe.encode_prompt(options.prompt, options.negative_prompt, device=pipe.device)[::-1])
    text = text.to(pipe.transformer.dtype)
    noise = torch.Generator().manual_seed(options.seed)
    stream, decode = stream_of(pipe, options), StreamingDecoder(pipe.vae)
    with streaming(pipe.transformer, stream, batch=2) as caches:
        for number in itertools.count():
            first = stream.start_frame
            if first == options.frames:
                return
            frames = min(options.chunk if first else options.first_chunk, options.frames - first)
            began, cpu_began = time.perf_counter(), time.process_time()
            latents = denoise_chunk(pipe, stream, frames, text, noise, options)
            if pipe.device.type == "cuda":
                torch.cuda.synchronize(pipe.device)
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            pixels = decode(latents)
            tables = dit_rope.cache_info()
            figures = ChunkFigures(
                chunk=number,
                start_frame=first,
                frames=frames,
                seconds=round(seconds, 4),
                cpu_seconds=round(cpu_seconds, 4),
                resident_mib=round(resident_bytes(pipe.device) / 2**20, 2),
                key_value_mib=sum(cache.bytes for cache in caches) / 2**20,
                table_kib=(tables.tables.bytes + tables.axes.bytes + tables.angles.bytes) / 2**10,
            )
            yield figures, pixels


def resident_bytes(device: torch.device) -> int:
    """Memory of this process, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def plot(figures: list[ChunkFigures], path: Path) -> None:
    """Draws time and memory of every chunk over the frames of the stream."""
    at = [chunk.start_frame for chunk in figures]
    pyplot.rcParams["svg.fonttype"] = "none"
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 4.5), layout="constrained")
    above.plot(at, [chunk.seconds for chunk in figures], marker=".", label="on the clock")
    above.plot(at, [chunk.cpu_seconds for chunk in figures], marker=".", label="of the processor")
    above.set(ylabel="seconds a chunk", ylim=(0, None))
    above.legend()
    below.plot(at, [chunk.resident_mib for chunk in figures], marker=".", label="process")
    below.plot(at, [chunk.key_value_mib for chunk in figures], marker=".", label="keys and values")
    below.set(xlabel="first latent frame of the chunk", ylabel="MiB", ylim=(0, None))
    below.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Load, stream, save."""
    options = read_arguments()
    torch.set_num_threads(options.threads)
    pipe = DiffusionPipeline.from_pretrained(
        options.model,
        torch_dtype={"default": getattr(torch, options.dtype), "vae": torch.float32},
        use_safetensors=True,
    ).to(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    figures: list[ChunkFigures] = []
    shown: list[np.ndarray] = []  # a few frames, for the sheet
    every = max(1, 4 * options.frames // SHEET_FRAMES)
    columns = (TextColumn("streaming"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn())
    with (
        imageio.get_writer(str(options.out / "stream.mp4"), fps=options.fps, quality=8) as video,
        Progress(*columns) as progress,
    ):
        task, written = progress.add_task("", total=options.frames), 0
        for chunk, pixels in stream_video(pipe, options):
            for frame in pixels:
                video.append_data(np.rint(frame * 255).astype(np.uint8))
                if written % every == 0:
                    shown.append(frame.copy())
                written += 1
            figures.append(chunk)
            progress.advance(task, chunk.frames)
    rows = [np.stack(shown[first : first + 6]) for first in range(0, len(shown) // 6 * 6, 6)] or [np.stack(shown)]
    labels = [f"every {every}th frame from {6 * every * row}" for row in range(len(rows))]
    save_contact_sheet(dict(zip(labels, rows, strict=True)), options.out / "sheet.png")
    plot(figures, options.out / "streaming.svg")
    settings = {"window": options.window, "sinks": options.sinks, "policy": options.policy, "steps": options.steps}
    settings |= {"device": str(pipe.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    with (options.out / "streaming.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*asdict(figures[0]), *settings], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(chunk) | settings for chunk in figures)
    print(f"wrote {written} frames to {options.out / 'stream.mp4'}, the figures of its chunks beside it")


def read_arguments() -> argparse.Namespace:
    """Return the command line; the defaults suit the sample."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=str(SAMPLE), help="folder or hub id of a Wan text-to-video pipeline")
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--height", type=int, default=96, help="pixels")
    parser.add_argument("--width", type=int, default=96, help="pixels")
    parser.add_argument("--frames", type=int, default=50, help="latent frames, of 4 frames each but for the first")
    parser.add_argument("--chunk", type=int, default=2, help="latent frames denoised together")
    parser.add_argument("--first-chunk", type=int, default=5, help="latent frames of the first chunk")
    parser.add_argument("--window", type=int, default=5, help="latent frames a chunk attends to, its own included")
    parser.add_argument("--sinks", type=int, default=1, help="first latent frames that stay in the window")
    parser.add_argument("--policy", default="sink_follow", choices=[policy.value for policy in PositionPolicy])
    parser.add_argument("--max-frames", type=int, help="positions there are, with --policy clamp")
    parser.add_argument("--steps", type=int, default=14, help="denoising forwards of a chunk")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=int, default=16, help="frames a second of the file")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of all but the autoencoder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; those of the sample wait for one another")
    parser.add_argument("--out", type=Path, default=Path("demo-output/stream"), help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
