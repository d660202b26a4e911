"""The handler of SageMaker's Hugging Face containers, packed as code/inference.py: answers with the ONNX artefact.
Requests and answers are those of /invocations of `tinybert serve`; nothing in here loads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.serving.answers import Answerer
from distill.serving.options import ServingOptions
from distill.serving.protocol import invocation_response, read_invocation

JSON = "application/json"


def model_fn(model_dir: str) -> Answerer:
    """The artefact in model_dir/artefacts. One thread: the container has a worker for each processor."""
    (folder,) = (Path(model_dir) / "artefacts").iterdir()
    return Answerer.of_artefact(folder, threads=1)


def input_fn(input_data: str | bytes, content_type: str = JSON) -> Any:
    """The request's JSON. Raises ValueError, which the container answers with 400."""
    if content_type.partition(";")[0].strip().lower() != JSON:
        raise ValueError(f"the content type is {content_type[:80]!r}; send {JSON}")
    return json.loads(input_data)


def predict_fn(data: Any, model: Answerer) -> Any:
    """What a pipeline of transformers answers. Raises Refused, with what is wrong with the request."""
    asked = read_invocation(json.dumps(data).encode(), model.served, ServingOptions())
    return invocation_response(model.served, asked, model.answer(asked.rows))


def output_fn(prediction: Any, accept: str = JSON) -> str:
    """The answer as JSON. Raises ValueError where something else is asked for."""
    if not any(kind in accept for kind in (JSON, "*/*", "application/*")):
        raise ValueError(f"accept is {accept[:80]!r}; the answer is {JSON}")
    return json.dumps(prediction, ensure_ascii=False, allow_nan=False)
