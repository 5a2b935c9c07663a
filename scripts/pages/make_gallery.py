"""Renders samples/gallery: clips of the sample without and with the patch, a stream, and wrong rotations.

    python scripts/pages/make_gallery.py  # all of it, and scripts/results/gallery.csv
    python scripts/pages/make_gallery.py --clip red-circle-moving-right --out .  # one of its pictures, to look at

Every clip is generated three times from one seed: by the unpatched pipeline, patched in exact mode, and patched in fast
mode. The picture shows the first and the last of them and ten times their difference. Nothing is written unless exact
mode gives the unpatched pixels, fast mode clears the bar of ``tests/samples/test_samples_ssim.py``, and wrong rotations
do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

import dit_rope
from dit_rope.comparison import Frames, Request, frame_ssim, generate, save_preview

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "samples"))

from stream_video import stream_video

from benchmarks.results import read_csv, write_results

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "tiny-wan"
GALLERY = SAMPLE.parent / "gallery"
FPS = 8
ZOOM = 2  # pixels of the picture for one of the video
GAIN = 10
SSIM_MIN, SSIM_MEAN = 0.95, 0.98
SEED = 4
PROMPTS = (
    "a red circle moving right",
    "a green circle moving up",
    "a blue square moving right",
    "a yellow square moving up",
    "a white circle moving left",
    "a red square moving down",
    "a green triangle moving left",
    "a blue triangle moving down",
    "a yellow circle moving down",
    "a white triangle moving right",
)
STREAM = argparse.Namespace(
    prompt=PROMPTS[0], negative_prompt="", seed=SEED, height=96, width=96, frames=13, chunk=2, first_chunk=5, window=5,
    sinks=1, policy="sink_follow", max_frames=None, steps=14, guidance_scale=4.0,
)  # fmt: skip

Row = dict[str, object]
Change = Callable[[Any], Any]


def _with_sign_flipped(args: Any) -> Any:
    return dataclasses.replace(args, inverse=not args.inverse)


def _with_height_and_width_swapped(args: Any) -> Any:
    return dataclasses.replace(args, positions=_relative(args, lambda offsets: offsets[..., [0, 2, 1]]))


def _with_frame_frozen(args: Any) -> Any:
    return dataclasses.replace(args, positions=_relative(args, lambda offsets: offsets * offsets.new_tensor([0, 1, 1])))


def _relative(args: Any, change: Change) -> torch.Tensor:
    """Changes positions as counted from the first row of each axis: all axes share one array of rows."""
    positions = positions_of(args)
    first = positions.amin(dim=1, keepdim=True)
    return first + change(positions - first)


def positions_of(args: Any) -> torch.Tensor:
    """Row of every token on each axis, ``[1 or B, S, axes]``, whether they are given or follow a grid."""
    if args.positions is not None:
        positions: torch.Tensor = args.positions
        return positions
    tokens = torch.arange(args.token_offset, args.token_offset + args.count)
    coordinates = torch.unravel_index(tokens, args.sizes)
    rows = [coordinate + first for coordinate, first in zip(coordinates, args.first_rows, strict=True)]
    return torch.stack(rows, dim=-1)[None].to(torch.int32)


WRONG: dict[str, Change] = {
    "sign flipped": _with_sign_flipped,
    "H and W swapped": _with_height_and_width_swapped,
    "frame frozen": _with_frame_frozen,
}


@contextmanager
def rotating_wrong(change: Change) -> Iterator[None]:
    """While it is open, the arguments of every rotation by dit_rope pass through ``change``."""
    right = dit_rope.rotation.ops.rotate

    def rotate(xs: Any, args: Any, *norm: Any, **options: Any) -> Any:
        return right(xs, change(args), *norm, **options)

    with mock.patch.object(dit_rope.rotation.ops, "rotate", rotate):
        yield


def generated(pipe: Any, request: Request) -> Frames:
    """The decoded video of one run."""
    frames = generate(pipe, request).frames
    assert frames is not None
    return frames


def side_by_side(videos: dict[str, Frames]) -> Frames:
    """One video of all of them from left to right, each enlarged and under its name."""
    size = next(iter(videos.values())).shape[2] * ZOOM
    strip = Image.new("RGB", (size * len(videos), 20), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=13)
    for number, name in enumerate(videos):
        draw.text((number * size + size / 2, 10), name, fill="black", font=font, anchor="mm")
    pictures = np.concatenate(list(videos.values()), axis=2).repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)
    label = np.asarray(strip, dtype=np.float32)[None] / 255
    return np.concatenate((label.repeat(len(pictures), axis=0), pictures), axis=1)


def row_of(file: str, request: Request, side: str, frames: Frames, unpatched: Frames) -> Row:
    """What one video differs from the unpatched one by; largest difference of two pixels, on a scale of 0 to 1."""
    ssim = frame_ssim(frames, unpatched)
    return {
        "file": file, "prompt": request.prompt, "seed": request.seed, "steps": request.steps, "frames": len(frames),
        "side": side, "ssim_min": f"{min(ssim):.6f}", "ssim_mean": f"{np.mean(ssim):.6f}",
        "max_difference": f"{np.abs(frames - unpatched).max():.3g}",
    }  # fmt: skip


def clip(pipe: Any, request: Request, file: str) -> tuple[Frames, list[Row]]:
    """The picture of one prompt, and its figures in both modes.

    Raises:
        ValueError: the patched pixels are not what they must be.
    """
    unpatched = generated(pipe, request)
    with dit_rope.patch(pipe, exact=True):
        exact = generated(pipe, request)
    with dit_rope.patch(pipe, exact=False):
        fast = generated(pipe, request)
    if not np.array_equal(exact, unpatched):
        raise ValueError(f"exact mode must give the unpatched pixels, got others for {request.prompt!r}")
    if not clears_the_bar(frame_ssim(fast, unpatched)):
        raise ValueError(f"fast mode must clear the bar of SSIM, got less for {request.prompt!r}")
    difference = np.minimum(GAIN * np.abs(fast - unpatched), 1)
    shown = {"before": unpatched, "after (fast mode)": fast, f"difference x {GAIN}": difference}
    rows = [row_of(file, request, side, frames, unpatched) for side, frames in (("exact", exact), ("fast", fast))]
    return side_by_side(shown), rows


def wrong(pipe: Any, request: Request, file: str) -> tuple[Frames, list[Row]]:
    """The picture of the right rotation beside wrong ones, each with the mean of its SSIM, and their figures.

    Raises:
        ValueError: a wrong rotation clears the bar.
    """
    unpatched = generated(pipe, request)
    shown, rows = {"right": unpatched}, []
    for name, change in WRONG.items():
        with dit_rope.patch(pipe, exact=True), rotating_wrong(change):
            frames = generated(pipe, request)
        ssim = frame_ssim(frames, unpatched)
        if clears_the_bar(ssim):
            raise ValueError(f"a rotation that is wrong ({name}) must not clear the bar of SSIM, got {np.mean(ssim)}")
        shown[f"{name}, SSIM {np.mean(ssim):.2f}"] = frames
        rows.append(row_of(file, request, name, frames, unpatched))
    return side_by_side(shown), rows


def stream(pipe: Any, options: argparse.Namespace, file: str) -> tuple[Frames, list[Row]]:
    """The picture of a stream, chunk after chunk over a window; there is nothing to compare it with."""
    frames = np.concatenate([pixels for _, pixels in stream_video(pipe, options)])
    row = {"file": file, "prompt": options.prompt, "seed": options.seed, "steps": options.steps, "frames": len(frames)}
    empty = dict.fromkeys(("ssim_min", "ssim_mean", "max_difference"), "")
    return side_by_side({f"{len(frames)} frames, streamed": frames}), [{**row, "side": "stream", **empty}]


def clears_the_bar(ssim: tuple[float, ...]) -> bool:
    """Whether a video is the right one, by its worst frame and by the mean of its frames."""
    return min(ssim) >= SSIM_MIN and float(np.mean(ssim)) >= SSIM_MEAN


def name_of(prompt: str) -> str:
    """The name of a prompt's clip, which is that of its file too."""
    return prompt.removeprefix("a ").replace(" ", "-")


