"""Other people's rotations of the same queries and keys: each gives a call for a problem, or a reason why not.

Nothing of a peer is installed or copied: what Python finds on its path is called as its documentation says.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from .problems import EPS, Call, NotOffered, Operation, Problem, Tensors, Unavailable

MODULES = {
    # flash-attn's package needs its compiled extension, which the one file with the Triton kernel does not.
    "flash-attn": ("flash_attn.ops.triton.rotary", "rotary_flash_attn"),
    "liger-kernel": ("liger_kernel.transformers.rope",),
    "comfy-kitchen": ("comfy_kitchen",),
    "flashinfer-python": ("flashinfer",),
    "rotary-embedding-torch": ("rotary_embedding_torch",),
}
"""Distributions, and the the modules of each: the first that can be imported is used."""


def wan_rotate(x: torch.Tensor, freqs_cos: torch.Tensor, freqs_sin: torch.Tensor) -> torch.Tensor:
    """The rotation as ``WanAttnProcessor`` of diffusers 0.42.1 has it, where it is a nested function.

    Args:
        x: ``[B, S, H, D]``.
        freqs_cos, freqs_sin: ``[1, S, 1, D]``, each value twice in a row.
    """
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def model(problem: Problem) -> Call:
    """The code of diffusers' models in eager mode: Wan's own, or the one that the others share."""
    return _model_code(problem)


def compiled_model(problem: Problem, compiler: str = "inductor") -> Call:
    """The same through ``torch.compile``."""
    _only(problem, Operation.ROTATE, Operation.PER_HEAD, Operation.ACROSS_HEADS)  # compiling each takes seconds
    torch._dynamo.reset()  # one function, compiled for every shape, would run into the limit of recompilations
    return torch.compile(_model_code(problem), fullgraph=True, dynamic=False, backend=compiler)


def flash_attn(problem: Problem) -> Call:
    """``apply_rotary`` of flash-attn, a Triton kernel for one tensor; ``conjugate`` is its backward."""
    _only(problem, *_ROTATIONS, Operation.BACKWARD)
    apply_rotary = _module("flash-attn").apply_rotary
    cos, sin = problem.cos_sin
    options = {
        "interleaved": not problem.half,
        "inplace": problem.operation.in_place,
        "conjugate": problem.operation is Operation.BACKWARD,
    }
    return lambda q, k: (apply_rotary(q, cos, sin, **options), apply_rotary(k, cos, sin, **options))


def rotary_embedding_torch(problem: Problem) -> Call:
    """``apply_rotary_emb`` of rotary-embedding-torch, which is given angles and takes cos and sin in every call."""
    _only(problem, Operation.ROTATE)
    rotate = _module("rotary-embedding-torch").apply_rotary_emb
    cos, sin = problem.cos_sin
    angles = torch.atan2(sin, cos).repeat_interleave(2, dim=-1)[:, None]
    return lambda q, k: (rotate(angles, q), rotate(angles, k))


def liger(problem: Problem) -> Call:
    """``liger_rotary_pos_emb`` of Liger-Kernel, in place; it takes ``[B, H, S, D]`` and pairs halves."""
    _only(problem, Operation.HALF_IN_PLACE)
    rotate = _module("liger-kernel").liger_rotary_pos_emb
    cos, sin = (torch.cat((values, values), dim=-1)[None] for values in problem.cos_sin)

    def call(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        rotated = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)

    return call


def comfy_kitchen(problem: Problem) -> Call:
    """comfy-kitchen's rotation by 2 x 2 matrices ``[1, S, 1, pairs, 2, 2]``, and its norm per head before one."""
    names = {
        Operation.ROTATE: "apply_rope",
        Operation.IN_PLACE: "apply_rope_",
        Operation.HALF_IN_PLACE: "apply_rope_split_half_",
        Operation.PER_HEAD: "rms_rope",
    }
    _only(problem, *names)
    rotate = getattr(_module("comfy-kitchen"), names[problem.operation])
    cos, sin = problem.cos_sin
    matrices = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))[None, :, None].contiguous()
    norm = (*problem.weights, EPS) if problem.weights else ()
    return lambda q, k: rotate(q, k, matrices, *norm)


