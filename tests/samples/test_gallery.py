"""The gallery of the sample: its page is that of its figures, and its script draws what it says."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dit_rope
from benchmarks.results import read_csv
from dit_rope.comparison import Request

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "samples" / "gallery"
SMALL = {"steps": 2, "frames": 5, "height": 32, "width": 48}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``scripts/pages/make_gallery.py``."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    from pages import make_gallery

    return make_gallery


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return read_csv(ROOT / "scripts" / "results" / "gallery.csv")


def test_page_is_that_of_the_figures(program, rows) -> None:
    assert (GALLERY / "README.md").read_text() == program.page(rows)


def test_page_shows_every_picture_and_no_other(rows) -> None:
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (GALLERY / "README.md").read_text())
    assert sorted(shown) == sorted(path.name for path in GALLERY.glob("*.webp"))
    assert len(shown) == len(set(shown)) == 12
    assert {row["file"] for row in rows} == set(shown)
    assert {path.name for path in GALLERY.iterdir()} == {*shown, "README.md"}


def test_every_picture_moves_through_all_frames(program, rows) -> None:
    for row in rows:
        with Image.open(GALLERY / row["file"]) as picture:
            assert picture.n_frames == int(row["frames"])
            assert picture.width % (96 * program.ZOOM) == 0


def test_gallery_and_samples_stay_small() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(GALLERY) < 4e6
    assert size(GALLERY.parent) < 14e6


def test_figures_are_of_every_prompt_and_clear_the_bar_where_the_rotation_is_right(program, rows) -> None:
    assert len(program.PROMPTS) == len(set(program.PROMPTS)) == 10
    for side in ("exact", "fast"):
        assert [row["prompt"] for row in rows if row["side"] == side] == list(program.PROMPTS)
    for row in rows:
        if row["side"] == "exact":
            assert float(row["max_difference"]) == 0
            assert float(row["ssim_min"]) == 1
        elif row["side"] != "stream":
            bar = program.clears_the_bar((float(row["ssim_min"]),) * 2)
            assert bar == (row["side"] == "fast")
    assert {row["side"] for row in rows} == {"exact", "fast", "stream", *program.WRONG}


def test_bar_is_that_of_the_tests_of_the_sample(program) -> None:
    import test_samples_ssim

    assert (program.SSIM_MIN, program.SSIM_MEAN) == (test_samples_ssim.SSIM_MIN, test_samples_ssim.SSIM_MEAN)


def test_clip_shows_both_sides_and_the_difference(program, random_wan) -> None:
    frames, rows = program.clip(random_wan, Request(prompt="a", **SMALL), "a.webp")
    strip = frames.shape[1] - 2 * SMALL["height"]
    assert frames.shape == (5, 2 * SMALL["height"] + strip, 3 * 2 * SMALL["width"], 3)
    before, after, difference = np.split(frames[:, strip:], 3, axis=2)
    np.testing.assert_allclose(difference, np.minimum(10 * np.abs(after - before), 1))
    assert before.std() > 0
    assert [row["side"] for row in rows] == ["exact", "fast"]
    assert rows[0]["max_difference"] == "0"
    dit_rope.patch(random_wan).undo()  # refused where a patch is left


def test_clip_of_a_patch_that_changes_pixels_is_refused(program, random_wan, monkeypatch) -> None:
    real = program.generated
    calls: list[int] = []

    def off_by_a_little(pipe: Any, request: Request) -> np.ndarray:
        calls.append(1)
        return real(pipe, request) + (1e-6 if len(calls) == 2 else 0)

    monkeypatch.setattr(program, "generated", off_by_a_little)
    with pytest.raises(ValueError, match="exact mode must give the unpatched pixels"):
        program.clip(random_wan, Request(prompt="a", **SMALL), "a.webp")


@pytest.mark.parametrize("name", ["sign flipped", "H and W swapped", "frame frozen"])
def test_wrong_rotation_changes_the_video_and_leaves_dit_rope_as_it_was(program, random_wan, name) -> None:
    rotate = dit_rope.rotation.ops.rotate
    request = Request(prompt="a", **SMALL)
    right = program.generated(random_wan, request)
    with dit_rope.patch(random_wan, exact=True), program.rotating_wrong(program.WRONG[name]):
        assert not np.array_equal(program.generated(random_wan, request), right)
    assert dit_rope.rotation.ops.rotate is rotate
    assert np.array_equal(program.generated(random_wan, request), right)


def test_wrong_rotation_that_clears_the_bar_is_refused(program, random_wan, monkeypatch) -> None:
    monkeypatch.setattr(program, "WRONG", {"nothing": lambda args: args})
    with pytest.raises(ValueError, match="must not clear the bar"):
        program.wrong(random_wan, Request(prompt="a", **SMALL), "a.webp")


def test_stream_is_one_picture_of_all_frames(program, random_wan) -> None:
    options = argparse.Namespace(
        **{**vars(program.STREAM), "height": 32, "width": 48, "frames": 3, "steps": 1, "first_chunk": 1}
    )
    frames, (row,) = program.stream(random_wan, options, "stream.webp")
    assert len(frames) == row["frames"] == 9
    assert frames.shape[2:] == (2 * 48, 3)
