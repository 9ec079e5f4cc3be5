"""A process group of gloo on this machine that stays up over many tests: a process starts once, not once a test."""

import datetime
import multiprocessing
import multiprocessing.connection
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.tensor.parallel",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "gain_ops",
        "transformers.models.llama.modeling_llama",
    ]
)
_LIMIT = 120  # seconds a call may take: a rank that waits for one that failed would wait for ever


class Group:
    """Processes with ranks 0 to world - 1 in one gloo group, one thread each. Close it, or use it in a with.

    A call that fails ends them all, as the others may be waiting in a collective; the next call starts them anew.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._ranks: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank, a function of a module's top level; what each returned, by rank.

        Raises:
            AssertionError: a rank raised, died or took too long; with its traceback.

        """
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, args))
        return self._answers()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._ranks:
            pipe.close()
            process.terminate()
        for process, _ in self._ranks:
            process.join(10)
        self._ranks = []

    def _start(self) -> None:
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, rank, self.world, str(store)), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _answers(self) -> list[Any]:
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks)}
        answers: dict[int, Any] = {}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), _LIMIT)
            if not ready:
                self._fail(f"no answer from ranks {sorted(waiting.values())} in {_LIMIT} s")
            for pipe in cast("list[multiprocessing.connection.Connection]", ready):
                rank = waiting.pop(pipe)
                try:
                    failed, answers[rank] = pipe.recv()
                except EOFError:
                    failed, answers[rank] = True, "the process died"
                if failed:
                    self._fail(f"rank {rank} of {self.world}: {answers[rank]}")
        return [answers[rank] for rank in range(self.world)]

    def _fail(self, message: str) -> NoReturn:
        self.close()
        raise AssertionError(message)


def _serve(pipe: multiprocessing.connection.Connection, rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=_LIMIT),
    )
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionError):
            return
        torch.manual_seed(0)
        try:
            answer = (False, function(*args))
        except Exception:
            answer = (True, traceback.format_exc())
        pipe.send(answer)
