"""Diffusers' own tests on patched models: the plugin that patches, and the program that compares two runs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import typer

import dit_rope
from benchmarks.results import read_csv
from dit_rope.hooks.class_override import Override
from long_tests import patch_on_construction, upstream_tests
from long_tests.patch_on_construction import PatchOnConstruction
from zoo import wan

ROOT = Path(__file__).resolve().parents[2]
FILE = "tests/models/transformers/test_tiny.py"
UPSTREAM = """
import pytest
from zoo import wan
from diffusers import WanTransformer3DModel


class TestTiny:
    model_class = WanTransformer3DModel

    def test_forward(self):
        wan.forward(wan.build("wan"))

    def test_rope_class(self):
        assert type(wan.build("wan").rope).__name__ == "WanRotaryPosEmbed", "own class"

    def test_two_errors(self, raises_afterwards):
        raise KeyError("both runs")

    @pytest.mark.skip(reason="always")
    def test_skipped(self):
        pass

    def test_patched_models_return_something_else(self):
        model = wan.build("wan")
        if type(model.rope).__name__ != "WanRotaryPosEmbed":
            model.proj_out.register_forward_hook(lambda module, args, output: output * 1.000001)
        wan.forward(model)

    @pytest.fixture
    def raises_afterwards(self):
        yield
        raise OSError("teardown")
"""


def is_patched(model: torch.nn.Module) -> bool:
    return any(isinstance(module, Override) for module in model.modules())


@pytest.fixture
def plugin() -> Iterator[PatchOnConstruction]:
    plugin = PatchOnConstruction()
    plugin.install()
    yield plugin
    plugin.remove()


class Base:
    def __init__(self, size: int = 1) -> None:
        self.size = size

    def forward(self) -> torch.Tensor:
        return torch.full((3,), float(self.size))


class Inheriting(Base):
    pass


class Extending(Base):
    def __init__(self, size: int = 2, name: str = "") -> None:
        super().__init__(size)
        self.name = name


@pytest.fixture
def plain_classes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Base and both its subclasses as the supported models; returns what is patched."""
    names = [f"{__name__}.{cls.__name__}" for cls in (Base, Inheriting, Extending)]
    adapters = tuple(
        SimpleNamespace(model=name) for name in (*names, "no_such_module.Model", f"{__name__}.NoSuchModel")
    )
    patched: list[Any] = []
    monkeypatch.setattr(patch_on_construction, "ADAPTERS", adapters)
    monkeypatch.setattr(dit_rope, "patch", lambda model, exact: patched.append((model, dict(vars(model)))))
    return patched


@pytest.mark.parametrize("name", ["wan", "vace", "skyreels-v2"])
def test_a_supported_model_is_patched_when_constructed(plugin: PatchOnConstruction, name: str) -> None:
    model = wan.build(name)
    assert is_patched(model)
    assert plugin.patched == {type(model).__name__: 1}
    assert plugin.summary() == f"dit_rope: 1 models patched (1 {type(model).__name__}), 0 refused"


def test_each_class_is_patched_once_after_its_outermost_init(
    plain_classes: list[Any], plugin: PatchOnConstruction
) -> None:
    models = [Base(3), Inheriting(4), Extending(5, "five")]
    expected = [{"size": 3}, {"size": 4}, {"size": 5, "name": "five"}]
    assert plain_classes == list(zip(models, expected, strict=True))
    assert plugin.patched == {"Base": 1, "Inheriting": 1, "Extending": 1}


def test_an_unsupported_subclass_stays_plain(plugin: PatchOnConstruction) -> None:
    class Derived(diffusers.WanTransformer3DModel):
        pass

    config = wan.build("wan").config
    assert not is_patched(Derived.from_config(config))
    assert plugin.patched.total() == 1


def test_removing_leaves_nothing_behind(plain_classes: list[Any]) -> None:
    attributes = [dict(vars(cls)) for cls in (Base, Inheriting, Extending)]
    plugin = PatchOnConstruction()
    plugin.install()
    plugin.remove()
    plugin.remove()
    assert [dict(vars(cls)) for cls in (Base, Inheriting, Extending)] == attributes
    Base()
    assert not plain_classes


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_stay(plugin: PatchOnConstruction, method: str) -> None:
    wrapped = inspect.signature(getattr(diffusers.WanTransformer3DModel, method))
    plugin.remove()
    assert wrapped == inspect.signature(getattr(diffusers.WanTransformer3DModel, method))


def test_what_models_return_is_noted_for_each_test(plain_classes: list[Any], plugin: PatchOnConstruction) -> None:
    def returned(*models: Any) -> str:
        plugin.pytest_runtest_setup()
        for model in models:
            model.forward()
        item = SimpleNamespace(user_properties=[])
        plugin.pytest_runtest_teardown(item)  # type: ignore[arg-type]
        return dict(item.user_properties)["returned"]

    assert returned(Base(1), Extending(2)) == returned(Base(1), Base(2))
    assert returned(Base(1)) != returned(Base(2))
    assert returned(Base(1)).startswith("1 forwards, ")


def test_left_plain_nothing_is_patched() -> None:
    plugin = PatchOnConstruction(leave_plain=True)
    plugin.install()
    try:
        assert not is_patched(wan.build("wan"))
    finally:
        plugin.remove()
    assert plugin.summary() == "dit_rope: 0 models patched, 0 refused"


