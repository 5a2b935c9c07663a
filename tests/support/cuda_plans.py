"""The plans that CUDA kernels are compiled for in tests and in ``scripts/gpu_checks/cuda_resources.py``, by name.

Every model as it calls the package, with every operation; then as few further plans as a greedy generator needs for
every two values of two options to meet in at least one plan. The generator is deterministic: the same options give the
same plans, in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_rope.rotation.backends.cuda_kernels import plan_of
from dit_rope.rotation.backends.cuda_plan import Plan
from dit_rope.rotation.backends.cuda_tuning import Tuning
from dit_rope.rotation_args import Norm, RotationArgs
from dit_rope.spec import NormKind, Pairing

TOKENS = 2
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Heads:
    """Heads of queries and of keys, channels of a head, and channel pairs of each axis."""

    counts: tuple[int, int]
    dim: int
    pairs: tuple[int, ...]


HEADS = {
    "wan-1.3b": Heads((12, 12), 128, (22, 21, 21)),
    "wan-14b": Heads((40, 40), 128, (22, 21, 21)),
    "hunyuan-video": Heads((24, 24), 128, (8, 28, 28)),
    "ltx": Heads((32, 32), 64, (32,)),
    "mochi": Heads((24, 24), 128, (64,)),
    "cogvideox-2b": Heads((30, 30), 64, (8, 12, 12)),
    "cogvideox-5b": Heads((48, 48), 64, (8, 12, 12)),
    "cosmos": Heads((16, 16), 128, (22, 21, 21)),
    "flux2": Heads((48, 48), 128, (16, 16, 16, 16)),
    "hunyuan-dit": Heads((16, 16), 88, (22, 22)),
    "gqa": Heads((32, 8), 128, (64,)),
    "64-heads": Heads((64, 64), 128, (22, 21, 21)),
    "dim-112": Heads((24, 24), 112, (16, 20, 20)),
    "partial": Heads((12, 12), 128, (16, 16, 16)),
}

# Of operations that begin with a norm.
KINDS = {
    "norm-per-head": NormKind.PER_HEAD,
    "norm-across-heads": NormKind.ACROSS_HEADS,
    "layer-norm-per-head": NormKind.LAYER_PER_HEAD,
    "layer-norm-across-heads": NormKind.LAYER_ACROSS_HEADS,
}

# The values of every option; the first ones are what models mostly use. `norm_weights` is None without a norm, and of a
# LayerNorm the biases too. Data, outputs, weights, and the table where heads have their own angles, start at an address
# of that alignment in bytes.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "operation": ("rotate", "rotate-in-place", "exact", *KINDS, "shift"),
    "heads": tuple(HEADS),
    "pairing": (Pairing.INTERLEAVED, Pairing.HALF),
    "data": (BFLOAT16, FLOAT16, FLOAT32),
    "table": ("float32", "data"),
    "tensors": (2, 1),
    "norm_weights": (None, "data", "float32", "none"),
    "angles": ("shared", "own"),
    "alignment": (16, 8, 4, 2),
}

_EVERY = ("rotate", "rotate-in-place", "exact", "norm-per-head", "norm-across-heads", "shift")
# What models call: their heads, pairing, angles and operations in bfloat16, with a float32 table and weights of the
# data's dtype.
MODELS = (
    ("wan-1.3b", Pairing.INTERLEAVED, "shared", _EVERY),
    ("wan-14b", Pairing.INTERLEAVED, "shared", _EVERY),
    ("hunyuan-video", Pairing.INTERLEAVED, "shared", _EVERY),
    ("cosmos", Pairing.HALF, "shared", _EVERY),
    ("ltx", Pairing.INTERLEAVED, "own", ("rotate", "exact", "norm-across-heads")),
    ("ltx", Pairing.HALF, "own", ("rotate", "exact", "norm-across-heads")),
    ("mochi", Pairing.INTERLEAVED, "own", ("rotate", "exact", "norm-per-head")),
    ("cogvideox-2b", Pairing.INTERLEAVED, "shared", ("rotate", "exact", "layer-norm-per-head")),
    ("cogvideox-5b", Pairing.INTERLEAVED, "shared", ("rotate", "exact", "layer-norm-per-head")),
)

Row = dict[str, Any]


def is_possible(row: Row) -> bool:
    """Whether a call can have these options, of which some may still be open."""
    named = "operation" in row and "norm_weights" in row
    if named and (row["operation"] in KINDS) != (row["norm_weights"] is not None):
        return False
    if row.get("operation") == "shift" and row.get("angles") == "own":
        return False
    return not (row.get("data") is FLOAT32 and (row.get("alignment") == 2 or row.get("table") == "data"))


def model_rows() -> list[Row]:
    """Every model with its operations."""
    return [
        {
            "operation": operation,
            "heads": heads,
            "pairing": pairing,
            "data": BFLOAT16,
            "table": "float32",
            "tensors": 2,
            "norm_weights": "data" if operation in KINDS else None,
            "angles": angles,
            "alignment": 16,
        }
        for heads, pairing, angles, operations in MODELS
        for operation in operations
    ]


def pairs_of(row: Row) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Every two options of a row, with their values."""
    return set(itertools.combinations(((name, row[name]) for name in OPTIONS if name in row), 2))


