"""Every row of the requirements table has a test that names it."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROWS = 51


def marked_rows(source: str) -> set[int]:
    """Numbers in the ``requirement`` marks of the tests of a file."""
    return {
        argument.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.requirement"
        for argument in decorator.args
        if isinstance(argument, ast.Constant)
    }


def test_every_requirement_has_a_test() -> None:
    rows = set[int]().union(*(marked_rows(path.read_text()) for path in HERE.glob("*.py")))
    assert rows == set(range(1, ROWS + 1))


def test_marks_are_read_from_decorators_alone() -> None:
    assert marked_rows("@pytest.mark.requirement(7)\n@other\ndef test_a(): ...\n# @pytest.mark.requirement(8)") == {7}
