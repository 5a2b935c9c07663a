"""Writes the tables of figures into the pages of docs/, from the CSV files in scripts/results.

python scripts/pages/write_measured_tables.py
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.results import read_csv
from pages.write_model_table import with_section

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results"
NUMERICS, PERFORMANCE, GPU = PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("numerics", "performance", "gpu"))

Row = Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """One table of a page.

    Attributes:
        name: of the marks between which it stands.
        results: the CSV file it is of, without its ending.
        command: what writes that file; empty where it holds predictions, which nothing measures.
        columns: what each shows, by its heading, in the form of ``str.format``, numbers as numbers.
        where: values that a row must have, or one of those given, by column.
        across: the column whose values become columns, in their order in the file.
        cell: what those columns show.
    """

    name: str
    results: str
    command: str
    columns: Mapping[str, str]
    where: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    across: str | None = None
    cell: str = ""

    def text(self) -> str:
        """The table, and where it comes from.

        Raises:
            ValueError: when no row is left.
        """
        rows = [row for row in read_csv(RESULTS / f"{self.results}.csv") if self._selects(row)]
        if not rows:
            raise ValueError(f"where must leave rows of {self.results}.csv, got {dict(self.where)}")
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            line = cells.setdefault(tuple(filled(form, row) for form in self.columns.values()), {})
            if self.across is not None:
                line[number(row[self.across])] = filled(self.cell, row)
        headings = list(self.columns) + list(dict.fromkeys(name for line in cells.values() for name in line))
        lines = [headings, ["---"] * len(headings)]
        lines += [[*key, *(line.get(name, "") for name in headings[len(key) :])] for key, line in cells.items()]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + self._source(rows[0])

    def _selects(self, row: Row) -> bool:
        return all(row[name] in ((value,) if isinstance(value, str) else value) for name, value in self.where.items())

    def _source(self, row: Row) -> str:
        if not self.command:
            return f"\nPredictions, in `scripts/results/{self.results}.csv`.\n"
        threads = f"{row['threads']} thread{'' if row['threads'] == '1' else 's'}"
        machine = f"{row['device']}, {threads}, torch {row['torch']}, Python {row['python']}"
        source = f"`{self.command}` wrote `scripts/results/{self.results}.csv`: {machine}."
        return f"\n{textwrap.fill(source, 120)}\n"


def filled(form: str, row: Row) -> str:
    """``form`` with the values of a row in it; nothing where one of them is missing."""
    values: dict[str, float | str] = {}
    for name, text in row.items():
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = text
    try:
        return form.format_map(values)
    except ValueError:  # a number was wanted and there is none
        return ""


def number(text: str) -> str:
    """Whole numbers with commas, and anything else as it is."""
    return f"{int(text):,}" if text.isdecimal() else text


_PREDICTED = {"results": "gpu-predictions", "command": ""}
_ERRORS = {"results": "errors-cpu", "command": "python scripts/measure/measure_errors.py"}
_ROUNDING = "python scripts/measure/measure_rounding.py"
_BOTH_ERRORS = "{largest error:.1e}, {rms error:.1e}"
_END_TO_END = "python scripts/measure/bench_end_to_end.py"
_BENCH = "dit-rope bench --device cpu"
TABLES: Mapping[Path, tuple[Measured, ...]] = {
    NUMERICS: (
        Measured(
            "errors",
            columns={"operation": "{operation}", "dtype": "{dtype}", "pairs": "{pairing}"},
            where={"last position": "100000"},
            across="code",
            cell=_BOTH_ERRORS,
            **_ERRORS,
        ),
        Measured(
            "error lengths",
            columns={"dtype": "{dtype}", "code": "{code}"},
            where={"operation": "norm and rotate", "pairing": "interleaved", "code": ("eager", "fast")},
            across="last position",
            cell=_BOTH_ERRORS,
            **_ERRORS,
        ),
        Measured(
            "roundings",
            results="rounding",
            command=_ROUNDING,
            columns={
                "dtype": "{dtype}",
                "rounding": "{rounding}",
                "examples that are equal": "{equal:.0f} of {examples:.0f}",
                "different elements, median": "{median different:.2%}",
                "most": "{most different:.3%}",
                "largest difference, in units": "{largest difference:g}",
            },
        ),
        Measured(
            "roundings of a video",
            results="rounding-tiny-wan",
            command=_ROUNDING,
            columns={
                "rounding": "{rounding}",
                "SSIM, lowest of a frame": "{ssim min:.6f}",
                "mean": "{ssim mean:.6f}",
                "largest difference of a pixel (0 to 1)": "{largest difference:.2g}",
            },
        ),
    ),
    GPU: (
        Measured(
            "predicted shares",
            columns={"share of copy": "{operation}", "target": "{target_of_copy:.0%}"},
            where={"shape": ("wan-1.3b-480p", "wan-14b-720p", "hunyuan-video-720p")},
            across="shape",
            cell="{of_copy_low:.0%} to {of_copy_high:.0%}",
            **_PREDICTED,
        ),
        Measured(
            "predicted peers",
            columns={"times the best peer": "{operation}", "target": "{target_times_best_peer:.1f}"},
            where={"shape": ("wan-1.3b-480p", "wan-14b-720p", "hunyuan-video-720p")},
            across="shape",
            cell="{times_best_peer_low:.2f} to {times_best_peer_high:.2f}",
            **_PREDICTED,
        ),
        Measured(
            "predicted host time",
            columns={"microseconds of host time": "{operation}", "target": "{target_host_us:.0f}",
                     "predicted": "{host_us_low:.0f} to {host_us_high:.0f}"},
            where={"shape": "host"},
            **_PREDICTED,
        ),
    ),
    PERFORMANCE: (
        Measured(
            "shares",
            "end-to-end-cpu",
            _END_TO_END,
            {"model": "{model}", "tokens": "{grid}", "dtype": "{dtype}", "attention": "{share_attention:.1%}",
             "matrix products": "{share_matrix_products:.1%}", "tables": "{share_tables:.1%}",
             "rotation": "{share_rotation:.1%}", "norms of q and k": "{share_q_and_k_norms:.1%}"},
            where={"mode": "eager", "steps": "50", "variant": "unpatched"},
        ),
        Measured(
            "gains",
            "end-to-end-cpu",
            _END_TO_END,
            {"model": "{model}", "tokens": "{grid}", "dtype": "{dtype}"},
            where={"mode": "eager", "steps": "50"},
            across="variant",
            cell="{ratio:.3f}",
        ),
        Measured(
            "defaults",
            "end-to-end-cpu",
            _END_TO_END,
            {"model": "{model}", "tokens": "{grid}", "dtype": "{dtype}", "mode": "{mode}", "steps": "{steps:.0f}",
             "ms a pass (p20 to p80)": "{ms_median:,.0f} ({ms_p20:,.0f} to {ms_p80:,.0f})",
             "speedup of the whole run": "{run_ratio:.3f}", "verdict": "{verdict}"},
            where={"default": "True"},
        ),
        Measured(
            "steps",
            "bench-cpu/step",
            _BENCH,
            {"what is patched": "{variant}",
             "ms a step (p20 to p80)": "{ms_median:,.0f} ({ms_p20:,.0f} to {ms_p80:,.0f})",
             "speedup": "{ratio:.3f}", "verdict": "{verdict}"},
        ),
        Measured(
            "step shares",
            "bench-cpu/step",
            _BENCH,
            {"layers": "{layers:.0f}", "tokens": "{grid}", "dtype": "{dtype}", "attention": "{share_attention:.1%}",
             "matrix products": "{share_matrix_products:.1%}", "tables": "{share_tables:.1%}",
             "rotation": "{share_rotation:.1%}", "norms of q and k": "{share_q_and_k_norms:.1%}",
             "other norms": "{share_other_norms:.1%}", "elementwise": "{share_elementwise:.1%}"},
            where={"variant": "unpatched"},
        ),
        Measured(
            "rotation",
            "bench-cpu/rotation",
            _BENCH,
            {"shape": "{shape}", "tokens": "{tokens:,.0f}", "dtype": "{dtype}", "operation": "{operation}"},
            where={"variant": ("copy", "model, eager", "model, compiled", "dit_rope", "dit_rope, exact")},
            across="variant",
            cell="{ms_median:.2f}",
        ),
        Measured(
            "builds",
            "bench-cpu/tables",
            _BENCH,
            {"tokens": "{tokens:,.0f}"},
            where={"quantity": "cold build"},
            across="variant",
            cell="{median:.3g} ({p20:.3g} to {p80:.3g})",
        ),
        Measured(
            "hits",
            "bench-cpu/tables",
            _BENCH,
            {"call": "`{variant}`", "microseconds (p20 to p80)": "{median:.2f} ({p20:.2f} to {p80:.2f})"},
            where={"quantity": "hit"},
        ),
        Measured(
            "bytes",
            "bench-cpu/tables",
            _BENCH,
            {"81 frames at": "{case}"},
            where={"quantity": "bytes"},
            across="variant",
            cell="{median:,.0f}",
        ),
        Measured(
            "rope modules",
            "bench-cpu/tables",
            _BENCH,
            {"module": "{case}"},
            where={"quantity": "rope module", "case": (
                "HunyuanVideo, 720p, 129 frames", "LTX, 512 x 768, 97 frames", "QwenImage, 1328 x 1328",
                "CogView4, 1024 x 1024", "Cosmos, 704 x 1280, 121 frames")},
            across="variant",
            cell="{median:.3g}",
        ),
        Measured(
            "host time",
            "host-time-cpu",
            "python scripts/measure/bench_host_time.py --beside DIR",
            {"microseconds of a call": "{call}"},
            across="package",
            cell="{us_median:.1f} ({us_p20:.1f} to {us_p80:.1f})",
        ),
        Measured(
            "rope modules on the host",
            "rope-module-host-time-cpu",
            "python scripts/measure/bench_host_time.py --rope-modules",
            {"model": "`{model}`"},
            where={"model": (
                "FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImage21Transformer2DModel",
                "Lumina2Transformer2DModel", "LTX2VideoTransformer3DModel", "Kandinsky5Transformer3DModel",
                "Kandinsky6Transformer3DModel", "HeliosTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel",
                "MiniMaxH3Transformer3DModel", "Cosmos3OmniTransformer")},
            across="call",
            cell="{us_median:,.0f}",
        ),
        Measured(
            "operators",
            "operators",
            "python scripts/measure/count_operators.py",
            {"model": "`{model}`", "module": "`{module}`",
             "operators": "{kernels_before:.0f} to {kernels_after:.0f}",
             "bytes, in units of a query": "{q_units_before:.1f} to {q_units_after:.1f}",
             "least possible": "{q_units_minimum:.1f}"},
            where={"example": ("wan", "hunyuan-video", "flux", "qwen-image", "ltx-padded", "cogvideox-1.0", "mochi")},
        ),
        Measured(
            "peaks",
            "peak-memory",
            "python scripts/measure/count_memory.py",
            {"model": "`{model}`", "part": "`{part}`", "unpatched": "{units_before:.1f}",
             "patched": "{units_after:.1f}"},
            where={"example": ("wan", "hunyuan-video", "flux", "qwen-image", "ltx-padded", "cogvideox-1.0", "mochi")},
        ),
        Measured(
            "graphs",
            "compiled-graphs",
            "python scripts/measure/count_graphs.py",
            {"example": "{example}", "compiled": "{compiled}", "graphs unpatched": "{graphs_unpatched}",
             "patched": "{graphs_patched}", "breaks by the patch": "{break_reasons_of_the_patch:.0f}"},
            where={"example": ("wan", "flux", "qwen-image")},
        ),
        Measured(
            "resources",
            "cuda-resources",
            "python scripts/gpu_checks/cuda_resources.py",
            {"kernel": "`{plan}`", "registers": "{registers:.0f}", "spilled bytes": "{spill_bytes:.0f}",
             "resident threads of a processor": "{resident_threads:,.0f}", "instructions": "{instructions:,.0f}"},
            where={"arch": "sm_90", "plan": (
                "rotate-wan-1.3b-interleaved-bfloat16", "exact-wan-1.3b-interleaved-bfloat16",
                "norm-per-head-wan-1.3b-interleaved-bfloat16", "norm-across-heads-wan-1.3b-interleaved-bfloat16")},
        ),
    ),
}  # fmt: skip


def written(page: Path) -> str:
    """The text of a page, with its tables as the files have them now."""
    text = page.read_text()
    for table in TABLES[page]:
        text = with_section(text, table.text(), table.name)
    return text


def main() -> None:
    """Rewrites the pages."""
    for page in PAGES:
        page.write_text(written(page))


if __name__ == "__main__":
    main()
