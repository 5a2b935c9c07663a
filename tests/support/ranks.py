"""Processes that stand for the ranks of a group: each does what it is asked to, in step with the others, over gloo.

They start once for many calls. Whoever dies, or waits longer than the group's timeout, is an error here, not a hang.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_SPLIT = ("chronoedit", "flux", "flux2", "helios", "ltx", "ltx2", "minimax_h3", "qwenimage", "wan")
# Imported once, in a process that ranks are forked from.
_PRELOADED = [
    "torch.distributed.tensor.parallel",
    "dit_rope",
    *(f"diffusers.models.transformers.transformer_{name}" for name in _SPLIT),
    "diffusers.hooks",
    "zoo",
    "pytest",
]


class Died(RuntimeError):
    """A rank ended, or did not answer in time."""


class Ranks:
    """``world`` processes of one process group.

    ``seconds`` is how long one of them waits for another, and twice that how long they have for an answer here.
    """

    def __init__(self, world: int, folder: Path, seconds: float = 60) -> None:
        self.world, self.seconds = world, seconds
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        with _on_python_path(Path(__file__).parent):
            multiprocessing.forkserver.ensure_running()
        store = folder / f"store-{time.monotonic_ns()}"
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes = [parent_end for parent_end, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, store, child_end, seconds), daemon=True)
            for rank, (_, child_end) in enumerate(pipes)
        ]
        for process, (_, child_end) in zip(self.processes, pipes, strict=True):
            process.start()
            child_end.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)``, found by its name in every process, returns on each rank.

        Raises:
            RuntimeError: it raised on a rank; :class:`Died` where one gives no answer.
        """
        answers = self.answers(function, *args)
        failed = [error for good, error in answers if not good]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [result for _, result in answers]

    def answers(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """By rank, whether it returned, and what; else the traceback of what it raised."""
        for pipe in self.pipes:
            pipe.send((function, args))
        stop = time.monotonic() + 2 * self.seconds
        return [self._answer(rank, stop) for rank in range(self.world)]

    def _answer(self, rank: int, stop: float) -> tuple[bool, Any]:
        pipe = self.pipes[rank]
        try:
            if pipe.poll(max(0.0, stop - time.monotonic())):
                answer: tuple[bool, Any] = pipe.recv()
                return answer
        except (EOFError, ConnectionError):
            self.processes[rank].join(self.seconds)
            return False, f"Died: rank {rank} of {self.world}, exit code {self.processes[rank].exitcode}"
        raise Died(f"rank {rank} of {self.world} gave no answer")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def _on_python_path(folder: Path) -> Iterator[None]:
    """Where new interpreters find modules besides, and in which they find this one's ``dit_rope``."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _all_gather(gather: Callable[..., Any], parts: list[torch.Tensor], local: torch.Tensor, group: Any = None) -> Any:
    """The function of this name also where parts differ in size, which gloo refuses and NCCL does not."""
    if len({tensor.shape for tensor in parts}) == 1:
        return gather(parts, local, group=group)
    for rank, tensor in zip(torch.distributed.get_process_group_ranks(group), parts, strict=True):
        if rank == torch.distributed.get_rank():
            tensor.copy_(local)
        torch.distributed.broadcast(tensor, rank, group=group)


def _serve(rank: int, world: int, store: Path, pipe: Connection, seconds: float) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    # diffusers divides by it where it enables parallelism, and finds no accelerator here.
    torch.accelerator.device_count = lambda: 1
    torch.distributed.all_gather = functools.partial(_all_gather, torch.distributed.all_gather)
    # Named with its device: diffusers would send sizes through the GPU that a build for CUDA may lack.
    torch.distributed.init_process_group(
        "cpu:gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    while (call := pipe.recv()) is not None:
        function, args = call
        try:
            answer = True, function(*args)
        except Exception:
            answer = False, f"rank {rank}: {traceback.format_exc()}"
        pipe.send(answer)
    torch.distributed.destroy_process_group()


def end_groups() -> None:
    """Ends the smaller groups that calls have made: each has threads that wake a hundred times a second.

    Meshes of these groups must not be used again, nor ones that are equal to them: DTensor remembers specs by mesh. So
    does torch before 2.11 with flattened meshes, whose groups are left alone there.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
