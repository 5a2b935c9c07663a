"""What the trained sample draws, against frames kept with it; and that a wrong rotation does not get past this.

A start frame, or any shift that all tokens share, cannot show here, because only distances between tokens reach the
scores: those are tested on tables, and on queries against keys rotated separately.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit_rope
from dit_rope.comparison import Request, frame_ssim, generate
from dit_rope.spec import Pairing

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "tiny-wan"
REFERENCE = SAMPLE / "reference"

# The bar of one video: its worst frame, and the mean of its frames. A right video clears both, a wrong one does not.
SSIM_MIN, SSIM_MEAN = 0.95, 0.98


@pytest.fixture(scope="module")
def pipe():
    """The trained pipeline in float32 on CPU."""
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(SAMPLE)


@pytest.fixture(scope="module")
def request_of_reference() -> Request:
    return Request(**json.loads((REFERENCE / "request.json").read_text()))


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    pictures = sorted(REFERENCE.glob("frame_*.png"))
    return np.stack([np.asarray(Image.open(path), dtype=np.float32) / 255 for path in pictures])


@pytest.fixture(scope="module")
def unpatched(pipe, request_of_reference) -> np.ndarray:
    return generate(pipe, request_of_reference).frames


def clears_the_bar(frames: np.ndarray, reference: np.ndarray) -> bool:
    ssim = frame_ssim(frames, reference)
    return min(ssim) >= SSIM_MIN and float(np.mean(ssim)) >= SSIM_MEAN


def test_unpatched_video_matches_reference_frames(unpatched, reference) -> None:
    assert clears_the_bar(unpatched, reference), frame_ssim(unpatched, reference)


def test_patched_video_equals_unpatched_bit_for_bit(pipe, request_of_reference, unpatched) -> None:
    with dit_rope.patch(pipe):
        patched = generate(pipe, request_of_reference).frames
    assert np.array_equal(patched, unpatched)


def test_patched_video_in_fast_mode_matches_reference_frames(pipe, request_of_reference, reference) -> None:
    with dit_rope.patch(pipe, exact=False):
        patched = generate(pipe, request_of_reference).frames
    assert clears_the_bar(patched, reference), frame_ssim(patched, reference)


def positions_of(args):
    """Row of every token on each axis, ``[1 or B, S, axes]``, whether they are given or follow a grid."""
    if args.positions is not None:
        return args.positions
    coordinates = torch.unravel_index(torch.arange(args.token_offset, args.token_offset + args.count), args.sizes)
    rows = [coordinate + first for coordinate, first in zip(coordinates, args.first_rows, strict=True)]
    return torch.stack(rows, dim=-1)[None].to(torch.int32)


def with_sign_flipped(args):
    return replace(args, inverse=not args.inverse)


def with_pairing_of_halves(args):
    return replace(args, pairing=Pairing.HALF)


def with_axes_in_order(*order: int):
    """Every axis rotates by the coordinate of another one."""

    def change(args):
        positions = positions_of(args)
        first = positions.amin(dim=1, keepdim=True)
        return replace(args, positions=first + (positions - first)[..., list(order)])

    return change


def with_axis_frozen(axis: int):
    """Every token rotates as if it stood at coordinate 0 of one axis."""

    def change(args):
        positions = positions_of(args).clone()
        positions[..., axis] = positions[..., axis].amin(dim=1, keepdim=True)
        return replace(args, positions=positions)

    return change


def rotating(monkeypatch, change):
    """Passes the arguments of every rotation through ``change``; returns the list of those it saw."""
    real, recorded = dit_rope.rotation.ops.rotate, []

    def rotate(xs, args, *norm, **options):
        recorded.append(args)
        return real(xs, change(args), *norm, **options)

    monkeypatch.setattr(dit_rope.rotation.ops, "rotate", rotate)
    return recorded


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_sign_flipped, id="sign"),
        pytest.param(with_pairing_of_halves, id="pairing"),
        pytest.param(with_axes_in_order(0, 2, 1), id="height-width"),
        pytest.param(with_axes_in_order(1, 0, 2), id="frame-height"),
        pytest.param(with_axes_in_order(2, 1, 0), id="frame-width"),
        pytest.param(with_axis_frozen(0), id="frame-frozen"),
        pytest.param(with_axis_frozen(1), id="height-frozen"),
        pytest.param(with_axis_frozen(2), id="width-frozen"),
    ],
)
def test_wrong_rotation_stays_under_the_bar(pipe, request_of_reference, reference, monkeypatch, change) -> None:
    recorded = rotating(monkeypatch, change)
    with dit_rope.patch(pipe, exact=True):
        wrong = generate(pipe, request_of_reference).frames
    blocks = len(pipe.transformer.blocks)
    # Queries and keys of every block, with and without the prompt, in every step.
    assert len(recorded) == 2 * blocks * 2 * request_of_reference.steps
    assert not clears_the_bar(wrong, reference), frame_ssim(wrong, reference)


def test_sabotage_without_a_change_changes_nothing(pipe, request_of_reference, unpatched, monkeypatch) -> None:
    rotating(monkeypatch, lambda args: with_axes_in_order(0, 1, 2)(replace(args, inverse=False)))
    with dit_rope.patch(pipe, exact=True):
        assert np.array_equal(generate(pipe, request_of_reference).frames, unpatched)


def test_bfloat16_patched_latents_equal_unpatched_bit_for_bit(request_of_reference) -> None:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(
        SAMPLE, torch_dtype={"default": torch.bfloat16, "vae": torch.float32}
    )
    short = replace(request_of_reference, steps=4)
    unpatched = generate(pipe, short).frames
    with dit_rope.patch(pipe):
        assert np.array_equal(generate(pipe, short).frames, unpatched)
