"""How torch is told to compute: dtypes, devices, autocast, gradients, transforms, modes and threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from zoo import Noise

from .core import TWO_ORDERS, NotApplicable, Subject, intervention


def _in_context(make: Callable[[], Any], around_patch: bool = True) -> Any:
    def put(subject: Subject) -> None:
        if around_patch:
            subject.enter(make())
            return
        real = subject.run

        def run(inputs: Any) -> Any:
            with make():
                return real(inputs)

        subject.run = run

    return put


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _default_device(device: str) -> Any:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


intervention("default dtype float64")(_in_context(lambda: _default_dtype(torch.float64)))
intervention("default dtype bfloat16", rounded=torch.bfloat16)(_in_context(lambda: _default_dtype(torch.bfloat16)))
intervention("default device cpu")(_in_context(lambda: _default_device("cpu")))
intervention("default device meta of the calls alone")(_in_context(lambda: _default_device("meta"), False))
intervention("with torch.device")(_in_context(lambda: torch.device("cpu")))
for _name, _make in (("default device", _default_device), ("with torch.device", torch.device)):
    intervention(f"{_name} meta of the patch alone", orders=("before", "again"))(
        lambda subject, make=_make: setattr(subject, "patching", lambda: make("meta"))
    )
intervention("inference mode")(_in_context(torch.inference_mode))
intervention("inference mode of the calls alone")(_in_context(torch.inference_mode, False))
intervention("deterministic algorithms")(_in_context(_deterministic))
intervention("anomaly mode")(_in_context(torch.autograd.detect_anomaly))
for _dtype in (torch.float16, torch.bfloat16):
    _name = str(_dtype).removeprefix("torch.")
    _cast = lambda dtype=_dtype: torch.autocast("cpu", dtype)  # noqa: E731
    intervention(f"autocast {_name}", rounded=_dtype)(_in_context(_cast))
    intervention(f"autocast {_name} of the calls alone", rounded=_dtype)(_in_context(_cast, False))
    intervention(f"weights in {_name}", dtype=_dtype)(lambda subject: None)
    intervention(f"weights in {_name} under autocast of the other", dtype=_dtype, rounded=torch.bfloat16)(
        _in_context(
            lambda dtype=_dtype: torch.autocast("cpu", {torch.float16: torch.bfloat16}.get(dtype, torch.float16))
        )
    )
intervention("weights in float64", dtype=torch.float64)(lambda subject: None)


def _cast(dtype: torch.dtype) -> Any:
    """``model.to(dtype)``, and inputs of that dtype."""

    def put(subject: Subject) -> None:
        subject.model.to(dtype)
        subject.inputs = lambda number: subject.example.inputs(subject.model, Noise(dtype, 3 if number == 2 else 1))

    return put


for _dtype in (torch.float64, torch.float16, torch.bfloat16):
    _name = str(_dtype).removeprefix("torch.")
    _least = torch.float32 if _dtype == torch.float64 else _dtype
    intervention(f"model cast to {_name}", reversible=False, rounded=_least)(_cast(_dtype))


@intervention("norms in another dtype", reversible=False, rounded=torch.bfloat16)
def norms(subject: Subject) -> None:
    """bfloat16 norms in a float32 model."""
    for module in subject.modules("norms"):
        module.to(torch.bfloat16)


@intervention("norms in float32 in a bfloat16 model", dtype=torch.bfloat16, reversible=False)
def float_norms(subject: Subject) -> None:
    """How some checkpoints keep them."""
    for module in subject.modules("norms"):
        module.float()


class _Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _OtherCosines(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 0.5 if func in (torch.cos, torch.Tensor.cos, torch.polar) else result


class _Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _counted_flops() -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


intervention("torch function mode")(_in_context(_Functions, False))
intervention("torch function mode that halves cosines")(_in_context(_OtherCosines, False))
intervention("torch dispatch mode")(_in_context(_Dispatch, False))
intervention("flops counted")(_in_context(_counted_flops, False))
intervention("profiler", quick=False)(
    _in_context(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), False)
)


def _trains(subject: Subject) -> None:
    if not subject.example.trains:
        raise NotApplicable("does not train")


def _backward(subject: Subject, inputs: Any) -> Any:
    subject.model.zero_grad()
    output = subject.example.run(subject.callee, inputs)
    outputs = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad]
    sum(x.square().sum() for x in outputs).backward()
    return output, [p.grad for p in subject.model.parameters() if p.grad is not None]


def _training(subject: Subject) -> None:
    _trains(subject)
    subject.run = lambda inputs: _backward(subject, inputs)
    subject.off(subject.model.zero_grad)


@intervention("training")
def training(subject: Subject) -> None:
    """Gradients of all parameters."""
    _training(subject)


@intervention("training in train mode")
def train_mode(subject: Subject) -> None:
    """With dropout, from one seed."""
    _training(subject)
    subject.model.train()
    subject.off(subject.model.eval)


@intervention("training in bfloat16", dtype=torch.bfloat16)
def training_bfloat16(subject: Subject) -> None:
    """Gradients in bfloat16."""
    _training(subject)


@intervention("training with gradient checkpointing", reversible=False)
def checkpointing(subject: Subject) -> None:
    """Diffusers' own switch."""
    if not getattr(subject.model, "_supports_gradient_checkpointing", False):
        raise NotApplicable("no gradient checkpointing")
    _training(subject)
    subject.model.train()
    subject.model.enable_gradient_checkpointing()


