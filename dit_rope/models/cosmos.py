"""Cosmos and its ControlNet: no text in the sequence, halves rotate, RMSNorm per head of transposed queries and keys.

Tables depend on the frame rate besides the grid. Sources: ``transformer_cosmos.py`` and ``controlnet_cosmos.py`` of
diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables
from ..hooks.formats import HALF


def _adapter(model: str, blocks: str) -> ModelAdapter:
    return ModelAdapter(
        f"diffusers.models.{model}",
        (ModelTables("rope", "CosmosRotaryPosEmbed", keyed_by_shape=("hidden_states",)),),
        (
            AttentionRotation(
                attention=rf"{blocks}\.\d+\.attn1",
                attention_class="Attention",
                format=HALF,
                layout=Layout.BHSD,
                processors=("CosmosAttnProcessor2_0",),
            ),
        ),
    )


COSMOS = _adapter("transformers.transformer_cosmos.CosmosTransformer3DModel", "transformer_blocks")
COSMOS_CONTROLNET = _adapter("controlnets.controlnet_cosmos.CosmosControlNetModel", "control_blocks")

ADAPTERS = (COSMOS, COSMOS_CONTROLNET)
