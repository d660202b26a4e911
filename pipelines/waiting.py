"""Processes that wait for each other: where they join, how long they wait, what is said when one is silent.
What they exchange is left to Accelerate, ending the others to the launcher."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distill.settings import RunError

ANSWER_SECONDS = 5.0
"""So long those that gave up wait for each other's word, to find who is missing. The launcher ends what is left 30 s
after the first has ended."""
WATCHDOG_SECONDS = 60
"""NCCL's own watchdog ends a process without a message of ours; it waits longer than the hosts do over gloo."""


def group_timeout(seconds: int, *, on_cpu: bool) -> timedelta:
    """Of the process group that devices talk over."""
    return timedelta(seconds=seconds if on_cpu else seconds + WATCHDOG_SECONDS)


def announce() -> None:
    """Leave this process's host where the others find it should it fall silent."""
    if dist.is_available() and dist.is_initialized():
        _store().set(f"tinybert/host/{dist.get_rank()}", socket.gethostname())


@contextmanager
def waiting(where: str, seconds: int) -> Iterator[None]:
    """Turn what a process group raises for a silent or vanished process into one message.

    Args:
        where: the stage.
        seconds: runtime.process_timeout_seconds.

    Raises:
        RunError: after `seconds` without an answer, or at once where the connection was closed.
    """
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_available() and dist.is_initialized()) or not _is_of_the_group(error):
            raise
        raise _silence(where, seconds, error) from error


def _is_of_the_group(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors that begin with the place in its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _silence(where: str, seconds: int, error: RuntimeError) -> RunError:
    rank, processes = dist.get_rank(), dist.get_world_size()
    left = _answering(rank, processes)
    missing = [other for other in range(processes) if other not in left]
    who = f"process {', '.join(_named(one) for one in missing)}" if missing else "another process"
    if "imed out" in str(error):
        return RunError(
            f"{where}: {who} did not answer for {seconds} s (runtime.process_timeout_seconds), and the others cannot "
            "go on without. See whether its machine, disks and memory are well, then start the same command again: it "
            "goes on from the last checkpoint. Where it was only slow, raise runtime.process_timeout_seconds.",
            told_here=rank == min(left),
        )
    return RunError(
        f"{where}: {who} is gone ({str(error).splitlines()[0].rpartition('] ')[2]}). What ended it may stand above; "
        "start the same command again: it goes on from the last checkpoint.",
        told_here=rank == min(left),
    )


def _answering(rank: int, processes: int) -> set[int]:
    """The ranks that gave up as this one did; itself alone where there is no store to ask (its host is the silent)."""
    left = {rank}
    try:
        store, deadline = _store(), time.monotonic() + ANSWER_SECONDS
        store.set(f"tinybert/answers/{rank}", "here")
        while len(left) < processes and time.monotonic() < deadline:
            time.sleep(0.1)
            left |= {other for other in range(processes) if store.check([f"tinybert/answers/{other}"])}
    except RuntimeError:
        pass
    return left


def _named(rank: int) -> str:
    try:
        key = f"tinybert/host/{rank}"
        return f"{rank} on {_store().get(key).decode()}" if _store().check([key]) else str(rank)
    except RuntimeError:
        return str(rank)


def _store() -> Any:
    """The key-value store by which the processes found each other; the launcher keeps it, not one of them."""
    return dist.distributed_c10d._get_default_store()
