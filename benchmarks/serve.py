"""The load test of `tinybert serve`, over loopback: throughput and latency at saturation with and without batching,
every answer against a session of ONNX Runtime that is run directly, malformed requests, and a SIGTERM under load.

    python -m benchmarks.serve runs/bbc_news --json benchmarks/results/serve.json

Client and servers share the machine, so the figures are what one machine does with both. Bounded in time and requests.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from transformers import AutoTokenizer

from distill.config import load_config
from distill.data import load_task_data
from distill.export.session import MODEL_FILE
from distill.serving.answers import Row, read_json
from distill.serving.artefact import check_artefact, find_artefact
from distill.tasks import TASKS
from pipelines.machine import machine

TOLERANCE = {"onnx": 1e-4, "int8": 0.25}
"""By how much a logit may differ from the direct run, which answers one row at a time: float32 sums in another order;
int8 rounds what such a difference moves over a half to another step."""
INFER = "/v2/models/student/infer"
COMMAND = "from pipelines.cli import main; main()"


@dataclass
class Answered:
    """What a client got: which row it asked for, seconds, status and body."""

    row: int
    seconds: float
    status: int
    body: bytes


@dataclass
class Client:
    """Keep-alive connections to one server."""

    port: int
    found: list[Answered] = field(default_factory=list)
    unanswered: int = 0
    """Requests on connections that were closed before a byte of an answer."""

    async def saturate(self, requests: Iterator[tuple[int, bytes]], connections: int) -> None:
        """Ask on every connection, one request after the other, until there are no more or the server closes."""
        await asyncio.gather(*(self._ask(requests) for _ in range(connections)))

    async def _ask(self, requests: Iterator[tuple[int, bytes]]) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return
        for row, request in requests:
            begin = time.perf_counter()
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, OSError):
                self.unanswered += 1
                break
            lines = head.decode("latin-1").lower().split("\r\n")
            size = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
            body = await reader.readexactly(size)
            self.found.append(Answered(row, time.perf_counter() - begin, int(lines[0].split()[1]), body))
            if "connection: close" in lines:
                break
        writer.close()


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    answered: int = 0
    """Requests for answers that a client got one for."""


@contextmanager
def server(folder: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, "-c", COMMAND, "serve", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            assert process.poll() is None, process.communicate()[1]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield Server(process, port)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def request(body: bytes, path: str = INFER, kind: str = "application/json", method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode("latin-1") + body


def infer_request(row: Row) -> bytes:
    tensors = [
        {"name": name, "datatype": "BYTES", "shape": [1], "data": [text]}
        for name, text in zip(("text", "text_pair"), row, strict=True)
        if text is not None
    ]
    return request(json.dumps({"inputs": tensors}).encode())


def run_rows(folder: Path, most: int) -> list[Row]:
    """The texts of a run's test rows."""
    config = load_config(folder / "config.yaml", [])
    assert config.task is not None, "a run without a task has nothing to serve"
    test = load_task_data(config.data, TASKS[config.task.type], config.seed).splits["test"]
    pairs = test["text_pair"] if "text_pair" in test.column_names else [None] * len(test)
    return list(zip(test["text"], pairs, strict=True))[:most]


def direct_logits(folder: Path, rows: Sequence[Row]) -> np.ndarray:
    """(rows, C): tokenizer of transformers, session with its default options, one row at a time."""
    tokenizer, session = AutoTokenizer.from_pretrained(folder), onnxruntime.InferenceSession(folder / MODEL_FILE)
    length = read_json(folder / "metadata.json")["max_length"]
    found = []
    for text, pair in rows:
        pieces = tokenizer(text, pair, truncation=True, max_length=length, return_tensors="np")
        feed = {one.name: pieces[one.name].astype(np.int64) for one in session.get_inputs()}
        found.append(session.run(["logits"], feed)[0][0])
    return np.stack(found)


