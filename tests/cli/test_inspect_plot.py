"""The picture of ``dit-rope inspect --plot``: the frequencies in it are the model's own, and so is what is drawn."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dit_rope
from benchmarks import frequency_plot
from benchmarks.frequency_plot import Setting, draw
from benchmarks.inspect_plot import parse_scalings
from benchmarks.model_frequencies import ModelFrequencies, frequencies_of
from benchmarks.random_models import EmptyOptions
from dit_rope import Grid, RopeSpec, Scaling, Shard, cli
from dit_rope.adapters import adapter_named
from dit_rope.models import ADAPTERS
from zoo import EXAMPLES, Example, Noise

ROOT = Path(__file__).resolve().parents[2]
EPS = float(torch.finfo(torch.float32).eps)
VIDEO, IMAGE = (21, 30, 52), (1, 64, 64)
RIFLEX = (Scaling.of("riflex", frames=33, repetition=21), None, None)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def built(name: str, **config: Any) -> Any:
    module, _, _ = adapter_named(name).model.rpartition(".")
    with EmptyOptions(device="meta"):
        return getattr(importlib.import_module(module), name)(**config)


def read(name: str, sizes: tuple[int, int, int] = VIDEO, scaling: Any = None, **config: Any) -> ModelFrequencies:
    return frequencies_of(built(name, **config), adapter_named(name), sizes, scaling)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])


def powers(dim: int, theta: float) -> torch.Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def ntk(theta: float, factor: float, dim: int) -> float:
    return theta * factor ** (dim / (dim - 2))


def ltx(step: float) -> torch.Tensor:
    return 10_000 ** torch.linspace(0, 1, 341, dtype=torch.float64) * math.pi * step


WAN = [powers(44, 1e4), powers(42, 1e4), powers(42, 1e4)]
FLUX = [powers(16, 1e4), powers(56, 1e4), powers(56, 1e4)]
HUNYUAN = [powers(16, 256), powers(56, 256), powers(56, 256)]
Z_IMAGE = [powers(32, 256), powers(48, 256), powers(48, 256)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WanTransformer3DModel", WAN),
        ("SkyReelsV2Transformer3DModel", WAN),
        ("HeliosTransformer3DModel", WAN),
        ("CosmosTransformer3DModel", [powers(44, ntk(1e4, 2.0, 44)), *WAN[1:]]),
        ("HunyuanVideoTransformer3DModel", HUNYUAN),
        ("HunyuanVideoFramepackTransformer3DModel", HUNYUAN),
        ("HunyuanVideo15Transformer3DModel", HUNYUAN),
        ("HunyuanImageTransformer2DModel", [powers(64, 256)] * 2),
        ("MotifVideoTransformer3DModel", HUNYUAN),
        ("LTXVideoTransformer3DModel", [ltx(8 / 25 / 20), ltx(32 / 2048), ltx(32 / 2048)]),
        ("FluxTransformer2DModel", FLUX),
        ("ChromaTransformer2DModel", FLUX),
        ("Flux2Transformer2DModel", [powers(32, 2000)] * 4),
        ("Krea2Transformer2DModel", [powers(32, 1e3), powers(48, 1e3), powers(48, 1e3)]),
        ("QwenImageTransformer2DModel", FLUX),
        ("NucleusMoEImageTransformer2DModel", FLUX),
        ("ZImageTransformer2DModel", Z_IMAGE),
        ("Lumina2Transformer2DModel", [powers(32, 1e4)] * 2),
        ("PRXTransformer2DModel", [powers(32, 1e4)] * 2),
    ],
)
def test_frequencies_of_a_family_are_those_of_its_formula(name, expected) -> None:
    frequencies = read(name)
    assert len(frequencies.axes) == len(expected)
    for axis, radians in zip(frequencies.axes, expected, strict=True):
        # Float32 angles are off by a rounding of the largest; far tokens tell the frequency that much better.
        scale = radians.max() * 64
        torch.testing.assert_close(axis.radians, radians, rtol=2 * EPS, atol=float(2 * EPS * max(1.0, scale) / 11))


def test_frequencies_number_every_pair_of_channels_once() -> None:
    for name, pairs in (("WanTransformer3DModel", 64), ("FluxTransformer2DModel", 64), ("Flux2Transformer2DModel", 64)):
        numbers = torch.cat([axis.pairs for axis in read(name).axes])
        assert sorted(numbers.tolist()) == list(range(pairs))


@pytest.mark.parametrize("spaced", [{}, {"patch_size_t": 2, "patch_bias": False}], ids=["cogvideox", "cogvideox-1.5"])
def test_frequencies_of_cogvideox_are_those_of_its_pipeline(spaced) -> None:
    config = {"use_rotary_positional_embeddings": True, "num_layers": 1, **spaced}
    frequencies = read("CogVideoXTransformer3DModel", (13, 30, 45), **config)
    for axis, dim in zip(frequencies.axes, (16, 24, 24), strict=True):
        torch.testing.assert_close(axis.radians, powers(dim, 1e4), rtol=2 * EPS, atol=2 * EPS)
    wider = read("CogVideoXTransformer3DModel", (13, 30, 30), **config)
    # CogVideoX 1.0 fits the grid into the one it was trained on, whose height is the shorter side.
    torch.testing.assert_close(wider.axes[1].radians, frequencies.axes[1].radians, rtol=4 * EPS, atol=4 * EPS)


def rotary_of_a_forward(example: Example, model: Any, adapter: Any) -> Any:
    """The rotary argument of the last attention module that rotates, in one forward pass."""
    rotations = adapter.rotations[0]
    tables: list[Any] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        others = {
            name: value for argument in bound.values() if isinstance(argument, dict) for name, value in argument.items()
        }
        tables.append({**bound, **others}.get(rotations.rotary[0]))

    for path, module in model.named_modules():
        if re.fullmatch(rotations.attention, path):
            module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        example.run(model, example.inputs(model, Noise(torch.float32)))
    return next(rotary for rotary in reversed(tables) if rotary is not None)


IN_A_FORWARD = (
    "flux", "flux-kontext", "flux-controlnet", "chroma", "flux2", "bria", "bria-fibo", "bria-fibo2", "longcat-image",
    "ovis-image", "krea2", "hunyuan-video", "hunyuan-video-1.5-t2v", "hunyuan-image", "hunyuan-image-refiner",
    "motif-video", "qwen-image", "qwen-image-controlnet", "nucleus", "z-image", "lumina2", "prx", "helios-plain",
    "sana-wm", "glm-image", "hidream",
)  # fmt: skip
BY_NAME = {example.name: example for example in EXAMPLES}


@pytest.mark.parametrize("example", [BY_NAME[name] for name in IN_A_FORWARD], ids=IN_A_FORWARD)
def test_frequencies_give_the_rotation_that_attention_is_given_in_a_forward_pass(example) -> None:
    """All tokens stand whole numbers of tokens apart on every axis, and each pair rotates by its radians times that."""
    name = example.model.rpartition(".")[2]
    adapter = adapter_named(name)
    frequencies = frequencies_of(built(name, **example.config), adapter, (4, 6, 10))
    cos, sin = adapter.rotations[0].format.split(rotary_of_a_forward(example, example.build(), adapter))[0]
    rotations = torch.complex(cos.double(), sin.double())[0].flatten(1)
    rotations = rotations[rotations.abs().amin(dim=1) > 0.5]  # padding rotates nothing
    between = rotations * rotations[0].conj()
    moved = 0
    for axis in (
        axis for axis in frequencies.axes if len(axis.pairs) > 1
    ):  # how far, the angle of one pair cannot tell
        slowest = axis.radians.argmin()
        distance = (between[:, axis.pairs[slowest]].angle() / axis.radians[slowest])[:, None]
        moved += int(distance.abs().max() > 0.5)
        assert (distance - distance.round()).abs().max() < 0.1
        expected = torch.polar(torch.ones_like(axis.radians), distance.round() * axis.radians)
        allowed = 8 * EPS * (1 + 64 * axis.radians.max())
        assert (between[:, axis.pairs] - expected).abs().max() < allowed
    assert moved >= 1


def test_frequencies_of_wan_give_the_tables_of_its_rope_module() -> None:
    import diffusers

    rope = diffusers.WanTransformer3DModel(num_layers=1, num_attention_heads=1).rope
    cos, sin = rope(torch.empty(1, 0, 5, 14, 22))
    rotations = torch.complex(cos[0, :, 0, ::2].double(), sin[0, :, 0, ::2].double()).unflatten(0, (5, 7, 11))
    axes = read("WanTransformer3DModel").axes
    for axis, token in zip(axes, ((4, 0, 0), (0, 6, 0), (0, 0, 10)), strict=True):
        expected = torch.polar(torch.ones_like(axis.radians), max(token) * axis.radians)
        torch.testing.assert_close(rotations[token][axis.pairs], expected, rtol=0, atol=2 * EPS)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MochiTransformer3DModel", "MochiRoPE takes pos_frequencies"),
        ("LTX2VideoTransformer3DModel", "takes coords"),
        ("StableAudio3DiTModel", "takes seq_len"),
        ("AllegroTransformer3DModel", "it is handed them"),
        ("SanaVideoTransformer3DModel", "must have a rotation that dit_rope knows"),
        ("CogVideoXTransformer3DModel", "its configuration turns them off"),
        ("CogView4Transformer2DModel", "spaces its tokens evenly"),
    ],
)
def test_model_whose_frequencies_cannot_be_read_is_refused_with_the_reason(name, why) -> None:
    with pytest.raises(ValueError, match=why):
        read(name)


def test_grid_that_spaces_tokens_evenly_is_read_where_another_is_not() -> None:
    axes = read("CogView4Transformer2DModel", IMAGE).axes
    # 256 positions over 64 tokens.
    torch.testing.assert_close(axes[0].radians, 4 * powers(axes[0].radians.numel() * 2, 1e4), rtol=4 * EPS, atol=EPS)


def test_frequencies_past_half_a_turn_per_token_are_not_mistaken_for_slow_ones() -> None:
    """Whole turns do not show in a table: LTX turns some 80 times per token, CogView 4 more than half a turn here."""
    assert read("LTXVideoTransformer3DModel").axes[1].radians.max() > 450
    fastest = read("CogView4Transformer2DModel", (1, 32, 32)).axes[0].radians.max()
    assert fastest == pytest.approx(8, abs=1e-5)


def test_grid_of_one_row_shows_no_frequencies_and_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens or more along height and width"):
        read("CosmosTransformer3DModel", (5, 1, 8))


def test_grid_past_the_positions_of_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one that CosmosTransformer3DModel has positions for"):
        read("CosmosTransformer3DModel", (1, 4000, 2))


class _Wrong(torch.nn.Module):
    """A rope module of Flux whose angles another function of the coordinates gives."""

    axes_dim = (4, 6, 6)

    def __init__(self, angles: Any) -> None:
        super().__init__()
        self.angles = angles

    def forward(self, ids: torch.Tensor) -> Any:
        angles = self.angles(ids.double()).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("angles", "why"),
    [
        (lambda ids: torch.stack((0.1 * ids[:, 0], 0.2 * ids[:, 1] ** 2, 0.3 * ids[:, 2]), 1), "evenly"),
        (lambda ids: torch.stack((0.1 * ids[:, 0], 0.2 * ids[:, 1] + 0.1 * ids[:, 2]), 1), "with one axis"),
        (lambda ids: torch.stack((0.1 * ids[:, 0], 0.01 * ids[:, 1] * ids[:, 2]), 1), "with one axis"),
        (lambda ids: torch.zeros(len(ids), 8), "rotate nothing"),
    ],
    ids=["uneven", "two-axes", "product", "nothing"],
)
def test_tables_that_are_not_so_many_radians_per_token_are_refused(angles, why) -> None:
    model = built("FluxTransformer2DModel", num_layers=1, num_single_layers=1)
    model.pos_embed = _Wrong(angles)
    with pytest.raises(ValueError, match=why):
        frequencies_of(model, adapter_named("FluxTransformer2DModel"), IMAGE)


def test_weights_stay_on_the_meta_device_while_frequencies_are_numbers() -> None:
    model = built("WanTransformer3DModel", num_layers=1)
    assert model.blocks[0].attn1.to_q.weight.is_meta
    assert not any(buffer.is_meta for buffer in model.rope.buffers())


def test_scaled_frequencies_are_those_of_the_scaling() -> None:
    frequencies = read("WanTransformer3DModel", scaling=Scaling.of("linear", factor=4.0))
    for axis, scaled in zip(frequencies.axes, frequencies.scaled, strict=True):
        torch.testing.assert_close(scaled.radians, axis.radians / 4)
    frequencies = read("WanTransformer3DModel", scaling=RIFLEX)
    moved = [
        int((axis.radians != other.radians).sum())
        for axis, other in zip(frequencies.axes, frequencies.scaled, strict=True)
    ]
    assert moved == [1, 0, 0]


def test_scaling_of_a_model_that_builds_its_own_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="scaling must be left out for FluxTransformer2DModel"):
        read("FluxTransformer2DModel", IMAGE, Scaling.of("linear", factor=2.0))


def test_response_is_the_score_of_equal_queries_and_keys() -> None:
    frequencies = read(
        "WanTransformer3DModel", scaling=Scaling.of("yarn", factor=4.0, original_max_position_embeddings=64)
    )
    q = torch.ones(1, 9, 1, 128, dtype=torch.float64)
    for scaling, axes in (
        (None, frequencies.axes),
        (Scaling.of("yarn", factor=4.0, original_max_position_embeddings=64), frequencies.scaled),
    ):
        spec = RopeSpec((44, 42, 42), scaling=scaling)
        table = dit_rope.rope_table(spec, Grid(9, 1, 1), dtype=torch.float64)
        rotated = dit_rope.rotate(q, table)[0, :, 0, :44]
        scores = rotated @ rotated[0] / 44
        torch.testing.assert_close(axes[0].response(torch.arange(9)), scores, rtol=1e-6, atol=1e-6)


def test_memory_is_that_of_the_tables() -> None:
    frequencies, grid = read("WanTransformer3DModel"), Grid(*VIDEO)
    table = dit_rope.rope_table(RopeSpec((44, 42, 42)), grid, dtype=torch.float32)
    assert frequencies.axis_bytes(VIDEO) == table.rows.nbytes
    assert frequencies.dense_bytes(VIDEO) == sum(values.nbytes for values in table.cos_sin())
    flux = read("FluxTransformer2DModel", IMAGE)
    assert flux.dense_bytes(IMAGE) == 2 * 64 * 64 * 128 * 4


@pytest.mark.parametrize("sizes", [(4, 6, 8), (3, 5, 7), (1, 4, 4)])
@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
def test_ranks_are_those_of_the_shards(sizes, ranks) -> None:
    ways = frequency_plot._ways(Setting(sizes, ranks))
    flat = np.arange(math.prod(sizes)).reshape(sizes)
    rank_of_token, count = ways.pop("flattened")
    assert count == -(-flat.size // ranks)
    np.testing.assert_array_equal(rank_of_token, flat // count)
    for axis, name in enumerate(("frame", "height", "width")):
        if sizes[axis] % ranks or sizes[axis] == 1:
            assert f"by {name}" not in ways
            continue
        rank_of_token, count = ways.pop(f"by {name}")
        np.testing.assert_array_equal(rank_of_token, np.indices(sizes)[axis] // (sizes[axis] // ranks))
        assert count == flat.size // ranks
        table = dit_rope.rope_table(RopeSpec((4, 4, 4)), Grid(*sizes), shard=Shard(0, ranks, axis))
        assert table.count == count
    assert not ways


def test_frames_shown_are_those_where_ranks_meet() -> None:
    ranks, _ = frequency_plot._ways(Setting((33, 30, 52), 4))["flattened"]
    shown = frequency_plot._frames_shown(ranks)
    assert {0, 8, 16, 24, 32} <= set(shown)
    assert len(shown) == 10
    assert frequency_plot._frames_shown(ranks[:3]) == [0, 1, 2]


@pytest.mark.parametrize("ranks", [1, 3, 24])
@pytest.mark.parametrize(
    ("name", "sizes"), [("WanTransformer3DModel", (5, 6, 8)), ("FluxTransformer2DModel", (1, 6, 8))]
)
def test_picture_is_written_with_any_number_of_ranks(name, sizes, ranks, tmp_path) -> None:
    draw(read(name, sizes), Setting(sizes, ranks), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (1200, 1200)
        assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_svg_says_what_it_shows_and_is_the_same_each_time(tmp_path) -> None:
    frequencies = read("WanTransformer3DModel", scaling=RIFLEX)
    for name in ("a.svg", "b.svg"):
        draw(frequencies, Setting(VIDEO, 4, "riflex"), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for words in ("scaled by riflex", "frame, scaled", "flattened", "8,190 tokens each", "33.5 MB", "rank 3"):
        assert words in text


def test_padding_of_the_last_ranks_is_named(tmp_path) -> None:
    draw(read("WanTransformer3DModel"), Setting((3, 5, 7), 4), tmp_path / "a.svg")
    assert "(3 of padding)" in (tmp_path / "a.svg").read_text()
    draw(read("WanTransformer3DModel"), Setting((4, 5, 7), 4), tmp_path / "b.svg")
    assert "of padding" not in (tmp_path / "b.svg").read_text()


def test_picture_in_the_documentation_is_of_the_model_as_it_is() -> None:
    sizes = (33, 30, 52)
    frequencies, text = read("WanTransformer3DModel", sizes), (ROOT / "docs" / "wan-frequencies.svg").read_text()
    assert "WanTransformer3DModel, a grid of 33 x 30 x 52 tokens, scaled by riflex:frames=33,repetition=21" in text
    for number in (frequencies.dense_bytes(sizes), frequencies.axis_bytes(sizes)):
        assert f">{frequency_plot._bytes(number)}<" in text


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], None),
        (["none"], None),
        (["linear:factor=4"], Scaling.of("linear", factor=4)),
        (["riflex:frames=33,repetition=21"], RIFLEX),
        (["none", "ntk:factor=2.5", "none"], (None, Scaling.of("ntk", factor=2.5), None)),
        (['{"rope_type": "linear", "factor": 4.0}'], Scaling.of("linear", factor=4.0)),
        (['{"type": "default"}'], None),
    ],
)
def test_scaling_on_the_command_line_is_read(texts, expected) -> None:
    assert parse_scalings(texts) == expected


@pytest.mark.parametrize(
    "text", ["nothing:factor=2", "linear:factor", "linear:factor=big", "linear", "{", "linear:k=2"]
)
def test_scaling_on_the_command_line_is_refused(text, tmp_path) -> None:
    result = invoke("WanTransformer3DModel", "--plot", tmp_path / "a.svg", "--scaling", text)
    assert result.exit_code == 2
    assert "--scaling" in result.output


def test_inspect_draws_a_class_and_still_prints_what_it_did(tmp_path) -> None:
    path = tmp_path / "wan.svg"
    result = invoke("WanTransformer3DModel", "--plot", path, "--grid", "4x6x8", "--scaling", "linear:factor=2")
    assert result.exit_code == 0, result.output
    assert "kernels read a small array per axis" in result.output
    assert "a grid of 4 x 6 x 8 tokens, scaled by linear:factor=2" in path.read_text()


def test_inspect_draws_a_folder_of_its_own_configuration(random_wan_folder, tmp_path) -> None:
    path = tmp_path / "wan.svg"
    result = invoke(random_wan_folder, "--plot", path, "--grid", "2x4x6", "--ranks", "2")
    assert result.exit_code == 0, result.output
    text = path.read_text()
    # 24 channels and not 128.
    assert f">{frequency_plot._bytes(2 * 2 * 4 * 6 * 24 * 4)}<" in text
    assert "rank 1" in text
    assert "rank 2" not in text


def test_inspect_draws_each_transformer_of_a_pipeline(random_wan_folder, tmp_path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(random_wan_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"transformer_2": index["transformer"]}))
    result = invoke(folder, "--plot", tmp_path / "wan.png", "--grid", "2x4x6")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["wan-transformer.png", "wan-transformer_2.png"]


def test_inspect_of_a_model_that_cannot_be_read_says_why_and_writes_nothing(tmp_path) -> None:
    result = invoke("MochiTransformer3DModel", "--plot", tmp_path / "a.svg")
    assert result.exit_code == 1
    assert "no picture: MochiTransformer3DModel must build its rotary tables" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("WanTransformer3DModel", "--plot", "a.pdf"), "must end in .svg or .png"),
        (("WanTransformer3DModel", "--plot", "/absent/a.svg"), "must lie in a folder that exists"),
        (("WanTransformer3DModel", "--plot", "a.svg", "--grid", "4x4"), "must be framesxheightxwidth"),
        (("WanTransformer3DModel", "--grid", "4x4x4"), "must be given with --grid and --scaling"),
        (("HiDreamImageTransformer2DModel", "--plot", "a.svg"), "must be a folder or hub id for --plot"),
        (("WanTransformer3DModel", "--plot", "a.svg", "--ranks", "0"), "--ranks"),
    ],
)
def test_inspect_refuses(arguments, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not list(tmp_path.iterdir())


def test_inspect_without_matplotlib_says_how_to_get_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("WanTransformer3DModel", "--plot", tmp_path / "a.svg")
    assert result.exit_code == 2
    assert "matplotlib must be installed: pip install 'dit-rope[bench]'" in result.output


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.model_class)
def test_every_known_class_is_read_or_refused_with_words(adapter) -> None:
    try:
        model = built(adapter.model_class)
    except (AttributeError, TypeError, ValueError):
        pytest.skip("no default configuration")
    words = ""
    try:
        frequencies = frequencies_of(model, adapter, (4, 12, 16))
    except ValueError as error:
        words = str(error)
    if words:
        assert "must" in words
        assert adapter.model_class in words
    else:
        assert len(frequencies.axes) >= 2
