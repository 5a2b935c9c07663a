"""Draws of calls, and what each must do: give what float64 gives within a derived bound, or refuse and say why.

Shared by ``test_properties.py``, which makes a few hundred draws, and ``scripts/long_tests/fuzz.py``, which makes as
many as it is asked for. A draw is a frozen value that prints as what makes it again; :func:`outcome` runs one.

The bounds are those of the standard model of rounding: each operation is off by at most ``u``, half the distance from
1 to the next number, of its result.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

import dit_rope
from dit_rope import Grid, NormKind, Pairing, RopeSpec, RopeTable, Scaling, Shard
from dit_rope.tables.scaling_types import ROUNDED_POSITIONS
from oracle import rms_norm
from oracle import rotate as rotate_oracle

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
RIGHT, REFUSED = "right", "refused"

# Layouts of a tensor in memory, by what may be done with them.
WRITABLE = ("contiguous", "transposed", "sliced", "padded", "offset", "packed")
SHARED = ("expanded batch", "expanded tokens", "expanded heads", "sliding")
STRIDED = "strided channels"
LAYOUTS = (*WRITABLE, *SHARED, STRIDED)


def strided(layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random data ``[B, S, H, D]`` in one of :data:`LAYOUTS`; what lies between its elements is NaN or data."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, heads, dim = shape

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    if layout == "transposed":
        return random(batch, heads, tokens, dim).transpose(1, 2)
    if layout == "packed":
        return random(batch, tokens, 3, heads, dim).unbind(2)[1]
    if layout == "sliding":  # each token begins one channel after the one before it
        room = random(batch * 7 + tokens + heads * dim)
        return room.as_strided(shape, (7, 1, dim, 1))
    if layout.startswith("expanded"):
        sizes = [1 if name == layout.split()[1] else size for name, size in zip(_DIMS, shape, strict=True)]
        return random(*sizes).expand(shape)
    around = {"sliced": (0, 2, 0, 0), "padded": (0, 0, 1, 3), "offset": (0, 0, 0, 1), STRIDED: (0, 0, 0, dim)}
    more = around.get(layout, (0, 0, 0, 0))
    whole = torch.full([size + extra for size, extra in zip(shape, more, strict=True)], torch.nan, dtype=dtype)
    if layout == STRIDED:
        x = whole[..., ::2]
    elif layout == "offset":
        x = whole[..., 1:]
    else:
        x = whole[:, more[1] // 2 : more[1] // 2 + tokens, :heads, :dim]
    return x.copy_(random(*shape))


_DIMS = ("batch", "tokens", "heads", "channels")


def overlaps(x: torch.Tensor) -> bool:
    """Whether two elements of ``x`` are one place in memory, found by numbering every place."""
    places = torch.zeros(x.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        places += (torch.arange(size) * stride).view([-1 if i == dim else 1 for i in range(x.ndim)])
    return places.unique().numel() < places.numel()


# Made once: what hypothesis asks of a new strategy takes longer than a draw of it.
_integers = functools.cache(st.integers)
_one_of = functools.cache(st.sampled_from)
_sometimes = _one_of((False, False, False, True))
_scale = st.floats(1, 8, width=16)
_BOOLEANS = st.booleans()


@st.composite
def _scalings(draw: st.DrawFn) -> Scaling | None:
    """None, or a scaling that has a closed form."""
    kind = draw(_one_of((None, "linear", "ntk", "kandinsky5", "fastvideo")))
    if kind is None:
        return None
    if kind == "fastvideo":
        return Scaling.of(kind, theta_rescale=draw(_one_of((1.0, 2.5))), interpolation=draw(_one_of((1.0, 0.5, 3.0))))
    return Scaling.of(kind, **{"scale" if kind == "kandinsky5" else "factor": draw(_scale)})


_SCALINGS = _scalings()


@st.composite
def specs(draw: st.DrawFn) -> RopeSpec:
    """Rotations of 1 to 4 axes."""
    axes = draw(_integers(1, 4))
    scaled = draw(_one_of((None, None, "one", "each")))
    scaling = tuple(draw(_SCALINGS) for _ in range(axes)) if scaled == "each" else draw(_SCALINGS) if scaled else None
    return RopeSpec(
        dims=tuple(2 * draw(_integers(2, 6)) for _ in range(axes)),
        theta=draw(_one_of((10_000.0, 256.0, 1e6, 2.0, 1.5))),
        pairing=draw(_one_of(tuple(Pairing))),
        scaling=scaling,
        frequency_dtype=draw(_one_of((F64, F32))),
    )


def _shard(draw: st.DrawFn, grid: Grid) -> Shard | None:
    """A part of ``grid``; those that do not divide it, and those past its end, among them."""
    kind = draw(_one_of(("whole", "whole", "flat", "axis", "tokens")))
    if kind == "whole":
        return None
    if kind == "tokens":
        start = draw(_integers(0, grid.tokens + 2))
        return Shard.of_tokens(start, start + draw(_integers(1, grid.tokens + 3)))
    world = draw(_integers(1, 5))
    return Shard(
        draw(_integers(0, world - 1)), world, axis=draw(_integers(0, len(grid.sizes))) if kind == "axis" else None
    )


@dataclass(frozen=True)
class TableDraw:
    """A table and every form of it."""

    spec: RopeSpec
    grid: Grid
    shard: Shard | None
    dtype: torch.dtype


_SPECS = specs()


@st.composite
def table_draws(draw: st.DrawFn) -> TableDraw:
    """Tables of any spec, of small grids, at the start of a video or far into it, and any shard."""
    spec = draw(_SPECS)
    start = draw(_one_of((None, 0, 300, 4095, 100_000)))
    start = draw(_integers(0, 40)) if start is None else start
    grid = Grid(*[draw(_integers(1, 5)) for _ in spec.dims], start_frame=start)
    return TableDraw(spec, grid, _shard(draw, grid), draw(_one_of((F32, F32, F64, BF16, F16))))


def shard_divides(draw: TableDraw) -> bool:
    """Whether the grid has such a shard; others must be refused."""
    shard = draw.shard
    if shard is None or shard.axis is None:
        return True
    return shard.axis < len(draw.grid.sizes) and draw.grid.sizes[shard.axis] % shard.world == 0


def token_coordinates(draw: TableDraw) -> list[tuple[int, ...] | None]:
    """Position on each axis of every token of the shard, by counting through the grid; None for padding."""
    sizes, shard = draw.grid.sizes, draw.shard or Shard()
    every = [(place[0] + draw.grid.start_frame, *place[1:]) for place in itertools.product(*map(range, sizes))]
    if shard.axis is not None:
        first = draw.grid.start_frame if shard.axis == 0 else 0
        length = sizes[shard.axis] // shard.world
        low = first + shard.rank * length
        return [place for place in every if low <= place[shard.axis] < low + length]
    count = -(-len(every) // shard.world)
    start, stop = shard.tokens or (shard.rank * count, shard.rank * count + count)
    return [every[i] if i < len(every) else None for i in range(start, stop)]


def angles(spec: RopeSpec, axis: int, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Radians ``[n, pairs]`` of positions ``[n]`` on one axis, frequencies formed in ``dtype``."""
    dim, scaling = spec.dims[axis], spec.axis_scaling(axis)
    theta, options = spec.theta, {} if scaling is None else dict(scaling.parameters)
    kind = None if scaling is None else scaling.kind
    stretch = float(options["factor" if kind == "ntk" else "theta_rescale"]) if kind in ("ntk", "fastvideo") else 1.0
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(dtype) / dim
    frequencies = 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents
    if kind == "linear":
        frequencies = frequencies / float(options["factor"])
    scale = float(options.get("interpolation", 1.0))
    radians = torch.outer(positions.to(torch.promote_types(dtype, positions.dtype)) * scale, frequencies)
    return radians / float(options["scale"]) if kind == "kandinsky5" else radians


