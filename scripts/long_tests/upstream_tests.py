"""Runs diffusers' own model tests twice, unpatched and patched, and lists the tests whose outcomes differ.

    git -C DIFFUSERS archive COMMIT tests | tar x -C CHECKOUT
    OMP_NUM_THREADS=1 nice python scripts/long_tests/upstream_tests.py CHECKOUT WORK
    'tests/models/transformers/test_*_wan*.py'

One process for each file and run; what it wrote, and its results as JUnit XML, stay below ``WORK/plain`` and
``WORK/patched``. A file that has results there is not run again: delete ``WORK/patched`` to test a changed dit_rope,
and all of WORK where it supports other models, because only what those return is compared.
``scripts/results/upstream-tests.csv`` gets one row for each file and class under test, of all results in WORK. Exits
with 1 where an outcome differs or a run did not finish. What models return on CPU must be the same to the bit, which
diffusers' tests alone would not notice (see ``patch_on_construction.py``, which both runs load).

diffusers skips what needs an accelerator where its device is called ``cpu``. ``DIFFUSERS_TEST_DEVICE=cpu:0`` runs most
of that on a CPU, torch.compile and layerwise casting among it; what then still fails, fails in both runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal
from xml.etree import ElementTree

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results

FOLDER = Path(__file__).resolve().parent
FILES = ["tests/models/transformers/test_*.py", "tests/models/controlnets/test_*.py"]
MODES: tuple[Literal["plain", "patched"], ...] = ("plain", "patched")


@dataclass(frozen=True)
class Outcome:
    """What became of one test; ``why`` is the exception's name, or the reason it was skipped for.

    ``returned`` is the number of its forward passes, and a digest of what they returned.
    """

    kind: Literal["passed", "failed", "skipped"]
    why: str
    model_class: str
    patched: int
    refused: tuple[str, ...]
    returned: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, [f"{self.kind} ({self.why})" if self.why else self.kind, self.returned]))


@dataclass(frozen=True)
class Runs:
    """The folder of the tests, the folder of the results, and the time limit of one file in seconds."""

    checkout: Path
    work: Path
    time_limit: int

    def results(self, mode: str, file: str) -> Path:
        """Where one file's results are."""
        return self.work / mode / f"{file}.xml"

    def finish(self, mode: str, file: str) -> str | None:
        """Runs one file unless it has results; says why there are none."""
        results = self.results(mode, file)
        if results.exists():
            return None
        results.parent.mkdir(parents=True, exist_ok=True)
        partial, log = results.with_suffix(".part"), results.with_suffix(".log")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", file]
        command += ["-p", "patch_on_construction", *(["--leave-plain"] if mode == "plain" else [])]
        command += [f"--junitxml={partial.resolve()}"]
        paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command, cwd=self.checkout, env=environment, stdout=output, stderr=subprocess.STDOUT,
                    timeout=self.time_limit, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"no results in {self.time_limit} s, see {log}"
        if code not in (0, 1, 5):  # 1: tests failed; 5: PYTEST_ADDOPTS selects none of this file
            return f"pytest ended with {code}, see {log}"
        partial.replace(results)
        return None


def read_outcomes(results: Path) -> dict[str, Outcome]:
    """Outcomes of one file's tests, by name."""
    cases: dict[str, list[ElementTree.Element]] = {}  # a test whose teardown fails too is two cases
    for case in ElementTree.parse(results).iter("testcase"):
        cases.setdefault(f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}", []).append(case)
    return {name: _outcome(name.partition("::")[0], parts) for name, parts in cases.items()}


def _outcome(test_class: str, cases: list[ElementTree.Element]) -> Outcome:
    parts = {part.tag: part for case in reversed(cases) for part in case}
    properties = [(part.attrib["name"], part.attrib["value"]) for case in cases for part in case.iter("property")]
    kind, why = "passed", ""
    if "failure" in parts or "error" in parts:
        message = parts.get("failure", parts.get("error")).attrib.get("message", "")
        exception = re.match(r"[\w.]+(?=:|$)", message)
        kind, why = "failed", exception[0] if exception else "AssertionError"
    elif "skipped" in parts:
        kind, why = "skipped", parts["skipped"].attrib.get("message", "")
    return Outcome(
        kind,
        why,
        model_class=dict(properties).get("model_class", test_class),
        patched=int(dict(properties).get("patched", 0)),
        refused=tuple(value for name, value in properties if name == "refused"),
        returned=dict(properties).get("returned", ""),
    )


