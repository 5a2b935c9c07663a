"""Times the host's work in one call of the CUDA backend, and in modules of patched models.

    python scripts/measure/bench_host_time.py --beside DIR
    python scripts/measure/bench_host_time.py --rope-modules
    python scripts/measure/bench_host_time.py --attention

Calls go through the real cuda-core and cuda-bindings to a driver without a GPU (``tests/support/stub_driver.py``), so
that this runs anywhere. Left out is what the driver itself does, some 3 us, and what torch takes for the memory and the
streams of a GPU more than for those of a CPU. ``bench_kernels.py`` times whole calls where there is a GPU. Processes
take turns; ``--beside`` names a checkout of another commit, whose package takes every other turn.

With ``--rope-modules``: what the rope modules take whose tables depend on values that a GPU would have to be asked for.
The models are the small ones of the tests, with few tokens, so that nearly all of it is time on the host.

With ``--attention``: what a patch adds to one call of an attention module, its kernels left out: the patched module
with rotations that return what they are given, beside the unpatched one without rotary tensors.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dit_rope
from dit_rope.hooks import forward_pass, table_keys
from dit_rope.hooks.class_override import unpatched_method
from dit_rope.hooks.formats import Format
from dit_rope.hooks.plan import make_plan
from dit_rope.models import ADAPTERS
from dit_rope.rotation import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.results import write_results
from benchmarks.timing import Timing, interleave, summary
from pages.write_model_table import EXAMPLES, reads_values
from zoo import Example, Noise

PASSES = 1
SOME_CALLS = 20
ROOT = Path(__file__).resolve().parents[2]
PROCESSES, TURNS = 15, 101
ATTENTION = ("wan", "flux", "hunyuan-video", "qwen-image")
BARE = "unpatched, without rotary tensors"
UNPATCHED, BUILT, LATER_PASSES, PACKED = (
    "unpatched",
    "patched, built in every pass",
    "patched, found again",
    "packed for the kernels",
)


def rope_cases(example: Example) -> dict[str, Callable[[], None]]:
    """PASSES times all calls of rope modules in one forward pass of a patched model, and what is packed of them.

    The patch stays on the model. Where values cannot be compared, as on a GPU, the tables are built in every pass.
    """
    adapter = next(adapter for adapter in ADAPTERS if adapter.model == example.model)
    model = example.build(torch.float32)
    plan = make_plan("model", model, adapter)
    inputs, calls = example.inputs(model, Noise(torch.float32, 1)), list[tuple[Any, Callable[[], object]]]()
    packed: dict[tuple[int, ...], Callable[[], object]] = {}

    def note(form: Format, rotary: Any, tensors: list[torch.Tensor], device: torch.device) -> Any:
        packed.setdefault(tuple(map(id, tensors)), functools.partial(pack, form, rotary, tensors, device))
        return pack(form, rotary, tensors, device)

    pack = Format._packed
    dit_rope.patch(model, exact=False)
    for table in plan.tables:
        target, method = table.target, table.tables.method
        patched, unpatched = getattr(target, method), unpatched_method(target, method)

        def watched(*args: Any, patched: Any = patched, unpatched: Any = unpatched, **kwargs: Any) -> Any:
            calls.append((functools.partial(unpatched, *args, **kwargs), functools.partial(patched, *args, **kwargs)))
            return patched(*args, **kwargs)

        vars(target)[method] = watched
    with mock.patch.object(table_keys, "_by_value", no_value), mock.patch.object(Format, "_packed", note):
        example.run(model, inputs)
    for table in plan.tables:
        del vars(table.target)[table.tables.method]

    unpatched, patched = [call for call, _ in calls], [call for _, call in calls]
    call_patched = repeated(lambda: run_all(patched), PASSES)

    by_value = table_keys._by_value

    def built() -> None:
        table_keys._by_value = no_value  # mock.patch takes longer than the calls
        try:
            call_patched()
        finally:
            table_keys._by_value = by_value

    return {
        UNPATCHED: repeated(lambda: run_all(unpatched), PASSES),
        BUILT: built,
        LATER_PASSES: call_patched,
        PACKED: repeated(lambda: run_all(list(packed.values())), PASSES),
    }


def no_value(tensor: torch.Tensor) -> None:
    """Stands in for what compares values, for which it would have to wait for a GPU."""
    raise table_keys.Unkeyed


def attention_cases(example: Example) -> dict[str, Callable[[], object]]:
    """Calls of the first attention module of a model, with what a forward pass of it gives that module."""
    model = example.build()
    patched = {exact: example.build() for exact in (True, False)}
    handles = [dit_rope.patch(twin, exact=exact) for exact, twin in patched.items()]
    path = handles[0]._plans[0].rotations[0].path
    calls: list[tuple[Any, Any]] = []
    for twin in (model, *patched.values()):
        module = twin.get_submodule(path)
        hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        example.forward(twin)
        hook.remove()
    args, kwargs = calls[0]
    bare = (
        tuple(None if isinstance(x, tuple) else x for x in args),
        {name: None if "rotary" in name else value for name, value in kwargs.items()},
    )
    unpatched = model.get_submodule(path)
    cases: dict[str, Callable[[], object]] = {BARE: lambda: unpatched(*bare[0], **bare[1])}
    for (exact, twin), (args, kwargs) in zip(patched.items(), calls[1:], strict=True):
        module = twin.get_submodule(path)
        name = "patched, exact mode" if exact else "patched, fast mode without the norms"
        cases[name] = functools.partial(in_a_pass, module, args, kwargs)
    return cases


def in_a_pass(module: torch.nn.Module, args: Any, kwargs: Any) -> object:
    """A call within a forward pass that has packed its tables already."""
    forward_pass._current.number = 0
    return module(*args, **kwargs)


@torch.no_grad()
def attention_modules(rounds: int) -> list[dict[str, object]]:
    """Rows for some models: of one call of an attention module."""
    rows: list[dict[str, object]] = []
    for example in (candidate for candidate in EXAMPLES if candidate.name in ATTENTION):
        print(example.name)
        cases = attention_cases(example)
        with mock.patch.object(ops, "rotate", lambda xs, *_, **__: list(xs)):
            calls = {name: repeated(call, SOME_CALLS) for name, call in cases.items()}
            timings = interleave(calls, rounds, warm_up=3)
        rows += [{"model": example.name} | row(name, timing, SOME_CALLS) for name, timing in timings.items()]
    return rows


def driver_calls(processes: int, beside: Path | None) -> list[dict[str, object]]:
    """Rows for each call, over the stub of the driver, of this package and the one in ``beside``."""
    import stub_driver

    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = stub_driver.environment(stub_driver.build(Path(folder)))
        for _ in range(processes):
            for root in filter(None, (beside, ROOT)):
                command = [sys.executable, str(Path(__file__).with_name("driver_host_time.py")), str(TURNS)]
                process = subprocess.run(
                    command, env=environment | {"PYTHONPATH": str(root)}, check=True, capture_output=True, text=True
                )
                for call, microseconds in json.loads(process.stdout).items():
                    times.setdefault((f"commit {commit_of(root)}", call), []).extend(us / 1e3 for us in microseconds)
    rows: list[dict[str, object]] = []
    for package, call in times:
        print(package, end=" ")
        rows.append({"package": package} | row(call, summary(times[package, call]), 1))
    return rows


def commit_of(root: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_all(calls: list[Any]) -> None:
    """One call of each."""
    for call in calls:
        call()


def repeated(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """``calls`` calls."""

    def run() -> None:
        for _ in range(calls):
            call()

    return run


def row(call: str, timing: Timing, calls: int) -> dict[str, object]:
    """Microseconds of one call, printed too."""
    low, median, high = (round(1e3 * ms / calls, 2) for ms in (timing.p20, timing.median, timing.p80))
    print(f"{call:30} {median:8.1f} us  [{low:.1f}, {high:.1f}]")
    return {"call": call, "us_p20": low, "us_median": median, "us_p80": high}


@torch.no_grad()
def rope_modules(rounds: int) -> list[dict[str, object]]:
    """Rows for each model whose tables depend on values: of all its rope modules together, in one forward pass."""
    rows: list[dict[str, object]] = []
    for adapter in filter(reads_values, ADAPTERS):
        example = next((example for example in EXAMPLES if example.model == adapter.model), None)
        if example is None:
            continue
        print(adapter.model_class)
        timings = interleave(rope_cases(example), rounds, warm_up=3)
        rows += [{"model": adapter.model_class} | row(name, timing, PASSES) for name, timing in timings.items()]
    return rows


def main() -> None:
    """Prints a line for each case and writes ``results/host-time-cpu.csv``, or that of rope modules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=0, help="timed calls of each; 15, or 301 short ones of rope modules"
    )
    parser.add_argument("--rope-modules", action="store_true", help="time rope modules in place of kernel calls")
    parser.add_argument("--attention", action="store_true", help="time attention modules in place of kernel calls")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="a checkout of another commit, timed as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rope_modules:
        print(write_results("rope-module-host-time-cpu", rope_modules(arguments.rounds or 301)))
    elif arguments.attention:
        print(write_results("attention-host-time-cpu", attention_modules(arguments.rounds or 101)))
    else:
        print(write_results("host-time-cpu", driver_calls(arguments.rounds or PROCESSES, arguments.beside)))


if __name__ == "__main__":
    main()
