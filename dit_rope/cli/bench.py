"""``dit-rope bench``: how fast the rotation is on this machine, against the model's own code."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .options import Device, DType, parse_sizes, pick_device

if TYPE_CHECKING:
    from ..tables import RopeTable

Case = Callable[[], object]


def run(
    grid: Annotated[str, typer.Option(help="Tokens: FRAMESxHEIGHTxWIDTH after patching.")] = "9x26x35",
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option(min=8, help="Channels of a head.")] = 128,
    dtype: Annotated[DType, typer.Option(help="Of queries and keys; tables are float32.")] = DType.bfloat16,
    device: Device = None,
    rounds: Annotated[int, typer.Option(min=3, help="Timed calls of each variant.")] = 20,
) -> None:
    """Time the rotation of queries and keys against Wan's own code, after checking that they agree.

    Variants take turns, so that a machine that slows down favours none. A copy of the same tensors is the floor.
    """
    from .. import Grid, RopeSpec, rope_table

    device = pick_device(device)
    sizes = parse_sizes(grid, "--grid", ("FRAMES", "HEIGHT", "WIDTH"))
    if head_dim % 2:
        raise typer.BadParameter(f"must be even, got {head_dim}", param_hint="--head-dim")
    side = 2 * (head_dim // 6)
    spec = RopeSpec(dims=(head_dim - 2 * side, side, side))
    table = rope_table(spec, Grid(*sizes), device=device, dtype=torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, math.prod(sizes), heads, head_dim)
    q, k = (torch.randn(shape, generator=generator, device=device).to(dtype.torch) for _ in range(2))
    with torch.inference_mode():
        cases = _cases(q, k, table, *_own_table(head_dim, sizes, device))
        _check(cases)
        _print(cases, measure(cases, rounds), f"q and k {list(shape)}, {dtype} on {device}")


def wan_rotate(x: torch.Tensor, freqs_cos: torch.Tensor, freqs_sin: torch.Tensor) -> torch.Tensor:
    """The rotation as ``WanAttnProcessor`` of diffusers 0.42.1 has it, where it is a nested function.

    Args:
        x: ``[B, S, H, D]``.
        freqs_cos, freqs_sin: ``[1, S, 1, D]``, each value twice in a row.
    """
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def measure(cases: dict[str, Case], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, cases taking turns; ``warm_up`` calls of each beforehand are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + warm_up):
        for name, case in cases.items():
            _synchronize()
            start = time.perf_counter()
            case()
            _synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _cases(q: torch.Tensor, k: torch.Tensor, table: RopeTable, cos: torch.Tensor, sin: torch.Tensor) -> dict[str, Case]:
    from .. import rotate_qk

    return {
        "Wan's own code": lambda: (wan_rotate(q, cos, sin), wan_rotate(k, cos, sin)),
        "dit_rope, exact": lambda: rotate_qk(q, k, table, exact=True),
        "dit_rope": lambda: rotate_qk(q, k, table, exact=False),
        "copy": lambda: (q.clone(), k.clone()),
    }


def _check(cases: dict[str, Case]) -> None:
    """Stops the program unless exact mode equals the model's own code bit for bit, and the other is as close as it."""
    own, exact, fast = (case() for case in list(cases.values())[:3])
    for name, expected, equal, close in zip("qk", own, exact, fast, strict=True):  # type: ignore[call-overload]
        if not torch.equal(expected, equal):
            raise SystemExit(f"{name} in exact mode differs from Wan's own code: no figures")
        torch.testing.assert_close(close, expected)


def _own_table(head_dim: int, sizes: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense table that Wan's rope module builds."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    module = WanRotaryPosEmbed(head_dim, (1, 1, 1), max(1024, *sizes)).to(device)
    cos, sin = module(torch.empty(1, 1, *sizes, device=device))
    return cos, sin


def _print(cases: dict[str, Case], seconds: dict[str, list[float]], title: str) -> None:
    table = Table("", "median ms", "p20 ms", "p80 ms", "times as fast", title=title, title_justify="left")
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    quantiles = {
        name: torch.tensor(seconds[name], dtype=torch.float64).quantile(points).mul(1e3).tolist() for name in cases
    }
    own = next(iter(quantiles.values()))[0]
    for name, values in quantiles.items():
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{own / values[0]:.2f}")
    Console().print(table)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
