"""Puts small faults into a copy of the source, one at a time, and checks that the tests notice them.

    python scripts/long_tests/mutation_check.py [--jobs 2] [--only cache] [--work-dir DIR]

The faults are listed in ``scripts/long_tests/mutations.py``, each with the test files that guard its module. Every
group of test files first has to pass on the unchanged copy. A fault whose text is not in the source exactly once stops
the program: the source has changed, and the list has to follow. Outcomes are kept in the working folder as they come,
under a hash of the fault and of the files it depends on, so that a second run goes on where the first was stopped.

Writes ``scripts/results/mutations.csv``, a row per fault with the first test that failed. Exits with 1 where a fault
survives that the list does not explain.

Each run of tests is a fork of this process, in which torch and diffusers are imported already: a run takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from long_tests.mutation import Mutation
from long_tests.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("dit_rope", "kernels", "tests", "scripts", "pyproject.toml")
PRELOADED = ("torch", "einops", "numpy", "diffusers", "transformers", "diffusers.models.transformers.transformer_wan")
TIMEOUT = 1200.0
CPU_SECONDS = 240
_PASSED, _FAILED, _BROKEN_COLLECTION = 0, 1, 2
_STOPPED = (None, -signal.SIGXCPU, -signal.SIGKILL)  # by the clock, or after too much computing


@dataclass(frozen=True)
class Outcome:
    """What the tests made of a fault: ``caught``, ``survived`` or ``equivalent``, and the first test that failed."""

    result: str
    by: str
    seconds: float


@dataclass
class _Run:
    """Tests under way in a child process."""

    process: int
    log: Path
    begun: float
    slot: Path
    mutation: Mutation | None
    command: tuple[tuple[str, ...], str]


def check(
    mutations: Sequence[Mutation],
    root: Path,
    work: Path,
    *,
    copied: Sequence[str] = COPIED,
    jobs: int = 1,
    timeout: float = TIMEOUT,
) -> dict[str, Outcome]:
    """The outcome of every mutation of ``root``, which is not written to.

    Args:
        mutations: what to try.
        root: of the source tree.
        work: an existing folder for copies, logs and the outcomes of earlier runs.
        copied: files and folders of ``root`` that tests need.
        jobs: runs of tests at the same time, each in a separate copy.
        timeout: seconds after which a run of tests counts as failed, as it does after ``CPU_SECONDS`` of computing.

    Raises:
        ValueError: a mutation does not apply, or tests fail without one.
    """
    for mutation in mutations:
        mutation.applied((root / mutation.file).read_text())
    outcomes_file = work / "outcomes.json"
    outcomes: dict[str, list[object]] = json.loads(outcomes_file.read_text()) if outcomes_file.exists() else {}
    keys = {mutation.name: _key(root, mutation) for mutation in mutations}
    todo = [mutation for mutation in mutations if keys[mutation.name] not in outcomes]
    print(f"{len(mutations)} mutations, {len(mutations) - len(todo)} known from earlier runs", flush=True)
    broken: dict[tuple[tuple[str, ...], str], str] = {}
    # Right before the first fault that each guards, so that a run that is stopped has something to show.
    queue = list[tuple[Mutation | None, tuple[tuple[str, ...], str]]]()
    for mutation in todo:
        if (None, mutation.command) not in queue:
            queue.append((None, mutation.command))
        queue.append((mutation, mutation.command))
    with contextlib.ExitStack() as stack:
        slots = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work, prefix="tree-")))
            for _ in range(min(jobs, max(1, len(queue))))
        ]
        for slot in slots:
            _copy(root, slot, copied)
        for run, code in _run_all(queue, slots, timeout, root):
            seconds = round(time.monotonic() - run.begun, 1)
            by = _first_failure(run.log, code)
            if run.mutation is None:
                if code != _PASSED:
                    broken[run.command] = f"{by}, see {run.log}"
                    print(f"    BROKEN {run.command} {broken[run.command]}", flush=True)
                continue
            if code not in (_PASSED, _FAILED, _BROKEN_COLLECTION, *_STOPPED):
                raise ValueError(f"{run.mutation.name}: pytest must run, got exit status {code}; see {run.log}")
            survived = "equivalent" if run.mutation.equivalent else "survived"
            outcome = Outcome(survived if code == _PASSED else "caught", by, seconds)
            print(f"{outcome.result:>10} {run.mutation.name} {seconds} s {by}", flush=True)
            outcomes[keys[run.mutation.name]] = [outcome.result, outcome.by, outcome.seconds]
            outcomes_file.write_text(json.dumps(outcomes, indent=1))
    for mutation in mutations:
        if mutation.command in broken:  # what was caught says nothing
            outcomes.pop(keys[mutation.name], None)
    if broken:
        outcomes_file.write_text(json.dumps(outcomes, indent=1))
        raise ValueError(f"tests must pass without a mutation, got {broken}")
    return {m.name: Outcome(*outcomes[keys[m.name]]) for m in mutations}  # type: ignore[arg-type]


def _run_all(
    queue: Sequence[tuple[Mutation | None, tuple[tuple[str, ...], str]]],
    slots: Sequence[Path],
    timeout: float,
    root: Path,
) -> Iterator[tuple[_Run, int | None]]:
    """Each run and its exit status, None for one that took too long; as many at once as there are slots."""
    waiting, free, running = list(queue), list(slots), list[_Run]()
    try:
        while waiting or running:
            while waiting and free:
                mutation, command = waiting.pop(0)
                running.append(_start(mutation, command, free.pop()))
            time.sleep(0.02)
            for run in list(running):
                ended, status = os.waitpid(run.process, os.WNOHANG)
                late = time.monotonic() - run.begun > timeout
                if not ended and not late:
                    continue
                if not ended:
                    _kill(run)
                running.remove(run)
                if run.mutation is not None:
                    shutil.copyfile(root / run.mutation.file, run.slot / run.mutation.file)
                free.append(run.slot)
                yield run, os.waitstatus_to_exitcode(status) if ended else None
    finally:
        for run in running:
            _kill(run)


def _kill(run: _Run) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process, signal.SIGKILL)
    os.waitpid(run.process, 0)


def _start(mutation: Mutation | None, command: tuple[tuple[str, ...], str], slot: Path) -> _Run:
    if mutation is not None:
        file = slot / mutation.file
        file.write_text(mutation.applied(file.read_text()))
    name = mutation.name if mutation else hashlib.sha256(repr(command).encode()).hexdigest()[:12]
    log, begun = slot.parent / f"{name}.log", time.monotonic()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        _run_tests(command, slot, log)
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(process, process)
    return _Run(process, log, begun, slot, mutation, command)


def _run_tests(command: tuple[tuple[str, ...], str], slot: Path, log: Path) -> None:
    """Runs in a child, and does not return."""
    code = 99
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.chdir(slot)
        sys.dont_write_bytecode = True  # a mutant of the same size and second would pass for what it was made of
        os.environ.update(PYTHONPATH=str(slot), PYTHONDONTWRITEBYTECODE="1")
        sys.path.insert(0, str(slot))
        import pytest

        tests, k = command
        options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(slot)]
        code = int(pytest.main([*options, *(["-k", k] if k else []), *tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _copy(root: Path, slot: Path, copied: Sequence[str]) -> None:
    for name in copied:
        if (root / name).is_dir():
            shutil.copytree(root / name, slot / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(root / name, slot / name)


def _key(root: Path, mutation: Mutation) -> str:
    """Changes with the fault, the file it is in, and the tests that guard it."""
    digest = hashlib.sha256(repr(mutation).encode())
    for file in (mutation.file, *(test.partition("::")[0] for test in mutation.tests)):
        digest.update((root / file).read_bytes())
    return digest.hexdigest()


def _first_failure(log: Path, code: int | None) -> str:
    """The test that failed, or what else ended the run."""
    if code in _STOPPED:
        return "timeout"
    text = log.read_text(errors="replace") if log.exists() else ""
    match = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return match.group(1) if match else "" if code == _PASSED else f"exit status {code}"


def preload(names: Iterable[str] = PRELOADED) -> None:
    """Imports what every test needs and no mutation touches, on one thread, so that forks are quick and safe."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in names:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    assert not any(name.partition(".")[0] == "dit_rope" for name in sys.modules), "children must import their own"


def main() -> None:
    """Check, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the names, or of the files, of the mutations to run")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "mutation-check")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only in m.name or options.only in m.file]
    options.work_dir.mkdir(parents=True, exist_ok=True)
    preload()
    outcomes = check(chosen, ROOT, options.work_dir, jobs=options.jobs)
    counts = [sum(outcome.result == kind for outcome in outcomes.values()) for kind in ("caught", "equivalent")]
    survived = [name for name, outcome in outcomes.items() if outcome.result == "survived"]
    print(f"{counts[0]} caught, {counts[1]} equivalent, {len(survived)} survived: {', '.join(survived) or 'none'}")
    if chosen == list(MUTATIONS):
        from benchmarks.results import write_results

        print(f"wrote {write_results('mutations', rows_of(chosen, outcomes))}")
    if survived:
        raise SystemExit(1)


def rows_of(mutations: Sequence[Mutation], outcomes: dict[str, Outcome]) -> list[dict[str, object]]:
    """A row per mutation, without the machine's paths."""
    return [
        {"mutation": m.name, "file": m.file, **vars(outcomes[m.name]), "explanation": m.equivalent} for m in mutations
    ]


if __name__ == "__main__":
    main()
