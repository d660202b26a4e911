"""What a student's first weights are worth: held-out distillation loss after N steps, and the figures after a short
training, for the ways of student.initialization. The ways are distill/initialization's, the training is the pipeline's.

    python -m benchmarks.initialization --data ../shared/data/trec --teacher TEACHER --output OUT.json

Two students: one of the shape given, and one of the teacher's own width, into which its layers can also be copied. All
rates and lengths are the same for every way. Weights are chosen on validation rows, held out of train by --split-seed
(that of the teacher's own run, or it has seen them); test rows are only reported. A cell (student, way, seed) is
written when it is finished, and skipped when the command is run again.

Keys of the JSON: settings; teacher (validation and test figure); cells, each with student, initialization, seed, loss
(by step, on validation rows, from before the intermediate phase on), start (validation figure before any training),
validation and test (figures after both phases), seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel
from transformers.utils import logging

from distill.checkpoint import write_json
from distill.config import IntermediateTraining, LogitsTraining, parse_config, to_plain
from distill.data import Batches
from distill.families import inner_width
from distill.initialization import adopt_head, initialize, sample_batches
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.losses import Match
from distill.objective import Objective
from distill.settings import UserError
from distill.students import StudentOptions, build_student, student_config
from distill.training import TrainingOptions, Validation, distillation_loss, fit, total_steps
from pipelines.run import Run, close_run, open_run

Cell = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all cells share. teacher: float32; frozen: the same in the precision of training. every: steps between
    two validations. steps: those at which the loss is reported."""

    run: Run
    teacher: PreTrainedModel
    frozen: PreTrainedModel
    intermediate: IntermediateTraining
    logits: LogitsTraining
    every: int
    steps: Sequence[int]

    def measure(self, options: StudentOptions, seed: int) -> Cell:
        """Build, initialise, both phases of the task stage, figures."""
        run, began = self.run, time.monotonic()
        set_seed(seed)
        config = student_config(self.teacher.config, options)
        student = build_student(config, run.task, options, self.teacher.config.hidden_size, seed)
        layers = build_layer_map(LayerMapOptions(), options.layers, self.teacher.config.num_hidden_layers)

        def batches(split: str, training: TrainingOptions) -> Batches:
            return Batches(run.encoded.features[split], run.encoded.collator, batch_size=training.batch_size, seed=seed)

        train = batches("train", self.intermediate)
        initialize(student, options.initialization, self.teacher, layers, sample_batches(train, run.device))
        student.to(run.device).eval()

        match = Match(layers, run.task.logits)
        objective = Objective(run.task_options.losses.intermediate(), match)
        held_out = batches("validation", self.intermediate)
        losses: list[float] = []

        def loss() -> dict[str, float]:
            figures = distillation_loss(student, self.frozen, objective, held_out, run.accelerator)
            losses.append(figures["loss"])
            return figures

        def figure(split: str) -> float:
            return run.encoded.figures(student.model, split)[run.metric]

        loss()
        start = figure("validation")
        checkpoints = run.checkpoints(student_name(options), options.initialization, str(seed))
        fit(
            student,
            self.frozen,
            objective,
            train,
            self.intermediate,
            run.session,
            name="intermediate",
            checkpoints=checkpoints,
            validation=Validation(loss, "loss", higher_is_better=False),
        )
        checkpoints.clear()
        adopt_head(student, self.teacher)
        fit(
            student,
            self.frozen,
            Objective(run.task_options.losses.prediction(), match),
            batches("train", self.logits),
            self.logits,
            run.session,
            name="logits",
            checkpoints=checkpoints,
            validation=run.encoded.validation(student.model),
        )
        checkpoints.clear()
        return {
            "student": student_name(options),
            "initialization": options.initialization,
            "seed": seed,
            "loss": {str(step): losses[step // self.every] for step in self.steps},
            "start": start,
            "validation": figure("validation"),
            "test": figure("test"),
            "seconds": round(time.monotonic() - began, 1),
        }


def student_name(options: StudentOptions) -> str:
    return f"{options.layers}L-{options.width}"


def open_bench(options: argparse.Namespace, folder: Path) -> Bench:
    """Data, teacher and training, checked.

    Raises:
        UserError: the data or the teacher cannot be used, or a step lies behind the end of training.
    """
    config = parse_config(
        {
            "output": str(folder),
            "seed": options.split_seed,
            "teacher": {"model": options.teacher},
            "data": {
                "path": "json",
                "data_files": {split: str(_file(options.data, split)) for split in ("train", "test")},
                "text": options.text,
                "label": options.label,
                "max_length": options.max_length,
            },
            "runtime": {"precision": options.precision},
        }
    )
    run = open_run(config)
    intermediate = IntermediateTraining(epochs=options.intermediate_epochs, learning_rate=5e-4)
    last = total_steps(intermediate, -(-len(run.encoded.features["train"]) // intermediate.batch_size))
    if max(options.steps) > last:
        raise UserError(f"--steps: {max(options.steps)}, but the intermediate phase has {last}. Name fewer steps.")
    # Validation comes once in so many steps, and each of --steps must be one of them.
    every = math.gcd(*options.steps) or last
    intermediate = replace(intermediate, evaluate_every_steps=every)
    logits = LogitsTraining(epochs=options.logits_epochs, learning_rate=1e-4)
    teacher, frozen = run.load_task_teacher(), run.frozen_for_training(run.load_task_teacher())
    return Bench(run, teacher, frozen, intermediate, logits, every, sorted(options.steps))


def _file(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl.gz", f"{split}.jsonl"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--data: {folder} holds no {split}.jsonl.gz or {split}.jsonl. Name a folder with both splits.")


def cells(options: argparse.Namespace, teacher: PreTrainedModel) -> Iterator[tuple[StudentOptions, int]]:
    """Every student, way and seed; seeds outermost, so that a stopped bench has every way of the first ones."""
    own = teacher.config
    shapes = {
        (options.width, options.heads, options.intermediate_size): ("random", "teacher"),
        (own.hidden_size, own.num_attention_heads, inner_width(own)): ("random", "layers", "teacher"),
    }
    for seed in options.seeds:
        for (width, heads, inner), ways in shapes.items():
            for way in ways:
                shape = {"layers": options.layers, "width": width, "heads": heads, "intermediate_size": inner}
                yield StudentOptions(**shape, dropout=0.0, initialization=way), seed


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure what the output file does not have yet, written after each cell.

    Raises:
        UserError: see open_bench; or the file was made with other settings.
    """
    opened = open_bench(options, folder)
    run = opened.run
    settings = {
        "data": run.data_hash,
        "rows": {split: len(rows) for split, rows in run.data.splits.items()},
        "teacher": run.teacher_hash,
        "metric": run.metric,
        "split_seed": options.split_seed,
        "max_length": options.max_length,
        "precision": run.config.runtime.precision,
        "device": run.device.type,
        "intermediate": to_plain(opened.intermediate),
        "logits": to_plain(opened.logits),
        "torch": torch.__version__,
    }
    result: dict[str, Any] = {"settings": settings, "teacher": {}, "cells": []}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
        other = sorted(key for key in settings if result["settings"].get(key) != settings[key])
        if other:
            raise UserError(f"--output: {options.output} was made with other {', '.join(other)}. Name another file.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if not result["teacher"]:
        figures = {split: run.encoded.figures(opened.teacher, split)[run.metric] for split in ("validation", "test")}
        result["teacher"] = figures
    due = list(cells(options, opened.teacher))
    done = {(cell["student"], cell["initialization"], cell["seed"]) for cell in result["cells"]}
    for number, (student, seed) in enumerate(due, start=1):
        key = (student_name(student), student.initialization, seed)
        if key not in done:
            print(f"cell {number} of {len(due)}: {key[0]}, {key[1]}, seed {seed}", file=sys.stderr, flush=True)
            result["cells"].append(opened.measure(student, seed))
            write_json(options.output, result)
    close_run(run)
    return result


def table(result: dict[str, Any]) -> Iterator[str]:
    """Mean and standard deviation over seeds, a line for each student and way."""
    metric = result["settings"]["metric"]
    steps = list(result["cells"][0]["loss"])
    yield (
        "| student | initialization | "
        + " | ".join(f"loss at {step}" for step in steps)
        + (f" | {metric} at 0 | validation {metric} | test {metric} | seeds |")
    )
    yield "|---" * (len(steps) + 6) + "|"
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in result["cells"]:
        groups.setdefault((cell["student"], cell["initialization"]), []).append(cell)
    for (student, way), members in groups.items():
        columns = [[cell["loss"][step] for cell in members] for step in steps]
        columns += [[cell[name] for cell in members] for name in ("start", "validation", "test")]
        shown = " | ".join(_spread(values) for values in columns)
        yield f"| {student} | {way} | {shown} | {len(members)} |"
    teacher = result["teacher"]
    yield f"teacher: validation {teacher['validation']:.4f}, test {teacher['test']:.4f}"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.initialization", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--text", default="sentence", help="column with the text")
    parser.add_argument("--label", default="label", help="column with the label")
    parser.add_argument("--teacher", required=True, help="checkpoint fine-tuned on these labels")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--split-seed", type=int, default=42, help="seed of the teacher's run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=312)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--intermediate-size", type=int, default=1200)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 300], help="where the loss is reported")
    parser.add_argument("--intermediate-epochs", type=float, default=3)
    parser.add_argument("--logits-epochs", type=float, default=2)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--output", type=Path, required=True, help="JSON; finished cells in it are kept")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="initialization-") as folder:
            result = bench(options, Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
