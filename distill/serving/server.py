"""The process that listens: LitServe with the routes of Open Inference Protocol v2, of SageMaker, of Prometheus, and a
page. How rows are answered is left to batching.py and answers.py."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import litserve
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from litserve.callbacks import Callback
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException

from distill.interruption import Interrupted
from distill.serving.answers import Answer, Answerer, Row, Served
from distill.serving.batching import ModelAPI
from distill.serving.metrics import Metrics
from distill.serving.options import ServingOptions
from distill.serving.page import Page
from distill.serving.protocol import (
    Asked,
    Refused,
    infer_response,
    invocation_response,
    model_metadata,
    read_infer,
    read_invocation,
)
from distill.settings import RunError, UserError


@dataclass(frozen=True)
class Model:
    """A model to serve: its name in routes, what it answers, and how its answerer is made in the worker's process."""

    name: str
    served: Served
    make: Callable[[], Answerer]
    title: str
    """What people read."""
    platform: str = "onnxruntime_onnx"
    """What v2 calls it."""


class ModelQueue(LitSpec):
    """The way of a request's rows to the worker and back: LitServe's queues, by the name of a model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.api_path = f"/v2/models/{name}"
        self._count = 0

    async def answer(self, rows: list[Row]) -> tuple[list[Answer], int, float]:
        """(answers, rows of the batch they were in, seconds of that batch). Raises Refused, 504 or 500."""
        self._count += 1
        number, event = f"{self.api_path} {self._count}", asyncio.Event()
        self.response_buffer[number] = ResponseBufferItem(event=event)
        self.request_queue.put((self.response_queue_id, number, time.monotonic(), rows))
        await event.wait()
        found, status = self.response_buffer.pop(number).response
        if status == LitAPIStatus.OK:
            return found
        if isinstance(found, HTTPException):
            raise Refused("the request waited too long for its turn; send it again later", found.status_code)
        raise Refused("the model failed on this batch; the server's log says how", 500)


class Gateway:
    """The routes, and what is known of the requests under way."""

    def __init__(self, models: Sequence[Model], options: ServingOptions) -> None:
        self.models = {model.name: model for model in models}
        self.queues = {model.name: ModelQueue(model.name) for model in models}
        self.first, self.options = models[0], options
        self.waiting = self.accepted = self.answered = 0
        self.metrics = Metrics(lambda: self.waiting)
        self.page = Page([(model.name, model.title, model.served) for model in models], options)
        self.is_ready = False
        """Once all workers have read their models, for good: where one dies, the server ends."""

    def add_routes(self, app: FastAPI) -> None:
        # LitServe's own / says that it runs.
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/"]
        routes: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
            ("GET", "/", self.show_page),
            ("GET", "/ping", self.ready),
            ("POST", "/invocations", self.invoke),
            ("GET", "/metrics", self.show_metrics),
            ("GET", "/v2", self.server_metadata),
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.ready),
            ("GET", "/v2/models/{name}", self.metadata),
            ("GET", "/v2/models/{name}/ready", self.model_ready),
            ("POST", "/v2/models/{name}/infer", self.infer),
        ]
        for method, path, endpoint in routes:
            app.add_route(path, self._counted(path, endpoint), methods=[method])
        app.add_exception_handler(StarletteHTTPException, self._refused_elsewhere)

    async def show_page(self, request: Request) -> Response:
        return Response(self.page.html, media_type="text/html", headers=self.page.headers)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def server_metadata(self, request: Request) -> Response:
        return JSONResponse({"name": "tinybert-distill, LitServe", "version": litserve.__version__, "extensions": []})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"ready": self.is_ready}, 200 if self.is_ready else 503)

    async def metadata(self, request: Request) -> Response:
        model = self._named(request)
        return JSONResponse({**model_metadata(model.name, model.served), "platform": model.platform})

    async def model_ready(self, request: Request) -> Response:
        model = self._named(request)
        return JSONResponse({"name": model.name, "ready": self.is_ready}, 200 if self.is_ready else 503)

    async def infer(self, request: Request) -> Response:
        model = self._named(request)
        asked = read_infer(await self._body(request), model.served, self.options)
        answers, times = await self._answer(model, asked)
        return _json(infer_response(model.name, model.served, asked, answers, times))

    async def invoke(self, request: Request) -> Response:
        model = self.first
        asked = read_invocation(await self._body(request), model.served, self.options)
        answers, _ = await self._answer(model, asked)
        return _json(invocation_response(model.served, asked, answers))

    def say_what_was_answered(self) -> None:
        """The last word of the process that listened."""
        _say(f"answered {self.answered:,} of {self.accepted:,} accepted requests")

    async def _answer(self, model: Model, asked: Asked) -> tuple[list[Answer], dict[str, Any]]:
        if self.waiting >= self.options.max_waiting:
            raise Refused(f"{self.waiting:,} requests wait already; send it again later", 503)
        self.waiting += 1
        self.accepted += 1
        begin = time.perf_counter()
        try:
            answers, batch_rows, batch_seconds = await self.queues[model.name].answer(asked.rows)
        finally:
            self.waiting -= 1
        seconds = time.perf_counter() - begin
        self.answered += 1
        self.metrics.rows.labels(model.name).inc(len(answers))
        self.metrics.seconds.labels(model.name).observe(seconds)
        self.metrics.batch_seconds.labels(model.name).observe(batch_seconds)
        self.metrics.batch_rows.labels(model.name).observe(batch_rows)
        times = {"batch_rows": batch_rows, "batch_ms": batch_seconds * 1000, "answer_ms": seconds * 1000}
        return answers, times

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(f"the content type is {kind[:80]!r}; send application/json", 415)
        if "inference-header-content-length" in request.headers:
            raise Refused("binary tensors are not read; send the data as JSON", 415)
        most = self.options.max_bytes
        length = request.headers.get("content-length", "0")
        parts, size = [], int(length) if length.isdecimal() else 0
        if size <= most:
            size = 0
            async for part in request.stream():
                parts.append(part)
                if (size := size + len(part)) > most:
                    break
        if size > most:
            raise Refused(f"the body has more than {most:,} bytes", 413)
        return b"".join(parts)

    def _named(self, request: Request) -> Model:
        name = request.path_params["name"]
        if name not in self.models:
            raise Refused(f"there is no model {name[:80]!r}; there is {', '.join(self.models)}", 404)
        return self.models[name]

    def _counted(self, path: str, endpoint: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        async def run(request: Request) -> Response:
            try:
                response = await endpoint(request)
            except Refused as refused:
                response = _error(str(refused), refused.status)
            self.metrics.requests.labels(path, response.status_code).inc()
            return response

        return run

    async def _refused_elsewhere(self, request: Request, error: Any) -> Response:
        """Routes that are not there, methods that they do not have."""
        self.metrics.requests.labels("other", error.status_code).inc()
        return _error(f"{request.method} {request.url.path[:80]}: {error.detail}", error.status_code, error.headers)


class _LastWord(Callback):
    """Has the process that listened say what it did; the workers get a copy that says nothing."""

    def __init__(self, say: Callable[[], None]) -> None:
        self.say = say

    def __reduce__(self) -> tuple[Any, ...]:
        return Callback, ()

    def on_server_end(self, *args: Any, **kwargs: Any) -> None:
        self.say()


class _Server(litserve.LitServer):
    """LitServe's server, which says when it is ready."""

    def __init__(self, apis: Sequence[ModelAPI], gateway: Gateway, ready_message: str, **more: Any) -> None:
        super().__init__(apis, **more)
        self.gateway, self.ready_message = gateway, ready_message

    def verify_worker_status(self) -> None:
        """Listens when all workers are ready; LitServe would when the first one is."""
        while (states := set(self.workers_setup_status.values())) != {WorkerSetupStatus.READY}:
            if WorkerSetupStatus.ERROR in states:
                raise RuntimeError("a worker could not start")
            time.sleep(0.05)
        self.gateway.is_ready = True
        _say(self.ready_message)


