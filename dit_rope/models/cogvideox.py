"""CogVideoX and ConsisID: text before the image in the joint sequence unrotated, LayerNorm per head.

Queries and keys are transposed before the norm; neighbours rotate. The pipeline builds one table for all steps.
Sources: ``cogvideox_transformer_3d.py``, ``consisid_transformer_3d.py`` and ``attention_processor.py`` of diffusers
0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, NormRotation
from ..hooks.formats import INTERLEAVED
from ..hooks.packed_tables import Align


def _adapter(model: str, *processors: str) -> ModelAdapter:
    return ModelAdapter(
        f"diffusers.models.transformers.{model}",
        rotations=(
            AttentionRotation(
                attention=r"transformer_blocks\.\d+\.attn1",
                attention_class="Attention",
                format=INTERLEAVED,
                layout=Layout.BHSD,
                norms={"norm_q": NormRotation(align=Align.END), "norm_k": NormRotation(align=Align.END)},
                processors=processors,
            ),
        ),
        not_patched=("tables, which the pipeline builds once for all steps",),
    )


COGVIDEOX = _adapter(
    "cogvideox_transformer_3d.CogVideoXTransformer3DModel",
    "CogVideoXAttnProcessor2_0",
    "FusedCogVideoXAttnProcessor2_0",
)
CONSISID = _adapter("consisid_transformer_3d.ConsisIDTransformer3DModel", "CogVideoXAttnProcessor2_0")

ADAPTERS = (COGVIDEOX, CONSISID)
