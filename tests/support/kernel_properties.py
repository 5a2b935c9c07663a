"""Draws of calls that a backend gets, with what public functions never pass: angles by head, and chosen entries.

The backend is that of ``contract_calls.py``, which the environment chooses. Shapes are small and few, because kernels
are interpreted, or built for each kind of call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import properties
from contract_calls import BACKEND, DEVICE, MODULE
from dit_rope.rotation_args import Norm, RotationArgs
from dit_rope.spec import NormKind, Pairing
from oracle import rotate as rotate_oracle
from properties import BF16, F32, F64, REFUSED, RIGHT

# Channels of a head, and channel pairs of each axis.
WIDTHS = ((16, (4, 2, 2)), (16, (8,)), (40, (6, 4, 4)))


@dataclass(frozen=True)
class KernelDraw:
    """One call of a backend on one tensor or two."""

    width: int
    pairing: Pairing
    dtype: torch.dtype
    layout: str
    batch: int
    tokens: int
    heads: tuple[int, ...]
    sizes: tuple[int, ...]
    token_offset: int
    prefix: int
    count: int
    positions: str
    head_rows: int
    entries: bool
    inverse: bool
    exact: bool
    inplace: bool
    norm: NormKind | None
    weights: bool
    biases: bool
    seed: int


@st.composite
def kernel_draws(draw: st.DrawFn) -> KernelDraw:
    """Calls that public functions would let through."""
    integers, one_of = properties._integers, properties._one_of
    width = draw(integers(0, len(WIDTHS) - 1))
    tokens = draw(integers(1, 9))
    prefix = draw(integers(0, tokens))
    entries = draw(one_of((False, False, True)))
    norm = draw(one_of((None, None, *NormKind)))
    return KernelDraw(
        width=width,
        pairing=draw(one_of(tuple(Pairing))),
        dtype=draw(one_of((F32, BF16))),
        layout=draw(one_of(("contiguous", "transposed"))),
        batch=draw(integers(1, 3)),
        tokens=tokens,
        heads=draw(one_of(((2,), (3, 2)))),
        sizes=tuple(draw(integers(1, 4)) for _ in WIDTHS[width][1]),
        token_offset=draw(integers(0, 30)),
        prefix=prefix,
        count=draw(integers(0, tokens - prefix)),
        positions=draw(one_of(("batch", "shared"))) if entries else draw(one_of(("none", "shared", "batch", "one"))),
        head_rows=draw(one_of((0, 0, 1, 5))),
        entries=entries,
        inverse=draw(properties._BOOLEANS),
        exact=norm is None and draw(properties._BOOLEANS),
        inplace=entries or draw(properties._BOOLEANS),
        norm=norm,
        weights=draw(properties._BOOLEANS),
        biases=norm is not None and norm.centred and draw(properties._BOOLEANS),
        seed=draw(integers(0, 2**20)),
    )


def _args(draw: KernelDraw) -> RotationArgs:
    generator = torch.Generator().manual_seed(draw.seed)
    pairs = WIDTHS[draw.width][1]
    rows_of_axes = max(draw.sizes) + 2
    length = rows_of_axes + draw.head_rows * max(draw.heads)
    angles = torch.rand(length, max(pairs), generator=generator) * 7
    picked = torch.randperm(draw.batch, generator=generator)[: max(1, draw.batch - 1)].to(torch.int32)
    listed = len(picked) if draw.entries else draw.batch
    shape = {"shared": (1, draw.count), "batch": (listed, draw.count), "one": (listed, 1), "none": (0, 0)}[
        draw.positions
    ]
    positions = torch.randint(-1, rows_of_axes, (*shape, len(pairs)), generator=generator, dtype=torch.int32)
    return RotationArgs(
        rows=torch.stack((angles.cos(), angles.sin())).to(DEVICE),
        positions=None if draw.positions == "none" else positions.to(DEVICE),
        pairs=pairs,
        sizes=draw.sizes,
        first_rows=tuple(int(f) for f in torch.randint(0, 3, (len(pairs),), generator=generator)),
        token_offset=draw.token_offset,
        prefix=draw.prefix,
        count=draw.count,
        pairing=draw.pairing,
        inverse=draw.inverse,
        exact=draw.exact,
        entries=picked.to(DEVICE) if draw.entries else None,
        head_rows=draw.head_rows,
    )


def _angles(args: RotationArgs, heads: int, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[B, S, H, pairs]`` in float64, read from the docstring of RotationArgs; entries are told apart."""
    rows, place = args.rows.cpu().double(), torch.full((batch, tokens, len(args.pairs)), -1, dtype=torch.int64)
    listed = list(range(batch)) if args.entries is None else args.entries.tolist()
    for number, b in enumerate(listed):
        for j in range(args.count):
            if args.positions is not None:
                positions = args.positions.cpu()
                place[b, args.prefix + j] = positions[min(number, len(positions) - 1), min(j, positions.shape[1] - 1)]
                continue
            flat, coordinates = args.token_offset + j, []
            for size in reversed(args.sizes):
                flat, coordinate = divmod(flat, size)
                coordinates.append(coordinate)
            if flat == 0:  # else past the grid
                place[b, args.prefix + j] = torch.tensor(coordinates[::-1]) + torch.tensor(args.first_rows)
    parts = []
    for axis, pairs in enumerate(args.pairs):
        index = place[:, :, None, axis].expand(-1, -1, heads)
        by_head = (index + torch.arange(heads) * args.head_rows).clamp(min=0)
        identity = torch.tensor([1.0, 0.0], dtype=F64).view(2, 1, 1, 1, 1)
        parts.append(torch.where((index < 0)[..., None], identity, rows[:, by_head, :pairs]))
    cos, sin = torch.cat(parts, dim=-1)
    return cos, sin