def serve(models: Sequence[Model], options: ServingOptions) -> None:
    """Answer requests until a signal; the first model answers /invocations.

    Raises:
        UserError: the address cannot be listened on.
        RunError: a worker could not read its model, or died.
        Interrupted: a signal came, and what was accepted has been answered.
    """
    _require_address(options)
    gateway = Gateway(models, options)
    apis = [
        ModelAPI(model.make, gateway.queues[model.name], options.max_batch_rows, options.batch_wait_ms / 1000)
        for model in models
    ]
    names = ", ".join(f"{model.name} ({model.title})" for model in models)
    server = _Server(
        apis,
        gateway,
        f"serving {names} on http://{options.host}:{options.port}; SIGTERM or Ctrl-C answers what is accepted and ends",
        accelerator="cpu",
        workers_per_device=[options.workers, *(1 for _ in models[1:])],
        timeout=options.timeout_seconds,
        callbacks=[_LastWord(gateway.say_what_was_answered)],
        disable_openapi_url=True,
    )
    server.uvicorn_graceful_timeout = options.drain_seconds
    gateway.add_routes(server.app)
    _run(server, options)


def _run(server: _Server, options: ServingOptions) -> None:
    process = os.getpid()
    signals: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        # Children of a fork have this handler too, until they set their own.
        if os.getpid() == process and not signals:
            signals.append(signum)
            # The workers end now because they are told to: LitServe's watch over them is not to call it a fault.
            logging.getLogger("litserve").setLevel(logging.CRITICAL + 1)
            raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    try:
        server.run(
            host=options.host,
            port=options.port,
            num_api_servers=1,
            log_level="warning",
            generate_client_file=False,
            access_log=False,
            server_header=False,
        )
    except KeyboardInterrupt:
        _end_workers(server)  # before anything was accepted
    except (RuntimeError, EOFError, ConnectionError) as error:
        _end_workers(server)
        raise RunError("a process that answers could not start, or died; the messages above say why") from error
    if signals:
        raise Interrupted(signals[0], "the server has stopped")


def _end_workers(server: _Server) -> None:
    """LitServe leaves them where it ends before it listened; they would be waited for."""
    for worker in getattr(server, "inference_workers", []):
        worker.terminate()


def _require_address(options: ServingOptions) -> None:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise UserError(
                f"--host {options.host} --port {options.port}: {error.strerror or error}. Give another port, or end "
                "what listens there."
            ) from error


def _json(value: Any) -> Response:
    # Compact, and never the NaN that JSON does not have.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, media_type="application/json")


def _error(message: str, status: int, headers: Any = None) -> Response:
    later = {"retry-after": "1"} if status == 503 else {}
    return JSONResponse({"error": message}, status, {**(headers or {}), **later})


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