def count(file: str, plain: dict[str, Outcome], patched: dict[str, Outcome]) -> Iterator[dict[str, object]]:
    """Rows of the table for one file, one for each class under test."""
    classes: dict[str, Counter[str]] = {}
    for mode, outcomes in zip(MODES, (plain, patched), strict=True):
        for outcome in outcomes.values():
            counts = classes.setdefault(outcome.model_class, Counter())
            counts[f"{mode}_{outcome.kind}"] += 1
            counts["constructed_patched"] += outcome.patched
    columns = [f"{mode}_{kind}" for mode in MODES for kind in ("passed", "failed", "skipped")]
    for name, counts in sorted(classes.items()):
        yield {"file": file, "class": name, **{key: counts[key] for key in (*columns, "constructed_patched")}}


def differences(plain: dict[str, Outcome], patched: dict[str, Outcome]) -> Iterator[str]:
    """A line for each test whose outcome, reason or bits differ once models are patched."""
    for name in sorted({*plain, *patched}):
        before, after = (str(outcomes.get(name, "not collected")) for outcomes in (plain, patched))
        if before != after:
            yield f"{name}: {before} plain, {after} patched"


def report(runs: Runs, results: str) -> int:
    """Writes the table of all results there are, prints what differs or was refused, and counts what differs."""
    rows: list[dict[str, object]] = []
    differing = 0
    for path in sorted((runs.work / "patched").rglob("*.xml")):
        file = str(path.relative_to(runs.work / "patched").with_suffix(""))
        if not runs.results("plain", file).exists():
            continue
        plain, patched = (read_outcomes(runs.results(mode, file)) for mode in MODES)
        rows += [{**row, "diffusers": version("diffusers")} for row in count(file, plain, patched)]
        for line in differences(plain, patched):
            differing += 1
            print(f"{file}::{line}")
        for reason, times in Counter(why for outcome in patched.values() for why in outcome.refused).items():
            print(f"{file}: refused in {times} tests: {reason}")
    if rows:
        print(f"{len(rows)} rows in {write_results(results, rows)}")
    return differing


def main(
    checkout: Annotated[Path, typer.Argument(help="Folder that holds diffusers' tests/, and no src/.")],
    work: Annotated[Path, typer.Argument(help="Folder for results, where an interrupted run goes on.")],
    files: Annotated[list[str] | None, typer.Argument(help=f"Patterns below CHECKOUT. Default: {FILES}.")] = None,
    time_limit: Annotated[int, typer.Option(help="Seconds that one file may take in one run.")] = 1200,
    results: Annotated[str, typer.Option(help="Name of the table in scripts/results/.")] = "upstream-tests",
) -> None:
    """Runs diffusers' own model tests twice, plain and on patched models, and lists the tests that end otherwise."""
    if not (checkout / "tests").is_dir() or (checkout / "src").exists():
        raise typer.BadParameter(f"CHECKOUT must hold tests/, and no src/ that tests would import, got {checkout}")
    runs = Runs(checkout.resolve(), work, time_limit)
    unfinished = 0
    for path in sorted({path for pattern in files or FILES for path in runs.checkout.glob(pattern)}):
        file = str(path.relative_to(runs.checkout))
        problems = [f"{file} {mode}: {why}" for mode in MODES if (why := runs.finish(mode, file))]
        unfinished += len(problems)
        print(*problems or [f"{file}: done"], sep="\n", flush=True)
    different = report(runs, results)
    print(f"{different} tests end otherwise, {unfinished} runs did not finish")
    raise typer.Exit(1 if different or unfinished else 0)


if __name__ == "__main__":
    typer.run(main)
