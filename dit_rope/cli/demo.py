"""``dit-rope demo``: one video, generated with and without the patch."""

from __future__ import annotations

import importlib.util
import inspect
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .options import Device, DType, parse_sizes, pick_device

if TYPE_CHECKING:
    from ..comparison import Comparison

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "tiny-wan"
"""The trained pipeline of a checkout; a wheel does not contain it."""
REQUIRED = ("imageio", "imageio_ffmpeg", "skimage", "transformers")


def run(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a text-to-video pipeline. Default: the checkout's sample.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a red circle moving right",
    negative_prompt: Annotated[str, typer.Option(help="What not to draw.")] = "",
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 20,
    frames: Annotated[int, typer.Option(min=1, help="Frames of the video.")] = 17,
    size: Annotated[str, typer.Option(help="Pixels: one number, or HEIGHTxWIDTH.")] = "96",
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side; they alternate.")] = 1,
    device: Device = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Default: bfloat16 on cuda, else float32. The autoencoder stays in float32.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for videos, contact sheet and figures.")] = Path("demo-output"),
) -> None:
    """Generate a video with and without the patch from one seed, and show what changed.

    The defaults suit the sample of the checkout; give a bigger model its own --steps, --frames and --size.
    """
    from .. import comparison

    console = Console()
    height, width = parse_sizes(size if "x" in size.lower() else f"{size}x{size}", "--size", ("HEIGHT", "WIDTH"))
    device = pick_device(device)
    pipe = load_pipeline(model, device, dtype)
    request = comparison.Request(prompt, negative_prompt, steps, frames, height, width, seed, guidance_scale)
    total = 2 * min(comparison.WARM_UP_STEPS, steps) + 2 * repeats * steps
    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("warm-up", total=total)
        result = comparison.compare(
            pipe, request, repeats=repeats, progress=lambda name: bar.update(task, advance=1, description=name)
        )
    precision = str(pipe.transformer.dtype).removeprefix("torch.")
    setup = {"model": model or "samples/tiny-wan", "device": device, "dtype": precision}
    write_results(result, setup, out)
    console.print(result.report, markup=False, highlight=False)
    console.print(_table(result))
    console.print(f"Wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}", highlight=False)


def load_pipeline(model: str | None, device: str, dtype: DType | None) -> Any:
    """Loads a text-to-video pipeline, by default the checkout's sample, with its autoencoder in float32.

    Raises:
        typer.BadParameter: the pipeline does not exist, needs more than a prompt, contains code, or has weights in
            another format than safetensors; or a package is missing.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)} must be installed: pip install 'dit-rope[demo]'")
    if model is None and not (SAMPLE / "model_index.json").is_file():
        raise typer.BadParameter(
            "must be given: this installation has no samples/tiny-wan, which only the repository carries. "
            "Name a folder or a hub id of a text-to-video pipeline, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            param_hint="--model",
        )
    # Some versions of diffusers run code in a local folder without asking.
    code = (
        [] if model is None else sorted(path.name for path in (*Path(model).glob("*.py"), *Path(model).glob("*/*.py")))
    )
    if code:
        raise typer.BadParameter(f"must be a folder without code, got {', '.join(code)}", param_hint="--model")
    from diffusers import DiffusionPipeline

    dtype = dtype or (DType.bfloat16 if device.startswith("cuda") else DType.float32)
    dtypes = {"default": dtype.torch, "vae": torch.float32}
    try:
        with warnings.catch_warnings():
            # torch_dtype is deprecated in the newest versions of diffusers, but older ones know no other name.
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(
                model or str(SAMPLE), torch_dtype=dtypes, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    parameters = inspect.signature(pipe.__call__).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed or "num_frames" not in {p.name for p in parameters}:
        raise typer.BadParameter(
            f"must be a text-to-video pipeline, got {type(pipe).__name__}, which takes {needed or 'no num_frames'}",
            param_hint="--model",
        )
    return pipe.to(device)


def write_results(result: Comparison, setup: dict[str, str], out: Path) -> None:
    """Writes both videos, a contact sheet, an animated preview and the figures into the folder ``out``."""
    import numpy as np

    from .. import comparison

    out.mkdir(parents=True, exist_ok=True)
    comparison.save_video(result.unpatched, out / "unpatched.mp4")
    comparison.save_video(result.patched, out / "patched.mp4")
    videos = {"unpatched": result.unpatched, "patched": result.patched}
    comparison.save_contact_sheet(videos, out / "contact_sheet.png")
    comparison.save_preview(np.concatenate(list(videos.values()), axis=2), out / "preview.webp")
    (out / "report.json").write_text(json.dumps(setup | result.figures(), indent=2) + "\n")
    heading = "\n".join(f"- {name}: {value}" for name, value in (setup | {"prompt": result.request.prompt}).items())
    (out / "report.md").write_text(f"{heading}\n\n{result.markdown()}")


def _table(result: Comparison) -> Table:
    table = Table("", "unpatched", "patched")
    for row in result.rows():
        table.add_row(*row)
    return table
