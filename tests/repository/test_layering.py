"""Who may import whom, what `import dit_rope` loads, how long files and functions may be: read from the source."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dit_rope

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dit_rope").rglob("*.py"))
}

LAYERS = (
    ("dit_rope.scalars", "dit_rope.torch_state"),
    ("dit_rope.spec", "dit_rope.cache"),
    ("dit_rope.tables.scaling_types",),
    ("dit_rope.tables.caches", "dit_rope.rotation_args"),
    ("dit_rope.tables.scaling",),
    ("dit_rope.tables.axes", "dit_rope.tables.dense_memory", "dit_rope.tables.shards", "dit_rope.validation"),
    ("dit_rope.tables.dense",),
    ("dit_rope.tables.table",),
    ("dit_rope.tables",),
    ("dit_rope.rotation.backends", "dit_rope.rotation.reference", "dit_rope.rotation.rounding"),
    ("dit_rope.rotation.derivatives",),
    ("dit_rope.rotation.choice",),
    ("dit_rope.rotation.ops",),
    ("dit_rope.rotation.autograd",),
    ("dit_rope.rotation.api",),
    ("dit_rope.rotation",),
    ("dit_rope.streaming.stream", "dit_rope.streaming.shift", "dit_rope.streaming.eviction"),
    ("dit_rope.streaming.rolling_cache",),
    ("dit_rope.streaming", "dit_rope.compat", "dit_rope.hooks"),
    ("dit_rope.models", "dit_rope.deprecated"),
    ("dit_rope.adapters",),
    ("dit_rope.patching",),
    ("dit_rope.comparison", "dit_rope"),
    ("dit_rope.cli",),
    ("dit_rope.__main__",),
)
"""From the bottom up: a module imports from below its own layer, never from beside it."""
SAME_UNIT = ("dit_rope.hooks", "dit_rope.models", "dit_rope.cli", "dit_rope.compat")
"""Packages whose modules may import one another. Backends may not, but for what follows."""
TRITON = ("dit_rope.rotation.backends.triton_kernels", "dit_rope.rotation.backends.triton_device")
TRITON_NORMS = "dit_rope.rotation.backends.triton_norms"
TUNING, PLAN, ARGUMENTS, LAUNCH, CUDA = (
    f"dit_rope.rotation.backends.cuda_{name}" for name in ("tuning", "plan", "arguments", "launch", "kernels")
)
GPU_CALLS = "dit_rope.rotation.backends.gpu_calls"
BESIDE = {
    TRITON,
    (TRITON[1], TRITON_NORMS),
    (ARGUMENTS, PLAN),
    (LAUNCH, PLAN),
    (LAUNCH, ARGUMENTS),
    (CUDA, PLAN),
    (CUDA, ARGUMENTS),
}
BESIDE |= {
    ("dit_rope.rotation.backends.eager", "dit_rope.rotation.backends.cos_sin"),
    (PLAN, TUNING),
    (CUDA, TUNING),
}
BESIDE |= {(CUDA, LAUNCH)} | {(backend, GPU_CALLS) for backend in (TRITON[0], CUDA, ARGUMENTS, PLAN)}
"""The left imports the right. What needs Triton or the CUDA bindings is a file of its own, imported only where they
are; what both GPU backends ask of a call is written once."""

VOCABULARY = tuple(f"dit_rope.hooks.{name}" for name in ("adapter", "formats", "packed_tables", "class_override"))
DECLARES = (*VOCABULARY, "dit_rope.models", "dit_rope.spec", "dit_rope.rotation_args")
"""A file of ``dit_rope.models`` holds declarations. It imports what they are written in, and nothing that runs them."""

HOME = {
    "triton": (*TRITON, TRITON_NORMS),
    "cuda": (LAUNCH,),
    "diffusers": (
        "dit_rope.hooks",
        "dit_rope.models",
        "dit_rope.patching",
        "dit_rope.comparison",
        "dit_rope.cli",
    ),
    "transformers": (),
    "typer": ("dit_rope.cli",),
    "rich": ("dit_rope.cli",),
    "jinja2": (),
    "matplotlib": (),
    "skimage": ("dit_rope.comparison",),
    "PIL": ("dit_rope.comparison",),
    "numpy": ("dit_rope.comparison", "dit_rope.cli"),
}
"""Packages that only these modules import."""
LAZY = ("diffusers", "transformers", "jinja2", "matplotlib", "skimage", "PIL")
"""Imported inside functions, so that nobody who does without them needs them or waits for them."""
NO_EINOPS = ("dit_rope.rotation.ops", "dit_rope.rotation.api", "dit_rope.rotation_args", "dit_rope.rotation.backends")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


class Import(NamedTuple):
    """One imported module, and whether importing the file imports it."""

    module: str
    eager: bool


def imports(name: str, source: str, is_package: bool) -> Iterator[Import]:
    """Absolute names of the modules that the source of module ``name`` imports; of dit_rope, down to the submodule."""
    parts = name.split(".")
    package = parts if is_package else parts[:-1]

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield Import(full if full in MODULES else ".".join(base), eager)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            constants = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            yield from (Import(importlib.util.resolve_name(module, ".".join(package)), eager) for module in constants)
        type_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or type_only
        for child in ast.iter_child_nodes(node):
            yield from visit(child, eager and not inside)

    yield from visit(ast.parse(source), True)


def within(module: str, homes: tuple[str, ...]) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def layer(module: str) -> int:
    """The rank of the longest name that the module is, or is within; of ``dit_rope`` only what it is itself."""
    ranks = {home: rank for rank, homes in enumerate(LAYERS) for home in homes}
    homes = [home for home in ranks if module == home or (home != "dit_rope" and within(module, (home,)))]
    assert homes, f"{module} has no layer: give it one in LAYERS and in docs/design.md"
    return ranks[max(homes, key=len)]


def offences(name: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module."""
    problems = []
    for module, eager in imports(name, source, is_package):
        top = module.split(".")[0]
        if top == "dit_rope":
            together = any(within(name, (unit,)) and within(module, (unit,)) for unit in SAME_UNIT)
            if not (together or (name, module) in BESIDE or layer(module) < layer(name)):
                problems.append(f"{name} imports {module}, which is not below it")
            if within(name, ("dit_rope.models",)) and not within(module, DECLARES):
                problems.append(f"{name} imports {module}, in which no declaration is written")
        elif not within(name, HOME.get(top, (name,))):
            problems.append(f"{name} imports {top}, which belongs in {HOME[top]}")
        elif top in LAZY and eager:
            problems.append(f"{name} imports {top} when it is imported itself")
        elif top == "einops" and within(name, NO_EINOPS):
            problems.append(f"{name} imports einops on the kernel path")
    return problems


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_what_its_layer_may(name) -> None:
    path = MODULES[name]
    assert offences(name, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dit_rope.spec", "from .cache import FifoCache"),
        ("dit_rope.tables.table", "from .. import rotation"),
        ("dit_rope.tables.table", "def f():\n    from ..rotation import rotate"),
        ("dit_rope.tables.table", "from . import cache_clear"),
        ("dit_rope.hooks.plan", "from ..models import ADAPTERS"),
        ("dit_rope.models.wan", "from ..hooks.plan import make_plan"),
        ("dit_rope.models.wan", "from ..rotation.ops import rotate"),
        ("dit_rope.rotation.backends.eager", "from . import triton_kernels"),
        ("dit_rope.rotation.backends.triton_device", "from .triton_kernels import rotate"),
        ("dit_rope.rotation.backends.gpu_calls", "from .cuda_kernels import Plan"),
        ("dit_rope.rotation.backends.cuda_launch", "from .cuda_kernels import launch_of"),
        ("dit_rope.rotation.backends.cuda_plan", "def f():\n    from . import cuda_arguments"),
        ("dit_rope.rotation.backends.eager", "importlib.import_module('..ops', __package__)"),
        ("dit_rope.rotation.backends.cuda_kernels", "from .triton_kernels import rotate"),
        ("dit_rope.rotation.backends.cuda_kernels", "from cuda.core import Device"),
        ("dit_rope.rotation.api", "import dit_rope"),
        ("dit_rope.compat.fastvideo", "from ..patching import patch"),
        ("dit_rope.comparison", "from . import cli"),
        ("dit_rope.rotation.ops", "import triton"),
        ("dit_rope.rotation.ops", "import einops"),
        ("dit_rope.tables.table", "import diffusers"),
        ("dit_rope.patching", "from diffusers import DiffusionPipeline"),
        ("dit_rope.patching", "if True:\n    import diffusers.models"),
    ],
)
def test_layering_check_notices(name, source) -> None:
    assert offences(name, source)


