"""The ``dit-rope`` command on small models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dit_rope
from dit_rope import cli
from dit_rope.models import ADAPTERS
from dit_rope.rotation.choice import explain_backends

COMMANDS = ("demo", "inspect", "bench", "doctor")
DEMO = ("--prompt", "a", "--steps", "2", "--frames", "5", "--size", "32x48", "--device", "cpu")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, one_thread):
    """No line of output is wrapped, whatever terminal runs the tests."""
    monkeypatch.setenv("COLUMNS", "400")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_help_names_every_command() -> None:
    text = invoke("--help").output
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_command_starts_with_what_it_does(command) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage: dit-rope" in result.output
    assert "--help" in result.output


def test_version_is_that_of_the_package() -> None:
    assert invoke("--version").output == f"dit-rope {dit_rope.__version__}\n"


def test_module_is_the_command_where_nothing_is_installed(tmp_path) -> None:
    """In a checkout that is only on the path, from any folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(dit_rope.__file__).parent.parent)}
    call = [sys.executable, "-m", "dit_rope", "--version"]
    process = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert process.stdout == f"dit-rope {dit_rope.__version__}\n"


def test_doctor_prints_versions_devices_and_why_each_backend_is_or_is_not_chosen() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert f"cpu: {torch.get_num_threads()} threads" in result.output
    verdicts = dict(explain_backends("cpu"))
    assert verdicts["eager"] == "chosen"
    for backend, verdict in verdicts.items():
        assert backend in result.output
        assert verdict in result.output


def test_doctor_says_so_when_a_package_or_the_kernels_are_missing(monkeypatch) -> None:
    def lost():
        raise FileNotFoundError("rope.cuh must be somewhere")

    monkeypatch.setattr(cli.doctor, "PACKAGES", ("surely-not-installed",))
    monkeypatch.setattr(cli.doctor, "kernel_sources", lost)
    output = invoke("doctor").output
    assert "not installed" in output
    assert "rope.cuh must be somewhere" in output


def test_inspect_tells_of_a_pipeline_without_its_weights(random_wan_folder, tmp_path) -> None:
    shutil.copytree(random_wan_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    result = invoke("inspect", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "transformer:" in result.output
    assert "WanTransformer3DModel" in result.output


def test_inspect_tells_what_patch_reports(random_wan_folder, random_wan) -> None:
    result = invoke("inspect", random_wan_folder / "transformer")
    with dit_rope.patch(random_wan.transformer) as handle:
        assert handle.report() in result.output


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.model_class)
def test_inspect_of_a_class_says_what_is_declared(adapter) -> None:
    result = invoke("inspect", adapter.model_class)
    assert result.exit_code == 0
    assert all(sentence in result.output for sentence in adapter.not_patched)
    assert all(tables.path in result.output for tables in adapter.tables)
    assert result.output.count("rotate") >= len(adapter.rotations)


def test_inspect_of_an_unknown_class_names_near_ones() -> None:
    result = invoke("inspect", "FluxTransformerModel")
    assert result.exit_code == 1
    assert "did you mean" in result.output
    assert "FluxTransformer2DModel" in result.output


def test_inspect_of_unsupported_model_names_supported_ones(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", "num_layers": 1}))
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert "WanTransformer3DModel" in result.output


@pytest.mark.parametrize("config", [{"_class_name": "NoSuchModel"}, {}])
def test_inspect_refuses_class_that_diffusers_does_not_know(tmp_path, config) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 2
    assert "must be of a class that diffusers" in result.output


def test_inspect_refuses_pipeline_without_transformer(random_wan_folder, tmp_path) -> None:
    index = json.loads((random_wan_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer": [None, None]}))
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 2
    assert "must have a component of a supported class" in result.output


def test_inspect_refuses_folder_without_configuration(tmp_path) -> None:
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 2
    assert "must be a folder or hub id with a model_index.json or a config.json" in result.output


@pytest.mark.parametrize(
    "arguments", [("--rounds", "2"), ("--only", "everything"), ("--device", "mps"), ("--device", "cuda:99")]
)
def test_bench_refuses(arguments, tmp_path) -> None:
    result = invoke("bench", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not (tmp_path / "out").exists()


def test_bench_refuses_a_file_as_its_folder(tmp_path) -> None:
    (tmp_path / "out").touch()
    result = invoke("bench", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2
    assert "--out" in result.output
    assert "must be a folder" in result.output


def test_bench_without_its_packages_says_how_to_get_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("benchmarks.__main__.REQUIRED", ("jinja2", "surely_not_installed"))
    result = invoke("bench", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2
    assert "surely_not_installed must be installed: pip install 'dit-rope[bench]'" in result.output
    assert not (tmp_path / "out").exists()


def test_demo_writes_videos_sheet_and_figures(random_wan_folder, tmp_path) -> None:
    result = invoke("demo", "--model", random_wan_folder, "--out", tmp_path / "out", *DEMO)
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    videos = {"unpatched.mp4", "patched.mp4", "contact_sheet.png", "preview.webp"}
    assert written == videos | {"report.json", "report.md"}
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (figures["device"], figures["dtype"], figures["max_difference"]) == ("cpu", "float32", 0)
    assert (figures["request"]["height"], figures["request"]["width"]) == (32, 48)
    assert "seconds per step" in (tmp_path / "out" / "report.md").read_text()
    for line in ("WanTransformer3DModel", "seconds per step", "SSIM", "contact_sheet.png"):
        assert line in result.output


def test_demo_in_bfloat16_keeps_the_autoencoder_in_float32(random_wan_folder) -> None:
    pipe = cli.demo.load_pipeline(str(random_wan_folder), "cpu", cli.options.DType.bfloat16)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)


def test_demo_without_sample_asks_for_a_model(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cli.demo, "SAMPLE", tmp_path / "absent")
    result = invoke("demo", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--model" in result.output
    assert "this installation has no samples/tiny-wan" in result.output
    assert not (tmp_path / "out").exists()


def test_demo_without_its_packages_says_how_to_get_them(monkeypatch, random_wan_folder) -> None:
    monkeypatch.setattr(cli.demo, "REQUIRED", ("transformers", "surely_not_installed"))
    result = invoke("demo", "--model", random_wan_folder)
    assert result.exit_code == 2
    assert "surely_not_installed must be installed: pip install 'dit-rope[demo]'" in result.output


def test_demo_refuses_pipeline_that_needs_more_than_a_prompt(random_wan, tmp_path) -> None:
    import diffusers

    components = {name: component for name, component in random_wan.components.items() if name != "transformer_2"}
    diffusers.WanImageToVideoPipeline(**components, image_encoder=None, image_processor=None).save_pretrained(tmp_path)
    result = invoke("demo", "--model", tmp_path)
    assert result.exit_code == 2
    assert "must be a text-to-video pipeline, got WanImageToVideoPipeline" in result.output


@pytest.mark.parametrize(
    "arguments", [("--size", "big"), ("--size", "8x8x8"), ("--steps", "1"), ("--model", "/absent")]
)
def test_demo_refuses(arguments, tmp_path) -> None:
    result = invoke("demo", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("bench",), ("inspect", "WanTransformer3DModel", "--plot", "a.svg")])
def test_commands_of_a_checkout_say_where_to_get_it(monkeypatch, tmp_path, arguments) -> None:
    monkeypatch.setattr(cli.checkout, "SCRIPTS", tmp_path / "site-packages" / "scripts")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"dit-rope {arguments[0]}" in result.output
    assert "must run from a checkout of the repository" in result.output
    assert "clone the repository" in result.output
