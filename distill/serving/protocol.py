"""What a request may be and what is answered: Open Inference Protocol v2, and the JSON of SageMaker's Hugging Face
containers. Pure functions between bytes and rows; routes and statuses of transport are server.py's.

    v2         {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["one", "two"]}]}
    SageMaker  {"inputs": "one"}  {"inputs": ["one", "two"]}  {"inputs": {"text": "one", "text_pair": "two"}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from distill.serving.answers import OUTPUTS, Answer, Row, Served, words_of


class Limits(Protocol):
    """What one request may hold; ServingOptions has it."""

    @property
    def max_rows(self) -> int: ...
    @property
    def max_characters(self) -> int: ...


class Refused(Exception):
    """The request is wrong: an HTTP status and what is wrong with it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Tensor(_Strict):
    """An input of Open Inference Protocol v2."""

    name: Literal["text", "text_pair"]
    shape: list[int] = Field(min_length=1, max_length=2)
    datatype: Literal["BYTES"]
    data: list[str] | list[list[str]]
    parameters: dict[str, Any] = {}


class Wanted(_Strict):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(_Strict):
    """The body of /v2/models/NAME/infer."""

    inputs: list[Tensor] = Field(min_length=1, max_length=2)
    id: str | None = None
    outputs: list[Wanted] = []
    parameters: dict[str, Any] = {}


class TextPair(_Strict):
    text: str
    text_pair: str | None = None


class Question(_Strict):
    question: str
    context: str


class Parameters(_Strict):
    top_k: int | None = Field(default=1, ge=1)
    """How many labels of a row are told; null for all."""


class InvocationRequest(_Strict):
    """The body of /invocations."""

    inputs: str | TextPair | Question | list[str | TextPair | Question]
    parameters: Parameters = Parameters()


_INFER, _INVOCATION = TypeAdapter(InferRequest), TypeAdapter(InvocationRequest)


@dataclass(frozen=True)
class Asked:
    """A request that may be answered, and how its answer is to look."""

    rows: list[Row]
    outputs: tuple[str, ...] = ()
    number: str | None = None
    """The client's own id, given back."""
    top_k: int | None = 1
    single: bool = False
    """SageMaker: the one row did not come in a list."""


def read_infer(body: bytes, served: Served, limits: Limits) -> Asked:
    """A v2 request. Raises Refused, which says what is wrong with it."""
    request = _parse(_INFER, body)
    columns: dict[str, list[str]] = {}
    for tensor in request.inputs:
        if tensor.name in columns:
            raise Refused(f"inputs: {tensor.name} is there twice")
        columns[tensor.name] = _values(tensor)
    if "text" not in columns:
        raise Refused("inputs: there is no tensor named text")
    texts, pairs = columns["text"], columns.get("text_pair")
    if pairs is not None and len(pairs) != len(texts):
        raise Refused(f"inputs: text has {len(texts)} rows, text_pair {len(pairs)}; they must be as many")
    known = OUTPUTS[served.task]
    outputs = tuple(dict.fromkeys(one.name for one in request.outputs)) or known
    for name in outputs:
        if name not in known:
            raise Refused(f"outputs: {name!r} is none of this model's; it has {', '.join(known)}")
    rows: list[Row] = [(text, None) for text in texts] if pairs is None else list(zip(texts, pairs, strict=True))
    return Asked(_checked(rows, served, limits), outputs, request.id)


def read_invocation(body: bytes, served: Served, limits: Limits) -> Asked:
    """A SageMaker request. Raises Refused, which says what is wrong with it."""
    request = _parse(_INVOCATION, body, "a text, {text, text_pair}, {question, context}, or a list of such")
    single = not isinstance(request.inputs, list)
    given: list[Any] = [request.inputs] if single else request.inputs
    rows = [_row(one) for one in given]
    return Asked(_checked(rows, served, limits), top_k=request.parameters.top_k, single=single)


def infer_response(model: str, served: Served, asked: Asked, answers: Sequence[Answer], times: Any) -> dict[str, Any]:
    """The v2 answer: tensors by name; `times` goes out as its parameters."""
    outputs = [_tensor(name, [answer[name] for answer in answers]) for name in asked.outputs]
    number = {} if asked.number is None else {"id": asked.number}
    return {"model_name": model, **number, "parameters": times, "outputs": outputs}


def invocation_response(served: Served, asked: Asked, answers: Sequence[Answer]) -> Any:
    """What a pipeline of transformers says, for each row: labels with scores, entities, or an answer.

    One row that did not come in a list has its labels in a list all the same, as from the Hugging Face containers.
    """
    found = [_piped(served, row, answer, asked.top_k) for row, answer in zip(asked.rows, answers, strict=True)]
    if asked.single:
        return found[0]
    one_label = asked.top_k == 1 and served.task not in ("token_classification", "question_answering")
    return [one for row in found for one in row] if one_label else found


