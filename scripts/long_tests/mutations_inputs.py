"""Faults in what models are given: do tables fit tokens, what decides a key, how long does what is packed serve."""

from __future__ import annotations

from long_tests.mutation import Mutation
from long_tests.mutations_hooks import fault, of_models

_MEMO = ("tests/hooks/test_model_tables.py", "tests/hooks/test_table_keys.py")
_FITTING = ("tests/hooks/test_fitting_tables.py",)


def _memo(name: str, old: str, new: str, file: str = "hooks/table_keys") -> Mutation:
    return fault(name, file, old, new, _MEMO)


def _packed(name: str, old: str, new: str, file: str = "hooks/packed_tables") -> Mutation:
    return fault(name, file, old, new, ("tests/hooks/test_packed_tables.py",))


def _fitting(name: str, file: str, old: str, new: str) -> Mutation:
    return fault(name, file, old, new, _FITTING)


# The model's own error stays an error, and a changed input a changed table.
_FITS = (
    _fitting(
        "any-number-of-tokens",
        "hooks/adapter",
        "return 0 < self.count(arguments, dim) == rows",
        "return True",
    ),
    _fitting(
        "longer-tables", "hooks/adapter", "self.count(arguments, dim) == rows", "self.count(arguments, dim) <= rows"
    ),
    _fitting(
        "one-row-tables",
        "hooks/adapter",
        "self.count(arguments, dim) == rows",
        "self.count(arguments, dim) == rows or rows == 1",
    ),
    _fitting(
        "no-argument-fits",
        "hooks/adapter",
        "0 < self.count(arguments, dim) == rows",
        "self.count(arguments, dim) in (0, rows)",
    ),
    _fitting("tokens-of-both", "hooks/adapter", "counts[:1] if self.first_of else counts", "counts"),
    _fitting(
        "batch-of-the-table",
        "hooks/heads",
        "table.batch not in samples or ",
        "",
    ),
    _fitting(
        "one-sample-for-all", "hooks/heads", "(batch,) if rotation.format.every_sample else (1, batch)", "(1, batch)"
    ),
    _fitting(
        "heads-of-the-table",
        "hooks/heads",
        " or table.heads not in ((count,) if rotation.format.every_head else (1, count))",
        "",
    ),
    _fitting("one-head-for-all", "hooks/heads", "(count,) if rotation.format.every_head else (1, count)", "(1, count)"),
    _fitting("narrower-tables", "hooks/heads", "else table.head_dim == width", "else table.head_dim <= width"),
    _fitting("wider-tables", "hooks/heads", "return table.head_dim <= width if", "return True if"),
    _fitting(
        "doubled-not-compared", "hooks/formats", "if self.doubled is not None and not is_known(tensors):", "if False:"
    ),
    _fitting(
        "wide-tables-in-exact-mode",
        "hooks/formats",
        "_WIDE = frozenset({torch.float64, torch.complex128})",
        "_WIDE = frozenset[torch.dtype]()",
    ),
    _fitting(
        "gradient-of-the-table-lost",
        "hooks/formats",
        "return not (rotary.requires_grad and torch.is_grad_enabled())",
        "return True",
    ),
    _fitting(
        "rest-not-looked-at",
        "hooks/rotating_norms",
        "if not self._norm.fits(table, heads.shape[1]):",
        "if False:",
    ),
    _fitting(
        "rest-without-sines",
        "hooks/packed_tables",
        "bool((cos == 1).all()) and not bool(sin.any())",
        "bool((cos == 1).all())",
    ),
    _fitting(
        "exact-gradients-taken-over",
        "hooks/attention",
        "(kind in settings.without_bits or wants_gradients(attn, arguments)):",
        "kind in settings.without_bits:",
    ),
    _fitting(
        "exact-gradients-of-parameters",
        "hooks/rotating_norms",
        "return any(inputs) or any(parameter.requires_grad for parameter in attn.parameters())",
        "return any(inputs)",
    ),
    _fitting(
        "exact-gradients-of-a-function",
        "hooks/attention",
        "grad = torch.is_grad_enabled() and any(x.requires_grad for x in xs)",
        "grad = False",
    ),
    _fitting(
        "function-rotates-whatever-it-is-given",
        "hooks/attention",
        "if not all(x.ndim == 4 and fits(x, table, rotation) and x.shape[1] == table.tokens for x in heads):",
        "if False:",
    ),
    _fitting("heads-not-asked", "hooks/rotating_norms", " or not fits(heads, table, rotation):", ":"),
    fault(
        "weight-decides-the-dtype",
        "hooks/fused_norms",
        "decides = not norm.keeps_dtype and any(tensor.dtype != dtype for tensor in tensors)",
        "decides = False",
        ("tests/hooks/test_fresh_results.py",),
        "weight_decides",
    ),
    fault(
        "data-and-table-promote",
        "models/ideogram4",
        "require_fit(query.dtype == key.dtype == value.dtype == promoted)",
        "pass",
        ("tests/hooks/test_fitting_tables.py",),
        "ideogram4",
    ),
    # How models hand tables over, packed.
    of_models(
        "align-start",
        "hooks/packed_tables",
        "first = self.tokens - count if align is Align.END",
        "first = 0 if align is Align.END",
        "flux-batched-ids or chroma",
    ),
    of_models(
        "prefix-at-the-start",
        "hooks/packed_tables",
        "prefix = length - count if align is Align.END else 0",
        "prefix = 0",
        "cogvideox",
    ),
    of_models(
        "head-rows-ignored", "hooks/packed_tables", "head_rows=self.head_rows,", "head_rows=0,", "mochi or ltx2-inter"
    ),
    of_models(
        "stride-of-heads",
        "hooks/packed_tables",
        "pairing, tokens if heads > 1 else 0, heads",
        "pairing, 1 if heads > 1 else 0, heads",
        "mochi or ltx2-inter",
    ),
    of_models(
        "stride-of-the-batch", "hooks/packed_tables", "mul_(heads * tokens)", "mul_(tokens)", "ltx2 or ltx-unscaled"
    ),
    of_models(
        "matrix-transposed",
        "hooks/formats",
        "rotary[..., 1, 0].float()",
        "rotary[..., 0, 1].float()",
        "kandinsky5 or hidream",
    ),
    of_models("conjugate", "hooks/formats", "four_dims(each.imag).float()", "-four_dims(each.imag).float()", "qwen"),
    of_models(
        "first-table-for-all",
        "hooks/rotating_norms",
        "call.tables[min(norm.table, len(call.tables) - 1)]",
        "call.tables[0]",
        "qwen or joyimage or ltx2",
    ),
    of_models(
        "fast-where-exact",
        "hooks/rotating_norms",
        "align, form.exact and rounding is not Rounding.FAST)",
        "align, form.exact and rounding is Rounding.MODEL)",
        "flux",
    ),
    fault(
        "norm-not-rounded",
        "hooks/rotating_norms",
        "if call.rounding is not Rounding.FAST and rotation.cast_to is not None:",
        "if False:",
        ("tests/hooks/test_rounding_of_models.py",),
        "two_passes",
    ),
    of_models(
        "result-not-rounded",
        "models/kandinsky",
        "rotation.rotate(y.float()).to(torch.bfloat16)",
        "rotation.rotate(y.float())",
        "kandinsky or ideogram4 or krea2 or joyimage",
    ),
    of_models(
        "table-not-narrowed",
        "hooks/attention",
        "if form.narrows and rounding is not Rounding.FAST:\n        tables =",
        "if False:\n        tables =",
        "minimax",
    ),
    of_models(
        "text-at-the-end",
        "models/flux",
        '"norm_added_q": NormRotation(align=Align.START,',
        '"norm_added_q": NormRotation(align=Align.END,',
        "flux or chroma",
    ),
    of_models(
        "key-by-the-query-table",
        "models/ltx",
        '"norm_k": NormRotation(table=1)',
        '"norm_k": NormRotation(table=0)',
        "ltx2",
    ),
    of_models(
        "text-by-the-image-table",
        "models/qwen_image",
        '"norm_added_q": NormRotation(table=1)',
        '"norm_added_q": NormRotation(table=0)',
        "qwen",
    ),
    of_models("krea2-weight", "hooks/fused_norms", "module.weight + 1.0", "module.weight", "krea2"),
)

