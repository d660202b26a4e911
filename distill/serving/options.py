"""Settings of the server: where it listens, how it batches, what it refuses."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from distill.settings import settings


@settings
class ServingOptions:
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 for this machine alone, 0.0.0.0 or :: for everybody who can reach it."""
    port: int = Field(default=8080, ge=1024, le=65535)
    """Port to listen on."""
    workers: PositiveInt = 1
    """Processes that answer; each loads the model."""
    threads: PositiveInt = 1
    """Threads of one forward."""
    max_batch_rows: PositiveInt = 32
    """Most rows of a batch; 1 turns batching off."""
    batch_wait_ms: NonNegativeFloat = 2.0
    """How long a batch that is not full waits for more rows, while requests come faster than that."""
    max_rows: PositiveInt = 64
    """Most rows of a request."""
    max_bytes: PositiveInt = 1_000_000
    """Most bytes of a request's body."""
    max_characters: PositiveInt = 20_000
    """Most characters of a text; a text is cut at the model's max_length word pieces all the same."""
    max_waiting: PositiveInt = 512
    """Most requests that may wait for an answer; more are told to come back (503)."""
    timeout_seconds: PositiveFloat = 30.0
    """A request that waited longer for its turn is given up (504)."""
    drain_seconds: PositiveInt = 25
    """How long accepted requests have to be answered after SIGTERM."""
