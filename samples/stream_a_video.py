"""Stream a video: chunks of frames that attend to a rolling window, far past the length the model was trained on.

python samples/stream_a_video.py
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch.nn.functional import scaled_dot_product_attention

from dit_rope import RollingCache, RopeSpec, RopeStream

FRAMES, CHUNK, STEPS = 12, 2, 4  # latent frames; the sample was trained on 5 of 6 x 6 tokens
pipe = DiffusionPipeline.from_pretrained(Path(__file__).parent / "tiny-wan", use_safetensors=True)
model, scheduler = pipe.transformer, pipe.scheduler
heads, channels = model.config.num_attention_heads, model.config.attention_head_dim

side = 2 * (channels // 6)  # of rows and of columns; the frame has the rest, as in every Wan model
spec = RopeSpec((channels - 2 * side, side, side))
stream = RopeStream(spec, (6, 6), window_frames=5, sink_frames=1)


class StreamingAttention:
    """A Wan block's self-attention over its own rolling cache; queries and keys are rotated here."""

    def __init__(self) -> None:
        self.cache = RollingCache(stream, batch=1, heads=heads, head_dim=channels, dtype=model.dtype)

    def __call__(self, attn: torch.nn.Module, x: torch.Tensor, *_: object) -> torch.Tensor:
        """One forward: append this chunk, attend to the window."""
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (part.unflatten(2, (heads, channels)) for part in (q, k, v))
        window = self.cache.append(k, v)
        out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (stream.rotate(q), window.keys, window.values)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


for block in model.blocks:
    block.attn1.set_processor(StreamingAttention())

text = pipe.encode_prompt("a red circle moving right", do_classifier_free_guidance=False)[0]
with torch.no_grad():
    while stream.start_frame < FRAMES:
        chunk = stream.begin_chunk(CHUNK)
        latents = torch.randn(1, model.config.in_channels, CHUNK, 12, 12)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:  # every forward of a chunk writes the same frames of the cache
            noise = model(latents, t[None], text, return_dict=False)[0]
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        model(latents, torch.zeros(1), text)  # the clean frames are what later chunks see
        stream.commit()
        print(f"frames {chunk.start_frame} to {stream.start_frame - 1}: keys stand at {chunk.window}")
