"""Patches every supported diffusers model as soon as it is constructed: a pytest plugin, for diffusers' own tests.

    git -C DIFFUSERS archive COMMIT tests | tar x -C CHECKOUT
    cd CHECKOUT
    export PYTHONPATH=DIT_ROPE/scripts/long_tests
    python -m pytest -p patch_on_construction tests/models/transformers/test_*_wan.py

A model is patched when the ``__init__`` of its own class returns, before any test sees it, so that loading, saving,
training, LoRA, offloading and compiling all meet a patched model. What ``dit_rope.patch`` refuses stays as it is; the
last line of the session says what was patched, and what was refused and why. CHECKOUT must not hold ``src``, which
diffusers' tests would import in place of the installed diffusers.

Diffusers' tests compare a model with itself, so that most of them pass with any rotation. The plugin therefore seeds
every test, and notes a digest of what the test's forward passes returned on CPU. ``--leave-plain`` does the same and
patches nothing; ``upstream_tests.py`` runs both, and compares the digests as well.

Processes that a test starts itself, such as the ranks of the parallelism tests, construct plain models.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.models import ADAPTERS


class PatchOnConstruction:
    """Patches supported models while it is installed, and notes what became of each, and what they return."""

    def __init__(self, leave_plain: bool = False) -> None:
        self.leave_plain = leave_plain
        self.patched: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self._replaced: list[tuple[type, str, Any]] = []
        self._start_test()

    def install(self) -> None:
        """Wraps ``__init__`` and ``forward`` of every supported class that the installed diffusers has."""
        for name in {adapter.model: None for adapter in ADAPTERS}:
            module, _, attribute = name.rpartition(".")
            try:
                cls = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError):
                continue
            for method, wrap in {"__init__": self._patching, "forward": self._recording}.items():
                self._replaced.append((cls, method, vars(cls).get(method)))
                setattr(cls, method, wrap(cls, getattr(cls, method)))

    def remove(self) -> None:
        """Restores every class's methods, defined or inherited; a second call does nothing."""
        while self._replaced:
            cls, method, original = self._replaced.pop()
            if original is None:
                delattr(cls, method)
            else:
                setattr(cls, method, original)

    # Both wrappers keep the signature, from which diffusers reads the configuration, and act for the model's own class
    # only: a subclass that calls them through super() is another model, or is not done.

    def _patching(self, cls: type, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def construct(model: Any, *args: Any, **kwargs: Any) -> None:
            init(model, *args, **kwargs)
            if type(model) is cls and not self.leave_plain:
                self._patch(model)

        return construct

    def _recording(self, cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(model: Any, *args: Any, **kwargs: Any) -> Any:
            returned = forward(model, *args, **kwargs)
            if not torch.compiler.is_compiling() and type(model) is cls:
                self._record(returned)
            return returned

        return run

    def _patch(self, model: Any) -> None:
        name = type(model).__name__
        try:
            dit_rope.patch(model, exact=None)
        except ValueError as error:  # how patch refuses; whatever else it raises is a fault, and fails the test
            self.refused[name, str(error)] += 1
        else:
            self.patched[name] += 1

    def _record(self, returned: Any) -> None:
        for leaf in torch.utils._pytree.tree_leaves(returned):
            if type(leaf) is torch.Tensor and leaf.device.type == "cpu":  # elsewhere a patched model rounds otherwise
                self._digest.update(leaf.detach().reshape(-1).view(torch.uint8).numpy())
        self._forwards += 1

    def _start_test(self) -> None:
        self._before_test = self.patched.copy(), self.refused.copy()
        self._digest, self._forwards = hashlib.sha256(), 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Seeds the test and its fixtures, and starts their counts."""
        torch.manual_seed(0)
        self._start_test()

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Notes in the test's report its class under test, what became of models, and what they returned."""
        patched, refused = self.patched - self._before_test[0], self.refused - self._before_test[1]
        under_test = getattr(getattr(item, "instance", None), "model_class", None)
        if under_test is not None:
            item.user_properties.append(("model_class", under_test.__name__))
        item.user_properties.append(("patched", patched.total()))
        item.user_properties.extend(("refused", f"{name}: {why}") for name, why in refused)
        item.user_properties.append(("returned", f"{self._forwards} forwards, {self._digest.hexdigest()[:16]}"))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Writes the one line of :meth:`summary`."""
        terminalreporter.write_line(self.summary())

    def summary(self) -> str:
        """How many models of which classes were patched, how many were refused and why."""
        patched = _listed(f"{count} {name}" for name, count in sorted(self.patched.items()))
        refused = _listed(f"{count} {name}: {why}" for (name, why), count in sorted(self.refused.items()))
        return f"dit_rope: {self.patched.total()} models patched{patched}, {self.refused.total()} refused{refused}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--leave-plain``."""
    parser.addoption("--leave-plain", action="store_true", help="Patch nothing, but note what models return.")


def pytest_configure(config: pytest.Config) -> None:
    """Installs the plugin until the session ends."""
    plugin = PatchOnConstruction(config.getoption("--leave-plain"))
    config.add_cleanup(plugin.remove)
    plugin.install()
    config.pluginmanager.register(plugin, "patch_on_construction.PatchOnConstruction")


def _listed(parts: Iterable[str]) -> str:
    text = "; ".join(parts)
    return f" ({text})" if text else ""