def check_kernel(draw: KernelDraw) -> str:
    """Makes the call on the backend and compares every element with float64."""
    args, dim = _args(draw), WIDTHS[draw.width][0]
    xs = [
        properties.strided(draw.layout, (draw.batch, draw.tokens, heads, dim), draw.dtype, draw.seed + i).to(DEVICE)
        for i, heads in enumerate(draw.heads)
    ]
    before = [x.cpu().clone(memory_format=torch.contiguous_format) for x in xs]
    if BACKEND != "eager" and MODULE.declined(xs, args, draw.norm) is not None:
        return REFUSED
    outs = xs if draw.inplace else [torch.full_like(x, torch.nan) for x in xs]
    affine = _affine(draw, dim)
    if draw.norm is None:
        MODULE.rotate(xs, args, outs)
    else:
        weights = [weight for weight, _ in affine]
        biases = [bias for _, bias in affine if bias is not None]
        MODULE.rotate(xs, args, outs, Norm.of(xs, draw.norm, 1e-6, weights, biases))
    for x, out, of_norm in zip(before, outs, affine, strict=True):
        _compare(draw, args, x, out.cpu(), of_norm)
    return RIGHT


def _affine(draw: KernelDraw, dim: int) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(draw.seed)
    factors = []
    for heads in draw.heads:
        size = heads * dim if draw.norm is not None and draw.norm.across_heads else dim
        weight, bias = (torch.rand(size, generator=generator).to(DEVICE) + 0.5 for _ in range(2))
        factors.append((weight if draw.weights else None, bias if draw.biases else None))
    return factors


def _compare(
    draw: KernelDraw,
    args: RotationArgs,
    x: torch.Tensor,
    out: torch.Tensor,
    affine: tuple[torch.Tensor | None, torch.Tensor | None],
) -> None:
    heads, interleaved = x.shape[2], draw.pairing is Pairing.INTERLEAVED
    cos, sin = _angles(args, heads, draw.batch, draw.tokens)
    normed, error = x.double(), torch.zeros(x.shape, dtype=F64)
    if draw.norm is not None:
        on_cpu = tuple(None if p is None else p.cpu() for p in affine)
        normed, error = properties.norm_oracle(normed, draw.norm, 1e-6, (on_cpu[0], on_cpu[1]), draw.dtype, False)
    exact = torch.cat(
        [
            rotate_oracle(normed[:, :, [h]], cos[:, :, h], sin[:, :, h], interleaved=interleaved, inverse=draw.inverse)
            for h in range(heads)
        ],
        dim=2,
    )
    ones = torch.ones_like(cos)
    reach = properties._pair_sums(normed.abs(), ones, interleaved)
    slack = 3 * torch.finfo(F32).eps / 2 * reach + properties._pair_sums(error, ones, interleaved)
    if args.entries is not None:
        untouched = [b for b in range(draw.batch) if b not in args.entries.tolist()]
        assert torch.equal(out[untouched], x[untouched]), "changed an entry that is not listed"
        listed = args.entries.long().cpu()
        out, exact, slack = out[listed], exact[listed], slack[listed]
    properties._close(out, exact, slack)


STRATEGY = (kernel_draws(), check_kernel)
