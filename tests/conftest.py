"""Fixtures that several test files share: devices, and a random pipeline small enough to generate in a second."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.tables.scaling_types import TYPES
from quick import is_quick

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_quick(item.nodeid):
            item.add_marker(pytest.mark.quick)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _shared_state() -> Iterator[None]:
    """Seeds torch and clears the caches; restores their limits and the registered scaling types after the test."""
    torch.manual_seed(0)
    dit_rope.cache_clear()
    info, types = dit_rope.cache_info(), dict(TYPES)
    yield
    TYPES.clear()
    TYPES.update(types)
    dit_rope.cache_configure(
        max_entries=info.tables.max_entries,
        max_bytes=info.tables.max_bytes,
        max_model_entries=info.models.max_entries,
        max_model_bytes=info.models.max_bytes,
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every kind of device a test runs on; the marker ``gpu`` selects those that need one."""
    return request.param


@pytest.fixture(scope="session")
def contract_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The backend and device that the environment names for ``backend_contract.py``, ready to take calls.

    Kernels that are built for a CPU are kept in the folder DIT_ROPE_EMULATION_CACHE, where that is set.
    """
    from contract_calls import prepared

    folder = os.environ.get("DIT_ROPE_EMULATION_CACHE")
    with prepared(Path(folder) if folder else tmp_path_factory.mktemp("kernels")):
        yield


@pytest.fixture(scope="session")
def built_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where CUDA kernels are kept that were built for a CPU."""
    return tmp_path_factory.mktemp("cuda-on-cpu")


@pytest.fixture
def cuda_on_cpu(built_kernels: Path) -> Iterator[Any]:
    """While it is open, the CUDA backend takes tensors on CPU; gives what stands in for its launches."""
    import cuda_emulation

    if cuda_emulation.COMPILER is None:
        pytest.skip("no C++ compiler (g++ or clang++) to build the CUDA kernel for a CPU")
    with cuda_emulation.emulated(built_kernels) as kernels:
        yield kernels


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def random_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete WanPipeline folder with random weights: 8x8x4 compression, 2 layers, 2 heads of 24 channels."""
    import diffusers
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = transformers.UMT5Config(vocab_size=3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=transformers.UMT5EncoderModel(text).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    folder = tmp_path_factory.mktemp("random-wan")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def young_heap() -> Iterator[None]:
    """Objects from before the test are no part of collections, which would take seconds for them."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One CPU thread: threads that wait for one another over tiny tensors take seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def random_wan(random_wan_folder: Path, one_thread: None) -> Any:
    """The random pipeline, freshly loaded in float32 on CPU, to run on one thread."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(random_wan_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def loads_random_pipeline(monkeypatch: pytest.MonkeyPatch, random_wan: Any) -> list[str]:
    """``from_pretrained`` loads the random pipeline; returns the names of the models that it is called with."""
    import diffusers

    names: list[str] = []

    def from_pretrained(model: Any, **_options: Any) -> Any:
        names.append(str(model))
        return random_wan

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    return names


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the rotations that patched models run, without those that show which bits a kernel gives."""
    from dit_rope.hooks import exact_bits
    from dit_rope.rotation import ops

    ran: list[str] = []
    rotate = ops.rotate

    def unrecorded(show: Callable[..., Any]) -> Callable[..., Any]:
        def shown(*args: Any) -> Any:
            before = list(ran)
            result = show(*args)
            ran[:] = before
            return result

        return shown

    def recorded(xs: Any, args: Any, norm: Any = None, **options: Any) -> Any:
        ran.append("rotate" if norm is None else "norm_rotate")
        return rotate(xs, args, norm, **options)

    monkeypatch.setattr(ops, "rotate", recorded)
    for name in ("_norms_are_equal", "_equal_arithmetic"):
        monkeypatch.setattr(exact_bits, name, unrecorded(getattr(exact_bits, name)))
    return ran
