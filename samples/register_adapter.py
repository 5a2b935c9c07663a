"""Patches a transformer class that dit_rope does not know: registers an adapter, and prints what the patch replaces.

python samples/register_adapter.py
"""

from __future__ import annotations

import torch
from torch import nn

import dit_rope
from dit_rope.adapters import EVERY, INTERLEAVED, AttentionRotation, Layout, ModelAdapter, ModelTables

HEADS, HEAD_DIM = 2, 32
Rotary = tuple[torch.Tensor, torch.Tensor]


class Rope(nn.Module):
    """Builds cos and sin ``[S, D]`` of every token; the two channels of a pair are neighbours."""

    def forward(self, hidden_states: torch.Tensor) -> Rotary:
        """``hidden_states`` is ``[B, S, C]``."""
        frequencies = 10_000.0 ** -(torch.arange(0, HEAD_DIM, 2, device=hidden_states.device) / HEAD_DIM)
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotates ``x`` ``[B, S, H, D]``."""
    cos, sin = (table[None, :, None] for table in rotary)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos + torch.stack((-second, first), dim=-1).flatten(-2).float() * sin).to(x.dtype)


class SelfAttention(nn.Module):
    """Self-attention with a norm of queries and one of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)

    def forward(self, hidden_states: torch.Tensor, rotary: Rotary | None = None) -> torch.Tensor:
        """``hidden_states`` ``[B, S, C]`` after attention."""
        q, k, v = (to(hidden_states).unflatten(-1, (HEADS, -1)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        attended = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return self.to_out(attended.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Two layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.rope = Rope()
        self.layers = nn.ModuleList(SelfAttention() for _ in range(2))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``hidden_states`` ``[B, S, C]`` after all layers."""
        rotary = self.rope(hidden_states)
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states, rotary=rotary)
        return hidden_states


ADAPTER = ModelAdapter(
    f"{__name__}.Transformer",
    tables=(ModelTables("rope", "Rope", keyed_by_shape=EVERY),),
    rotations=(
        AttentionRotation(
            attention=r"layers\.\d+",
            attention_class="SelfAttention",
            format=INTERLEAVED,
            layout=Layout.BSHD,
            rotary=("rotary",),
        ),
    ),
)


def main() -> None:
    """Registers the adapter, and compares the patched model with the unpatched one."""
    torch.manual_seed(0)
    model, x = Transformer().eval(), torch.randn(1, 50, HEADS * HEAD_DIM)
    dit_rope.register_adapter(ADAPTER)
    with torch.no_grad():
        unpatched = model(x)
        with dit_rope.patch(model) as handle:
            print(handle.report())
            print("bits are the same:", torch.equal(model(x), unpatched))


if __name__ == "__main__":
    main()
