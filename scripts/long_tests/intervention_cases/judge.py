"""What became of a model beside its unpatched twin: results of steps compared, and objects before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EQUAL, ROUNDED, SAME_ERROR = "equal", "within rounding", "same error"
REFUSED, REFUSED_LATE = "refused", "refused in the call"
DIFFERENT, NO_ERROR, OTHER_ERROR, CRASHED, LEFT = "different", "no error", "other error", "crashed", "left behind"
NOT_JUDGED, NOT_APPLICABLE = "not judged", "not applicable"
OUTCOMES = (
    EQUAL, ROUNDED, SAME_ERROR, REFUSED, REFUSED_LATE, NOT_JUDGED, NOT_APPLICABLE,
    OTHER_ERROR, LEFT, CRASHED, NO_ERROR, DIFFERENT,
)  # fmt: skip
"""From the best to the worst; of several rounds of one case the worst counts."""
SILENT = (DIFFERENT, NO_ERROR)
BAD = (*SILENT, OTHER_ERROR, CRASHED, LEFT)


@dataclass(frozen=True)
class Step:
    """The result of one step: tensors, or an error and whether dit_rope raised it."""

    tensors: tuple[torch.Tensor, ...] = ()
    error: str = ""
    message: str = ""
    refused: bool = False


def leaves(output: Any) -> tuple[torch.Tensor, ...]:
    """Every tensor of an output, copied; of a distributed one, this rank's part."""
    tensors = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
    local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    with torch.no_grad():
        return tuple(x.detach() if x.is_meta else x.detach().clone() for x in local)


def step(run: Callable[[], Any], interrupts: type[BaseException]) -> Step:
    """Runs one step."""
    try:
        return Step(leaves(run()))
    except (Exception, interrupts) as error:
        return Step((), type(error).__name__, str(error).partition("\n")[0][:300], raised_by_package(error))


def raised_by_package(error: BaseException) -> bool:
    """Whether a ``raise`` in dit_rope raised it, with a message of dit_rope."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, ValueError | TypeError | RuntimeError):
        return False
    return "dit_rope" in Path(trace.tb_frame.f_code.co_filename).parts and " must " in str(error)


def compared(patched: list[Step], unpatched: list[Step], exact: bool, bound: float) -> tuple[str, str]:
    """The worst outcome of these steps, and what it was; ``bound`` is relative to the largest value of a tensor."""
    if len(patched) != len(unpatched):
        return DIFFERENT, f"{len(patched)} steps of {len(unpatched)}"
    outcomes = [_compared_step(a, b, exact, bound) for a, b in zip(patched, unpatched, strict=True)]
    worst = max(outcomes, key=lambda outcome: OUTCOMES.index(outcome[0]))
    return worst[0], f"step {outcomes.index(worst)}: {worst[1]}" if worst[1] else ""


def _compared_step(patched: Step, unpatched: Step, exact: bool, bound: float) -> tuple[str, str]:
    if patched.error or unpatched.error:
        errors = (
            f"{patched.error or 'runs'}: {patched.message}; unpatched {unpatched.error or 'runs'}: {unpatched.message}"
        )
        if patched.error == unpatched.error:
            return SAME_ERROR, ""
        if not patched.error:
            return NO_ERROR, errors
        if patched.refused:
            return REFUSED_LATE, f"{patched.error}: {patched.message}"
        return (OTHER_ERROR if unpatched.error else CRASHED), errors
    if [(x.shape, x.dtype) for x in patched.tensors] != [(x.shape, x.dtype) for x in unpatched.tensors]:
        return DIFFERENT, f"{_described(patched)}; unpatched {_described(unpatched)}"
    if all(map(same, patched.tensors, unpatched.tensors)):
        return EQUAL, ""
    return _differing(patched, unpatched, exact, bound)


def _differing(patched: Step, unpatched: Step, exact: bool, bound: float) -> tuple[str, str]:
    worst = ""
    # Small gradients are sums of large ones that cancel, whose rounding they keep.
    least = 0.01 * max((_scale(x) for x in unpatched.tensors if x.is_floating_point()), default=0.0)
    for number, (a, b) in enumerate(zip(patched.tensors, unpatched.tensors, strict=True)):
        if same(a, b):
            continue
        if not a.is_floating_point() or a.isnan().ne(b.isnan()).any():
            return DIFFERENT, f"tensor {number}: {'nan' if a.is_floating_point() else a.dtype}"
        off, scale = _scale(a.double() - b.double()), max(_scale(b), 0.0 if exact else least)
        if exact or not off <= bound * scale:
            worst = f"tensor {number} off by {off:.3g} of {scale:.3g}"
    return (DIFFERENT, worst) if worst else (ROUNDED, "")


def _scale(x: torch.Tensor) -> float:
    return x.double().nan_to_num().abs().max().item() if x.numel() else 0.0


def _described(step: Step) -> str:
    return ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in step.tensors)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, where any not-a-number is as good as another."""
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta and a.shape == b.shape
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


Objects = dict[tuple[str, str, Any], Any]
"""Everything a patch may touch: by the module's path, the kind and the name."""

_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
)  # fmt: skip


def objects(model: torch.nn.Module) -> Objects:
    """The objects of every module themselves, which keeps them alive, so that another does not get their address."""
    by_key: Objects = {}
    for path, module in model.named_modules():
        by_key[path, "class", ""] = type(module)
        for kind, values in (
            ("attribute", vars(module)),
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("child", module._modules),
        ):
            by_key |= {(path, kind, name): value for name, value in values.items() if name not in _HOOKS}
        for kind in _HOOKS:
            by_key |= {(path, kind, number): hook for number, hook in enumerate(getattr(module, kind).values())}
        for name, value in vars(module).items():
            if hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module | torch.Tensor):
                by_key[path, "class of", name] = type(value)
    return by_key


def changes(before: Objects, after: Objects) -> set[tuple[str, str, Any]]:
    """Keys whose object was replaced, added or removed."""
    return {
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or before[key] is not after[key]
    }


def shapes(by_key: Objects) -> dict[tuple[str, str, Any], str]:
    """The classes of these objects by name, to compare those of two models."""
    return {
        key: f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else type(value).__qualname__
        for key, value in by_key.items()
    }


def left_after_undo(patched: tuple[Objects, Objects], unpatched: tuple[Objects, Objects]) -> str:
    """What differs after undo, beyond what differs in the unpatched twin too; each pair is before and after.

    Unchanged attributes do not count as different: models cache values when they are called.
    """
    patched_moved, unpatched_moved = changes(*patched), changes(*unpatched)
    patched_classes, unpatched_classes = shapes(patched[1]), shapes(unpatched[1])
    other = {
        key
        for key in patched_classes.keys() | unpatched_classes.keys()
        if patched_classes.get(key) != unpatched_classes.get(key)
        and (key in patched_moved or key[1] not in ("attribute", "class of"))
    }
    named = sorted({f"{path} {kind} {name}" for path, kind, name in (patched_moved - unpatched_moved) | other})
    return "; ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
