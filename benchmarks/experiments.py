"""The recipe by experiment: one choice of it changed at a time, at equal data and time, judged on validation rows.
Questions, and what was decided, stand in experiment_questions.py; tasks and training are those of quality.py.

    python -m benchmarks.experiments --data ../shared/data --work runs/quality
    python -m benchmarks.experiments --data ../shared/data --work runs/quality --only rates,trec,0 --size tiny
    python -m benchmarks.experiments --report

A run is a task, a way (a base, or a choice changed) and a seed; it is written to
benchmarks/results/experiments.json when it is finished and skipped when the command is given again. --only takes
questions, tasks and seeds: of each kind that is named, nothing else is run but the ways they are compared with.
--report writes docs/experiments.md from the JSON alone.

No test row is read. What is reported is the figure by which the weights were chosen, the best of some, and a little
high for every way alike; ways are compared in pairs, by task and seed. What a step costs is kept beside the figures, in
experiments_step_seconds_PRECISION.json: ways that cost the same take as many steps, whenever they are run. Machines
with bf16 products take many more in the time than those without, and have tables of their own.

Keys of the JSON: runs, each with task, way, size, seed, budget_seconds, value, metric, steps, training_seconds,
cpu_seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: the figures are of one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
from transformers.utils import logging

from benchmarks.experiment_questions import BASE, QUESTIONS, START, TASK_NAMES
from benchmarks.quality_cells import Cell, measure
from benchmarks.quality_tasks import SIZES, TASKS, runtime
from benchmarks.run_file import Run, chosen, costs_of, locked, read_runs
from distill.checkpoint import write_json, write_text
from distill.settings import UserError

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results" / "experiments.json", ROOT.parent / "docs" / "experiments.md"
PREFACE = """# Experiments

What each choice of the recipe is worth. Written by `python -m benchmarks.experiments --report` from
`benchmarks/results/experiments.json`; `benchmarks/experiment_questions.py` has each way's settings.

Each run trains for as much time on one thread as is said over the table, its first weights included; how many steps
that is follows from what a step costs, measured once in each precision (a step in bf16 takes about half as long; the
120 seconds were measured on a busier machine and are fewer steps than they could be, as many for each way of the same
cost). From 180 seconds on the teacher is asked about the rows once, paid out of the time too, where they come more than
once (all tasks here but sst2); before, it ran in every step. A figure is the best on validation rows, the mean over as
many seeds as stand behind it; no test row was read. Teachers in bf16 are others than in fp32: trec 0.9487 in both, stsb
0.8604 (fp32: 0.8580), wnut17 0.5544 (0.5649).
`change` is the mean over pairs (task, seed) of 100 (way / base - 1), with its standard error over the pairs; the base
is `two-phases`, of ways called `found-...` `joint-balance-1e-3`.

