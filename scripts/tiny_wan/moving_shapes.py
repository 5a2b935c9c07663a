"""Clips of one coloured shape moving in a named direction: their prompts, a tokenizer, drawing and reading them back.

Every clip is described by a prompt of the grammar ``a <colour> <shape> moving <direction>``. Shapes are drawn from
signed distances, so edges are anti-aliased and a whole batch is drawn without a Python loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "white": (0.93, 0.93, 0.93),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[float, float]] = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}
"""Direction name -> unit step (rows, columns); rows grow downwards."""

BACKGROUND = 0.08
"""Grey level of the plain background, in 0..1."""
RADIUS = (14.0, 17.0)
"""Range of shape radii, in pixels."""
TRAVEL = (32.0, 44.0)
"""Range of the way a shape goes over a whole clip, in pixels."""
MARGIN = 1.2
"""No shape reaches further from its centre than this many radii (the corners of the triangle do)."""


SQUARE = 0.88
"""Half the side of a square, in radii."""
AREAS = (math.pi, 4 * SQUARE**2, 0.75 * math.sqrt(3) * MARGIN**2)
"""Area of each of SHAPES, in squared radii."""


@dataclass(frozen=True)
class Clips:
    """A batch of n clip descriptions; positions are (row, column) in pixels of the full frame."""

    colour: Tensor
    """(n,) index into COLOURS."""
    shape: Tensor
    """(n,) index into SHAPES."""
    direction: Tensor
    """(n,) index into DIRECTIONS."""
    radius: Tensor
    """(n,) pixels."""
    start: Tensor
    """(n, 2) centre at frame 0, pixels."""
    velocity: Tensor
    """(n, 2) pixels a frame."""

    def prompts(self) -> list[str]:
        """Return the prompt of every clip."""
        colours, directions = list(COLOURS), list(DIRECTIONS)
        rows = zip(self.colour.tolist(), self.shape.tolist(), self.direction.tolist(), strict=True)
        return [prompt_of(colours[c], SHAPES[s], directions[d]) for c, s, d in rows]


def prompt_of(colour: str, shape: str, direction: str) -> str:
    """Return the prompt of the grammar for one colour, shape and direction."""
    return f"a {colour} {shape} moving {direction}"


def all_prompts() -> list[str]:
    """Return every prompt of the grammar."""
    return [prompt_of(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def build_text(max_length: int, width: int) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Build the grammar's tokenizer, of one token a word, and a text encoder of random weights that stay frozen.

    Words that are not in the grammar are unknown. With a dozen words, random vectors are far enough apart.
    """
    words = sorted({word for prompt in all_prompts() for word in prompt.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )
    config = UMT5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return fast, UMT5EncoderModel(config).eval().requires_grad_(False)


def name_tokenizer_for_old_releases(folder: Path) -> None:
    """Make a saved pipeline's files name its tokenizer as transformers 4 and 5 both know it; 5 writes a new name."""
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")


def random_clips(count: int, frames: int, size: int, generator: torch.Generator) -> Clips:
    """Draw lots for ``count`` clips of ``frames`` frames whose shapes stay inside a ``size`` x ``size`` pixel frame."""

    def pick(options: int) -> Tensor:
        return torch.randint(options, (count,), generator=generator)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    direction = pick(len(DIRECTIONS))
    radius, travel = between(*RADIUS), between(*TRAVEL)
    way = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[direction] * travel[:, None]
    room = MARGIN * radius[:, None]
    low = room - way.clamp(max=0)
    high = size - room - way.clamp(min=0)
    start = low + (high - low) * torch.rand(count, 2, generator=generator)
    return Clips(pick(len(COLOURS)), pick(len(SHAPES)), direction, radius, start, way / (frames - 1))


def shape_distances(row: Tensor, column: Tensor, radius: Tensor) -> tuple[Tensor, ...]:
    """Return the signed distances, in pixels, of points from the outline of each of SHAPES around the origin."""
    row, column = torch.broadcast_tensors(row, column)
    return (
        torch.sqrt(row**2 + column**2) - radius,
        torch.maximum(row.abs(), column.abs()) - SQUARE * radius,
        torch.maximum(row, math.sqrt(3) / 2 * column.abs() - row / 2) - MARGIN * radius / 2,
    )


def draw(
    clips: Clips, frames: int, height: int, width: int, origin: Tensor | None = None, first_frame: int = 0
) -> Tensor:
    """Draw clips as video, (n, 3, frames, height, width) in -1..1.

    ``origin`` (n, 2) is the pixel (row, column) of the full frame at the window's top left corner, (0, 0) if absent;
    ``first_frame`` is the frame the window starts at.
    """
    time = torch.arange(first_frame, first_frame + frames, dtype=torch.float32)
    centre = clips.start[:, None] + clips.velocity[:, None] * time[None, :, None]
    if origin is not None:
        centre = centre - origin[:, None]
    row = (torch.arange(height) + 0.5)[None, None, :, None] - centre[..., 0, None, None]
    column = (torch.arange(width) + 0.5)[None, None, None, :] - centre[..., 1, None, None]
    radius = clips.radius[:, None, None, None]
    distances = shape_distances(row, column, radius)
    which = clips.shape[:, None, None, None]
    distance = torch.where(which == 0, distances[0], torch.where(which == 1, distances[1], distances[2]))
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    colour = torch.tensor(list(COLOURS.values()))[clips.colour][:, :, None, None, None]
    return 2 * (BACKGROUND + cover * (colour - BACKGROUND)) - 1


def draw_windows(
    count: int, clip_frames: int, clip_size: int, frames: int, size: int, generator: torch.Generator, shapes: int = 2
) -> Tensor:
    """Draw windows (count, 3, frames, size, size) of random clips, with ``shapes`` shapes one over another."""
    video = torch.full((count, 3, frames, size, size), 2 * BACKGROUND - 1)
    first = int(torch.randint(clip_frames - frames + 1, (), generator=generator))
    for _ in range(shapes):
        clips = random_clips(count, clip_frames, clip_size, generator)
        middle = clips.start + clips.velocity * (first + frames / 2)
        reach = size / 2 + MARGIN * clips.radius[:, None] / 2
        offset = reach * (2 * torch.rand(middle.shape, generator=generator) - 1)
        over = draw(clips, frames, size, size, middle - size / 2 + offset, first)
        covered = (over - (2 * BACKGROUND - 1)).abs().amax(1, keepdim=True) > 0.05
        video = torch.where(covered, over, video)
    return video


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: Clips, frames: int, size: int) -> Tensor:
    """Return the autoencoder's mean latents of clips, (n, channels, latent frames, latent height, latent width)."""
    latents = []
    for at in tqdm(range(0, len(clips.radius), 8), desc="latents", mininterval=5):
        clips_of_batch = Clips(*(getattr(clips, field.name)[at : at + 8] for field in fields(Clips)))
        latents.append(vae.encode(draw(clips_of_batch, frames, size, size)).latent_dist.mode())
    return torch.cat(latents)