def model_metadata(name: str, served: Served) -> dict[str, Any]:
    """What /v2/models/NAME says: the tensors that go in and come out, -1 for a length that varies."""
    labels = len(served.labels)
    of_words = served.task == "token_classification"
    shapes = {
        "logits": ("FP32", [-1, -1, labels] if of_words else [-1, labels or 1]),
        "probabilities": ("FP32", [-1, -1, labels] if of_words else [-1, labels]),
        "label": ("BYTES", [-1]),
        "score": ("FP32", [-1]),
        "start": ("INT64", [-1]),
        "end": ("INT64", [-1]),
    }
    texts = ["text"] if served.pairs is False else ["text", "text_pair"]
    return {
        "name": name,
        "versions": [],
        "inputs": [{"name": one, "datatype": "BYTES", "shape": [-1]} for one in texts],
        "outputs": [{"name": one, "datatype": shapes[one][0], "shape": shapes[one][1]} for one in OUTPUTS[served.task]],
    }


def _parse(adapter: TypeAdapter[Any], body: bytes, inputs: str | None = None) -> Any:
    """Args: inputs: what `inputs` must be, in words, where it may be several things and each would be complained of."""
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if inputs and first["loc"][:1] == ("inputs",) and first["type"] != "missing":
            raise Refused(f"inputs must be {inputs}") from error
        raise Refused(f"{where}: {first['msg']}" if where else first["msg"]) from error


def _values(tensor: Tensor) -> list[str]:
    """The rows of a tensor of shape [N] or [N, 1], nested or flat."""
    flat = [one for value in tensor.data for one in ([value] if isinstance(value, str) else value)]
    if any(size < 0 for size in tensor.shape) or prod(tensor.shape) != len(flat):
        raise Refused(f"inputs: {tensor.name} has shape {tensor.shape}, and {len(flat)} values")
    if len(tensor.shape) == 2 and tensor.shape[1] != 1:
        raise Refused(f"inputs: {tensor.name} has shape {tensor.shape}; it must be [rows] or [rows, 1]")
    return flat


def _row(given: str | TextPair | Question) -> Row:
    if isinstance(given, str):
        return given, None
    return (given.text, given.text_pair) if isinstance(given, TextPair) else (given.question, given.context)


def _checked(rows: list[Row], served: Served, limits: Limits) -> list[Row]:
    if not rows:
        raise Refused("inputs: there are no rows")
    if len(rows) > limits.max_rows:
        raise Refused(f"inputs: {len(rows)} rows, at most {limits.max_rows} are answered at once", 413)
    for number, row in enumerate(rows):
        if served.pairs is True and row[1] is None:
            raise Refused(f"inputs: row {number} has no text_pair (of questions the context); this model needs one")
        if served.pairs is False and row[1] is not None:
            raise Refused(f"inputs: row {number} has a text_pair; this model reads one text")
        longest = max(len(text or "") for text in row)
        if longest > limits.max_characters:
            raise Refused(
                f"inputs: row {number} has {longest:,} characters, at most {limits.max_characters:,} are taken", 413
            )
    return rows


def _tensor(name: str, values: list[Any]) -> dict[str, Any]:
    if name in ("logits", "probabilities"):
        array = _padded(values)
        return {"name": name, "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
    if name == "label":
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        return {"name": name, "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    return {"name": name, "datatype": "FP32" if name == "score" else "INT64", "shape": [len(values)], "data": values}


def _padded(values: list[np.ndarray]) -> np.ndarray:
    """(B, C) or, of words, (B, W, C), short rows filled up with 0."""
    if values[0].ndim == 1:
        return np.stack(values)
    array = np.zeros((len(values), max(len(one) for one in values), values[0].shape[1]), dtype=np.float32)
    for row, own in zip(array, values, strict=True):
        row[: len(own)] = own
    return array


def _piped(served: Served, row: Row, answer: Answer, top_k: int | None) -> Any:
    if served.task == "question_answering":
        return {"score": answer["score"], "start": answer["start"], "end": answer["end"], "answer": answer["label"]}
    if served.task == "regression":
        return [{"label": "LABEL_0", "score": float(answer["logits"][0])}]
    if served.task == "token_classification":
        return [
            {
                "entity": tag,
                "score": float(probabilities.max()),
                "word": word.group(),
                "start": word.start(),
                "end": word.end(),
            }
            for word, tag, probabilities in zip(words_of(row[0]), answer["label"], answer["probabilities"], strict=True)
            if tag != "O"
        ]
    ranked = sorted(zip(served.labels, answer["probabilities"].tolist(), strict=True), key=lambda pair: -pair[1])
    return [{"label": label, "score": score} for label, score in ranked[:top_k]]
