"""Faults in the hooks that patch models, by the rule that each of them breaks, for ``mutations.py``."""

from __future__ import annotations

from long_tests.mutation import Mutation

_MODELS = ("tests/hooks/test_models.py",)
_PATCHING = ("tests/hooks/test_patching.py",)
_MEMO = ("tests/hooks/test_model_tables.py",)
_KNOWN = ("tests/hooks/test_known_code.py",)
_FRESH = ("tests/hooks/test_fresh_results.py",)
_BACK = ("tests/hooks/test_giving_back.py",)
_PACKED = ("tests/hooks/test_packed_tables.py",)
_NUDGED = ("tests/hooks/test_nudged_tables.py",)
_SCALING = ("tests/hooks/test_patching_scaling.py",)


def fault(name: str, file: str, old: str, new: str, tests: tuple[str, ...], k: str = "") -> Mutation:
    """A fault in a module of ``dit_rope``."""
    return Mutation(name, f"dit_rope/{file}.py", old, new, tests, k)


def of_models(name: str, file: str, old: str, new: str, examples: str) -> Mutation:
    """A fault that one or two examples of models show."""
    return fault(name, file, old, new, _MODELS, f"({examples}) and (bitwise or fast_mode)")


def _patching(name: str, file: str, old: str, new: str, k: str = "not inductor and not compile") -> Mutation:
    return fault(name, file, old, new, _PATCHING, k)


def _memo(name: str, old: str, new: str, file: str = "hooks/table_keys") -> Mutation:
    return fault(name, file, old, new, _MEMO)


def _known(name: str, file: str, old: str, new: str) -> Mutation:
    return fault(name, file, old, new, _KNOWN)


def _fresh(name: str, file: str, old: str, new: str) -> Mutation:
    return fault(name, file, old, new, _FRESH)


def _back(name: str, file: str, old: str, new: str) -> Mutation:
    return fault(name, file, old, new, _BACK)


def _packed(name: str, old: str, new: str, file: str = "hooks/packed_tables") -> Mutation:
    return fault(name, file, old, new, _PACKED)


def _nudged(name: str, old: str, new: str) -> Mutation:
    return fault(name, "hooks/packed_tables", old, new, _NUDGED)


# Dense tables outside, axis tables inside: what is read must be what the model was given, bit for bit.
_AXIS_FORMS = (
    _nudged("axis-form-not-compared", "if bool(torch.stack(same).all()) else None", "if True else None"),
    _nudged(
        "axis-form-compared-at-one-channel", ".view(*around, count)).all()", ".view(*around, count))[..., 0].all()"
    ),
    _packed("part-without-its-offset", "else (offset, view.shape[1])", "else (0, view.shape[1])"),
    _packed("part-without-its-strides", "        or view.stride()[1:] != whole.stride()[1:]\n", "        or False\n"),
    _packed("part-negated", "        view.is_neg()\n        or view.shape[0]", "        view.shape[0]"),
    _packed("part-of-another-dtype", " or view.dtype != whole.dtype or", " or"),
    _packed("axis-form-without-version", " or not is_known((whole,)) or", " or"),
    _packed("known-without-version", "_known.get(tensor) == tensor._version", "_known.get(tensor) is not None"),
    _packed(
        "axis-form-of-another-storage",
        "if whole is None or view.untyped_storage()._cdata != whole.untyped_storage()._cdata:",
        "if whole is None:",
    ),
    _packed("cosines-and-sines-of-other-tokens", " or any(place != places[0] for place in places)", ""),
    _packed(
        "wan-axes",
        "dims=(head_dim - 2 * side, side, side)",
        "dims=(side, side, head_dim - 2 * side)",
        file="models/wan",
    ),
    fault(
        "edit-frame-off-by-one", "models/wan", "frames=(0, skip - 1)", "frames=(0, skip - 2)", _SCALING, "edit_frames"
    ),
    _memo(
        "containers-shared",
        "pytree.tree_unflatten(list(built.leaves), built.structure)",
        'vars(built).setdefault("whole", pytree.tree_unflatten(list(built.leaves), built.structure))',
        "hooks/rope_modules",
    ),
)

