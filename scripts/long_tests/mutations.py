"""The faults that ``mutation_check.py`` makes, each with the tests that guard the module it is made in.

Where a change of the source breaks the text of a fault, write the fault again for the new text: the list stands for
the kinds of mistakes that tests have to notice.
"""

from __future__ import annotations

from long_tests.mutation import Mutation
from long_tests.mutations_hooks import HOOKS
from long_tests.mutations_inputs import INPUTS
from long_tests.mutations_rounding import ROUNDING

_CORE = ("tests/tables/test_tables.py", "tests/tables/test_token_range.py", "tests/tables/test_axis_tables.py")
_QUICK = "not compile and not 720p and not fake_tensor"
_SCALING = ("tests/tables/test_scaling.py", "tests/tables/test_axis_tables.py", "tests/tables/test_tables.py")
_CACHE = ("tests/tables/test_cache.py", "tests/tables/test_cache_attack.py")
_EAGER = ("tests/backends/test_eager.py", "tests/rotation/test_rotation.py")
_OPS = ("tests/rotation/test_ops.py", "tests/rotation/test_rotation.py")
_STREAM = ("tests/streaming/test_streaming.py", "tests/streaming/test_rolling_cache.py")
_NO_COMPILE = "not compile and not opcheck"


def _tables(name: str, old: str, new: str, file: str = "tables/table") -> Mutation:
    return Mutation(name, f"dit_rope/{file}.py", old, new, _CORE, _QUICK)


def _dense(name: str, old: str, new: str) -> Mutation:
    return _tables(name, old, new, "tables/dense")


def _key_without(field: str, kind: str) -> Mutation:
    new = f"    {field}: {kind} = dataclasses.field(compare=False)\n"
    return _dense(f"key-without-{field}", f"    {field}: {kind}\n", new)


def _scaling(name: str, old: str, new: str, file: str = "tables/scaling") -> Mutation:
    return Mutation(name, f"dit_rope/{file}.py", old, new, _SCALING, _QUICK)


def _cache(name: str, old: str, new: str, file: str = "cache") -> Mutation:
    return Mutation(name, f"dit_rope/{file}.py", old, new, _CACHE, "not compile")


def _eager(name: str, old: str, new: str, file: str = "eager") -> Mutation:
    return Mutation(name, f"dit_rope/rotation/backends/{file}.py", old, new, _EAGER, f"{_NO_COMPILE} and not contract")


def _angles(name: str, old: str, new: str) -> Mutation:
    return Mutation(
        name, "dit_rope/rotation/backends/eager.py", old, new, ("tests/tables/test_cache_attack.py",), "angles"
    )


def _ops(name: str, old: str, new: str, file: str = "ops") -> Mutation:
    return Mutation(name, f"dit_rope/rotation/{file}.py", old, new, _OPS, _NO_COMPILE)


def _shift(name: str, old: str, new: str, k: str) -> Mutation:
    return Mutation(name, "dit_rope/streaming/shift.py", old, new, ("tests/streaming/test_shifting.py",), k)


