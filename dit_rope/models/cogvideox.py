"""CogVideoX and ConsisID: text before the image in the joint sequence unrotated, LayerNorm per head.

Queries and keys are transposed before the norm; neighbours rotate. The pipeline builds one table for all steps.
Sources: ``cogvideox_transformer_3d.py``, ``consisid_transformer_3d.py`` and ``attention_processor.py`` of diffusers
0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import Layout, ModelAdapter, Rotated, Rotations
from ..hooks.formats import INTERLEAVED
from ..hooks.packed_tables import Align


def _adapter(model: str, *processors: str) -> ModelAdapter:
    return ModelAdapter(
        f"diffusers.models.transformers.{model}",
        rotations=(
            Rotations(
                attention=r"transformer_blocks\.\d+\.attn1",
                attention_class="Attention",
                format=INTERLEAVED,
                layout=Layout.BHSD,
                rotated={"norm_q": Rotated(align=Align.END), "norm_k": Rotated(align=Align.END)},
                processors=processors,
            ),
        ),
        left_alone=("tables, which the pipeline builds once for all steps",),
    )


COGVIDEOX = _adapter(
    "cogvideox_transformer_3d.CogVideoXTransformer3DModel",
    "CogVideoXAttnProcessor2_0",
    "FusedCogVideoXAttnProcessor2_0",
)
CONSISID = _adapter("consisid_transformer_3d.ConsisIDTransformer3DModel", "CogVideoXAttnProcessor2_0")
