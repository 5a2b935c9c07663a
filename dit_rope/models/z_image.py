"""Z-Image, its ControlNet and Bria Fibo 2: complex tables that are gathered in every pass, RMSNorm per head or none.

Pairs are neighbours. All tokens of a sequence rotate, whatever the order of its parts. Z-Image has a table for each
sample, in which rows of padding are zeros. Its ControlNet also runs blocks of the transformer, so two models may hold
the same attention module. Sources, all in diffusers 0.42.1: ``transformer_z_image.py``,
``controlnet_z_image.py``, ``transformer_bria_fibo2.py``.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter
from ..hooks.formats import COMPLEX

_TABLES = (
    "tables: in every forward pass rope_embedder gathers them from stored rows, and the model splits, pads and joins "
    "them"
)


def _adapter(model: str, blocks: str, attention: str, processor: str) -> ModelAdapter:
    rotations = AttentionRotation(
        attention=rf"({blocks})\.\d+\.attention",
        attention_class=attention,
        format=COMPLEX,
        layout=Layout.BSHD,
        rotary=("freqs_cis",),
        processors=(processor,),
    )
    return ModelAdapter(f"diffusers.models.{model}", (), (rotations,), (_TABLES,))


Z_IMAGE = _adapter(
    "transformers.transformer_z_image.ZImageTransformer2DModel",
    "noise_refiner|context_refiner|siglip_refiner|layers",
    "Attention",
    "ZSingleStreamAttnProcessor",
)
Z_IMAGE_CONTROLNET = _adapter(
    "controlnets.controlnet_z_image.ZImageControlNetModel",
    "noise_refiner|context_refiner|control_noise_refiner|control_layers",
    "Attention",
    "ZSingleStreamAttnProcessor",
)
BRIA_FIBO_2 = _adapter(
    "transformers.transformer_bria_fibo2.BriaFibo2Transformer2DModel",
    "noise_refiner|layers",
    "BriaFibo2Attention",
    "BriaFibo2AttnProcessor",
)

ADAPTERS = (Z_IMAGE, Z_IMAGE_CONTROLNET, BRIA_FIBO_2)
