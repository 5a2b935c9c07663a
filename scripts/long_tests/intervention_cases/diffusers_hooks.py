"""diffusers' and accelerate's own hooks: caches, guidance, layer skipping, casting, offloading."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from typing import Any

import torch

from .core import NotApplicable, Subject, intervention
from .parts import scaled

lasting = functools.partial(intervention, reversible=False)


def _tells_steps(subject: Subject) -> dict[str, int]:
    told = {"timestep": 500}
    subject.before_step = lambda number: told.update(timestep=500 - 50 * number)
    return told


def _forget_signatures() -> None:
    """Diffusers remembers the arguments of blocks in the process: a missing one is another error the second time."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    for metadata in TransformerBlockRegistry._registry.values():
        metadata._cached_parameter_indices = None


def _cached(config_of: Any) -> Any:
    """A cache of diffusers', in the context that pipelines run their steps in."""

    def put(subject: Subject) -> None:
        if not hasattr(subject.model, "enable_cache"):
            raise NotApplicable("no enable_cache")
        _forget_signatures()
        subject.model.enable_cache(config_of(subject, _tells_steps(subject)))
        real = subject.run

        def run(inputs: Any) -> Any:
            with subject.model.cache_context("cond"):
                return real(inputs)

        subject.run = run
        subject.off(subject.model.disable_cache)

    return put


def _broadcast(subject: Subject, told: dict[str, int]) -> Any:
    import diffusers

    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        cross_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: told["timestep"],
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks", "layers"),
    )


def _first_block(subject: Subject, told: dict[str, int]) -> Any:
    import diffusers

    return diffusers.FirstBlockCacheConfig(threshold=0.05)


def _taylor(subject: Subject, told: dict[str, int]) -> Any:
    import diffusers

    return diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)


def _mag(subject: Subject, told: dict[str, int]) -> Any:
    import diffusers

    return diffusers.MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4, threshold=0.5, retention_ratio=0.2)


def _faster(subject: Subject, told: dict[str, int]) -> Any:
    import diffusers

    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: told["timestep"],
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW",
    )


for _name, _config in (("pyramid attention broadcast", _broadcast), ("first block cache", _first_block),
                       ("MagCache", _mag), ("FasterCache", _faster)):  # fmt: skip
    lasting(_name, undo_reaches=False)(_cached(_config))  # what it keeps was computed while patched
# It extrapolates from differences of outputs, which keep their roundings.
lasting("TaylorSeer cache", undo_reaches=False, roundings=512)(_cached(_taylor))


@lasting("SEG", changes=True)
def seg(subject: Subject) -> None:
    """Smoothed energy guidance: a hook that blurs what to_q returns."""
    from diffusers.hooks import smoothed_energy_guidance_utils as utils

    config = utils.SmoothedEnergyGuidanceConfig(indices=[0, 1])
    try:
        utils._apply_smoothed_energy_guidance_hook(subject.model, config, 1.0)
    except ValueError as error:
        raise NotApplicable(str(error)[:60]) from error


def _on_parts(kind: str, factor: float) -> Any:
    """A hook of diffusers' registry, which replaces the forward of the module."""

    def put(subject: Subject) -> None:
        from diffusers.hooks import HookRegistry, ModelHook

        class Scale(ModelHook):
            def post_forward(self, module: Any, output: Any) -> Any:
                return scaled(output, factor, kind == "ropes")

        for module in subject.modules(kind):
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(Scale(), "scale")
            subject.off(registry.remove_hook, "scale")

    return put


for _kind in ("blocks", "attentions", "norms", "projections", "ropes"):
    lasting(f"ModelHook on {_kind} that does nothing")(_on_parts(_kind, 1))
    lasting(f"ModelHook on {_kind} that scales", changes=True)(_on_parts(_kind, 1.5))


def _skipping(**options: bool) -> Any:
    def put(subject: Subject) -> None:
        from diffusers.hooks import LayerSkipConfig, apply_layer_skip

        _forget_signatures()
        subject.modules("blocks")
        fqn = subject.parts.blocks[0].rpartition(".")[0]
        apply_layer_skip(subject.model, LayerSkipConfig(indices=[0], fqn=fqn, **options))

    return put


lasting("layer skip of a block", changes=True)(_skipping())
lasting("layer skip of attention", changes=True)(
    _skipping(skip_attention=True, skip_ff=False, skip_attention_scores=False)
)
lasting("layer skip of attention scores", changes=True)(
    _skipping(skip_attention=False, skip_ff=False, skip_attention_scores=True)
)


def _blurred(output: torch.Tensor) -> torch.Tensor:
    return (output + output.roll(1, 1)) / 2


@lasting("ModelHook on projections that blurs", changes=True)
def blurred(subject: Subject) -> None:
    """As SEG, for every model: tokens are mixed, each of which rotates by another angle."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Blur(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return _blurred(output)

    for module in subject.modules("projections"):
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(Blur(), "blur")
        subject.off(registry.remove_hook, "blur")


@lasting("layerwise casting", changes=True)
def layerwise(subject: Subject) -> None:
    """Weights in bfloat16 that are cast in every forward."""
    subject.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def _group(**options: Any) -> Any:
    def put(subject: Subject) -> None:
        if not getattr(subject.model, "_supports_group_offloading", True):
            raise NotApplicable("no group offloading")
        folder = {}
        if options.get("disk"):
            folder = {"offload_to_disk_path": subject.enter(tempfile.TemporaryDirectory())}
        subject.model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=options["kind"],
            num_blocks_per_group=1 if options["kind"] == "block_level" else None, **folder,
        )  # fmt: skip

    return put


lasting("group offload of leaves")(_group(kind="leaf_level"))
lasting("group offload of blocks")(_group(kind="block_level"))
lasting("group offload of leaves to disk")(_group(kind="leaf_level", disk=True))


@lasting("accelerate's offload to the host")
def cpu_offload(subject: Subject) -> None:
    """Hooks that bring weights before each forward, and take them away after it."""
    import accelerate

    accelerate.cpu_offload(subject.model, execution_device=torch.device("cpu"))


@lasting("accelerate's offload to disk")
def disk_offload(subject: Subject) -> None:
    """The same, from files."""
    import accelerate

    folder = subject.enter(tempfile.TemporaryDirectory())
    accelerate.disk_offload(subject.model, folder, execution_device=torch.device("cpu"))


@intervention("accelerate's hooks come and go", reversible=False)
def come_and_go(subject: Subject) -> None:
    """Hooks are put onto every module and taken from it again between steps."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    def before_step(number: int) -> None:
        for module in list(subject.model.modules()):
            if number == 1:
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
            else:
                with contextlib.suppress(AttributeError):
                    remove_hook_from_module(module)

    subject.before_step = before_step
