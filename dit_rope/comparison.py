"""Generates a video with and without the patch from one seed, and compares time, table bytes and pixels.

Pictures need scikit-image (SSIM), Pillow (sheets, previews) and imageio-ffmpeg (mp4): ``pip install dit-rope[demo]``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .patching import Patch, patch
from .tables.caches import cache_clear, cache_info

WARM_UP_STEPS = 2
SIDES = ("unpatched", "patched")

Frames = np.ndarray[tuple[int, int, int, int], np.dtype[np.float32]]
"""A video: ``[frames, height, width, 3]``, float32 in 0..1."""
Progress = Callable[[str], None]
"""Called after every denoising step with the name of its run."""


@dataclass(frozen=True)
class Request:
    """The arguments of a text-to-video pipeline of diffusers; sizes in pixels.

    Raises:
        ValueError: fewer than 2 steps, of which the first is not timed.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    frames: int = 17
    height: int = 96
    width: int = 96
    seed: int = 0
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}; the first step is not timed")


@dataclass(frozen=True)
class Generation:
    """One run of a pipeline.

    Attributes:
        frames: the video; None if the latents were not decoded.
        step_seconds: duration of each step but the first: diffusers calls back at the end of a step only.
    """

    frames: Frames | None
    step_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Side:
    """Time and memory of one side of a comparison.

    Attributes:
        step_seconds: every timed step of every repeat.
        handed_bytes: memory of the rotary tensors that the model's rope module hands to its blocks in a forward pass.
        cached_bytes: memory of the tables that dit_rope keeps between passes.
    """

    step_seconds: tuple[float, ...]
    handed_bytes: int
    cached_bytes: int

    @property
    def seconds_per_step(self) -> float:
        """Median over all timed steps."""
        return statistics.median(self.step_seconds)

    def percentile(self, percent: int) -> float:
        """The ``percent``-th percentile of the timed steps, in seconds."""
        return float(np.percentile(self.step_seconds, percent))

    def spread(self) -> str:
        """The middle three fifths of the timed steps, in seconds."""
        return f"{self.percentile(20):.4f} to {self.percentile(80):.4f}"


@dataclass(frozen=True)
class Comparison:
    """A video generated without and with the patch, and the figures of both.

    Attributes:
        unpatched, patched: the two videos.
        before, after: time and table bytes without and with the patch.
        cache_hits, cache_misses: lookups of cached tables in all patched runs, warm-up included.
        ssim: structural similarity of each pair of frames, 1 when equal.
        max_difference: largest absolute difference of two pixels, on a scale of 0..1.
        report: what the patch replaced.
    """

    request: Request
    unpatched: Frames
    patched: Frames
    before: Side
    after: Side
    cache_hits: int
    cache_misses: int
    ssim: tuple[float, ...]
    max_difference: float
    report: str

    def figures(self) -> dict[str, Any]:
        """The request and every figure, as JSON can hold them."""
        sides = {
            name: {
                "seconds_per_step": side.seconds_per_step,
                "seconds_per_step_p20": side.percentile(20),
                "seconds_per_step_p80": side.percentile(80),
                "timed_steps": len(side.step_seconds),
                "handed_bytes": side.handed_bytes,
                "cached_bytes": side.cached_bytes,
            }
            for name, side in (("unpatched", self.before), ("patched", self.after))
        }
        return {
            "request": asdict(self.request),
            **sides,
            "cache_hits": self.cache_hits,
            "cache_misses": self.cache_misses,
            "ssim_min": float(np.min(self.ssim)),
            "ssim_mean": float(np.mean(self.ssim)),
            "max_difference": self.max_difference,
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """The figures as text: (label, unpatched, patched)."""
        before, after = self.before, self.after
        lowest, mean = np.min(self.ssim), np.mean(self.ssim)
        return [
            ("seconds per step, median", f"{before.seconds_per_step:.4f}", f"{after.seconds_per_step:.4f}"),
            ("seconds per step, p20 to p80", before.spread(), after.spread()),
            ("table bytes handed to the blocks", f"{before.handed_bytes:,}", f"{after.handed_bytes:,}"),
            ("table bytes kept in caches", f"{before.cached_bytes:,}", f"{after.cached_bytes:,}"),
            ("cached tables: hits, misses", "", f"{self.cache_hits:,}, {self.cache_misses:,}"),
            ("SSIM of frames, min and mean", "", f"{lowest:.6f}, {mean:.6f}"),
            ("largest pixel difference (0 to 1)", "", f"{self.max_difference:.3g}"),
        ]

    def markdown(self) -> str:
        """The rows as a Markdown table."""
        lines = ["| | unpatched | patched |", "|---|---|---|"]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in self.rows()]) + "\n"


