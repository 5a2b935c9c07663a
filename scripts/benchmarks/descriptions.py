"""What the sections of the report measure, and what their variants are."""

from __future__ import annotations

from .end_to_end import UNPATCHED, WITHOUT
from .end_to_end import VARIANTS as STEP_VARIANTS
from .peers import PEERS
from .rope_modules import EVERY_PASS, FIRST_PASS, LATER_PASSES
from .rotation import COPY
from .table_building import AXES, DENSE, FULL

SECTIONS = {
    "tables": "Tables of float64, as FastVideo makes them for Wan, built from empty caches and compared bit for bit; "
    "then diffusers' own rope modules at released sizes, each as it is and in a patched model, compared bit for bit. "
    "Bytes are what the caches hold, counted and not timed.",
    "rotation": "Queries and keys of each model, random, rotated alone and after the model's RMSNorm. Every variant is "
    "first compared with float64, exact mode with the bits of the model's own code; a wrong variant is left out, or, "
    "if it is dit_rope's, ends the run without figures. All write new tensors. On a CPU, shapes have fewer frames or "
    "lines.",
    "operators": "Kernels and bytes of one attention module besides its projections and the attention product, in the "
    "second forward pass, in bfloat16, patched in fast mode as on a GPU. Counted on CPU; no clock is read.",
    "step": "One forward pass of Wan 1.3B with random weights in bfloat16, with more and more of the rotary embedding "
    "patched. It is a whole step without guidance, and half of one with it. Outputs are compared first: exact variants "
    "bit for bit.",
}
VARIANTS = {
    "tables": {
        FULL: "every token of the grid on its own, as FastVideo builds it",
        DENSE: "dit_rope.compat.fastvideo.get_rotary_pos_embed: the same result, expanded from axis tables",
        AXES: "dit_rope.rope_table: one row for each coordinate of each axis, which the rotation reads",
        EVERY_PASS: "the rope module of diffusers as it is: it builds in every forward pass",
        FIRST_PASS: "the same module in a patched model, with nothing in the cache",
        LATER_PASSES: "the same module in a patched model, from the second forward pass on",
    },
    "rotation": {
        COPY: "empty_like and copy_ of the same q and k: what reading and writing them once takes",
        "dit_rope": "float32 inside, rounded once; plain PyTorch on a CPU",
        "dit_rope, cuda": "the CUDA C++ kernel; float32 inside, rounded once",
        "dit_rope, triton": "the Triton kernel; float32 inside, rounded once",
        "dit_rope, exact": "the bits of the model's own code; a norm before it is the model's own",
        "dit_rope, cuda, exact": "the CUDA C++ kernel with the bits of the model's own code",
        "dit_rope, triton, exact": "the Triton kernel with the bits of the model's own code",
        **{name: (peer.__doc__ or "").partition("\n")[0].replace("``", "") for name, peer in PEERS.items()},
    },
    "operators": {
        "unpatched": "the model as diffusers has it",
        "patched": "dit_rope.patch(model, exact=False)",
        "minimum": "queries and keys read and written once, tables read once",
    },
    "step": {
        UNPATCHED: "the model as diffusers has it",
        **dict(
            zip(
                [variant.name for variant in STEP_VARIANTS],
                (
                    "tables are found again, everything else is the model's own",
                    "the rotation too, with the bits of the unpatched model",
                    "norm and rotation with its bits, in one pass where this machine shows them: the default on a CPU",
                    "norm and rotation in one pass, rounded where the model rounds: the default on a GPU",
                    "the rotation in float32, rounded once",
                    "norm and rotation in one pass, in float32, rounded once",
                ),
                strict=True,
            )
        ),
        WITHOUT: "no table, no norm of queries and keys and no rotation: the most that any patch could gain",
    },
}
"""By section and variant."""
