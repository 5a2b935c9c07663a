"""The rotation in torch's own operations, to be differentiated or batched, and its backward formulas.

A backend's kernel has no tangent and no batching rule. Under torch.func and under dual numbers the rotation is
therefore made of a few torch operations, whose derivatives torch knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..rotation_args import Norm, NormRounding, RotationArgs
from ..spec import NormKind
from . import reference
from .backends import cos_sin


def is_batched_gradient(x: torch.Tensor) -> bool:
    """Whether ``x`` is a batch of gradients (``is_grads_batched``), which torch batches in an older way."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))


def rotated(x: torch.Tensor, args: RotationArgs, norm: Norm | None = None) -> torch.Tensor:
    """``x`` ``[B, S, H, D]`` rotated, after its ``norm``: the numbers of :func:`.eager.rotate`, as a new tensor."""
    if args.entries is not None:
        entries = args.entries.long()
        return x.index_copy(0, entries, rotated(x.index_select(0, entries), replace(args, entries=None), norm))
    if norm is not None:
        values = normed(x, norm)
        if args.exact:
            values = values.to(x.dtype)  # it is rounded already
        return _in_order_of(rotated(values, args).to(x.dtype), x)
    cos, sin = cos_sin.dense_cos_sin(args, *x.shape[1:3])
    if args.exact:
        out = reference.rotated(x, cos, sin, args.pairing)
    else:
        wide = _wide(x.dtype)
        out = reference.rotated(x.to(wide), cos.to(wide), sin.to(wide), args.pairing).to(x.dtype)
    return _in_order_of(_with_unrotated(x, out, args), x)


def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm of the one tensor ``x`` ``[B, S, H, D]``, as float32, or float64 for float64 data."""
    wide = _wide(x.dtype)
    out = _normed(x.to(wide), norm)[0]
    every_step = norm.rounding is NormRounding.EVERY_STEP
    if norm.weights:
        out = _rounded(out, x.dtype, every_step) * _of_head(norm.weights[0].to(wide), x, norm.kind)
    if norm.biases:
        out = _rounded(out, x.dtype, every_step) + _of_head(norm.biases[0].to(wide), x, norm.kind)
    return _rounded(out, x.dtype, norm.rounding is not NormRounding.NONE)


def _rounded(x: torch.Tensor, dtype: torch.dtype, rounds: bool) -> torch.Tensor:
    return x.to(dtype).to(x.dtype) if rounds else x


def gradient(grad: torch.Tensor, args: RotationArgs) -> torch.Tensor:
    """Gradient ``[B, S, H, D]`` of the rotation, in the layout of ``grad``; itself differentiable."""
    cos, sin = cos_sin.dense_cos_sin(args, *grad.shape[1:3])
    if args.exact:
        out = reference.gradient(grad, cos, sin, args.pairing)
    else:
        wide = _wide(grad.dtype)
        out = reference.gradient(grad.to(wide), cos.to(wide), sin.to(wide), args.pairing).to(grad.dtype)
    # The order of sums over this gradient later follows from its layout, which must be that of upstream's code.
    return torch.empty_like(grad).copy_(_with_unrotated(grad, out, args))


def norm_gradient(
    x: torch.Tensor,
    norm: Norm,
    bias_dtype: torch.dtype | None,
    grad: torch.Tensor,
    rotate_back: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, weight and bias of the norm of one tensor, with rotation; ``rotate_back`` inverts the rotation.

    With n = x / rms(x): dx = (dn - n mean(dn n)) / rms(x), where dn is the gradient rotated back, times weight. In a
    LayerNorm x is first less its mean, and so is the result: dx = (dn - mean(dn) - n mean(dn n)) / rms(x - mean(x)).
    Formed in float32 (float64 for float64 data) and rounded once. Of a bias only its dtype is needed.
    """
    wide = _wide(x.dtype)
    dims = _dims(norm.kind)
    back = rotate_back(grad.to(wide))
    values, scale = _normed(x.to(wide), norm)
    summed = (0, 1) if norm.kind.across_heads else (0, 1, 2)
    weight_grad = bias_grad = None
    if bias_dtype is not None:
        bias_grad = back.sum(summed).reshape(-1).to(bias_dtype)
    if norm.weights:
        (weight,) = norm.weights
        weight_grad = (back * values).sum(summed).reshape(-1).to(weight.dtype)
        back = back * _of_head(weight.to(wide), x, norm.kind)
    x_grad = back - values * (back * values).mean(dims, keepdim=True)
    if norm.kind.centred:
        x_grad = x_grad - back.mean(dims, keepdim=True)
    return (scale * x_grad).to(x.dtype), weight_grad, bias_grad


def _normed(x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """``x``, less its mean in a LayerNorm, over its root mean square; and one over that."""
    dims = _dims(norm.kind)
    values = x - x.mean(dims, keepdim=True) if norm.kind.centred else x
    scale = torch.rsqrt(values.square().mean(dims, keepdim=True) + norm.eps)
    return values * scale, scale


def _dims(norm: NormKind) -> tuple[int, ...]:
    return (-2, -1) if norm.across_heads else (-1,)


def _of_head(parameter: torch.Tensor, x: torch.Tensor, norm: NormKind) -> torch.Tensor:
    return parameter.view(x.shape[2:]) if norm.across_heads else parameter


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _with_unrotated(x: torch.Tensor, out: torch.Tensor, args: RotationArgs) -> torch.Tensor:
    """``out`` with the unrotated channels of ``x``, which so keep infinities and NaNs too."""
    unrotated = cos_sin.unrotated_channels(args, x.shape[1])
    if unrotated is None:
        return out
    further = x.shape[-1] - unrotated.shape[-1]
    return torch.where(torch.nn.functional.pad(unrotated, (0, further), value=True) if further else unrotated, x, out)


def _in_order_of(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``out`` with its dims in the memory order of those of ``x``, as ``empty_like`` gives them."""
    if x.is_contiguous():
        return out.contiguous()
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda dim: -strides[dim])
    return out.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])
