"""Compares our losses and gradients with those that the published TinyBERT code computed for the same models and batch.
Its figures are left to the folders that hold them; see tests/reference/README.md.

    python -m benchmarks.reference tests/reference/*/

A folder holds teacher/ and student/ (transformers checkpoints without dropout), projection.safetensors (weight, bias)
and expected.json: the batch (input_ids, attention_mask, token_type_ids), layer_map, and any of the figures. Exit
status: 0 all agree, 1 one differs, 2 a folder cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from distill.activations import Activations, Needs, capture
from distill.attention import show_attention
from distill.config import parse_config
from distill.layer_map import LayerMap
from distill.losses import Logits, LossTerm, Match, TaskLosses, check_models
from distill.objective import Objective
from distill.settings import UserError
from distill.students import Student

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def _published_losses() -> TaskLosses:
    task = parse_config({"preset": "reference"}).task
    assert task is not None
    return task.losses


PUBLISHED = _published_losses()


@dataclass(frozen=True)
class Figure:
    """One number of the published code, and ours."""

    name: str
    expected: float
    computed: float
    tolerance: float

    @property
    def difference(self) -> float:
        """|computed - expected| / |expected|."""
        return abs(self.computed - self.expected) / max(abs(self.expected), 1e-12)

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class _Reference:
    """A folder's content."""

    teacher: PreTrainedModel
    student: Student
    batch: dict[str, Tensor]
    attention: list[tuple[int, int]]
    hidden: list[tuple[int, int]]
    expected: dict[str, Any]


def compare(folder: Path) -> list[Figure]:
    """Every figure of the folder's expected.json beside ours.

    Raises:
        UserError: something in the folder is missing, unreadable or does not fit together.
    """
    reference = _read(folder)
    try:
        figures = list(_figures(reference))
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: expected.json does not fit the models or itself: {error}") from error
    if not figures:
        raise UserError(f"{folder / 'expected.json'}: it holds no figure to compare; see tests/reference/README.md.")
    return figures


def _figures(reference: _Reference) -> Iterator[Figure]:
    expected, teacher, student = reference.expected, reference.teacher, reference.student
    depths = student.model.config.num_hidden_layers, teacher.config.num_hidden_layers
    layers = tuple(pair for pair in reference.hidden if pair != (0, 0))
    everything = LayerMap(tuple(reference.attention), layers, *depths)

    needs = [Needs(hidden=frozenset(h), attention=frozenset(a)) for h, a in _sides(reference)]
    student_acts = student(reference.batch, needs[0])
    with torch.no_grad():
        teacher_acts = capture(teacher, reference.batch, needs[1])

    def value(term: LossTerm | None, layer_map: LayerMap) -> float:
        assert term is not None
        losses = term(student_acts, teacher_acts, reference.batch, Match(layer_map, Logits.CLASSES))
        return losses.double().mean().item()

    attention = [value(PUBLISHED.attention, LayerMap((pair,), (), *depths)) for pair in reference.attention]
    hidden = [
        value(PUBLISHED.embedding, everything)
        if pair == (0, 0)
        else value(PUBLISHED.hidden, LayerMap((), (pair,), *depths))
        for pair in reference.hidden
    ]
    for name, pairs, computed in (
        ("attention", reference.attention, attention),
        ("hidden", reference.hidden, hidden),
    ):
        for (m, g), ours, theirs in zip(pairs, computed, expected.get(name, []), strict=name in expected):
            yield Figure(f"{name} {m} <- {g}", float(theirs), ours, LOSS_TOLERANCE)
        if f"{name}_total" in expected:
            yield Figure(f"{name} total", float(expected[f"{name}_total"]), math.fsum(computed), LOSS_TOLERANCE)

    for key in expected:
        if found := re.fullmatch(r"soft_cross_entropy_t(\d+(?:\.\d+)?)", key):
            assert PUBLISHED.logits is not None
            term = replace(PUBLISHED.logits, temperature=float(found[1]))
            student_logits, teacher_logits = (
                Activations(logits=torch.tensor(expected[f"{side}_logits"])) for side in ("student", "teacher")
            )
            losses = term(student_logits, teacher_logits, reference.batch, Match(everything, Logits.CLASSES))
            yield Figure(key.replace("_", " "), float(expected[key]), losses.double().mean().item(), LOSS_TOLERANCE)

    norms = expected.get("gradient_norms_of_attention_plus_hidden", {})
    if norms:
        mapped = {"embedding": (0, 0) in reference.hidden, "attention": everything.attention, "hidden": layers}
        terms = {name: term for name, term in PUBLISHED.intermediate().items() if mapped[name]}
        objective = Objective(terms, Match(everything, Logits.CLASSES))
        objective(student_acts, teacher_acts, reference.batch).total.backward()
        for name, theirs in norms.items():
            yield Figure(f"gradient {name}", float(theirs), _gradient_norm(student, name), GRADIENT_TOLERANCE)


