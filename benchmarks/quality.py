"""What students keep of their teachers: seven tasks, a teacher each, systems and student sizes at equal data and time.
Tasks and shapes are quality_tasks.py's, what learns quality_systems.py's, one run quality_cells.py's, tables and plot
quality_report.py's.

    python -m benchmarks.quality --data ../shared/data --work runs/quality
    python -m benchmarks.quality --data ../shared/data --work runs/quality --only trec,sst2 --only default,tiny,0
    python -m benchmarks.quality --report

Every run is written to benchmarks/results/quality.json when it is finished and skipped when the command is given again,
unless its system has changed since; a stopped one goes on from its checkpoint. --only takes names of tasks, systems and
sizes, and seeds: of each kind that is named, nothing else is run. --report writes the section of docs/results.md and
its plot from the JSON alone.

A student's training steps take --seconds of processor time on one thread (`more-text` has budgets of its own), which is
what the clock shows where nothing else runs; how many that is follows from the step's cost, probed once and kept beside
the figures in quality_step_seconds.json: another machine trains as many steps. What making the first weights takes is
paid out of the budget, as are augmented rows and one pass of the teacher over the rows where its answers are kept;
validation, test and loading come on top. Weights are chosen on validation rows, which are in neither training nor test.
No system has general distillation; augmentation has `default` where tokens are classified, and `more-text`.

Keys of the JSON: runs, each with task, system, size, seed, budget_seconds, recipe (a stamp of the system and of the
student's shape), value (of the task's metric on the reported rows), teacher (its teacher's value), validation, metrics,
parameters, steps, training_seconds and cpu_seconds; rows, made of them: task, system, student, metric, seeds, mean,
deviation, seconds, parameters, retention, old_recipe.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: the figures are of one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
from transformers.utils import logging

from benchmarks.quality_cells import Cell, measure, measure_teacher
from benchmarks.quality_report import write_report
from benchmarks.quality_systems import SYSTEMS, budget_of, fits, recipe
from benchmarks.quality_tasks import SIZES, TASKS
from benchmarks.run_file import Run, chosen, costs_of, locked, read_runs
from distill.checkpoint import write_json
from distill.settings import UserError

RESULTS = Path(__file__).parent / "results" / "quality.json"
SECONDS = 120.0
SEEDS = (0, 1, 2)
ONE_SEED = ("paper", "reference", "textbrewer-cut", "more-text")
"""Systems that are run with the first seed alone, unless another is asked for."""
QUICK = ("trec", "mrpc", "bbc_news"), ("undistilled", "default"), (0,), 60.0
TEACHER = "teacher"


def grid(
    tasks: Iterable[str], systems: Iterable[str], sizes: Iterable[str], seeds: Iterable[int], seconds: float | None
) -> list[Run]:
    """What there is to measure, in the order in which it is: teachers, then seed by seed. seconds: every student's
    budget; where not given, the system's own, or the comparison's."""
    tasks, systems, sizes = list(tasks), list(systems), list(sizes)
    cells = [{"task": task, "system": TEACHER, "size": TEACHER, "seed": 42, "budget_seconds": None} for task in tasks]
    for seed in seeds:
        for size in sizes:
            for task in tasks:
                cells += [
                    {
                        "task": task,
                        "system": system,
                        "size": size,
                        "seed": seed,
                        "budget_seconds": seconds or budget_of(system, TASKS[task]) or SECONDS,
                    }
                    for system in systems
                    if system in SYSTEMS and fits(system, size)
                ]
    return cells


def add_run(file: Path, run: Run) -> None:
    """Put a run beside those of others who may be writing too, in the place of all seeds of a recipe that its system no
    longer has, and make the rows anew."""
    with locked(file):
        replaced = [_key(run), *(_key(other) for other in read_runs(file) if _same_row(other, run) and is_old(other))]
        runs = [other for other in read_runs(file) if _key(other) not in replaced] + [run]
        write_json(file, {"rows": summarise(runs), "runs": sorted(runs, key=_key)})


def summarise(runs: Sequence[Run]) -> list[Run]:
    """A row for each task, system, student and budget: mean and standard deviation (n - 1) over seeds; retention is the
    mean of the values over those of the teachers that taught them."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in sorted(runs, key=_key):
        groups.setdefault(_key(run)[:4], []).append(run)
    rows = []
    for (task, system, size, budget), group in groups.items():
        values = [run["value"] for run in group]
        mean = statistics.fmean(values)
        rows.append(
            {
                "task": task,
                "system": system,
                "student": size,
                "metric": group[0]["metric"],
                "seeds": len(values),
                "mean": mean,
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "seconds": statistics.fmean(run["training_seconds"] for run in group),
                "budget_seconds": budget or None,
                "parameters": group[0]["parameters"],
                "retention": _retention(group),
                "old_recipe": any(map(is_old, group)),
            }
        )
    return rows


