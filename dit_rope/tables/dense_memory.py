"""Memory of dense tables: the limit, and the allocation."""

from __future__ import annotations

import contextlib
import mmap

import torch

from ..torch_state import in_mode

MAX_DENSE_BYTES = 16 * 2**30
"""The most bytes of one form of a table: rows of its axes, cos and sin of all tokens, complex numbers, or positions.

This is a hundred times the float64 table of an 81-frame 720p video. A larger table means a wrong grid, or a grid that
has to be sharded.
"""

_HUGE_PAGES_FROM = 4 * 2**20


def check_dense_bytes(form: str, size: int) -> None:
    """Raises ValueError for a form of a table larger than :data:`MAX_DENSE_BYTES`; names form, limit and size."""
    if size > MAX_DENSE_BYTES:
        raise ValueError(
            f"grid must be small enough for {form} of at most {MAX_DENSE_BYTES:,} bytes, got {size:,}; pass a shard, "
            "or the table itself to rotate_qk, which reads the rows of its axes"
        )


def empty_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory ``[rows, columns]``, in huge pages for large tables on Linux hosts.

    A dense 720p table is 155 MB. Filling it touches 38,000 fresh pages of 4 kB, which takes longer than writing the
    values. With pages of 2 MB the whole build is about twice as fast.
    """
    size = rows * columns * dtype.itemsize
    huge = size >= _HUGE_PAGES_FROM and device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE") and not in_mode()
    if not huge:
        return torch.empty((rows, columns), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"a dense table of {rows} tokens must fit in memory, got {size:,} bytes") from error
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)
