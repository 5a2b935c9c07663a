"""Runs the tests of the launch over versions of cuda-core and cuda-bindings, and writes their outcomes.

    python scripts/long_tests/cuda_core_versions.py
    python scripts/long_tests/cuda_core_versions.py --pair 1.0.1 13.2.0

Needs a C compiler and a network or a cache of pip's, and no GPU: the driver is the stub of
``tests/support/stub_driver.py``. Each pair is installed into a temporary folder that comes before the environment's own
packages; NVRTC is that of the environment. Where the CUDA backend declines a version, the tests are skipped, and the
note says why.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

import stub_driver
from benchmarks.results import Row, write_results

ROOT = Path(__file__).resolve().parents[2]
PAIRS = (
    ("0.5.1", "13.0.3"),
    ("0.6.0", "13.0.3"),
    ("0.7.0", "13.2.0"),
    ("1.0.1", "13.0.3"),
    ("1.1.1", "13.2.0"),
    ("1.2.2", "13.0.3"),
    ("1.2.2", "13.5.0"),
)
"""cuda-core from the newest that is declined to the newest, beside the oldest and the newest bindings that it takes."""
BUILD = "import stub_driver, pathlib, sys; stub_driver.build(pathlib.Path(sys.argv[1]))"


def tested(core: str, bindings: str) -> Row:
    """One row: how many tests passed, failed and were skipped over these versions."""
    counts, note = dict.fromkeys(("passed", "failed", "skipped"), 0), ""
    with tempfile.TemporaryDirectory() as folder:
        packages, stub = Path(folder, "packages"), Path(folder, "stub")
        names = [f"cuda-core=={core}", f"cuda-bindings=={bindings}"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *names]
        subprocess.run(pip, check=True)
        paths = {"PYTHONPATH": ":".join(map(str, (packages, ROOT, ROOT / "tests" / "support")))}
        environment = stub_driver.environment(stub) | paths
        subprocess.run([sys.executable, "-c", BUILD, str(stub)], env=environment, check=True)
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "--color=no", "-p", "no:cacheprovider"]
        process = subprocess.run(
            [*command, "tests/backends/launch_over_stub.py"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    for number, outcome in re.findall(r"(\d+) (passed|failed|skipped)", process.stdout.splitlines()[-1]):
        counts[outcome] = int(number)
    if counts["failed"] or process.returncode:
        print(process.stdout[-8000:], process.stderr[-2000:], sep="\n")
        note = f"pytest ended with {process.returncode}"
    elif counts["skipped"]:
        note = "declined: " + re.findall(r"launch_over_stub\.py:\d+: (.*)", process.stdout)[0]
    print(core, bindings, counts, note, flush=True)
    return {"cuda_core": core, "cuda_bindings": bindings, **counts, "note": note}


def main() -> None:
    """Prints a line for each pair and writes ``results/cuda-core-versions.csv``; exit code 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", nargs=2, action="append", metavar=("CORE", "BINDINGS"), help="versions to try in place of the usual"
    )
    arguments = parser.parse_args()
    reason = stub_driver.why_not()
    if reason is not None:
        parser.exit(2, f"{reason}\n")
    rows = [tested(*pair) for pair in arguments.pair or PAIRS]
    if not arguments.pair:
        print(write_results("cuda-core-versions", rows))
    if any(row["failed"] or str(row["note"]).startswith("pytest") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
