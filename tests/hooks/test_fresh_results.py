"""What the norms and projections of a model return is overwritten only where nobody else can hold it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_known_code import run

import dit_rope
from dit_rope.hooks import fused_norms
from dit_rope.hooks.fused_norms import fused_norm, makes_fresh_results
from zoo import named

pytestmark = pytest.mark.usefixtures("one_thread")


def rms_norm() -> torch.nn.Module:
    return torch.nn.RMSNorm(8)


def diffusers_norm() -> torch.nn.Module:
    from diffusers.models.normalization import RMSNorm

    return RMSNorm(8, eps=1e-6)


class Unknown(torch.nn.RMSNorm):
    """A norm that somebody has written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _own_forward(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(module), "forward", module.forward)


def _hook(kind: str, everywhere: bool = False) -> Callable[..., None]:
    def register(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        if everywhere:
            hooks = getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
        else:
            hooks = getattr(module, f"_{kind}_hooks")
        monkeypatch.setitem(hooks, 0, lambda *args: None)

    return register


def _compiled(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled_call_impl", lambda *args: None)


def _forward_of_the_class(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(module), "forward", lambda self, x: x)


KINDS = ("forward", "forward_pre", "backward", "backward_pre")
WATCHED: dict[str, Callable[..., None]] = {
    "own forward": _own_forward,
    "compiled": _compiled,
    "forward of the class": _forward_of_the_class,
    **{f"{kind} hook": _hook(kind) for kind in KINDS},
    **{f"{kind} hook everywhere": _hook(kind, everywhere=True) for kind in KINDS},
}


@pytest.mark.parametrize("observer", WATCHED)
@pytest.mark.parametrize("norm", [rms_norm, diffusers_norm])
@pytest.mark.parametrize("before", [True, False], ids=["asked before", "not asked"])
def test_results_that_others_may_hold_are_not_overwritten(
    norm: Callable[[], torch.nn.Module], observer: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_norms, "_torch_functions", {})
    module = norm()
    if before:
        assert makes_fresh_results(module)
    WATCHED[observer](module, monkeypatch)
    assert not makes_fresh_results(module)
    monkeypatch.undo()
    assert makes_fresh_results(module)


@pytest.mark.parametrize("before", [True, False], ids=["asked before", "not asked"])
def test_function_of_torch_s_that_somebody_replaced(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norms, "_torch_functions", {})
    if before:
        assert makes_fresh_results(rms_norm())
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda x, *args: x)
    assert not makes_fresh_results(rms_norm())


def test_results_of_unknown_norms_are_not_overwritten() -> None:
    assert not makes_fresh_results(Unknown(8))


def test_norm_whose_weight_decides_the_dtype_is_not_fused() -> None:
    """Kernels return the dtype of the data."""
    module, x = diffusers_norm(), torch.rand(2, 8, dtype=torch.bfloat16)
    assert module(x).dtype is torch.float32
    assert fused_norm(module, x.dtype) is None
    assert fused_norm(module.bfloat16(), x.dtype) is not None


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("name", ["wan", "hunyuan-video-no-norm"])
def test_hook_keeps_what_it_was_given(name: str, exact: bool) -> None:
    """Of a norm, and of a projection where there is none."""
    model = named(name).build()
    outputs: list[torch.Tensor] = []
    attention = next(candidate for candidate in model.modules() if hasattr(candidate, "to_q"))
    module = attention.norm_q if getattr(attention, "norm_q", None) is not None else attention.to_q
    module.register_forward_hook(lambda module, args, output: outputs.append(output))
    expected = run(name, model)
    with dit_rope.patch(model, exact=exact):
        actual = run(name, model)
    assert torch.equal(*outputs)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_projection_that_returns_its_argument_does_not_have_it_overwritten(exact: bool) -> None:
    name = "hunyuan-video-no-norm"
    model = named(name).build()
    for block in model.single_transformer_blocks:
        block.attn.to_q = torch.nn.Identity()
    expected = run(name, model)
    with dit_rope.patch(model, exact=exact):
        actual = run(name, model)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **({"rtol": 0, "atol": 0} if exact else {}))


def test_hook_inside_a_container_keeps_what_it_was_given() -> None:
    name = "hunyuan-video-no-norm"
    model = named(name).build()
    attention = model.single_transformer_blocks[0].attn
    outputs: list[torch.Tensor] = []
    attention.to_q.register_forward_hook(lambda module, args, output: outputs.append(output))
    attention.to_q = torch.nn.Sequential(attention.to_q)
    run(name, model)
    with dit_rope.patch(model, exact=True):
        run(name, model)
    assert torch.equal(*outputs)
