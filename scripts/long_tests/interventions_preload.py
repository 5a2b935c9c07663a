"""What every process of ``interventions.py`` is forked with."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import peft
import torch
import torch._dynamo
import torch._inductor.config
from diffusers import hooks

from long_tests.intervention_cases import INTERVENTIONS
from zoo import EXAMPLES

torch.set_num_threads(1)
torch.compile(torch.abs, backend="aot_eager")(torch.ones(2))  # imports what compilation needs

__all__ = ["EXAMPLES", "INTERVENTIONS", "diffusers", "hooks", "peft", "torch"]
