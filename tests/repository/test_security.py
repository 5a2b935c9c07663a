"""What SECURITY.md promises: no code or pickle of model folders, no shell, no writes elsewhere, no foreign kernels."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file

from dit_rope import comparison
from dit_rope.cli import demo, inspect
from dit_rope.rotation.backends import cuda_plan, triton_kernels

ROOT = Path(__file__).resolve().parents[2]
# What people do to models includes pickling them, and a forked child answers its parent so: these two read back what
# they have just written.
PICKLES = [ROOT / "scripts" / "long_tests" / "intervention_cases" / name for name in ("copies.py", "forked.py")]
SOURCES = sorted(
    path
    for folder in ("dit_rope", "scripts", "samples")
    for path in (ROOT / folder).rglob("*.py")
    if path not in PICKLES
)
HOSTILE = (
    "../../../outside",
    "/tmp/outside",
    "a\0b",
    "p" * 300,
    "CON",
    "NUL.txt",
    'a/b\\c:d*e?f"g<h>i|j',
    "$(touch outside); `touch outside`",
    "\r\n\x1b[31m",
    "..",
    "",
)
WRITTEN = {"unpatched.mp4", "patched.mp4", "contact_sheet.png", "preview.webp", "report.json", "report.md"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None where there is none."""
    values = [argument.value for argument in call.keywords if argument.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def unsafe(path: Path) -> list[str]:
    """What a file does that no file of the package may do."""
    problems = []
    for name, call in calls(path):
        last = name.rpartition(".")[2]
        bad = (
            name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "os.chmod")
            or name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "joblib.", "yaml.", "os.spawn", "os.exec"))
            or keyword(call, "shell") is True
            or keyword(call, "trust_remote_code") is True
            or (
                last in ("load", "torch_load")
                and name.startswith("torch")
                and keyword(call, "weights_only") is not True
            )
            or (name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") is True)
            or (last == "from_pretrained" and keyword(call, "use_safetensors") is not True)
        )
        if bad:
            problems.append(f"{path.name}:{call.lineno} {name}")
    return problems


def test_no_source_evaluates_unpickles_uses_a_shell_or_loads_other_than_safetensors() -> None:
    assert [line for path in SOURCES for line in unsafe(path)] == []
    assert len(SOURCES) > 100


