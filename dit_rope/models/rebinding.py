"""A rotation in place of the function that a processor rotates with, in that one processor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .adapter import Layout, Rebound
from .formats import Align, Format
from .seams import Flight, as_given, as_heads, in_flight, turn
from .swapping import SETTINGS, Seam, copy_of, unpatched_method


@dataclass(frozen=True)
class ReboundSettings:
    """What a processor's rotation becomes; ``passes`` where the norms have turned its arguments already."""

    rebound: Rebound
    format: Format
    layout: Layout
    passes: bool
    exact: bool | None
    backend: str


class ReboundSeam(Seam):
    """A processor, or an attention module, that finds our rotation under the name of its module's own."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """The replaced method, run with one global name bound to something else."""
        settings: ReboundSettings | None = vars(self).get(SETTINGS)
        if settings is None or torch.compiler.is_compiling():
            return unpatched_method(self)(*args, **kwargs)
        function: Any = unpatched_method(self).func
        name = settings.rebound.function
        stand_in = functools.partial(_turn_instead, settings, function.__globals__[name])
        # Made anew in every call, so that whatever else others replace in that module is seen.
        ours = copy_of(function, {**function.__globals__, name: stand_in})
        return ours(self, *args, **kwargs)


def _turn_instead(settings: ReboundSettings, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands in for ``own``, a function of tensors and then of what they turn by."""
    count = settings.rebound.returns
    xs = list(args[:count])
    if settings.passes:
        if not in_flight():
            return own(*args, **kwargs)
        return xs[0] if count == 1 else tuple(xs)
    device = xs[0].device
    exact = device.type == "cpu" if settings.exact is None else settings.exact
    form, rotary = settings.format, args[count] if settings.rebound.tables == 1 else args[count:]
    known = len(args) == count + settings.rebound.tables and not kwargs and form.accepts(rotary)
    if not known or (exact and not form.exact):
        return own(*args, **kwargs)
    (table,) = form.pack(rotary, device)
    if exact and form.narrows:
        table = table.narrowed(xs[0].dtype)
    flight = Flight([table], exact, settings.backend, set(), {}, form.upcasts)
    heads = [as_heads(x, settings.layout, table.head_dim) for x in xs]
    if any(x.shape[1] < table.tokens for x in heads):
        return own(*args, **kwargs)
    turned = [as_given(x, settings.layout) for x in turn(heads, flight, table, Align.START, inplace=False)]
    return turned[0] if count == 1 else tuple(turned)
