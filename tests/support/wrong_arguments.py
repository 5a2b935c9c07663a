"""Every public function with a call that it accepts, and what must never be passed for one of its arguments."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

import dit_rope
from dit_rope import Grid, NormKind, Pairing, RopeSpec, RopeStream, Scaling, Shard, ShiftTable, rope_table
from dit_rope.compat import fastvideo, flashinfer, huggingface, vllm

SPEC = RopeSpec((4, 2, 2))
GRID = Grid(2, 3, 4)
HUGE = 10**30


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def stream() -> RopeStream:
    return RopeStream(SPEC, (3, 4), window_frames=4)


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every public function and class that takes arguments, and a call that it accepts."""
    x, table, keys = normal(1, 24, 2, 8), rope_table(SPEC, GRID), normal(2, 5, 2, 8)
    around = {
        "prefix": 0,
        "suffix": 0,
        "positions": None,
        "inverse": False,
        "inplace": False,
        "exact": False,
        "rounding": None,
    }
    around |= {"backend": "auto"}
    norm = {"eps": 1e-6, "norm": NormKind.PER_HEAD}
    tokens, cache = torch.arange(5), torch.rand(9, 8)
    ragged = {"q": normal(5, 2, 8), "k": normal(5, 2, 8), "indptr": [0, 5], "offsets": [3]}
    rope = {"rotary_dim": 8, "interleave": False, "rope_scale": 1.0, "rope_theta": 1e4, "backend": "auto"}
    llama = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
    by_id = {"q": ragged["q"], "k": ragged["k"], "pos_ids": tokens}
    cached = {"positions": tokens, "query": normal(5, 16), "key": normal(5, 16), "head_size": 8, "cos_sin_cache": cache}
    cached |= {"is_neox": True, "backend": "auto"}
    by_name: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "RopeSpec": (
            RopeSpec,
            {
                "dims": (4, 2, 2), "theta": 1e4, "pairing": Pairing.HALF, "scaling": None,
                "frequency_dtype": torch.float64,
            },
        ),
        "Grid": (lambda sizes, start_frame: Grid(sizes, start_frame=start_frame), {"sizes": 3, "start_frame": 0}),
        "Shard": (Shard, {"rank": 0, "world": 1, "axis": None, "tokens": None}),
        "Scaling": (Scaling, {"kind": "linear", "parameters": (("factor", 2.0),)}),
        "AxisFrequencies": (
            dit_rope.AxisFrequencies,
            {"inverse": torch.ones(2), "magnitude": 1.0, "position_divisor": 1.0, "position_scale": 1.0,
             "angle_divisor": 1.0},
        ),
        "rope_table": (
            rope_table, {"spec": SPEC, "grid": GRID, "shard": None, "device": "cpu", "dtype": torch.float32}
        ),
        "rotate": (dit_rope.rotate, {"x": x, "table": table, **around}),
        "rotate_qk": (dit_rope.rotate_qk, {"q": x, "k": x, "table": table, **around}),
        "norm_rotate": (dit_rope.norm_rotate, {"x": x, "table": table, "weight": None, "bias": None, **norm, **around}),
        "norm_rotate_qk": (
            dit_rope.norm_rotate_qk,
            {"q": x, "k": x, "table": table, "q_weight": None, "k_weight": None, "q_bias": None, "k_bias": None,
             **norm, **around},
        ),
        "shift_keys": (
            dit_rope.shift_keys,
            {"keys": keys, "table": SPEC, "delta_frames": 3, "deltas": None, "blocks": None, "inplace": False,
             "allow_lossy": False, "backend": "auto"},
        ),
        "shift_keys by deltas": (
            dit_rope.shift_keys,
            {"keys": keys, "table": SPEC, "delta_frames": None, "deltas": torch.ones(2, 1, dtype=torch.int32),
             "blocks": torch.tensor([1, 0], dtype=torch.int32)},
        ),
        "plan_eviction": (dit_rope.plan_eviction, {"evicted": [1], "blocks": 4, "block_size": 2, "tokens": 7}),
        "positions_at": (
            lambda frame, row, column: table.positions_at(frame, row, column), {"frame": 1, "row": 2, "column": 3}
        ),
        "ShiftTable": (
            ShiftTable, {"spec": SPEC, "axis": 0, "step": 1, "device": "cpu", "dtype": torch.float32}
        ),
        "RopeStream": (
            RopeStream,
            {"spec": SPEC, "frame_size": (3, 4), "window_frames": 4, "sink_frames": 0,
             "policy": dit_rope.PositionPolicy.ABSOLUTE, "max_frames": None, "device": None, "backend": "auto"},
        ),
        "RollingCache": (
            dit_rope.RollingCache,
            {"stream": stream(), "batch": 1, "heads": 2, "head_dim": 8, "dtype": torch.float32},
        ),
        "begin_chunk": (lambda frames: stream().begin_chunk(frames), {"frames": 2}),
        "cache_configure": (
            dit_rope.cache_configure,
            {"max_entries": None, "max_bytes": None, "max_model_entries": None, "max_model_bytes": None},
        ),
        "register_scaling": (lambda name, function: None if callable(function) and name == "mine" else
                             dit_rope.register_scaling(name, function), {"name": "mine", "function": len}),
        "scaling_from_config": (dit_rope.scaling_from_config, {"config": None}),
        **{
            name: (lambda adapter, name=name: None if adapter is None else getattr(dit_rope, name)(adapter),
                   {"adapter": None})
            for name in ("register_adapter", "unregister_adapter")
        },
        "patch": (lambda target: None if target is None else dit_rope.patch(target), {"target": None}),
        "unpatch": (lambda target: None if target is None else dit_rope.unpatch(target), {"target": None}),
        "fastvideo": (
            fastvideo.get_rotary_pos_embed,
            {"rope_sizes": (2, 3, 4), "hidden_size": 16, "heads_num": 2, "rope_dim_list": (4, 2, 2), "rope_theta": 1e4,
             "theta_rescale_factor": 1.0, "interpolation_factor": 1.0, "shard_dim": 0, "do_sp_sharding": True,
             "dtype": torch.float32, "start_frame": 0, "use_real": True, "sp_rank": 0, "sp_world_size": 1},
        ),
        "vllm": (vllm.rotary_embedding, {**cached, "rope_dim_offset": 0, "inverse": False}),
        "huggingface.apply_rotary_emb": (
            huggingface.apply_rotary_emb,
            {"x": normal(1, 2, 5, 8), "freqs_cis": (torch.rand(5, 8), torch.rand(5, 8)), "use_real": True,
             "use_real_unbind_dim": -1, "sequence_dim": 2, "exact": True, "backend": "auto"},
        ),
        "huggingface.apply_rotary_pos_emb": (
            huggingface.apply_rotary_pos_emb,
            {"q": normal(1, 2, 5, 8), "k": normal(1, 2, 5, 8), "cos": torch.rand(1, 5, 8), "sin": torch.rand(1, 5, 8),
             "unsqueeze_dim": 1, "exact": True, "backend": "auto"},
        ),
        "ragged_positions": (flashinfer.ragged_positions, {"indptr": [0, 5], "offsets": [3], "nnz": 5}),
    }  # fmt: skip
    for name in ("apply_rope_with_cos_sin_cache", "apply_rope_with_cos_sin_cache_inplace"):
        by_name[f"flashinfer.{name}"] = (getattr(flashinfer, name), cached)
    for suffix in ("", "_inplace"):
        by_name[f"flashinfer.apply_rope{suffix}"] = (getattr(flashinfer, f"apply_rope{suffix}"), {**ragged, **rope})
        for kind, more in (("rope", {}), ("llama31_rope", llama)):
            function = getattr(flashinfer, f"apply_{kind}_pos_ids{suffix}")
            by_name[f"flashinfer.apply_{kind}_pos_ids{suffix}"] = (function, {**by_id, **rope, **more})
        by_name[f"flashinfer.apply_llama31_rope{suffix}"] = (
            getattr(flashinfer, f"apply_llama31_rope{suffix}"), {**ragged, **rope, **llama},
        )  # fmt: skip
    return by_name


