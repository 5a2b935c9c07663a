"""What a rotation must give at some tokens, in float64, and how far from it a result may be.

Only a few tokens are looked at, so that tensors of any size can be checked where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dit_rope.rotation import reference
from dit_rope.spec import NormKind, Pairing
from dit_rope.tables.table import RopeTable

# A peer rounds where its own code does: after the norm, its weight and the rotation, or after every product.
PEER_ROUNDINGS = 3


@dataclass(frozen=True)
class Expectation:
    """A rotation, after a norm with ``weights`` unless ``norm`` is None, of tensors ``[B, S, H, D]``.

    ``prefix`` tokens before the table's are not rotated, nor are those after them.
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
        rotating = inside[:, None] & (rows >= 0)
        cos_sin = []
        for which, unrotated in ((0, 1.0), (1, 0.0)):
            columns = [
                torch.where(rotating[:, axis, None], table.rows[which, rows[:, axis].clamp_min(0), :pairs], unrotated)
                for axis, pairs in enumerate(table.spec.pairs)
            ]
            cos_sin.append(torch.cat(columns, dim=1))
        return cos_sin[0], -cos_sin[1] if self.inverse else cos_sin[1]

    def exact(self, x: torch.Tensor, tokens: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Float64 result ``[B, n, H, D]`` at ``tokens`` of tensor number ``index``."""
        values = x[:, tokens].double()
        if self.norm is not None:
            values = _norm(values, self.norm, self._weight(index), self.eps)
        cos, sin = self.angles(tokens)
        factor = torch.complex(cos.double(), sin.double())[:, None]
        pairs, rest = values.tensor_split([2 * factor.shape[-1]], dim=-1)
        interleaved = self.table.spec.pairing is Pairing.INTERLEAVED
        split, dim = ((-1, 2), -1) if interleaved else ((2, -1), -2)
        rotated = torch.complex(*pairs.unflatten(-1, split).unbind(dim)) * factor
        return torch.cat((torch.stack((rotated.real, rotated.imag), dim=dim).flatten(-2), rest), dim=-1)

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
        cos, sin = (values[None, :, None].float() for values in self.angles(tokens))
        return reference.rotated(values, cos, sin, self.table.spec.pairing)

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


def assert_within(actual: torch.Tensor, exact: torch.Tensor, naive: torch.Tensor, context: str = "") -> None:
    """Fails, saying where and by how much, if an element of ``actual`` is off by more than its computation explains.

    Allowed is the largest error anywhere of ``naive``, the same computation done plainly in the working precision, and
    one rounding to the dtype of ``actual``: half the distance between neighbours at the exact value, or half the least
    subnormal.
    """
    error = (naive.double() - exact).abs().max()
    info = torch.finfo(actual.dtype)
    allowed = error + (exact.abs() + error) * (info.eps / 2) + info.tiny * info.eps / 2
    excess = (actual.double() - exact).abs() / allowed
    wrong = ~(excess <= 1)  # NaN is wrong
    if wrong.any():
        worst = tuple(int(i) for i in torch.unravel_index(excess.nan_to_num(torch.inf).argmax(), excess.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off by more than the bound; worst at {worst}: "
            f"got {actual[worst].item()}, exact {exact[worst].item()}, allowed {allowed[worst].item():.3g} {context}"
        )


def _norm(values: torch.Tensor, kind: NormKind, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``kind`` of float64 ``values`` ``[B, n, H, D]``, by its definition."""
    flat = values.flatten(2) if kind.across_heads else values
    if kind.centred:
        flat = flat - flat.mean(dim=-1, keepdim=True)
    flat = flat / (flat.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return (flat if weight is None else flat * weight.double()).view(values.shape)


def sample(count: int, device: torch.device | str, size: int = 384) -> torch.Tensor:
    """Up to ``size`` token numbers: the first, the last, and some spread over the sequence."""
    if count <= size:
        return torch.arange(count, device=device)
    third = size // 3
    spread = torch.arange(third, device=device) * (count // third)
    last = torch.arange(count - third, count, device=device)
    chosen: torch.Tensor = torch.cat((torch.arange(third, device=device), spread, last)).unique()
    return chosen