_KEYS = (
    _memo("key-without-ambient", "[_ambient(), len(args)]", "[len(args)]"),
    _memo(
        "key-without-state",
        "    parts.append(_state(target, tables.sets, keep, parameters=bool(tables.path)))\n",
        "",
    ),
    _memo("key-without-values", "return tensor.shape, tensor.dtype, values.numpy().tobytes()", "return tensor.dtype"),
    _memo("key-without-shape", "return tensor.shape, tensor.dtype, values", "return tensor.dtype, values"),
    _memo("key-without-buffers", "{**module._parameters, **module._buffers}", "{**module._parameters}"),
    _memo(
        "key-without-config",
        "None if config is None else _tree(dict(config), tensor),",
        "None,",
    ),
    _memo("key-without-what-it-reads", "keep) for name in tables.sets)", "keep) for name in ())"),
    _memo(
        "default-device-of-tables",
        'if tables.to_device and _default_device().type != "cpu":',
        "if False:",
    ),
    _memo("equal-numbers-of-two-types", "return (type(value), value)", "return value"),
    _memo(
        "snapshot-not-compared",
        " or not torch.equal(found.values, tensor.detach()):",
        ":",
    ),
    _memo("identity-without-version", "tensor.device, tensor._version", "tensor.device"),
    _memo("identity-without-memory", "return id(tensor), tensor.data_ptr(), ", "return id(tensor), "),
    _memo("key-does-not-hold", "    held.append(alias)\n", ""),
    _memo(
        "gradient-of-an-argument-lost",
        "        raise Unkeyed  # the tables belong to one backward pass\n",
        "        pass\n",
    ),
    _memo("tokens-are-equal", "self.number = next(_token_numbers)", "self.number = 0", "hooks/rope_modules"),
    _memo(
        "entries-outlive-the-module",
        "weakref.finalize(self, _forget, self.number).atexit = False",
        "pass",
        "hooks/rope_modules",
    ),
    _memo(
        "inference-tensors-kept",
        "return leaf.clone() if leaf.is_inference() else leaf",
        "return leaf",
        "hooks/rope_modules",
    ),
    _memo(
        "writes-not-put-back",
        "            _assign(target, before)\n",
        "            pass\n",
        "hooks/rope_modules",
    ),
    _memo(
        "undo-keeps-entries",
        "isinstance(key, _Key) and key.token == token",
        "False",
        "hooks/rope_modules",
    ),
    _memo(
        "undo-drops-the-entries-of-others",
        "isinstance(key, _Key) and key.token == token",
        "isinstance(key, _Key)",
        "hooks/rope_modules",
    ),
)

