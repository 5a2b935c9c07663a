"""The counts of operators: right on modules made by hand, known figures of models, and results for every adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import typer
from torch.nn import functional

import dit_rope
from benchmarks import operator_counts
from benchmarks.operator_counter import Count, OperatorCounter, stored_bytes
from benchmarks.results import read_csv
from dit_rope import Grid, NormKind, RopeSpec
from dit_rope.hooks.plan import make_plan
from dit_rope.models import ADAPTERS
from dit_rope.models.wan import WAN
from measure import count_operators
from zoo import Example, named

ROOT = Path(__file__).resolve().parents[2]
B, S, H, D = 2, 6, 3, 8
HALF_SIZE = torch.bfloat16


@pytest.fixture(autouse=True)
def _quiet(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    dit_rope.cache_clear()
    yield
    dit_rope.cache_clear()


@pytest.fixture
def x() -> torch.Tensor:
    """``[B, S, H, D]`` in bfloat16."""
    return torch.randn(B, S, H, D).to(HALF_SIZE)


def count_of(call: Any) -> Count:
    """What one call runs."""
    counter, count = OperatorCounter(), Count()
    with torch.no_grad(), counter, counter.region(count):
        call()
    return count


def moved(call: Any) -> tuple[int, int]:
    """Kernels and bytes of one call."""
    count = count_of(call)
    return count.kernels, count.bytes


class Attention(torch.nn.Module):
    """Projects, rotates by a broadcast table, multiplies, and projects back."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = (torch.nn.Linear(H * D, H * D, dtype=HALF_SIZE) for _ in range(2))

    def forward(self, hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        q = self.to_q(hidden).unflatten(-1, (H, D)) * table
        q = q.transpose(1, 2)
        return self.to_out(functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))


def test_module_counts_its_own_operators_and_no_product(x: torch.Tensor) -> None:
    """The broadcast table once; on CPU the product returns what ``flatten`` need not copy."""
    table = torch.randn(1, S, 1, D).to(HALF_SIZE)
    count = count_of(lambda: Attention()(x.flatten(2), table))
    assert dict(count.operators)["aten::mul"] == 1
    assert not {name for name in count.operators if "mm" in name or "scaled" in name}
    assert (count.query, count.key) == (x.numel(), x.numel())


def test_broadcast_table_counts_once(x: torch.Tensor) -> None:
    table = torch.randn(1, S, 1, D).to(HALF_SIZE)
    assert moved(lambda: x * table) == (1, 2 * x.nbytes + table.nbytes)
    assert moved(lambda: x * table.expand(B, S, H, D)) == (1, 2 * x.nbytes + table.nbytes)
    assert stored_bytes(table.expand(B, S, H, D)) == table.nbytes


def test_view_is_no_kernel(x: torch.Tensor) -> None:
    assert moved(lambda: x.transpose(1, 2)[..., ::2].unsqueeze(0).chunk(2, dim=-1)) == (0, 0)
    assert moved(lambda: x.flatten(2).reshape(B, S, -1, 2).detach().expand(B, S, -1, 2)) == (0, 0)
    assert moved(lambda: torch.empty_like(x)) == (0, 0)
    # A view that would not fit is a copy.
    assert moved(lambda: x.transpose(1, 2).reshape(B, -1)) == (1, 2 * x.nbytes)


