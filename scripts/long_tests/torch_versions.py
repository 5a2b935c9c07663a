"""Runs the tests under other versions of torch than the pinned one.

    python scripts/long_tests/torch_versions.py [--torch 2.9.1 --torch 2.11.0] [--work-dir DIR] [-- -n 4]

Each version gets a virtual environment, with the packages that this torch brings and everything else as
`constraints.txt` pins it. Torch's builds from PyPI are for CUDA on Linux: several GB for each version, which is why
`.ci/run` does without; a GPU is not needed. Every test file runs but those in ``LEFT_OUT``.

Writes ``scripts/results/torch-versions.csv``, a row per version, after each of them. Exits with 1 where a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import Row, environment, read_csv, write_rows

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "scripts" / "results" / "torch-versions.csv"
# The lowest that is declared, and one between it and the one that CI runs.
VERSIONS = ("2.9.1", "2.11.0")
LEFT_OUT = {
    "repository": "reads files of the repository, whatever torch is",
    "scripts": "is about a program of scripts/",
    "cli": "is about a program of the command line",
    "samples": "compares files that the pinned torch made",
    "hooks/test_known_code.py": "reads the source of diffusers, whatever torch is",
    **dict.fromkeys(
        [f"backends/test_{name}.py" for name in ("cuda_compile", "cuda_kernels", "triton_compile")],
        "is about compilers that torch does not have",
    ),
}
"""Folders and files of ``tests/`` whose outcome does not depend on the version of torch, and why."""


def chosen_tests() -> list[str]:
    """Every test file that runs."""
    files = [path.relative_to(ROOT / "tests") for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    return [f"tests/{path}" for path in files if str(path) not in LEFT_OUT and path.parts[0] not in LEFT_OUT]


def constraints(pins: str, installed: Sequence[str]) -> list[str]:
    """Constraints of pip beside an installed torch: torch's packages stay, all others are as pinned.

    Args:
        pins: the text of ``constraints.txt``.
        installed: ``name==version`` of every package that is there.
    """
    names = {_name(line) for line in installed}
    others = [line for line in pins.splitlines() if "==" in line and not line.startswith("#")]
    pinned = [line for line in installed if _name(line) not in _OF_VENV]
    return [*pinned, *(line for line in others if _name(line) not in names)]


_OF_VENV = ("pip", "setuptools")
"""What a virtual environment starts with, in versions that torch may not want."""


def _name(pin: str) -> str:
    return re.sub(r"[-_.]+", "-", pin.partition("==")[0].strip()).lower()


def make_environment(torch: str, folder: Path) -> Path:
    """A virtual environment with this torch and what ``dit-rope[dev]`` needs; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", f"torch=={torch}"], check=True)
    listed = subprocess.run([*pip, "list", "--format", "freeze"], check=True, capture_output=True, text=True).stdout
    limits = folder / "constraints.txt"
    limits.write_text("\n".join(constraints((ROOT / "constraints.txt").read_text(), listed.splitlines())))
    subprocess.run([*pip, "install", "-c", str(limits), f"torch=={torch}", "-e", f"{ROOT}[dev]"], check=True)
    return python


def run_tests(python: Path, options: Sequence[str], report: Path) -> Row:
    """Runs the tests in one environment; how many passed, failed and were skipped, in how many seconds."""
    started = time.monotonic()
    command = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([*command, f"--junit-xml={report}", *options, *chosen_tests()], cwd=ROOT, env=paths)
    if process.returncode not in (0, 1):
        raise SystemExit(f"pytest must run the tests, got exit code {process.returncode} under {python}")
    seconds = time.monotonic() - started
    return {**counts(report.read_text()), "seconds": round(seconds)}


def counts(report: str) -> dict[str, int]:
    """Passed, failed and skipped tests of one JUnit report."""
    suite = next(ElementTree.fromstring(report).iter("testsuite"))
    total, *others = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    failed, skipped = others[0] + others[1], others[2]
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def versions_of(python: Path) -> Row:
    """Versions of what decides most, as the environment itself says."""
    program = (
        "import json, platform, torch, triton; "
        "print(json.dumps({'triton': triton.__version__, 'cuda': torch.version.cuda or '', "
        "'torch': torch.__version__, 'python': platform.python_version()}))"
    )
    versions: Row = json.loads(subprocess.run([python, "-c", program], check=True, capture_output=True).stdout)
    return versions


def main() -> None:
    """Tests under every version asked for, and writes the rows so far after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", help=f"a version; by default {', '.join(VERSIONS)}")
    parser.add_argument("--work-dir", type=Path, help="where environments are made and kept, and found again")
    parser.add_argument("options", nargs="*", help="options of pytest, after --")
    arguments = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        for torch in arguments.torch or VERSIONS:
            folder = (arguments.work_dir or Path(temporary)) / f"torch-{torch}"
            python = folder / "bin" / "python"
            if not python.exists():
                make_environment(torch, folder)
            row = {**versions_of(python), **run_tests(python, arguments.options, folder / "report.xml")}
            write_row(RESULT, row)
            failed += [torch] if row["failed"] else []
            if arguments.work_dir is None:
                shutil.rmtree(folder)
    print(f"wrote {RESULT.relative_to(ROOT)}; tests fail under: {', '.join(failed) or 'none'}")
    if failed:
        raise SystemExit(1)


def write_row(path: Path, row: Row) -> None:
    """Puts a row in the place of the one of its version of torch; rows of other versions stay."""
    measured = environment("cpu")
    machine = {name: measured[name] for name in ("device", "cuda", "torch", "python", "commit")}
    earlier = [old for old in (read_csv(path) if path.exists() else ()) if old["torch"] != row["torch"]]
    rows = sorted([*earlier, {**machine, **row}], key=lambda row: [int(n) for n in re.findall(r"\d+", row["torch"])])
    write_rows(path, rows, machine)


if __name__ == "__main__":
    main()