# What was packed, and for how long it serves.
_PASSES = (
    _packed(
        "packed-without-version",
        "return same and self.versions == tuple(tensor._version for tensor in tensors)",
        "return same",
    ),
    _packed("packed-by-the-first-tensor", "stream_of(device), *map(id, tensors[1:]))", "stream_of(device))"),
    _packed("packed-by-the-id-of-a-tensor", "same = all(of() is tensor for", "same = all(True for"),
    Mutation(
        "packed-tables-gather",
        "dit_rope/hooks/packed_tables.py",
        "_MOST_PACKED = 16",
        "_MOST_PACKED = 10**9",
        ("tests/tables/test_cache_attack.py",),
        "gathers_no_packed",
    ),
    _packed(
        "packed-across-passes",
        "if (number is not None and found.number == number) or is_known(tensors):",
        "if number is not None or is_known(tensors):",
    ),
    _packed(
        "packed-outside-of-passes",
        "if (number is not None and found.number == number) or is_known(tensors):",
        "if found.number == number or is_known(tensors):",
    ),
    _packed("packed-without-comparing", " and all(map(_equal, built, found.tables)):", ":"),
    _packed("recalled-without-version", " or same._version != version:", ":"),
    _packed("recalled-by-the-id-of-a-tensor", "if same is None or same is not tensor or", "if"),
    _packed("recalled-in-the-next-pass", "next(_numbers), {}", "next(_numbers), _current.packed", "hooks/forward_pass"),
    _packed("passes-of-one-number", "next(_numbers)", "1", "hooks/forward_pass"),
    _packed(
        "pass-never-ends",
        'Ends the pass."""\n        if not torch.compiler.is_compiling():',
        'Ends the pass."""\n        if False:',
        "hooks/forward_pass",
    ),
    fault(
        "missing-norm-unseen",
        "hooks/attention",
        " or why_incomplete(attn, settings.rotation)",
        "",
        ("tests/hooks/test_missing_norms.py",),
    ),
    fault(
        "function-modes-ignored",
        "torch_state",
        "return in_level() or _jit_tracing() is not None or (_function_modes() > 0 and _replaces_functions())",
        "return in_level() or _jit_tracing() is not None",
        ("tests/hooks/test_table_keys.py",),
    ),
    fault(
        "set-state-not-keyed",
        "hooks/table_keys",
        "return tuple(_tree(getattr(target, name, None), keep) for name in tables.sets)",
        "return ()",
        ("tests/hooks/test_table_keys.py", "tests/hooks/test_model_tables.py"),
    ),
    fault(
        "copies-carry-validated-calls",
        "tables/table",
        'return {**vars(self), "validated": {}}',
        "return dict(vars(self))",
        ("tests/tables/test_derived_tables.py",),
    ),
)

INPUTS = (*_FITS, *_KEYS, *_PASSES)
