"""The constants that a CUDA kernel is compiled for, and the distribution of a token over the threads of a block."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from ...rotation_args import NormRounding
from ...spec import MAX_AXES, NormKind
from .cuda_tuning import DEFAULT, LOADS, STORES, Tuned, Tuning
from .gpu_calls import ACCESS_BYTES, power_of_two

WARP = 32
# More chunks, and their weights, do not fit the registers of a thread.
MAX_HELD = 8
# A block is no larger than this.
MAX_THREADS = 512
# A stage begins at a multiple of this many bytes.
STAGE_ALIGNMENT = 128

_PACKAGE = Path(__file__).resolve().parents[2]
_TYPE_NAMES = {torch.float32: "float", torch.bfloat16: "dit_rope::BFloat16", torch.float16: "dit_rope::Float16"}


def kernel_sources() -> Path:
    """The folder with the CUDA headers and sources: ``kernels/`` of the repository, as this installation carries it.

    A wheel installs it as ``dit_rope/_kernels``; in a checkout, and in an editable install of one, it stands beside
    the package. ``importlib.resources`` does not find the second, which is why the two places are looked up by path.

    Raises:
        FileNotFoundError: when neither place has it, naming both.
    """
    candidates = (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels")
    for folder in candidates:
        if (folder / "rope.cu").is_file():
            return folder
    raise FileNotFoundError(f"rope.cu must be in {candidates[0]} or {candidates[1]}; reinstall dit_rope")


@dataclass(frozen=True)
class Traits:
    """The part of a call that its kernel is compiled for, whatever is chosen.

    Attributes:
        data, table: dtypes of the tensors and of the table.
        weights, biases: dtypes of the norm's weights and biases, one per tensor, or empty.
        heads: of each tensor, one or two.
        head_dim: channels of a head.
        pairs: channel pairs of each axis.
        half, exact: as in :class:`~dit_rope.rotation_args.RotationArgs`.
        norm: the norm before the rotation, or None.
        rounding: where the norm rounds.
        own_angles: every head has its own cos and sin.
    """

    data: torch.dtype
    table: torch.dtype
    weights: tuple[torch.dtype, ...]
    biases: tuple[torch.dtype, ...]
    heads: tuple[int, ...]
    head_dim: int
    pairs: tuple[int, ...]
    half: bool
    exact: bool
    norm: NormKind | None
    rounding: NormRounding
    own_angles: bool


@dataclass(frozen=True)
class Signature(Traits):
    """All of a call that the choice of a plan depends on. Calls of several signatures may share a plan, and a kernel.

    Attributes:
        skip_unrotated: unrotated tokens and channels are neither read nor written.
        some_entries: only some batch entries rotate.
        alignment, weight_alignment, table_alignment: bytes that every row of the data, of weights and biases, and of
            the table is aligned to; of the table where every head has its own cos and sin, else 16.
    """

    skip_unrotated: bool
    some_entries: bool
    alignment: int
    weight_alignment: int
    table_alignment: int


@dataclass(frozen=True)
class Plan(Traits):
    """The constants that a kernel is compiled for: the struct ``Plan`` of ``kernels/rope.cu``, field by field.

    Attributes:
        operation: the kernel's name, which profilers show.
        width: channels of a head that are read and written.
        chunk: neighbouring channels that one thread handles.
        access, weight_access: bytes of one memory access to data, and to weights and biases.
        table_access: of one access to the table where every head has its own cos and sin, else of one number.
        lanes, rows, tokens: threads of a block along channels, heads and tokens.
        min_blocks, late_weights, split, loads, stores, stages: as in
            :class:`~dit_rope.rotation.backends.cuda_tuning.Tuning`.
    """

    operation: str
    width: int
    chunk: int
    access: int
    weight_access: int
    table_access: int
    lanes: int
    rows: int
    tokens: int
    min_blocks: int
    late_weights: bool
    split: bool
    loads: str
    stores: str
    stages: int

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Computed once: every launch looks up its plan, and hashing so many fields takes half a microsecond."""
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @functools.cached_property
    def threads(self) -> int:
        """Threads of a block, whole warps."""
        return -(-self.tokens * self.rows * self.lanes // WARP) * WARP

    @functools.cached_property
    def stage_bytes(self) -> int:
        """Dynamic shared memory of a block: ``Plan::stages`` times ``struct Stage`` of ``kernels/rope.cuh``."""
        sides = [heads * self.head_dim * self.data.itemsize for heads in self.heads]
        aligned = [-(-side // STAGE_ALIGNMENT) * STAGE_ALIGNMENT for side in sides]
        return self.stages * (sum(aligned) + (STAGE_ALIGNMENT if len(sides) == 1 else 0))

    def source(self) -> str:
        """CUDA C++ of the kernel, to be compiled with the folder ``kernels/`` on its include path."""
        bounds = f"Plan::threads, {self.min_blocks}" if self.min_blocks else "Plan::threads"
        lines = [
            "#include <rope.cu>",  # in quotes, it would be looked for where the process runs first
            "struct Plan {",
            *(f"  using {name} = {_TYPE_NAMES[dtype]};" for name, dtype in self._types().items()),
            *(f"  static constexpr {kind} {name} = {value};" for kind, name, value in self._constants()),
            "};",
            f'extern "C" __global__ void __launch_bounds__({bounds}) {self.operation}(',
            "    const __grid_constant__ dit_rope::RotationArgs args) {",
            f"  __shared__ dit_rope::{'Stream' if self.stages else ''}Shared<Plan> shared;",
            "  dit_rope::rotate_tokens(args, shared);",
            "}",
            "",
        ]
        return "\n".join(lines)

    def _types(self) -> dict[str, torch.dtype]:
        """The types of the struct; those of missing weights or biases are placeholders, which no code reads."""
        placeholder = self.weights or self.biases or (self.data,)
        weights, biases = self.weights or placeholder, self.biases or placeholder
        return {
            "Data": self.data,
            "Table": self.table,
            "QueryWeight": weights[0],
            "KeyWeight": weights[-1],
            "QueryBias": biases[0],
            "KeyBias": biases[-1],
        }

    def _constants(self) -> Iterator[tuple[str, str, object]]:
        """Type, name and value of every constant of the struct."""
        norm = "kNoNorm" if self.norm is None else "kAcrossHeads" if self.norm.across_heads else "kPerHead"
        yield "dit_rope::Norm", "norm", f"dit_rope::{norm}"
        for kind, name, choices in (("Load", "loads", LOADS), ("Store", "stores", STORES)):
            yield f"dit_rope::{kind}Policy", name, f"dit_rope::{kind}Policy({choices.index(getattr(self, name))})"
        same = ("head_dim", "width", "chunk", "access", "weight_access", "table_access", "lanes", "rows", "tokens")
        bounds = [sum(self.pairs[: axis + 1]) for axis in range(MAX_AXES - 1)]
        numbers = {
            "query_heads": self.heads[0],
            "key_heads": self.heads[1] if len(self.heads) == 2 else 0,
            "axes": len(self.pairs),
            "pairs": sum(self.pairs),
            **{f"bound{axis + 1}": bound for axis, bound in enumerate(bounds)},
            **{name: getattr(self, name) for name in (*same, "threads", "stages")},
        }
        flags = {
            "shift": self.operation == "shift",
            "weighted": bool(self.weights),
            "biased": bool(self.biases),
            "centred": self.norm is not None and self.norm.centred,
            "rounds": self.rounding is not NormRounding.NONE,
            "rounds_steps": self.rounding is NormRounding.EVERY_STEP,
            **{name: getattr(self, name) for name in ("half", "exact", "own_angles", "late_weights", "split")},
        }
        yield from (("int", name, value) for name, value in numbers.items())
        yield from (("bool", name, str(value).lower()) for name, value in flags.items())


@dataclass(frozen=True)
class Threads:
    """The distribution of one token's channels and heads over threads; each holds ``held`` chunks of all tensors."""

    chunk: int
    width: int
    lanes: int
    rows: int
    held: int


@functools.lru_cache(maxsize=4096)
def plan_for(signature: Signature, tuning: Tuning = DEFAULT) -> Plan:
    """The plan of every call with this signature, one object for equal ones. It ignores the choices it cannot use."""
    tuning = _usable(tuning, signature)
    threads = distribute(signature, tuning)
    norm, data = signature.norm, signature.data
    parameters = signature.weights + signature.biases or (data,)
    return Plan(
        **{field.name: getattr(signature, field.name) for field in fields(Traits)},
        operation="shift" if signature.some_entries else "rotate" if norm is None else "norm_rotate",
        width=threads.width,
        chunk=threads.chunk,
        access=min(signature.alignment, threads.chunk * data.itemsize),
        weight_access=min(signature.weight_alignment, threads.chunk * min(dtype.itemsize for dtype in parameters)),
        table_access=_table_access(signature, threads.chunk if signature.half else threads.chunk // 2),
        lanes=threads.lanes,
        rows=threads.rows,
        tokens=1 if tuning.stages else _tokens(threads.rows * threads.lanes, tuning, _most_threads(signature)),
        min_blocks=tuning.min_blocks,
        late_weights=tuning.late_weights,
        split=tuning.split,
        loads=tuning.loads,
        stores=tuning.stores,
        stages=tuning.stages,
    )


def tuned_shape(signature: Signature, device: str) -> Tuned:
    """The key of the measured choices for this signature, on a device of that name."""
    if signature.norm is not None:
        operation = "norm across heads" if signature.norm.across_heads else "norm per head"
    else:
        operation = "rotate in place" if signature.skip_unrotated else "rotate"
    return Tuned(device, operation, signature.heads, signature.head_dim, signature.data.itemsize)


def _usable(tuning: Tuning, signature: Signature) -> Tuning:
    """``tuning`` without the choices that such a call cannot use."""
    across = signature.norm is not None and signature.norm.across_heads
    split = tuning.split and len(signature.heads) == 2 and len(set(signature.heads)) == 1
    split = split and len(set(signature.weights)) < 2 and len(set(signature.biases)) < 2
    streams = across and not (signature.own_angles or signature.some_entries or split)
    streams = streams and signature.alignment == ACCESS_BYTES == _chunk(signature) * signature.data.itemsize
    return replace(
        tuning,
        late_weights=tuning.late_weights and across and bool(signature.weights),
        split=split,
        stages=tuning.stages if streams else 0,
    )


def distribute(signature: Signature, tuning: Tuning = DEFAULT) -> Threads:
    """Distributes a token so that each thread holds few chunks: it loads all of them before it stores one."""
    half, norm, pairs = signature.half, signature.norm, sum(signature.pairs)
    heads = signature.heads[:1] if tuning.split else signature.heads
    chunk = _chunk(signature)
    width = -(-2 * pairs // chunk) * chunk if signature.skip_unrotated else signature.head_dim
    # In half pairing every lane has two chunks, of unrotated channels too.
    lanes = pairs // chunk + -(-(width - 2 * pairs) // (2 * chunk)) if half else width // chunk
    if norm is not None and not norm.across_heads:
        lanes = power_of_two(lanes)
    # Threads along heads: the fewest with which none holds more chunks than wanted.
    limit = max(1, MAX_THREADS // lanes)
    for rows in range(1, limit + 1):
        held = (2 if half else 1) * sum(-(-count // rows) for count in heads)
        whole_warps = norm is None or not norm.across_heads or rows * lanes % WARP == 0
        if whole_warps and held <= tuning.thread_chunks:
            break
    return Threads(chunk, width, lanes, rows, held)


def _chunk(signature: Signature) -> int:
    """Channels of a chunk: 16 bytes, fewer where they do not divide a head, more where a norm would need two warps.

    Head dims, and pairs of half pairing, are even.
    """
    chunk, half, norm = ACCESS_BYTES // signature.data.itemsize, signature.half, signature.norm
    while signature.head_dim % chunk or (half and sum(signature.pairs) % chunk):
        chunk //= 2
    in_one_warp = norm is not None and not norm.across_heads
    while in_one_warp and signature.head_dim > WARP * chunk * (2 if half else 1):
        chunk *= 2
    return chunk


def _table_access(signature: Signature, pairs: int) -> int:
    """Bytes of one access to the table by a lane of ``pairs`` pairs, all of one axis."""
    size = signature.table.itemsize
    if not signature.own_angles:
        return size
    bounds = itertools.accumulate(signature.pairs)
    return min(math.gcd(signature.table_alignment, size * math.gcd(pairs, *bounds)), ACCESS_BYTES)


def _most_threads(signature: Signature) -> int:
    """Most threads of a block of several tokens: few where each takes many registers, so that several fit an SM.

    A LayerNorm keeps weights and biases, and the cos and sin of each head take as many registers as its channels.
    """
    heavy = signature.own_angles or (signature.norm is not None and signature.norm.centred)
    return MAX_THREADS // 2 if heavy else MAX_THREADS


def _tokens(token_threads: int, tuning: Tuning, most: int) -> int:
    """Tokens of a block: enough for ``tuning.min_threads``, in whole warps where those are within ``most``."""
    least = -(-tuning.min_threads // token_threads)
    whole = math.lcm(token_threads, WARP) // token_threads
    even = -(-least // whole) * whole
    return even if even * token_threads <= most else least