def flashinfer_cache(problem: Problem) -> Call:
    """``apply_rope_with_cos_sin_cache`` of FlashInfer, and its in-place form, by int32 positions in a dense table."""
    _only(problem, *_ROTATIONS)
    rope = _module("flashinfer-python").rope
    cache = torch.cat(problem.cos_sin, dim=-1)
    positions = torch.arange(problem.shape.tokens, dtype=torch.int32, device=problem.device)
    width = problem.shape.head_dim
    if problem.operation.in_place:

        def in_place(q: torch.Tensor, k: torch.Tensor) -> Tensors:
            flat_q, flat_k = q.view(q.shape[1], -1), k.view(k.shape[1], -1)
            rope.apply_rope_with_cos_sin_cache_inplace(positions, flat_q, flat_k, width, cache, is_neox=problem.half)
            return q, k

        return in_place

    def call(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        flat_q, flat_k = q.view(q.shape[1], -1), k.view(k.shape[1], -1)
        rotated = rope.apply_rope_with_cos_sin_cache(positions, flat_q, flat_k, width, cache, is_neox=problem.half)
        return rotated[0].view(q.shape), rotated[1].view(k.shape)

    return call


def flashinfer_norm(problem: Problem) -> Call:
    """``fused_qk_rmsnorm_rope`` of FlashInfer, across heads, without values so that it moves no other bytes.

    It reads q and k side by side in one tensor, which is made once for each input outside the timed call.
    """
    _only(problem, Operation.ACROSS_HEADS)
    fused = getattr(_module("flashinfer-python"), "fused_qk_rmsnorm_rope", None)
    if fused is None:
        raise Unavailable("this version has no fused_qk_rmsnorm_rope")
    shape = problem.shape
    if shape.prefix or shape.grid.start_frame:
        raise Unavailable("it has neither text tokens nor a start frame")
    frames, height, width = shape.grid.sizes
    options = {
        "ppf": frames, "pph": height, "ppw": width,
        "num_frame_channels": shape.dims[0], "num_height_channels": shape.dims[1], "num_width_channels": shape.dims[2],
        "num_heads_q": shape.heads, "num_heads_k": shape.heads, "num_heads_v": 0,
        "head_dim": shape.head_dim, "eps": EPS, "base": shape.theta, "interleave": True,
    }  # fmt: skip
    packed: dict[int, Tensors] = {}

    def call(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        if id(q) not in packed:  # q is kept beside its copy, so that no other tensor gets its id
            packed[id(q)] = q, torch.cat((q.flatten(2), k.flatten(2)), dim=-1)
        rotated_q, rotated_k, _ = fused(packed[id(q)][1], *problem.weights, **options)
        return rotated_q, rotated_k

    return call


PEERS: dict[str, Callable[[Problem], Call]] = {
    "model, eager": model,
    "model, compiled": compiled_model,
    "flash-attn": flash_attn,
    "rotary-embedding-torch": rotary_embedding_torch,
    "liger": liger,
    "comfy-kitchen": comfy_kitchen,
    "flashinfer cos-sin-cache": flashinfer_cache,
    "flashinfer norm and rope": flashinfer_norm,
}
_ROTATIONS = (Operation.ROTATE, Operation.POSITIONS, Operation.IN_PLACE, Operation.HALF_IN_PLACE)


def _only(problem: Problem, *operations: Operation) -> None:
    if problem.operation not in operations:
        raise NotOffered(problem.operation.value)


def _module(distribution: str) -> ModuleType:
    """The first module of a peer that can be imported."""
    reasons = []
    for name in MODULES[distribution]:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a peer may fail on import with whatever its imports raise
            reasons.append(f"{name}: {error}")
    raise Unavailable("; ".join(reasons))


def _model_code(problem: Problem) -> Call:
    if problem.operation.in_place:
        raise NotOffered(problem.operation.value)
    rotate = _model_rotation(problem)
    if problem.operation is Operation.BACKWARD:
        return _model_backward(problem, rotate)
    if problem.operation.norm is None:
        return lambda q, k: (rotate(q), rotate(k))
    q_weight, k_weight = problem.weights
    across = problem.operation is Operation.ACROSS_HEADS

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2) if across else x
        return torch.nn.functional.rms_norm(flat, flat.shape[-1:], weight, EPS).view(x.shape)

    return lambda q, k: (rotate(norm(q, q_weight)), rotate(norm(k, k_weight)))


def _model_rotation(problem: Problem) -> Callable[[torch.Tensor], torch.Tensor]:
    cos, sin = (values.repeat_interleave(2, dim=-1) for values in problem.cos_sin)
    if problem.shape.name.startswith(("wan", "streaming")):
        return functools.partial(wan_rotate, freqs_cos=cos[None, :, None], freqs_sin=sin[None, :, None])
    try:
        from diffusers.models.embeddings import apply_rotary_emb
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return lambda x: apply_rotary_emb(x, (cos, sin), sequence_dim=1)


def _model_backward(problem: Problem, rotate: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    size = (1, problem.shape.tokens, problem.shape.heads, problem.shape.head_dim)
    with torch.enable_grad():
        leaves = [torch.zeros(size, device=problem.device, dtype=problem.dtype).requires_grad_() for _ in range(2)]
        outs = [rotate(leaf) for leaf in leaves]

    def backward(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        grad_q, grad_k = torch.autograd.grad(outs, leaves, (q, k), retain_graph=True)
        return grad_q, grad_k

    return backward