def unit(module: str) -> str:
    """What of the package's folder the module is, or is in."""
    return module.split(".")[1] if "." in module else "__init__"


def test_picture_of_the_layers_shows_every_module_above_all_that_it_imports() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    lines = page.partition("## The map")[2].partition("```text\n")[2].partition("```")[0].splitlines()
    floors = {name: floor for floor, line in enumerate(reversed(lines)) for name in line.split()}
    assert set(floors) == {unit(module) for module in MODULES}
    for name, path in MODULES.items():
        for module, _ in imports(name, path.read_text(), path.name == "__init__.py"):
            inside = module.split(".")[0] == "dit_rope" and unit(module) != unit(name)
            assert not inside or floors[unit(module)] < floors[unit(name)], f"{name} imports {module}"


def test_no_two_modules_beside_one_another_import_each_other() -> None:
    """However long the way round: what may be imported of a unit's own modules has an order."""
    below = {above: [module for upper, module in BESIDE if upper == above] for above, _ in BESIDE}
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError


def test_init_holds_public_names_and_nothing_else() -> None:
    tree = ast.parse(MODULES["dit_rope"].read_text())
    docstring, *body = tree.body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    assigned = {ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)}
    imported = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert assigned == {"__version__", "__all__"}
    assert all(isinstance(node, ast.Assign | ast.ImportFrom) for node in body)
    assert set(dit_rope.__all__) == imported | {"__version__"}


