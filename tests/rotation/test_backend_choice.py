"""Which backend takes a call; and the CUDA backend, its kernels run on CPU, behind everything that calls it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dit_rope
from dit_rope import (
    Grid,
    NormKind,
    RopeSpec,
    RopeTable,
    Scaling,
    norm_rotate,
    norm_rotate_qk,
    rope_table,
    rotate,
    rotate_qk,
)
from dit_rope.rotation import api, ops
from dit_rope.rotation import choice as backend_choice
from dit_rope.rotation.choice import BACKENDS, MODULES, choose_backend, explain_backends
from dit_rope.rotation_args import Norm, NormRounding
from oracle import rms_norm
from oracle import rotate as rotate_oracle
from tolerance import assert_within

ACROSS = NormKind.ACROSS_HEADS


class OnGpu:
    """As much of a tensor on a GPU as is asked before a backend is."""

    device = torch.device("cuda")


class Watching(TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def table() -> RopeTable:
    dit_rope.cache_clear()  # a table remembers which backend took a layout, and the emulated one comes and goes
    return rope_table(RopeSpec((8, 4, 4)), Grid(2, 3, 4))


def queries_and_keys(**options: Any) -> list[torch.Tensor]:
    return [torch.randn(1, 24, heads, 16, **options) for heads in (4, 2)]


def test_backends_are_asked_from_the_fastest_on(table: RopeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BACKENDS == ("cuda", "triton", "eager")
    xs = [x.to("meta") for x in queries_and_keys()]
    gpu = [torch.empty_like(x) for x in xs]
    names: list[str] = []
    for name in ("cuda", "triton"):
        monkeypatch.setattr(MODULES[name], "declined", lambda xs, args, norm=None, name=name: names.append(name))

    assert choose_backend([OnGpu()], table.args()) == "cuda"  # type: ignore[list-item]
    assert names == ["cuda"]
    assert choose_backend(gpu, table.args()) == "eager"


def test_choose_backend_falls_through_those_that_decline(table: RopeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULES["cuda"], "declined", lambda xs, args, norm=None: "no")
    monkeypatch.setattr(MODULES["triton"], "declined", lambda xs, args, norm=None: None)
    assert choose_backend([OnGpu()], table.args()) == "triton"  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got 'cuda', which declines: no"):
        choose_backend([OnGpu()], table.args(), "cuda")  # type: ignore[list-item]
    monkeypatch.setattr(MODULES["triton"], "declined", lambda xs, args, norm=None: "nor I")
    assert choose_backend([OnGpu()], table.args()) == "eager"  # type: ignore[list-item]


def test_choice_and_reasons_are_logged_once_for_each_kind_of_call(
    table: RopeTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend_choice, "_logged", set())
    monkeypatch.setattr(MODULES["cuda"], "declined", lambda xs, args, norm=None: "no GPU")
    monkeypatch.setattr(MODULES["triton"], "declined", lambda xs, args, norm=None: "no Triton")
    monkeypatch.setattr(backend_choice, "_is_eager", lambda xs, backend: False)
    (q, k), args = queries_and_keys(), table.args()
    choose_backend([q, k], args)
    assert not caplog.messages
    with caplog.at_level(logging.DEBUG, "dit_rope"):
        for length in (24, 12):
            choose_backend([q[:, :length], k[:, :length]], args)
        choose_backend([q], args, norm=NormKind.PER_HEAD)
    assert {record.name for record in caplog.records} == {"dit_rope.rotation.choice"}
    reasons = "torch.float32 on cpu; cuda declines: no GPU; triton declines: no Triton"
    assert caplog.messages == [
        f"eager rotates 4 and 2 heads of 16 channels, {reasons}",
        f"eager norms (per_head) and rotates 4 heads of 16 channels, {reasons}",
    ]


def test_explain_backends_gives_a_reason_for_each_that_is_not_chosen() -> None:
    verdicts = dict(explain_backends("cpu"))
    assert verdicts["eager"] == "chosen"
    assert "NVIDIA" in verdicts["cuda"]
    assert "GPU" in verdicts["triton"]


def test_cuda_is_refused_by_name_where_there_is_none(table: RopeTable) -> None:
    q, k = queries_and_keys()
    with pytest.raises(ValueError, match="got 'cuda', which declines: device must be an NVIDIA GPU, got cpu"):
        rotate_qk(q, k, table, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_rotate_on_cuda_is_as_accurate_as_float32(
    cuda_on_cpu: object, table: RopeTable, dtype: torch.dtype
) -> None:
    q, k = queries_and_keys(dtype=dtype)
    weights = [torch.randn(x.shape[2] * 16).to(dtype) for x in (q, k)]
    outs = norm_rotate_qk(q, k, table, *weights, norm=ACROSS, backend="cuda")
    naive = norm_rotate_qk(q.float(), k.float(), table, *(w.float() for w in weights), norm=ACROSS, backend="eager")
    cos, sin = table.cos_sin(repeat=False)
    for x, weight, out, float32 in zip((q, k), weights, outs, naive, strict=True):
        exact = rotate_oracle(rms_norm(x, weight, 1e-6, across_heads=True), cos, sin, interleaved=True)
        assert_within(out, exact, float32)


@pytest.mark.parametrize("backend", ["cuda", "eager"])
def test_scaled_tables_rotate_on_every_backend(cuda_on_cpu: object, backend: str) -> None:
    """Scaled frequencies, and a magnitude that is not 1, are numbers in the table like any other."""
    yarn = Scaling.of("yarn", factor=4.0, original_max_position_embeddings=64)
    spec = RopeSpec((8, 4, 4), scaling=(Scaling.of("riflex", frames=40, repetition=20), yarn, None))
    table = rope_table(spec, Grid(2, 3, 4, start_frame=5))
    cos, sin = table.cos_sin(repeat=False)
    assert (cos.square() + sin.square()).max() > 1.1
    q, k = queries_and_keys()
    eager_code = rotate_qk(q, k, table, exact=True, backend="eager")
    for x, naive, out in zip((q, k), eager_code, rotate_qk(q, k, table, backend=backend), strict=True):
        assert_within(out, rotate_oracle(x, cos, sin, interleaved=True), naive)


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_on_cuda_equal_those_of_eager(cuda_on_cpu: object, table: RopeTable, exact: bool) -> None:
    """Fast gradients come from the kernel too: the inverse rotation, in float32 for both."""
    results = {}
    for backend in ("cuda", "eager"):
        torch.manual_seed(3)
        leaves = [x.requires_grad_() for x in queries_and_keys()]
        weights = [torch.randn(x.shape[2] * 16, requires_grad=True) for x in leaves]
        q, k = rotate_qk(*leaves, table, exact=exact, backend=backend)
        q, k = norm_rotate_qk(q, k, table, *weights, norm=ACROSS, backend=backend)
        (q * torch.linspace(-1, 1, q.numel()).view_as(q)).sum().backward(retain_graph=True)
        k.square().sum().backward()
        results[backend] = [leaf.grad for leaf in (*leaves, *weights)]
    for actual, expected in zip(results["cuda"], results["eager"], strict=True):
        assert actual is not None
        assert expected is not None
        # Two float32 computations of the same gradient, a dozen roundings each.
        assert (actual - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("dynamic", [False, True])
def test_cuda_traces_without_a_graph_break(cuda_on_cpu: object, table: RopeTable, dynamic: bool) -> None:
    def rotated(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = rotate_qk(q, k, table, backend="cuda")
        return norm_rotate_qk(q, k, table, norm=ACROSS, backend="cuda")[0] + 1

    q, k = queries_and_keys()
    compiled = torch.compile(rotated, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert torch.equal(compiled(q, k), rotated(q, k))


def test_a_backend_named_while_tracing_is_still_refused_when_it_runs(table: RopeTable) -> None:
    compiled = torch.compile(lambda q: rotate(q, table, backend="cuda"), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="got 'cuda', which declines"):
        compiled(queries_and_keys()[0])


def test_calls_that_nobody_watches_skip_the_dispatcher(table: RopeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient, a mode or a subclass needs the operator; anything else goes to the backend at once."""
    operators = []
    real = torch.ops.dit_rope.rotate

    def watched(*args: Any) -> Any:
        operators.append(1)
        return real(*args)

    watched.default = real.default  # a mode looks the overload up here, by name
    monkeypatch.setattr(torch.ops.dit_rope, "rotate", watched)
    (q, k), args = queries_and_keys(), table.args()
    ops.rotate([q, k], args, backend="eager")
    assert operators == []
    ops.rotate([q.requires_grad_(), k], args, backend="eager")
    assert len(operators) == 1
    with torch.no_grad():
        ops.rotate([q, k], args, backend="eager")
    assert len(operators) == 1
    with Watching():
        ops.rotate([q.detach(), k], args, backend="eager")
    assert len(operators) == 2
    torch.func.vmap(lambda x: ops.rotate([x], args, backend="eager")[0])(q.detach()[None])
    assert len(operators) == 3
    with torch.autograd.forward_ad.dual_level():
        ops.rotate([q.detach(), k], args, backend="eager")
    assert len(operators) == 4