`tiny-5600` is the tiny student that came before: 5,600 pieces in embeddings as wide as the layers (216), 800 inside.
How `tiny` was chosen, by hand at equal steps, stands in [vocabulary.md](vocabulary.md).
"""
SIZE, SECONDS, SEEDS = "3L-312", 300.0, (0, 1)
"""Where none is named. The size is that of runs, too, that do not say theirs."""


def grid(questions: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """(way, task, seed), seed by seed, so that a stopped search has all ways."""
    bases = dict.fromkeys(QUESTIONS[name].base for name in questions)
    ways = list(dict.fromkeys([*bases, *(way for name in questions for way in QUESTIONS[name].ways)]))
    for seed in seeds:
        for way in ways:
            for task in tasks:
                yield way, task, seed


def run(
    way: str, task: str, size: str, seed: int, seconds: float, data: Path, work: Path, costs: Path
) -> dict[str, Any]:
    """Train a student this way for so long; its figures."""
    system, costs_like = START, None
    for question in QUESTIONS.values():
        if way in question.ways:
            system = question.ways[way](system)
            costs_like = question.costs_like
    cell = Cell(TASKS[task], way, system, size, seed, seconds, costs_like)
    figures = measure(cell, data, work, costs, reported="validation")
    kept = ("value", "metric", "steps", "training_seconds", "cpu_seconds", "precision", "cpu")
    asked = {"task": task, "way": way, "size": size, "seed": seed, "budget_seconds": seconds}
    return {**asked, **{key: figures[key] for key in kept}}


def _key(run: Run) -> tuple[Any, ...]:
    return run["way"], run["task"], run["seed"], *_table(run)


def _table(run: Run) -> tuple[str, float, str]:
    """What runs of one table have in common."""
    return run.get("size", SIZE), run["budget_seconds"], run["precision"]


def report(runs: Sequence[Run]) -> str:
    """docs/experiments.md."""
    lines = [PREFACE]
    for size, budget, precision in sorted(set(map(_table, runs))):
        own = [run for run in runs if _table(run) == (size, budget, precision)]
        lines += [f"{size}, {budget:g} seconds in {precision}:", ""]
        tasks = [name for name in TASK_NAMES if any(run["task"] == name for run in own)]
        lines += [_table_head(own, tasks), "|---|" + "---|" * (len(tasks) + 3)]
        if any(run["way"] == BASE for run in own):
            lines.append(_row("", BASE, BASE, own, tasks, ""))
        for question in QUESTIONS.values():
            known = [way for way in question.ways if any(run["way"] == way for run in own)]
            texts = [(question.asks, question.decision), *[("", "")] * len(known)]
            lines += [
                _row(asks, way, question.base, own, tasks, told)
                for way, (asks, told) in zip(known, texts, strict=False)
            ]
        lines += ["", f"Measured on: {'; '.join(sorted({run['cpu'] for run in own}))}.", ""]
    missing = [way for question in QUESTIONS.values() for way in question.ways if way not in {r["way"] for r in runs}]
    if missing:
        lines += [f"Not run: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _table_head(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    metrics = {run["task"]: run["metric"] for run in runs}
    return "| question | way | " + " | ".join(f"{task} ({metrics[task]})" for task in tasks) + " | change | decision |"


def _row(asks: str, way: str, base: str, runs: Sequence[Run], tasks: Sequence[str], decision: str) -> str:
    own = [run for run in runs if run["way"] == way]
    figures = []
    for task in tasks:
        values = [run["value"] for run in own if run["task"] == task]
        figures.append(f"{statistics.fmean(values):.4f} ({len(values)})" if values else "not run")
    return f"| {asks} | `{way}` | {' | '.join(figures)} | {change(own, runs, base)} | {decision} |"


def change(own: Sequence[Run], runs: Sequence[Run], base: str = BASE) -> str:
    """Mean and standard error, in percent, over the pairs with the base's runs; empty for the base itself."""
    known = {(run["task"], run["seed"]): run["value"] for run in runs if run["way"] == base}
    pairs = [
        100 * (run["value"] / known[key] - 1)
        for run in own
        if run["way"] != base and (key := (run["task"], run["seed"])) in known
    ]
    if len(pairs) < 2:
        return "".join(f"{pair:+.2f} (1 pair)" for pair in pairs)
    return f"{statistics.fmean(pairs):+.2f} ± {statistics.stdev(pairs) / math.sqrt(len(pairs)):.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with trec/, stsb/, ...; rows as JSON lines, gzipped")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="teachers and what is being trained")
    parser.add_argument("--only", action="append", default=[], metavar="NAME,...", help="questions, tasks, seeds")
    parser.add_argument("--size", choices=list(SIZES), default=SIZE, help="of the student; %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training a student; %(default)s")
    parser.add_argument("--report", action="store_true", help="write docs/experiments.md; train nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON; finished runs in it are kept")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        questions, tasks, seeds = chosen(options.only, [list(QUESTIONS), TASK_NAMES, [str(seed) for seed in SEEDS]])
        if options.report:
            if not (runs := read_runs(options.output)):
                raise UserError(f"--output: {options.output} holds no runs yet. Give --data, and measure some.")
            write_text(PAGE, report(runs))
            print(report(runs))
            return 0
        if options.data is None or not options.data.is_dir():
            raise UserError("--data: give the folder that holds trec/, stsb/ and the others.")
        options.work.mkdir(parents=True, exist_ok=True)
        precision = runtime()["precision"]
        costs = costs_of(options.output, precision)
        for way, task, seed in grid(questions, tasks, list(map(int, seeds))):
            if (way, task, seed, options.size, options.seconds, precision) in map(_key, read_runs(options.output)):
                continue
            found = run(way, task, options.size, seed, options.seconds, options.data, options.work, costs)
            with locked(options.output):
                write_json(options.output, {"runs": [*read_runs(options.output), found]})
            print(f"{way} {task} seed {seed}: {found['metric']} {found['value']:.4f}", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
