"""What shifting refuses, and that the message says what would do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from dit_rope import RopeSpec, ShiftTable, plan_eviction, shift_keys
from rotated_keys import BLOCK, TEXT, int32


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantized_keys_are_refused(dtype: torch.dtype) -> None:
    keys = torch.zeros(2, BLOCK, 2, 16).to(dtype)
    with pytest.raises(NotImplementedError, match=rf"got {dtype}; shift before quantizing"):
        shift_keys(keys, TEXT, delta_frames=1, allow_lossy=True)


REFUSALS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no-keys": (ValueError, {"keys": [1.0]}, "keys must be a tensor [blocks, block_size, H, D], got list"),
    "three-dims": (
        ValueError,
        {"keys": torch.zeros(2, BLOCK, 16)},
        "keys must be a tensor [blocks, block_size, H, D], got (2, 4, 16)",
    ),
    "strided-channels": (
        ValueError,
        {"keys": torch.zeros(2, BLOCK, 2, 32)[..., ::2]},
        "keys must be contiguous in their last dim, got strides (256, 64, 32, 2)",
    ),
    "grad": (
        ValueError,
        {"keys": torch.zeros(2, BLOCK, 2, 16, requires_grad=True)},
        "keys must not require grad, got a tensor that does; shift under torch.no_grad()",
    ),
    "no-table": (TypeError, {"table": "wan"}, "table must be a RopeSpec or a ShiftTable, got str"),
    "narrow-keys": (
        ValueError,
        {"table": RopeSpec((32,))},
        "table must be on the keys' device cpu and rotate at most their 16 channels, got cpu and 32 channels",
    ),
    "neither": (
        ValueError,
        {"delta_frames": None},
        "delta_frames or deltas must be given, not both, got None and None",
    ),
    "blocks-alone": (
        ValueError,
        {"blocks": int32(0)},
        "blocks must come with deltas, got delta_frames; pass deltas of one value per block",
    ),
    "half-frame": (TypeError, {"delta_frames": 0.5}, "delta_frames must be an int, got 0.5"),
    "not-a-step": (
        ValueError,
        {"table": ShiftTable(TEXT, step=4), "delta_frames": 6},
        "delta_frames must be a multiple of the table's step 4, got 6",
    ),
    "int64-deltas": (
        TypeError,
        {"delta_frames": None, "deltas": torch.tensor([[1], [1]])},
        "deltas must be an int32 tensor, got torch.int64",
    ),
    "list-deltas": (
        TypeError,
        {"delta_frames": None, "deltas": [[1], [1]]},
        "deltas must be an int32 tensor, got list",
    ),
    "one-dim-deltas": (
        ValueError,
        {"delta_frames": None, "deltas": int32(1, 1)},
        "deltas must have shape [2, 1] or [2, 4], got (2,)",
    ),
    "other-block-size": (
        ValueError,
        {"delta_frames": None, "deltas": int32([1, 1, 1])},
        "deltas must have shape [2, 1] or [2, 4], got (1, 3)",
    ),
    "negative-delta": (
        ValueError,
        {"delta_frames": None, "deltas": int32([1], [-1])},
        "deltas must be 0 or more, got -1",
    ),
    "block-outside": (
        ValueError,
        {"delta_frames": None, "deltas": int32([1], [1]), "blocks": int32(0, 2)},
        "blocks must be different, at least 0 and below 2, got [0, 2]",
    ),
    "block-twice": (
        ValueError,
        {"delta_frames": None, "deltas": int32([1], [1]), "blocks": int32(1, 1)},
        "blocks must be different, at least 0 and below 2, got [1, 1]",
    ),
    "blocks-of-two-dims": (
        ValueError,
        {"delta_frames": None, "deltas": int32([1]), "blocks": int32([1])},
        "blocks must have shape [n], got (1, 1)",
    ),
    "shared-memory": (
        ValueError,
        {"keys": torch.zeros(1, 1, 1, 16).expand(2, BLOCK, 2, 16), "inplace": True},
        "keys must not share memory between its own elements when inplace=True, got strides (0, 0, 0, 1) for shape "
        "(2, 4, 2, 16); use inplace=False or keys.clone()",
    ),
    "no-backend": (ValueError, {"backend": "opencl"}, "backend must be one of"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_shift_refusals(name: str) -> None:
    error, changes, message = REFUSALS[name]
    call = {"keys": torch.zeros(2, BLOCK, 2, 16), "table": TEXT, "delta_frames": 1} | changes
    with pytest.raises(error) as refusal:
        shift_keys(call.pop("keys"), call.pop("table"), **call)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (TypeError, {"spec": (16,)}, "spec must be a RopeSpec, got tuple"),
        (ValueError, {"axis": 1}, "axis must be at least 0 and below 1, got 1"),
        (ValueError, {"step": 0}, "step must be a positive int of at most 4294967296, got 0"),
        (TypeError, {"dtype": torch.bfloat16}, "dtype must be float32 or float64, got torch.bfloat16"),
    ],
)
def test_table_refusals(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    call = {"spec": TEXT} | changes
    with pytest.raises(error) as refusal:
        ShiftTable(call.pop("spec"), **call)
    assert str(refusal.value) == message


@pytest.mark.parametrize("steps", [-1, 1.0, True])
def test_reserve_refusals(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be an int of at least 0"):
        ShiftTable(TEXT).reserve(steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], 4, 2), "evicted must be different blocks below 4, got [1, 1] with repeated ones"),
        (([-1], 4, 2), "evicted must be different blocks below 4, got [-1] with [-1] outside"),
        (([], 0, 2), "blocks must be a positive int, got 0"),
        (([], 4, 2.0), "block_size must be a positive int, got 2.0"),
    ],
)
def test_plan_refusals(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_eviction(*arguments)
