"""Pages under ``docs/``: their code runs, the files they name exist, and their numbers are those of a run."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = (ROOT / "docs" / "models.md").read_text()
STREAMING = (ROOT / "docs" / "streaming.md").read_text()


@pytest.mark.usefixtures("one_thread")
def test_code_of_the_streaming_page_runs() -> None:
    namespace: dict[str, object] = {}
    found = re.findall(r"^```python\n(.*?)^```", STREAMING, flags=re.MULTILINE | re.DOTALL)
    for block in found:
        exec(compile(block, "docs/streaming.md", "exec"), namespace)
    assert len(found) == 2


def test_adapter_of_the_models_page_is_the_one_in_use() -> None:
    from dit_rope.models import ADAPTERS

    (block,) = re.findall(r"^```python\n(.*?)^```", MODELS, flags=re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {}
    exec(compile(block, "docs/models.md", "exec"), namespace)
    assert namespace["HUNYUAN_VIDEO"] in ADAPTERS


def test_files_named_by_the_streaming_page_exist() -> None:
    named = re.findall(r"`((?:samples|scripts|docs)/[\w./-]+)`", STREAMING) + [
        f"docs/{picture}" for picture in re.findall(r"\]\(([\w.-]+)\)", STREAMING)
    ]
    assert len(named) > 4
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_drift_of_the_streaming_page_is_the_measured_one() -> None:
    with (ROOT / "scripts" / "results" / "key-drift.csv").open() as file:
        measured = {(row["dtype"], row["shifts"]): row for row in csv.DictReader(file)}
    lines = re.findall(r"^\| ([\d,]+) \| (.*) \|$", STREAMING, flags=re.MULTILINE)
    assert len(lines) == 6
    for shifts, cells in lines:
        brain, half, single = (measured[dtype, shifts.replace(",", "")] for dtype in ("bfloat16", "float16", "float32"))
        assert cells.split(" | ") == [
            brain["relative_error"],
            brain["worst_logit_error"],
            half["relative_error"],
            single["relative_error"],
            brain["relative_error_from_raw"],
        ]


def test_drift_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page warns of is there: 16-bit keys drift when they are shifted, and not when they are rotated once."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import key_drift

    monkeypatch.setattr(key_drift, "SHIFTS", (1, 32))
    import torch

    once, often = key_drift.drift(torch.bfloat16)
    assert float(str(often["relative_error"])) > 10 * float(str(once["relative_error"]))
    assert float(str(often["relative_error_from_raw"])) < 2e-3
