"""Several processes at one condensation: how they share its work, and what they exchange.

A memory is tiny, so every process holds all of it. What a step draws depends on the seed and the
step alone, so all draw alike; each computes its share of what was drawn, gradients are summed, and
all update the memory alike. So a checkpoint does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import EllipsisType
from typing import Any, TypeAlias, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from hmn_replay.errors import ConfigError, DistributedError
from hmn_replay.runtime import resolve_device

__all__ = ["ALONE", "TIMEOUT_SECONDS", "GradientPart", "Team", "join", "launched"]

TIMEOUT_SECONDS = 1800.0

GradientPart: TypeAlias = "tuple[Tensor, Tensor | EllipsisType]"
"""A parameter, and the rows of it, int64, that may have a gradient; ``...`` for all."""

_T = TypeVar("_T")


class Team:
    """A single process: it does all the work, and exchanges nothing.

    :func:`join` returns the team of several processes. As a context manager, it is left at the end.

    Attributes:
        rank: Number of this process, 0 or more; process 0 writes the files and shows progress.
        size: Number of processes, 1 or more.
    """

    rank = 0
    size = 1

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Close the connections: a process that waits for this one fails at once."""

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    @overload
    def share(self, items: Tensor) -> Tensor: ...
    @overload
    def share(self, items: Sequence[_T]) -> Sequence[_T]: ...
    def share(self, items: Any) -> Any:
        """Return the items or rows that are this process's share: of N processes, every Nth."""
        return items[self.rank :: self.size]

    def sum_gradients(self, parts: Iterable[GradientPart]) -> None:
        """Replace ``.grad`` by its sum over the processes, all parts in one message.

        Args:
            parts: The same parameters and rows in every process; a single process does not read
                them. A parameter without a gradient counts as zero. Rows may not repeat.
        """

    def add_up(self, values: Tensor) -> None:
        """Replace values, of one shape in every process, by their sum."""

    def sum(self, *values: float) -> list[float]:
        """Return each value's sum over the processes."""
        return list(values)

    def agree(self, decide: Callable[[], _T]) -> _T:
        """Return in every process what ``decide`` returns in process 0; only there is it called."""
        return decide()

    def wait(self) -> None:
        """Wait until every process has called this."""

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors, of the same shapes in every process, by those of process 0."""

    def check_same(self, identity: str) -> None:
        """Raise a :class:`DistributedError` in every process if their condensations differ.

        Args:
            identity: Text of data, budget, seed, settings, networks and device.
        """


ALONE = Team()
"""The team of a single process; it has no state."""


def join(timeout_seconds: float = TIMEOUT_SECONDS) -> Team:
    """Return the team of all processes of ``torch.distributed``; :data:`ALONE` without others.

    All of them must call it. The team has process groups of its own: gloo's, and NCCL's for
    gradients on CUDA. The caller's groups are used to make these only.

    Args:
        timeout_seconds: How long to wait for a process that does not answer, above 0. Default:
            1800. A process that has ended is noticed at once.

    Raises:
        ConfigError: A timeout that is not above 0.
        DistributedError: Another process was lost.
    """
    if not 0 < timeout_seconds < math.inf:
        raise ConfigError(f"the timeout is above 0 seconds and finite; got {timeout_seconds}")
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ALONE
    return _Processes(timeout_seconds)


@contextlib.contextmanager
def launched(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Team]:
    """Join the processes that torchrun started, for a command; a single one without it.

    Any launcher works that sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, and
    where there are several GPUs ``LOCAL_RANK``.
    SIGTERM, by which a launcher ends a job that lost a process, raises a
    :class:`DistributedError` inside the block.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1 or not dist.is_available() or dist.is_initialized():
        with join(timeout_seconds) as team:
            yield team
        return
    with _explaining_lost_process("this process did not meet another one", timeout_seconds):
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
    try:
        if (device := resolve_device("auto")).index is not None:
            torch.cuda.set_device(device)
        with _ending_with_the_launcher(), join(timeout_seconds) as team:
            yield team
    finally:
        dist.destroy_process_group()