def generate(
    pipe: Any, request: Request, *, decode: bool = True, on_step: Callable[[], None] | None = None
) -> Generation:
    """Runs a text-to-video pipeline once, from the request's seed, with its own progress bar off.

    Args:
        pipe: a diffusers pipeline with the call signature of ``WanPipeline``.
        request: what to generate.
        decode: whether to decode the latents into frames.
        on_step: called after every step.
    """
    ticks: list[float] = []

    def tick(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        device = kwargs["latents"].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ticks.append(time.perf_counter())
        if on_step is not None:
            on_step()
        return kwargs

    with _quiet(pipe):
        video = pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="np" if decode else "latent",
            callback_on_step_end=tick,
        ).frames
    seconds = tuple(after - before for before, after in itertools.pairwise(ticks))
    return Generation(np.asarray(video[0], dtype=np.float32) if decode else None, seconds)


def compare(pipe: Any, request: Request, *, repeats: int = 1, progress: Progress | None = None) -> Comparison:
    """Generates the request without and with :func:`dit_rope.patch`, and measures both.

    Both sides are warmed up with two steps. Then runs alternate, every other pair in reverse order, so that a machine
    that slows down does not favour one side. Only the first run of each side is decoded. The pipeline is left
    unpatched, and dit_rope's caches are cleared first: their contents are one of the figures.

    Args:
        pipe: an unpatched text-to-video pipeline.
        request: what to generate.
        repeats: timed runs of each side.
        progress: called after every step with ``"warm-up"``, ``"unpatched"`` or ``"patched"``.

    Raises:
        UnsupportedModelError: nothing in the pipeline can be patched.
        ValueError: ``repeats`` is below 1.

    Example:
        >>> from diffusers import DiffusionPipeline
        >>> from dit_rope.comparison import Request, compare
        >>> pipe = DiffusionPipeline.from_pretrained("samples/tiny-wan")
        >>> request = Request("a red circle moving right", steps=2, frames=5, height=32, width=32)
        >>> compare(pipe, request).max_difference  # exact mode, the default on a CPU
        0.0
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    cache_clear()
    handed = {name: _warm_up(pipe, name, request, progress) for name in SIDES}
    runs: dict[str, list[Generation]] = {name: [] for name in SIDES}
    report = ""
    for repeat in range(repeats):
        for name in SIDES if repeat % 2 == 0 else reversed(SIDES):
            with _side(pipe, name) as handle:
                runs[name].append(generate(pipe, request, decode=repeat == 0, on_step=_announce(progress, name)))
                if handle is not None:
                    report = handle.report()
    caches = cache_info()
    used = caches.tables, caches.axes, caches.expanded, caches.models
    before, after = (tuple(second for run in runs[name] for second in run.step_seconds) for name in SIDES)
    unpatched, patched = (_frames(runs[name][0]) for name in SIDES)
    return Comparison(
        request=request,
        unpatched=unpatched,
        patched=patched,
        before=Side(before, handed["unpatched"], cached_bytes=0),
        after=Side(after, handed["patched"], cached_bytes=sum(cache.bytes for cache in used)),
        cache_hits=caches.tables.hits + caches.models.hits,
        cache_misses=caches.tables.misses + caches.models.misses,
        ssim=frame_ssim(unpatched, patched),
        max_difference=float(np.abs(unpatched - patched).max()),
        report=report,
    )


def frame_ssim(first: Frames, second: Frames) -> tuple[float, ...]:
    """Structural similarity of each frame of two videos of one shape (Wang et al. 2004, scikit-image's defaults).

    Raises:
        ValueError: the shapes differ.
        ImportError: scikit-image is missing.
    """
    from skimage.metrics import structural_similarity

    if first.shape != second.shape:
        raise ValueError(f"second must have the shape of first, {first.shape}, got {second.shape}")
    return tuple(
        float(structural_similarity(a, b, channel_axis=-1, data_range=1.0)) for a, b in zip(first, second, strict=True)
    )


def save_video(frames: Frames, path: Path, fps: int = 16) -> None:
    """Writes an mp4 file by diffusers' own exporter; 16 frames a second is Wan's rate."""
    from diffusers.utils import export_to_video

    export_to_video(list(frames), str(path), fps=fps)


def save_preview(frames: Frames, path: Path, fps: int = 16) -> None:
    """Writes an animated picture that loops: ``.gif`` or ``.webp``, by the suffix of ``path``."""
    first, *rest = _pictures(frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def save_contact_sheet(videos: dict[str, Frames], path: Path, columns: int = 6) -> None:
    """Writes a PNG with one video a row under its name, frames from left to right, evenly spaced in time.

    All videos must have the shape of the first.
    """
    from PIL import Image, ImageDraw

    count, height, width, _ = next(iter(videos.values())).shape
    shown = sorted({round(i) for i in np.linspace(0, count - 1, min(columns, count))})
    margin = 16
    sheet = Image.new("RGB", (len(shown) * width, len(videos) * (height + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, frames) in enumerate(videos.items()):
        top = row * (height + margin)
        draw.text((2, top + 2), f"{name}, frames {', '.join(map(str, shown))}", fill="black")
        for column, picture in enumerate(_pictures(frames[shown])):
            sheet.paste(picture, (column * width, top + margin))
    sheet.save(path)


def _side(pipe: Any, name: str) -> AbstractContextManager[Patch | None]:
    return patch(pipe) if name == "patched" else nullcontext()


def _warm_up(pipe: Any, name: str, request: Request, progress: Progress | None) -> int:
    """Runs two steps of one side; returns the most bytes that a rope module handed out in one call."""
    short = replace(request, steps=min(WARM_UP_STEPS, request.steps))
    with _side(pipe, name), _rope_output_bytes(pipe) as handed:
        generate(pipe, short, decode=False, on_step=_announce(progress, "warm-up"))
    return max(handed, default=0)


def _pictures(frames: Frames) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(np.rint(frame.clip(0, 1) * 255).astype(np.uint8)) for frame in frames]


def _frames(generation: Generation) -> Frames:
    if generation.frames is None:
        raise ValueError("the first run of each side must be decoded")
    return generation.frames


def _announce(progress: Progress | None, name: str) -> Callable[[], None] | None:
    return None if progress is None else lambda: progress(name)


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Disables the progress bar of the pipeline within the context."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**(before | {"disable": True}))
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@contextmanager
def _rope_output_bytes(pipe: Any) -> Iterator[list[int]]:
    """Collects the bytes that each call of a ``rope`` module of the pipeline's transformers returned."""
    collected: list[int] = []

    def collect(_module: Any, _args: Any, output: Any) -> None:
        collected.append(_storage_bytes(output))

    models = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    modules = [model.rope for model in models if model is not None and hasattr(model, "rope")]
    hooks = [module.register_forward_hook(collect) for module in modules]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def _storage_bytes(output: torch.Tensor | Sequence[torch.Tensor]) -> int:
    """Bytes of memory behind one tensor or several; memory that two of them share counts once."""
    tensors = [output] if isinstance(output, torch.Tensor) else output
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
