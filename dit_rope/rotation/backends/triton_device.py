"""The GPU program of the Triton backend: norm and rotation of one or two tensors in one pass over memory.

Imported by :mod:`dit_rope.rotation.backends.triton_kernels` on first use, so that nothing else needs Triton. A tile is
``[tokens, heads, channels]``. Triton lays threads along the contiguous dim first, then along the first: threads
differ in channels and tokens, and the heads of a tile are registers of one thread. So a thread keeps the cos and sin of
a few pairs of one token for every head of both tensors, unless each head has its own. Each element is loaded once, and
one thread rotates and stores both channels of a pair, which makes a launch in place safe.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_norms import affine, centred, head_total, inverse_rms, rounded, row_total, terms

# Run-time numbers on which Triton must not specialise (on 1, or on divisibility by 16): a new sequence length, prefix,
# shard or start frame must not compile anything. Their types are fixed in the signature for the same reason.
RUN_TIME = (
    *(f"{x}_{stride}" for x in ("q", "q_out", "k", "k_out") for stride in ("batch", "token", "head")),
    *("rows_plane", "rows_row", "positions_batch", "positions_token", "positions_axis", "entries_batch"),
    "head_rows",
    *("row_count", "entry_count", "tokens", "prefix", "rotated_tokens", "token_offset", "span0", "span1", "span2"),
    *("first0", "first1", "first2", "first3", "eps"),
)


@triton.jit
def _load_cos_sin(rows, rows_plane, row, rows_row, column, rotated, INVERSE: tl.constexpr):
    """Cos and sin (float32) at rows and columns of the table, (1, 0) where ``rotated`` is false."""
    at = rows + row * rows_row + column
    cos = tl.load(at, mask=rotated, other=1.0, eviction_policy="evict_last").to(tl.float32)
    sin = tl.load(at + rows_plane, mask=rotated, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return cos, -sin if INVERSE else sin


@triton.jit
def _find_rows(
    table, positions, positions_batch, positions_token, positions_axis, batch, j, rotates, rest, spans, firsts,
    BOUNDS: tl.constexpr, AXES: tl.constexpr, PADDED: tl.constexpr, OWN_ANGLES: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Cos and sin of the pairs of this program's tokens, and whether each pair rotates: ``[tokens, 1, PADDED]``.

    With OWN_ANGLES instead: the rows of head 0, their columns, and ``rotates``; each tile then reads the cos and sin of
    its heads. ``j`` and ``rotates`` are ``[tokens]``: the token's number in the grid, and whether it rotates. ``rest``
    is its flat index there. Each axis' row is computed once per token, and selected for the pairs of that axis.
    """
    rows, rows_plane, rows_row, row_count, _ = table
    # Pairs come first where heads share their cos and sin, so that a warp reads neighbouring pairs.
    pair = tl.arange(0, PADDED)[None, None, :] if OWN_ANGLES else tl.arange(0, PADDED)[:, None]
    row = tl.full([j.shape[0], 1, PADDED] if OWN_ANGLES else [PADDED, j.shape[0]], -1, tl.int32)
    column = pair
    for a in tl.static_range(AXES):
        if positions is not None:
            at = positions + batch * positions_batch + j.to(tl.int64) * positions_token + a * positions_axis
            axis_row = tl.load(at, mask=rotates, other=-1)
            axis_row = tl.where(axis_row < row_count, axis_row, -1)
        else:
            coordinate = rest if a == AXES - 1 else rest // spans[a]
            rest = rest - coordinate * spans[a]
            axis_row = firsts[a] + coordinate
        in_axis = (pair >= BOUNDS[a]) & (pair < BOUNDS[a + 1])
        row = tl.where(in_axis, axis_row[:, None, None] if OWN_ANGLES else axis_row[None, :], row)
        column = tl.where(in_axis, pair - BOUNDS[a], column)
    if OWN_ANGLES:
        angles = (row, column, rotates[:, None, None])
    else:
        # A row stays -1 for the pairs of an axis whose position is negative or past the table, and past the last pair.
        rotated = (row >= 0) & rotates[None, :]
        cos, sin = _load_cos_sin(rows, rows_plane, row, rows_row, column, rotated, INVERSE)
        angles = (tl.trans(cos)[:, None, :], tl.trans(sin)[:, None, :], tl.trans(rotated)[:, None, :])
    return angles


