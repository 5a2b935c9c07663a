"""Pages: their code runs, their links, files and commands exist, and their numbers are those of a run."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from typer.testing import CliRunner

import dit_rope
from benchmarks.results import read_csv
from dit_rope import cli
from dit_rope.models import ADAPTERS
from pages import write_measured_tables, write_model_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results"
DOCS = sorted((ROOT / "docs").glob("*.md"))
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "scripts/README.md")]
SAMPLES = sorted((ROOT / "samples").rglob("README.md"))
PAGES = DOCS + TOP + SAMPLES
README = (ROOT / "README.md").read_text()
COMPAT = (ROOT / "docs" / "compat.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
STREAMING = (ROOT / "docs" / "streaming.md").read_text()

CODE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = r"\.ci|\.github|docs|dit_rope|kernels|samples|scripts|tests"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [code for word, code in CODE.findall(page.read_text()) if word == language]


def anchors(page: Path) -> set[str]:
    """Those that GitHub and MyST give the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), flags=re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", heading).lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in names}


@pytest.mark.parametrize("page", [page for page in DOCS + SAMPLES if blocks(page, "python")], ids=name_of)
def test_code_of_every_page_runs_in_order(
    page: Path,
    random_wan: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In an empty folder; every pipeline that a page loads is the random one; lists are printed as comments state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_args, **_kwargs: random_wan)
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    for stated in re.findall(r"^print\(.*\)  # (\[.*\])$", page.read_text(), flags=re.MULTILINE):
        assert stated in printed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_every_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_every_page_names_exist(page: Path) -> None:
    named = re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\w)", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_every_page_names_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", CODE.sub("", page.read_text())) + blocks(page, "shell")
    text = "\n".join(spans)
    known = {command.name: command for command in cli.app.registered_commands}
    options = {name: CliRunner().invoke(cli.app, [name or "", "--help"]).output for name in known}
    for command, arguments in re.findall(r"\bdit-rope (\w+)([^\n#]*)", text):
        assert command in known
        assert [option for option in re.findall(r"(--[\w-]+)", arguments) if option not in options[command]] == []
    goals = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|\s)make ([a-z]+)\b", text, flags=re.MULTILINE)) <= goals
    scripts = re.findall(r"python ((?:scripts|samples)/\S+\.py)", text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for names in re.findall(r"\[([a-z,]+)\]'", text) for extra in names.split(",")} <= set(extras)


def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, exc_type=ImportError)
    call = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api.html").exists()


def test_no_page_is_an_orphan_and_none_is_missing() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = re.findall(r"^([\w-]+)$", CODE.findall(index)[0][1], flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in DOCS if page.stem != "index")
    assert sorted(LINK.findall(index)) == sorted(f"{name}.md" for name in listed)


def test_pictures_are_all_shown() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(page.read_text())}
    assert set((ROOT / "docs").glob("*.svg")) <= shown


def test_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:function|class|exception):: dit_rope\.(\w+)(?:\(\))?$", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(name for name in dit_rope.__all__ if name != "__version__")


def test_tables_of_models_are_those_of_the_adapters() -> None:
    written = write_model_table.with_section(MODELS, write_model_table.compatibility(), "compatibility")
    assert write_model_table.with_section(written, write_model_table.not_patched()) == MODELS
    assert write_model_table.with_section(README, write_model_table.rows()) == README
    assert all(f"| `{adapter.model_class}` |" in README for adapter in ADAPTERS)


def test_no_page_counts_the_classes() -> None:
    """A number would be wrong after the next model."""
    pages = {page.name: re.findall(r"\d+ (?:transformer |supported )?classes\b", page.read_text()) for page in PAGES}
    assert {name: counts for name, counts in pages.items() if counts} == {}


@pytest.mark.parametrize("page", write_measured_tables.PAGES, ids=lambda page: page.name)
def test_measured_tables_are_those_of_the_csv_files(page: Path) -> None:
    assert write_measured_tables.written(page) == page.read_text()


def test_adapter_of_the_models_page_is_the_one_in_use() -> None:
    (block,) = blocks(ROOT / "docs" / "models.md", "python")
    namespace: dict[str, object] = {}
    exec(compile(block, "docs/models.md", "exec"), namespace)
    assert namespace["HUNYUAN_VIDEO"] in ADAPTERS


def test_drift_of_the_streaming_page_is_the_measured_one() -> None:
    measured = {(row["dtype"], row["shifts"]): row for row in read_csv(RESULTS / "key-drift.csv")}
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


def test_functions_of_the_compat_page_exist() -> None:
    rows = re.findall(r"^\| `compat\.(\w+)` \| (.*?) \|", COMPAT, flags=re.MULTILINE)
    assert len(rows) == 4
    for name, functions in rows:
        names = re.findall(r"`(\w+)`", functions)
        module = importlib.import_module(f"dit_rope.compat.{name}")
        has_inplace = "`_inplace`" in functions
        rotations = [name for name in names if name.startswith("apply_rope") or name.startswith("apply_llama")]
        names = [name for name in names if name != "_inplace"] + [
            f"{name}_inplace" for name in rotations if has_inplace
        ]
        assert names
        assert [name for name in names if not callable(getattr(module, name, None))] == []


def test_errors_of_the_compat_page_are_the_measured_ones() -> None:
    measured = {(row["last position"], row["source"]): row for row in read_csv(RESULTS / "long-context-error.csv")}
    head, *rows = re.findall(r"^\| (up to position|[\d,]+) \| (.*) \|$", COMPAT, flags=re.MULTILINE)
    sources = head[1].split(" | ")
    stated = {
        (last.replace(",", ""), source): cell
        for last, cells in rows
        for source, cell in zip(sources, cells.split(" | "), strict=True)
    }
    assert stated == {key: f"{row['error of cos, sin']}, {row['error of a vector']}" for key, row in measured.items()}
    assert {last for last, _ in stated} >= {"100000", "1000000"}


def test_drift_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page warns of is there: 16-bit keys drift when they are shifted, and not when they are rotated once."""
    from measure import key_drift

    monkeypatch.setattr(key_drift, "SHIFTS", (1, 32))
    once, often = key_drift.drift(torch.bfloat16)
    assert float(str(often["relative_error"])) > 10 * float(str(once["relative_error"]))
    assert float(str(often["relative_error_from_raw"])) < 2e-3
