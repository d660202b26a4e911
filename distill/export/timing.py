"""How fast models are and what memory they take: each alone in a fresh process, all in turn.
What is compared, and what is shown of it, is left to the callers.

On a machine that others use, or whose clock changes, two timings taken one after the other differ by whatever happened
between. Here every model has a process that waits while another one works; turns are short and go round many times, so
that the machine's noise falls on all alike.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Subject:
    """A model on disk: a folder of transformers', or an artefact's file."""

    name: str
    path: Path
    vocabulary: int
    """Token ids are drawn below it."""
    head: str = "AutoModelForSequenceClassification"
    """The class of transformers that loads a folder."""


@dataclass(frozen=True)
class Workload:
    """The shape of a batch."""

    batch: int
    length: int


@dataclass(frozen=True)
class Timed:
    """Of one subject."""

    seconds: dict[Workload, list[float]]
    """Of each forward."""
    peak_bytes: int
    """Of its process, from its start to its end: interpreter, library, weights and the largest workload."""


def measure(
    subjects: Sequence[Subject], workloads: Sequence[Workload], threads: int, seconds: float, rounds: int = 10
) -> list[Timed]:
    """Forwards of every subject on every workload: random token ids, no padding, logits as they come.

    Args:
        threads: of one forward.
        seconds: for each subject and workload, spread over the rounds; at least one forward is measured in each.

    Raises:
        RuntimeError: a subject cannot be loaded or run; the message has its traceback.
    """
    with _workers(subjects, threads) as workers:
        found = [Timed({workload: [] for workload in workloads}, 0) for _ in subjects]
        for _ in range(rounds):
            for workload in workloads:
                for worker, timed in zip(workers, found, strict=True):
                    timed.seconds[workload].extend(_ask(worker, (workload, seconds / rounds)))
        return [Timed(timed.seconds, _ask(worker, None)) for worker, timed in zip(workers, found, strict=True)]


@contextmanager
def _workers(subjects: Sequence[Subject], threads: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")  # a forked process would start with this one's memory
    connections, processes = [], []
    try:
        for subject in subjects:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, subject, threads), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            connections.append(ours)
            processes.append(process)
            _answer(ours)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


def _ask(worker: Connection, question: Any) -> Any:
    worker.send(question)
    return _answer(worker)


def _answer(worker: Connection) -> Any:
    answer = worker.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _work(connection: Connection, subject: Subject, threads: int) -> None:
    """A subject's process: loads it, says so, then answers until the pipe is closed."""
    try:
        forward = (_artefact if subject.path.is_file() else _pytorch)(subject, threads)
        connection.send(True)
        while True:
            question = connection.recv()
            connection.send(peak_bytes() if question is None else _turn(forward, subject, *question))
    except EOFError:
        return
    except Exception:
        import traceback

        connection.send(f"{subject.name}: {traceback.format_exc()}")


Forward = Callable[[np.ndarray], object]


def _turn(forward: Forward, subject: Subject, workload: Workload, seconds: float) -> list[float]:
    ids = np.random.default_rng(0).integers(subject.vocabulary, size=(workload.batch, workload.length))
    forward(ids)  # brings back to the caches what the others' turns drove out
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        began = time.perf_counter()
        forward(ids)
        found.append(time.perf_counter() - began)
    return found


def _pytorch(subject: Subject, threads: int) -> Forward:
    import torch
    import transformers

    from distill.activations import model_inputs

    torch.set_num_threads(threads)
    model = getattr(transformers, subject.head).from_pretrained(subject.path, dtype=torch.float32).eval()

    def forward(ids: np.ndarray) -> object:
        pieces = torch.from_numpy(ids)
        batch = {
            "input_ids": pieces,
            "attention_mask": torch.ones_like(pieces),
            "token_type_ids": torch.zeros_like(pieces),
        }
        with torch.inference_mode():
            return model(**model_inputs(model, batch))

    return forward


def _artefact(subject: Subject, threads: int) -> Forward:
    from distill.export.session import open_runner

    runner = open_runner(subject.path, threads)

    def forward(ids: np.ndarray) -> object:
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return runner.run({name: batch[name] for name in runner.takes})

    return forward


def peak_bytes() -> int:
    """The most memory this process has held.

    Not getrusage's figure on Linux: that one keeps the peak of the program that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def all_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
