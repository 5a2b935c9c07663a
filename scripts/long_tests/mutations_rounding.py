"""Faults in where norms and rotations round, for ``mutations.py``."""

from __future__ import annotations

from long_tests.mutation import Mutation
from long_tests.mutations_hooks import fault

_MODELS = ("tests/hooks/test_rounding_of_models.py",)
_FUNCTIONS = ("tests/rotation/test_rounding.py",)


def _models(name: str, file: str, old: str, new: str, k: str) -> Mutation:
    return fault(name, f"hooks/{file}", old, new, _MODELS, k)


def _functions(name: str, file: str, old: str, new: str) -> Mutation:
    return fault(name, f"rotation/{file}", old, new, _FUNCTIONS)


ROUNDING = (
    _functions(
        "norm-rounds-nowhere", "api", "{Rounding.MODEL: NormRounding.RESULT,", "{Rounding.MODEL: NormRounding.NONE,"
    ),
    _functions("flag-not-checked", "rounding", "if exact and rounding is not Rounding.EXACT:", "if False:"),
    _functions(
        "products-not-rounded", "api", "exact=rounding is not Rounding.FAST", "exact=rounding is Rounding.EXACT"
    ),
    _functions("traced-norm-not-rounded", "derivatives", "return x.to(dtype).to(x.dtype) if rounds else x", "return x"),
    fault(
        "steps-rounded-as-results",
        "rotation/backends/eager",
        "every_step = self.norm.rounding is NormRounding.EVERY_STEP",
        "every_step = False",
        ("tests/backends/test_eager.py",),
        "contract",
    ),
    fault(
        "choice-key-without-rounding",
        "rotation/choice",
        "norm.eps, norm.rounding, len(weights)",
        "norm.eps, len(weights)",
        ("tests/rotation/test_backend_choice.py",),
        "rounding",
    ),
    _models(
        "norm-of-diffusers-rounds-once",
        "fused_norms",
        "_replace(rounding=NormRounding.EVERY_STEP)",
        "_replace(rounding=NormRounding.RESULT)",
        "order_of_sums and hunyuan",
    ),
    _models(
        "fast-mode-rounds",
        "rotating_norms",
        "NormRounding.NONE if call.rounding is Rounding.FAST else norm.rounding",
        "norm.rounding",
        "fast_mode",
    ),
    _models("autocast-forgotten", "rotating_norms", " and not is_autocast(x.device)", "", "autocast"),
    _models(
        "one-pass-unseen",
        "rotating_norms",
        "rotation.format.exact and one_pass_is_exact(self._module, norm, heads, layout, backend)",
        "rotation.format.exact",
        "not_used",
    ),
    _models(
        "bits-compared-in-16-bits-alone",
        "exact_bits",
        "in {torch.float32, heads.dtype})",
        "in {heads.dtype})",
        "not_used",
    ),
    _models("bits-shown-in-a-mode", "exact_bits", "or torch._C._len_torch_dispatch_stack() ", "", "mode_sees"),
    _models(
        "kind-without-bits-forgotten",
        "rotating_norms",
        "self.settings.without_bits.add(self.kind)",
        "pass",
        "asked_once",
    ),
    _models(
        "arithmetic-unseen",
        "rotating_norms",
        "return None if exact is None else table.args(length, align, exact)",
        "return args",
        "shown",
    ),
)