@pytest.mark.parametrize("backend", ["cuda", "eager"])
@pytest.mark.parametrize("watched", [False, True], ids=["direct", "dispatched"])
def test_inplace_calls_count_as_writes(cuda_on_cpu: object, table: RopeTable, backend: str, watched: bool) -> None:
    (q, k), args = queries_and_keys(), table.args()
    before = q._version, k._version
    with Watching() if watched else torch.no_grad():
        ops.rotate([q, k], args, inplace=True, backend=backend)
    assert q._version > before[0]
    assert k._version > before[1]


def test_inplace_calls_take_inference_tensors(table: RopeTable) -> None:
    with torch.inference_mode():
        q, k = queries_and_keys()
        expected = rotate_qk(q, k, table)
        rotate_qk(q, k, table, inplace=True)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


def test_validation_remembers_layouts_and_nothing_refused(table: RopeTable) -> None:
    q, k = queries_and_keys()
    for _ in range(3):
        rotate_qk(q, k, table)
    assert len(table.validated) == 1
    for _ in range(2):  # a refusal is not remembered as accepted, nor an acceptance as a refusal
        with pytest.raises(ValueError, match="prefix"):
            rotate_qk(q, k, table, prefix=1)
        with pytest.raises(TypeError, match="k must have the dtype of q"):
            rotate_qk(q, k.double(), table)
    assert len(table.validated) == 1
    for length in range(100):
        rotate(torch.randn(1, 24 + length, 1, 16), table, suffix=length)
    assert len(table.validated) <= 64


