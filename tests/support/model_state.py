"""What a patch may change in a model, to be compared before it and after ``undo()``."""

from __future__ import annotations

from typing import Any

import torch


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Identities of everything that a patch may change, by the path of a module."""
    return {
        path: (
            type(module),
            {name: (id(value), type(value)) for name, value in vars(module).items()},
            {name: id(value) for name, value in module._parameters.items()},
            {name: id(value) for name, value in module._buffers.items()},
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks.values()),
            dict(module._forward_pre_hooks_with_kwargs),
            dict(module._forward_hooks_always_called),
        )
        for path, module in model.named_modules()
    }
