"""Signals that ask a run to stop: noted at once, acted on between two steps.
Saving is left to training.py, the exit status to the entry point."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was saved, or a server after its last answer. Exit status 128 +
    signal."""

    def __init__(self, signum: int, what: str = "the run stopped after saving; start it again to go on") -> None:
        super().__init__(f"{signal.Signals(signum).name}: {what}")
        self.status = 128 + signum


class Interruption:
    """Remembers the first signal; a second one, not at once after it, ends the process.

    Ctrl-C and batch systems signal every process of a run, and torch's launcher passes on what it gets as well: the
    same signal comes twice within a moment.
    """

    moment_seconds = 3.0

    def __init__(self, timeout: timedelta | None = None) -> None:
        """timeout: how long processes wait for each other's word; torch's own, half an hour, where not given."""
        self.timeout = timeout
        self._signum = 0
        self._first = 0.0
        self._group: dist.ProcessGroup | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Install the handlers for SIGINT and SIGTERM."""
        watched = (signal.SIGINT, signal.SIGTERM)
        before = {signum: signal.signal(signum, self._note) for signum in watched}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self._signum:
            self._signum, self._first = signum, time.monotonic()
        elif time.monotonic() - self._first > self.moment_seconds:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def requested(self) -> int:
        """The signal, 0 for none; all processes get the same answer, so that they save together.

        Processes agree over a gloo group of their own: the hosts wait for each other, the devices do not.
        """
        # Imported here, so that a command line without work to do answers at once.
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._signum
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        agreed = torch.tensor([self._signum])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
        return int(agreed)

    def raise_if_requested(self) -> None:
        """For stages without checkpoints of their own: stop between two pieces of work."""
        if signum := self.requested():
            raise Interrupted(signum)