def test_same_argument_counts_once_and_a_strided_one_by_its_elements(x: torch.Tensor) -> None:
    assert moved(lambda: x * x) == (1, 2 * x.nbytes)
    assert moved(lambda: x[..., ::2] + x[..., 1::2]) == (1, 3 * x.nbytes // 2)


def test_overwritten_destination_is_not_read(x: torch.Tensor) -> None:
    y = torch.empty_like(x)
    assert moved(lambda: y.copy_(x)) == (1, 2 * x.nbytes)
    assert moved(lambda: y[..., ::2].copy_(x[..., 1::2])) == (1, x.nbytes)
    assert moved(lambda: y.zero_()) == (1, x.nbytes)
    assert moved(lambda: torch.mul(x, 2, out=y)) == (1, 2 * x.nbytes)
    assert moved(lambda: y.mul_(2)) == (1, 2 * x.nbytes)
    assert moved(lambda: y.addcmul_(x, x)) == (1, 3 * x.nbytes)


def test_change_of_dtype_is_a_kernel(x: torch.Tensor) -> None:
    assert moved(lambda: x.float()) == (1, 3 * x.nbytes)
    assert moved(lambda: x.to(HALF_SIZE)) == (0, 0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_is_one_kernel_where_dtypes_agree(x: torch.Tensor) -> None:
    norm = torch.nn.RMSNorm(D, eps=1e-6, dtype=HALF_SIZE)
    assert moved(lambda: norm(x)) == (1, 2 * x.nbytes)
    assert moved(lambda: functional.rms_norm(x, (D,))) == (1, 2 * x.nbytes)
    assert count_of(lambda: norm(x.float())).kernels > 3


def test_innermost_region_counts(x: torch.Tensor) -> None:
    counter, outer, inner = OperatorCounter(), Count(), Count()
    with counter:
        x * x
        with counter.region(outer):
            x * x
            with counter.region(inner):
                x + x
            with counter.region(None):
                x - x
    x * x
    assert (dict(outer.operators), dict(inner.operators)) == ({"aten::mul": 1}, {"aten::add": 1})


def test_our_operator_counts_one_and_reads_what_its_tokens_use(x: torch.Tensor) -> None:
    """Positions and rows of the tokens, however many rows there are; caches serve as without the counter."""
    table = dit_rope.rope_table(RopeSpec((2, 2, 4)), Grid(1, 2, 3))
    weight = torch.nn.Parameter(torch.ones(D, dtype=HALF_SIZE))
    misses = dit_rope.cache_info().tables.misses

    def call() -> None:
        again = dit_rope.rope_table(RopeSpec((2, 2, 4)), Grid(1, 2, 3))
        dit_rope.norm_rotate_qk(x, x.clone(), again, weight, weight, norm=NormKind.PER_HEAD)

    count = count_of(call)
    used = 2 * S * D // 2 * table.rows.itemsize
    assert dict(count.operators) == {"aten::clone": 1, "dit_rope::norm_rotate": 1}
    assert count.bytes == 2 * x.nbytes + 4 * x.nbytes + used
    assert stored_bytes(table.rows) > used
    assert (list(count.tables.values()), count.largest) == ([used], x.numel())
    assert dit_rope.cache_info().tables.misses == misses


def test_flex_attention_is_a_product_and_comes_back(x: torch.Tensor) -> None:
    original = flex.flex_attention
    q = x.transpose(1, 2)
    count = count_of(lambda: flex.flex_attention(q, q, q))
    assert (count.kernels, count.query) == (0, x.numel())
    with pytest.raises(ZeroDivisionError):
        count_of(lambda: 1 // 0)
    assert flex.flex_attention is original


def wan() -> Example:
    """Narrow, with as many heads as released: how much of the bytes is tables depends on the heads alone."""
    return replace(named("wan"), released={"num_attention_heads": 24})


def test_wan_has_its_known_figures() -> None:
    """Two norms of 2 units; 8 kernels and 15 units for either rotation, and a third of a unit of tables for both."""
    (row,) = count_operators.measure(wan())
    figures = {name: row[name] for name in operator_counts.FIGURES[:5]}
    assert row["module"] == "blocks.*.attn1"
    assert (figures["kernels_before"], figures["kernels_after"]) == (18, 2)
    assert figures["q_units_before"] == "34.3"
    assert 4.0 <= float(figures["q_units_minimum"]) <= float(figures["q_units_after"]) <= 4.2
    assert [row[name] > 0 for name in operator_counts.TABLE_FIGURES] == [True, True, True, False]


def test_hunyuan_video_has_its_known_figures() -> None:
    """97.5 queries of the image alone, where 7 tokens of text follow 56; the unit here has the text in it."""
    example = named("hunyuan-video")
    released = {**example.released, "num_attention_heads": 12, "num_layers": 0}

    def inputs(model: Any, noise: Any) -> dict[str, Any]:
        return {**example.inputs(model, noise), "hidden_states": noise(2, 4, 2, 8, 14)}

    (row,) = count_operators.measure(replace(example, inputs=inputs, released=released))
    assert row["module"] == "single_transformer_blocks.*.attn"
    assert (row["kernels_before"], row["kernels_after"]) == (35, 3)
    assert row["unit_bytes"] == 2 * (56 + 7) * 12 * 128 * 2
    assert float(row["q_units_before"]) * (56 + 7) / 56 == pytest.approx(97.5, abs=0.2)


def test_counting_leaves_a_model_as_it_was() -> None:
    example = wan()
    model = example.build(count_operators.DTYPE)
    inputs = count_operators.inputs_of(example, model)
    plan = make_plan("wan", model, WAN)

    def state() -> list[object]:
        return [(type(m), dict(vars(m)), dict(m._forward_hooks)) for m in model.modules()]

    before = state()
    first = operator_counts.run_steps(plan, lambda: example.run(model, inputs))
    assert set(first[0].attention) == {"blocks.0.attn1", "blocks.1.attn1"}
    assert [(c, list(v), h) for c, v, h in state()] == [(c, list(v), h) for c, v, h in before]
    assert torch.nn.init.kaiming_uniform_.__module__ == "torch.nn.init"


def test_minimum_takes_keys_before_they_are_repeated() -> None:
    before = Count(query=64, key=64)
    before.rotated.update({"norm_q": 64, "norm_k": 16})
    assert operator_counts.minimum(before, Count(tables={(0,): 10})) == (128, 2 * (128 + 32) + 10)
    # Cross-attention: keys are fewer than queries, and all of them rotate.
    before = Count(query=64, key=16)
    before.rotated.update({"norm_added_q": 64, "norm_added_k": 16})
    assert operator_counts.minimum(before, Count()) == (128, 2 * (128 + 32))
    # Without a product that is seen, what the operators of dit_rope rotated.
    assert operator_counts.minimum(Count(), Count(largest=64)) == (128, 2 * (128 + 128))


def test_classes_are_chosen_by_name() -> None:
    chosen = count_operators.chosen(["wan"], every=False)
    names = {example.name for example in chosen}
    assert {"wan", "vace"} <= names
    assert "skyreels-v2" not in names
    assert len({example.model for example in chosen}) == len(chosen)
    flux = count_operators.chosen(["FluxTransformer"], every=True)
    assert [example.name for example in flux][:2] == ["flux", "flux-kontext"]
    with pytest.raises(typer.BadParameter, match="nothing-like-it"):
        count_operators.chosen(["nothing-like-it"], every=False)


def test_program_writes_results_and_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(count_operators, "EXAMPLES", (wan(),))
    monkeypatch.setattr(count_operators, "PICTURE", tmp_path / "operators.svg")
    monkeypatch.setattr("benchmarks.results.RESULTS", tmp_path)
    count_operators.main(["wan"])
    assert "blocks.*.attn1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    count_operators.main()
    rows = read_csv(tmp_path / "operators.csv")
    assert len(rows) == len(ADAPTERS)
    assert (rows[0]["module"], rows[0]["q_units_before"]) == ("blocks.*.attn1", "34.3")
    assert {row["module"] for row in rows[1:]} == {""}
    assert "18 → 2 kernels" in (tmp_path / "operators.svg").read_text()


@pytest.fixture(scope="module")
def committed() -> list[dict[str, str]]:
    """The rows of the repository's results."""
    return read_csv(ROOT / "scripts" / "results" / "operators.csv")


def test_results_cover_every_adapter(committed: list[dict[str, str]]) -> None:
    """Each class that has an example here, with figures where its attention rotates by ours."""
    assert {row["model"] for row in committed} == {adapter.model_class for adapter in ADAPTERS}
    run = {example.model for example in count_operators.EXAMPLES}
    for adapter in ADAPTERS:
        if adapter.model in run:
            modules = [row["module"] for row in committed if row["model"] == adapter.model_class]
            assert all(modules) == bool(adapter.rotations), adapter.model_class


def test_results_move_no_more_than_before(committed: list[dict[str, str]]) -> None:
    for row in committed:
        if row["module"]:
            assert int(row["kernels_after"]) < int(row["kernels_before"]), row
            before, after, least = (float(row[f"q_units_{which}"]) for which in ("before", "after", "minimum"))
            assert least <= after < before, row


@pytest.mark.parametrize(
    ("model", "module", "kernels", "units"),
    [
        ("WanTransformer3DModel", "blocks.*.attn1", (18, 2), 34.3),
        ("FluxTransformer2DModel", "single_transformer_blocks.*.attn", (18, 2), 56.3),
        ("ZImageTransformer2DModel", "layers.*.attention", (22, 2), 54.4),
    ],
)
def test_results_hold_known_figures(
    committed: list[dict[str, str]], model: str, module: str, kernels: tuple[int, int], units: float
) -> None:
    row = next(row for row in committed if (row["model"], row["module"]) == (model, module))
    assert (int(row["kernels_before"]), int(row["kernels_after"])) == kernels
    assert float(row["q_units_before"]) == pytest.approx(units, abs=0.15)
    assert float(row["q_units_after"]) == pytest.approx(4.1, abs=0.1)