# Only code that is known, judged when it runs.
_KNOWN_CODE = (
    _patching(
        "unknown-processor-patched",
        "hooks/attention",
        "    if guard.unknown is not None:\n        return guard.unknown\n    owner",
        "    owner",
    ),
    _known("class-of-another-declaration", "hooks/attention", "if owner not in (rotation", "if False and (rotation"),
    _known("method-of-the-processor-itself", "hooks/attention", "name = guard.overridden_in(holder)", "name = None"),
    _known(
        "guard-always-holds",
        "hooks/known_code",
        "if namespace.get(name) is not value or (function is not None and function.__code__ is not code):",
        "if False:",
    ),
    _known(
        "code-of-a-function-unseen",
        "hooks/known_code",
        " or (function is not None and function.__code__ is not code):",
        ":",
    ),
    _known(
        "digest-not-compared",
        "hooks/known_code",
        "FunctionType) and source_digest(function) in known_digests().get(slot, ()):",
        "FunctionType):",
    ),
    _known(
        "source-of-another-module",
        "hooks/known_code",
        "if module is None or vars(module) is not function.__globals__:",
        "if module is None:",
    ),
    _known(
        "globals-not-followed", "hooks/known_code", "            self._follow_globals(function)\n", "            pass\n"
    ),
    _known(
        "imports-inside-not-followed",
        "hooks/known_code",
        '        yield from _imports(code, function.__globals__.get("__package__") or "")\n',
        "",
    ),
    _known("methods-not-followed", "hooks/known_code", "self._follow_method(cls, called)", "pass"),
    _known(
        "method-of-a-class-between-unseen",
        "hooks/known_code",
        "self.checks += [(vars(base), name, None, None, None) for base in",
        "self.checks += [(vars(base), name, None, None, None) for base in () and",
    ),
    _known(
        "wrappers-are-looked-through",
        "hooks/known_code",
        'hasattr(value, "__wrapped__") and _is_context_decorator(value)',
        'hasattr(value, "__wrapped__")',
    ),
    _known(
        "builder-of-another-name", "hooks/rope_modules", "guard.owner not in tables.builders:", "guard.owner is None:"
    ),
    _known(
        "method-of-the-builder-itself",
        "hooks/rope_modules",
        "held = next((name for name in names if name in vars(target)), None)",
        "held = None",
    ),
    _fresh("fresh-with-a-forward-of-its-own", "hooks/fused_norms", ' or "forward" in state:', ":"),
    _fresh(
        "fresh-with-hooks",
        "hooks/fused_norms",
        'if state["_forward_hooks"] or state["_forward_pre_hooks"] or',
        "if",
    ),
    _fresh(
        "fresh-with-backward-hooks",
        "hooks/fused_norms",
        'state["_backward_hooks"] or state["_backward_pre_hooks"] or',
        "",
    ),
    _fresh("fresh-though-compiled", "hooks/fused_norms", ' or state.get("_compiled_call_impl") is not None:', ":"),
    _fresh(
        "fresh-with-hooks-of-all-modules", "hooks/fused_norms", "if torch_modules._has_any_global_hook():", "if False:"
    ),
    _fresh("fresh-of-unknown-code", "hooks/fused_norms", "return runs_known_code(type(module))", "return True"),
    _fresh(
        "function-of-torch-replaced", "hooks/fused_norms", "if namespace.get(name) is not function:", "if not function:"
    ),
    _fresh(
        "function-of-torch-replaced-before",
        "hooks/fused_norms",
        "if not all(_is_of(function, name) for _, name, function in functions):",
        "if False:",
    ),
    Mutation("report-remembers", "dit_rope/hooks/report.py", "    plan = plan.now()\n", "    pass\n", _KNOWN),
    _known(
        "report-of-a-rope-module-that-was-replaced",
        "hooks/plan",
        "if patched and self.tables.path and not isinstance(self.target, Override):",
        "if False:",
    ),
    _known(
        "report-of-attention-that-was-replaced",
        "hooks/plan",
        "if patched and not installed(self.attention):",
        "if False:",
    ),
    _known(
        "report-of-a-processor-that-was-replaced",
        "hooks/plan",
        "if patched and not isinstance(holder, Override):",
        "if False:",
    ),
    _known(
        "processor-put-in-later-is-left",
        "hooks/plan",
        "if installed(processor) is None:\n                    adopt_processor(target)",
        "if False:\n                    adopt_processor(target)",
    ),
    _patching(
        "forward-of-others-unseen",
        "hooks/plan",
        'self.tables.method == "forward" and is_bypassed(self.target)',
        "False",
        "rope_module_whose_forward",
    ),
    fault(
        "wrapped-forward-not-rebound",
        "hooks/class_override",
        "    _rebind(target, wrapped)\n\n\ndef release(target",
        "\n\n\ndef release(target",
        ("tests/hooks/test_patched_after_others.py",),
        "wan or outlives",
    ),
)

