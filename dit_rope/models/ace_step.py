"""ACE-Step: half pairing, RMSNorm per head, tables in the model's dtype.

Attention to the text is of the same class, and does not rotate. Source: ``ace_step_transformer.py`` of diffusers
0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import Layout, ModelAdapter, Rotated, Rotations
from ..hooks.formats import HALF

ACE_STEP = ModelAdapter(
    "diffusers.models.transformers.ace_step_transformer.AceStepTransformer1DModel",
    (),
    (
        Rotations(
            attention=r"layers\.\d+\.self_attn",
            attention_class="AceStepAttention",
            format=HALF,
            layout=Layout.BSHD,
            rotated={"norm_q": Rotated(), "norm_k": Rotated()},
            processors=("AceStepAttnProcessor2_0",),
        ),
    ),
    left_alone=("tables, which the model's forward makes through a function of its module, once for all layers",),
)