@triton.jit
def _tile_cos_sin(angles, table, head, OWN_ANGLES: tl.constexpr, TABLE_ALIGN: tl.constexpr, INVERSE: tl.constexpr):
    """Cos, sin and rotated pairs of the heads ``[1, heads, 1]`` of a tile, in shapes that broadcast with the tile.

    ``angles`` is what :func:`_find_rows` returns. With OWN_ANGLES strides of the table come in units of TABLE_ALIGN
    elements, as the data's do in units of ALIGN.
    """
    cos, sin, rotated = angles
    if OWN_ANGLES:
        row, column, rotates = angles
        rows, rows_plane, rows_row, row_count, head_rows = table
        rows_plane, rows_row = rows_plane * TABLE_ALIGN, rows_row * TABLE_ALIGN
        head_row = row + head * head_rows.to(tl.int64)
        rotated = (row >= 0) & (head_row < row_count) & rotates
        cos, sin = _load_cos_sin(rows, rows_plane, head_row, rows_row, column, rotated, INVERSE)
    return cos, sin, rotated


@triton.jit
def _load_tile(
    row, mask, DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, PADDED: tl.constexpr, TAIL: tl.constexpr,
    HALF: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """The channels of some heads, from pointers ``[tokens, heads, 1]`` to the first of each, in the dtype of memory.

    Returns both channels of each pair ``[tokens, heads, PADDED]``, and the channels past the pairs, which matter only
    where TAIL > 0. An interleaved row is loaded whole, so that a thread reads 16 bytes at once, and split in registers.
    """
    if HALF:
        p = tl.arange(0, PADDED)[None, None, :]
        inside = mask & (p < PAIRS) if PADDED != PAIRS else mask
        x1 = tl.load(row + p, mask=inside, other=0.0, eviction_policy=POLICY)
        x2 = tl.load(row + PAIRS + p, mask=inside, other=0.0, eviction_policy=POLICY)
    else:
        channel = tl.arange(0, 2 * PADDED)[None, None, :]
        inside = mask & (channel < WIDTH) if 2 * PADDED != WIDTH else mask
        x = tl.load(row + channel, mask=inside, other=0.0, eviction_policy=POLICY)
        x1, x2 = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], PADDED, 2]))
    tail = x1
    if TAIL > 0:
        channel = 2 * PAIRS + tl.arange(0, TAIL)[None, None, :]
        tail = tl.load(row + channel, mask=mask & (channel < DIM), other=0.0, eviction_policy=POLICY)
    return x1, x2, tail


