"""The rotation in plain PyTorch: the formula, and its backward with the roundings of autograd."""

from __future__ import annotations

import torch
from einops import rearrange

from ..spec import Pairing


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """Rotates ``x`` as diffusers' Wan code does, in differentiable PyTorch that any compiler can trace.

    The source of the roundings is ``WanAttnProcessor`` in diffusers 0.42.1 ``transformer_wan.py``: products and sums
    in the dtype that x and the tables promote to, then one cast to the dtype of x.

    Args:
        x: ``[B, S, H, D]``.
        cos, sin: ``[B or 1, S, 1 or H, pairs]``; channels past ``2 * pairs`` are returned as they are.
        pairing: which channels are a pair.

    Returns:
        A new ``[B, S, H, D]`` tensor in the dtype of x.

    Example:
        A quarter of a rotation takes (1, 0) to (0, 1):

        >>> import torch
        >>> from dit_rope import Pairing
        >>> x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> rotated(x, zero, one, Pairing.INTERLEAVED).flatten().tolist()
        [0.0, 1.0]
    """
    covered, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    pattern = "b s h (p two)" if pairing is Pairing.INTERLEAVED else "b s h (two p)"
    x1, x2 = rearrange(covered, f"{pattern} -> two b s h p", two=2).unbind(0)
    pairs = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos))
    out = rearrange(pairs, f"two b s h p -> {pattern}").type_as(x)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def gradient(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """The gradient of ``x`` from that of :func:`rotated`, with the roundings of autograd; itself differentiable.

    Each product is cast to the dtype of the data before the two are added, because each is the gradient of one use of a
    channel. The operations are those that the batching of ``is_grads_batched`` supports.

    Args:
        grad: ``[B, S, H, D]``, in the dtype of x.
        cos, sin, pairing: as in :func:`rotated`.
    """
    dtype, pairs = grad.dtype, cos.shape[-1]
    wide = torch.promote_types(dtype, cos.dtype)
    covered = grad[..., : 2 * pairs] if 2 * pairs < grad.shape[-1] else grad
    shape, interleaved = covered.shape, pairing is Pairing.INTERLEAVED
    dim = -1 if interleaved else -2
    first, second = covered.reshape(*shape[:-1], *((pairs, 2) if interleaved else (2, pairs))).to(wide).unbind(dim)
    channels = (
        (first * cos).to(dtype) + (second * sin).to(dtype),
        (second * cos).to(dtype) - (first * sin).to(dtype),
    )
    out = torch.stack(channels, dim=dim).reshape(shape)
    return torch.cat((out, grad[..., 2 * pairs :]), dim=-1) if 2 * pairs < grad.shape[-1] else out