@pytest.mark.parametrize(
    "line",
    [
        "torch.load('a')",
        "torch.load('a', weights_only=False)",
        "pickle.loads(b'')",
        "subprocess.run('a', shell=True)",
        "Pipe.from_pretrained('a')",
        "Pipe.from_pretrained('a', use_safetensors=True, trust_remote_code=True)",
        "eval('1')",
        "os.system('a')",
    ],
)
def test_look_at_the_sources_sees(line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(line)
    assert len(unsafe(path)) == 1


class _Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def folder(random_wan_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of this test's own."""
    return Path(shutil.copytree(random_wan_folder, tmp_path / "model"))


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_folder_with_pickled_weights_is_refused_and_nothing_of_it_runs(component: str, folder: Path) -> None:
    (weights,) = (folder / component).glob("*.safetensors")
    mark = folder.parent / "mark"
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({**load_file(weights), "evil": _Evil(mark)}, weights.with_name(name))
    weights.unlink()
    with pytest.raises(typer.BadParameter, match="no file named .*safetensors"):
        demo.load_pipeline(str(folder), "cpu", None)
    assert not mark.exists()


@pytest.mark.parametrize("component", ["transformer", None])
def test_folder_with_code_of_its_own_is_refused_and_nothing_of_it_runs(component: str | None, folder: Path) -> None:
    mark = folder.parent / "mark"
    index = json.loads((folder / "model_index.json").read_text())
    index[component or "_class_name"] = ["evil", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    base = "WanPipeline" if component is None else "WanTransformer3DModel"
    code = f"open({str(mark)!r}, 'w')\nfrom diffusers import {base} as Evil\n"
    (folder / (component or "") / "evil.py").write_text(code)
    with pytest.raises(typer.BadParameter, match="without code, got evil.py"):
        demo.load_pipeline(str(folder), "cpu", None)
    assert not mark.exists()


@pytest.mark.parametrize(
    "class_name", ["utils", "DiffusionPipeline", "logging", "WanPipeline", ["os", "system"], 7, ""]
)
def test_inspect_builds_models_alone_whatever_class_a_config_names(class_name: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": class_name}))
    with pytest.raises(typer.BadParameter, match="must be of a class that diffusers"):
        inspect.build_transformers(str(tmp_path))


def result(prompt: str) -> comparison.Comparison:
    """The comparison of two runs that nobody made."""
    frames = np.zeros((2, 16, 16, 3), dtype=np.float32)
    fields = comparison.Comparison.__dataclass_fields__
    request = comparison.Request(prompt, prompt, 2, 2, 16, 16, 0, 1.0)
    comparison_of_frames = object.__new__(comparison.Comparison)
    for name in fields:
        object.__setattr__(comparison_of_frames, name, None)
    for name, value in (("request", request), ("unpatched", frames), ("patched", frames)):
        object.__setattr__(comparison_of_frames, name, value)
    return comparison_of_frames


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_demo_writes_the_same_six_files_whatever_prompt_and_model_are_called(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison.Comparison, "figures", lambda self: {})
    monkeypatch.setattr(comparison.Comparison, "markdown", lambda self: "")
    monkeypatch.setattr(comparison, "save_video", lambda frames, path: path.touch())
    out = tmp_path / "chosen" / "folder"
    demo.write_results(result(text), {"model": text, "device": text}, out)
    assert {path.name for path in out.iterdir()} == WRITTEN
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        f"chosen/folder/{name}" for name in WRITTEN
    }
    assert json.loads((out / "report.json").read_text())["model"] == text


def test_no_file_name_is_made_from_a_prompt() -> None:
    """A path is joined from constants and options; nothing called prompt takes part in one."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                assert "prompt" not in ast.unparse(node.right), f"{path.name}:{node.lineno}"
        for name, call in calls(path):
            if name in ("Path", "open", "os.path.join") or name.endswith(("with_name", "with_stem", "joinpath")):
                assert not any("prompt" in ast.unparse(argument) for argument in call.args), (
                    f"{path.name}:{call.lineno}"
                )


def test_cuda_sources_are_those_of_the_package_and_compiling_leaves_nothing_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    assert cuda_plan.kernel_sources() in (ROOT / "kernels", ROOT / "dit_rope" / "_kernels")
    program = """
import os, pathlib, torch
from dit_rope.rotation.backends import cuda_kernels, cuda_launch
from dit_rope import Grid, RopeSpec, rope_table
x = torch.empty(1, 8, 2, 16, dtype=torch.bfloat16)
plan = cuda_kernels.plan_of([x], rope_table(RopeSpec((8, 4, 4)), Grid(2, 2, 2)).args(), [x])
print(len(cuda_launch.compile_plan(plan, "sm_90")))
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home)}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    # A rope.cu where the process runs must not be taken for the package's.
    (home / "rope.cu").write_text("#error another file")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    if "libnvrtc" in done.stderr:
        pytest.skip("NVRTC is not installed")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
    assert [path.name for path in home.rglob("*")] == ["rope.cu"]


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Triton's cache folder, which is not there yet."""
    if not hasattr(os, "geteuid"):
        pytest.skip("needs the owners of a POSIX system")
    folder = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    triton_kernels.cache_problem.cache_clear()
    yield folder
    triton_kernels.cache_problem.cache_clear()


def test_cache_of_triton_is_made_for_the_user_alone(kernel_cache: Path) -> None:
    assert triton_kernels.cache_problem() is None
    assert kernel_cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o1777])
def test_cache_of_triton_that_others_can_write_is_refused(mode: int, kernel_cache: Path) -> None:
    kernel_cache.mkdir()
    kernel_cache.chmod(mode)
    assert f"{kernel_cache} of user {os.geteuid()} with mode {mode:o}" in str(triton_kernels.cache_problem())


def test_cache_of_triton_of_another_user_or_group_is_refused(
    kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cache.mkdir(mode=0o700)
    status = kernel_cache.stat()
    monkeypatch.setattr(os, "geteuid", lambda: status.st_uid + 1)
    if status.st_uid:  # root may own it
        assert "must belong to this user" in str(triton_kernels.cache_problem())
    triton_kernels.cache_problem.cache_clear()
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(kernel_cache))
    kernel_cache.chmod(0o770)
    assert triton_kernels.cache_problem() is None
    triton_kernels.cache_problem.cache_clear()
    monkeypatch.setattr(os, "getegid", lambda: status.st_gid + 1)
    assert "others must not write" in str(triton_kernels.cache_problem())


def test_triton_declines_gpu_calls_with_a_foreign_cache_and_serves_others() -> None:
    constraint = next(
        candidate for candidate in triton_kernels.CONSTRAINTS if "cache_problem" in candidate.holds.__code__.co_names
    )
    assert triton_kernels.CONSTRAINTS.index(constraint) == 2
