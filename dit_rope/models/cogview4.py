"""CogView4 and GLM-Image: half pairing, LayerNorm without weight per head, text before image and not rotated.

Their tables depend only on the size of the latent and are built on the default device. Every attention module would
copy them to the device of the model; the cache keeps them there. The result of the norm is rounded to the dtype of the
attention's input before it rotates. Sources: ``transformer_cogview4.py`` and ``transformer_glm_image.py`` of
diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, CastTo, Layout, ModelAdapter, ModelTables, NormRotation
from ..hooks.formats import HALF
from ..hooks.packed_tables import Align


def _adapter(model: str, rope: str, layout: Layout, processors: tuple[str, ...]) -> ModelAdapter:
    return ModelAdapter(
        f"diffusers.models.transformers.{model}",
        (ModelTables("rope", rope, keyed_by_shape=("hidden_states",), to_device=True),),
        (
            AttentionRotation(
                attention=r"transformer_blocks\.\d+\.attn1",
                attention_class="Attention",
                format=HALF,
                layout=layout,
                norms={"norm_q": NormRotation(align=Align.END), "norm_k": NormRotation(align=Align.END)},
                processors=processors,
                cast_to=CastTo.INPUT,
            ),
        ),
    )


# Samples that a trainer packs into one sequence come with a list of tables, which no format accepts.
COGVIEW4 = _adapter(
    "transformer_cogview4.CogView4Transformer2DModel",
    "CogView4RotaryPosEmbed",
    Layout.BHSD,
    ("CogView4AttnProcessor", "CogView4TrainingAttnProcessor"),
)
GLM_IMAGE = _adapter(
    "transformer_glm_image.GlmImageTransformer2DModel",
    "GlmImageRotaryPosEmbed",
    Layout.BSHD,
    ("GlmImageAttnProcessor",),
)

ADAPTERS = (COGVIEW4, GLM_IMAGE)