class Launches:
    """What the CUDA backend launches, and the pointers."""

    def __init__(self, kernels: Any) -> None:
        self.launches: list[Any] = []
        self.pointers: list[bytes] = []
        self._real = kernels.run
        kernels.run = self._run

    def _run(self, launch: Any, pointers: bytes, device: torch.device) -> None:
        self.launches.append(launch)
        self.pointers.append(pointers)
        self._real(launch, pointers, device)


@pytest.fixture
def launches(cuda_on_cpu: Any) -> Launches:
    dit_rope.cache_clear()
    backend_choice._choices.clear()
    return Launches(cuda_on_cpu)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The values, shape and strides of ``x`` at an address that 16 does not divide."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The values of ``x`` among others, as in packed queries, keys and values."""
    return torch.stack((x, x), dim=2)[:, :, 0]


ROWS = torch.tensor([[[1, 33, 66]]], dtype=torch.int32).expand(1, 24, 3)
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dtype": (torch.Tensor.bfloat16, {}),
    "strides": (strided, {}),
    "address": (unaligned, {}),
    "suffix": (lambda x: torch.cat((x, x), dim=1), {"suffix": 24}),
    "prefix": (lambda x: torch.cat((x, x), dim=1), {"prefix": 24}),
    "batch": (lambda x: torch.cat((x, x)), {}),
    "heads": (lambda x: torch.cat((x, x), dim=2), {}),
    "channels": (lambda x: torch.cat((x, x), dim=3), {}),
    "inverse": (torch.clone, {"inverse": True}),
    "exact": (torch.clone, {"exact": True}),
    "inplace": (torch.clone, {"inplace": True}),
    "positions": (torch.clone, {"positions": ROWS}),
    "positions of their own": (torch.clone, {"positions": ROWS.contiguous()}),
}
NORM_CHANGES: dict[str, dict[str, Any]] = {
    "eps": {"eps": 1e-5},
    "kind": {"norm": NormKind.LAYER_ACROSS_HEADS},
    "weight's dtype": {"weight": torch.ones(64, dtype=torch.bfloat16)},
    "weight's address": {"weight": unaligned(torch.ones(64))},
    "bias": {"norm": NormKind.LAYER_ACROSS_HEADS, "bias": torch.ones(64)},
    "without a weight": {"weight": None},
}


