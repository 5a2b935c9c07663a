"""Checks everything of dit_rope that needs an NVIDIA GPU, then times it, in under 8 minutes and without a network.

    python scripts/gpu_check.py                        # with whatever is installed; dit_rope itself need not be
    make gpu                                           # the same in the project's environment, set up first
    python scripts/gpu_check.py --only contract memcheck
    python scripts/gpu_check.py --peer-path ~/peers    # folders with other libraries to compare with
    python scripts/gpu_check.py --rehearse             # every program on CPU at tiny sizes, without figures

It needs torch 2.9 or newer with CUDA, triton, cuda-core, cuda-bindings and NVRTC, numpy, einops, pytest, typer, rich
and diffusers; it lists what is missing and how to get it. compute-sanitizer, hypothesis and the peers are optional.

Each check is a process of its own with a time limit, because one illegal access spoils a CUDA context: the backends'
contract tests, compute-sanitizer, tensors past 2^31 elements, long sequences, graph replay, torch.compile, streams,
threads, one kernel per call, and a patched Wan without copies from the host. Then ``bench_kernels.py`` and one
denoising step of Wan 1.3B run alone, and the measured kernels are held to the targets of ``gpu_checks/targets.py``.

Results go to ``scripts/results/gpu-check.csv``, figures beside it. The exit code is 0 when nothing failed, 1 when
something did, 2 when there is no GPU to check.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gpu_checks import plan
from gpu_checks.requirements import Finding, describe, requirements, survey
from gpu_checks.runner import FAILED, PASSED, SKIPPED, Check, Deadline, Missing, Result, run_all

JOBS = 4
SECONDS = 480.0


def main() -> int:
    """Runs the chosen checks; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="checks whose name holds one of these words")
    parser.add_argument("--peer-path", action="append", default=[], help="a folder to import peers from")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the run's deadline")
    parser.add_argument("--jobs", type=int, default=JOBS, help="checks that run at the same time")
    parser.add_argument("--rehearse", action="store_true", help="every program on CPU, at tiny sizes, without figures")
    options = parser.parse_args()
    deadline = Deadline(options.seconds)
    if options.rehearse:
        chosen = chosen_checks(plan.rehearsal(), options.only)
        return verdict(run_all(chosen, deadline, {}, plan.environment(), options.jobs, _say))
    sys.path[:0] = options.peer_path
    findings = survey(requirements())
    _say("\n".join(["what the checks need:", *describe(findings)]))
    problem = cannot_run(findings)
    if problem:
        _say(f"nothing was checked: {problem}")
        return 2
    chosen = chosen_checks(plan.checks(options.peer_path), options.only)
    jobs = min(options.jobs, os.cpu_count() or 1)
    results = run_all(chosen, deadline, missing(findings), plan.environment(), jobs, _say)
    results += judged(results)
    _say("\n".join(["", *summary(results)]))
    _say(str(write(results)))
    return verdict(results)


def cannot_run(findings: Sequence[Finding]) -> str | None:
    """Why nothing can be checked here, or None: no GPU, or one of the packages that every script imports."""
    for finding in findings:
        if finding.problem and finding.requirement.name in ("torch", "typer", "rich"):
            return f"it needs {finding.requirement.name}: {finding.problem}"
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


def chosen_checks(checks: list[Check], words: Sequence[str] | None) -> list[Check]:
    """The checks whose name holds one of ``words``; all without any."""
    chosen = [check for check in checks if not words or any(word in check.name for word in words)]
    if not chosen:
        names = ", ".join(check.name for check in checks)
        sys.exit(f"--only must hold words of a check's name, got {' '.join(words or ())}; there are {names}")
    return chosen


def judged(results: Sequence[Result]) -> list[Result]:
    """One result for each target, from the figures of this run; none where the benchmark did not pass."""
    benchmark = next((result for result in results if result.check == plan.BENCHMARK), None)
    if benchmark is None or benchmark.result != PASSED:
        return []
    from gpu_checks.results import result_path
    from gpu_checks.targets import judge

    from dit_rope.benchmark.results import read_csv

    words = {True: PASSED, False: FAILED, None: SKIPPED}
    verdicts = judge(read_csv(result_path("kernels", "cuda")))
    return [Result(f"target: {each.name}", words[each.passed], 0.0, each.detail) for each in verdicts]


def summary(results: Sequence[Result]) -> list[str]:
    """The results as a table, and how many there are of each kind."""
    width = max(len(result.check) for result in results)
    lines = [f"{each.check:{width}}  {each.result:7}  {each.seconds:6.1f} s  {each.detail}" for each in results]
    counts = [f"{sum(each.result == word for each in results)} {word}" for word in (PASSED, FAILED, SKIPPED)]
    return [*lines, ", ".join(counts)]


def write(results: Sequence[Result], folder: Path | None = None) -> Path:
    """Writes ``gpu-check.csv`` with device, driver, versions and commit."""
    from gpu_checks.results import RESULTS, environment, write_rows

    rows = [{**asdict(result), "seconds": round(result.seconds, 1)} for result in results]
    return write_rows((folder or RESULTS) / "gpu-check.csv", rows, environment("cuda"))


def verdict(results: Sequence[Result]) -> int:
    """Exit code 1 if anything failed, else 0."""
    return 1 if any(result.result == FAILED for result in results) else 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