def test_refusals_are_noted_in_the_report_of_the_test(
    plain_classes: list[Any], plugin: PatchOnConstruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, exact: Any) -> None:
        raise ValueError("model must be another")

    monkeypatch.setattr(dit_rope, "patch", refuse)
    Base()
    plugin.pytest_runtest_setup()
    Inheriting()
    item = SimpleNamespace(user_properties=[], instance=SimpleNamespace(model_class=Inheriting))
    plugin.pytest_runtest_teardown(item)  # type: ignore[arg-type]
    expected = [("model_class", "Inheriting"), ("patched", 0), ("refused", "Inheriting: model must be another")]
    assert item.user_properties[:3] == expected


@torch.no_grad()
def test_loaded_and_copied_models_are_patched_and_compute_the_same(plugin: PatchOnConstruction, tmp_path: Path) -> None:
    model = wan.build("wan")
    cls = type(model)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    from_config = cls.from_config(model.config)
    from_config.load_state_dict(model.state_dict())
    copies = [loaded, from_config.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert plugin.patched == {"WanTransformer3DModel": 3}
    assert all(is_patched(model) for model in copies)
    plugin.remove()
    expected = wan.forward(wan.build("wan"))
    assert all(torch.equal(wan.forward(model), expected) for model in (model, *copies))


def test_a_refused_model_stays_plain_and_is_counted(
    plugin: PatchOnConstruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, exact: Any) -> None:
        raise ValueError("model must be another")

    monkeypatch.setattr(dit_rope, "patch", refuse)
    models = [wan.build("wan") for _ in range(2)]
    assert not any(is_patched(model) for model in models)
    expected = "dit_rope: 0 models patched, 2 refused (2 WanTransformer3DModel: model must be another)"
    assert plugin.summary() == expected


def test_a_fault_of_patch_is_not_a_refusal(plugin: PatchOnConstruction, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any, exact: Any) -> None:
        raise AttributeError("fault")

    monkeypatch.setattr(dit_rope, "patch", fail)
    with pytest.raises(AttributeError, match="fault"):
        wan.build("wan")


def compare(checkout: Path, work: Path, time_limit: int = 600) -> tuple[int, str]:
    """Exit code and output of the program."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(typer.Exit) as end:
        upstream_tests.main(checkout, work, time_limit=time_limit)
    return end.value.exit_code, output.getvalue()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tests/ folder like that of diffusers, with one file."""
    file = tmp_path / "checkout" / FILE
    file.parent.mkdir(parents=True)
    file.write_text(UPSTREAM)
    return tmp_path / "checkout"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the table goes."""
    monkeypatch.setattr("benchmarks.results.RESULTS", tmp_path / "results")
    return tmp_path / "results" / "upstream-tests.csv"


def test_both_runs_are_compared_and_not_repeated(
    checkout: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = (ROOT, ROOT / "scripts", ROOT / "tests" / "support")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    work = tmp_path / "work"
    code, output = compare(checkout, work)
    assert code == 1
    other_bits, other_outcome = (line for line in output.splitlines() if "::" in line)
    digest = "1 forwards, [0-9a-f]{16}"
    name = f"{FILE}::TestTiny::test_patched_models_return_something_else"
    assert re.fullmatch(f"{name}: passed, {digest} plain, passed, {digest} patched", other_bits)
    name = f"{FILE}::TestTiny::test_rope_class"
    none = "0 forwards, e3b0c44298fc1c14"  # SHA-256 of nothing
    assert other_outcome == f"{name}: passed, {none} plain, failed (AssertionError), {none} patched"
    log = (work / "patched" / f"{FILE}.log").read_text()
    assert "\ndit_rope: 3 models patched (3 WanTransformer3DModel), 0 refused\n" in log
    (row,) = read_csv(results)
    expected = {
        "file": FILE, "class": "WanTransformer3DModel",
        "plain_passed": "3", "plain_failed": "1", "plain_skipped": "1",
        "patched_passed": "2", "patched_failed": "2", "patched_skipped": "1", "constructed_patched": "3",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected

    (work / "plain" / f"{FILE}.log").unlink()
    assert compare(checkout, work) == (code, output)
    assert not (work / "plain" / f"{FILE}.log").exists()


def test_a_run_that_does_not_finish_is_reported_and_leaves_no_results(
    checkout: Path, results: Path, tmp_path: Path
) -> None:
    code, output = compare(checkout, tmp_path / "work", time_limit=0)
    assert code == 1
    assert f"{FILE} plain: no results in 0 s" in output
    assert "0 tests end otherwise, 2 runs did not finish" in output
    assert not list((tmp_path / "work").rglob("*.xml"))
    assert not results.exists()


def test_a_checkout_with_sources_is_refused(checkout: Path, tmp_path: Path) -> None:
    (checkout / "src").mkdir()
    with pytest.raises(typer.BadParameter, match="must hold tests/, and no src/"):
        upstream_tests.main(checkout, tmp_path / "work")


def test_a_test_that_fails_for_another_reason_is_different() -> None:
    first, second = (
        upstream_tests.Outcome("failed", why, model_class="Model", patched=0, refused=())
        for why in ("OSError", "KeyError")
    )
    assert list(upstream_tests.differences({"T::a": first, "T::b": first}, {"T::a": second, "T::b": first})) == [
        "T::a: failed (OSError) plain, failed (KeyError) patched"
    ]
    assert list(upstream_tests.differences({"T::a": first}, {})) == [
        "T::a: failed (OSError) plain, not collected patched"
    ]
