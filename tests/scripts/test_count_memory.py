"""Live bytes are counted exactly: what is alive, once for each memory, and only what was made meanwhile."""

from __future__ import annotations

import pytest
import torch

from benchmarks.live_memory import LiveMemory
from benchmarks.results import RESULTS, read_csv
from dit_rope.models import ADAPTERS
from measure import count_memory
from zoo import EXAMPLES, named

BYTES = 4 * 1000


def test_peak_is_what_lives_at_once() -> None:
    x = torch.ones(1000)
    with LiveMemory() as memory:
        y = x + 1
        z = y * 2
        assert memory.bytes() == 2 * BYTES
        del y
        z = z + 1  # three live while it runs: the old z, the new one, and no y
        assert memory.bytes() == BYTES
        del z
        assert memory.bytes() == 0
    assert memory.peak == 2 * BYTES


def test_views_and_writes_share_memory_and_what_was_there_counts_not() -> None:
    x = torch.ones(1000)
    with LiveMemory() as memory:
        x.add_(1)
        view = x.view(10, 100)[2:].transpose(0, 1)
        assert memory.bytes() == 0
        y = view.contiguous()
        part = y[:10]
        del y
        assert memory.bytes() == 800 * 4  # the view holds all of it
        del part
    assert memory.peak == 800 * 4


def test_a_kernel_of_a_gpu_counts_by_its_result() -> None:
    x = torch.ones(10, 100)
    with LiveMemory() as memory:
        torch.nn.functional.rms_norm(x, (100,))
        torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
    assert memory.peak == BYTES


def test_peaks_of_parts_are_those_while_they_run() -> None:
    class Part(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = torch.cat((x, x, x))
            return wide[:1000] + 0.0

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.part(x + 1)
            return torch.cat((x, x, x, x, x))

    whole, x = Whole(), torch.ones(1000)
    peaks = count_memory.peaks({"part": whole.part}, lambda: whole(x))
    assert peaks == {"": 6 * BYTES, "part": 5 * BYTES}  # its input, the wide one, its result


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("transformer_blocks.0.attn", "transformer_blocks.0"),
        ("double_stream_blocks.3.block.attn1", "double_stream_blocks.3"),
        ("visual_transformer_blocks.1.video_dec_block.self_attention", "visual_transformer_blocks.1"),
        ("blocks.2.attn.attn", "blocks.2"),
    ],
)
def test_block_is_what_is_numbered(path: str, block: str) -> None:
    assert count_memory.block_of(path) == block


def test_a_patch_does_not_raise_the_peak_of_a_small_model() -> None:
    rows = count_memory.measure(named("flux"))
    assert [row["part"] for row in rows] == ["step", "transformer_blocks.*", "single_transformer_blocks.*"]
    for row in rows:
        assert 1 < row["units_after"] < row["units_before"]


def test_committed_counts_have_every_class_and_no_peak_that_rose() -> None:
    rows = read_csv(RESULTS / "peak-memory.csv")
    run = {example.model for example in EXAMPLES}
    assert {row["model"] for row in rows} == {a.model_class for a in ADAPTERS if a.rotations and a.model in run}
    for row in rows:
        assert float(row["units_after"]) <= float(row["units_before"]) * 1.01, row
