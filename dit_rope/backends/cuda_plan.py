"""What a CUDA kernel is compiled for: a struct of constants, and how a token is dealt to the threads of a block."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..spec import MAX_AXES, NormKind
from .gpu_calls import ACCESS_BYTES, power_of_two

WARP = 32
# Chunks that a thread holds: as many 16-byte loads are in flight before its first store.
THREAD_CHUNKS = 4
# More than this many, and their weights, do not fit the registers of a thread.
MAX_HELD = 8
# A block is as small as one token needs, but no smaller than this, and no larger than that.
MIN_THREADS, MAX_THREADS = 128, 512

_TYPE_NAMES = {torch.float32: "float", torch.bfloat16: "dit_rope::BFloat16", torch.float16: "dit_rope::Float16"}
_NORM_NAMES = {None: "kNoNorm", NormKind.PER_HEAD: "kPerHead", NormKind.ACROSS_HEADS: "kAcrossHeads"}


@dataclass(frozen=True)
class Plan:
    """The constants that a kernel is compiled for: the struct ``Plan`` of ``kernels/rope.cu``, field by field.

    Attributes:
        operation: the kernel's name, which profilers show.
        data, table: dtypes of the tensors and of the table.
        weights: dtypes of the norm's weights, one per tensor, or empty.
        heads: of each tensor, one or two.
        head_dim: channels of a head.
        width: channels of a head that are read and written.
        pairs: channel pairs of each axis.
        half, exact: as in :class:`~dit_rope.rotation_args.RotationArgs`.
        norm: what an RMSNorm before the rotation averages over, or None.
        chunk: neighbouring channels that a thread owns.
        access, weight_access: bytes of one memory access to data and to weights.
        lanes, rows, tokens: threads of a block along channels, heads and tokens.
    """

    operation: str
    data: torch.dtype
    table: torch.dtype
    weights: tuple[torch.dtype, ...]
    heads: tuple[int, ...]
    head_dim: int
    width: int
    pairs: tuple[int, ...]
    half: bool
    exact: bool
    norm: NormKind | None
    chunk: int
    access: int
    weight_access: int
    lanes: int
    rows: int
    tokens: int

    @functools.cached_property
    def threads(self) -> int:
        """Threads of a block, whole warps."""
        return -(-self.tokens * self.rows * self.lanes // WARP) * WARP

    def source(self) -> str:
        """CUDA C++ of the kernel, to be compiled with the folder ``kernels/`` on its include path."""
        weights = self.weights or (self.data,) * 2
        types = {
            "Data": self.data,
            "Table": self.table,
            "QueryWeight": weights[0],
            "KeyWeight": weights[-1],
        }
        bounds = [sum(self.pairs[: axis + 1]) for axis in range(MAX_AXES - 1)]
        numbers = {
            "query_heads": self.heads[0],
            "key_heads": self.heads[1] if len(self.heads) == 2 else 0,
            "head_dim": self.head_dim,
            "width": self.width,
            "axes": len(self.pairs),
            "pairs": sum(self.pairs),
            **{f"bound{axis + 1}": bound for axis, bound in enumerate(bounds)},
            "chunk": self.chunk,
            "access": self.access,
            "weight_access": self.weight_access,
            "lanes": self.lanes,
            "rows": self.rows,
            "tokens": self.tokens,
            "threads": self.threads,
        }
        flags = {
            "shift": self.operation == "shift",
            "half": self.half,
            "exact": self.exact,
            "weighted": bool(self.weights),
        }
        lines = [
            '#include "rope.cu"',
            "struct Plan {",
            *(f"  using {name} = {_TYPE_NAMES[dtype]};" for name, dtype in types.items()),
            f"  static constexpr dit_rope::Norm norm = dit_rope::{_NORM_NAMES[self.norm]};",
            *(f"  static constexpr int {name} = {value};" for name, value in numbers.items()),
            *(f"  static constexpr bool {name} = {str(flag).lower()};" for name, flag in flags.items()),
            "};",
            f'extern "C" __global__ void __launch_bounds__(Plan::threads) {self.operation}(',
            "    const __grid_constant__ dit_rope::RotationArgs args) {",
            "  __shared__ dit_rope::Shared<Plan> shared;",
            "  dit_rope::rotate_tokens(args, shared);",
            "}",
            "",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Signature:
    """What of a call a kernel is compiled for, before anything is chosen.

    Attributes:
        data, table, weights, heads, head_dim, pairs, half, exact, norm: as in :class:`Plan`.
        keep_still: what does not turn is neither read nor written.
        some_entries: only some batch entries turn.
        alignment, weight_alignment: bytes that every row of the data and of the weights is aligned to.
    """

    data: torch.dtype
    table: torch.dtype
    weights: tuple[torch.dtype, ...]
    heads: tuple[int, ...]
    head_dim: int
    pairs: tuple[int, ...]
    half: bool
    exact: bool
    norm: NormKind | None
    keep_still: bool
    some_entries: bool
    alignment: int
    weight_alignment: int


@dataclass(frozen=True)
class Threads:
    """How the channels and heads of one token are dealt to threads; ``held`` chunks of all tensors to each."""

    chunk: int
    width: int
    lanes: int
    rows: int
    held: int


@functools.lru_cache(maxsize=4096)
def plan_for(signature: Signature) -> Plan:
    """The plan of every call with this signature: one object for equal ones."""
    threads = deal_threads(signature)
    norm, data, weights = signature.norm, signature.data, signature.weights
    return Plan(
        operation="shift" if signature.some_entries else "rotate" if norm is None else "norm_rotate",
        data=data,
        table=signature.table,
        weights=weights,
        heads=signature.heads,
        head_dim=signature.head_dim,
        width=threads.width,
        pairs=signature.pairs,
        half=signature.half,
        exact=signature.exact,
        norm=norm,
        chunk=threads.chunk,
        access=min(signature.alignment, threads.chunk * data.itemsize),
        weight_access=min(
            signature.weight_alignment, threads.chunk * min(dtype.itemsize for dtype in weights or (data,))
        ),
        lanes=threads.lanes,
        rows=threads.rows,
        tokens=_tokens(threads.rows * threads.lanes),
    )


def deal_threads(signature: Signature) -> Threads:
    """Deals out a token so that each thread holds few chunks, of which it loads all before it stores one."""
    half, norm, pairs = signature.half, signature.norm, sum(signature.pairs)
    chunk = _chunk(signature)
    width = -(-2 * pairs // chunk) * chunk if signature.keep_still else signature.head_dim
    # In half pairing every lane owns two chunks, those of the channels that do not turn too.
    lanes = pairs // chunk + -(-(width - 2 * pairs) // (2 * chunk)) if half else width // chunk
    if norm is NormKind.PER_HEAD:
        lanes = power_of_two(lanes)
    # Heads that a block works on at once: few enough threads that each holds THREAD_CHUNKS chunks.
    limit = max(1, MAX_THREADS // lanes)
    for rows in range(1, limit + 1):
        held = (2 if half else 1) * sum(-(-count // rows) for count in signature.heads)
        whole_warps = norm is not NormKind.ACROSS_HEADS or rows * lanes % WARP == 0
        if whole_warps and held <= THREAD_CHUNKS:
            break
    return Threads(chunk, width, lanes, rows, held)


def _chunk(signature: Signature) -> int:
    """Channels of a chunk: 16 bytes, fewer where they do not divide a head, more where a norm would need two warps.

    Head dims, and pairs of half pairing, are even.
    """
    chunk, half = ACCESS_BYTES // signature.data.itemsize, signature.half
    while signature.head_dim % chunk or (half and sum(signature.pairs) % chunk):
        chunk //= 2
    while signature.norm is NormKind.PER_HEAD and signature.head_dim > WARP * chunk * (2 if half else 1):
        chunk *= 2
    return chunk


def _tokens(token_threads: int) -> int:
    """Tokens of a block: enough for MIN_THREADS threads, in whole warps where those are within MAX_THREADS."""
    least = -(-MIN_THREADS // token_threads)
    whole = math.lcm(token_threads, WARP) // token_threads
    even = -(-least // whole) * whole
    return even if even * token_threads <= MAX_THREADS else least
