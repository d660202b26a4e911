"""The process that answers: LitServe's worker with our model, and how requests become a batch.
What a request may be is left to protocol.py; rows are grouped by length in answers.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from queue import Empty, Queue
from types import FrameType
from typing import Any

from litserve import LitAPI
from litserve.loops.simple_loops import BatchedLoop
from litserve.specs.base import LitSpec
from litserve.transport.base import MessageTransport

from distill.serving.answers import Answer, Answerer, Row

POLL_SECONDS = 0.25
"""How soon a worker without requests notices that it was told to end."""

Request = tuple[int, str, float, list[Row]]
"""What LitServe puts into a worker's queue: consumer, request's number, time.monotonic() of its coming, payload."""


class Gate:
    """Whether waiting for more rows is worth while: only where requests come faster than the wait.

    A single client sends its next request after the answer: to wait for it would only make it slower.
    """

    smoothing = 0.2

    def __init__(self, wait_seconds: float) -> None:
        self.wait_seconds = wait_seconds
        self._last, self._gap = -1e9, 2 * wait_seconds

    def came(self, at: float) -> None:
        """A request came at this time, in seconds."""
        # However long nobody came, a handful of requests tells that they come fast again.
        gap = min(max(at - self._last, 0.0), 2 * self.wait_seconds)
        self._gap = (1 - self.smoothing) * self._gap + self.smoothing * gap
        self._last = at

    def seconds(self) -> float:
        """How long an unfinished batch waits from its first request on."""
        return self.wait_seconds if self._gap < self.wait_seconds else 0.0


class RowBatches(BatchedLoop):
    """LitServe's batched loop, counting rows instead of requests and sleeping where there are none."""

    def __init__(self, max_rows: int, wait_seconds: float) -> None:
        super().__init__()
        self.max_rows = max_rows
        self.gate = Gate(wait_seconds)
        self._held: Request | None = None
        self._ending = False

    def end_when_idle(self, signum: int, frame: FrameType | None) -> None:
        """What SIGTERM does to a worker: what is in its queue is answered first."""
        self._ending = True

    def get_batch_requests(
        self, lit_api: LitAPI, request_queue: Queue, transport: MessageTransport
    ) -> tuple[list[tuple[int, str, list[Row]]], list[tuple[int, str]]]:
        """(requests of the next batch, requests that waited too long)."""
        requests = self._collect(request_queue)
        now, late = time.monotonic(), []
        batch = []
        for consumer, number, came, rows in requests:
            if now - came > (lit_api.request_timeout or float("inf")):
                late.append((consumer, number))
            else:
                batch.append((consumer, number, rows))
        return batch, late

    def _collect(self, queue: Queue) -> list[Request]:
        requests, rows = [self._first(queue)], 0
        begin = time.monotonic()
        while (rows := rows + len(requests[-1][3])) < self.max_rows:
            following = self._next(queue, begin + self.gate.seconds() - time.monotonic())
            if following is None:
                break
            if rows + len(following[3]) > self.max_rows:
                self._held = following
                break
            requests.append(following)
        return requests

    def _first(self, queue: Queue) -> Request:
        if self._held is not None:
            held, self._held = self._held, None
            return held
        while (found := self._next(queue, POLL_SECONDS)) is None:
            if self._ending:
                raise SystemExit(0)
        return found

    def _next(self, queue: Queue, seconds: float) -> Request | None:
        try:
            found: Request = queue.get(timeout=seconds) if seconds > 0 else queue.get_nowait()
        except Empty:
            return None
        self.gate.came(found[2])
        return found


class ModelAPI(LitAPI):
    """A model in LitServe's hands.

    Args:
        make: makes the answerer, in the worker's process; must be picklable.
    """

    def __init__(
        self, make: Callable[[], Answerer], spec: LitSpec, max_batch_rows: int, batch_wait_seconds: float
    ) -> None:
        loop = RowBatches(max_batch_rows, batch_wait_seconds)
        super().__init__(max_batch_size=max_batch_rows, batch_timeout=batch_wait_seconds, loop=loop, spec=spec)
        self.make = make

    def setup(self, device: str) -> None:
        # Ctrl-C and some supervisors signal every process: the one that listens must be answered to the end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.answerer = self.make()
        self.answerer.answer([("warm", "up" if self.answerer.served.pairs else None)])
        signal.signal(signal.SIGTERM, self.loop.end_when_idle)

    def decode_request(self, request: list[Row]) -> list[Row]:
        return request

    def batch(self, inputs: list[list[Row]]) -> list[list[Row]]:
        return inputs

    def predict(self, x: list[list[Row]]) -> list[tuple[list[Answer], int, float]]:
        """Of each request its answers, the rows of the batch it was in, and the seconds that batch took."""
        rows = [row for request in x for row in request]
        begin = time.monotonic()
        answers = self.answerer.answer(rows)
        seconds = time.monotonic() - begin
        return [(own, len(rows), seconds) for own in _split(answers, [len(request) for request in x])]

    def encode_response(self, output: Any) -> Any:
        return output


def _split(answers: Sequence[Answer], counts: Sequence[int]) -> list[list[Answer]]:
    found, at = [], 0
    for count in counts:
        found.append(list(answers[at : at + count]))
        at += count
    return found
