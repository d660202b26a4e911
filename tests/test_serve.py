"""Claims about `tinybert serve`: what the routes answer, what is refused with which status, and how it ends.
One server answers most of them, over loopback; what the answers should be is test_answers.py's and transformers'."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.serving.answers import Answerer, Served
from distill.serving.batching import Gate
from distill.serving.options import ServingOptions
from distill.serving.protocol import Asked, Refused, invocation_response, read_infer, read_invocation
from tests.builders import ROOT, run_tinybert
from tests.served_models import NAMES, TEXTS, artefact_of, logits_of, rows_of

START_SECONDS = 120
COMMAND = "from pipelines.cli import main; main()"
SINGLE = "single_label_classification"


@dataclass
class Running:
    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, body), decoded where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
        kind = {} if sent is None else {"content-type": "application/json"}
        connection.request(method, path, sent, {**kind, **{k.replace("_", "-"): v for k, v in headers.items()}})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if "json" in response.headers["content-type"] else text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Running]:
    port = free_port()
    arguments = [sys.executable, "-c", COMMAND, "serve", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = Running(process, port)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the server did not start"
            try:
                if running.ask("GET", "/v2/health/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.05)
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(
        artefact_of(SINGLE), "--max-rows", "16", "--max-bytes", "20000", "--max-characters", "3000"
    ) as running:
        yield running


def tensor(name: str, texts: list[Any], **changes: Any) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [len(texts)], "data": texts, **changes}


def outputs(answer: Any) -> dict[str, Any]:
    return {one["name"]: one for one in answer["outputs"]}


INFER = "/v2/models/student/infer"


def test_v2_answers_are_those_of_transformers(server: Running) -> None:
    status, answer = server.ask("POST", INFER, {"id": "a7", "inputs": [tensor("text", TEXTS)]})
    expected = np.array(logits_of(SINGLE, rows_of(SINGLE))[0])
    assert (status, answer["id"], answer["model_name"]) == (200, "a7", "student")
    found = outputs(answer)
    assert found["logits"]["shape"] == found["probabilities"]["shape"] == [len(TEXTS), len(NAMES)]
    np.testing.assert_allclose(np.reshape(found["logits"]["data"], (-1, len(NAMES))), expected, atol=1e-4)
    assert found["label"]["data"] == [NAMES[index] for index in expected.argmax(axis=1)]
    powers = np.exp(expected)
    np.testing.assert_allclose(
        found["probabilities"]["data"], (powers / powers.sum(axis=1, keepdims=True)).ravel(), atol=1e-4
    )


def test_the_other_forms_of_a_v2_request_mean_the_same(server: Running) -> None:
    flat = server.ask("POST", INFER, {"inputs": [tensor("text", ["rain", "snow"])]})[1]
    column = server.ask("POST", INFER, {"inputs": [tensor("text", [["rain"], ["snow"]], shape=[2, 1])]})[1]
    for one, other in zip(column["outputs"], flat["outputs"], strict=True):
        assert (one["name"], one["shape"], one["datatype"]) == (other["name"], other["shape"], other["datatype"])
        if one["name"] == "label":
            assert one["data"] == other["data"]
        else:
            np.testing.assert_allclose(one["data"], other["data"], atol=1e-5)
    chosen = server.ask("POST", INFER, {"inputs": [tensor("text", ["rain"])], "outputs": [{"name": "label"}]})[1]
    assert [one["name"] for one in chosen["outputs"]] == ["label"]


def test_sagemaker_answers_have_the_form_of_a_transformers_pipeline(server: Running) -> None:
    status, one = server.ask("POST", "/invocations", {"inputs": "rain"})
    assert status == 200
    assert [set(label) for label in one] == [{"label", "score"}]
    _, many = server.ask("POST", "/invocations", {"inputs": ["rain", TEXTS[1]]})
    assert many[0]["label"] == one[0]["label"]
    assert many[0]["score"] == pytest.approx(one[0]["score"], abs=1e-5)  # another batch sums in another order
    _, every = server.ask("POST", "/invocations", {"inputs": "rain", "parameters": {"top_k": None}})
    assert [label["score"] for label in every] == sorted((label["score"] for label in every), reverse=True)
    assert {label["label"] for label in every} == set(NAMES)
    assert sum(label["score"] for label in every) == pytest.approx(1, abs=1e-5)


def test_routes_of_health_and_metadata(server: Running) -> None:
    for path in ("/ping", "/v2/health/live", "/v2/health/ready", "/v2/models/student/ready"):
        assert server.ask("GET", path)[0] == 200, path
    _, model = server.ask("GET", "/v2/models/student")
    assert model["name"] == "student"
    assert {one["name"]: one["shape"] for one in model["outputs"]} == {
        "logits": [-1, 3],
        "probabilities": [-1, 3],
        "label": [-1],
    }


def test_prometheus_counts_rows_and_refusals(server: Running) -> None:
    def figure(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} ([\d.e+]+)$", server.ask("GET", "/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    rows = 'tinybert_rows_total{model="student"}'
    refusals = 'tinybert_requests_total{route="/v2/models/{name}/infer",status="400"}'
    before = figure(rows), figure(refusals)
    server.ask("POST", INFER, {"inputs": [tensor("text", ["rain", "snow", "wind"])]})
    server.ask("POST", INFER, b"{")
    assert (figure(rows), figure(refusals)) == (before[0] + 3, before[1] + 1)


MALFORMED: dict[str, tuple[Any, int, str]] = {
    "no body": (b"", 400, "JSON"),
    "half a body": (b'{"inputs": [', 400, "JSON"),
    "not UTF-8": (b'{"inputs": "\xff"}', 400, "JSON"),
    "a half character": (
        b'{"inputs": [{"name":"text","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}',
        400,
        "JSON",
    ),
    "deep": (b"[" * 5000, 400, ""),
    "a list": ([], 400, "object"),
    "no inputs": ({}, 400, "inputs"),
    "no tensors": ({"inputs": []}, 400, "inputs"),
    "another name": ({"inputs": [tensor("texts", ["a"])]}, 400, "inputs.0.name"),
    "twice": ({"inputs": [tensor("text", ["a"])] * 2}, 400, "twice"),
    "numbers": ({"inputs": [tensor("text", [1])]}, 400, "inputs.0.data"),
    "another type": ({"inputs": [tensor("text", ["a"], datatype="FP32")]}, 400, "datatype"),
    "a wrong shape": ({"inputs": [tensor("text", ["a"], shape=[2])]}, 400, "shape"),
    "a negative shape": ({"inputs": [tensor("text", ["a"], shape=[-1, -1])]}, 400, "shape"),
    "two columns": ({"inputs": [tensor("text", [["a", "b"]], shape=[1, 2])]}, 400, "shape"),
    "no rows": ({"inputs": [tensor("text", [])]}, 400, "no rows"),
    "pairs that are too few": ({"inputs": [tensor("text", ["a", "b"]), tensor("text_pair", ["c"])]}, 400, "as many"),
    "an unknown output": ({"inputs": [tensor("text", ["a"])], "outputs": [{"name": "x"}]}, 400, "outputs"),
    "an unknown key": ({"inputs": [tensor("text", ["a"])], "input": 1}, 400, "input"),
    "an id that is no text": ({"inputs": [tensor("text", ["a"])], "id": 7}, 400, "id"),
    "too many rows": ({"inputs": [tensor("text", ["a"] * 17)]}, 413, "16"),
    "too long a text": ({"inputs": [tensor("text", ["a", "b" * 3001])]}, 413, "row 1"),
    "too many bytes": (b" " * 20001, 413, "20,000"),
}
"""Body of a v2 request -> status, and what the message must name."""


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_told_what_is_wrong(server: Running, case: str) -> None:
    body, expected, named = MALFORMED[case]
    status, answer = server.ask("POST", INFER, body)
    assert status == expected, answer
    assert set(answer) == {"error"}
    assert named in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "expected", "named"),
    [
        ("POST", "/invocations", b'{"inputs": 1}', {}, 400, "inputs"),
        ("POST", "/invocations", b'{"inputs": []}', {}, 400, "no rows"),
        ("POST", "/invocations", b'{"text": "a"}', {}, 400, "inputs"),
        ("POST", "/invocations", b'{"inputs": {"text": "a", "more": "b"}}', {}, 400, "inputs"),
        ("POST", "/invocations", b'{"inputs": "a", "parameters": {"top_k": 0}}', {}, 400, "top_k"),
        ("POST", "/invocations", b"inputs=a", {"content_type": "application/x-www-form-urlencoded"}, 415, "json"),
        ("POST", INFER, b"{}", {"inference_header_content_length": "2"}, 415, "binary"),
        ("POST", "/v2/models/other/infer", b"{}", {}, 404, "student"),
        ("GET", "/v2/models/other", None, {}, 404, "student"),
        ("GET", "/elsewhere", None, {}, 404, "/elsewhere"),
        ("GET", INFER, None, {}, 405, "GET"),
        ("DELETE", "/ping", None, {}, 405, "DELETE"),
    ],
)
def test_a_request_for_what_is_not_there_is_refused(
    server: Running, method: str, path: str, body: bytes | None, headers: dict[str, str], expected: int, named: str
) -> None:
    status, answer = server.ask(method, path, body, **headers)
    assert status == expected
    assert named in answer["error"]


def test_a_body_that_does_not_tell_its_size_is_cut_off_too(server: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    chunks = (b" " * 4000 for _ in range(6))
    connection.request("POST", INFER, chunks, {"content-type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_the_page_brings_all_it_needs_and_lets_nothing_else_run(server: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/")
    response = connection.getresponse()
    policy, html = response.headers["content-security-policy"], response.read().decode()
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=|https?://|innerHTML|insertAdjacentHTML|document\.write", html)


def test_requests_that_come_together_are_answered_together(server: Running) -> None:
    """And each gets its own answer."""
    answerer = Answerer.of_artefact(artefact_of(SINGLE), 1)
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        for text in (TEXTS[number % len(TEXTS)], f"rain {number}", "snow " * number):
            _, answer = server.ask("POST", INFER, {"inputs": [tensor("text", [text])]})
            expected = answerer_logits[text]
            np.testing.assert_allclose(outputs(answer)["logits"]["data"], expected, atol=1e-4)
            found[number] = max(found.get(number, 0), answer["parameters"]["batch_rows"])

    texts = {text for number in range(24) for text in (TEXTS[number % len(TEXTS)], f"rain {number}", "snow " * number)}
    answerer_logits = {text: answerer.answer([(text, None)])[0]["logits"] for text in texts}
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert max(found.values()) > 1


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_server_after_the_requests_it_had_accepted(signum: int, status: int) -> None:
    """A batch that waits for more rows is in hand when the signal comes."""
    with serving(artefact_of(SINGLE), "--batch-wait-ms", "1500") as running:
        for _ in range(4):  # requests that follow each other closely, so that the next batch waits
            running.ask("POST", INFER, {"inputs": [tensor("text", ["wind"])]})
        answers: list[int] = []
        asking = [
            threading.Thread(
                target=lambda: answers.append(running.ask("POST", INFER, {"inputs": [tensor("text", ["rain"])]})[0])
            )
            for _ in range(5)
        ]
        for thread in asking:
            thread.start()
        deadline = time.monotonic() + START_SECONDS
        while "tinybert_waiting_requests 5.0" not in running.ask("GET", "/metrics")[1]:
            assert time.monotonic() < deadline, "the batch did not wait for the requests"
            time.sleep(0.02)
        os.kill(running.process.pid, signum)
        told = running.process.communicate(timeout=60)[0]
        for thread in asking:
            thread.join()
        assert answers == [200] * 5
        assert running.process.returncode == status, told
        assert "answered 9 of 9 accepted requests" in told
        assert "Traceback" not in told


def test_a_port_that_is_taken_is_refused(server: Running) -> None:
    outcome = run_tinybert("serve", artefact_of(SINGLE), "--port", str(server.port))
    assert outcome.status == 2
    assert f"--port {server.port}" in outcome.err


def test_a_folder_without_an_artefact_is_refused(tmp_path: Path) -> None:
    outcome = run_tinybert("serve", tmp_path)
    assert outcome.status == 2
    assert "tinybert export" in outcome.err


def test_a_damaged_artefact_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    for file in artefact_of(SINGLE).iterdir():
        (folder / file.name).write_bytes(file.read_bytes() + (b"x" if file.suffix == ".onnx" else b""))
    outcome = run_tinybert("serve", folder)
    assert outcome.status == 2
    assert "model.onnx" in outcome.err
    assert "SHA-256" in outcome.err


LIMITS = ServingOptions()


@pytest.mark.parametrize(
    ("pairs", "given", "named"),
    [(True, None, "text_pair"), (False, "b", "one text"), (None, "b", None), (None, None, None)],
)
def test_pairs_are_asked_for_where_the_task_has_them(pairs: bool | None, given: str | None, named: str | None) -> None:
    served = Served(SINGLE, ("a", "b"), 16, pairs)
    body = json.dumps({"inputs": [{"text": "a"} if given is None else {"text": "a", "text_pair": given}]}).encode()
    tensors = [tensor("text", ["a"])] + ([] if given is None else [tensor("text_pair", [given])])
    for read, content in ((read_invocation, body), (read_infer, json.dumps({"inputs": tensors}).encode())):
        if named is None:
            assert read(content, served, LIMITS).rows == [("a", given)]
        else:
            with pytest.raises(Refused, match=named):
                read(content, served, LIMITS)


def test_entities_and_answers_have_the_form_of_a_transformers_pipeline() -> None:
    tags = Served("token_classification", ("O", "B"), 16)
    answer = {"label": ["O", "B"], "probabilities": np.array([[0.9, 0.1], [0.25, 0.75]]), "logits": None}
    assert invocation_response(tags, Asked([("in  Rome", None)], single=True), [answer]) == [
        {"entity": "B", "score": 0.75, "word": "Rome", "start": 4, "end": 8}
    ]
    spans = Served("question_answering", (), 16, True)
    answer = {"label": "Rome", "score": 0.5, "start": 3, "end": 7}
    assert invocation_response(spans, Asked([("where?", "in Rome")], single=True), [answer]) == {
        "score": 0.5,
        "start": 3,
        "end": 7,
        "answer": "Rome",
    }


def test_a_lone_client_is_not_made_to_wait_for_company() -> None:
    slow, quick = Gate(0.002), Gate(0.002)
    for number in range(20):
        slow.came(number * 0.005)
        quick.came(number * 0.0005)
    assert (slow.seconds(), quick.seconds()) == (0.0, 0.002)


@pytest.mark.parametrize("setting", ["max_rows", "max_batch_rows", "workers", "port"])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        ServingOptions(**{setting: 0})