@dataclass
class Oracle:
    """Compares answers with direct runs."""

    logits: np.ndarray
    labels: Sequence[str]
    tolerance: float
    compared: int = 0
    wrong: int = 0
    largest: float = 0.0

    def check(self, answers: Sequence[Answered]) -> None:
        for one in answers:
            self.compared += 1
            if one.status != 200:
                self.wrong += 1
                continue
            outputs = {tensor["name"]: tensor["data"] for tensor in json.loads(one.body)["outputs"]}
            expected = self.logits[one.row]
            difference = float(np.max(np.abs(np.array(outputs["logits"]) - expected)))
            self.largest = max(self.largest, difference)
            right = difference <= self.tolerance
            if right and "label" in outputs and self.labels:
                right = outputs["label"] == [self.labels[int(np.argmax(expected))]]
            self.wrong += not right


def phase(one: Server, requests: Sequence[bytes], connections: int, seconds: float, most: int) -> tuple[Any, Client]:
    """Saturate a server for some seconds or requests: the figures, and the client with every answer."""
    client, end = Client(one.port), time.perf_counter() + seconds

    def endless() -> Iterator[tuple[int, bytes]]:
        for number in itertools.islice(itertools.count(), most):
            if time.perf_counter() > end:
                return
            row = number * 7919 % len(requests)  # neighbours of all lengths
            yield row, requests[row]

    begin = time.perf_counter()
    asyncio.run(client.saturate(endless(), connections))
    took = time.perf_counter() - begin
    one.answered += len(client.found)
    p50, p99 = np.percentile([answer.seconds * 1000 for answer in client.found], [50, 99])
    rows = [json.loads(answer.body)["parameters"]["batch_rows"] for answer in client.found if answer.status == 200]
    figures = {
        "requests": len(client.found),
        "seconds": took,
        "requests_per_second": len(client.found) / took,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "mean_rows_of_a_batch": float(np.mean(rows)),
    }
    return figures, client


def malformed(count: int, seed: int = 0) -> list[bytes]:
    """Requests that are wrong in one of many ways each."""
    draw = random.Random(seed)
    good = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a text"]}]}

    def changed(**changes: Any) -> bytes:
        return request(json.dumps({"inputs": [{**good["inputs"][0], **changes}]}).encode())

    def cut() -> bytes:
        body = json.dumps(good).encode()
        return request(body[: draw.randrange(len(body))])

    def noise() -> bytes:
        return request(bytes([0xFF]) + draw.randbytes(draw.randrange(200)))

    ways = [
        cut,
        noise,
        lambda: changed(shape=[draw.randrange(2, 1000)]),
        lambda: changed(shape=[draw.randrange(-1000, 0)]),
        lambda: changed(datatype=draw.choice(["FP32", "INT64", "bytes", "", None])),
        lambda: changed(name=draw.choice(["texts", "TEXT", "", 7])),
        lambda: changed(data=draw.choice([[1], [None], "text", {}, [["a", "b"]], [[["a"]]]])),
        lambda: changed(data=["x" * draw.randrange(20_001, 100_000)]),
        lambda: changed(data=["x"] * draw.randrange(65, 500)),
        lambda: request(b" " * 1_000_001),
        lambda: request(json.dumps({**good, "outputs": [{"name": "nothing"}]}).encode()),
        lambda: request(json.dumps({**good, str(draw.random()): 1}).encode()),
        lambda: request(json.dumps({"inputs": draw.choice([[], {}, None, 1, "text"])}).encode()),
        lambda: request(json.dumps({"inputs": draw.choice([[], 1, None, [1], {"x": "y"}])}).encode(), "/invocations"),
        lambda: request(json.dumps(good).encode(), f"/v2/models/{draw.randrange(10**6)}/infer"),
        lambda: request(json.dumps(good).encode(), f"/{draw.randrange(10**6)}"),
        lambda: request(json.dumps(good).encode(), kind=draw.choice(["text/csv", "text/plain", "application/xml"])),
        lambda: request(json.dumps(good).encode(), method=draw.choice(["PUT", "DELETE", "PATCH", "GET"])),
    ]
    return [ways[number % len(ways)]() for number in range(count)]


