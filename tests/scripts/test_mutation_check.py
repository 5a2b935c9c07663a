"""The mutation check itself: its faults fit the source, and it tells a fault that tests see from one they do not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import read_csv
from long_tests.mutation import Mutation
from long_tests.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]


SOURCE = "def add(a, b):\n    # a sum\n    return a + b\n"
TEST = "from tiny import add\n\n\ndef test_add():\n    assert add(2, 2) == 4\n"
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
from long_tests.mutation import Mutation
from long_tests.mutation_check import check
made = lambda name, old, new, why="": Mutation(name, "tiny.py", old, new, ("test_tiny.py",), equivalent=why)
mutations = [{mutations}]
root, work = Path({root!r}), Path({work!r})
for test in {tests!r}:
    (root / "test_tiny.py").write_text(test)
    print("RUN")
    for name, outcome in check(mutations, root, work, copied=("tiny.py", "test_tiny.py"), jobs=2, timeout=100).items():
        print("RESULT", name, outcome.result, outcome.by)
"""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_applies_once_to_the_source_and_is_python(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    compile(mutation.applied(source), mutation.file, "exec")
    assert all((ROOT / test).is_file() for test in mutation.tests)


def test_committed_run_caught_every_mutation() -> None:
    outcomes = {row["mutation"]: row["result"] for row in read_csv(ROOT / "scripts" / "results" / "mutations.csv")}
    explained = {mutation.name for mutation in MUTATIONS if mutation.equivalent}
    assert outcomes == {m.name: "equivalent" if m.name in explained else "caught" for m in MUTATIONS}


def test_programs_import_one_another_in_one_direction() -> None:
    """Together they would be two modules with two classes of one name, one of them ``__main__``."""
    names = ("mutation", "mutations", "mutations_hooks", "mutations_inputs")
    sources = {name: (ROOT / "scripts" / "long_tests" / f"{name}.py").read_text() for name in names}
    assert not any(re.search(r"(from|import) (long_tests\.)?mutation_check", source) for source in sources.values())
    assert "import mutation" not in sources["mutation"]
    assert not re.search(
        r"(from|import) (long_tests\.)?mutations\b", sources["mutations_hooks"] + sources["mutations_inputs"]
    )


def test_there_are_many_mutations_of_many_modules() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 60
    assert len({mutation.file for mutation in MUTATIONS}) >= 15


@pytest.mark.parametrize("text", ["", "x = 1\nx = 1\n"])
def test_mutation_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one must find its text once in a.py"):
        Mutation("one", "a.py", "x = 1", "x = 2", ()).applied(text)


def run(tmp_path: Path, mutations: str, *tests: str) -> subprocess.CompletedProcess[str]:
    """Mutation checks of a tiny tree, one with each text of its test."""
    root, work = tmp_path / "root", tmp_path / "work"
    root.mkdir()
    work.mkdir()
    (root / "tiny.py").write_text(SOURCE)
    program = PROGRAM.format(
        scripts=str(ROOT / "scripts"), mutations=mutations, root=str(root), work=str(work), tests=tests
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert (root / "tiny.py").read_text() == SOURCE
    return process


def test_harmless_change_survives_and_a_fault_is_caught_and_neither_runs_twice(tmp_path: Path) -> None:
    mutations = (
        'made("harmless", "# a sum", "# the sum"), made("fault", "a + b", "a - b"), '
        'made("broken", "return", "return )"), '
        'made("explained", "a + b", "b + a", "a sum has no order")'
    )
    process = run(tmp_path, mutations, TEST, TEST)
    assert process.returncode == 0, process.stderr
    _, first, again = process.stdout.split("RUN\n")
    results = [line.split()[1:] for line in first.splitlines() if line.startswith("RESULT")]
    assert results == [
        ["harmless", "survived"],
        ["fault", "caught", "test_tiny.py::test_add"],
        ["broken", "caught", "test_tiny.py"],
        ["explained", "equivalent"],
    ]
    assert "4 known from earlier runs" in again
    assert [line.split()[1:] for line in again.splitlines() if line.startswith("RESULT")] == results


def test_tests_that_fail_without_a_mutation_prove_nothing(tmp_path: Path) -> None:
    process = run(tmp_path, 'made("fault", "a + b", "a - b")', TEST.replace("== 4", "== 5"))
    assert process.returncode == 1
    assert "tests must pass without a mutation" in process.stderr
    assert "RESULT" not in process.stdout


def test_change_of_the_tests_is_a_new_question(tmp_path: Path) -> None:
    mutations = 'made("product", "a + b", "a * b")'
    process = run(tmp_path, mutations, TEST, TEST.replace("add(2, 2) == 4", "add(2, 3) == 5"))
    _, first, changed = process.stdout.split("RUN\n")
    assert "RESULT product survived" in first
    assert "RESULT product caught" in changed
