"""The words and tables of a model card, one function a section.
The metadata above them is metadata.py's, what they are made of facts.py's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from distill.config import LogitsTraining, to_plain
from distill.export.markdown import code, plain, table, text
from distill.losses.term import LossTerm
from distill.training import TrainingOptions
from pipelines.card.facts import Facts
from pipelines.card.metadata import model_name, tested_split
from pipelines.card.recipe import HIDDEN, recipe
from pipelines.card.usage import onnx_code, transformers_code

MOST_LABELS = 20
"""So many are written out."""
TASKS = {
    "single_label_classification": "the classification of texts",
    "multi_label_classification": "the classification of texts that may have several labels",
    "regression": "scores of texts",
    "token_classification": "the classification of words",
    "question_answering": "extractive question answering",
}
FIRST_WEIGHTS = {
    "teacher": "cut out of the teacher's",
    "layers": "copied from the teacher's layers",
    "random": "random",
}


def body(facts: Facts) -> str:
    """Everything below the metadata, in Markdown; it ends with a line break."""
    sections = {
        None: _summary(facts),
        "How to use it": _use(facts),
        "How it was distilled": _distillation(facts),
        "Results": _results(facts),
        "Time and size": _time(facts),
        "Limits": _limits(facts),
        "Versions and how to reproduce it": _reproduction(facts),
    }
    parts = [f"# {text(model_name(facts))}"]
    for title, paragraphs in sections.items():
        found = list(paragraphs)
        parts += [f"## {title}", *found] if title is not None and found else found
    return "\n\n".join(parts) + "\n"


def _summary(facts: Facts) -> Iterator[str]:
    student, config = facts.student, facts.config
    does = "features of texts" if config.task is None else TASKS[config.task.type]
    yield (
        f"A small {text(student['model_type'].upper())} for {does}: {student['num_hidden_layers']} layers, "
        f"{student['hidden_size']} wide, {student['num_attention_heads']} heads, distilled from {_teacher(facts)}."
    )
    labels = facts.origins.get("labels", [])
    if labels:
        more = f" and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else ""
        yield f"Its {len(labels)} labels: {', '.join(map(text, labels[:MOST_LABELS]))}{more}."
    if facts.evaluated is not None and facts.evaluated.get("retention") is not None:
        metric = facts.origins["metric"]
        own, given = (facts.evaluated[who]["metrics"][metric] for who in ("student", "teacher"))
        yield (
            f"It keeps {facts.evaluated['retention']:.1%} of its teacher's {metric} on the test rows: {own:.4f} of "
            f"{given:.4f}."
        )


def _teacher(facts: Facts) -> str:
    """What may be said of it: its name where others know it, else its shape alone."""
    shape, kind = facts.origins["teacher"], facts.origins["names"].get("teacher.model")
    words = f"{shape['layers']} layers, {shape['width']} wide"
    name = text(facts.config.teacher.model)
    if kind == "hub":
        at = f", revision {text(shape['revision'])}" if "revision" in shape else ""
        return f"[{name}](https://huggingface.co/{facts.config.teacher.model}) ({words}{at})"
    return f"{name} ({words})" if kind == "packaged" else f"a {text(shape['family'])} that is not published ({words})"


def _use(facts: Facts) -> Iterator[str]:
    yield "With plain `transformers`:"
    yield code(transformers_code(facts), "python")
    onnx = onnx_code(facts)
    if onnx is not None:
        yield "With ONNX Runtime 1.23 or later, which is faster on a CPU:"
        yield code(onnx, "python")


def _distillation(facts: Facts) -> Iterator[str]:
    config, results = facts.config, facts.results
    rows = facts.origins.get("rows")
    if rows is not None:
        counts = f"{rows['train']:,} training, {rows['validation']:,} validation and {rows['test']:,} test rows"
        notes = "".join(f" {text(note).capitalize()}." for note in facts.origins["notes"])
        yield f"Data: {_data(facts, 'data', config.data.path, config.data.name)}, {counts}.{notes}"
    if config.general is not None:
        corpus = config.general.corpus
        yield f"Unlabelled text for general distillation: {_data(facts, 'general.corpus', corpus.path, corpus.name)}."
    if config.task is not None and config.task.unlabelled is not None and "unlabelled_rows" in results.get("task", {}):
        more, count = config.task.unlabelled, results["task"]["unlabelled_rows"]
        source = _data(facts, "task.unlabelled", more.path, more.name)
        yield f"Unlabelled text for task distillation, answered by the teacher: {source}, {count:,} rows."
    if config.augment is not None and "augment" in results:
        found = results["augment"]
        yield (
            f"Augmentation: {config.augment.copies} copies of each training row with words replaced (each with "
            f"probability {config.augment.probability:g}); {found['kept']:,} copies were kept."
        )
    yield table(
        ("stage", "steps", "examples a step", "peak rate", "tokens"),
        [
            (
                name,
                f"{figures['steps']:,}",
                f"{options.batch_size:,}",
                f"{options.learning_rate:g}",
                f"{figures['tokens']:,}",
            )
            for name, options, figures in _trainings(facts)
        ],
    )
    yield "\n".join(f"- {stage}: {', '.join(map(_term, terms, terms.values()))}" for stage, terms in _losses(facts))
    how = config.student.initialization
    yield (
        f"Layers: {text(facts.origins['layer_map'])}, counted from 1. First weights: "
        f"{FIRST_WEIGHTS.get(how, 'those of another checkpoint')}."
    )
    if facts.origins.get("metric") is not None:
        yield f"Weights were chosen by {facts.origins['metric']} on the validation rows."


def _data(facts: Facts, key: str, path: str, name: str | None) -> str:
    kind = facts.origins["names"].get(f"{key}.path")
    words = text(path) + (f" / {text(name)}" if name is not None else "")
    if kind == "hub":
        return f"[{words}](https://huggingface.co/datasets/{path})"
    return words if kind == "packaged" else "rows that are not published"


def _trainings(facts: Facts) -> Iterator[tuple[str, TrainingOptions, Mapping[str, Any]]]:
    """The stages that trained: name, settings, figures."""
    config, results = facts.config, facts.results
    if config.teacher.training is not None and "teacher" in results:
        yield "teacher, on labels", config.teacher.training, results["teacher"]
    if config.general is not None and "general" in results:
        yield "general", config.general.training, results["general"]
    for name, figures in results.get("task", {}).get("phases", {}).items():
        options = getattr(config.task, name)
        if options is not None:  # a result that is older than the config has phases of its own
            yield f"task, {name}", options, figures


def _losses(facts: Facts) -> Iterator[tuple[str, Mapping[str, LossTerm]]]:
    config = facts.config
    if config.general is not None:
        yield "general", config.general.losses.intermediate()
    if config.task is not None:
        for phase, terms in config.task.terms().items():
            yield f"task, {phase}", terms


def _term(name: str, term: LossTerm) -> str:
    """Its name, weight and form, as the config calls them."""
    settings = to_plain(term)
    weight = settings.pop("weight")
    form = "".join(f", {key} {text(value)}" for key, value in settings.items())
    return f"{name} (weight {weight:g}{form})"


def _results(facts: Facts) -> Iterator[str]:
    found = facts.evaluated
    if found is None:
        yield "It was not tested on a task: what it learned is its teacher's layers."
        return
    metric = facts.origins["metric"]
    names = sorted(found["student"]["metrics"], key=lambda name: name != metric)
    whose = {"teacher": "teacher", "student": "this student", "undistilled_student": "same student, labels alone"}
    rows = [
        (
            words,
            *(_figure(found[who]["metrics"].get(name)) for name in names),
            f"{found[who]['parameters'] / 1e6:.2f} M",
        )
        for who, words in whose.items()
        if who in found
    ]
    yield table(("model", *(f"`{name}`" for name in names), "parameters"), rows)
    split = tested_split(facts)
    source = (
        f"the source's {text(split)} split" if split is not None else "rows held out of the source's training split"
    )
    yield (
        f"On {facts.origins['rows']['test']:,} test rows ({source}), which chose no weights. "
        f"One run, seed {facts.config.seed}: how much the figures vary with the seed was not measured."
    )
    if "undistilled_student" in found:
        given = facts.config.evaluate.undistilled_training
        yield (
            "The last row is the same shape from random weights, trained on the labels of the same rows without a "
            f"teacher{_for_how_long(given)}."
        )
    if facts.artefacts:
        yield "\n\n".join(_artefacts(facts))


def _for_how_long(given: LogitsTraining | None) -> str:
    if given is None:
        return ", for as many steps as distillation took on the task"
    amount = f"{given.max_steps:,} steps" if given.max_steps is not None else f"{given.epochs:g} epochs"
    return f", for {amount} at a peak rate of {given.learning_rate:g}"


def _figure(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else ""


def _artefacts(facts: Facts) -> Iterator[str]:
    metric = facts.origins["metric"]
    yield f"The artefacts for ONNX Runtime on the {facts.origins['rows']['validation']:,} validation rows:"
    yield table(
        ("format", f"`{metric}`", "largest difference of a logit", "predictions that differ"),
        [
            (
                name if "recipe" not in figures else f"{name} ({figures['recipe'].replace('_', ' ')})",
                _figure(figures["validation"].get(metric)),
                f"{figures['agreement']['largest_difference']:.2g}",
                f"{figures['agreement']['differing_predictions']:,}",
            )
            for name, figures in facts.artefacts.items()
        ],
    )


def _time(facts: Facts) -> Iterator[str]:
    sizes = [("`model.safetensors`", facts.weights["bytes"])]
    sizes += [(name, figures["bytes"]) for name, figures in facts.artefacts.items()]
    yield table(("file", "MB"), [(name, f"{size / 1e6:.1f}") for name, size in sizes])
    yield f"SHA-256 of `model.safetensors`: `{facts.weights['sha256']}`"
    if facts.benchmark is not None:
        yield from _benchmark(facts.benchmark)
    elif facts.evaluated is not None and "machine" in facts.evaluated:
        found = facts.evaluated
        times = {"teacher": "teacher", "student": "this student"}
        rows = [(words, f"{found[who]['latency_ms']:.1f}") for who, words in times.items()]
        yield table(("model", "ms a row, PyTorch"), rows)
        yield f"Median of single test rows on {_machine(found['machine'])}, which may have been busy with other work."


def _benchmark(found: Mapping[str, Any]) -> Iterator[str]:
    threads = min(one["threads"] for model in found["models"] for one in model["latency"])
    lengths = sorted({one["length"] for model in found["models"] for one in model["latency"]})
    rows = []
    for model in found["models"]:
        times = {one["length"]: one for one in model["latency"] if one["threads"] == threads}
        cells = [f"{times[length]['p50_ms']:.2f} ({times[length]['p95_ms']:.2f})" for length in lengths]
        rows.append((text(model["name"]), *cells, f"{model['bytes'] / 1e6:.1f}"))
    yield f"Milliseconds of one row by its word pieces, {_threads(threads)}, p50 (p95):"
    yield table(("model", *map(str, lengths), "MB"), rows)
    yield f"On {_machine(found['machine'])}. Inputs: {text(found['inputs'])}."


def _machine(found: Mapping[str, Any]) -> str:
    parts = [plain(found["cpu"]), f"{found['cores']} core{'s' if found['cores'] != 1 else ''}"]
    parts += [f"on {found['device']}"] if found.get("device", "cpu") != "cpu" else []
    parts += [_threads(found["threads"])] if "threads" in found else []
    return text(", ".join([*parts, f"{found['memory_gb']:g} GB", found["system"]]))


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _limits(facts: Facts) -> Iterator[str]:
    limits = []
    if facts.evaluated is not None:
        length = facts.config.data.max_length
        limits += [
            "It was tested on the rows above alone; texts of other origin, style or language are unknown ground.",
            f"It reads {length} word pieces of a text; what follows was cut off in training and in testing.",
        ]
        if (cut := facts.results.get("task", {}).get("vocabulary")) is not None:
            limits.append(
                f"It knows {cut['pieces']:,} of its teacher's {cut['teacher_pieces']:,} word pieces, those of its "
                "training text; other words are spelt in shorter ones."
            )
        if facts.origins["labels"]:
            limits.append("How far its probabilities can be trusted (calibration) was not measured.")
    limits.append("It learned from its teacher's answers: the teacher's mistakes and biases are in it.")
    if "int8" in facts.artefacts:
        limits.append(
            "The int8 artefact was checked on validation rows on one machine; processors without int8 dot products "
            "(VNNI) may give other answers."
        )
    yield "\n".join(f"- {limit}" for limit in limits)


def _reproduction(facts: Facts) -> Iterator[str]:
    versions = ", ".join(f"{text(name)} {text(found)}" for name, found in facts.origins["versions"].items())
    yield f"Made with {versions}."
    shown = recipe(facts.config, facts.origins["names"])
    hidden = f", once `{HIDDEN}` is replaced," if HIDDEN in shown else ""
    yield f"`tinybert run config.yaml` with these settings{hidden} repeats the run:"
    yield code(shown, "yaml")