def uncovered_pairs(rows: Sequence[Row]) -> list[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The possible pairs of values that no row has, in the order of the options."""
    covered = set().union(*(pairs_of(row) for row in rows))
    values = [[(name, value) for value in OPTIONS[name]] for name in OPTIONS]
    every = itertools.chain.from_iterable(itertools.product(*columns) for columns in itertools.combinations(values, 2))
    return [pair for pair in every if pair not in covered and is_possible(dict(pair))]


def pairwise_rows(rows: Sequence[Row]) -> list[Row]:
    """``rows`` and as many more as every possible pair of values needs.

    A new row takes the first pair that is left, and for each other option the value that covers most of those left.
    """
    rows = list(rows)
    uncovered = dict.fromkeys(uncovered_pairs(rows))
    while uncovered:
        row: Row = dict(next(iter(uncovered)))
        for name in OPTIONS:
            if name in row:
                continue
            candidates = [{**row, name: value} for value in OPTIONS[name]]
            candidates = [candidate for candidate in candidates if is_possible(candidate)]
            row = max(candidates, key=lambda candidate: len(pairs_of(candidate) & uncovered.keys()))
        for pair in pairs_of(row):
            uncovered.pop(pair, None)
        rows.append(row)
    return rows


def name_of(row: Row) -> str:
    """A name that says the operation and heads, then what differs from the first value of each option."""
    parts = [row["operation"], row["heads"], row["pairing"].value, str(row["data"]).removeprefix("torch.")]
    if row["angles"] == "own":
        parts.append("own-angles")
    if row["table"] == "data":
        parts.append("16-bit-table")
    if row["tensors"] == 1:
        parts.append("one-tensor")
    if row["norm_weights"] not in (None, "data"):
        parts.append({"float32": "float32-weights", "none": "no-weights"}[row["norm_weights"]])
    if row["alignment"] != 16:
        parts.append(f"aligned-{row['alignment']}")
    return "-".join(parts)


def aligned_zeros(shape: tuple[int, ...], dtype: torch.dtype, alignment: int) -> torch.Tensor:
    """Zeros whose address is a multiple of ``alignment``, and for less than 16 not of twice that.

    It is at least the size of one number.
    """
    alignment = max(alignment, dtype.itemsize)
    start = alignment // dtype.itemsize if alignment < 16 else 0
    count = torch.Size(shape).numel()
    return torch.zeros(start + count, dtype=dtype)[start:].view(shape)


def rotation_args(row: Row) -> RotationArgs:
    """The arguments of a call with these options."""
    heads = HEADS[row["heads"]]
    shift, by_head = row["operation"] == "shift", row["angles"] == "own"
    table = row["data"] if row["table"] == "data" else FLOAT32
    return RotationArgs(
        rows=aligned_zeros((2, 12, max(heads.pairs)), table, row["alignment"] if by_head else 16),
        positions=torch.zeros(1, TOKENS, len(heads.pairs), dtype=torch.int32) if shift else None,
        pairs=heads.pairs,
        sizes=(TOKENS,) * len(heads.pairs),
        first_rows=(0,) * len(heads.pairs),
        token_offset=0,
        prefix=0,
        count=TOKENS,
        pairing=row["pairing"],
        inverse=False,
        exact=row["operation"] == "exact",
        entries=torch.zeros(1, dtype=torch.int32) if shift else None,
        head_rows=TOKENS if by_head else 0,
    )


def norm_of(row: Row) -> Norm | None:
    """The norm of a call with these options."""
    kind = KINDS.get(row["operation"])
    if kind is None:
        return None
    heads = HEADS[row["heads"]]
    counts = [count if kind.across_heads else 1 for count in heads.counts[: row["tensors"]]]
    dtype = {"data": row["data"], "float32": FLOAT32, "none": None}[row["norm_weights"]]
    if dtype is None:
        return Norm(kind, 1e-6)
    weights, biases = (
        [aligned_zeros((count * heads.dim,), dtype, row["alignment"]) for count in counts] for _ in range(2)
    )
    return Norm(kind, 1e-6, weights, biases if kind.centred else ())


def plan_for(row: Row, tuning: Tuning | None = None) -> Plan:
    """The plan of a call with these options, and with the choices of ``tuning``."""
    heads = HEADS[row["heads"]]
    shapes = [(1, TOKENS, count, heads.dim) for count in heads.counts[: row["tensors"]]]
    xs, outs = ([aligned_zeros(shape, row["data"], row["alignment"]) for shape in shapes] for _ in range(2))
    in_place = row["operation"] in ("rotate-in-place", "shift")
    return plan_of(xs, rotation_args(row), xs if in_place else outs, norm_of(row), tuning)


# What a sweep tunes: the operations and shapes that are held to targets, and the rotation in place.
SWEPT = [
    f"{operation}-{heads}-interleaved-bfloat16"
    for heads in ("wan-1.3b", "wan-14b", "hunyuan-video")
    for operation in ("rotate", "rotate-in-place", "norm-per-head", "norm-across-heads")
]
MODEL_ROWS = {name_of(row): row for row in model_rows()}
ROWS = {name_of(row): row for row in pairwise_rows(model_rows())}
PLANS: dict[str, Plan] = {name: plan_for(row) for name, row in ROWS.items()}
