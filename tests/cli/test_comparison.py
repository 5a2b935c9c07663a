"""Comparisons of a pipeline with and without the patch, on a random pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import dit_rope
from dit_rope import comparison
from dit_rope.comparison import Request, compare, frame_ssim, generate, save_contact_sheet, save_preview, save_video

REQUEST = Request("a red circle", steps=3, frames=5, height=32, width=48)
SHAPE = (5, 32, 48, 3)


@pytest.fixture
def video() -> np.ndarray:
    return np.random.default_rng(0).random(SHAPE, dtype=np.float32)


def test_generate_returns_frames_and_all_steps_but_the_first(random_wan) -> None:
    steps = []
    generation = generate(random_wan, REQUEST, on_step=lambda: steps.append(None))
    assert generation.frames.shape == SHAPE
    assert generation.frames.dtype == np.float32
    assert np.isfinite(generation.frames).all()
    assert (len(steps), len(generation.step_seconds)) == (3, 2)
    assert min(generation.step_seconds) > 0


def test_generate_depends_on_the_seed_alone(random_wan) -> None:
    first, again = (generate(random_wan, REQUEST).frames for _ in range(2))
    other = generate(random_wan, Request(**(vars(REQUEST) | {"seed": 1}))).frames
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_generate_gives_the_progress_bar_back(random_wan) -> None:
    random_wan.set_progress_bar_config(desc="mine", disable=False)
    generate(random_wan, REQUEST, decode=False)
    assert random_wan._progress_bar_config == {"desc": "mine", "disable": False}


def test_request_refuses_one_step() -> None:
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        Request("x", steps=1)


def test_compare_finds_exact_mode_equal_and_counts(random_wan) -> None:
    steps = []
    result = compare(random_wan, REQUEST, repeats=2, progress=steps.append)
    assert np.array_equal(result.unpatched, result.patched)
    assert result.ssim == (1.0,) * 5
    assert result.max_difference == 0
    assert len(result.before.step_seconds) == len(result.after.step_seconds) == 4
    # 2 latent frames of 2 x 3 tokens, cos and sin of 24 channels in float32.
    assert result.before.handed_bytes == 12 * 24 * 4 * 2
    assert result.after.cached_bytes > 0
    # Of 8 steps of 2 passes each, the first builds the model's table, whenever the patch is put in: three times.
    assert result.cache_misses == 3
    assert result.cache_hits == 16 - 3
    assert steps == ["warm-up"] * 4 + ["unpatched"] * 3 + ["patched"] * 6 + ["unpatched"] * 3
    assert "WanTransformer3DModel" in result.report


def test_compare_leaves_the_pipeline_unpatched(random_wan) -> None:
    before = {name: type(module) for name, module in random_wan.transformer.named_modules()}
    compare(random_wan, REQUEST)
    assert {name: type(module) for name, module in random_wan.transformer.named_modules()} == before
    assert not any(module._forward_hooks for module in random_wan.transformer.modules())


def test_compare_notices_a_difference(random_wan, monkeypatch) -> None:
    """A patch whose tables are wrong: every sine has the other sign."""
    real = dit_rope.hooks.rope_modules.axis_rows

    def mirrored(*args):
        cos, sin = real(*args)
        return torch.stack((cos, -sin))

    monkeypatch.setattr(dit_rope.hooks.rope_modules, "axis_rows", mirrored)
    result = compare(random_wan, REQUEST)
    assert result.max_difference > 0
    assert min(result.ssim) < 1


def test_compare_refuses_no_repeats(random_wan) -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        compare(random_wan, REQUEST, repeats=0)


def test_figures_are_json_and_rows_fill_the_markdown_table(random_wan) -> None:
    result = compare(random_wan, REQUEST)
    figures = json.loads(json.dumps(result.figures()))
    assert figures["request"]["prompt"] == "a red circle"
    assert figures["ssim_min"] == figures["ssim_mean"] == 1.0
    assert figures["unpatched"]["seconds_per_step"] > 0
    lines = result.markdown().splitlines()
    assert len(lines) == 2 + len(result.rows())
    assert {line.count("|") for line in lines} == {4}


def test_frame_ssim_is_one_for_equal_frames_and_falls_with_noise(video) -> None:
    noisy = video.copy()
    noisy[2] = noisy[2][::-1]
    values = frame_ssim(video, noisy)
    assert [value == 1.0 for value in values] == [True, True, False, True, True]


def test_frame_ssim_refuses_other_shapes(video) -> None:
    with pytest.raises(ValueError, match="second must have the shape of first"):
        frame_ssim(video, video[1:])


def test_save_video_writes_every_frame(video, tmp_path) -> None:
    import imageio.v3

    path = tmp_path / "video.mp4"
    save_video(video, path)
    assert imageio.v3.imread(path).shape == SHAPE


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_save_preview_loops_over_every_frame(video, tmp_path, suffix) -> None:
    path = tmp_path / f"preview.{suffix}"
    save_preview(video, path)
    with Image.open(path) as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (5, (48, 32), 0)


def test_save_contact_sheet_shows_first_and_last_frame_of_each_video(video, tmp_path) -> None:
    path = tmp_path / "sheet.png"
    save_contact_sheet({"one": video, "two": 1 - video}, path, columns=3)
    sheet = np.asarray(Image.open(path))
    height = 32 + 16
    assert sheet.shape == (2 * height, 3 * 48, 3)
    for row, frames in enumerate((video, 1 - video)):
        band = sheet[row * height + 16 : (row + 1) * height]
        assert np.array_equal(band[:, :48], np.rint(frames[0] * 255).astype(np.uint8))
        assert np.array_equal(band[:, -48:], np.rint(frames[-1] * 255).astype(np.uint8))


def test_shared_memory_counts_once() -> None:
    x = torch.zeros(4, 8)
    assert comparison._storage_bytes((x, x.view(8, 4), torch.zeros(3))) == 4 * 8 * 4 + 3 * 4
