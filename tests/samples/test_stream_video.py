"""The streaming programs: what they stream is the model's own video, in memory that stays, and they leave no trace."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from benchmarks.results import read_csv
from dit_rope import RopeSpec, RopeStream

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module ``samples/stream_video.py``, to be run in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "samples"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import stream_video

    return stream_video


def stream_of(transformer: Any, window: int, size: tuple[int, int], theta: float = 10_000.0) -> RopeStream:
    channels = transformer.config.attention_head_dim
    side = 2 * (channels // 6)
    return RopeStream(RopeSpec((channels - 2 * side, side, side), theta), size, window_frames=window)


@torch.no_grad()
def test_one_chunk_is_the_unchanged_model(program: Any, random_wan: Any) -> None:
    """All frames in one window: attention and rotation are those of diffusers, up to rounding."""
    transformer = random_wan.transformer.eval()
    call = (torch.randn(2, 4, 3, 4, 6), torch.tensor([500, 500]), torch.randn(2, 7, 16))
    expected = transformer(*call, return_dict=False)[0]
    processors = [block.attn1.processor for block in transformer.blocks]

    def streamed(**changes: Any) -> torch.Tensor:
        stream = stream_of(transformer, 3, (2, 3), **changes)
        stream.begin_chunk(3)
        with program.streaming(transformer, stream, batch=2):
            return transformer(*call, return_dict=False)[0]

    assert torch.allclose(streamed(), expected, atol=1e-5)
    assert not torch.allclose(streamed(theta=5_000.0), expected, atol=1e-5)
    assert [block.attn1.processor for block in transformer.blocks] == processors


@torch.no_grad()
def test_chunks_see_what_was_before_them(program: Any, random_wan: Any) -> None:
    """The second chunk depends on the frame before it, and no longer once that has left the window."""
    transformer = random_wan.transformer.eval()
    text, time = torch.randn(1, 7, 16), torch.tensor([500])
    frames = torch.randn(1, 4, 4, 4, 6)

    def last_frame(first: torch.Tensor, window: int) -> torch.Tensor:
        stream = stream_of(transformer, window, (2, 3))
        with program.streaming(transformer, stream, batch=1):
            for frame in (first, *frames[:, :, 1:].split(1, dim=2)):
                stream.begin_chunk(1)
                out = transformer(frame, time, text, return_dict=False)[0]
                stream.commit()
        return out

    noise = torch.randn(1, 4, 1, 4, 6)
    assert not torch.allclose(last_frame(frames[:, :, :1], 4), last_frame(noise, 4), atol=1e-6)
    assert torch.equal(last_frame(frames[:, :, :1], 1), last_frame(noise, 1))


def test_processors_come_back_after_an_error(program: Any, random_wan: Any) -> None:
    blocks = random_wan.transformer.blocks
    processors = [block.attn1.processor for block in blocks]

    def run_without_a_chunk() -> None:
        with program.streaming(random_wan.transformer, stream_of(random_wan.transformer, 2, (2, 3)), batch=1):
            assert all(isinstance(block.attn1.processor, program.StreamingAttention) for block in blocks)
            random_wan.transformer(torch.randn(1, 4, 1, 4, 6), torch.tensor([500]), torch.randn(1, 7, 16))

    with pytest.raises(RuntimeError, match="a chunk must be begun"):
        run_without_a_chunk()
    assert [block.attn1.processor for block in blocks] == processors


@torch.no_grad()
@pytest.mark.parametrize("folder", ["random", "samples/tiny-wan"])
def test_frames_decoded_one_by_one_are_those_decoded_together(program: Any, random_wan: Any, folder: str) -> None:
    vae = random_wan.vae
    if folder != "random":
        vae = diffusers.AutoencoderKLWan.from_pretrained(ROOT / folder, subfolder="vae").float()
    latents = torch.randn(1, vae.config.z_dim, 4, 4, 6)
    random_wan.vae = vae
    decode = program.StreamingDecoder(vae)
    actual = np.concatenate([decode(chunk) for chunk in latents.split([2, 1, 1], dim=2)])
    together = vae.decode(latents * decode.std + decode.mean).sample
    expected = random_wan.video_processor.postprocess_video(together, output_type="np")[0]
    assert actual.shape == expected.shape == (13, *expected.shape[1:])
    assert np.abs(actual - expected).max() <= 1e-5


def test_program_streams_and_writes_what_it_promises(
    program: Any, random_wan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_args, **_options: random_wan)
    before = random_wan.transformer.attn_processors
    sizes = ["--height", "32", "--width", "48", "--frames", "6", "--first-chunk", "2", "--chunk", "1", "--steps", "2"]
    window = ["--window", "3", "--sinks", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["stream_video.py", *sizes, *window])
    program.main()
    assert random_wan.transformer.attn_processors == before
    for name in ("stream.mp4", "sheet.png", "streaming.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    rows = read_csv(tmp_path / "out" / "streaming.csv")
    assert [int(row["start_frame"]) for row in rows] == [0, 2, 3, 4, 5]
    # Two layers of keys, values and the sink's raw keys: batch 2, frames of 2 x 3 tokens, 2 heads of 24, float32.
    expected = pytest.approx(2 * (3 + 3 + 1) * 2 * 6 * 2 * 24 * 4, rel=1e-5)  # files have six digits
    assert all(float(row["key_value_mib"]) * 2**20 == expected for row in rows)
    assert "wrote 21 frames" in capsys.readouterr().out


def test_sample_streams(random_wan: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_args, **_options: random_wan)
    runpy.run_path(str(ROOT / "samples" / "stream_a_video.py"), run_name="__main__")
    assert "frames 10 to 11: keys stand at (7, 9, 10, 11, 8)" in capsys.readouterr().out
