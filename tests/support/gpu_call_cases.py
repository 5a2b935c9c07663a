"""Calls that the tests of both GPU backends make: two rotations, layouts of tensors, and calls that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dit_rope.rotation_args import RotationArgs
from dit_rope.spec import Pairing

WAN = RotationArgs(
    rows=torch.zeros(2, 12, 22),
    positions=None,
    pairs=(22, 21, 21),
    sizes=(3, 4, 5),
    first_rows=(0, 3, 7),
    token_offset=0,
    prefix=0,
    count=60,
    pairing=Pairing.INTERLEAVED,
    inverse=False,
    exact=False,
)
SMALL = RotationArgs(
    rows=torch.zeros(2, 9, 8),
    positions=None,
    pairs=(8, 4, 4),
    sizes=(2, 3, 4),
    first_rows=(0, 2, 5),
    token_offset=0,
    prefix=0,
    count=24,
    pairing=Pairing.INTERLEAVED,
    inverse=False,
    exact=False,
)

# One axis of 60 tokens, head after head; and the axes of frames, rows and columns.
MOCHI = replace(WAN, rows=torch.zeros(2, 24 * 60, 64), pairs=(64,), sizes=(60,), first_rows=(0,), head_rows=60)
LTX = replace(MOCHI, rows=torch.zeros(2, 32 * 60, 32), pairs=(32,))
COGVIDEOX = replace(WAN, rows=torch.zeros(2, 12, 12), pairs=(8, 12, 12))


def meta(batch: int, tokens: int, heads: int = 12, dim: int = 128) -> torch.Tensor:
    """Queries without memory, of any length."""
    return torch.empty(batch, tokens, heads, dim, dtype=torch.bfloat16, device="meta")


LAYOUTS: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "one-token": (meta(1, 1), {"count": 1}),
    "720p": (meta(1, 75_600), {"count": 75_600, "sizes": (21, 45, 80)}),
    "million-tokens": (meta(1, 2**20), {"count": 2**20, "sizes": (128, 64, 128)}),
    "batch": (meta(3, 61), {}),
    "prefix": (meta(1, 60), {"prefix": 1, "count": 59}),
    "shard": (meta(1, 60), {"prefix": 16, "count": 32, "token_offset": 1}),
    "start-frame": (meta(1, 60), {"first_rows": (1, 16, 123_456)}),
    "grid": (meta(1, 60), {"sizes": (1, 1, 2**30)}),
    "longer-table": (meta(1, 60), {"rows": torch.zeros(2, 4096, 22)}),
    "packed": (meta(2, 60 * 3).view(2, 60, 3, 12, 128)[:, :, 1], {}),
    "transposed": (meta(2, 12, 61).transpose(1, 2), {}),
    "transposed-far": (meta(2, 12, 2**21).transpose(1, 2), {}),
    "far-batch": (meta(2, 2**22), {}),
    "fused": (meta(2, 60, 36).flatten(2).chunk(3, dim=-1)[1].unflatten(2, (12, 128)), {}),
    "stride-of-one-batch": (meta(1, 60).as_strided((1, 60, 12, 128), (99_999, 1536, 128, 1)), {}),
}
"""Queries, and changes to :data:`WAN`, for which nothing may be compiled that was not compiled for 60 tokens of it."""

OWN_ANGLES: dict[str, dict[str, Any]] = {
    "head-after-head": {"rows": torch.zeros(2, 24 * 4096, 64), "sizes": (4096,), "head_rows": 4096},
    "token-after-token": {"positions": torch.zeros(1, 60, 1).int(), "head_rows": 1},
    "every-batch-entry": {"positions": torch.zeros(3, 60, 1).int(), "rows": torch.zeros(2, 3 * 24 * 60, 64)},
    "wider-rows": {"rows": torch.zeros(2, 24 * 60, 72)[:, :, :64]},
}
"""Changes to :data:`MOCHI` for which nothing may be compiled either; positions count as one of its own."""

# What no GPU backend takes: made from a good tensor [1, 24, 3, 40], and changes to SMALL; with the reason given.
WRONG_TENSORS = [
    (lambda x: [x, x, x], "1 to 2 tensors, got 3"),
    (lambda x: [x.double()], "dtype must be float16, bfloat16 or float32, got torch.float64"),
    (lambda x: [x, x.float()], "share a dtype"),
    (lambda x: [x.transpose(2, 3).contiguous().transpose(2, 3)], "last dim must be contiguous"),
    (lambda x: [x[:, :, :0]], "at least one head"),
    (lambda x: [x.new_zeros(1, 24, 1, 520)], "head dim must be at most 512, got 520"),
    (lambda x: [x[..., :30].contiguous()], "rotary_dim must be 2 to the head dim 30, got 32"),
    (lambda x: [x.expand(1, 24, 3, 40)[:, :1].expand(1, 2**31, 3, 40)], "tokens must be at most"),
]
WRONG_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    (
        {"rows": SMALL.rows.double()},
        "tables must be float32 or of the data's dtype torch.bfloat16, got torch.float64",
    ),
    ({"rows": SMALL.rows.half()}, "tables must be float32 or of the data's dtype torch.bfloat16"),
    ({"rows": SMALL.rows.mT.contiguous().mT}, "last dim of the tables must be contiguous"),
    ({"positions": torch.zeros(1, 24, 3, dtype=torch.int64)}, "positions must be int32, got torch.int64"),
    ({"entries": torch.zeros(1, dtype=torch.int64)}, "entries must be int32, got torch.int64"),
    (
        {"entries": torch.zeros(1, dtype=torch.int32), "head_rows": 3},
        "entries need cos and sin that all heads share, got head_rows 3",
    ),
    ({"pairs": (1,) * 5}, "1 to 4 axes, got 5"),
    ({"token_offset": 2**31 - 1}, "grid tokens must be at most"),
]
