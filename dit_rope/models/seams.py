"""The places where a rotation is taken out of a model's own code, and put back.

A rope module and the norms of queries and keys get a subclass of their own class, whose forward is ours; the module,
its parameters, buffers, hooks and path stay what they are, so that state dicts, LoRA, offloading, copies and pickles
know no difference, and undoing is giving the class back. The attention module between them gets two forward hooks:
one takes the rotary tensors out of the call, so that the processor does not rotate, and hands them to the norms; the
other checks that both norms took them.

What travels through the model in place of dense cos and sin is a pair of tensors: int32 rows of the axis tables,
``[1, S, 1, axes]``, which whoever splits a sequence can split, and the packed axis tables ``[2, R, P]``, a few kB.

While torch.compile traces, the model's own code is left in place: what the compiler fuses, an operator it cannot look
into would only split. A compiled block behind an uncompiled rope module gets its dense tables back from the rows. A
rope module that scales frequencies is not the model's own: its tables are traced, or, where a function of the user's
chooses the scaling, made outside the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import rotation
from ..backends import eager
from ..rotation_args import RotationArgs
from ..spec import Grid, NormKind, Pairing, RopeSpec, Scalings
from ..tables import rope_table
from .adapter import FrameRows

_SETTINGS = "_dit_rope"


class _InFlight(threading.local):
    """The rotation that the attention module now running in this thread hands to its two norms."""

    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    pending = 0


_in_flight = _InFlight()
_seam_classes: dict[tuple[type, type], type[torch.nn.Module]] = {}


@dataclass(frozen=True)
class RopeSettings:
    """What a rope module's own forward is replaced with; ``choose`` is asked for the scaling of each forward."""

    spec: RopeSpec
    frames: Callable[..., FrameRows]
    choose: Callable[[], Scalings] | None = None


@dataclass(frozen=True)
class NormSettings:
    """How a norm of queries or keys rotates; ``exact`` None is exact on CPU and fast elsewhere."""

    spec: RopeSpec
    norm: NormKind
    head_dim: int
    exact: bool | None
    backend: str


