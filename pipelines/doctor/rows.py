"""Checks of the rows: labels, copies between splits, lengths, unknown pieces, padding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset

from distill.augmentation import TextColumns, row_keys
from distill.families import positions
from distill.losses import Logits
from pipelines.doctor.finding import Finding, Level
from pipelines.doctor.preflight import TEXT_ROWS, Preflight

PLANNED_STEPS = 500
"""Steps of the first epoch whose padding is counted."""


def check_labels(preflight: Preflight) -> list[Finding]:
    """The balance of the training labels; classes that training never sees."""
    run = preflight.run
    train = run.data.splits["train"]
    if run.task.logits is Logits.VALUE:
        values = np.asarray(train["label"][:])
        message = f"numbers from {values.min():g} to {values.max():g}, standard deviation {values.std():.3g}"
        if values.std() > 0:
            return [Finding(Level.OK, "labels", message)]
        return [
            Finding(Level.WARNING, "labels", message, "Check data.label: there is nothing to learn from one value.")
        ]
    if run.task.logits is Logits.SPAN:
        empty = sum(not answers["text"] for answers in train["answers"][:])
        return [Finding(Level.OK, "labels", f"{empty / len(train):.0%} of {len(train):,} questions have no answer")]
    names = run.data.names
    counts = {split: _class_counts(rows, run.task.logits) for split, rows in run.data.splits.items()}
    total = len(train) if run.task.logits is Logits.BINARIES else sum(counts["train"].values())
    chosen, most = counts["train"].most_common(1)[0] if counts["train"] else (0, 0)
    share = most / max(total, 1)
    unit = "tokens" if run.task.logits is Logits.TOKEN_CLASSES else "rows"
    message = f"{len(names)} labels; the most frequent, {names[chosen]}, on {share:.0%} of {total:,} training {unit}"
    findings = [Finding(Level.OK, "labels", message)]
    if run.task.logits is Logits.CLASSES and share > 0.8:
        better = next(name for name in ("matthews", "f1_macro") if name in run.task.deciding_figures(names))
        remedy = "Read accuracy beside that share."
        if run.metric == "accuracy":
            remedy = f"Accuracy hardly tells a model from this answer: set task.metric={better}."
        findings = [Finding(Level.NOTE, "labels", message, remedy)]
    absent = [name for index, name in enumerate(names) if not counts["train"][index]]
    if absent:
        met = [name for name in absent if any(counts[split][names.index(name)] for split in counts)]
        findings.append(
            Finding(
                Level.WARNING,
                "labels",
                f"no training row has {', '.join(absent[:5])}{' and more' if len(absent) > 5 else ''}"
                + (f"; validation or test rows have {', '.join(met[:5])}" if met else ""),
                "Add training rows of them, or take them out of data.labels and the data.",
            )
        )
    return findings


def _class_counts(rows: Dataset, kind: Logits) -> Counter[int]:
    if kind is Logits.TOKEN_CLASSES:
        return Counter(chain.from_iterable(rows["tags"][:]))
    if kind is Logits.BINARIES:
        return Counter(dict(enumerate(np.sum(rows["label"][:], axis=0).astype(int).tolist())))
    return Counter(rows["label"][:])


def check_overlap(preflight: Preflight) -> list[Finding]:
    """Texts that stand in two splits, case and white space aside, over all rows."""
    splits = preflight.run.data.splits
    keys = {split: row_keys(_rows(rows), TextColumns.of(rows.column_names)) for split, rows in splits.items()}
    found = []
    for split, other, consequence in (
        ("test", "train", "the reported figures are partly of rows that trained"),
        ("validation", "train", "checkpoints are partly chosen by rows that trained"),
        ("test", "validation", "the reported figures are partly of rows that chose the checkpoint"),
    ):
        shared = len(keys[split] & keys[other])
        if not shared:
            continue
        share = shared / len(keys[split])
        found.append(
            Finding(
                Level.WARNING if share > 0.01 else Level.NOTE,
                "overlap",
                f"{shared:,} of {len(keys[split]):,} texts of {split} ({share:.1%}) also stand in {other}: "
                f"{consequence}",
                f"Remove the copies from {other}.",
            )
        )
    return found or [Finding(Level.OK, "overlap", "no text stands in two splits")]


def _rows(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Row by row, read in blocks: many times faster than the set's own iteration."""
    for block in rows.iter(batch_size=1000):
        columns = list(block)
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*block.values(), strict=True))