def test_calls_of_one_layout_share_a_launch_and_follow_their_tensors(launches: Launches, table: RopeTable) -> None:
    calls = [queries_and_keys() for _ in range(3)]  # all there at once, so that none lies where another lay
    for q, k in calls:
        rotate_qk(q, k, table, backend="cuda")
    assert len({id(launch) for launch in launches.launches}) == 1
    assert len(set(launches.pointers)) == 3


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_launch_misses_the_remembered_call(launches: Launches, table: RopeTable, change: str) -> None:
    """One plain call first, so that a key without the change would find it; its result is that of a fresh start."""
    changed, options = CHANGES[change]
    x, shared = queries_and_keys()[0], [torch.randn(1, 24, 4, 16)]
    rotate(x, table, backend="cuda")
    shared.append(changed(shared[0]))
    expected = rotate(changed(shared[0]), table, backend="eager", **options)
    actual = rotate(shared[1], table, backend="cuda", **options)
    assert launches.launches[1] is not launches.launches[0]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("change", NORM_CHANGES)
def test_change_of_a_norm_misses_the_remembered_call(launches: Launches, table: RopeTable, change: str) -> None:
    x, plain = torch.randn(1, 24, 4, 16), {"norm": ACROSS, "weight": torch.rand(64) + 0.5}
    norm_rotate(x, table, backend="cuda", **plain)
    expected, actual = (
        norm_rotate(x, table, backend=name, **plain | NORM_CHANGES[change]) for name in ("eager", "cuda")
    )
    assert launches.launches[1] is not launches.launches[0]
    torch.testing.assert_close(actual, expected)


def test_norms_of_another_rounding_are_no_remembered_call(launches: Launches, table: RopeTable) -> None:
    x = torch.randn(1, 24, 4, 16).bfloat16()
    for rounding in NormRounding:
        ops.rotate([x], table.args(), Norm(NormKind.PER_HEAD, 1e-6, rounding=rounding), backend="cuda")
    assert len({id(launch) for launch in launches.launches}) == len(NormRounding)


