"""The processes that train one adapter together.

Each has the whole adapter. Of an optimizer step's rows each takes its share (`World.share`); the sums over the shares,
of gradients and of everything that is counted, are those that one process would have got from all rows. So the number
of processes changes nothing but the time it takes, and the rounding.

Process 0 alone writes files, pushes images, and speaks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from kaito_flows.containers.program import emit
from kaito_flows.containers.tuner.launch import PATIENCE_SECONDS, RENDEZVOUS
from kaito_flows.containers.tuner.memory import is_out_of_memory
from kaito_flows.errors import KaitoFlowsError, KilledError, from_job_exit

__all__ = ["ALONE", "World", "join"]

PATIENCE = timedelta(seconds=PATIENCE_SECONDS)
IN_VAIN_SECONDS = 60
"""How long a process that ought to stop may still wait for an answer of the others."""

_FAILURE = "failure"
# PyTorch exports its stores, but not to type checkers.
_distributed: Any = distributed


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size`: its `rank`, its number on this machine, and the store in which they leave notes.

    `waits` has the time since when it waits for the others, while it does.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None
    waits: list[float] = field(default_factory=list)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, pushes and speaks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU where there is none."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this process's part of the rows."""
        return rows[self.rank :: self.size]

    def largest_share(self, rows: int) -> int:
        """Return how many of that many rows the process with the most of them has."""
        return -(-rows // self.size)

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same bits in all of them."""
        if self.size > 1:
            self._together(tensors, distributed.all_reduce)

    def copy(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by that of process 0."""
        if self.size > 1:
            self._together(tensors, lambda flat: distributed.broadcast(flat, src=0))

    def totals(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all processes."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.add([summed])
        return summed.tolist()

    def wait(self) -> None:
        """Wait until every process is here."""
        self.totals(0.0)

    def tell(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what process 0 makes, JSON, to all of them; a key is told once."""
        made = make() if self.first else None
        if self.size == 1:
            return made
        with self.peers():
            if self.first:
                self.store.set(key, json.dumps(made))
            else:
                self.store.wait([key], PATIENCE)
                made = json.loads(self.store.get(key))
        self.wait()
        return made

    def _together(self, tensors: Sequence[torch.Tensor], operation: Callable[[torch.Tensor], Any]) -> None:
        # One message for all: a LoRA adapter has hundreds of small matrices.
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        with self.peers():
            operation(flat)
            if flat.is_cuda:
                # Else it would be waited for later, where nobody knows what for.
                torch.cuda.synchronize(flat.device)
        start = 0
        for tensor in tensors:
            tensor.detach().copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def fail(self, exc: Exception, store: Any = None) -> None:
        """Tell the launcher, and the other processes unless they know of another's failure, why this one ends."""
        code = exc.job_exit_code if isinstance(exc, KaitoFlowsError) else 1
        said = " ".join(f"{type(exc).__name__}: {exc}".split())
        facts = exc.as_dict() if isinstance(exc, KaitoFlowsError) else {"code": "unexpected-error", "message": said}
        emit("worker-failed", exit_code=code, **facts)
        store = store or self.store
        if not _is_over(store):
            with suppress(RuntimeError):
                store.set(_FAILURE, json.dumps({"exit_code": code, **facts}))

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Turn a broken connection to the other processes into their failure, if one is known.

        Raises:
            KilledError: (code `peer-lost`) a process is gone, or silent.
            KaitoFlowsError: what another process failed with.
        """
        self.waits.append(time.monotonic())
        try:
            yield
        except RuntimeError as exc:
            if is_out_of_memory(exc):
                raise
            raise _failure_of_another(self.store, str(exc)) from exc
        finally:
            self.waits.clear()

    def watch(self, store: Any, told_to_stop: Callable[[], bool]) -> None:
        """End this process when it waits in vain: another failed or is gone, and a GPU's collectives do not notice.

        Args:
            store: a connection of this thread's own.
            told_to_stop: whether SIGTERM came, as it does when a process of this machine ended.
        """
        while True:
            time.sleep(1)
            waited = time.monotonic() - min(self.waits, default=float("inf"))
            if waited > IN_VAIN_SECONDS and (told_to_stop() or _is_over(store)):
                error = _failure_of_another(store, f"no answer in {waited:.0f} s")
                self.fail(error, store)
                os._exit(error.job_exit_code)

    def leave(self) -> None:
        """End the connections to the other processes, all of which are through."""
        distributed.destroy_process_group()


def _is_over(store: Any) -> bool:
    """Whether a process failed, or the store is gone with its machine."""
    try:
        return bool(store.check([_FAILURE]))
    except RuntimeError:
        return True


def _failure_of_another(store: Any, said: str) -> KaitoFlowsError:
    try:
        if store is None:
            raise RuntimeError("the store was not reached")
        store.wait([_FAILURE], timedelta(seconds=5))
        told = json.loads(store.get(_FAILURE))
    except RuntimeError:
        first_line = (said.strip().splitlines() or ["no answer"])[0]
        hint = "start the same job again: it goes on from its last checkpoint"
        return KilledError(f"another process of this training is gone: {first_line}", hint=hint, code="peer-lost")
    keys = ("message", "code", "place", "hint")
    return from_job_exit(told["exit_code"], **{key: told.get(key, "") for key in keys})


ALONE = World()


def join(told_to_stop: Callable[[], bool]) -> World:
    """Join the processes that the launcher started, as its environment variables say.

    Args:
        told_to_stop: whether SIGTERM came.

    Raises:
        KilledError: (code `peer-lost`) the others do not come.
    """
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    host, _, port = os.environ[RENDEZVOUS].rpartition(":")
    world = World(rank, size, local)
    with world.peers():
        # The rendezvous has a store, at an address that every machine reaches. What this start writes there is told
        # from what others did by the address that the launchers agreed on, which is new each time.
        prefix = f"kaito-flows/{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        ours, watchers = (
            _distributed.PrefixStore(prefix, _distributed.TCPStore(host.strip("[]"), int(port), timeout=PATIENCE))
            for _ in range(2)
        )
        world = World(rank, size, local, ours)
        threading.Thread(target=world.watch, args=(watchers, told_to_stop), daemon=True).start()
        if torch.cuda.is_available():
            torch.cuda.set_device(world.device)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=world.store, rank=rank, world_size=size, timeout=PATIENCE)
    return world
