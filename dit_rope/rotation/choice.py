"""The choice of a backend, and why the others decline.

At debug level the logger ``dit_rope`` says which backend takes a call, and why those that were asked before it
declined: one message for each kind of call (its dtype, device, heads and norm) and each set of reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..rotation_args import Memo, Norm, RotationArgs, layout_of
from ..spec import NormKind, Pairing
from ..torch_state import in_level, in_mode
from .backends import cuda_kernels, eager, triton_kernels

MODULES: dict[str, Any] = {"cuda": cuda_kernels, "triton": triton_kernels, "eager": eager}
BACKENDS = tuple(MODULES)
"""From the fastest to the one that takes every call; ``"auto"`` asks them in this order."""
_NAMES = ("auto", *BACKENDS)
_MAX_REMEMBERED = 1024


class Choice(NamedTuple):
    """The backend of a call, and its memo for calls of the same layout; None where it must remember nothing."""

    backend: str
    memo: Memo | None = None


_EAGER = Choice("eager")
_choices: dict[object, Choice] = {}
_log = logging.getLogger(__name__)
_logged: set[str] = set()


def check_backend(name: str) -> None:
    """Raises ValueError, with the names of all backends, unless ``name`` is one of them or ``"auto"``."""
    if name not in _NAMES:
        raise ValueError(f"backend must be one of {_NAMES}, got {name!r}")


def choose_backend(
    xs: Sequence[torch.Tensor], args: RotationArgs, backend: str = "auto", norm: NormKind | None = None
) -> str:
    """The name of the backend that takes the call.

    ``"auto"`` takes the first of :data:`BACKENDS` that accepts; on CPU that is eager, as Triton's interpreter is for
    tests. Where a GPU backend is asked, the choice and the reasons of those that declined are logged at debug level.

    Raises:
        ValueError: an unknown backend, or one that was named and declines, with its reason.
    """
    check_backend(backend)
    if _is_eager(xs, backend):
        return "eager"
    if in_level():  # no kernel runs there, and batched tensors do not answer all that a kernel asks of them
        return "eager"
    reasons: dict[str, str] = {}
    for name in BACKENDS[:-1] if backend == "auto" else (backend,):
        reason = MODULES[name].declined(xs, args, norm)
        if reason is None:
            _log_choice(xs, norm, name, reasons)
            return name
        reasons[name] = reason
    if backend != "auto":
        raise ValueError(f"backend must accept the call, got {backend!r}, which declines: {reason}")
    _log_choice(xs, norm, "eager", reasons)
    return "eager"


def _log_choice(xs: Sequence[torch.Tensor], norm: NormKind | None, backend: str, reasons: dict[str, str]) -> None:
    if not _log.isEnabledFor(logging.DEBUG):
        return
    heads = " and ".join(str(x.shape[2]) for x in xs)
    operation = "rotates" if norm is None else f"norms ({norm.value}) and rotates"
    message = f"{backend} {operation} {heads} heads of {xs[0].shape[3]} channels, {xs[0].dtype} on {xs[0].device}"
    message = "; ".join((message, *(f"{name} declines: {reason}" for name, reason in reasons.items())))
    if message in _logged:
        return
    if len(_logged) >= _MAX_REMEMBERED:
        _logged.clear()
    _logged.add(message)
    _log.debug("%s", message)


def _is_eager(xs: Sequence[torch.Tensor], backend: str) -> bool:
    """Whether the eager backend takes the call without asking another."""
    return backend == "eager" or (backend == "auto" and xs[0].device.type in ("cpu", "meta", "mps"))


def remembered_choice(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    norm: Norm | None = None,
    backend: str = "auto",
    outs: Sequence[torch.Tensor] = (),
) -> Choice:
    """The result of :func:`choose_backend`, remembered with a memo for the backend.

    Args:
        xs, args, norm, backend: those of the call.
        outs: the tensors that are written to; empty where they are ``xs``, or new ones of torch's ``empty_like``.

    Raises:
        ValueError: as there.
    """
    check_backend(backend)
    if _is_eager(xs, backend):
        return _EAGER
    if in_level() or in_mode():  # a choice made there is not valid for other calls
        return Choice(choose_backend(xs, args, backend, norm and norm.kind))
    normed: tuple[object, ...] = ()
    if norm is not None:
        weights, biases = norm.weights, norm.biases
        normed = (norm.kind, norm.eps, norm.rounding, len(weights), *map(layout_of, weights), *map(layout_of, biases))
    key = (
        backend, args.numbers, layout_of(args.rows), layout_of(args.positions), layout_of(args.entries),
        len(xs), *map(layout_of, xs), len(outs), *map(layout_of, outs), normed,
    )  # fmt: skip
    choice = _choices.get(key)
    if choice is None:
        if len(_choices) >= _MAX_REMEMBERED:
            _choices.clear()
        choice = _choices[key] = Choice(choose_backend(xs, args, backend, norm and norm.kind), {})
    return choice


def explain_backends(device: str | torch.device) -> list[tuple[str, str]]:
    """Each backend's name and either ``"chosen"`` or why not, for a bfloat16 call on ``device``."""
    target = torch.device(device)
    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=target)
    rows = torch.zeros(2, 1, 32, device=target)
    args = RotationArgs.of_rows(rows, None, (32,), 1, Pairing.INTERLEAVED)
    chosen = choose_backend([x], args)
    lines = []
    for name in BACKENDS:
        reason = None if name == "eager" else MODULES[name].declined([x], args)
        lines.append((name, "chosen" if name == chosen else reason or "works here, but another is faster"))
    return lines