def is_old(run: Run) -> bool:
    """Whether the run's system or its student's shape has changed since."""
    return run.get("recipe") != recipe(run["system"], run["size"])


def _retention(group: Sequence[Run]) -> float | None:
    """None where a teacher's value is 0, and of the teacher itself."""
    if not all(run.get("teacher") for run in group):
        return None
    return statistics.fmean(run["value"] / run["teacher"] for run in group)


def _same_row(one: Run, other: Run) -> bool:
    return _key(one)[:-1] == _key(other)[:-1]


def _key(run: Run) -> tuple[Any, ...]:
    return run["task"], run["system"], run["size"], run.get("budget_seconds") or 0.0, run["seed"]


def run_cells(cells: Sequence[Run], data: Path, work: Path, output: Path) -> None:
    """Measure what is not in `output` yet."""
    work.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        name = f"{cell['task']} {cell['system']} {cell['size']} seed {cell['seed']}"
        if _key(cell) in {_key(run) for run in read_runs(output) if not is_old(run)}:
            print(f"{name}: done before", flush=True)
            continue
        task = TASKS[cell["task"]]
        if cell["system"] == TEACHER:
            figures = measure_teacher(task, data, work)
        else:
            system = cell["system"]
            asked = Cell(task, system, SYSTEMS[system], cell["size"], cell["seed"], cell["budget_seconds"])
            figures = measure(asked, data, work, costs_of(output))
            figures["teacher"] = measure_teacher(task, data, work)["value"]
        add_run(output, {**cell, "recipe": recipe(cell["system"], cell["size"]), **figures})
        print(f"{name}: {figures['metric']} {figures['value']:.4f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with sst2/, mrpc/, ...; rows as JSON lines, gzipped")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="teachers and what is being trained")
    parser.add_argument("--only", action="append", default=[], metavar="NAME,...", help="tasks, systems, sizes, seeds")
    parser.add_argument(
        "--seconds", type=float, help=f"of training a student; {SECONDS:g} where not given (more-text: its own)"
    )
    parser.add_argument("--quick", action="store_true", help="three tasks, two systems, one seed, a minute each")
    parser.add_argument("--report", action="store_true", help="write docs/results.md's section and plot; train nothing")
    parser.add_argument("--output", type=Path, help="the JSON; finished runs in it are kept")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    output = options.output or (options.work / "quick.json" if options.quick else RESULTS)
    try:
        if not options.report:
            if options.data is None or not options.data.is_dir():
                raise UserError("--data: give the folder that holds sst2/, mrpc/ and the others.")
            tasks, systems, seeds, seconds = QUICK if options.quick else (TASKS, SYSTEMS, SEEDS, None)
            kinds = [list(tasks), [TEACHER, *systems], list(SIZES), [str(seed) for seed in seeds]]
            tasks, systems, sizes, numbers = chosen(options.only, kinds)
            cells = grid(tasks, systems, sizes, map(int, numbers), options.seconds or seconds)
            asked = {name for part in options.only for name in part.split(",")}
            cells = [
                cell
                for cell in cells
                if cell["system"] in systems
                and (cell["system"] not in ONE_SEED or cell["seed"] == seeds[0] or str(cell["seed"]) in asked)
            ]
            run_cells(cells, options.data, options.work, output)
        write_report(output, summarise(read_runs(output)), write=options.report)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
