"""The Triton kernel compiled for NVIDIA GPUs without one: access width, spills, contraction, and what recompiles.

A launch derives what it compiles for from its arguments; the functions here take the same way through Triton, with a
target given instead of found. They need kernels that are not interpreted, so they are skipped where TRITON_INTERPRET
is set (see ``test_triton_kernels.py``).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_rope.rotation.backends.triton_kernels import launch_arguments
from dit_rope.rotation_args import Norm, RotationArgs
from dit_rope.spec import NormKind, Pairing
from gpu_call_cases import COGVIDEOX, LAYOUTS, LTX, MOCHI, OWN_ANGLES, WAN, meta

triton = pytest.importorskip("triton", exc_type=ImportError)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from dit_rope.rotation.backends.triton_device import norm_rotate_kernel  # noqa: E402

HALF = replace(WAN, pairing=Pairing.HALF)


@dataclass(frozen=True)
class Specialised:
    """What one launch makes Triton compile: the key it caches by is ``types`` and ``options``."""

    types: list[Any]
    bound: dict[str, Any]
    options: dict[str, Any]
    backend: Any
    target: Any


def specialise(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    norm: Norm | None = None,
    arch: int = 90,
) -> Specialised:
    _, arguments, options = launch_arguments(xs, args, outs, norm)
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(norm_rotate_kernel.signature, norm_rotate_kernel.params, backend)
    bound, types, _ = binder(**arguments, **options)
    return Specialised(types, bound, options, backend, target)


def compiled(launch: Specialised) -> Any:
    options, signature, constants, attributes = norm_rotate_kernel._pack_args(
        launch.backend, dict(launch.options), launch.bound, launch.types, {}
    )
    source = ASTSource(norm_rotate_kernel, signature, constants, attributes)
    return triton.compile(source, target=launch.target, options=options.__dict__)


def queries_and_keys(heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.zeros(1, 60, heads, dim, dtype=dtype) for _ in "qk"]


def ones(size: int) -> list[torch.Tensor]:
    return [torch.ones(size, dtype=torch.bfloat16) for _ in "qk"]


def layer_norm(kind: NormKind, size: int) -> Norm:
    return Norm(kind, 1e-6, ones(size), ones(size))


KERNELS = {
    "rotate-wan-1.3b": (12, 128, torch.bfloat16, WAN, None),
    "rotate-wan-14b-in-place": (40, 128, torch.bfloat16, WAN, None),
    "rotate-exact": (12, 128, torch.bfloat16, replace(WAN, exact=True), None),
    "rotate-float32": (12, 128, torch.float32, WAN, None),
    "rotate-half-float16": (24, 128, torch.float16, HALF, None),
    "rotate-partial-half": (12, 128, torch.bfloat16, replace(HALF, pairs=(16, 16, 16)), None),
    "rotate-dim-112": (12, 112, torch.bfloat16, replace(WAN, pairs=(16, 20, 20)), None),
    "rotate-positions": (12, 128, torch.bfloat16, replace(WAN, positions=torch.zeros(1, 60, 3).int()), None),
    "rotate-exact-table-of-bfloat16": (
        12,
        128,
        torch.bfloat16,
        replace(WAN, rows=WAN.rows.bfloat16(), exact=True),
        None,
    ),
    "shift-in-place": (
        12,
        128,
        torch.bfloat16,
        replace(WAN, positions=torch.zeros(1, 1, 3).int(), entries=torch.zeros(1).int()),
        None,
    ),
    "norm-per-head": (24, 128, torch.bfloat16, WAN, Norm(NormKind.PER_HEAD, 1e-6, ones(128))),
    "norm-per-head-half": (24, 128, torch.bfloat16, HALF, Norm(NormKind.PER_HEAD, 1e-6, ones(128))),
    "norm-across-12-heads": (12, 128, torch.bfloat16, WAN, Norm(NormKind.ACROSS_HEADS, 1e-6, ones(1536))),
    "norm-across-40-heads": (40, 128, torch.bfloat16, WAN, Norm(NormKind.ACROSS_HEADS, 1e-6, ones(5120))),
    "norm-across-40-heads-half": (40, 128, torch.bfloat16, HALF, Norm(NormKind.ACROSS_HEADS, 1e-6, ones(5120))),
    "norm-across-64-heads": (64, 128, torch.bfloat16, WAN, Norm(NormKind.ACROSS_HEADS, 1e-6, ones(8192))),
    "rotate-own-angles": (24, 128, torch.bfloat16, MOCHI, None),
    "rotate-own-angles-half": (32, 64, torch.bfloat16, replace(LTX, pairing=Pairing.HALF), None),
    "rotate-own-angles-of-axes": (24, 128, torch.bfloat16, replace(WAN, head_rows=12), None),
    "norm-mochi": (24, 128, torch.bfloat16, MOCHI, Norm(NormKind.PER_HEAD, 1e-6, ones(128))),
    "norm-ltx": (32, 64, torch.bfloat16, LTX, Norm(NormKind.ACROSS_HEADS, 1e-6, ones(2048))),
    "norm-ltx2-half": (
        32,
        64,
        torch.bfloat16,
        replace(LTX, pairing=Pairing.HALF),
        Norm(NormKind.ACROSS_HEADS, 1e-6, ones(2048)),
    ),
    "layer-norm-cogvideox-2b": (30, 64, torch.bfloat16, COGVIDEOX, layer_norm(NormKind.LAYER_PER_HEAD, 64)),
    "layer-norm-cogvideox-5b": (48, 64, torch.bfloat16, COGVIDEOX, layer_norm(NormKind.LAYER_PER_HEAD, 64)),
    "layer-norm-half": (
        48,
        64,
        torch.bfloat16,
        replace(COGVIDEOX, pairing=Pairing.HALF),
        layer_norm(NormKind.LAYER_PER_HEAD, 64),
    ),
    "layer-norm-across-48-heads": (
        48,
        64,
        torch.bfloat16,
        COGVIDEOX,
        layer_norm(NormKind.LAYER_ACROSS_HEADS, 48 * 64),
    ),
}


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles here and now, and leaves nothing in the user's Triton cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes of a compiled kernel, read from its binary by the tool Triton ships."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", str(binary)], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_moves_16_bytes_at_once_and_spills_nothing(name: str, arch: int, tmp_path: Path) -> None:
    heads, dim, dtype, args, norm = KERNELS[name]
    xs = queries_and_keys(heads, dim, dtype)
    kernel = compiled(specialise(xs, args, xs if "in-place" in name else [x.clone() for x in xs], norm, arch))

    used = resources(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= 160

    # Only loads of q and k are evicted first, and nothing else is stored.
    ptx = kernel.asm["ptx"]
    loads = re.findall(r"ld\.global\S*evict_first\S*", ptx)
    stores = re.findall(r"st\.global\S*", ptx)
    assert loads
    assert len(loads) == len(stores)
    assert all(access.endswith(".v4.b32") for access in loads + stores), set(loads + stores)


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("name", ["interleaved", "half", "norm-mochi", "norm-ltx2-half", "layer-norm-cogvideox-2b"])
def test_kernel_stores_each_pair_from_the_thread_that_loaded_it(name: str) -> None:
    """In place, a conversion of layouts between load and store would let one thread overwrite what another reads."""
    plain = {"interleaved": WAN, "half": HALF}
    heads, dim, dtype, args, norm = (12, 128, torch.bfloat16, plain[name], None) if name in plain else KERNELS[name]
    xs = queries_and_keys(heads, dim, dtype)
    without_weights = None if norm is None else Norm(norm.kind, norm.eps)
    text = compiled(specialise(xs, args, xs, without_weights)).asm["ttgir"]
    accesses = re.findall(r"tt\.(?:load|store) [^\n]*x!tt\.ptr<bf16>, (#\w+)>", text)
    assert len(accesses) >= 4
    assert len(set(accesses)) == 1
    assert not re.search(r"convert_layout [^\n]*bf16", text)


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_kernel_fuses_multiply_add_unless_exact(exact: bool) -> None:
    xs = queries_and_keys(12, 128, torch.bfloat16)
    kernel = compiled(specialise(xs, replace(WAN, exact=exact), [x.clone() for x in xs]))
    assert ("FFMA" in kernel.asm["sass"]) is not exact


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_kernel_rounds_products_to_the_dtype_of_the_table_only_where_exact(exact: bool) -> None:
    """Roundings beyond those of the stored numbers, 8 to a store; no pass over the code may fold them away."""
    xs = queries_and_keys(12, 128, torch.bfloat16)
    args = replace(WAN, rows=WAN.rows.bfloat16(), exact=exact)
    ptx = compiled(specialise(xs, args, [x.clone() for x in xs])).asm["ptx"]
    stored = 8 * len(re.findall(r"st\.global", ptx))
    assert (len(re.findall(r"(?:mul|cvt)\.rn\.bf16", ptx)) > stored) is exact
    assert ("fma" in ptx) is not exact


@pytest.mark.usefixtures("_own_cache")
def test_kernel_rounds_to_nearest() -> None:
    xs = queries_and_keys(12, 128, torch.bfloat16)
    ptx = compiled(specialise(xs, WAN, [x.clone() for x in xs])).asm["ptx"]
    to_bfloat16 = set(re.findall(r"cvt\.\S*bf16(?:x2)?\.f32", ptx))
    assert to_bfloat16
    assert to_bfloat16 <= {"cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32"}


@pytest.mark.parametrize(("x", "changes"), LAYOUTS.values(), ids=LAYOUTS)
def test_launch_compiles_nothing_for_a_new_length_position_or_layout(x: torch.Tensor, changes: dict[str, Any]) -> None:
    base = specialise([meta(1, 60)] * 2, WAN, [meta(1, 60)] * 2)
    launch = specialise([x] * 2, replace(WAN, **changes), [x] * 2)
    assert launch.types == base.types
    assert launch.options == base.options


@pytest.mark.parametrize("changes", OWN_ANGLES.values(), ids=OWN_ANGLES)
def test_launch_compiles_nothing_for_other_rows_of_its_heads(changes: dict[str, Any]) -> None:
    x = meta(3, 60, heads=24)
    base = replace(MOCHI, positions=None if changes.get("positions") is None else torch.zeros(1, 60, 1).int())
    launch = specialise([x] * 2, replace(base, **changes), [x] * 2)
    assert launch.types == specialise([x] * 2, base, [x] * 2).types


def test_launch_compiles_nothing_for_other_entries_or_shared_positions() -> None:
    """The entries may be a view, of any length, and positions of one token or of all."""
    entries, positions = torch.zeros(8, dtype=torch.int32), torch.zeros(1, 1, 3, dtype=torch.int32)
    base = replace(WAN, entries=entries, positions=positions)
    pairs = torch.zeros(16, 2, dtype=torch.int32)[:, 0]
    launches = [
        specialise([meta(batch, 60)], args, [meta(batch, 60)])
        for batch, args in (
            (9, base),
            (1, base),
            (9, replace(base, entries=pairs)),
            (9, replace(base, entries=entries[:1])),
            (9, replace(base, positions=torch.zeros(8, 60, 3, dtype=torch.int32))),
        )
    ]
    assert all(launch.types == launches[0].types for launch in launches)


def test_launch_has_programs_for_the_entries_alone() -> None:
    args = replace(WAN, entries=torch.zeros(3, dtype=torch.int32))
    whole, arguments, _ = launch_arguments([meta(3, 60)], WAN, [meta(3, 60)], None)
    some, others, _ = launch_arguments([meta(99, 60)], args, [meta(99, 60)], None)
    assert whole == some
    assert (arguments["entry_count"], others["entry_count"]) == (3, 99)


def test_positions_are_taken_of_a_shard_past_what_the_kernel_counts_in() -> None:
    positions = torch.zeros(1, 60, len(WAN.pairs), dtype=torch.int32)
    args = replace(WAN, positions=positions, token_offset=2**35)
    _, arguments, _ = launch_arguments([meta(1, 60)], args, [meta(1, 60)], None)
    assert arguments["token_offset"] == 0


def test_launch_uses_one_dimension_of_the_grid_past_65535_blocks() -> None:
    programs, arguments, _ = launch_arguments([meta(4, 2**20)], WAN, [meta(4, 2**20)], None)
    assert programs == 4 * 2**20 // arguments["TOKENS"] > 65_535


def test_launch_types_of_strides_are_64_bit_and_of_nothing_else() -> None:
    types = dict(zip(norm_rotate_kernel.arg_names, specialise([meta(1, 60)], WAN, [meta(1, 60)]).types, strict=True))
    strides = {name for name in types if name.endswith(("_batch", "_token", "_head", "_axis", "_plane", "_row"))}
    assert {name for name, (kind, *_) in types.items() if kind == "i64"} == strides | {"head_rows"}
