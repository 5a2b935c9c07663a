"""``scripts/README.md`` has one line for each program: the first of its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_program_is_listed_with_its_first_line() -> None:
    listed = re.findall(r"^\| `(.*\.py)` \| (.*) \|$", (ROOT / "scripts" / "README.md").read_text(), flags=re.MULTILINE)
    programs = {
        str(path.relative_to(ROOT)): (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        for path in (ROOT / "scripts").rglob("*.py")
        if path.name == "__main__.py" or 'if __name__ == "__main__":' in path.read_text()
    }
    assert dict(listed) == {path: summary.replace("``", "`") for path, summary in programs.items()}
    assert len(listed) == len(programs)
