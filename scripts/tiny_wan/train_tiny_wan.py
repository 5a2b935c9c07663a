"""Trains a tiny text-to-video pipeline on a CPU, and writes it as a diffusers ``WanPipeline`` folder.

The data are clips that ``moving_shapes.py`` draws. Two models are trained in turn: the video autoencoder, then, on its
latents, the transformer. Every step has another seed, so that a killed run continues from its last checkpoint with
the same batches. Set OMP_WAIT_POLICY=PASSIVE if other programs share the CPU.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import moving_shapes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

Text = tuple[PreTrainedTokenizerFast, UMT5EncoderModel]

FRAMES, SIZE = 17, 96  # of a training clip; SIZE is its height and width in pixels
LATENT_CHANNELS, TEXT_DIM = 8, 64
TEXT_SLOTS, PIPELINE_TEXT_SLOTS = 8, 512  # prompts are padded to the first here, to the second by WanPipeline
FLOW_SHIFT = 3.0
PROMPT_DROPOUT, SAMPLING_STEPS, GUIDANCE = 0.1, 20, 4.0
CHECKPOINT_SECONDS = 120
VAE_WINDOWS = ((2, 9, 48), (1, 17, 48), (2, 9, 48), (1, 9, 64))
"""(clips, frames, height = width in pixels) of the autoencoder's batches, taken in turn."""


@dataclass
class Run:
    """What one training stage has done so far: the loss of every step, and the wall time over all starts."""

    losses: list[float]
    seconds: float


class PaddedTextAttention(WanAttnProcessor):
    """Wan's attention over short prompts, with the result it has for prompts padded to PIPELINE_TEXT_SLOTS.

    WanPipeline pads the prompt's embeddings with zeros and lets the transformer attend to them. All padding slots have
    the same key and value, so m of them weigh as much as k do whose logits are raised by log(m / k). Training on
    TEXT_SLOTS slots with that bias halves the cost of a step.
    """

    bias: Tensor | None = None
    """(batch, 1, 1, TEXT_SLOTS) added to the logits."""

    def __call__(self, attn: WanAttention, states: Tensor, text: Tensor, mask: None, rotary: None) -> Tensor:
        """Attend from states (batch, tokens, dim) to text (batch, TEXT_SLOTS, dim)."""
        return super().__call__(attn, states, text, self.bias, rotary)


def seeded(*numbers: int) -> torch.Generator:
    """Return a generator whose state depends on all the numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(mixed)


def build_vae() -> AutoencoderKLWan:
    """Build the autoencoder: 2x2 pixel patches, then two more halvings in space and time, so 8x8x4 in all.

    Wan 2.2's residual form, whose shortcuts carry colours through from the start, learns several times faster here.
    """
    vae = AutoencoderKLWan(
        base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )
    # A posterior as wide as the prior drowns the untrained mean, and the autoencoder never starts to use its latents.
    torch.nn.init.constant_(vae.quant_conv.bias.data[LATENT_CHANNELS:], -8.0)
    return vae


def build_transformer() -> WanTransformer3DModel:
    """Build the transformer; 32 dimensions a head split into 12 rotary ones for time and 10 each for rows, columns."""
    return WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
    )


def encode_prompts(text: Text, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return prompt embeddings (n, TEXT_SLOTS, TEXT_DIM), zero after the end, and attention biases (n, TEXT_SLOTS)."""
    tokenizer, encoder = text
    ids = tokenizer(prompts, padding="max_length", max_length=TEXT_SLOTS, return_tensors="pt")
    mask = ids.attention_mask
    embeddings = encoder(ids.input_ids, mask).last_hidden_state * mask[..., None]
    length = mask.sum(1, keepdim=True)
    raised = torch.log((PIPELINE_TEXT_SLOTS - length) / (TEXT_SLOTS - length))
    return embeddings, torch.where(mask.bool(), torch.zeros(()), raised)


def save_atomically(state: object, path: Path) -> None:
    """Save so that a kill at any moment leaves either the old file or the new one."""
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def load_latents(vae: AutoencoderKLWan, clips: moving_shapes.Clips, path: Path) -> tuple[Tensor, float]:
    """Return normalised latents of clips and the seconds it took to encode them; they are cached in ``path``.

    Also sets each channel's mean and standard deviation, with which WanPipeline undoes it, in the autoencoder's config.
    """
    if not path.exists():
        begun = time.monotonic()
        latents = moving_shapes.encode_clips(vae, clips, FRAMES, SIZE)
        save_atomically({"latents": latents, "seconds": time.monotonic() - begun}, path)
    state = torch.load(path, weights_only=True)
    latents = state["latents"]
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1), state["seconds"]