@triton.jit
def _store_tile(
    row, y1, y2, tail, mask, DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, PADDED: tl.constexpr,
    TAIL: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Stores channels as :func:`_load_tile` loads them, rounded once to the dtype of memory."""
    dtype = row.dtype.element_ty
    if HALF:
        p = tl.arange(0, PADDED)[None, None, :]
        inside = mask & (p < PAIRS) if PADDED != PAIRS else mask
        tl.store(row + p, y1.to(dtype), mask=inside)
        tl.store(row + PAIRS + p, y2.to(dtype), mask=inside)
    else:
        channel = tl.arange(0, 2 * PADDED)[None, None, :]
        inside = mask & (channel < WIDTH) if 2 * PADDED != WIDTH else mask
        y = tl.reshape(tl.join(y1.to(dtype), y2.to(dtype)), [y1.shape[0], y1.shape[1], 2 * PADDED])
        tl.store(row + channel, y, mask=inside)
    if TAIL > 0:
        channel = 2 * PAIRS + tl.arange(0, TAIL)[None, None, :]
        tl.store(row + channel, tail.to(dtype), mask=mask & (channel < DIM))


@triton.jit
def _rotate_tile(
    row, x1, x2, tail, scale, w1, w2, w_tail, b1, b2, b_tail, angles, mask, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, PADDED: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr, PRODUCT: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """Applies scale, weight and bias of the norm, where not None, rotates the pairs, and stores all at ``row``."""
    x1, x2, tail = x1.to(tl.float32), x2.to(tl.float32), tail.to(tl.float32)
    if scale is not None:
        x1, x2, tail = affine(
            x1, x2, tail, scale, w1, w2, w_tail, b1, b2, b_tail, row.dtype.element_ty, TAIL, ROUNDING
        )  # fmt: skip
    cos, sin, rotated = angles
    # A select, not only cos = 1 and sin = 0: unrotated pairs keep their bits, infinities and -0 included.
    y1 = tl.where(rotated, rounded(x1 * cos, PRODUCT) - rounded(x2 * sin, PRODUCT), x1)
    y2 = tl.where(rotated, rounded(x1 * sin, PRODUCT) + rounded(x2 * cos, PRODUCT), x2)
    _store_tile(row, y1, y2, tail, mask, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF)


@triton.jit
def _rotate_row(
    x, x_rows, x_head, out, out_rows, out_head, weight, bias, live, angles, table, eps,
    HEADS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    PADDED: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr, PRODUCT: tl.constexpr, CENTRED: tl.constexpr,
    ROUNDING: tl.constexpr, OWN_ANGLES: tl.constexpr, TABLE_ALIGN: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Norms each token across its heads, then rotates them, TILE heads at a time.

    All heads stay in registers, in the dtype of memory, between the sums and the rotation: each is read once.
    """
    head = tl.arange(0, TILE)[None, :, None]
    w1, w2, w_tail, b1, b2, b_tail = None, None, None, None, None, None
    tiles = ()
    sums = tl.zeros([x_rows.shape[0], TILE, PADDED], tl.float32)
    tail_sums = tl.zeros([x_rows.shape[0], TILE, TAIL if TAIL > 0 else 1], tl.float32)
    for first in tl.static_range(0, HEADS, TILE):
        mask = live & (first + head < HEADS) if HEADS % TILE != 0 else live
        x1, x2, tail = _load_tile(
            x + first * x_head + x_rows, mask, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF, "evict_first"
        )
        tiles += ((x1, x2, tail),)  # type: ignore[assignment]
        sums += terms(x1, not CENTRED) + terms(x2, not CENTRED)
        if TAIL > 0:
            tail_sums += terms(tail, not CENTRED)
    mean = 0.0
    if CENTRED:
        mean = tl.div_rn(row_total(sums, tail_sums, TAIL), HEADS * DIM)
        sums, tail_sums = tl.zeros_like(sums), tl.zeros_like(tail_sums)
        for first in tl.static_range(0, HEADS, TILE):
            x1, x2, tail = tiles[first // TILE]
            mask = live & (first + head < HEADS)
            x1, x2, tail = centred(x1, x2, tail, mean, mask, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF)
            sums += terms(x1, True) + terms(x2, True)
            if TAIL > 0:
                tail_sums += terms(tail, True)
    scale = inverse_rms(row_total(sums, tail_sums, TAIL), eps, HEADS * DIM)
    for first in tl.static_range(0, HEADS, TILE):
        mask = live & (first + head < HEADS) if HEADS % TILE != 0 else live
        if weight is not None:
            w1, w2, w_tail = _load_tile(
                weight + (first + head) * DIM, first + head < HEADS, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF, "evict_last"
            )
        if bias is not None:
            b1, b2, b_tail = _load_tile(
                bias + (first + head) * DIM, first + head < HEADS, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF, "evict_last"
            )
        x1, x2, tail = tiles[first // TILE]
        if CENTRED:
            x1, x2, tail = x1.to(tl.float32) - mean, x2.to(tl.float32) - mean, tail.to(tl.float32) - mean
        _rotate_tile(
            out + first * out_head + out_rows, x1, x2, tail, scale, w1, w2, w_tail, b1, b2, b_tail,
            _tile_cos_sin(angles, table, first + head, OWN_ANGLES, TABLE_ALIGN, INVERSE), mask, DIM, WIDTH, PAIRS,
            PADDED, TAIL, HALF, PRODUCT, ROUNDING,
        )  # fmt: skip


@triton.jit
def _rotate_heads(
    x, x_rows, x_head, out, out_rows, out_head, weight, bias, live, angles, table, eps,
    HEADS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    PADDED: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr, PRODUCT: tl.constexpr, NORM: tl.constexpr,
    CENTRED: tl.constexpr, ROUNDING: tl.constexpr, OWN_ANGLES: tl.constexpr, TABLE_ALIGN: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Norms each head of each token, where NORM says so, and rotates it, TILE heads at a time."""
    head = tl.arange(0, TILE)[None, :, None]
    one = tl.zeros([1, 1, 1], tl.int32)
    w1, w2, w_tail, b1, b2, b_tail = None, None, None, None, None, None
    if weight is not None:
        w1, w2, w_tail = _load_tile(weight + one, one == 0, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF, "evict_last")
    if bias is not None:
        b1, b2, b_tail = _load_tile(bias + one, one == 0, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF, "evict_last")
    for first in range(0, HEADS, TILE):
        mask = live & (first + head < HEADS) if HEADS % TILE != 0 else live
        x1, x2, tail = _load_tile(
            x + first * x_head + x_rows, mask, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF, "evict_first"
        )
        if CENTRED:
            mean = tl.div_rn(head_total(x1, x2, tail, TAIL, False), DIM)
            x1, x2, tail = centred(x1, x2, tail, mean, live, DIM, WIDTH, PAIRS, PADDED, TAIL, HALF)
        scale = inverse_rms(head_total(x1, x2, tail, TAIL, True), eps, DIM) if NORM == "per_head" else None
        _rotate_tile(
            out + first * out_head + out_rows, x1, x2, tail, scale, w1, w2, w_tail, b1, b2, b_tail,
            _tile_cos_sin(angles, table, first + head, OWN_ANGLES, TABLE_ALIGN, INVERSE), mask, DIM, WIDTH, PAIRS,
            PADDED, TAIL, HALF, PRODUCT, ROUNDING,
        )  # fmt: skip


@triton.jit
def _rotate_tensor(
    x, x_batch, x_token, x_head, out, out_batch, out_token, out_head, weight, bias, entry, token, live, angles, table,
    eps, HEADS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    PADDED: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr, ALIGN: tl.constexpr, PRODUCT: tl.constexpr,
    NORM: tl.constexpr, CENTRED: tl.constexpr, ROUNDING: tl.constexpr, OWN_ANGLES: tl.constexpr,
    TABLE_ALIGN: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Norms and rotates every head of one tensor for the tokens of this program, in batch entry ``entry``.

    ``angles`` and ``table`` are as in :func:`_tile_cos_sin`; ``token`` and ``live`` (whether it is written) are
    ``[tokens]``. Strides come in units of ALIGN elements: the multiplication here is what tells the compiler that
    every row starts on ALIGN elements, without specialising on strides. Offsets of rows are 64-bit.
    """
    x_head = x_head.to(tl.int64) * ALIGN
    out_head = out_head.to(tl.int64) * ALIGN
    head = tl.arange(0, TILE)[None, :, None]
    token = token[:, None, None].to(tl.int64)
    live = live[:, None, None]
    x += entry * x_batch * ALIGN
    out += entry * out_batch * ALIGN
    x_rows = token * x_token * ALIGN + head * x_head
    out_rows = token * out_token * ALIGN + head * out_head
    if NORM == "across_heads":
        _rotate_row(
            x, x_rows, x_head, out, out_rows, out_head, weight, bias, live, angles, table, eps, HEADS, TILE, DIM, WIDTH,
            PAIRS, PADDED, TAIL, HALF, PRODUCT, CENTRED, ROUNDING, OWN_ANGLES, TABLE_ALIGN, INVERSE,
        )  # fmt: skip
    else:
        _rotate_heads(
            x, x_rows, x_head, out, out_rows, out_head, weight, bias, live, angles, table, eps, HEADS, TILE, DIM, WIDTH,
            PAIRS, PADDED, TAIL, HALF, PRODUCT, NORM, CENTRED, ROUNDING, OWN_ANGLES, TABLE_ALIGN, INVERSE,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def norm_rotate_kernel(
    q, q_out, q_weight, q_bias, k, k_out, k_weight, k_bias, rows, positions, entries,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64,
    q_out_batch: tl.int64, q_out_token: tl.int64, q_out_head: tl.int64,
    k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    k_out_batch: tl.int64, k_out_token: tl.int64, k_out_head: tl.int64,
    rows_plane: tl.int64, rows_row: tl.int64, head_rows: tl.int64,
    positions_batch: tl.int64, positions_token: tl.int64, positions_axis: tl.int64, entries_batch: tl.int64,
    row_count: tl.int32, entry_count: tl.int32, tokens: tl.int32, prefix: tl.int32, rotated_tokens: tl.int32,
    token_offset: tl.int32, span0: tl.int32, span1: tl.int32, span2: tl.int32,
    first0: tl.int32, first1: tl.int32, first2: tl.int32, first3: tl.int32, eps: tl.float32,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BOUNDS: tl.constexpr, AXES: tl.constexpr, PADDED: tl.constexpr,
    TAIL: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, EXACT: tl.constexpr, SKIP_UNROTATED: tl.constexpr,
    ALIGN: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, ROUNDING: tl.constexpr, OWN_ANGLES: tl.constexpr,
    TABLE_ALIGN: tl.constexpr,
):  # fmt: skip
    """Norms and rotates TOKENS tokens of ``q`` and, unless None, ``k`` ``[B, tokens, heads, DIM]`` into their outs.

    Program p of grid axis 0 has block ``p % blocks`` of batch entry ``p // blocks``, where ``blocks`` is
    ``ceil(tokens / TOKENS)``. With ``entries``, ``entries[p // blocks]`` is the batch entry; it is skipped unless it is
    at least 0 and below ``entry_count``. Axis a has the pairs ``BOUNDS[a] <= p < BOUNDS[a + 1]``. Token ``prefix + j``
    rotates when ``0 <= j < rotated_tokens``; ``span{a}`` is the product of the grid's sizes after axis a. WIDTH
    channels of a head are written; PADDED is the next power of two of its pairs, TAIL that of the channels past them
    where those are loaded apart (else 0). EXACT rounds products to the dtype of the table. SKIP_UNROTATED does not
    write unrotated tokens. NORM is "none", "per_head" or "across_heads", CENTRED whether it is a LayerNorm, ROUNDING
    where it rounds, as NormRounding names it. OWN_ANGLES: each head has rows of its own, ``head_rows`` after those of
    the head before.
    """
    program = tl.program_id(0)
    blocks = (tokens + (TOKENS - 1)) // TOKENS
    batch = (program // blocks).to(tl.int64)
    token = (program % blocks) * TOKENS + tl.arange(0, TOKENS)
    j = token - prefix
    rotates = (j >= 0) & (j < rotated_tokens)
    live = rotates if SKIP_UNROTATED else token < tokens
    entry = batch
    if entries is not None:
        entry = tl.load(entries + batch * entries_batch).to(tl.int64)
        in_batch = (entry >= 0) & (entry < entry_count)
        live = live & in_batch
        rotates = rotates & in_batch
    product: tl.constexpr = rows.dtype.element_ty if EXACT else tl.float32

    table = (rows, rows_plane, rows_row, row_count, head_rows)
    angles = _find_rows(
        table, positions, positions_batch, positions_token, positions_axis, batch, j, rotates, token_offset + j,
        (span0, span1, span2, 1), (first0, first1, first2, first3), BOUNDS, AXES, PADDED, OWN_ANGLES, INVERSE,
    )  # fmt: skip
    _rotate_tensor(
        q, q_batch, q_token, q_head, q_out, q_out_batch, q_out_token, q_out_head, q_weight, q_bias, entry, token, live,
        angles, table, eps, Q_HEADS, TILE, DIM, WIDTH, BOUNDS[AXES], PADDED, TAIL, HALF, ALIGN, product, NORM, CENTRED,
        ROUNDING, OWN_ANGLES, TABLE_ALIGN, INVERSE,
    )  # fmt: skip
    if k is not None:
        _rotate_tensor(
            k, k_batch, k_token, k_head, k_out, k_out_batch, k_out_token, k_out_head, k_weight, k_bias, entry, token,
            live, angles, table, eps, K_HEADS, TILE, DIM, WIDTH, BOUNDS[AXES], PADDED, TAIL, HALF, ALIGN, product, NORM,
            CENTRED, ROUNDING, OWN_ANGLES, TABLE_ALIGN, INVERSE,
        )  # fmt: skip