def check_truncation(preflight: Preflight) -> list[Finding]:
    """How many rows data.max_length cuts, and the length that would keep nearly all of them whole."""
    run = preflight.run
    limit = run.config.data.max_length
    if run.task.logits is Logits.SPAN:
        return [_check_questions(preflight)]
    lengths = {split: np.asarray(encoded["length"]) for split, encoded in preflight.uncut.items()}
    shares = {split: float((values > limit).mean()) for split, values in lengths.items()}
    most = max(shares.values())
    each = ", ".join(f"{split} {share:.1%}" for split, share in shares.items())
    message = f"rows longer than data.max_length={limit} pieces: {each} (of up to {TEXT_ROWS:,} rows a split)"
    if most <= 0.01:
        return [Finding(Level.OK, "truncation", message)]
    train = lengths["train"]
    wanted = -(-math.ceil(np.quantile(train, 0.99)) // 8) * 8
    possible = min(wanted, positions(run.checkpoint.config) or wanted)
    cost = np.minimum(train, possible).sum() / np.minimum(train, limit).sum()
    if possible <= limit:
        remedy = f"The teacher has positions for {possible} pieces: shorten the texts, or give a teacher with more."
    else:
        covered = float((train <= possible).mean())
        limited = ", all that the teacher has positions for," if possible < wanted else ""
        remedy = (
            f"data.max_length={possible}{limited} would keep {covered:.0%} of the training rows whole, for {cost:.1f} "
            "times the tokens."
        )
    return [Finding(Level.WARNING if most > 0.1 else Level.NOTE, "truncation", message, remedy)]


def _check_questions(preflight: Preflight) -> Finding:
    """Contexts lose nothing, they are cut into windows; questions may take half of a window."""
    run = preflight.run
    limit = run.config.data.max_length
    windows = len(run.encoded.features["train"]) / len(run.data.splits["train"])
    questions = preflight.texts("train")["question"][:]
    lengths = np.array([len(ids) for ids in run.tokenizer(questions, add_special_tokens=False)["input_ids"]])
    cut = float((lengths > limit // 2).mean())
    message = (
        f"{windows:.1f} windows a context; {cut:.1%} of the questions are longer than half of a window and are cut"
    )
    if cut <= 0.01:
        return Finding(Level.OK, "truncation", message)
    wanted = 2 * -(-math.ceil(np.quantile(lengths, 0.99)) // 8) * 8
    return Finding(Level.WARNING, "truncation", message, f"data.max_length={wanted} would keep 99% of them whole.")


def check_unknown_pieces(preflight: Preflight) -> list[Finding]:
    """The share of pieces that the tokenizer does not know."""
    tokenizer = preflight.run.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return [Finding(Level.OK, "unknown", "the tokenizer has no unknown piece: it spells every text")]
    frame = set(tokenizer.all_special_ids) - {unknown}
    ids = [piece for row in preflight.uncut["train"]["input_ids"] for piece in row if piece not in frame]
    share = ids.count(unknown) / max(len(ids), 1)
    message = f"{share:.2%} of {len(ids):,} training pieces are {tokenizer.unk_token}"
    if share <= 0.01:
        return [Finding(Level.OK, "unknown", message)]
    examples = ", ".join(repr(word) for word in _unknown_words(preflight, unknown))
    return [
        Finding(
            Level.WARNING if share > 0.05 else Level.NOTE,
            "unknown",
            f"{message}, for instance {examples}",
            "Give a teacher whose tokenizer knows this language and script, or clean the texts.",
        )
    ]


def _unknown_words(preflight: Preflight, unknown: int) -> list[str]:
    """The most frequent words with an unknown piece, of the sample's first rows."""
    columns = TextColumns.of(preflight.texts("train").column_names)
    first = _rows(preflight.texts("train").select(range(min(200, len(preflight.texts("train"))))))
    words = Counter(word for row in first for text in columns.texts_of(row) for word in text.split())
    encoded = preflight.run.tokenizer(list(words), add_special_tokens=False)["input_ids"]
    strange = {word: words[word] for word, ids in zip(words, encoded, strict=True) if unknown in ids}
    return [word[:20] for word, _ in Counter(strange).most_common(3)]


def check_padding(preflight: Preflight) -> list[Finding]:
    """Padding in the batches of the first epoch, as this process would meet them."""
    run = preflight.run
    name = "intermediate" if run.task_options.intermediate is not None else "logits"
    options = run.task_options.intermediate or run.task_options.logits
    assert options is not None
    batches = run.encoded.batches(run.encoded.features["train"], options)
    assert batches.steps_per_epoch is not None
    real = total = 0
    for items in batches.plan(0, min(batches.steps_per_epoch, PLANNED_STEPS)):
        lengths = batches.lengths[[row for row, _ in items]]
        real += int(lengths.sum())
        total += len(lengths) * batches.collator.width(lengths)
    share = 1 - real / total
    message = f"{share:.0%} of the pieces in training batches, which are sorted by length"
    if share <= 0.3:
        return [Finding(Level.OK, "padding", message)]
    remedy = (
        f"A few long rows lengthen their whole batch: lower data.max_length, or task.{name}.batch_size "
        f"({options.batch_size})."
    )
    return [Finding(Level.NOTE, "padding", message, remedy)]