async def refused(port: int, requests: Sequence[bytes]) -> list[int]:
    """The status of each, on a connection of its own."""
    found = []
    for one in requests:
        client = Client(port)
        await client.saturate(iter([(0, one)]), 1)
        found.append(client.found[0].status if client.found else 0)
    return found


def drained(one: Server, requests: Sequence[bytes], connections: int, oracle: Oracle) -> dict[str, Any]:
    """SIGTERM under load: what the clients got against what the server says it accepted."""
    client = Client(one.port)

    async def under_load() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, one.process.send_signal, signal.SIGTERM)
        await client.saturate(((row, requests[row]) for row in itertools.cycle(range(len(requests)))), connections)

    asyncio.run(under_load())
    told = one.process.communicate(timeout=60)[1]
    oracle.check(client.found)
    one.answered += len(client.found)
    words = next(line for line in told.splitlines() if line.startswith("answered ")).replace(",", "").split()
    return {
        "answered_under_load": len(client.found),
        "closed_before_they_were_read": client.unanswered,
        "accepted_in_all": int(words[3]),
        "answers_received_in_all": one.answered,
        "lost": int(words[3]) - one.answered,
        "exit_status": one.process.returncode,
    }


def measure(run: Path, artefact: str | None, seconds: float, total: int, connections: int) -> dict[str, Any]:
    folder = find_artefact(run, artefact)
    served, kind = check_artefact(folder)
    rows = run_rows(run, most=1000)
    requests = [infer_request(row) for row in rows]
    oracle = Oracle(direct_logits(folder, rows), served.labels, TOLERANCE[kind])
    chosen = ["--artefact", kind]
    figures: dict[str, Any] = {
        "artefact": kind,
        "distinct_rows": len(rows),
        "connections": connections,
        "machine": machine(),
        "batching": [],
        "no_batching": [],
    }
    with server(run, *chosen) as batching, server(run, *chosen, "--max-batch-rows", "1") as single:
        for one in (batching, single):  # warm
            phase(one, requests, connections, 1.0, total)
        for _ in range(3):  # in turn, so that what else the machine does falls on both alike
            for name, one in (("batching", batching), ("no_batching", single)):
                found, client = phase(one, requests, connections, seconds, total)
                figures[name].append(found)
                oracle.check(client.found)
        begin = time.perf_counter()
        while (missing := total - oracle.compared) > 0 and time.perf_counter() - begin < 300:
            oracle.check(phase(batching, requests, connections, 30, missing)[1].found)
        statuses = asyncio.run(refused(batching.port, malformed(1000)))
        figures["malformed"] = {
            "requests": len(statuses),
            "not_4xx": sum(not 400 <= status < 500 for status in statuses),
            "by_status": {str(status): statuses.count(status) for status in sorted(set(statuses))},
        }
        figures["drain"] = drained(batching, requests, connections, oracle)
    figures["answers"] = {
        "compared": oracle.compared,
        "wrong": oracle.wrong,
        "tolerance_of_a_logit": oracle.tolerance,
        "largest_difference": oracle.largest,
    }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with artefacts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--artefact", help="int8 or onnx; int8 where both are there")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of the six measurements at saturation")
    parser.add_argument("--requests", type=int, default=50_000, help="how many answers are compared")
    parser.add_argument("--connections", type=int, default=32)
    given = parser.parse_args()
    figures = measure(given.run, given.artefact, given.seconds, given.requests, given.connections)
    text = json.dumps(figures, indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    right = figures["answers"]["wrong"] == figures["malformed"]["not_4xx"] == figures["drain"]["lost"] == 0
    sys.exit(0 if right and figures["answers"]["compared"] >= given.requests else 1)


if __name__ == "__main__":
    main()