def test_no_module_has_the_name_of_a_public_function() -> None:
    """``from . import rotate`` would give the module or the function, whichever was bound last; so would a user's."""
    stems = {name.rpartition(".")[2] for name in MODULES if name.count(".") == 1}
    assert stems & set(dit_rope.__all__) == set()


def test_import_loads_nothing_heavy_and_changes_nothing() -> None:
    program = """
import os, sys, threading
import torch
before = set(sys.modules)
state = (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), threading.active_count())
import dit_rope
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "cuda", "diffusers", "transformers", "typer", "rich", "skimage", "PIL", "matplotlib", "kernels"}
assert not loaded & heavy, loaded
assert state == (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), threading.active_count())
assert not torch.cuda.is_initialized()
info = dit_rope.cache_info()
assert info.tables.entries == info.axes.entries == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_short(name) -> None:
    source = MODULES[name].read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    long = {
        node.name: length
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.body[0].lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_kernels_folder_holds_no_python() -> None:
    """A Python file there would make ``kernels`` importable from a checkout, in place of the package of that name."""
    assert list((ROOT / "kernels").rglob("*.py")) == []


@pytest.mark.parametrize("name", MODULES)
def test_isinstance_is_given_types_that_the_lowest_torch_can_trace(name) -> None:
    """Dynamo of torch 2.9 cannot trace ``isinstance(x, int | float)``; it can trace a tuple."""
    calls = (node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Call))
    unions = [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func) == "isinstance" and isinstance(call.args[1], ast.BinOp)
    ]
    assert unions == []


def test_tests_skip_packages_that_cannot_be_imported_whole() -> None:
    """``cuda.core`` without ``cuda.bindings`` is there and raises ImportError, which pytest does not skip by itself."""
    calls = [
        ast.unparse(node)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip"
    ]
    assert calls
    assert [call for call in calls if "exc_type=ImportError" not in call] == []