def clips(**changes: Any) -> dict[str, Callable[[Any, str], tuple[Frames, list[Row]]]]:
    """What renders each picture of the gallery, by name; ``changes`` are to the requests."""

    def request(prompt: str) -> Request:
        return Request(**{"prompt": prompt, "seed": SEED, **changes})

    def of_prompt(prompt: str) -> Callable[[Any, str], tuple[Frames, list[Row]]]:
        return lambda pipe, file: clip(pipe, request(prompt), file)

    return {
        **{name_of(prompt): of_prompt(prompt) for prompt in PROMPTS},
        "wrong-rotation": lambda pipe, file: wrong(pipe, request(PROMPTS[0]), file),
        "stream": lambda pipe, file: stream(pipe, STREAM, file),
    }


def page(rows: list[dict[str, str]]) -> str:
    """``samples/gallery/README.md``, of the rows of ``scripts/results/gallery.csv``."""
    fast = [row for row in rows if row["side"] == "fast"]
    exact = {row["file"]: row["max_difference"] for row in rows if row["side"] == "exact"}
    streamed = next(row for row in rows if row["side"] == "stream")
    wrong_ones = [row for row in rows if row["side"] not in ("fast", "exact", "stream")]
    pictures = "\n\n".join(f"![{row['prompt']}: before, after and difference]({row['file']})" for row in fast)
    table = "\n".join(
        f"| {row['prompt']} | {exact[row['file']]} | {row['max_difference']} | {row['ssim_min']} | {row['ssim_mean']} |"
        for row in fast
    )
    wrong_table = "\n".join(
        f"| {row['side']} | {row['max_difference']} | {row['ssim_min']} | {row['ssim_mean']} |" for row in wrong_ones
    )
    return PAGE.format(
        seed=fast[0]["seed"], steps=fast[0]["steps"], torch=fast[0]["torch"], device=fast[0]["device"],
        pictures=pictures, table=table, wrong_table=wrong_table, wrong_file=wrong_ones[0]["file"],
        wrong_prompt=wrong_ones[0]["prompt"], stream_file=streamed["file"], stream_frames=streamed["frames"],
        stream_prompt=streamed["prompt"], window=STREAM.window, gain=GAIN,
    )  # fmt: skip


