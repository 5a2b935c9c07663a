"""Two ranks over gloo: DDP, and FSDP2 of blocks, of attention modules, and of norms. Runs inside of each rank."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .core import INTERVENTIONS, TWO_ORDERS, NotApplicable, Subject, intervention

RANKS = 2
ranked = functools.partial(intervention, ranks=RANKS, reversible=False, orders=TWO_ORDERS, quick=False)


def _backward(subject: Subject, inputs: Any) -> Any:
    subject.model.zero_grad()
    output = subject.example.run(subject.callee, inputs)
    outputs = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad]
    sum(x.square().sum() for x in outputs).backward()
    return output, [p.grad for p in subject.model.parameters() if p.grad is not None]


@ranked("DDP")
def ddp(subject: Subject) -> None:
    """Gradients of two ranks with different inputs, averaged."""
    if not subject.example.trains:
        raise NotApplicable("does not train")
    parallel = torch.nn.parallel.DistributedDataParallel(subject.model, find_unused_parameters=True)
    subject.callee = parallel
    rank = torch.distributed.get_rank()
    subject.inputs = lambda number: subject.new_inputs(1 + 10 * rank + number)
    subject.run = lambda inputs: _backward(subject, inputs)


def _sharded(*kinds: str, **policy: Any) -> Any:
    def put(subject: Subject) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(**policy)}
        for kind in kinds:
            for module in subject.modules(kind):
                if any(True for _ in module.parameters()):
                    fully_shard(module, **options)
        fully_shard(subject.model, **options)

    return put


ranked("FSDP2 of blocks")(_sharded("blocks"))
ranked("FSDP2 of attention modules")(_sharded("attentions"))
ranked("FSDP2 of norms and projections")(_sharded("norms", "projections"))
ranked("FSDP2 of blocks in bfloat16", rounded=torch.bfloat16)(
    _sharded("blocks", param_dtype=torch.bfloat16, cast_forward_inputs=True)
)


def on_rank(example: str, name: str) -> list[dict[str, Any]]:
    """All rows of one example under one intervention, in this rank."""
    from zoo import named

    from . import runner

    intervention = next(intervention for intervention in INTERVENTIONS if intervention.name == name)
    return [vars(row) for row in runner.rows_of(named(example), intervention)]
