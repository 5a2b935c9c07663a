"""dit_rope's rotation of a problem's queries and keys, by backend, checked against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dit_rope.rotation import api as rotation
from dit_rope.streaming import shift as shifting

from .peers import model
from .problems import EPS, Call, Operation, Problem, Tensors, Unavailable
from .reference import sample


def rotation_call(problem: Problem, backend: str) -> Call:
    """The call that does the problem's operation with ``backend``.

    Raises:
        Unavailable: the backend declines the operation, with its reason.
    """
    makers = {Operation.BACKWARD: _backward, Operation.SHIFT: _shift}
    call = makers.get(problem.operation, _forward)(problem, backend)
    try:
        call(*problem.inputs(1)[0])
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return call


def check_call(problem: Problem, call: Call) -> None:
    """Fails unless ``call`` gives what float64 gives but for its roundings; exact mode must give eager's bits."""
    q, k = problem.inputs(1)[0]
    outs = call(q.clone(), k.clone())
    shape = problem.shape
    if problem.operation is Operation.EXACT:
        expected = rotation.rotate_qk(q, k, problem.table, prefix=shape.prefix, exact=True, backend="eager")
        for name, out, bits in zip("qk", outs, expected, strict=True):
            _assert_bits(out, bits, name)
    elif problem.operation is Operation.SHIFT:
        _check_shift(problem, outs[1], k)
    else:
        for index, (out, x) in enumerate(zip(outs, (q, k), strict=True)):
            problem.expectation.assert_right(out, x, index, f"({problem.operation.value}, {'qk'[index]})")


def exact_call(problem: Problem, backend: str) -> Call:
    """The same in exact mode, after its result has been compared with the model's own code, bit for bit.

    Raises:
        Unavailable: as :func:`rotation_call`.
        AssertionError: a bit differs.
    """
    call = _forward(problem, backend, exact=True)
    q, k = problem.inputs(1)[0]
    try:
        outs = call(q, k)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    for name, out, bits in zip("qk", outs, model(problem)(q, k), strict=True):
        _assert_bits(out, bits, name)
    return call


def unrotated_call(problem: Problem, backend: str) -> Call:
    """The problem's call, out of place, at positions that are all negative: everything but the rotation is done."""
    size = (1, problem.shape.grid.tokens, len(problem.shape.dims))
    nowhere = torch.full(size, -1, dtype=torch.int32, device=problem.device)
    # In place, what does not rotate would not be read either.
    out_of_place = replace(problem, operation=Operation.ROTATE) if problem.operation.in_place else problem
    return _forward(out_of_place, backend, positions=nowhere)


def _assert_bits(out: torch.Tensor, bits: torch.Tensor, name: str) -> None:
    if not torch.equal(out, bits):
        wrong = int((out != bits).sum())
        raise AssertionError(f"expected the bits of the eager code, got {wrong} other elements of {name}")


def _forward(problem: Problem, backend: str, exact: bool = False, positions: torch.Tensor | None = None) -> Call:
    table, norm = problem.table, problem.operation.norm
    if problem.operation is Operation.POSITIONS:
        positions = table.positions()
    shared: dict[str, Any] = {
        "positions": positions,
        "exact": exact or problem.operation is Operation.EXACT,
        "prefix": problem.shape.prefix,
        "inplace": problem.operation.in_place,
        "backend": backend,
    }
    if norm is not None:
        weights = problem.weights
        return lambda q, k: rotation.norm_rotate_qk(q, k, table, *weights, eps=EPS, norm=norm, **shared)
    return lambda q, k: rotation.rotate_qk(q, k, table, **shared)


def _backward(problem: Problem, backend: str) -> Call:
    """Backward of a rotation whose forward ran once; q and k are the gradients of its outputs."""
    size = (1, problem.shape.tokens, problem.shape.heads, problem.shape.head_dim)
    with torch.enable_grad():
        leaves = [torch.zeros(size, device=problem.device, dtype=problem.dtype).requires_grad_() for _ in range(2)]
        outs = rotation.rotate_qk(leaves[0], leaves[1], problem.table, prefix=problem.shape.prefix, backend=backend)

    def backward(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        grad_q, grad_k = torch.autograd.grad(outs, leaves, (q, k), retain_graph=True)
        return grad_q, grad_k

    return backward


def _shift(problem: Problem, backend: str) -> Call:
    """Keys cached frame by frame move one frame towards the start, all but those of the last frame."""
    frames = problem.shape.grid.sizes[0]
    if frames < 2 or problem.shape.prefix:
        raise Unavailable("a shift needs a grid of at least two frames and no prefix")
    table = _shift_table(problem)
    deltas = torch.ones(frames - 1, 1, dtype=torch.int32, device=problem.device)
    options: dict[str, Any] = {
        "deltas": deltas,
        "blocks": torch.arange(frames - 1, dtype=torch.int32, device=problem.device),
        "inplace": True,
        "allow_lossy": True,
        "backend": backend,
    }

    def shift(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        shifting.shift_keys(k.view(frames, -1, *k.shape[2:]), table, **options)
        return q, k

    return shift


def _shift_table(problem: Problem) -> shifting.ShiftTable:
    return shifting.ShiftTable(problem.table.spec, device=problem.device)


def _check_shift(problem: Problem, out: torch.Tensor, k: torch.Tensor) -> None:
    """The time axis of all frames but the last is rotated back by one row; everything else is unrotated."""
    shape = problem.shape
    tokens = sample(shape.tokens, problem.device)
    rotating = (tokens < shape.tokens - shape.tokens // shape.grid.sizes[0])[None, :, None, None]
    pairs = shape.dims[0] // 2
    cos, sin = (values.double() for values in _shift_table(problem).rows[:, 1, :pairs])
    exact = k[:, tokens].double()
    x1, x2 = exact[..., 0 : 2 * pairs : 2].clone(), exact[..., 1 : 2 * pairs : 2].clone()
    exact[..., 0 : 2 * pairs : 2] = torch.where(rotating, x1 * cos + x2 * sin, x1)
    exact[..., 1 : 2 * pairs : 2] = torch.where(rotating, x2 * cos - x1 * sin, x2)
    error = float((out[:, tokens].double() - exact).abs().max())
    allowed = float(torch.finfo(out.dtype).eps * exact.abs().max())
    if not error <= allowed:
        raise AssertionError(f"expected an error of at most {allowed:.3g}, got {error:.3g} (shift)")