def cos_sin_oracle(
    spec: RopeSpec, places: list[tuple[int, ...] | None], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cos and sin ``[n, pairs]`` in float64, (1, 0) for None or a negative place, and how far a table may be off.

    The error is that of an angle whose frequency was formed in the spec's dtype: a power of theta, each of whose
    operations is off by u, with an exponent below 1, and three more; then one rounding of cos and sin.
    """
    parts = []
    error = torch.zeros(len(places), sum(spec.pairs), dtype=F64)
    u = torch.finfo(torch.promote_types(spec.frequency_dtype, F32)).eps / 2
    table_u = torch.finfo(dtype).eps / 2 + (torch.finfo(F32).eps / 2 if dtype.itemsize == 2 else 0)
    column = 0
    for axis, pairs in enumerate(spec.pairs):
        unrotated = torch.tensor([place is None or place[axis] < 0 for place in places], dtype=torch.bool)
        coordinates = torch.tensor([0 if place is None else max(place[axis], 0) for place in places], dtype=F64)
        radians = angles(spec, axis, coordinates, F64).masked_fill(unrotated[:, None], 0.0)
        rounded = (coordinates < ROUNDED_POSITIONS) | (spec.frequency_dtype != F64)
        scaling = spec.axis_scaling(axis)
        scaled = scaling is not None and dict(scaling.parameters).get("interpolation", 1.0) != 1.0
        of_position = (rounded & scaled) * 2 * torch.finfo(F32).eps / 2
        error[:, column : column + pairs] = radians.abs() * ((8 + 3 * math.log(4e6)) * u + of_position[:, None])
        parts.append(radians)
        column += pairs
    radians = torch.cat(parts, dim=1)
    return radians.cos(), radians.sin(), error + table_u + 2 * u + torch.finfo(dtype).tiny


def build(draw: TableDraw) -> RopeTable:
    """The table of a draw."""
    return dit_rope.rope_table(draw.spec, draw.grid, shard=draw.shard, dtype=draw.dtype)


def check_table(draw: TableDraw) -> str:
    """Compares each form of a table with float64."""
    table = refusable(lambda: build(draw), may=not shard_divides(draw))
    if table is None:
        return REFUSED
    places = token_coordinates(draw)
    cos, sin, error = cos_sin_oracle(draw.spec, places, draw.dtype)
    assert table.count == len(places)
    dense = table.cos_sin(repeat=False)
    for actual, exact in zip(dense, (cos, sin), strict=True):
        assert actual.shape == exact.shape
        assert actual.dtype == draw.dtype
        _close(actual, exact, error)
    for actual, flat in zip(table.cos_sin(), dense, strict=True):
        halves = draw.spec.pairing is Pairing.HALF
        assert torch.equal(actual, torch.cat((flat, flat), -1) if halves else flat.repeat_interleave(2, dim=-1))
    wide = torch.promote_types(draw.dtype, F32)
    assert torch.equal(torch.view_as_real(table.complex()), torch.stack(dense, -1).to(wide))
    rows = table.positions()[0].long()
    for token, place in enumerate(places):
        assert (place is None) == bool((rows[token] < 0).all())
    inside = [i for i, place in enumerate(places) if place is not None]
    picked = [table.rows[:, rows[inside, a], :pairs] for a, pairs in enumerate(draw.spec.pairs)]
    assert torch.equal(torch.cat(picked, -1), torch.stack(dense)[:, inside])
    return RIGHT


@dataclass(frozen=True)
class RotationDraw:
    """One call of a rotating function on one tensor, or on queries and keys.

    ``places`` are positions as coordinates ``[1 or B][tokens][axes]``, negative for an unrotated axis, or None
    for those of the table; ``norm`` is None for a plain rotation; ``parameters`` says which of a weight and a bias
    each tensor has.
    """

    table: TableDraw
    batch: int
    heads: tuple[int, ...]
    more_channels: int
    layouts: tuple[str, ...]
    dtype: torch.dtype
    prefix: int
    suffix: int
    places: tuple[tuple[tuple[int, ...], ...], ...] | None
    inverse: bool
    inplace: bool
    exact: bool
    requires_grad: bool
    norm: NormKind | None
    parameters: tuple[tuple[bool, bool], ...]
    parameter_dtype: torch.dtype
    eps: float
    seed: int


_TABLES = table_draws()


@st.composite
def rotation_draws(draw: st.DrawFn) -> RotationDraw:
    """Calls of rotate, rotate_qk, norm_rotate and norm_rotate_qk whose sizes fit."""
    table = draw(_TABLES)
    if not shard_divides(table):
        table = replace(table, shard=None)
    count, batch = draw(_integers(1, 2)), draw(_one_of((1, 1, 2, 3, 0)))
    places = None
    if draw(_sometimes):
        table = replace(table, shard=None)
        shape = draw(_one_of((1, max(batch, 1)))), draw(_integers(0, 6))
        sizes = table.grid.sizes
        places = tuple(
            tuple(tuple(draw(_integers(-1, size - 1)) for size in sizes) for _ in range(shape[1]))
            for _ in range(shape[0])
        )
    norm = draw(_one_of((None, None, *NormKind)))
    biased = norm is not None and norm.centred
    return RotationDraw(
        table=table,
        batch=batch,
        heads=tuple(draw(_one_of((1, 2, 3, 5, 0))) for _ in range(count)),
        more_channels=draw(_one_of((0, 0, 1, 2, 7))),
        layouts=tuple(draw(_one_of(LAYOUTS)) for _ in range(count)),
        dtype=draw(_one_of((F32, BF16, F16, F64))),
        prefix=draw(_integers(0, 3)),
        suffix=draw(_integers(0, 3)),
        places=places,
        inverse=draw(_BOOLEANS),
        inplace=draw(_BOOLEANS),
        exact=draw(_BOOLEANS),
        requires_grad=draw(_sometimes),
        norm=norm,
        parameters=tuple((norm is not None and draw(_BOOLEANS), biased and draw(_BOOLEANS)) for _ in range(count)),
        parameter_dtype=draw(_one_of((F32, BF16, F64))),
        eps=draw(_one_of((1e-6, 1e-5, 0.1))),
        seed=draw(_integers(0, 2**20)),
    )


def refusable(call: Callable[[], object], may: bool) -> object:
    """What ``call`` gives, or None where it refuses, which it must ``may``; the message has the form of all others."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        if not may or " must " not in str(error):
            raise AssertionError(f"refused {'without a rule' if may else 'what it should take'}: {error}") from error
        return None


def check_rotation(draw: RotationDraw) -> str:
    """Makes the call and compares what it gives, and leaves, with float64."""
    table = build(draw.table)
    firsts, start = table.first_rows, (draw.table.grid.start_frame,)
    sequences = draw.places or (token_coordinates(draw.table),)
    length = draw.prefix + len(sequences[0]) + draw.suffix
    dim = draw.table.spec.rotary_dim + draw.more_channels
    xs = [
        strided(layout, (draw.batch, length, heads, dim), draw.dtype, draw.seed + i)
        for i, (layout, heads) in enumerate(zip(draw.layouts, draw.heads, strict=True))
    ]
    before = [x.clone(memory_format=torch.contiguous_format) for x in xs]
    for x in xs:
        x.requires_grad_(draw.requires_grad)
    positions = None
    if draw.places is not None:
        at = torch.tensor(draw.places, dtype=torch.int32).view(len(draw.places), -1, len(firsts))
        positions = torch.where(at < 0, at, at + torch.tensor(firsts, dtype=torch.int32))
        sequences = tuple(
            tuple((place[0] + start[0] if place[0] >= 0 else -1, *place[1:]) for place in row) for row in draw.places
        )
    may = any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in xs)
    may |= draw.inplace and (draw.requires_grad or any(x.numel() and overlaps(x) for x in xs))
    call, affine = _call(draw, xs, table, positions)
    outs = refusable(call, may)
    if outs is None:
        assert all(torch.equal(x, y) for x, y in zip(xs, before, strict=True)), "changed what it refused"
        return REFUSED
    assert isinstance(outs, list)
    full = [(*[None] * draw.prefix, *sequence, *[None] * draw.suffix) for sequence in sequences]
    for index, (x, y, out) in enumerate(zip(xs, before, outs, strict=True)):
        assert (out is x) == draw.inplace
        assert (out.shape, out.dtype) == (y.shape, y.dtype)
        assert draw.inplace or torch.equal(x, y), "wrote to its input"
        if y.numel():
            _compare(draw, y, out.detach(), full, affine[index])
    return RIGHT