# What is handed over is taken, or it is an error; and nobody finds what served for it.
_HANDED_OVER = (
    _known(
        "lost-rotation-unnoticed",
        "hooks/adapter",
        "        if not_called:\n",
        "        if False:\n",
    ),
    _known("every-rotation-pending", "hooks/rotating_norms", "        call.pending.discard(self._name)\n", ""),
    _fresh(
        "result-of-others-overwritten",
        "hooks/rotating_norms",
        "fresh = makes_fresh_results(self._module)",
        "fresh = True",
    ),
    _fresh(
        "norm-left-out-though-hooked", "hooks/rotating_norms", "if not makes_fresh_results(self._module):", "if False:"
    ),
    fault(
        "dual-numbers-lose-their-tangents",
        "hooks/attention",
        'if compiling or in_transform():\n            return unpatched_method(self, "__call__")',
        'if compiling:\n            return unpatched_method(self, "__call__")',
        ("tests/hooks/test_fitting_tables.py",),
        "dual_numbers",
    ),
    _known("stand-in-is-the-module", "hooks/rotating_norms", "proxy = object.__new__(type(attn))", "proxy = attn"),
    _known(
        "stand-in-keeps-a-norm",
        "hooks/rotating_norms",
        "for name, norm in rotating_modules(attn, self.rotation):",
        "for name, norm in rotating_modules(attn, self.rotation)[:1]:",
    ),
    of_models(
        "rotated-twice", "hooks/attention", "kwargs = {**kwargs, name: None}", "pass", "flux-single or cogvideox"
    ),
    of_models(
        "rebound-rotates",
        "hooks/attention",
        "__globals__, rotation.replaced_function.name: functools.partial(_unchanged, rotation)}",
        "__globals__}",
        "hidream or lumina",
    ),
)

# Undo: everything is given back, where it is by now, and nothing that somebody else still wants.
_UNDO = (
    _patching(
        "hooks-not-removed", "hooks/class_override", "        remove_hooks(target)\n    vars", "        pass\n    vars"
    ),
    _patching(
        "class-not-restored",
        "hooks/class_override",
        "            target.__class__ = made.unpatched\n",
        "            pass\n",
    ),
    _patching("settings-left-behind", "hooks/class_override", "    vars(target).pop(INSTALLED, None)\n", "    pass\n"),
    _patching("patched-twice", "hooks/plan", "    if is_patched(model):\n", "    if False:\n"),
    _back("copy-of-a-block-stays", "hooks/plan", "if state.origin is self.state.origin:", "if state is self.state:"),
    _back("copy-has-another-origin", "hooks/class_override", "return PatchState(self.origin)", "return PatchState()"),
    _back(
        "shared-object-released",
        "hooks/class_override",
        "        if not record.active:\n            release_all(target)\n",
        "        release_all(target)\n",
    ),
    _back(
        "shared-object-never-released",
        "hooks/class_override",
        "        if not record.active:\n            release_all",
        "        if False:\n            release_all",
    ),
    Mutation(
        "failed-patch-stays",
        "dit_rope/patching.py",
        "    except BaseException:\n        for plan in plans:\n            plan.restore()\n",
        "    except BaseException:\n",
        _PATCHING,
        "failing",
    ),
)

HOOKS = (*_AXIS_FORMS, *_KNOWN_CODE, *_HANDED_OVER, *_UNDO)
