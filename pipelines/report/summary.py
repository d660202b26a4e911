"""The top of a report: what the student keeps of the teacher, and what it costs, in a sentence, tiles and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from pipelines.report.answers import Test
from pipelines.report.blocks import Block, Head, Missing, Table, Text, Tile
from pipelines.report.record import Record
from pipelines.report.uncertainty import difference_interval
from pipelines.run import Run

LABELS = {"teacher": "teacher", "student": "student", "undistilled_student": "same student, labels alone"}
UNKNOWN = "?"
TOLERANCE = 1e-6
"""How far a figure of summary.json may be from the one computed anew: sums of float32 in another order."""


def head(run: Run, record: Record, test: Test | None, teacher: PreTrainedModel, student: PreTrainedModel) -> Head:
    """Of a run with a task from its test rows, of general distillation alone from what there is."""
    sizes = {"teacher": _sizes(teacher), "student": _sizes(student)}
    if test is None:
        return Head(
            "A general student, without a task",
            [
                (
                    "General distillation alone gives an encoder, not answers: there is no metric, no test row and no "
                    "confusion to show. What can be seen is how its losses fell and where it looks."
                )
            ],
            [_size_tile(sizes)],
        )
    models = _models(record, test, sizes)
    kept, own = (models[who]["metrics"][test.metric] for who in ("teacher", "student"))
    blocks: list[Block] = [_table(models, test), *_artefacts(record, test), *_notes(record, test)]
    sentences = [*_sentences(run, models, test), *_chance(test, own - kept)]
    return Head(_headline(kept, own, test.metric), sentences, _tiles(record, models, test), blocks)


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    weights = list(model.parameters())
    return {
        "parameters": sum(one.numel() for one in weights),
        "bytes": sum(one.numel() * one.element_size() for one in weights),
    }


def _models(record: Record, test: Test, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
    """Figures of the stage evaluate; the metrics of teacher and student are those found now."""
    known = record.results.get("evaluate", {})
    models = {who: dict(known[who]) for who in LABELS if who in known}
    for who, answers in test.sides():
        models[who] = {**models.get(who, {}), **sizes[who], "metrics": answers.metrics}
    return {who: models[who] for who in LABELS if who in models}


def _headline(teacher: float, student: float, metric: str) -> str:
    if teacher <= 0:
        return f"The teacher's {metric} is {teacher:.4f}: there is nothing to keep"
    kept = student / teacher
    return (
        f"The student keeps {kept:.1%} of the teacher's {metric}"
        if kept > 0
        else f"The student's {metric} is {student:.4f}"
    )


def _sentences(run: Run, models: Mapping[str, Mapping[str, Any]], test: Test) -> Iterator[str]:
    figure = {who: of["metrics"][test.metric] for who, of in models.items()}
    against = f"{figure['student']:.4f} against {figure['teacher']:.4f} on {len(test):,} test rows"
    if "undistilled_student" in figure:
        gain = (figure["student"] - figure["undistilled_student"]) * 100
        yield (
            f"{against}. The same student trained on the labels alone reaches {figure['undistilled_student']:.4f}: "
            f"distillation {'gives' if gain >= 0 else 'costs'} {abs(gain):.1f} points."
        )
    else:
        off = not run.config.evaluate.undistilled
        why = "evaluate.undistilled: false" if off else "the stage evaluate has not finished"
        yield f"{against}. There is no student trained on the labels alone to compare with ({why})."


def _chance(test: Test, difference: float) -> Iterator[str]:
    """Whether other test rows could have turned the difference round."""
    interval = difference_interval(test)
    if interval is not None and interval != (0.0, 0.0):
        low, high = (end * 100 for end in interval)
        may = "may be" if low <= 0 <= high else "is more than"
        yield (
            f"On {len(test):,} rows a difference of {difference * 100:+.1f} points {may} chance: 95% interval "
            f"{low:+.1f} to {high:+.1f} points, over resampled test rows."
        )


def _tiles(record: Record, models: Mapping[str, Mapping[str, Any]], test: Test) -> list[Tile]:
    teacher, student = models["teacher"], models["student"]
    own, other = student["metrics"][test.metric], teacher["metrics"][test.metric]
    tiles = [
        Tile(f"test {test.metric}", f"{own:.4f}", f"teacher {other:.4f} ({(own - other) * 100:+.1f} points)"),
        _size_tile(models),
    ]
    if student.get("latency_ms") and "latency_ms" in teacher:
        faster = teacher["latency_ms"] / student["latency_ms"]
        detail = f"teacher {teacher['latency_ms']:.1f} ms ({faster:.1f}x), PyTorch"
        tiles.append(Tile("one row", f"{student['latency_ms']:.1f} ms", detail))
    if "int8" in (made := _made(record)):
        file = made["int8"]
        detail = f"{file['bytes'] / teacher['bytes']:.0%} of the teacher; {file['latency_ms']:.1f} ms a row"
        tiles.append(Tile("as int8 file", f"{file['bytes'] / 1e6:.1f} MB", detail))
    return tiles


def _size_tile(models: Mapping[str, Mapping[str, Any]]) -> Tile:
    own, other = (models[who]["bytes"] for who in ("student", "teacher"))
    return Tile("weights", f"{own / 1e6:.1f} MB", f"teacher {other / 1e6:.1f} MB ({own / other:.0%})")


def _made(record: Record) -> Mapping[str, Any]:
    """Exported files by format."""
    made: Mapping[str, Any] = record.results.get("export", {}).get("artefacts", {})
    return made


def _table(models: Mapping[str, Mapping[str, Any]], test: Test) -> Table:
    others = [name for name in models["student"]["metrics"] if name != test.metric]
    names = [test.metric, *others]

    def cells(of: Mapping[str, Any]) -> Iterator[str]:
        yield from (f"{of['metrics'][name]:.4f}" if name in of["metrics"] else UNKNOWN for name in names)
        yield f"{of['parameters'] / 1e6:.2f} M"
        yield f"{of['bytes'] / 1e6:.1f}"
        yield f"{of['latency_ms']:.1f}" if "latency_ms" in of else UNKNOWN

    rows = [(LABELS[who], *cells(of)) for who, of in models.items()]
    note = "ms: median of one forward at batch 1 in PyTorch, on the machine that ran the evaluation."
    return Table("Models", ("model", *names, "parameters", "MB", "ms"), rows, note)


def _artefacts(record: Record, test: Test) -> Iterator[Block]:
    """Files for a server: what export measured, and the benchmark where there is one."""
    rows = [
        (
            name,
            f"{one['validation'][test.metric]:.4f}",
            f"{one['agreement']['differing_predictions']:,} of {one['validation_rows']:,}",
            f"{one['bytes'] / 1e6:.1f}",
            f"{one['latency_ms']:.1f}",
        )
        for name, one in sorted(_made(record).items(), reverse=True)
    ]
    if rows:
        heads = ("file", f"validation {test.metric}", "other answers", "MB", "ms")
        yield Table(
            "Exported student",
            heads,
            rows,
            "On the validation rows, by the stage export; other answers: than PyTorch's; ms: a row in ONNX Runtime.",
        )
    if record.benchmark is not None:
        yield _benchmark(record.benchmark)
    if not rows and record.benchmark is None:
        yield Missing("The student was not exported to ONNX or int8; tinybert export RUN --to onnx,int8 does that.")


def _benchmark(figures: Mapping[str, Any]) -> Table:
    """Latency of one row at the fewest threads and the greatest length."""
    rows = []
    entry: Mapping[str, Any] = {}
    for model in figures["models"]:
        entry = min(model["latency"], key=lambda one: (one["threads"], -one["length"]))
        test = UNKNOWN if not figures["metric"] else f"{model['test'][figures['metric']]:.4f}"
        rows.append(
            (model["name"], test, f"{model['bytes'] / 1e6:.1f}", f"{entry['p50_ms']:.2f}", f"{entry['p95_ms']:.2f}")
        )
    note = f"One row of {entry['length']} pieces, {entry['threads']} thread(s), on {figures['machine']['cpu']}."
    return Table("Benchmark", ("model", f"test {figures['metric']}", "MB", "p50 ms", "p95 ms"), rows, note)


def _notes(record: Record, test: Test) -> Iterator[Block]:
    """What a reader must know of the figures."""
    notes = [str(note) for note in record.summary.get("notes", [])]
    if notes:
        yield Text(f"Of the data: {'; '.join(notes)}.")
    if "evaluate" not in record.results:
        yield Missing("The stage evaluate has not finished: times and the undistilled student are not known.")
        return
    for who, answers in test.sides():
        before = record.results["evaluate"][who]["metrics"].get(test.metric)
        now = answers.metrics[test.metric]
        if before is not None and abs(before - now) > TOLERANCE:
            yield Missing(
                f"When the run was evaluated, the {who}'s {test.metric} was {before:.4f}; computed anew it is "
                f"{now:.4f}. Its data or its weights have changed since: tinybert evaluate RUN."
            )
