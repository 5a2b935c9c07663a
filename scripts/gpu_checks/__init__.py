"""What ``scripts/gpu_check.py`` and ``scripts/measure/bench_kernels.py`` are made of.

Importing it puts the checkout, its scripts and its tests on the module path, so that nothing has to be installed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = tuple(str(folder) for folder in (ROOT, ROOT / "scripts", ROOT / "tests" / "support"))

sys.path[:0] = [path for path in PATHS if path not in sys.path]
