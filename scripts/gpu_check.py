"""Checks and times everything that needs an NVIDIA GPU, without a network, the most important parts first.

    python scripts/gpu_check.py                                      # with whatever is installed; dit_rope need not be
    python scripts/gpu_check.py --seconds 240 --results first        # what fits into four minutes
    python scripts/gpu_check.py --seconds 400 --after first --results second   # what the first call left
    python scripts/gpu_check.py --only contract memcheck
    python scripts/gpu_check.py --peer-path ~/peers                  # folders with other libraries to compare with
    python scripts/gpu_check.py --rehearse                           # the same programs on CPU, without figures

It needs torch 2.9 or newer with CUDA, cuda-core, cuda-bindings and NVRTC; it lists what else single parts need, what of
it is missing and how to get it. ``docs/gpu.md`` says what to bring, what comes back, and what each part says.

A run has parts, in ``gpu_checks/plan.py``, with the seconds that each takes by estimate. A part begins if it fits into
the rest of ``--seconds``. Otherwise it is left out, which is not a failure; the plan is printed beforehand. Each check
is a process with a time limit, because one illegal access spoils a CUDA context.

Everything goes to the folder ``--results`` as soon as it is known: ``gpu-check.csv`` with one row for each check and
target, ``gpu-check.log`` with all output, and the figures. Whatever ends a run leaves there what it had come to. The
exit code is 0 when nothing failed, 1 when something did, 2 when there is no GPU to check.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from gpu_checks import plan
from gpu_checks.requirements import Finding, describe, requirements, survey
from gpu_checks.runner import FAILED, LEFT_OUT, PASSED, SKIPPED, Check, Deadline, Missing, Part, Result, Runner, planned

Row = dict[str, Any]

SECONDS = 600.0
CSV, LOG = "gpu-check.csv", "gpu-check.log"
TARGET = "target: "


def main() -> int:
    """Runs the chosen parts; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="parts and checks whose name holds one of these words"
    )
    parser.add_argument("--after", type=Path, metavar="DIR", help="results of a run that this one goes on with")
    parser.add_argument("--results", type=Path, metavar="DIR", help="a folder for the results; scripts/results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="nothing runs for longer")
    parser.add_argument("--peer-path", action="append", default=[], help="a folder to import peers from")
    parser.add_argument("--rehearse", action="store_true", help="on CPU at tiny sizes; no results without --results")
    options = parser.parse_args()
    deadline = Deadline(options.seconds)
    sys.path[:0] = options.peer_path
    with contextlib.ExitStack() as stack:
        if options.results is None and options.rehearse:
            options.results = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        elif options.results is None:
            from gpu_checks.results import RESULTS

            options.results = RESULTS
        options.results.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context((options.results / LOG).open("w", buffering=1, encoding="utf-8", errors="replace"))
        say = functools.partial(_say, log)
        findings = [] if options.rehearse else survey(requirements())
        problem = None if options.rehearse else cannot_run(findings)
        if findings:
            say("\n".join(["what the checks need:", *describe(findings)]))
        if problem:
            say(f"nothing was checked: {problem}")
            return 2
        return check(options, deadline, missing(findings), say, lambda line: print(line, file=log))


def check(
    options: argparse.Namespace,
    deadline: Deadline,
    without: dict[str, Missing],
    say: Callable[[str], None],
    log: Callable[[str], None],
) -> int:
    """Runs what was chosen and is not done yet, and judges the figures; the exit code."""
    from gpu_checks.results import Record, environment

    device, folder = "cpu" if options.rehearse else "cuda", options.results.resolve()
    say("\n".join(f"  {name:18} {value}" for name, value in [*environment(device).items(), *backends(device)]))
    parts = plan.rehearsal(folder) if options.rehearse else plan.parts(folder, options.peer_path)
    earlier_rows = take_over(options.after, folder) if options.after else []
    parts = unfinished(chosen_parts(parts, options.only), {row["check"] for row in earlier_rows})
    record = Record(folder / CSV, device)
    record.add(earlier_rows)
    results: list[Result] = []

    def add(result: Result) -> None:
        results.append(result)
        record.add([{**asdict(result), "seconds": round(result.seconds, 1)}])

    say("\n".join(announced(parts, deadline.left())))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        Runner(deadline, without, plan.environment(), add, say, log).run(parts)
    finally:  # also where a signal ends the run
        if not options.rehearse:
            for verdict in judged(folder):
                add(verdict)
        say("\n".join(["", *summary(results), f"results: {folder}"]))
    return verdict_of(results)


def cannot_run(findings: Sequence[Finding]) -> str | None:
    """The reason why no check can run: no GPU, or no torch for one. Otherwise None."""
    for finding in findings:
        if finding.problem and finding.requirement.name == "torch":
            return f"it needs torch: {finding.problem}"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def missing(findings: Sequence[Finding]) -> dict[str, Missing]:
    """The requirements that are not here, by name."""
    return {
        finding.requirement.name: Missing(
            f"{finding.problem}; {finding.requirement.remedy}", finding.requirement.optional
        )
        for finding in findings
        if finding.problem
    }


def backends(device: str) -> list[tuple[str, str]]:
    """Which backend is chosen on a device, and why the others are not."""
    from dit_rope.rotation.choice import explain_backends

    try:
        return [(f"backend {name}", reason) for name, reason in explain_backends(device)]
    except Exception as error:  # whatever a driver raises: the checks say more
        return [("backends", f"{type(error).__name__}: {error}")]


def chosen_parts(parts: Sequence[Part], words: Sequence[str] | None) -> list[Part]:
    """What has one of ``words`` in the name of a part, a check or one of its results; all without any."""
    if not words:
        return list(parts)

    def holds(name: str) -> bool:
        return any(word in name for word in words)

    chosen = []
    for part in parts:
        checks = (
            part.checks if holds(part.name) else tuple(filter(None, (_only(check, holds) for check in part.checks)))
        )
        if checks:
            chosen.append(replace(part, checks=checks))
    if not chosen:
        names = ", ".join(name for part in parts for name in (part.name, *part.results))
        sys.exit(f"--only must hold words of a part's or check's name, got {' '.join(words)}; there are {names}")
    return chosen


def unfinished(parts: Sequence[Part], finished: Container[str]) -> list[Part]:
    """The parts without the checks that are done."""
    remaining = []
    for part in parts:
        checks = tuple(filter(None, (_only(check, lambda name: name not in finished) for check in part.checks)))
        if checks:
            remaining.append(replace(part, checks=checks))
    return remaining


def _only(check: Check, selects: Callable[[str], bool]) -> Check | None:
    """The check with those results whose names ``selects`` accepts, or None. Without reports it has one result."""
    if not check.reports:
        return check if selects(check.name) else None
    reports = {argument: name for argument, name in check.reports.items() if selects(name)}
    return replace(check, reports=reports) if reports else None


def take_over(earlier: Path, folder: Path) -> list[Row]:
    """Copies the figures of an earlier run to ``folder``, and gives its rows of checks that passed."""
    from benchmarks.results import read_csv

    if not (earlier / CSV).exists():
        sys.exit(f"--after must be a folder with the {CSV} of an earlier run, got {earlier}")
    passed = [row for row in read_csv(earlier / CSV) if row["result"] == PASSED and not row["check"].startswith(TARGET)]
    for path in earlier.glob("*.csv"):
        if path.name != CSV and earlier.resolve() != folder:
            shutil.copy(path, folder / f".{path.name}.new")
            (folder / f".{path.name}.new").replace(folder / path.name)
    return passed


def announced(parts: Sequence[Part], seconds: float) -> list[str]:
    """What will run in ``seconds``, and what will be left out, if every part takes as long as estimated."""
    lines = [f"planned for {seconds:.0f} s:"]
    for part, fits in planned(parts, seconds):
        lines.append(f"  {'runs' if fits else LEFT_OUT:9} {part.name:14} about {part.seconds:.0f} s")
    return lines


def judged(folder: Path) -> list[Result]:
    """One result for each target, from the figures in ``folder``; a missing figure is left out."""
    from benchmarks.results import read_csv
    from gpu_checks.results import result_path
    from gpu_checks.targets import judge

    path = result_path("kernels", "cuda", folder)
    words = {True: PASSED, False: FAILED, None: LEFT_OUT}
    verdicts = judge(read_csv(path) if path.exists() else [])
    return [Result(f"{TARGET}{each.name}", words[each.passed], 0.0, each.detail) for each in verdicts]


def summary(results: Sequence[Result]) -> list[str]:
    """The results as a table, and how many there are of each kind."""
    width = max((len(each.check) for each in results), default=0)
    lines = [f"{each.check:{width}}  {each.result:8}  {each.seconds:6.1f} s  {each.detail}" for each in results]
    words = (PASSED, FAILED, SKIPPED, LEFT_OUT)
    return [*lines, ", ".join(f"{sum(result.result == word for result in results)} {word}" for word in words)]


def verdict_of(results: Sequence[Result]) -> int:
    """Exit code 1 if anything failed, else 0."""
    return 1 if any(result.result == FAILED for result in results) else 0


def _say(log: TextIO, text: str) -> None:
    print(text, flush=True)
    print(text, file=log)


if __name__ == "__main__":
    sys.exit(main())
