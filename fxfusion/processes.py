"""Work shared by the processes of a job: each does a part, and all get everything.

Processes are started by ``torchrun``, or by whatever else sets up :mod:`torch.distributed`; nothing here
schedules or moves data itself. Every process runs the same program, and where that has independent parts,
each takes some of them. What comes out is the same to the bit for any number of processes, since a part is
computed whole by one of them, and parts are put together in one order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(eq=False)
class Processes:
    """The processes that work together.

    Attributes
    ----------
    rank, count : int
        Which of them this one is.
    group : torch.distributed.ProcessGroup or None
        None if there is one process alone, and when the work is over.
    """

    rank: int = 0
    count: int = 1
    group: distributed.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def once(self, work: Callable[[], Result]) -> Result:
        """Do something in the leading process, and return its result in all, when it is done."""
        found = self._gathered(work if self.leads else None)
        return next(iter(found.values()))

    def each(self, work: Callable[[], Any]) -> None:
        """Do something in every process; an error of any is raised in all."""
        self._gathered(work)

    def share(
        self, work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[float] | None = None
    ) -> list[Result]:
        """Return what every item gives, each worked on by one process.

        Parameters
        ----------
        work : callable
            Its result is sent to the other processes.
        items : sequence
            The same in all processes.
        sizes : sequence of float, optional
            How long each takes, in any unit: the largest are handed out first.
        """
        if self.count == 1:
            return [work(item) for item in items]
        owners = handed_out(sizes or [1.0] * len(items), self.count)
        mine = [index for index, owner in enumerate(owners) if owner == self.rank]
        found = self._gathered(lambda: {index: work(items[index]) for index in mine})
        results = {index: result for part in found.values() for index, result in part.items()}
        return [results[index] for index in range(len(items))]

    def turns(self, tensors: Sequence[torch.Tensor], last: int) -> Iterator[list[torch.Tensor]]:
        """Yield every process's tensors in the order of ranks.

        Parameters
        ----------
        tensors : sequence of torch.Tensor
            As many, of the same shapes and types, in every process.
        last : int
            How many processes, from the first, have any.
        """
        for rank in range(last):
            theirs = [tensor if rank == self.rank else torch.empty_like(tensor) for tensor in tensors]
            if self.group is not None:
                source = distributed.get_global_rank(self.group, rank)
                for tensor in theirs:
                    distributed.broadcast(tensor, source, self.group)
            yield theirs

    def _gathered(self, work: Callable[[], Result] | None) -> dict[int, Result]:
        """Return what the processes that have work made of it; an error of any is raised in all."""
        if self.group is None:
            return {0: work()} if work is not None else {}
        result, error = None, None
        if work is not None:
            try:
                result = work()
            except Exception as caught:
                error = _portable(caught)
        everyone: list[Any] = [None] * self.count
        distributed.all_gather_object(everyone, (work is not None, result, error), self.group)
        for _, _, raised in everyone:
            if raised is not None:
                raise raised
        return {rank: found for rank, (worked, found, _) in enumerate(everyone) if worked}


_CURRENT: ContextVar[Processes] = ContextVar("processes", default=Processes())  # noqa: B039


def current() -> Processes:
    """Return the processes that work together: this one alone, outside of :func:`together`."""
    return _CURRENT.get()


@contextlib.contextmanager
def together(group: distributed.ProcessGroup | None = None) -> Iterator[Processes]:
    """Let the processes of a group fuse together: each has to do the same within.

    Calibration data are shared out by batches, transports by spaces, certificates by parents, shards of
    :func:`fxfusion.fuse_files` by files; the result is the same in every process.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        By default all processes. Results travel through memory: where the group is not of gloo, one of gloo
        is made for the same processes.

    Examples
    --------
    >>> with together() as alone:  # where no group was set up
    ...     alone.count
    1
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield current()
        return
    chosen: Any = group or distributed.group.WORLD
    if distributed.get_backend(chosen) != "gloo":
        chosen = distributed.new_group(distributed.get_process_group_ranks(chosen), backend="gloo")
    processes = Processes(distributed.get_rank(chosen), distributed.get_world_size(chosen), chosen)
    token = _CURRENT.set(processes)
    try:
        yield processes
    finally:
        _CURRENT.reset(token)
        # Whoever still holds them would keep the group's threads to the end of the interpreter, where a
        # thread that asks for it aborts the process.
        processes.group = None


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """Work together with all processes that ``torchrun`` started; alone where it started none."""
    if not distributed.is_torchelastic_launched() or distributed.is_initialized():
        with together() as processes:
            yield processes
        return
    distributed.init_process_group("gloo")
    try:
        with together() as processes:
            yield processes
    finally:
        distributed.destroy_process_group()


def handed_out(sizes: Sequence[float], count: int) -> list[int]:
    """Return which process takes each item: the largest first, to whoever has least.

    Examples
    --------
    >>> handed_out([1, 5, 2, 2], 2)
    [1, 0, 1, 1]
    """
    owners, loads = [0] * len(sizes), [0.0] * count
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = min(range(count), key=loads.__getitem__)
        loads[owners[index]] += sizes[index]
    return owners


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