def _sides(reference: _Reference) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(hidden states, attention layers) of the student, then of the teacher."""
    for side in (0, 1):
        yield [pair[side] for pair in reference.hidden], [pair[side] for pair in reference.attention]


def _gradient_norm(student: Student, name: str) -> float:
    projection = {f"fit_dense.{key}": p for key, p in student.projections["shared"].named_parameters()}
    prefix = f"{student.model.base_model_prefix}."
    parameters = {**dict(student.model.named_parameters()), **projection}
    parameter = parameters.get(name.removeprefix(prefix))
    if parameter is None:
        raise UserError(f"gradient_norms_of_attention_plus_hidden: the student has no parameter {name}.")
    return 0.0 if parameter.grad is None else parameter.grad.double().norm().item()


def _read(folder: Path) -> _Reference:
    try:
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        batch = {
            name: torch.tensor(expected[name])
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in expected or name != "token_type_ids"
        }
        attention, hidden = ([(m, g) for m, g in expected["layer_map"][kind]] for kind in ("attention", "hidden"))
        projection = load_file(folder / "projection.safetensors")
        weight, bias = projection["weight"], projection.get("bias")
    except KeyError as error:
        raise UserError(f"{folder}: {error} is missing in expected.json or projection.safetensors.") from error
    except Exception as error:
        raise UserError(f"{folder} cannot be used: {error}") from error
    teacher, model = _load(folder / "teacher").requires_grad_(False), _load(folder / "student")
    if tuple(weight.shape) != (teacher.config.hidden_size, model.config.hidden_size):
        raise UserError(
            f"{folder}: the projection is {tuple(weight.shape)}, the teacher {teacher.config.hidden_size} and the "
            f"student {model.config.hidden_size} wide; its weight must be (teacher width, student width)."
        )
    check_models(PUBLISHED, str(folder), model.config, teacher.config)
    _check_pairs(folder, attention, hidden, model, teacher)
    shared = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    shared.load_state_dict(projection)
    batch["example_weight"] = torch.full((len(batch["input_ids"]),), 1 / len(batch["input_ids"]))
    return _Reference(teacher, Student(model, nn.ModuleDict({"shared": shared})), batch, attention, hidden, expected)


def _check_pairs(
    folder: Path,
    attention: list[tuple[int, int]],
    hidden: list[tuple[int, int]],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
) -> None:
    for kind, first, pairs in (("attention", 1, attention), ("hidden", 0, hidden)):
        for m, g in pairs:
            inside = first <= m <= student.config.num_hidden_layers and first <= g <= teacher.config.num_hidden_layers
            if not inside or (m == 0) != (g == 0):
                raise UserError(
                    f"{folder}: layer_map.{kind} has the pair [{m}, {g}]; layers count from 1 to "
                    f"{student.config.num_hidden_layers} in the student and {teacher.config.num_hidden_layers} in the "
                    "teacher, and embeddings (hidden 0) only go with embeddings."
                )


def _load(folder: Path) -> PreTrainedModel:
    """The encoder of a checkpoint, with or without a head over it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no checkpoint folder (no config.json in it).")
    try:
        model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UserError(f"{folder} lacks the weights {', '.join(missing[:3])}.")
    show_attention(model)
    encoder: PreTrainedModel = model.eval()
    return encoder


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every folder's figures; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="teacher/, student/, expected.json, ..."
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    status = 0
    for folder in parser.parse_args(arguments).folders:
        try:
            figures = compare(folder)
        except UserError as error:
            print(error, file=sys.stderr)
            status = 2
            continue
        width = max(len(figure.name) for figure in figures)
        print(f"{folder}\n{'':{width}}  {'expected':>14}  {'computed':>14}  relative difference")
        for figure in figures:
            note = "" if figure.agrees else f"  DIFFERS (more than {figure.tolerance:g})"
            row = f"{figure.expected:14.8g}  {figure.computed:14.8g}  {figure.difference:.1e}{note}"
            print(f"{figure.name:{width}}  {row}")
        if not all(figure.agrees for figure in figures):
            status = max(status, 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