_Affine = tuple[torch.Tensor | None, torch.Tensor | None]


def _call(
    draw: RotationDraw, xs: list[torch.Tensor], table: RopeTable, positions: torch.Tensor | None
) -> tuple[Callable[[], object], list[_Affine]]:
    """The call, which gives a list, and the weight and bias of each tensor."""
    options = {
        "prefix": draw.prefix, "suffix": draw.suffix, "positions": positions, "inverse": draw.inverse,
        "inplace": draw.inplace, "exact": draw.exact,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(draw.seed)
    affine: list[_Affine] = []
    for x, has_parameter in zip(xs, draw.parameters, strict=True):
        across = draw.norm is not None and draw.norm.across_heads
        size = x.shape[2] * x.shape[3] if across else x.shape[3]
        weights = [(torch.rand(size, generator=generator) + 0.5).to(draw.parameter_dtype) for _ in has_parameter]
        affine.append((weights[0] if has_parameter[0] else None, weights[1] if has_parameter[1] else None))
    if draw.norm is None:
        if len(xs) == 1:
            return lambda: [dit_rope.rotate(xs[0], table, **options)], affine
        return lambda: list(dit_rope.rotate_qk(*xs, table, **options)), affine
    options |= {"norm": draw.norm, "eps": draw.eps}
    if len(xs) == 1:
        return lambda: [dit_rope.norm_rotate(xs[0], table, affine[0][0], bias=affine[0][1], **options)], affine
    (q_weight, q_bias), (k_weight, k_bias) = affine
    options |= {"q_bias": q_bias, "k_bias": k_bias}
    return lambda: list(dit_rope.norm_rotate_qk(*xs, table, q_weight, k_weight, **options)), affine


def _compare(
    draw: RotationDraw,
    x: torch.Tensor,
    out: torch.Tensor,
    places: list[tuple[tuple[int, ...] | None, ...]],
    affine: _Affine,
) -> None:
    """Compares ``out`` with the norm and rotation of ``x``; unrotated and unnormed elements, bit by bit."""
    spec, dtype = draw.table.spec, draw.table.dtype
    tables = [cos_sin_oracle(spec, list(row), dtype) for row in places]
    cos, sin, table_error = (torch.stack(parts) for parts in zip(*tables, strict=True))
    wide = x.double()
    normed, error = wide, torch.zeros_like(wide)
    if draw.norm is not None:
        normed, error = norm_oracle(wide, draw.norm, draw.eps, affine, draw.dtype, draw.exact)
    interleaved = spec.pairing is Pairing.INTERLEAVED
    exact = rotate_oracle(normed, cos, sin, interleaved=interleaved, inverse=draw.inverse)
    work = torch.promote_types(draw.dtype, dtype) if draw.exact else torch.promote_types(draw.dtype, F32)
    # Of each channel: itself and its partner, each off by its own error, the table's, and two operations.
    ones = torch.ones_like(cos)
    reach = _pair_sums(normed.abs(), ones, interleaved)
    slack = torch.zeros_like(wide)
    off = _each_channel(table_error, x.shape[-1], interleaved) + 3 * torch.finfo(work).eps / 2
    slack += reach * off + _pair_sums(error, ones, interleaved)
    slack[..., 2 * cos.shape[-1] :] = error[..., 2 * cos.shape[-1] :]
    _close(out, exact, slack)
    if draw.norm is None:
        unrotated_pairs = [[[p is None or p[a] < 0 for a in range(len(spec.dims))] for p in row] for row in places]
        by_pair = torch.tensor(unrotated_pairs).repeat_interleave(torch.tensor(spec.pairs), dim=-1)
        unrotated = _each_channel(by_pair, x.shape[-1], interleaved).expand(x.shape)
        assert torch.equal(out[unrotated], x[unrotated]), "changed unrotated elements"


def _each_channel(by_pair: torch.Tensor, dim: int, interleaved: bool) -> torch.Tensor:
    """``[B, S, pairs]`` as ``[B, S, 1, D]``: a pair's value at both its channels, True or 0 past them."""
    twice = by_pair.repeat_interleave(2, dim=-1) if interleaved else torch.cat((by_pair, by_pair), -1)
    padding = torch.full((*by_pair.shape[:2], dim - twice.shape[-1]), by_pair.dtype == torch.bool, dtype=by_pair.dtype)
    return torch.cat((twice, padding), -1).unsqueeze(2)


def _pair_sums(x: torch.Tensor, ones: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """At each channel of a pair, the sum of both."""
    width = 2 * ones.shape[-1]
    channels = x[..., :width]
    partner = channels.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else channels.roll(width // 2, -1)
    return torch.cat((channels + partner, x[..., width:]), -1)


def norm_oracle(
    x: torch.Tensor, norm: NormKind, eps: float, affine: _Affine, dtype: torch.dtype, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x`` ``[B, S, H, D]`` in float64, and how far one in float32 (float64 for float64) may be off.

    A mean of n numbers is off by n u of the largest. Exact mode rounds to ``dtype`` after the norm, the weight and the
    bias besides.
    """
    dims = (-2, -1) if norm.across_heads else (-1,)
    n = math.prod(x.shape[dim] for dim in dims)
    u = torch.finfo(torch.promote_types(dtype, F32)).eps / 2
    largest = x.abs().amax(dims, keepdim=True)
    centred = x - x.mean(dims, keepdim=True) if norm.centred else x
    sigma = ((centred * centred).mean(dims, keepdim=True) + eps).sqrt()
    shift = (n + 2) * u * largest / sigma if norm.centred else torch.zeros_like(sigma)
    normed = rms_norm(centred, None, eps, across_heads=norm.across_heads)
    error = shift * (1 + normed.abs()) + normed.abs() * (n / 2 + 6) * u
    weight, bias = (None if p is None else p.double().view(x.shape[-2:] if norm.across_heads else -1) for p in affine)
    rounding = 4 * (torch.finfo(dtype).eps / 2 if exact else u)
    if weight is not None:
        normed, error = normed * weight, error * weight.abs()
    error = error + rounding * normed.abs()
    if bias is not None:
        normed = normed + bias
        error = error + rounding * (bias.abs() + normed.abs())
    return normed, error


def _close(actual: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor) -> None:
    """Fails where ``actual`` is off ``exact`` by more than ``slack`` and one rounding, or is NaN."""
    info = torch.finfo(actual.dtype)
    allowed = slack + (exact.abs() + slack) * (info.eps / 2) + info.tiny * info.eps
    error = (actual.double() - exact).abs()
    wrong = ~(error <= allowed)
    if wrong.any():
        worst = (error / allowed).nan_to_num(torch.inf).argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are off; worst is {actual.flatten()[worst].item()}, exact "
            f"{exact.flatten()[worst].item()}, allowed {allowed.expand_as(error).flatten()[worst].item():.3g}"
        )


@dataclass(frozen=True)
class ShiftDraw:
    """Keys rotated at one position and moved to another, by one delta or one for each block or token."""

    spec: RopeSpec
    start: int
    delta: int
    deltas: tuple[int, ...] | None
    per_token: bool
    blocks: int
    block_size: int
    heads: int
    more_channels: int
    layout: str
    inplace: bool
    requires_grad: bool
    dtype: torch.dtype
    seed: int


@st.composite
def shift_draws(draw: st.DrawFn) -> ShiftDraw:
    """Calls of shift_keys."""
    blocks, block_size = draw(_integers(1, 4)), draw(_integers(1, 4))
    per_token = draw(_BOOLEANS)
    count = blocks * (block_size if per_token else 1)
    deltas = (
        tuple(draw(_integers(-1 if draw(_sometimes) else 0, 50)) for _ in range(count)) if draw(_BOOLEANS) else None
    )
    return ShiftDraw(
        spec=draw(_SPECS),
        start=draw(_integers(50, 4000)),
        delta=draw(_integers(-50, 50)),
        deltas=deltas,
        per_token=per_token,
        blocks=blocks,
        block_size=block_size,
        heads=draw(_integers(1, 3)),
        more_channels=draw(_one_of((0, 1, 4))),
        layout=draw(_one_of(LAYOUTS)),
        inplace=draw(_BOOLEANS),
        requires_grad=draw(_sometimes),
        dtype=draw(_one_of((F32, F64))),
        seed=draw(_integers(0, 2**20)),
    )


def check_shift(draw: ShiftDraw) -> str:
    """Compares shifted keys with keys rotated by the angle of the shift in float64."""
    spec, shape = draw.spec, (draw.blocks, draw.block_size, draw.heads, draw.spec.rotary_dim + draw.more_channels)
    keys = strided(draw.layout, shape, draw.dtype, draw.seed)
    before = keys.clone(memory_format=torch.contiguous_format)
    keys.requires_grad_(draw.requires_grad)
    options: dict[str, object] = {"delta_frames": draw.delta}
    steps = torch.full((1, 1), float(draw.delta), dtype=F64)
    may = draw.requires_grad or (keys.stride(-1) != 1 and keys.shape[-1] > 1)
    may |= draw.inplace and overlaps(keys)
    if draw.deltas is not None:
        deltas = torch.tensor(draw.deltas, dtype=torch.int32).view(draw.blocks, -1)
        options, steps = {"deltas": deltas}, -deltas.double()
        may |= min(draw.deltas) < 0
    out = refusable(lambda: dit_rope.shift_keys(keys, spec, inplace=draw.inplace, **options), may)  # type: ignore[arg-type]
    if out is None:
        assert torch.equal(keys, before), "changed what it refused"
        return REFUSED
    assert isinstance(out, torch.Tensor)
    assert draw.inplace or torch.equal(keys, before), "wrote to its input"
    steps = steps.expand(draw.blocks, draw.block_size)
    radians = torch.zeros(draw.blocks, draw.block_size, sum(spec.pairs), dtype=F64)
    radians[..., : spec.pairs[0]] = angles(spec, 0, steps.flatten(), F64).view(*steps.shape, -1)
    interleaved = spec.pairing is Pairing.INTERLEAVED
    exact = rotate_oracle(before, radians.cos(), radians.sin(), interleaved=interleaved)
    u = torch.finfo(draw.dtype).eps / 2
    of_angle = radians.abs() * (8 + 3 * math.log(4e6)) * torch.finfo(spec.frequency_dtype).eps / 2
    off = _each_channel(of_angle + 3 * u, shape[-1], interleaved) + 3 * u
    _close(out, exact, _pair_sums(before.double().abs(), radians.cos()[:, :, None], interleaved) * off)
    return RIGHT


STRATEGIES = {
    "table": (_TABLES, check_table),
    "rotation": (rotation_draws(), check_rotation),
    "shift": (shift_draws(), check_shift),
}
"""Draws, and what is checked of each."""