def describe(video: Tensor) -> str:
    """Name what a video (3, frames, height, width) in -1..1 shows, as a prompt of the grammar, or "" if no shape.

    The colour is the nearest of the palette, the direction is that of the centroid from the first frame to the last,
    and the shape is that which overlaps best, over all frames, when it is drawn around the centroid with the same area.
    """
    pixels = (video + 1) / 2
    mask = (pixels - BACKGROUND).abs().amax(0) > 0.25
    if mask.flatten(1).sum(1).min() < 50:
        return ""
    mean = pixels[:, mask].mean(1)
    palette = torch.tensor(list(COLOURS.values()))
    colour = list(COLOURS)[int((palette - mean).square().sum(1).argmin())]
    rows = torch.arange(mask.shape[1], dtype=torch.float32)
    columns = torch.arange(mask.shape[2], dtype=torch.float32)
    area = mask.sum((1, 2))
    centre = torch.stack([(mask.sum(2) * rows).sum(1) / area, (mask.sum(1) * columns).sum(1) / area], dim=1)
    moved = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32) @ (centre[-1] - centre[0])
    direction = list(DIRECTIONS)[int(moved.argmax())]
    row, column = rows[None, :, None] - centre[:, 0, None, None], columns[None, None] - centre[:, 1, None, None]
    overlaps = []
    for which, unit in enumerate(AREAS):
        ideal = shape_distances(row, column, (area / unit).sqrt()[:, None, None])[which] < 0
        overlaps.append(((mask & ideal).sum() / (mask | ideal).sum()).item())
    shape = SHAPES[overlaps.index(max(overlaps))]
    return prompt_of(colour, shape, direction)


def count_matches(prompts: list[str], videos: Tensor) -> dict[str, int]:
    """Count the videos in which ``describe`` reads what the prompt says, as a whole and part by part."""
    words = [prompt.split() for prompt in prompts]
    read = [(describe(video) or "- - - - -").split() for video in videos]
    pairs = list(zip(words, read, strict=True))
    counts = {name: sum(a[at] == r[at] for a, r in pairs) for name, at in (("colour", 1), ("shape", 2), ("motion", 4))}
    return {"everything": sum(a == r for a, r in pairs)} | counts


def sample_prompts(
    folder: Path, prompts: list[str], frames: int, size: int, steps: int, guidance: float, seed: int
) -> Tensor:
    """Load a pipeline folder and return a video of each prompt, (n, 3, frames, size, size) in -1..1."""
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    videos = []
    for at in tqdm(range(0, len(prompts), 12), desc="samples"):
        batch = prompts[at : at + 12]
        result = pipeline(
            prompt=batch,
            height=size,
            width=size,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + at + number) for number in range(len(batch))],
            output_type="pt",
        )
        videos.append(result.frames.transpose(1, 2).float() * 2 - 1)
    return torch.cat(videos)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, video: Tensor) -> tuple[float, Tensor]:
    """Send videos (n, 3, ...) in -1..1 through an autoencoder; return their mean PSNR in dB, and what came out."""
    rebuilt = vae.decode(vae.encode(video).latent_dist.mode()).sample
    error = (rebuilt - video) / 2
    return float((-10 * torch.log10(error.square().mean((1, 2, 3, 4)))).mean()), rebuilt


def contact_sheet(videos: Tensor, every: int = 4) -> Tensor:
    """Lay videos (n, 3, frames, height, width) in -1..1 out as an image, one a row: (rows, columns, 3) of uint8."""
    frames = videos[:, :, ::every]
    count, channels, shown, height, width = frames.shape
    tiled = frames.permute(0, 3, 2, 4, 1).reshape(count * height, shown * width, channels)
    return ((tiled.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