WRONG: dict[str, Any] = {
    "None": None, "object": object(), "list": [[]], "dict": {}, "string": "seven", "bytes": b"7", "float": 2.5,
    "NaN": math.nan, "negative": -7, "huge": HUGE, "bool": True, "complex": 1j, "dtype": torch.int8, "type": int,
    "function": len, "integers": torch.arange(3), "meta": torch.empty(1, 24, 2, 8, device="meta"),
    "float8": torch.zeros(1, 24, 2, 8, dtype=torch.float8_e4m3fn), "sparse": torch.zeros(1, 24, 2, 8).to_sparse(),
    "quantized": torch.zeros(1, 24, 2, 8, dtype=torch.int8), "empty": torch.zeros(0),
}  # fmt: skip


def wrong_argument_outcome(name: str, argument: str, kind: str) -> str:
    """Calls ``name`` with a wrong value: "right" if it takes it, "refused" if the message names an argument and a rule.

    Raises:
        AssertionError: another exception, or a message that does not say what is wrong.
    """
    function, arguments = calls()[name]
    try:
        function(**(arguments | {argument: WRONG[kind]}))
    except (TypeError, ValueError, NotImplementedError) as error:
        message = str(error)
        if " must " in message and any(
            re.search(rf"\b{named}\b", message) for named in (*arguments, _ALSO.get(argument, argument))
        ):
            return "refused"
        raise AssertionError(f"{name} names no argument, {argument} being {kind}: {error!r}") from error
    except Exception as error:
        raise AssertionError(f"{name} fails inside, {argument} being {kind}: {error!r}") from error
    return "right"


_ALSO = {
    "sizes": "size",
    "config": "rope_scaling",
    "frame": "coordinates",
    "row": "coordinates",
    "column": "coordinates",
}
"""What messages call an argument that is the field of an object."""


@functools.cache
def every_argument() -> tuple[tuple[str, str], ...]:
    """Functions and their arguments."""
    return tuple((name, argument) for name, (_, arguments) in calls().items() for argument in arguments)


STRATEGY = (
    st.tuples(st.sampled_from(every_argument()), st.sampled_from(sorted(WRONG))),
    lambda drawn: wrong_argument_outcome(*drawn[0], drawn[1]),
)