PAGE = """\
# Gallery

What [tiny-wan](../tiny-wan), a sample pipeline of 10 MB, draws with and without the patch.
`python scripts/pages/make_gallery.py` renders all of it and writes this page and `scripts/results/gallery.csv`, where
the figures below come from: {device}, torch {torch}. `python scripts/pages/make_gallery.py --clip NAME --out FOLDER`
renders one picture alone, where NAME is that of its file without `.webp`.

## Before and after

Ten prompts, seed {seed}, {steps} steps, none left out. From left to right: the unpatched pipeline; the pipeline after
`dit_rope.patch(pipe, exact=False)`; {gain} times the difference of their pixels, where black is no difference. The
transformer runs in bfloat16. In exact mode, the default on a CPU, the pixels after are those before to the bit, so the
pictures show fast mode, which rounds once where the model's own code rounds several times.

The sample is small and its shapes are soft: a square may look like a circle, with the patch as without it.

{pictures}

| prompt | exact: largest difference | fast: largest difference | fast: SSIM, worst frame | fast: SSIM, mean |
|---|---|---|---|---|
{table}

Differences are those of two pixels, on a scale of 0 to 1; SSIM is 1 for equal frames.

## Rotations made wrong

`{wrong_prompt}`, from the same seed, with a rotation that is wrong on purpose:

- every angle has the other sign;
- height and width change places, so that the circle moves down;
- every frame has the position of the first.

The number above each is its mean SSIM against the right video, on the left. dit_rope's own rotation
is made wrong, once the pipeline is patched. `tests/samples/test_samples_ssim.py` has more of these.

![The right rotation, and three wrong ones]({wrong_file})

| rotation | largest difference | SSIM, worst frame | SSIM, mean |
|---|---|---|---|
{wrong_table}

## A stream

{stream_frames} frames of `{stream_prompt}`, two latent frames at a time, each attending to a window of {window} latent
frames. The sample was trained on videos of 17 frames and not to stream:
see [docs/streaming.md](../../docs/streaming.md).

![{stream_frames} streamed frames]({stream_file})
"""


def main() -> None:
    """Render, check, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clip", choices=list(clips()), help="render this one alone, without page and figures")
    parser.add_argument("--out", type=Path, default=GALLERY, help="folder (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = DiffusionPipeline.from_pretrained(SAMPLE, torch_dtype=dtypes, use_safetensors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name, render in clips().items():
        if options.clip in (None, name):
            file = f"{name}.webp"
            frames, figures = render(pipe, file)
            save_preview(frames, options.out / file, fps=FPS)
            rows += figures
            print(file, *(f"{row['side']}: SSIM {row['ssim_min']}" for row in figures), sep="; ")
    if options.clip is None:
        results = write_results("gallery", rows)
        (options.out / "README.md").write_text(page(read_csv(results)))


if __name__ == "__main__":
    main()
