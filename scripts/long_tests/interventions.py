"""Compares patched models with unpatched ones under everything else that people do to models.

    OMP_NUM_THREADS=1 nice python scripts/long_tests/interventions.py --jobs 2             # some 5 hours of two cores
    OMP_NUM_THREADS=1 nice python scripts/long_tests/interventions.py --jobs 2 --share 4   # every fourth pair

Every example model of ``tests/support/zoo``, under every intervention of
``scripts/long_tests/intervention_cases``: put on before the patch, after it, taken off before ``undo()``, and after a
patch that was undone; in exact and fast mode. A case must give what the unpatched twin gives under the same
intervention: the same bits in exact mode, the same but for rounding in fast mode, the same type of error where the twin
raises; after ``undo()`` the same bits and objects.

``--share N`` takes one Nth of the pairs of example and intervention, evenly: each example meets one Nth of the
interventions, another one than its neighbours, and each intervention one Nth of the examples.

Writes ``interventions.csv`` (cases by intervention and outcome), ``interventions-reasons.csv`` (why cases were refused,
not judged or not applicable) and, in the work folder, every case that is none of equal, within rounding or the same
error. All of them are written after each model, and a run that was stopped goes on with those that are missing. Exits
with 1 where a case differs in silence, crashes, or leaves something behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.results import environment, write_csv
from long_tests.intervention_cases import INTERVENTIONS, Intervention, judge, tables
from long_tests.intervention_cases.runner import Row
from zoo import EXAMPLES, named

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("wan", "flux", "hunyuan-video-no-norm", "hidream", "cogvideox-1.5", "joyimage")
"""Examples of the quick run: one of each way to rotate, and of each form of tables."""


def work_through(example: str, chosen: list[str], file: Path, seconds: float) -> None:
    """Runs one example under these interventions, in this process and forks of it; a line of JSON for each."""
    from long_tests import interventions_preload
    from long_tests.intervention_cases.forked import forked
    from long_tests.intervention_cases.runner import parts_of

    interventions_preload.torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    single = [intervention for intervention in INTERVENTIONS if intervention.name in chosen and intervention.ranks == 1]
    parts_of(named(example))  # once, and with it what is imported late
    with file.open("a", encoding="utf-8") as lines:
        for name, rows in forked(named(example), single, seconds):
            lines.write(json.dumps({"intervention": name, "rows": [asdict(row) for row in rows]}) + "\n")
            lines.flush()


def on_ranks(chosen: list[tuple[str, str]], folder: Path) -> None:
    """Runs pairs of example and intervention on two ranks, which start once for all pairs."""
    from long_tests.intervention_cases.distributed import RANKS, on_rank
    from ranks import Ranks

    with tempfile.TemporaryDirectory() as store, Ranks(RANKS, Path(store), seconds=120) as ranks:
        for example, name in chosen:
            answers = ranks.answers(on_rank, example, name)
            rows = [row for good, answer in answers if good for row in answer]
            failed = [answer for good, answer in answers if not good]
            if failed:
                group = next(intervention.group for intervention in INTERVENTIONS if intervention.name == name)
                rows = [asdict(Row(example, group, name, "", "", judge.CRASHED, failed[0].strip().rpartition("\n")[2]))]
            with (folder / f"{example}.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"intervention": name, "rows": rows}) + "\n")


def finished(folder: Path, example: str) -> dict[str, list[Row]]:
    """The rows of an example that are in the work folder, by intervention."""
    file = folder / f"{example}.jsonl"
    if not file.exists():
        return {}
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {entry["intervention"]: [Row(**row) for row in entry["rows"]] for entry in entries}


def write(folder: Path, chosen: list[Intervention], results: Path) -> list[Row]:
    """Writes the tables of all rows in the work folder, and returns the rows."""
    selected = {intervention.name for intervention in chosen}
    rows = [
        row
        for example in EXAMPLES
        for name, example_rows in finished(folder, example.name).items()
        if name in selected
        for row in example_rows
    ]
    if rows:
        write_csv(results / "interventions.csv", tables.counts(rows), "cpu")
        write_csv(results / "interventions-reasons.csv", tables.reasons(rows), "cpu")
        good = (judge.EQUAL, judge.ROUNDED, judge.SAME_ERROR)
        lines = [tables.line(row) for row in rows if row.outcome not in good]
        (folder / "not-equal.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def share_of(example: str, chosen: list[Intervention], share: int) -> list[Intervention]:
    """Those of the interventions that an example meets where one pair in ``share`` is run."""
    first = [other.name for other in EXAMPLES].index(example)
    numbers = {intervention.name: number for number, intervention in enumerate(INTERVENTIONS, first)}
    return [intervention for intervention in chosen if numbers[intervention.name] % share == 0]


def run(names: list[str], chosen: list[Intervention], folder: Path, options: argparse.Namespace) -> None:
    """Runs what is missing, ``--jobs`` examples at once, and writes the tables after each."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the server of forks finds what it loads first
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["long_tests.interventions_preload"])
    missing = {}
    for name in names:
        ended = finished(folder, name)
        missing[name] = [
            intervention.name
            for intervention in share_of(name, chosen, options.share)
            if intervention.name not in ended
        ]
    waiting = [
        name
        for name in names
        if any(intervention.ranks == 1 and intervention.name in missing[name] for intervention in chosen)
    ]
    running: dict[Any, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            arguments = (name, missing[name], folder / f"{name}.jsonl", options.seconds)
            process = context.Process(target=work_through, args=arguments)
            process.start()
            running[process.sentinel] = name, process, time.monotonic()
        for sentinel in multiprocessing.connection.wait(list(running)):
            name, process, started = running.pop(sentinel)
            process.join()
            rows = write(folder, chosen, options.results)
            bad = [row for row in rows if row.example == name and row.outcome in judge.BAD]
            took = time.monotonic() - started
            print(f"{name}: {took:.0f} s, {len(bad)} bad cases, ended with {process.exitcode}", flush=True)
            print(*(f"  {tables.line(row)}" for row in bad), sep="\n", flush=True)
    pairs = [
        (name, intervention.name)
        for name in names
        for intervention in chosen
        if intervention.ranks > 1 and intervention.name in missing[name]
    ]
    if pairs:
        on_ranks(pairs, folder)


def main() -> None:
    """Reads the arguments, runs what is missing, writes the tables, judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names, or groups, of interventions to run")
    parser.add_argument("--examples", nargs="*", default=[], help="names of examples; all unless given")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="one Nth of the pairs, evenly")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"the cheap interventions on {', '.join(QUICK)}")
    parser.add_argument("--results", type=Path, default=ROOT / "scripts" / "results", help="folder for the tables")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "interventions", help="folder to go on from")
    parser.add_argument("--seconds", type=float, default=900, help="that one example may take under one intervention")
    options = parser.parse_args()
    chosen = [
        intervention
        for intervention in INTERVENTIONS
        if any(only in intervention.name or only == intervention.group for only in options.only)
    ]
    chosen = [intervention for intervention in chosen if intervention.quick or not options.quick]
    names = options.examples or (list(QUICK) if options.quick else [example.name for example in EXAMPLES])
    folder = options.work / str(environment("cpu")["commit"])
    folder.mkdir(parents=True, exist_ok=True)
    run(names, chosen, folder, options)
    rows = write(folder, chosen, options.results)
    bad = [row for row in rows if row.outcome in judge.BAD]
    blind = tables.blind(rows)
    print(
        f"{len(rows)} cases, {len(bad)} bad: {folder / 'not-equal.txt'}; wrote {options.results / 'interventions.csv'}"
    )
    print(f"change nothing: {', '.join(blind) or 'none'}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
