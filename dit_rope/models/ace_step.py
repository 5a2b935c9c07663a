"""ACE-Step: half pairing, RMSNorm per head, tables in the model's dtype.

Attention to the text is of the same class, and does not rotate. Source: ``ace_step_transformer.py`` of diffusers
0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, NormRotation
from ..hooks.formats import HALF

ACE_STEP = ModelAdapter(
    "diffusers.models.transformers.ace_step_transformer.AceStepTransformer1DModel",
    (),
    (
        AttentionRotation(
            attention=r"layers\.\d+\.self_attn",
            attention_class="AceStepAttention",
            format=HALF,
            layout=Layout.BSHD,
            norms={"norm_q": NormRotation(), "norm_k": NormRotation()},
            processors=("AceStepAttnProcessor2_0",),
        ),
    ),
    not_patched=("tables, which the model's forward makes through a function of its module, once for all layers",),
)

ADAPTERS = (ACE_STEP,)
