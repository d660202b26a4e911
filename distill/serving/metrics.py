"""What the server counts for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one server. Requests are labelled by route, never by the path a client made up."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        disable_created_metrics()  # a second series for each, which nobody asked for
        self.registry = here = CollectorRegistry()
        ProcessCollector(registry=here)
        model = ("model",)
        self.requests = Counter(
            "tinybert_requests", "Requests by route and status.", ("route", "status"), registry=here
        )
        self.rows = Counter("tinybert_rows", "Rows answered.", model, registry=here)
        self.seconds = Histogram(
            "tinybert_answer_seconds", "From a request's rows to their answers.", model, registry=here, buckets=SECONDS
        )
        self.batch_seconds = Histogram(
            "tinybert_batch_seconds",
            "Pieces, forwards and labels of the batch that a request was answered in.",
            model,
            registry=here,
            buckets=SECONDS,
        )
        self.batch_rows = Histogram("tinybert_batch_rows", "Rows of that batch.", model, registry=here, buckets=ROWS)
        Gauge("tinybert_waiting_requests", "Requests that wait for an answer.", registry=here).set_function(waiting)

    def text(self) -> bytes:
        return generate_latest(self.registry)
