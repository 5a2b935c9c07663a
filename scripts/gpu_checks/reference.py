"""What a rotation must give at some tokens, in float64, and how far from it a result may be.

Only a few tokens are looked at, so that tensors of any size can be checked where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import oracle
import torch
from tolerance import assert_within

from dit_rope import NormKind, Pairing, RopeTable
from dit_rope.backends import eager

# A peer rounds where its own code does: after the norm, its weight and the rotation, or after every product.
PEER_ROUNDINGS = 3


@dataclass(frozen=True)
class Expectation:
    """A rotation, after a norm with ``weights`` unless ``norm`` is None, of tensors ``[B, S, H, D]``.

    ``prefix`` tokens before the table's do not turn, nor do those after them.
    """

    table: RopeTable
    prefix: int = 0
    norm: NormKind | None = None
    weights: Sequence[torch.Tensor] = ()
    eps: float = 1e-6
    inverse: bool = False

    def angles(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin ``[n, pairs]`` of tokens by their number in the sequence, (1, 0) outside the table's."""
        table = self.table
        inside = (tokens >= self.prefix) & (tokens < self.prefix + table.count)
        rows = table.positions()[0, (tokens - self.prefix).clamp(0, table.count - 1)].long()
        turning = inside[:, None] & (rows >= 0)
        parts = []
        for which, still in ((0, 1.0), (1, 0.0)):
            columns = [
                torch.where(turning[:, axis, None], table.rows[which, rows[:, axis].clamp_min(0), :pairs], still)
                for axis, pairs in enumerate(table.spec.pairs)
            ]
            parts.append(torch.cat(columns, dim=1))
        return parts[0], -parts[1] if self.inverse else parts[1]

    def exact(self, x: torch.Tensor, tokens: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Float64 result ``[B, n, H, D]`` at ``tokens`` of tensor number ``index``."""
        values = x[:, tokens].double()
        if self.norm is not None:
            kind = {"across_heads": self.norm.across_heads, "centred": self.norm.centred}
            values = oracle.norm(values, self._weight(index), None, self.eps, **kind)
        interleaved = self.table.spec.pairing is Pairing.INTERLEAVED
        return oracle.rotate(values, *self.angles(tokens), interleaved=interleaved)

    def naive(self, x: torch.Tensor, tokens: torch.Tensor, index: int = 0) -> torch.Tensor:
        """The same by the plain formula in float32."""
        values = x[:, tokens].float()
        if self.norm is not None:
            flat = values.flatten(2) if self.norm.across_heads else values
            weight = self._weight(index)
            weight = None if weight is None else weight.float()
            if self.norm.centred:
                normed = torch.nn.functional.layer_norm(flat, flat.shape[-1:], weight, None, self.eps)
            else:
                normed = torch.nn.functional.rms_norm(flat, flat.shape[-1:], weight, self.eps)
            values = normed.view(values.shape)
        cos, sin = (part[None, :, None].float() for part in self.angles(tokens))
        return eager.reference(values, cos, sin, self.table.spec.pairing)

    def assert_right(self, out: torch.Tensor, x: torch.Tensor, index: int = 0, context: str = "") -> None:
        """Fails where ``out`` is further from the exact result than float32 arithmetic and one rounding explain."""
        tokens = sample(x.shape[1], x.device)
        exact, naive = self.exact(x, tokens, index), self.naive(x, tokens, index)
        assert_within(out[:, tokens], exact, naive, context)

    def assert_near(self, out: torch.Tensor, x: torch.Tensor, index: int = 0) -> None:
        """Fails where ``out`` is further from the exact result than a few roundings of its dtype explain."""
        tokens = sample(x.shape[1], x.device)
        exact = self.exact(x, tokens, index)
        allowed = float(PEER_ROUNDINGS * torch.finfo(out.dtype).eps * exact.abs().max())
        error = float((out[:, tokens].double() - exact).abs().max())
        if not error <= allowed:
            raise AssertionError(f"expected an error of at most {allowed:.3g}, got {error:.3g}")

    def _weight(self, index: int) -> torch.Tensor | None:
        return self.weights[index] if self.weights else None


def sample(count: int, device: torch.device | str, size: int = 384) -> torch.Tensor:
    """Up to ``size`` token numbers: the first, the last, and some spread over the sequence."""
    if count <= size:
        return torch.arange(count, device=device)
    third = size // 3
    spread = torch.arange(third, device=device) * (count // third)
    last = torch.arange(count - third, count, device=device)
    return torch.cat((torch.arange(third, device=device), spread, last)).unique()
