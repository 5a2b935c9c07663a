"""Checks how a GPU backend behaves besides its results: streams, graphs, memory, devices; one check by its name.

    python -m gpu_checks.behaviours --backend cuda graph-replay one-kernel        (in the folder scripts/)

Prints ``passed NAME: what was checked`` or ``failed NAME: what was expected and what came`` for each, all of them
without a name. The exit code is 1 where one failed. One that leaves the GPU unusable is the last of its process.
"""

from __future__ import annotations

import argparse
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

import dit_rope
from benchmarks.reference import Expectation
from dit_rope import Grid, NormKind, Pairing, RopeSpec, RopeTable

from .profiling import device_work

DIMS = (44, 42, 42)
SMALL = Grid(3, 5, 7)


@dataclass(frozen=True)
class Setting:
    """Where a check runs; on CPU it is a rehearsal at tiny sizes."""

    backend: str
    device: str

    @property
    def real(self) -> bool:
        """Whether there is a GPU."""
        return self.device != "cpu"

    def table(self, grid: Grid, pairing: Pairing = Pairing.INTERLEAVED) -> RopeTable:
        """The table of ``grid`` with Wan's channels."""
        return dit_rope.rope_table(RopeSpec(DIMS, pairing=pairing), grid, device=self.device)

    def noise(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Random data."""
        return torch.empty(shape, device=self.device, dtype=dtype).normal_()

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.real:
            torch.cuda.synchronize()


def expect(holds: bool, expected: str, actual: object) -> None:
    """Raises AssertionError unless ``holds``, with the expected and the actual value."""
    if not holds:
        raise AssertionError(f"expected {expected}, got {actual}")


def small_shapes(setting: Setting) -> str:
    """Both pairings, text around the grid, unequal heads, odd sizes, in place and not, every norm."""
    calls = 0
    for pairing in Pairing:
        table = setting.table(SMALL, pairing)
        q, k = (setting.noise(2, SMALL.tokens + 5, heads, 136) for heads in (3, 1))
        rotated = dit_rope.rotate_qk(q, k, table, prefix=3, suffix=2, backend=setting.backend)
        for out, x in zip(rotated, (q, k), strict=True):
            Expectation(table, 3).assert_right(out, x, context=pairing.value)
        copies = q.clone(), k.clone()
        dit_rope.rotate_qk(*copies, table, prefix=3, suffix=2, inplace=True, backend=setting.backend)
        expect(all(map(torch.equal, copies, rotated)), "in place the bits of out of place", "others")
        for norm in NormKind:
            weights = [setting.noise(x.shape[3] * (x.shape[2] if norm.across_heads else 1)) for x in (q, k)]
            options = {"prefix": 3, "suffix": 2, "norm": norm, "backend": setting.backend}
            normed = dit_rope.norm_rotate_qk(q, k, table, *weights, **options)
            for index, (out, x) in enumerate(zip(normed, (q, k), strict=True)):
                Expectation(table, 3, norm, weights).assert_right(out, x, index, f"{pairing.value}, {norm.value}")
            calls += 1
        calls += 2
    setting.synchronize()
    return f"{calls} calls"


def past_2_31_elements(setting: Setting) -> str:
    """One tensor of more than 2^31 elements, rotated, then normed and rotated in place; its last tokens are right."""
    grid = Grid(71, 100, 100) if setting.real else Grid(2, 3, 3)
    heads = 24 if setting.real else 2
    table = setting.table(grid)
    x = setting.noise(1, grid.tokens, heads, sum(DIMS))
    expect(not setting.real or x.numel() > 2**31, "more than 2^31 elements", x.numel())
    out = dit_rope.rotate(x, table, backend=setting.backend)
    Expectation(table).assert_right(out, x)
    del out
    norm, weight = NormKind.ACROSS_HEADS, setting.noise(heads * sum(DIMS))
    expectation = Expectation(table, 0, norm, (weight,))
    out = dit_rope.norm_rotate(x, table, weight, norm=norm, backend=setting.backend)
    expectation.assert_right(out, x)
    dit_rope.norm_rotate(x, table, weight, norm=norm, inplace=True, backend=setting.backend)
    expect(torch.equal(x[:, -100:], out[:, -100:]), "in place the bits of out of place in the last tokens", "others")
    return f"{x.numel():,} elements"


def long_sequence_and_batch(setting: Setting) -> str:
    """More than 65,535 tokens, and as many batch entries, which are limits of a launch grid's second dimension."""
    long = Grid(8, 100, 100) if setting.real else Grid(2, 3, 3)
    table = setting.table(long)
    x = setting.noise(1, long.tokens, 2, sum(DIMS))
    Expectation(table).assert_right(dit_rope.rotate(x, table, backend=setting.backend), x, context="long sequence")
    table = setting.table(Grid(1, 1, 3))
    x = setting.noise(66_000 if setting.real else 3, 3, 1, sum(DIMS))
    Expectation(table).assert_right(dit_rope.rotate(x, table, backend=setting.backend), x, context="large batch")
    return f"{long.tokens:,} tokens, {x.shape[0]:,} batch entries"


def graph_replay(setting: Setting) -> str:
    """A captured rotation gives new results for new data, by the same kernels."""
    table = setting.table(SMALL)
    q, k = (setting.noise(1, SMALL.tokens, 4, sum(DIMS)) for _ in range(2))

    def call() -> list[torch.Tensor]:
        rotated = dit_rope.rotate_qk(q, k, table, backend=setting.backend)
        return [*rotated, *dit_rope.norm_rotate_qk(q, k, table, backend=setting.backend)]

    replay, outs = _captured(call) if setting.real else (lambda: None, call())
    for number in range(3):
        if setting.real:
            q.normal_()
            k.normal_()
        replay()
        same = all(map(torch.equal, outs, call()))
        expect(same, f"replay {number} to give the bits of a call", "others")
    return "3 replays of 2 calls"


def _captured(call: Callable[[], list[torch.Tensor]]) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A CUDA graph of ``call``, and its outputs."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call()
    return graph.replay, outs


def torch_compile(setting: Setting) -> str:
    """Functions with a rotation, and with a norm and a rotation, compile as one graph and give the same as before."""
    table = setting.table(SMALL)
    q, k = (setting.noise(1, SMALL.tokens, 4, sum(DIMS)) for _ in range(2))
    weights = [setting.noise(sum(DIMS)) for _ in range(2)]

    def rotated(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotated_q, rotated_k = dit_rope.rotate_qk(q * 2, k, table, backend=setting.backend)
        return rotated_q + 1, rotated_k

    def normed(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotated_q, rotated_k = dit_rope.norm_rotate_qk(q * 2, k, table, *weights, backend=setting.backend)
        return rotated_q + 1, rotated_k

    for call in (rotated, normed):
        compiled = torch.compile(call, fullgraph=True, backend="inductor" if setting.real else "aot_eager")
        for out, expected in zip(compiled(q, k), call(q, k), strict=True):
            torch.testing.assert_close(out, expected)
    return "fullgraph, without and with a norm"


def two_streams(setting: Setting) -> str:
    """Work goes to the current stream: behind what was queued there, and beside what another stream does."""
    if not setting.real:
        return "rehearsed"
    table = setting.table(SMALL)
    sources = [setting.noise(1, SMALL.tokens, 4, sum(DIMS)) for _ in range(2)]
    expected = [dit_rope.rotate(x, table, backend=setting.backend) for x in sources]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [torch.zeros_like(x) for x in sources]
    outs: list[torch.Tensor] = [torch.empty(0)] * 2
    torch.cuda.synchronize()
    for index, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            inputs[index].copy_(sources[index])  # a launch on any other stream reads the zeros
            outs[index] = dit_rope.rotate(inputs[index], table, backend=setting.backend)
    torch.cuda.synchronize()
    for index in range(2):
        expect(torch.equal(outs[index], expected[index]), f"stream {index} to wait for its own input", "another result")
    return "2 streams"


def two_threads(setting: Setting) -> str:
    """Two threads that start together, so that both compile; then 200 calls each, with different data and shapes."""
    table = setting.table(SMALL)
    sources = [setting.noise(1, SMALL.tokens, heads, sum(DIMS)) for heads in (2, 3)]
    barrier = threading.Barrier(2)
    problems: list[str] = []

    def work(x: torch.Tensor) -> None:
        try:
            barrier.wait()
            stream = torch.cuda.Stream() if setting.real else None
            with torch.cuda.stream(stream):
                outs = [dit_rope.rotate(x, table, backend=setting.backend) for _ in range(200 if setting.real else 3)]
                setting.synchronize()
            Expectation(table).assert_right(outs[0], x)
            expect(all(torch.equal(out, outs[0]) for out in outs), "200 equal results", "different ones")
        except Exception as error:
            problems.append(f"{x.shape[2]} heads: {type(error).__name__}: {error}")

    setting.synchronize()
    threads = [threading.Thread(target=work, args=(x,)) for x in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect(not problems, "both threads to succeed", "; ".join(problems))
    return "2 threads"


def one_kernel(setting: Setting) -> str:
    """Every call is one kernel, with no copy or fill beside it."""
    table = setting.table(SMALL)
    q, k = (setting.noise(1, SMALL.tokens, 4, sum(DIMS)) for _ in range(2))
    positions, backend = table.positions(), setting.backend
    calls: dict[str, Callable[[], object]] = {
        "rotate": lambda: dit_rope.rotate_qk(q, k, table, backend=backend),
        "in place": lambda: dit_rope.rotate_qk(q, k, table, inplace=True, backend=backend),
        "by positions": lambda: dit_rope.rotate_qk(q, k, table, positions=positions, backend=backend),
        "exact": lambda: dit_rope.rotate_qk(q, k, table, exact=True, backend=backend),
        **{
            norm.value: lambda norm=norm: dit_rope.norm_rotate_qk(q, k, table, norm=norm, backend=backend)
            for norm in NormKind
        },
    }
    for name, call in calls.items():
        call()
        work = device_work(call, setting.device)
        expect(not setting.real or len(work) == 1, f"one kernel for {name} and nothing else", work)
    return ", ".join(calls)


def wan_without_copies(setting: Setting) -> str:
    """A patched Wan copies nothing from the host in its second step; exactly patched, it gives the unpatched bits."""
    from zoo import wan

    dtype = torch.bfloat16 if setting.real else torch.float32
    model = wan.build("wan", dtype).to(setting.device)
    latent = setting.noise(1, 4, 3, 8, 12, dtype=dtype)
    text = setting.noise(1, 12, 16, dtype=dtype)
    timestep = torch.tensor([500], device=setting.device)

    def step() -> torch.Tensor:
        return model(latent, timestep, text, return_dict=False)[0]

    with torch.inference_mode():
        expected = step()
        with dit_rope.patch(model, backend=setting.backend, exact=True):
            actual = step()
        others = int((actual != expected).sum())
        expect(torch.equal(actual, expected), "the unpatched bits from exact mode", f"{others} other elements")
        before = [name for name in device_work(step, setting.device) if "HtoD" in name]
        with dit_rope.patch(model, backend=setting.backend, exact=False):
            actual = step()
            torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
            copies = [name for name in device_work(step, setting.device) if "HtoD" in name]
    expect(not copies, "no host-to-device copy in the second step", f"{len(copies)}, unpatched {len(before)}")
    return "second step, and exact bits"


CHECKS: dict[str, Callable[[Setting], str]] = {
    "small-shapes": small_shapes,
    "past-2^31-elements": past_2_31_elements,
    "long-sequence-and-batch": long_sequence_and_batch,
    "graph-replay": graph_replay,
    "torch-compile": torch_compile,
    "two-streams": two_streams,
    "two-threads": two_threads,
    "one-kernel": one_kernel,
    "wan-without-copies": wan_without_copies,
}


def report(name: str, setting: Setting) -> bool:
    """Runs one check and prints its result; whether it passed."""
    torch.manual_seed(0)
    try:
        detail = CHECKS[name](setting)
        setting.synchronize()
    except Exception as error:  # whatever a kernel, its compiler or the driver raises
        if not isinstance(error, AssertionError):
            traceback.print_exc()
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        print(f"failed {name}: {kind}{' '.join(str(error).split())}", flush=True)
        return False
    print(f"passed {name}: {detail}", flush=True)
    return True


def main() -> None:
    """Runs the named checks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(CHECKS))
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="on CPU at tiny sizes, by the eager backend")
    options = parser.parse_args()
    setting = Setting("eager", "cpu") if options.rehearse else Setting(options.backend, "cuda")
    passed = True
    for name in options.names or CHECKS:
        if not report(name, setting):
            passed = False
            setting.synchronize()  # raises where the failure has left the GPU unusable
    sys.exit(not passed)


if __name__ == "__main__":
    main()