@pytest.mark.parametrize("change", ["args", *CHANGES])
def test_hooks_remember_no_other_call(launches: Launches, table: RopeTable, change: str) -> None:
    """Nor what is written elsewhere, nor only some batch entries."""
    changed, options = CHANGES.get(change, (torch.clone, {}))
    x = torch.randn(1, 24, 4, 16)
    ops.rotate([x], table.args(), backend="cuda")
    y = changed(x)
    options = {name: value for name, value in options.items() if name not in ("suffix", "inplace")}
    args = replace(table.args(**options), token_offset=1) if change == "args" else table.args(**options)
    inplace = change == "inplace"
    (expected,) = ops.rotate([y.clone()], args, backend="eager")
    (actual,) = ops.rotate([y], args, inplace=inplace, backend="cuda")
    assert launches.launches[1] is not launches.launches[0]
    torch.testing.assert_close(actual, expected)


def test_hooks_remember_where_results_are_written(launches: Launches, table: RopeTable) -> None:
    x, args = torch.randn(1, 24, 4, 16), table.args()
    (expected,) = ops.rotate([x], args, backend="cuda")
    rows = torch.empty(1, 24, 3, 4, 16)
    for out in (*rows.unbind(2), torch.empty_like(x)):
        ops.rotate_into([x], args, [out], backend="cuda")
        assert torch.equal(out, expected)
    assert len({id(launch) for launch in launches.launches}) == 3  # one of strided results, and one each of two calls


@pytest.mark.parametrize("backend", ["cuda", "eager"])
def test_another_table_misses_the_remembered_call(launches: Launches, table: RopeTable, backend: str) -> None:
    x = torch.randn(1, 24, 4, 16)
    rotate(x, table, backend=backend)
    shifted = rope_table(RopeSpec((8, 4, 4)), Grid(2, 3, 4, start_frame=7))
    assert torch.equal(rotate(x, shifted, backend=backend), rotate(x, shifted, backend=backend))
    torch.testing.assert_close(rotate(x, shifted, backend=backend), rotate(x, shifted, exact=True, backend="eager"))


def test_remembered_calls_of_hooks_are_few(
    launches: Launches, table: RopeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_choice, "_MAX_REMEMBERED", 8)
    for length in range(1, 40):
        ops.rotate([torch.randn(1, length, 1, 16)], table.args(), backend="cuda")
        assert 1 <= len(backend_choice._choices) <= 8


def test_positions_are_looked_at_once_and_again_when_written_to(
    table: RopeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    real = api.check_rows
    monkeypatch.setattr(api, "check_rows", lambda *a: looks.append(1) or real(*a))
    x, positions = torch.randn(1, 24, 4, 16), ROWS.clone()
    for _ in range(3):
        rotate(x, table, positions=positions)
    assert len(looks) == 1
    rotate(x, table, positions=positions.clone())
    assert len(looks) == 2
    positions[0, 3, 1] = 99
    for _ in range(2):  # what was refused is looked at again too
        with pytest.raises(ValueError, match=r"rows of their own axis, 32 to 63 on axis 1, or negative, got 99"):
            rotate(x, table, positions=positions)
    with torch.inference_mode():
        inside = ROWS.clone()
        rotate(x, table, positions=inside)
        inside[0, 3, 1] = 99
        with pytest.raises(ValueError, match="rows of their own axis"):
            rotate(x, table, positions=inside)


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_patched_model_runs_on_the_cuda_backend(cuda_on_cpu: Any, random_wan: Any, backend: str) -> None:
    """On CPU ``"auto"`` stays eager; named, the kernels do both norms and rotations of every layer."""
    transformer = random_wan.transformer
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 4, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "return_dict": False,
    }
    runs: list[str] = []
    real = cuda_on_cpu.run
    cuda_on_cpu.run = lambda launch, *arguments: (runs.append(launch.plan.operation), real(launch, *arguments))[1]
    with torch.no_grad():
        (expected,) = transformer(**inputs)
        with dit_rope.patch(transformer, exact=False, backend=backend) as handle:
            assert ("cuda" in handle.report()) is (backend == "cuda")
            (patched,) = transformer(**inputs)
    assert runs == (["norm_rotate"] * 4 if backend == "cuda" else [])
    assert (patched - expected).abs().max() <= 1e-5 * expected.abs().max()