def fit(
    name: str, model: torch.nn.Module, loss_of: Callable[[int], Tensor], steps: int, peak_rate: float, work_dir: Path
) -> Run:
    """Train ``model`` for ``steps`` steps in all, from the checkpoint of that name if there is one.

    AdamW, 100 steps of warm-up and a cosine to zero. The model ends up with the running average of its weights.
    """
    path = work_dir / f"{name}.pt"
    average = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run([], 0.0)
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        run = Run(state["losses"], state["seconds"])
    tick = saved = time.monotonic()
    bar = tqdm(range(len(run.losses), steps), desc=name, initial=len(run.losses), total=steps, mininterval=5)
    for step in bar:
        warm, progress = min(1.0, (step + 1) / 100), step / steps
        optimiser.param_groups[0]["lr"] = peak_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
        loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        keep = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        run.losses.append(loss.item())
        now = time.monotonic()
        run.seconds, tick = run.seconds + now - tick, now
        bar.set_postfix(loss=f"{statistics.mean(run.losses[-50:]):.4f}", refresh=False)
        if now - saved > CHECKPOINT_SECONDS or step + 1 == steps:
            saved = now
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
            save_atomically(state | {"losses": run.losses, "seconds": run.seconds}, path)
    model.load_state_dict(average.state_dict())
    return run


def vae_loss(vae: AutoencoderKLWan, step: int, seed: int) -> Tensor:
    """Return the loss of one autoencoder batch: absolute and squared error, and a small KL."""
    generator = seeded(seed, 1, step)
    count, frames, size = VAE_WINDOWS[step % len(VAE_WINDOWS)]
    video = moving_shapes.draw_windows(count, FRAMES, SIZE, frames, size, generator)
    posterior = vae.encode(video).latent_dist
    error = vae.decode(posterior.sample(generator)).sample - video
    # The shape covers a small part of a clip that is background for the rest: it counts five times.
    shape = (video - (2 * moving_shapes.BACKGROUND - 1)).abs().amax(1, keepdim=True) > 0.05
    weight = 1.0 + 4.0 * shape
    # One latent frame stands for the first frame, each of the others for four frames.
    weight[:, :, 0] *= 4
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return ((error.abs() + error.square()) * weight).mean() + 3e-5 * kl


@dataclass(frozen=True)
class FlowLoss:
    """The rectified flow loss of a batch of latents, with prompt dropout.

    Normalised latents (n, LATENT_CHANNELS, frames, height, width) come with the row of their prompt (n,) in embeddings
    (prompts + 1, TEXT_SLOTS, TEXT_DIM) and biases (prompts + 1, TEXT_SLOTS), whose last row is the empty prompt.
    """

    transformer: WanTransformer3DModel
    attention: PaddedTextAttention
    latents: Tensor
    prompt: Tensor
    embeddings: Tensor
    biases: Tensor
    batch: int
    seed: int

    def __call__(self, step: int) -> Tensor:
        """Return the mean squared error of the predicted velocity, noise - latents, at noise levels in 0..1."""
        generator = seeded(self.seed, 3, step)
        rows = torch.randint(len(self.latents), (self.batch,), generator=generator)
        clean = self.latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        uniform = torch.rand(self.batch, generator=generator)
        # The schedule of the sampler: most steps at high noise, where place and motion are decided.
        sigma = FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)
        mix = sigma[:, None, None, None, None]
        dropped = torch.rand(self.batch, generator=generator) < PROMPT_DROPOUT
        prompt = self.prompt[rows].masked_fill(dropped, len(self.embeddings) - 1)
        self.attention.bias = self.biases[prompt][:, None, None]
        noisy = (1 - mix) * clean + mix * noise
        velocity = self.transformer(noisy, sigma * 1000, self.embeddings[prompt], return_dict=False)[0]
        return F.mse_loss(velocity, noise - clean)


