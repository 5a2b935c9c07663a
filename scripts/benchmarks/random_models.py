"""Models of diffusers with random weights or none, and random inputs, which scripts and tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Noise:
    """Seeded inputs in one dtype on one device; ``noise(2, 3)`` is a normal ``[2, 3]`` tensor."""

    def __init__(self, dtype: torch.dtype, seed: int = 1, device: str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        """The next tensor."""
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)


class EmptyOptions(TorchFunctionMode):
    """Within this context, ``torch.empty``, which makes weights, has these options where its call leaves them out.

    With ``device="meta"`` a model has no weights, and what its constructor computes is still computed. With ``dtype``
    weights are allocated in it: a released model in float32 may not fit on a device.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls ``func``, ``torch.empty`` with the options."""
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs.update({name: value for name, value in self.options.items() if kwargs.get(name) is None})
        return func(*args, **kwargs)


def random_model(
    model_class: Callable[..., torch.nn.Module], config: Mapping[str, Any], dtype: torch.dtype
) -> torch.nn.Module:
    """A seeded random model as ``from_pretrained(torch_dtype=dtype)`` gives it: parts kept in float32 stay so.

    Norm weights are not ones, nor biases zeros, so that a weight that is left out or swapped shows.
    """
    torch.manual_seed(0)
    model = model_class(**config).eval()
    float32_parts = frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator, device="cpu").to(parameter) - 0.5)
            elif not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.1)
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32 if float32_parts & set(path.split(".")) else dtype)
        for path, module in model.named_modules():
            for name in module._buffers.keys() - module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None and buffer.is_floating_point() and not float32_parts & set(path.split(".")):
                    module._buffers[name] = buffer.to(dtype)
    return model