MUTATIONS = (
    # Tables, shards and axes.
    *(
        _key_without(*each)
        for each in (("shard", "Shard"), ("dtype", "torch.dtype"), ("form", "Form"), ("grid", "Grid"))
    ),
    _tables("first-row-off-by-one", "packed + start - first)", "packed + start - first + 1)"),
    _tables("axis-in-the-last-columns", "packed + array.shape[1], :pairs]", "packed + array.shape[1], -pairs:]"),
    _dense("padding-turns", "flat[1][tokens.inside :] = 0.0", "flat[1][tokens.inside :] = 1.0"),
    _tables("padding-of-positions", "len(tokens.sizes)), -1, dtype", "len(tokens.sizes)), 0, dtype"),
    _dense("axes-swapped-in-dense-shards", "value[coordinates[axis]]", "value[coordinates[-1 - axis]]"),
    _dense("interleaved-as-half", "values.repeat_interleave(2, dim=-1), [", "values.repeat(1, 1, 2), ["),
    _dense("half-beside-itself", "slice(column + half, column + half + pairs)", "slice(column, column + pairs)"),
    _tables("positions-of-the-first-axis", "+ table.first_rows[axis]", "+ table.first_rows[0]"),
    _dense("complex-sign", "return torch.complex(cos, sin)", "return torch.complex(cos, -sin)"),
    _tables("token-offset-dropped", "token_offset=self.token_offset,", "token_offset=0,"),
    _tables(
        "ceil-to-floor", "count = -(-grid.tokens // shard.world)", "count = grid.tokens // shard.world", "tables/shards"
    ),
    _tables(
        "axis-shard-forgets-the-start-frame",
        "starts[axis] + shard.rank * size",
        "shard.rank * size",
        file="tables/shards",
    ),
    _tables("axes-reversed", "return coordinates[::-1]", "return coordinates", file="tables/shards"),
    _tables(
        "start-frame-off-by-one", "starts = (grid.start_frame, *", "starts = (grid.start_frame + 1, *", "tables/shards"
    ),
    _tables(
        "all-padding-holds-a-token", "return max(0, min(self.count", "return max(1, min(self.count", "tables/shards"
    ),
    _tables("whole-whatever-the-count", "self.token_offset == 0 and self.count", "self.count", file="tables/shards"),
    _tables("start-frame-on-every-axis", "grid.start_frame if axis == 0 else 0", "grid.start_frame", "tables/axes"),
    _tables("block-of-rows-too-short", "(start + size) // ROW_BLOCK", "(start + size - 1) // ROW_BLOCK", "tables/axes"),
    _tables("magnitude-dropped", "table = table * frequencies.magnitude", "pass", file="tables/axes"),
    _tables(
        "axis-key-without-dtype",
        "AxisKey(frequencies.numbers, first, stop, dtype)",
        "AxisKey(frequencies.numbers, first, stop, torch.float32)",
        file="tables/axes",
    ),
    _tables(
        "axis-key-without-first-row",
        "AxisKey(frequencies.numbers, first, stop, dtype)",
        "AxisKey(frequencies.numbers, 0, stop - first, dtype)",
        file="tables/axes",
    ),
    # Scaling.
    _scaling(
        "interpolation-in-place-of-scale",
        'float(positive("interpolation", interpolation))\n    return',
        "1.0 / interpolation\n    return",
        file="tables/scaling_types",
    ),
    _scaling("frequency-key-without-dtype", ".get((scaling, dim, theta, dtype),", ".get((scaling, dim, theta),"),
    _scaling("frequency-key-without-theta", ".get((scaling, dim, theta, dtype),", ".get((scaling, dim, dtype),"),
    _scaling(
        "rescale-dropped",
        'positive("theta_rescale", theta_rescale) == 1.0 else',
        "True else",
        file="tables/scaling_types",
    ),
    _scaling(
        "ntk-exponent",
        "float(theta * factor ** (dim / (dim - 2)))",
        "float(theta * factor ** (dim / (dim + 2)))",
        file="tables/scaling_types",
    ),
    _scaling("dynamic-growth", "* ratio - (factor - 1.0)", "* ratio - factor", file="tables/scaling_types"),
    _scaling("frequency-sign", "1.0 / (theta**exponents)", "theta**exponents", file="tables/scaling_types"),
    _scaling(
        "longrope-lists-swapped", "if seq_len > length else", "if seq_len <= length else", file="tables/scaling_types"
    ),
    _scaling("scaling-of-another-axis", "return self.scaling[axis] if", "return self.scaling[-1 - axis] if", "spec"),
    # The cache.
    _cache("hit-without-version", "if tensor._version != version:", "if False:"),
    _cache("written-entry-served", "any(tensor._version != v for tensor, v in entry.versions)", "False"),
    _cache("value-of-the-cap-not-kept", "if entry.bytes > self._max_bytes:", "if entry.bytes >= self._max_bytes:"),
    _cache("one-entry-too-many", "self._make_room(self._max_entries - 1,", "self._make_room(self._max_entries,"),
    _cache("bytes-of-the-new-entry", "self._max_bytes - entry.bytes)", "self._max_bytes)"),
    _cache("newest-leaves-first", "self._entries.pop(next(iter(self._entries)))", "self._entries.popitem()[1]"),
    _cache(
        "stored-after-clear",
        "if self._builds.get(slot) is attempt:\n                self._store(slot, entry)",
        "if True:\n                self._store(slot, entry)",
    ),
    _cache(
        "flight-never-lands",
        "                del self._builds[slot]\n        attempt",
        "                pass\n        attempt",
    ),
    _cache(
        "lands-once",
        "                self._end_build(slot, attempt)\n            finally:",
        "                self._end_build(slot, attempt)\n            except ZeroDivisionError:",
    ),
    _cache("slot-without-device-index", "slot = (key, device)", "slot = (key, torch.device(device.type))"),
    _cache("transforms-unseen", "or _function_transforms() is not None", "or False", "torch_state"),
    _cache("dispatch-modes-unseen", "(_dispatch_modes() > 0 and not _watched())", "False", "torch_state"),
    _cache("built-in-inference-mode", "with torch.inference_mode(False), torch.no_grad()", "with torch.no_grad()"),
    _cache("child-keeps-flights", "self._lock = threading.RLock()\n        self._builds = {}\n\n\n", "pass\n\n\n"),
    # Eager rotation.
    Mutation(
        "reference-sign",
        "dit_rope/rotation/reference.py",
        "x1 * cos - x2 * sin, x1 * sin + x2 * cos))",
        "x1 * cos + x2 * sin, x1 * sin + x2 * cos))",
        _EAGER,
        f"{_NO_COMPILE} and not contract",
    ),
    _eager("inverse-forward", "sin = -sin if args.inverse else sin", "sin = sin"),
    _eager("exact-and-fast-swapped", "        if self.args.exact:\n", "        if not self.args.exact:\n"),
    _eager("exact-by-one-product", "self.exact_complex = self.complex and args.exact", "self.exact_complex = False"),
    _eager("eps-after-the-root", ".add_(self.norm.eps).rsqrt_()", ".rsqrt_().add_(self.norm.eps)"),
    _eager("across-heads-per-head", "(-2, -1) if norm.kind.across_heads else (-1,)", "(-1,)"),
    _eager("mean-per-head", "x.mean(self.dims, keepdim=True), out=out)", "x.mean((-1,), keepdim=True), out=out)"),
    _eager("weight-of-the-first", "across_heads else parameters[index]", "across_heads else parameters[0]"),
    _eager("negative-row-turns", "+ 1).clamp(min=0)", "+ 1).clamp(min=1)", file="cos_sin"),
    _eager("prefix-forgotten", "slice(args.prefix, args.prefix + rotation.count)", "slice(0, rotation.count)"),
    _eager("angle-key-without-inverse", "args.pairing, args.inverse, self.exact", "args.pairing, self.exact"),
    _angles(
        "angle-key-without-offset", "args.first_rows, args.token_offset, args.count", "args.first_rows, args.count"
    ),
    _angles("angle-key-without-stride", "x.data_ptr(), x.shape, x.stride(), x.dtype", "x.data_ptr(), x.shape, x.dtype"),
    _eager("rest-lost-in-place", "and not (in_place and norm is None)", "and not in_place"),
    _eager("wrong-coordinate", "coordinate + first for coordinate", "coordinate for coordinate", file="cos_sin"),
    # The operators and the calls.
    _ops("backward-forward", "inverse=not args.inverse)", "inverse=args.inverse)", file="autograd"),
    _ops("norm-gradient-sign", "x_grad = back - values *", "x_grad = back + values *", file="derivatives"),
    _ops("gradient-of-the-mean", "x_grad = x_grad - back.mean(dims, keepdim=True)", "pass", file="derivatives"),
    _ops("gradient-without-weight", "back = back * _of_head(", "_ = back * _of_head(", file="derivatives"),
    _ops("gradient-eps", "keepdim=True) + norm.eps)", "keepdim=True))", file="derivatives"),
    _ops(
        "call-key-without-flags",
        "prefix, suffix, inverse, rounding, inplace, backend, normed,",
        "prefix, suffix, backend, normed,",
        "api",
    ),
    _ops("call-key-without-prefix", "layout_of(positions), prefix, suffix,", "layout_of(positions),", "api"),
    _ops("inplace-unchecked", "        check_inplace(names, xs, _parameters(norm))\n", "        pass\n", file="api"),
    # Streams and shifts.
    Mutation(
        "stream-start-of-the-table",
        "dit_rope/streaming/stream.py",
        "positions[0] - table.grid.start_frame",
        "positions[0] - table.grid.start_frame + 1",
        _STREAM,
        "not compile and not cuda",
    ),
    Mutation(
        "sinks-follow-one-too-far",
        "dit_rope/streaming/stream.py",
        "moved = tuple(range(oldest - sinks, oldest))",
        "moved = tuple(range(oldest - sinks + 1, oldest + 1))",
        _STREAM,
        "not compile and not cuda",
    ),
    Mutation(
        "ring-starts-at-the-sinks",
        "dit_rope/streaming/stream.py",
        "(frame - self.sink_frames) % ring",
        "frame % ring",
        _STREAM,
        "not compile and not cuda",
    ),
    _shift("shift-backwards", "inverse=towards_start", "inverse=not towards_start", "gives_keys or video"),
    _shift("shift-of-axis-0", "positions[..., source.axis] = steps", "positions[..., 0] = steps", "video"),
    Mutation(
        "shard-of-fastvideo",
        "dit_rope/compat/fastvideo.py",
        "return Shard(rank, world, axis=shard_dim)",
        "return Shard(rank, world)",
        ("tests/compat/test_compat_fastvideo.py",),
        "not compile",
    ),
    *HOOKS,
    *INPUTS,
    *ROUNDING,
)