class _Processes(Team):
    """All processes of ``torch.distributed``."""

    def __init__(self, timeout_seconds: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout_seconds = timeout_seconds
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._group("gloo")

    def leave(self) -> None:
        # Gloo closes its connections with the last reference, and so the others know.
        while self._groups:
            dist.destroy_process_group(self._groups.popitem()[1])

    def sum_gradients(self, parts: Iterable[GradientPart]) -> None:
        parts = list(parts)
        if not parts:
            return
        gradients = []
        for parameter, _ in parts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        own = [gradient[rows] for gradient, (_, rows) in zip(gradients, parts, strict=True)]
        flat = torch.cat([values.flatten() for values in own])
        self.add_up(flat)
        sums = flat.split([values.numel() for values in own])
        for gradient, (_, rows), values, total in zip(gradients, parts, own, sums, strict=True):
            gradient[rows] = total.view_as(values)

    def add_up(self, values: Tensor) -> None:
        if values.is_cuda and dist.is_nccl_available():
            with self._explaining_lost_process():
                dist.all_reduce(values, group=self._group("nccl"))
            return
        on_cpu = values.cpu()
        with self._explaining_lost_process():
            dist.all_reduce(on_cpu, group=self._group("gloo"))
        if on_cpu is not values:
            values.copy_(on_cpu)

    def sum(self, *values: float) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64)
        self.add_up(totals)
        sums: list[float] = totals.tolist()
        return sums

    def agree(self, decide: Callable[[], _T]) -> _T:
        decided = [decide() if self.first else None]
        with self._explaining_lost_process():
            dist.broadcast_object_list(decided, group=self._group("gloo"))
        return decided[0]  # type: ignore[return-value]

    def wait(self) -> None:
        self.sum(0)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            values = tensor.detach().cpu().contiguous()
            with self._explaining_lost_process():
                dist.broadcast(values, 0, group=self._group("gloo"))
            tensor.detach().copy_(values)

    def check_same(self, identity: str) -> None:
        values: list[Any] = [None] * self.size
        with self._explaining_lost_process():
            dist.all_gather_object(values, identity, group=self._group("gloo"))
        if others := [rank for rank, other in enumerate(values) if other != values[0]]:
            raise DistributedError(
                f"processes {others} were given other data, budget, seed, settings, networks or "
                "device than process 0; give all of them the same, or let each condense by itself: "
                "condense(team=ALONE)"
            )

    def _group(self, backend: str) -> dist.ProcessGroup:
        if backend not in self._groups:
            timeout = datetime.timedelta(seconds=self.timeout_seconds)
            with self._explaining_lost_process():
                group = dist.new_group(backend=backend, timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            self._groups[backend] = group
        return self._groups[backend]

    def _explaining_lost_process(self) -> contextlib.AbstractContextManager[None]:
        what = f"process {self.rank} of {self.size} lost another one"
        return _explaining_lost_process(what, self.timeout_seconds)


@contextlib.contextmanager
def _explaining_lost_process(what: str, timeout_seconds: float) -> Iterator[None]:
    """Turn torch's error about a process that is gone into one that says what it means."""
    try:
        yield
    except DistributedError:
        raise
    except (RuntimeError, ValueError) as error:
        # Without the place in gloo's source that stands before, and the advice behind.
        reason = str(error).split("] ", 1)[-1].split(". ")[0].split("\n")[0]
        raise DistributedError(
            f"{what} ({reason}): it ended, or did not answer for {timeout_seconds:,g} seconds; "
            "see its messages"
        ) from error


@contextlib.contextmanager
def _ending_with_the_launcher() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(*_: object) -> None:
        raise DistributedError(
            "the launcher ended this process, as it does when another one is lost: see that "
            "one's messages"
        )

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
