"""The tests of ``make test ARGS="-m quick"``: for each module of the package, those that show its faults soonest."""

from __future__ import annotations

import re

QUICK: dict[str, tuple[str, ...]] = {
    "": ("repository/test_old_names.py", "repository/test_layering.py::test_module_imports_only_what_its_layer_may"),
    "__main__": ("cli/test_cli.py::test_help", "cli/test_cli.py::test_module_is_the_command"),
    "adapters": ("hooks/test_registered_adapters.py",),
    "cache": ("tables/test_cache.py",),
    "cli": ("cli/test_cli.py::test_help", "cli/test_cli.py::test_version"),
    "cli.bench": ("cli/test_cli.py::test_bench_refuses",),
    "cli.checkout": ("cli/test_cli.py::test_commands_of_a_checkout",),
    "cli.demo": ("cli/test_cli.py::test_demo_refuses[", "cli/test_cli.py::test_demo_without"),
    "cli.doctor": ("cli/test_cli.py::test_doctor",),
    "cli.inspect": ("cli/test_cli.py::test_inspect",),
    "cli.options": ("cli/test_cli.py::test_demo_refuses[",),
    "comparison": ("cli/test_comparison.py",),
    "compat": ("compat/test_compat_fastvideo.py", "compat/test_compat_vllm.py"),
    "compat.angles": ("compat/test_compat_flashinfer.py",),
    "compat.dense": ("compat/test_compat_vllm.py",),
    "compat.fastvideo": ("compat/test_compat_fastvideo.py",),
    "compat.flashinfer": ("compat/test_compat_flashinfer.py",),
    "compat.huggingface": ("compat/test_compat_huggingface.py",),
    "compat.vllm": ("compat/test_compat_vllm.py",),
    "deprecated": ("repository/test_old_names.py",),
    "hooks": ("hooks/test_patching.py",),
    "hooks.adapter": ("hooks/test_table_keys.py", "cli/test_cli.py::test_inspect"),
    "hooks.adapter_code": ("hooks/test_registered_adapters.py",),
    "hooks.attention": ("hooks/test_patching.py",),
    "hooks.class_override": ("hooks/test_giving_back.py",),
    "hooks.formats": ("hooks/test_packed_tables.py",),
    "hooks.forward_pass": ("hooks/test_packed_tables.py",),
    "hooks.exact_bits": ("hooks/test_rounding_of_models.py::test_a_kernel_with_other_bits_is_not_used",),
    "hooks.fused_norms": ("hooks/test_fresh_results.py",),
    "hooks.heads": ("hooks/test_fitting_tables.py::test_heads_fit",),
    "hooks.known_code": ("hooks/test_patch_report.py",),
    "hooks.log": ("hooks/test_log.py",),
    "hooks.packed_tables": ("hooks/test_packed_tables.py",),
    "hooks.options": ("hooks/test_fusion.py",),
    "hooks.plan": ("hooks/test_missing_norms.py", "hooks/test_patching.py"),
    "hooks.report": ("hooks/test_patch_report.py",),
    "hooks.rope_modules": ("hooks/test_table_keys.py",),
    "hooks.rotating_norms": ("hooks/test_missing_norms.py", "hooks/test_patching.py"),
    "hooks.table_keys": ("hooks/test_table_keys.py",),
    "hooks.traced": ("hooks/test_traced_models.py::test_ahead_of_time",),
    "models": ("hooks/test_models.py::test_patched_equals_unpatched_bitwise_and_undo_leaves_nothing",),
    "patching": ("hooks/test_patching.py",),
    "rotation": ("rotation/test_rotation.py",),
    "rotation.api": ("rotation/test_rotation.py", "rotation/test_hostile_input.py"),
    "rotation.autograd": ("rotation/test_saved_for_backward.py",),
    "rotation.backends": ("rotation/test_properties.py",),
    "rotation.backends.cuda_arguments": ("backends/test_cuda_launch.py",),
    "rotation.backends.cuda_kernels": ("backends/test_cuda_kernels.py::test_rotation_in_place",),
    "rotation.backends.cuda_launch": ("backends/test_cuda_launch.py",),
    "rotation.backends.cuda_plan": ("backends/test_cuda_launch.py",),
    "rotation.backends.cuda_tuning": (
        "backends/test_cuda_tuning.py::test_plan",
        "backends/test_cuda_tuning.py::test_entry",
    ),
    "rotation.backends.eager": ("backends/test_eager.py::test_rotate", "backends/test_eager.py::test_norm_rotate"),
    "rotation.backends.gpu_calls": ("backends/test_triton_kernels.py::test_declined",),
    "rotation.backends.cos_sin": ("rotation/test_properties.py",),
    "rotation.backends.triton_device": ("backends/test_triton_compile.py::test_kernel_fuses",),
    "rotation.backends.triton_norms": ("backends/test_triton_compile.py::test_kernel_fuses",),
    "rotation.backends.triton_kernels": ("backends/test_triton_kernels.py::test_declined",),
    "rotation.choice": (
        "rotation/test_backend_choice.py::test_choose",
        "rotation/test_backend_choice.py::test_explain",
    ),
    "rotation.derivatives": ("rotation/test_derivatives.py::test_table_that_requires_grad",),
    "rotation.ops": ("rotation/test_ops.py::test_exact_gradient", "rotation/test_ops.py::test_rotate_passes_opcheck"),
    "rotation.reference": ("rotation/test_ops.py::test_exact_gradient",),
    "rotation.rounding": ("rotation/test_rounding.py",),
    "rotation_args": ("rotation/test_positions.py",),
    "scalars": ("tables/test_spec.py", "rotation/test_hostile_input.py"),
    "spec": ("tables/test_spec.py",),
    "streaming": ("streaming/test_streaming.py",),
    "streaming.eviction": ("streaming/test_shifting_eviction.py",),
    "streaming.rolling_cache": ("streaming/test_rolling_cache.py",),
    "streaming.shift": ("streaming/test_shift_rows.py",),
    "streaming.stream": ("streaming/test_streaming.py",),
    "tables": ("tables/test_axis_tables.py",),
    "tables.axes": ("tables/test_axis_tables.py",),
    "tables.caches": ("tables/test_table_caches.py",),
    "tables.dense": ("tables/test_derived_tables.py",),
    "tables.dense_memory": ("rotation/test_hostile_input.py",),
    "tables.scaling": ("tables/test_scaling.py",),
    "tables.scaling_types": ("tables/test_scaling.py", "tables/test_scaling_config.py"),
    "tables.shards": ("tables/test_token_range.py",),
    "tables.table": ("tables/test_far_positions.py", "tables/test_derived_tables.py"),
    "torch_state": ("tables/test_cache.py", "hooks/test_table_keys.py"),
    "validation": ("rotation/test_hostile_input.py",),
}
"""By module of the package, with its submodules: how the names of tests begin, below ``tests/``."""

_BEGINNINGS = tuple(f"tests/{beginning}" for tests in QUICK.values() for beginning in tests)
_SLOW = re.compile(
    r"undo_leaves_nothing\[(ace-step|kandinsky5-sparse|kandinsky6-sr|.*bfloat16)"
    r"|test_rolling_cache.*(memory_is_there|thousand_sink_moves|cuda_kernels)"
    r"|import_alone_registers|saved_for_backward.*cuda|test_compiled|test_llama_gives"
)


def is_quick(name: str) -> bool:
    """Whether the test of that node id is among them."""
    return name.startswith(_BEGINNINGS) and not _SLOW.search(name)
