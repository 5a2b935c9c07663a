"""The Hunyuan family: one table for the image, unrotated text after it in the joint sequence, norms per head.

Double blocks have separate norms for image and text. Single blocks norm the joint sequence, whose start rotates. Pairs
are neighbours.

Framepack joins the tables of a video and of its history at three resolutions, two of them pooled. The pipeline makes
the frame indices once for all steps of a section.

Sources, all in diffusers 0.42.1: ``transformer_hunyuan_video.py``, ``transformer_hunyuan_video_framepack.py``,
``transformer_hunyuan_video15.py``, ``transformer_hunyuanimage.py``.
"""

from __future__ import annotations

from ..hooks.adapter import EVERY, AttentionRotation, Layout, ModelAdapter, ModelTables
from ..hooks.formats import INTERLEAVED


def _adapter(model: str, tables: tuple[ModelTables, ...], processor: str) -> ModelAdapter:
    return ModelAdapter(
        f"diffusers.models.transformers.{model}",
        tables,
        (
            AttentionRotation(
                attention=r"(single_)?transformer_blocks\.\d+\.attn",
                attention_class="Attention",
                format=INTERLEAVED,
                layout=Layout.BSHD,
                processors=(processor,),
            ),
        ),
    )


HUNYUAN_VIDEO = _adapter(
    "transformer_hunyuan_video.HunyuanVideoTransformer3DModel",
    (ModelTables("rope", "HunyuanVideoRotaryPosEmbed", keyed_by_shape=EVERY),),
    "HunyuanVideoAttnProcessor2_0",
)
HUNYUAN_VIDEO_FRAMEPACK = _adapter(
    "transformer_hunyuan_video_framepack.HunyuanVideoFramepackTransformer3DModel",
    (ModelTables("rope", "HunyuanVideoFramepackRotaryPosEmbed"),),
    "HunyuanVideoAttnProcessor2_0",
)
HUNYUAN_VIDEO_15 = _adapter(
    "transformer_hunyuan_video15.HunyuanVideo15Transformer3DModel",
    (ModelTables("rope", "HunyuanVideo15RotaryPosEmbed", keyed_by_shape=EVERY),),
    "HunyuanVideo15AttnProcessor2_0",
)
HUNYUAN_IMAGE = _adapter(
    "transformer_hunyuanimage.HunyuanImageTransformer2DModel",
    (ModelTables("rope", "HunyuanImageRotaryPosEmbed", keyed_by_shape=EVERY),),
    "HunyuanImageAttnProcessor",
)

ADAPTERS = (HUNYUAN_VIDEO, HUNYUAN_VIDEO_FRAMEPACK, HUNYUAN_VIDEO_15, HUNYUAN_IMAGE)
