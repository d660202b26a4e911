"""One run for each task type, and students with and without augmented rows: two tables of docs/results.md.

    python -m benchmarks.task_types --data ../shared/data --work runs/task_types
    python -m benchmarks.task_types --data ../shared/data --work runs/task_types --only stsb,augmentation-trec
    python -m benchmarks.task_types --report

Every run is `scripts/distill.py configs/bbc_news.yaml` with other data, printed as it is started; its log and folder
lie under --work. A finished one is written to benchmarks/results/task_types.json and skipped when the command is given
again, a stopped one goes on from its checkpoint. One thread each: two commands with other --only share two cores.
--report prints the tables from the JSON alone. Where a set has no validation split, a tenth of its training rows
(of data.validation_split, seed 42) chooses the weights; squad_slices has no test split either, and its validation split
is reported.

Keys of the JSON: runs, each with name, seed, commit, metric, arguments, figures (of each model's test rows), seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.run_file import Run, locked, read_runs
from distill.checkpoint import write_json
from distill.settings import UserError

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "task_types.json"
BASE = ("configs/bbc_news.yaml", "general=null", "data.path=json", "runtime.cpu_threads=1", "tracking=[]")
FIRST_RATE, LAST_RATE = 5e-4, 1e-4
SEEDS = (1, 2, 3)
COPIES = 10
SENTENCE = ("data.text=sentence", "data.label=label")
PAIR = ("data.text=sentence1", "data.text_pair=sentence2", "data.label=label")


@dataclass(frozen=True)
class Row:
    """A set of the first table. epochs: of the intermediate phase, the logits phase, the student on labels alone."""

    task: str
    metric: str
    settings: Sequence[str]
    epochs: tuple[float, float, float]
    copies: int = 0


ROWS: Mapping[str, Row] = {
    "stsb": Row("regression", "pearson", (*PAIR, "data.max_length=96"), (2, 1.5, 12), 2),
    "mrpc": Row("single_label_classification", "accuracy", (*PAIR, "data.max_length=96"), (1.5, 1, 6), 2),
    "agnews": Row("single_label_classification", "accuracy", (*SENTENCE, "data.max_length=96"), (1.5, 1.5, 4)),
    "goemotions": Row("multi_label_classification", "f1_micro", (*SENTENCE, "data.max_length=48"), (0.5, 0.75, 1.25)),
    "wnut17": Row(
        "token_classification", "f1", ("data.text=tokens", "data.label=ner_tags", "data.max_length=64"), (5, 4, 12)
    ),
    "squad_slices": Row(
        "question_answering",
        "f1",
        ("data.text=question", "data.text_pair=context", "data.label=answers", "data.max_length=256"),
        (1, 1, 1.5),
    ),
}
# Settings, then the steps of both phases, with and without augmented rows.
AUGMENTATION: Mapping[str, tuple[Sequence[str], tuple[int, int]]] = {
    "trec": ((*SENTENCE, "data.max_length=48"), (600, 400)),
    "mrpc": ((*PAIR, "data.max_length=96"), (450, 230)),
}


@dataclass(frozen=True)
class Call:
    """A run of the pipeline: where its figures stand in the JSON, and the arguments behind scripts/distill.py."""

    name: str
    seed: int
    metric: str
    folder: Path
    arguments: Sequence[str]

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.seed


def calls(only: Sequence[str], data: Path, work: Path) -> Iterator[Call]:
    """What there is to run, teachers before their students."""
    for name, row in ROWS.items():
        if not only or name in only:
            first, last, alone = row.epochs
            arguments = (
                *_files(data / name),
                *row.settings,
                f"task.type={row.task}",
                f"augment={f'{{copies: {row.copies}}}' if row.copies else 'null'}",
                f"task.intermediate={{epochs: {first}, learning_rate: {FIRST_RATE}}}",
                f"task.logits={{epochs: {last}, learning_rate: {LAST_RATE}}}",
                f"evaluate.undistilled_training={{epochs: {alone}, learning_rate: {FIRST_RATE}}}",
            )
            yield Call(name, 42, row.metric, work / name, arguments)
    for name, (settings, steps) in AUGMENTATION.items():
        if not only or f"augmentation-{name}" in only:
            yield from _with_and_without(name, (*_files(data / name), *settings), steps, work)


def _with_and_without(name: str, settings: Sequence[str], steps: tuple[int, int], work: Path) -> Iterator[Call]:
    metric, teacher = "accuracy", work / f"{name}-teacher"
    yield Call(f"{name} teacher", 42, metric, teacher, (*settings, "augment=null", "--stages", "teacher"))
    for seed in SEEDS:
        for way, augment in (("without", "null"), ("with", f"{{copies: {COPIES}}}")):
            arguments = (
                *settings,
                f"teacher.model={teacher / 'teacher' / 'model'}",
                "teacher.training=null",
                f"seed={seed}",
                f"augment={augment}",
                f"task.intermediate={{max_steps: {steps[0]}, learning_rate: {FIRST_RATE}}}",
                f"task.logits={{max_steps: {steps[1]}, learning_rate: {LAST_RATE}}}",
                "evaluate.undistilled=false",
            )
            yield Call(f"{name} {way}", seed, metric, work / f"{name}-{way}-{seed}", arguments)


def _files(folder: Path) -> Iterator[str]:
    if not (folder / "train.jsonl.gz").is_file():
        raise UserError(f"--data: {folder} holds no train.jsonl.gz. Give the folder that holds {folder.name}/.")
    splits = {split: folder / f"{split}.jsonl.gz" for split in ("train", "validation", "test")}
    if not splits["test"].is_file():
        splits = {"train": splits["train"], "test": splits["validation"]}
    for split, file in splits.items():
        if file.is_file():
            yield f"data.data_files.{split}={file}"


def run(call: Call, work: Path) -> Run:
    """Start it, or let it go on, and read its figures.

    Raises:
        UserError: it failed; its log says why.
    """
    command = ["scripts/distill.py", *BASE, *call.arguments, "--output", str(call.folder)]
    print("python", *(f"'{part}'" if "{" in part else part for part in command), flush=True)
    log = work / f"{call.folder.name}.log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=out, check=False
        )
    if done.returncode:
        raise UserError(f"{call.name}, seed {call.seed}: exit status {done.returncode}; {log} says why.")
    summary = json.loads((call.folder / "summary.json").read_text(encoding="utf-8"))
    models = ("teacher", "student", "undistilled_student")
    return {
        "name": call.name,
        "seed": call.seed,
        "commit": _commit(),
        "metric": call.metric,
        "arguments": [part.replace(f"{work}/", "") for part in call.arguments if "data_files" not in part],
        "figures": {name: summary[name]["metrics"] for name in models if "metrics" in summary.get(name, {})},
        "seconds": round(time.monotonic() - began),
    }


def _commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def add_run(file: Path, new: Run) -> None:
    """Beside those of another process that may be writing too."""
    with locked(file):
        write_json(file, {"runs": sorted([*read_runs(file), new], key=lambda run: (run["name"], run["seed"]))})


def tables(runs: Sequence[Run]) -> str:
    """Both tables in Markdown, of what there is."""
    lines = ["| set | metric | teacher | student | kept | labels alone | commit |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        if run["name"] in ROWS:
            teacher, student, alone = (run["figures"][model][run["metric"]] for model in run["figures"])
            lines.append(
                f"| {run['name']} | {run['metric']} | {teacher:.4f} | {student:.4f} | {student / teacher:.1%} | "
                f"{alone:.4f} | {run['commit']} |"
            )
    lines += ["", "| set | without | with | teacher | seeds | commit |", "|---|---|---|---|---|---|"]
    for name in AUGMENTATION:
        ways = {way: [run for run in runs if run["name"] == f"{name} {way}"] for way in ("without", "with")}
        if all(len(group) > 1 for group in ways.values()):
            own = ways["with"][0]
            lines.append(
                f"| {name} | {' | '.join(_spread(group) for group in ways.values())} | "
                f"{own['figures']['teacher'][own['metric']]:.4f} | {len(ways['with'])} | {own['commit']} |"
            )
    return "\n".join(lines)


def _spread(group: Sequence[Run]) -> str:
    values = [run["figures"]["student"][run["metric"]] for run in group]
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.task_types", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with stsb/, mrpc/, ...; rows as JSON lines, gzipped")
    parser.add_argument("--work", type=Path, default=Path("runs/task_types"), help="run folders and logs")
    known = [*ROWS, *(f"augmentation-{name}" for name in AUGMENTATION)]
    parser.add_argument("--only", default="", metavar="NAME,...", help=", ".join(known))
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON; finished runs in it are kept")
    parser.add_argument("--report", action="store_true", help="print the tables; run nothing")
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    try:
        if not options.report:
            if unknown := [name for name in only if name not in known]:
                raise UserError(f"--only: {unknown[0]!r} is none of {', '.join(known)}.")
            if options.data is None or not options.data.is_dir():
                raise UserError("--data: give the folder that holds stsb/, mrpc/ and the others.")
            work = options.work.resolve()
            work.mkdir(parents=True, exist_ok=True)
            for call in calls(only, options.data.resolve(), work):
                if call.key not in {(run["name"], run["seed"]) for run in read_runs(options.output)}:
                    add_run(options.output, run(call, work))
        print(tables(read_runs(options.output)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
