"""Whether the fast step costs quality: students trained by fit and by the published step written plainly, from the same
first weights, for the same epochs and rates, by their figures on test rows.

    python -m benchmarks.step_quality --data ../shared/data/trec --teacher TEACHER --output OUT.json

Ours is the task stage's training with the default losses, in the precision that is measured faster; theirs is
benchmarks/literal.py in float32, every row padded to one length. Both take all rows once an epoch, in orders of their
own, at the default schedule of rates; both keep their last weights. A seed is written when it is finished, and skipped
when the command is run again.

Keys of the JSON: settings; teacher (test figure); cells, each with system (ours, literal), seed, test, seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn
from transformers.utils import logging

from benchmarks.initialization import Bench, open_bench
from benchmarks.literal import Literal
from distill.checkpoint import write_json
from distill.data import Batches, Collator
from distill.initialization import adopt_head, initialize, sample_batches
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.losses import Match
from distill.objective import Objective
from distill.optimizer import learning_rate_factor
from distill.settings import UserError
from distill.students import Student, StudentOptions, build_student, student_config
from distill.training import TrainingOptions, fit
from pipelines.run import close_run

# The published student has one projection, with bias; so has ours here.
SHAPE = StudentOptions(
    layers=3,
    width=312,
    heads=12,
    intermediate_size=1200,
    dropout=0.0,
    initialization="teacher",
    projection="shared",
    projection_bias=True,
)


def first_student(bench: Bench, seed: int) -> Student:
    set_seed(seed)
    run, teacher = bench.run, bench.teacher
    student = build_student(student_config(teacher.config, SHAPE), run.task, SHAPE, teacher.config.hidden_size, seed)
    rows = Batches(run.encoded.features["train"], run.encoded.collator, batch_size=32, seed=seed)
    layers = build_layer_map(LayerMapOptions(), SHAPE.layers, teacher.config.num_hidden_layers)
    initialize(student, SHAPE.initialization, teacher, layers, sample_batches(rows, run.device))
    return student.to(run.device)


def ours(bench: Bench, student: Student, seed: int) -> None:
    run = bench.run
    match = Match(
        build_layer_map(LayerMapOptions(), SHAPE.layers, bench.teacher.config.num_hidden_layers), run.task.logits
    )
    losses = run.task_options.losses
    phases: list[tuple[str, Any, TrainingOptions]] = [
        ("intermediate", losses.intermediate(), bench.intermediate),
        ("logits", losses.prediction(), bench.logits),
    ]
    for name, terms, options in phases:
        if name == "logits":
            adopt_head(student, bench.teacher)
        checkpoints = run.checkpoints(name, str(seed))
        batches = Batches(run.encoded.features["train"], run.encoded.collator, batch_size=options.batch_size, seed=seed)
        fit(
            student,
            bench.frozen,
            Objective(terms, match),
            batches,
            options,
            run.session,
            name=name,
            checkpoints=checkpoints,
        )
        checkpoints.clear()


def literal(bench: Bench, student: Student, seed: int, length: int) -> None:
    rows = bench.run.encoded.features["train"]
    collate = Collator(bench.run.tokenizer, bench.run.task, length=length)
    (projection,) = student.projections.values()
    assert isinstance(projection, nn.Linear)
    random = np.random.default_rng(seed)
    for options, phase in ((bench.intermediate, "intermediate_step"), (bench.logits, "logits_step")):
        if phase == "logits_step":
            adopt_head(student, bench.teacher)
        student.train()
        system = Literal(student.model, bench.teacher, projection, options.learning_rate)
        size = options.batch_size
        per_epoch = -(-len(rows) // size)
        steps = int(options.epochs * per_epoch)
        for step in range(steps):
            if step % per_epoch == 0:
                order = random.permutation(len(rows))
            rate = learning_rate_factor(options.schedule, step, steps, round(options.warmup_fraction * steps))
            for group in system.optimizer.param_groups:
                group["lr"] = options.learning_rate * rate
            taken = order[step % per_epoch * size : (step % per_epoch + 1) * size].tolist()
            getattr(system, phase)(collate(rows[taken], [1 / len(taken)] * len(taken)))
    student.eval()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bench = open_bench(options, folder)
    run = bench.run
    settings = {
        "data": run.data_hash,
        "teacher": run.teacher_hash,
        "metric": run.metric,
        "intermediate_epochs": options.intermediate_epochs,
        "logits_epochs": options.logits_epochs,
        "literal_length": options.literal_length,
        "threads": torch.get_num_threads(),
    }
    result: dict[str, Any] = {"settings": settings, "teacher": None, "cells": []}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
        if result["settings"] != settings:
            raise UserError(f"--output: {options.output} was made with other settings. Name another file.")
    if result["teacher"] is None:
        result["teacher"] = run.encoded.figures(bench.teacher, "test")[run.metric]
    done = {(cell["system"], cell["seed"]) for cell in result["cells"]}
    for seed in options.seeds:
        first = first_student(bench, seed)
        for system in ("ours", "literal"):
            if (system, seed) in done:
                continue
            student, began = copy.deepcopy(first), time.monotonic()
            if system == "ours":
                ours(bench, student, seed)
            else:
                literal(bench, student, seed, options.literal_length)
            figure = run.encoded.figures(student.model, "test")[run.metric]
            seconds = round(time.monotonic() - began, 1)
            result["cells"].append({"system": system, "seed": seed, "test": figure, "seconds": seconds})
            write_json(options.output, result)
            print(f"{system:8} seed {seed}: {figure:.4f} in {seconds:.0f} s", flush=True)
    close_run(run)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--text", default="sentence", help="column with the text")
    parser.add_argument("--label", default="label", help="column with the label")
    parser.add_argument("--teacher", required=True, help="checkpoint fine-tuned on these labels")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--literal-length", type=int, default=48, help="what the plain step pads every row to")
    parser.add_argument("--split-seed", type=int, default=42, help="seed of the teacher's run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--intermediate-epochs", type=int, default=2)
    parser.add_argument("--logits-epochs", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="JSON; finished seeds in it are kept")
    options = parser.parse_args(arguments)
    options.precision, options.steps = "auto", [0]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="step-quality-") as folder:
            result = measure(options, Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for system in ("ours", "literal"):
        found = [cell["test"] for cell in result["cells"] if cell["system"] == system]
        print(f"{system}: {statistics.fmean(found):.4f} ± {statistics.stdev(found) if len(found) > 1 else 0:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