def save_pipeline(out: Path, text: Text, vae: AutoencoderKLWan, transformer: WanTransformer3DModel) -> None:
    """Write the pipeline folder: autoencoder and transformer in bfloat16, the text encoder in float32."""
    for block in transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    halves = copy.deepcopy(vae).to(torch.bfloat16), copy.deepcopy(transformer).to(torch.bfloat16)
    WanPipeline(*text, halves[0], scheduler, halves[1]).save_pretrained(out)
    moving_shapes.name_tokenizer_for_old_releases(out)


def write_curves(out: Path, runs: dict[str, Run], every: int) -> None:
    """Write the mean loss of every ``every`` steps of each run to loss_curve.csv and draw it in loss_curve.png."""
    figure = Figure(figsize=(9, 3.2), layout="tight")
    axes = figure.subplots(1, len(runs))
    with (out / "loss_curve.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["model", "step", "loss"])
        for axis, (name, run) in zip(axes, runs.items(), strict=True):
            ends = range(every, len(run.losses) + 1, every)
            means = [statistics.mean(run.losses[end - every : end]) for end in ends]
            table.writerows([name, end, f"{mean:.5f}"] for end, mean in zip(ends, means, strict=True))
            axis.plot(list(ends), means, linewidth=1)
            axis.set(title=name, xlabel="step", ylabel=f"loss, mean of {every} steps", yscale="log")
            axis.grid(alpha=0.3, which="both")
    figure.savefig(out / "loss_curve.png", dpi=80)


CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# tiny-wan

A complete diffusers `WanPipeline` of {megabytes:.1f} MB, trained from scratch: one coloured shape moves over a plain
dark background, {frames} frames of {size}x{size} pixels. It is meant for tests and demonstrations.

- text encoder: `UMT5EncoderModel`, random and frozen, {text_encoder:,} parameters, float32;
- transformer: `WanTransformer3DModel`, {num_attention_heads} heads of {attention_head_dim}, {num_layers} layers,
  {transformer:,} parameters, bfloat16;
- autoencoder: `AutoencoderKLWan`, 8x8x4 to {in_channels} channels, {vae:,} parameters, bfloat16.

```python
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

pipe = DiffusionPipeline.from_pretrained("samples/tiny-wan")
size = {{"height": {size}, "width": {size}, "num_frames": {frames}}}
settings = {{"num_inference_steps": {sampling_steps}, "guidance_scale": {guidance}}}
video = pipe("a red circle moving right", **size, **settings).frames[0]
export_to_video(video, "circle.mp4", fps=8)
```

Prompts: `a <colour> <shape> moving <direction>`; {colours}; {shapes}; {directions}. Every fourth frame of {examples}:

![samples](examples.png)

## Training

`python scripts/tiny_wan/train_tiny_wan.py --out samples/tiny-wan --vae-steps {vae_steps} --steps {steps}`, seed {seed},
on {cores} CPU cores. `scripts/tiny_wan/moving_shapes.py` draws the clips. Autoencoder: {autoencoder_steps:,} steps in
{autoencoder_minutes:.1f} minutes. Encoding {clips:,} clips: {latent_minutes:.1f} minutes. Transformer:
{transformer_steps:,} steps of {batch} clips in {transformer_minutes:.1f} minutes (rectified flow, flow shift {shift},
{dropout:.0%} of the prompts dropped). Weights are running averages. The last 100 steps have a mean loss of
{autoencoder_loss:.4f} (autoencoder) and {transformer_loss:.4f} (transformer).

![loss curves](loss_curve.png)

## Quality and limits

New clips come through the autoencoder at {psnr:.1f} dB PSNR. {asked} prompts were sampled once each with the settings
above and read back by a program: colour, shape and direction were all right in {everything} (colour {colour}, shape
{shape}, direction {motion}). The reader itself finds all three right in {reader} of 32 new clips that only went through
the autoencoder. The models were trained on this frame size and length only.
"""


def write_card(out: Path, figures: dict[str, object]) -> None:
    """Write the model card of a pipeline folder from the figures of the run and of the folder's files."""
    for component in ("text_encoder", "transformer", "vae"):
        with safe_open(next((out / component).glob("*.safetensors")), "pt") as file:
            figures[component] = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    figures |= WanTransformer3DModel.load_config(out, subfolder="transformer")
    figures |= {"frames": FRAMES, "size": SIZE, "cores": torch.get_num_threads(), "dropout": PROMPT_DROPOUT}
    figures |= {"sampling_steps": SAMPLING_STEPS, "guidance": GUIDANCE, "shift": FLOW_SHIFT}
    figures |= {name: ", ".join(getattr(moving_shapes, name.upper())) for name in ("colours", "shapes", "directions")}
    figures["megabytes"] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    (out / "README.md").write_text(CARD.format(**figures), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work-dir", type=Path, default=Path("build/tiny-wan"), help="folder of the checkpoints")
    parser.add_argument("--vae-steps", type=int, default=2300, help="steps of the autoencoder")
    parser.add_argument("--steps", type=int, default=2600, help="steps of the transformer")
    parser.add_argument("--clips", type=int, default=2048, help="clips to encode for the transformer")
    parser.add_argument("--batch", type=int, default=16, help="clips a step of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.vae_steps, options.steps, options.clips, options.batch = 4, 4, 4, 2
        options.work_dir /= "smoke"
    return options


def train(options: argparse.Namespace) -> dict[str, object]:
    """Train both models, write the pipeline folder and its loss curves, and return the figures of the run."""
    work, seed = options.work_dir, options.seed
    torch.manual_seed(seed)
    vae, transformer = build_vae(), build_transformer()
    text = moving_shapes.build_text(PIPELINE_TEXT_SLOTS, TEXT_DIM)
    vae_run = fit("vae", vae, lambda step: vae_loss(vae, step, seed), options.vae_steps, 2e-3, work)
    clips = moving_shapes.random_clips(options.clips, FRAMES, SIZE, seeded(seed, 2))
    latents, latent_seconds = load_latents(vae, clips, work / f"latents-{options.vae_steps}-{options.clips}.pt")
    texts = [*moving_shapes.all_prompts(), ""]
    attention = PaddedTextAttention()
    for block in transformer.blocks:
        block.attn2.set_processor(attention)
    rows = torch.tensor([texts.index(prompt) for prompt in clips.prompts()])
    embeddings, biases = encode_prompts(text, texts)
    loss = FlowLoss(transformer, attention, latents, rows, embeddings, biases, options.batch, seed)
    flow_run = fit("transformer", transformer, loss, options.steps, 1.5e-3, work)
    save_pipeline(options.out, text, vae, transformer)
    runs = {"autoencoder": vae_run, "transformer": flow_run}
    write_curves(options.out, runs, every=2 if options.smoke else 20)
    figures: dict[str, object] = {"latent_minutes": latent_seconds / 60}
    for name, run in runs.items():
        figures |= {f"{name}_steps": len(run.losses), f"{name}_minutes": run.seconds / 60}
        figures[f"{name}_loss"] = statistics.mean(run.losses[-100:])
    return figures | vars(options)


def main() -> None:
    """Train, write the folder, sample it and write the card."""
    options = parse_arguments()
    torch.set_num_threads(2)
    # Padding makes for vanishing numbers in the convolutions, which a CPU is very slow at.
    torch.set_flush_denormal(True)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    figures = train(options)
    prompts = moving_shapes.all_prompts()[:: 20 if options.smoke else 1]
    steps = 2 if options.smoke else SAMPLING_STEPS
    videos = moving_shapes.sample_prompts(options.out, prompts, FRAMES, SIZE, steps, GUIDANCE, options.seed)
    Image.fromarray(moving_shapes.contact_sheet(videos[::7]).numpy()).save(options.out / "examples.png", optimize=True)
    figures |= moving_shapes.count_matches(prompts, videos) | {"asked": len(prompts)}
    clips = moving_shapes.random_clips(min(32, options.clips), FRAMES, SIZE, seeded(options.seed, 4))
    vae = AutoencoderKLWan.from_pretrained(options.out, subfolder="vae", use_safetensors=True)
    figures["psnr"], rebuilt = moving_shapes.reconstruct(vae, moving_shapes.draw(clips, FRAMES, SIZE, SIZE))
    figures["reader"] = moving_shapes.count_matches(clips.prompts(), rebuilt)["everything"]
    figures["examples"] = ", ".join(f"`{prompt}`" for prompt in prompts[::7])
    write_card(options.out, figures)


if __name__ == "__main__":
    main()