class Seam:
    """A subclass, made on demand, of a module's class, with a forward of ours."""

    unpatched: type[torch.nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies as the module's class and the seam, because the subclass cannot be imported."""
        return _new_seam, (type(self).unpatched, type(self).__mro__[1]), self.__dict__.copy()


class RopeSeam(Seam):
    """Memoized rows and axis tables instead of dense tables built in every forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Int32 rows ``[1, S, 1, axes]`` and packed axis tables ``[2, R, P]``, from the caches."""
        settings: RopeSettings | None = vars(self).get(_SETTINGS)
        if settings is None:
            return _unpatched_forward(self)(*args, **kwargs)
        if not torch.compiler.is_compiling():
            return self._rows(settings, args, kwargs)
        if settings.choose is not None:
            # What it returns is new at any call, and would be compiled in.
            return torch.compiler.disable(self._rows)(settings, args, kwargs)
        if settings.spec.scaling is None:
            return _unpatched_forward(self)(*args, **kwargs)
        return dense_tables(settings.spec, *self._rows(settings, args, kwargs))

    def _rows(
        self, settings: RopeSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here = settings.frames(self, *args, **kwargs)
        latent = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        dtype = next(buffer.dtype for buffer in self.buffers())  # type: ignore[attr-defined]
        grid = Grid(*here.grid)
        table = rope_table(settings.spec, grid, device=latent.device, dtype=dtype)
        rows = table.rows
        if settings.choose is not None:
            spec = settings.spec.with_scaling(settings.choose())
            rows = rope_table(spec, grid, device=latent.device, dtype=dtype).rows
        # Positions are those of any scaling, so that one entry of the cache serves all that are chosen.
        return frame_positions(table.positions(), here), rows


class NormSeam(Seam):
    """Norm and rotation in one call, when the attention module hands over a rotation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, S, C]`` normed, and rotated when a rotation is in flight; x itself is not written."""
        settings: NormSettings | None = vars(self).get(_SETTINGS)
        if settings is None or torch.compiler.is_compiling() or _in_flight.rotation is None:
            normed: torch.Tensor = _unpatched_forward(self)(x)
            return normed
        _in_flight.pending -= 1
        positions, rows = _in_flight.rotation
        exact = x.device.type == "cpu" if settings.exact is None else settings.exact
        args = _rotation_args(settings.spec, positions, rows, exact)
        if not exact:
            return self._fused(x, settings, args)
        y = _unpatched_forward(self)(x)
        heads = y.unflatten(-1, (-1, settings.head_dim))
        inplace = not (torch.is_grad_enabled() and y.requires_grad)
        (turned,) = rotation.apply([heads], args, inplace=inplace, backend=settings.backend)
        return turned.flatten(2)

    def _fused(self, x: torch.Tensor, settings: NormSettings, args: RotationArgs) -> torch.Tensor:
        heads = x.unflatten(-1, (-1, settings.head_dim))
        weight, eps = self.weight, self.eps  # type: ignore[attr-defined]
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        (turned,) = rotation.apply_norm(
            [heads], [weight], eps, settings.norm, args, inplace=False, backend=settings.backend
        )
        return turned.flatten(2)


@dataclass(frozen=True)
class TakeRotation:
    """Forward pre-hook of an attention module: hands its rotary tensors to its norms."""

    spec: RopeSpec
    name: str
    index: int

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The call without its rotary tensors; unchanged when they are absent or not ours."""
        by_name = self.name in kwargs
        given = kwargs[self.name] if by_name else args[self.index] if len(args) > self.index else None
        ours = tuple(given) if given is not None and given[0].dtype == torch.int32 else None
        instead = None
        if torch.compiler.is_compiling():
            instead = dense_tables(self.spec, *ours) if ours else None
        else:
            # Whatever a KeyboardInterrupt left in flight, which hooks do not see, goes here.
            _in_flight.rotation, _in_flight.pending = ours, 2 if ours else 0
        if not ours:
            return None
        if by_name:
            return args, {**kwargs, self.name: instead}
        return (*args[: self.index], instead, *args[self.index + 1 :]), kwargs


@dataclass(frozen=True)
class CheckRotation:
    """Forward hook of an attention module, run after errors too: both norms must have taken the rotation."""

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Clears what is in flight; raises RuntimeError when a norm did not take it."""
        if torch.compiler.is_compiling():
            return
        pending, _in_flight.rotation, _in_flight.pending = _in_flight.pending, None, 0
        if pending and output is not None:
            raise RuntimeError(
                f"{type(module).__name__} must call norm_q and norm_k once each where dit_rope has patched it, but its "
                f"processor {type(getattr(module, 'processor', None)).__name__} left {pending} of them out, so that "
                "queries or keys were not rotated; undo the patch before using this processor"
            )


def swap_class(module: torch.nn.Module, seam: type[Seam], settings: RopeSettings | NormSettings) -> None:
    """Gives ``module`` the subclass of its class that ``seam`` makes."""
    vars(module)[_SETTINGS] = settings
    module.__class__ = _seam_class(type(module), seam)


def restore_class(module: torch.nn.Module) -> None:
    """Gives ``module`` its own class back."""
    module.__class__ = type(module).unpatched  # type: ignore[attr-defined]
    del vars(module)[_SETTINGS]


def remove_hooks(module: torch.nn.Module) -> None:
    """Removes the hooks of an attention module's patch."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for handle in [handle for handle, hook in hooks.items() if isinstance(hook, (TakeRotation, CheckRotation))]:
            del hooks[handle]
            for flags in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(handle, None)


def _seam_class(base: type[torch.nn.Module], seam: type[Seam]) -> type[torch.nn.Module]:
    made = _seam_classes.get((base, seam))
    if made is None:
        body = {"unpatched": base, "__module__": base.__module__}
        made = _seam_classes.setdefault((base, seam), type(f"{seam.__name__}{base.__name__}", (seam, base), body))
    return made


def _new_seam(base: type[torch.nn.Module], seam: type[Seam]) -> torch.nn.Module:
    cls = _seam_class(base, seam)
    return cls.__new__(cls)


def _unpatched_forward(module: Any) -> Callable[..., Any]:
    """The forward of a module's own class; a seam's forward may outlive its undo in the wrapper of another library."""
    base = getattr(type(module), "unpatched", type(module))
    forward: Callable[..., Any] = base.forward.__get__(module)
    return forward


def _rotation_args(spec: RopeSpec, positions: torch.Tensor, rows: torch.Tensor, exact: bool) -> RotationArgs:
    """The arguments for ``positions`` ``[1 or B, S, 1, axes]`` and ``rows`` ``[2, R, P]``."""
    index = positions.squeeze(2)
    none = (0,) * len(spec.dims)
    return RotationArgs(rows, index, spec.pairs, none, none, 0, 0, index.shape[1], spec.pairing, False, exact)


def frame_positions(positions: torch.Tensor, here: FrameRows) -> torch.Tensor:
    """``[1, frames H W, 1, axes]`` from the positions ``[1, T H W, axes]`` of the whole grid, without a device sync."""
    if here.frames is not None:
        by_frame = positions.unflatten(1, (here.grid[0], -1)).unbind(1)
        positions = torch.cat([by_frame[frame] for frame in here.frames], dim=1)
    return positions.unsqueeze(2)


def dense_tables(spec: RopeSpec, positions: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[1 or B, S, 1, rotary_dim]``, as the model's own rope module gives them."""
    cos, sin = eager.dense_angles(_rotation_args(spec, positions, rows, exact=True), positions.shape[1])
    if spec.pairing is Pairing.INTERLEAVED:
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    return cos.repeat(1, 1, 1, 2), sin.repeat(1, 1, 1, 2)