@intervention("training steps of a fused optimizer", changes=True, reversible=False, undo_reaches=False)
def fused_optimizer(subject: Subject) -> None:
    """SGD(fused=True) between steps; the results are those of validation.

    Gradients are clipped, and not divided by their own size: a step then multiplies roundings by little.
    """
    _trains(subject)
    optimizer = torch.optim.SGD(subject.model.parameters(), lr=1e-3, fused=True)
    real = subject.run

    def run(inputs: Any) -> Any:
        _backward(subject, inputs)
        torch.nn.utils.clip_grad_norm_(subject.model.parameters(), 1.0)
        optimizer.step()
        return real(inputs)

    subject.run = run


@intervention("training with saved tensors on the host")
def save_on_cpu(subject: Subject) -> None:
    """Saved tensors are packed and unpacked."""
    _training(subject)
    subject.enter(torch.autograd.graph.save_on_cpu())


@intervention("backward under the math kernel")
def math_kernel(subject: Subject) -> None:
    """sdpa_kernel(MATH)."""
    _training(subject)
    subject.enter(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))


def _transformed(transform: str) -> Any:
    """torch.func's transforms over the hidden states."""

    def put(subject: Subject) -> None:
        name = next((n for n in ("hidden_states", "z") if isinstance(subject.new_inputs(1).get(n), torch.Tensor)), None)
        if name is None:
            raise NotApplicable("no tensor of hidden states")

        def run(inputs: Any) -> Any:
            def call(x: torch.Tensor) -> torch.Tensor:
                output = subject.example.run(subject.model, {**inputs, name: x})
                return next(y for y in torch.utils._pytree.tree_leaves(output) if isinstance(y, torch.Tensor))

            x = inputs[name]
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                if transform == "jvp":
                    return torch.func.jvp(call, (x,), (torch.ones_like(x),))
                if transform == "jvp without gradients":
                    with torch.no_grad():
                        return torch.func.jvp(call, (x,), (torch.ones_like(x),))
                if transform == "forward-mode AD":
                    with torch.autograd.forward_ad.dual_level():
                        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                        return tuple(torch.autograd.forward_ad.unpack_dual(call(dual)))
                if transform == "grad":
                    return torch.func.grad(lambda y: call(y).square().sum())(x)
                if transform == "vmap":
                    return torch.vmap(call)(torch.stack([x, 2 * x]))
                y = x.clone().requires_grad_()
                (first,) = torch.autograd.grad(call(y).square().sum(), y, create_graph=True)
                return first, torch.autograd.grad(first.square().sum(), y)[0]

        subject.run = run

    return put


for _transform in ("jvp", "jvp without gradients", "forward-mode AD", "grad", "vmap", "double backward"):
    intervention(f"torch.func: {_transform}", orders=TWO_ORDERS)(_transformed(_transform))


@intervention("calls from another thread")
def thread(subject: Subject) -> None:
    """Each step in a separate thread."""
    real = subject.run

    def run(inputs: Any) -> Any:
        results: list[Any] = []

        def work() -> None:
            try:
                results.append(real(inputs))
            except Exception as error:
                results.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    subject.run = run


@intervention("two threads at once")
def threads(subject: Subject) -> None:
    """The same model with other inputs in each."""
    real = subject.run

    def run(inputs: Any) -> Any:
        results: dict[int, Any] = {}
        others = subject.new_inputs(9)

        def work(number: int, inputs: Any) -> None:
            with torch.no_grad():
                results[number] = subject.example.run(subject.model, inputs)

        workers = [threading.Thread(target=work, args=pair) for pair in ((0, inputs), (1, others))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return [results.get(number) for number in (0, 1)], real(inputs)

    subject.run = run
