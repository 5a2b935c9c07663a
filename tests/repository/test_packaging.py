"""What wheels, source distributions and editable installs carry."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import dit_rope
from dit_rope import NormKind, Pairing
from dit_rope.rotation.backends import cuda_kernels, cuda_plan
from dit_rope.rotation_args import Norm, RotationArgs

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {path.name for path in (ROOT / "kernels").iterdir()}
DATA = {
    "dit_rope/py.typed",
    "dit_rope/rotation/backends/cuda_tuning.json",
    "dit_rope/hooks/known_code.json",
}
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "dit_rope").rglob("*.py")} | DATA


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that builds leave nothing in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("dit_rope", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, built from the unpacked source distribution, and that source distribution."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def install(requirements: list[str | Path], folder: Path) -> Path:
    """Installs into a new environment that sees this one's packages, but not this one's dit_rope. Returns its Python.

    A ``.pth`` line adds this environment's packages to the path without running their own ``.pth`` files, and an
    editable install is exactly such a file.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *requirements, cwd=folder)
    return python


PROBE = """
import importlib.metadata, importlib.util, sys
import dit_rope
from dit_rope.rotation.backends.cuda_plan import kernel_sources
print(dit_rope.__file__)
print(dit_rope.__version__, importlib.metadata.version("dit-rope"))
print(*sorted(path.name for path in kernel_sources().iterdir()))
spec = importlib.util.find_spec("kernels")
print([] if spec is None else list(spec.submodule_search_locations or [spec.origin]))
"""


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installation_carries_kernels_and_exposes_no_kernels_module(kind, checkout, distributions, tmp_path) -> None:
    requirements = [distributions[0]] if kind == "wheel" else ["--editable", checkout]
    python = install(requirements, tmp_path / "environment")
    location, versions, kernels, exposed = run(python, "-c", PROBE, cwd=tmp_path).splitlines()
    home = tmp_path / "environment" if kind == "wheel" else checkout
    assert Path(location).is_relative_to(home)
    assert versions.split() == [dit_rope.__version__, dit_rope.__version__]
    assert set(kernels.split()) == KERNELS
    assert str(home) not in exposed
    command = run(python.parent / "dit-rope", "--version", cwd=tmp_path)
    assert command.strip() == f"dit-rope {dit_rope.__version__}"


def test_wheel_holds_the_package_and_nothing_else(distributions) -> None:
    wheel, _ = distributions
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == SOURCES | {f"dit_rope/_kernels/{name}" for name in KERNELS}


def test_source_distribution_holds_what_a_build_needs(distributions) -> None:
    _, sdist = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SOURCES, *(f"kernels/{name}" for name in KERNELS)} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not {name for name in names if name.startswith(("tests/", "samples/"))}


def test_kernels_folder_holds_sources_and_their_readme() -> None:
    assert {"README.md", "rope.cu", "rope.cuh", "ptx.cuh"} == KERNELS


def test_kernel_sources_names_both_places_when_neither_has_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cuda_plan, "_PACKAGE", tmp_path / "dit_rope")
    with pytest.raises(FileNotFoundError, match=r"rope.cu must be in .*/dit_rope/_kernels or .*/kernels"):
        cuda_plan.kernel_sources()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("norm", [None, *NormKind])
@pytest.mark.parametrize("pairing", Pairing)
def test_kernels_compile_without_a_warning(norm, pairing, tmp_path) -> None:
    """Under the toolkit's own compiler, which warns of more than NVRTC does."""
    xs = [torch.zeros(1, 4, heads, 40, dtype=torch.bfloat16) for heads in (3, 2)]
    args = RotationArgs(torch.zeros(2, 4, 8), None, (8, 4, 4), (1, 2, 2), (0, 0, 0), 0, 0, 4, pairing, False, False)
    plan = cuda_kernels.plan_of(xs, args, xs, norm and Norm(norm, 1e-6))
    (tmp_path / "plan.cu").write_text(plan.source())
    options = ("-arch=sm_80", "-std=c++17", "-Werror=all-warnings", f"-I{ROOT / 'kernels'}")
    run("nvcc", "-c", *options, "plan.cu", "-o", "plan.o", cwd=tmp_path)


def test_package_list_names_every_folder() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "dit_rope").rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders | {"dit_rope._kernels"}


def test_changelog_starts_with_this_version() -> None:
    headings = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0] == dit_rope.__version__


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in requirements} - {"dit-rope"}
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert names <= {pin.lower().replace("_", "-") for pin in pins}
