"""Stage augment: word-replacement augmentation of the training split, written as parquet shards by all processes.
The replacement itself is distill.augmentation's."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from tqdm.auto import tqdm

from distill.augmentation import (
    Augmenter,
    AugmentOptions,
    MaskedLM,
    TextColumns,
    find_masked_lm,
    load_masked_lm,
    mark_replaced,
    read_counts,
    row_keys,
    shard_paths,
    write_shards,
)
from distill.augmentation.adaptation import new_masked_lm
from distill.augmentation.filtering import TeacherFilter, check_filter
from distill.augmentation.replacement import Candidates
from distill.config import Config, to_plain
from distill.settings import UserError
from distill.teachers import resolve, weights_hash
from pipelines.masked_lm import model_folder
from pipelines.run import Run
from pipelines.stage import Stage, Work

SHARD_ROWS = 20_000
"""Augmented rows of a shard, about; the number of shards does not depend on the number of processes."""


class AugmentStage(Stage):
    name = "augment"
    after = ("masked_lm",)

    def is_on(self, config: Config) -> bool:
        return config.augment is not None and config.task is not None

    def reads(self, config: Config) -> tuple[str, ...]:
        filtered = config.augment is not None and config.augment.filter is not None
        return (*self.after, "teacher") if filtered else self.after

    def check(self, run: Run) -> None:
        if _options(run).filter is not None:
            check_filter(run.task)
        if run.config.teacher.adapt_masked_lm is None:
            found = masked_lm(run)
        else:  # the stage before makes it
            found = new_masked_lm(run.checkpoint.source, run.config.seed), run.checkpoint.tokenizer
        Candidates(_options(run), found, None)

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return {
            "augment": to_plain(_options(run)),
            "data": to_plain(run.config.data),
            "task.type": run.task_options.type,
            "teacher weights": run.teacher_hash,
            "seed": run.config.seed,
            "data content": run.data_hash,
        }

    def plan(self, run: Run) -> list[Work]:
        rows = len(run.data.splits["train"])
        filtered = f", kept where {_options(run).filter}" if _options(run).filter is not None else ""
        return [Work(self.name, f"{rows:,} rows, {_options(run).copies} copies each{filtered}")]

    def run(self, run: Run) -> dict[str, Any]:
        rows = run.data.splits["train"]
        columns = _columns(run)
        held_out = row_keys(run.data.splits["validation"], columns) | row_keys(run.data.splits["test"], columns)
        augmenter = Augmenter(
            rows,
            _options(run),
            columns=columns,
            seed=run.config.seed,
            masked_lm=masked_lm(run),
            excluded=held_out,
            keep=_teacher_filter(run),
            cache=run.folder / self.name / "neighbours",
        )
        if augmenter.candidates.masked is None:
            run.say(
                f"augment: {run.config.teacher.model} has no masked-LM head: candidates come from vectors alone "
                "(teacher.adapt_masked_lm={max_steps: 300} would train one)"
            )
        bar = tqdm(total=len(rows), desc=self.name, unit="row", dynamic_ncols=True, disable=not run.is_main)
        files = write_shards(
            augmented_folder(run),
            augmenter,
            count=_shards(run),
            fingerprint=_fingerprint(run, self.depends_on(run)),
            process=(run.placement.rank, run.placement.processes),
            # The bar counts this process's rows; the others do as many.
            progress=lambda done: _advance(bar, done * run.placement.processes),
        )
        bar.close()
        run.accelerator.wait_for_everyone()
        counts = dict(Counter(read_counts(files)))
        if augmenter.keep is not None:
            before = counts["kept"] + counts["filtered"]
            run.say(
                f"augment: the teacher's filter ({_options(run).filter}) kept {counts['kept']:,} of {before:,} copies"
            )
        return {"rows": len(rows), **counts}


def masked_lm(run: Run) -> MaskedLM | None:
    """The checkpoint named in augment.masked_lm, else what the stage masked_lm made, else the given teacher's own head,
    else none: vectors alone.

    Raises:
        UserError: the stage masked_lm is on and has not been done.
    """
    named = _options(run).masked_lm
    if named is not None:
        found: MaskedLM | None = load_masked_lm(resolve(named))
    elif run.config.teacher.adapt_masked_lm is None:
        found = find_masked_lm(run.checkpoint.source)
    elif model_folder(run).is_dir():
        found = load_masked_lm(str(model_folder(run)))
    else:
        raise UserError(
            f"teacher.adapt_masked_lm: {run.folder} holds no masked LM yet. Make it with `tinybert run CONFIG --stages "
            "masked_lm`, or set teacher.adapt_masked_lm to null."
        )
    if found is None:
        return None
    model, tokenizer = found
    return model.to(run.device), tokenizer


def training_rows(run: Run) -> Dataset:
    """The rows of task distillation: the training split, its augmentations where the stage is on, and text without
    labels where there is some."""
    rows = run.data.splits["train"]
    parts = [rows]
    if run.config.augment is not None:
        files = [str(path) for path in shard_paths(augmented_folder(run), _shards(run)) if read_counts([path])["kept"]]
        if files:
            with run.accelerator.main_process_first():
                augmented = load_dataset("parquet", data_files=files, split="train")
            parts.append(augmented.select_columns(rows.column_names).cast(rows.features))
    if run.unlabelled is not None:
        parts.append(run.unlabelled)
    return concatenate_datasets(parts) if len(parts) > 1 else rows


def samples(run: Run, count: int) -> list[tuple[str, str]]:
    """(source, augmented) texts of the first rows, one copy each, replaced words in [brackets]."""
    columns, rows = _columns(run), run.data.splits["train"]
    few = rows.select(range(min(len(rows), 2 * count)))
    augmenter = Augmenter(few, _options(run), columns=columns, seed=run.config.seed, masked_lm=masked_lm(run))
    found: list[tuple[str, str]] = []
    for row in augmenter.part(0, 1):
        if row["copy"] == 0:
            found += mark_replaced(few[row["source_row"]], row, columns, lambda word: f"[{word}]")
    return found[:count]


def augmented_folder(run: Run) -> Path:
    return run.folder / "augment" / "data"


def _columns(run: Run) -> TextColumns:
    outside = run.data.names.index("O") if "O" in run.data.names else 0
    return TextColumns.of(run.data.splits["train"].column_names, outside=outside)


def _teacher_filter(run: Run) -> TeacherFilter | None:
    if _options(run).filter is None:
        return None
    return TeacherFilter(
        run.load_task_teacher(),
        run.task_teacher.tokenizer,
        run.task,
        run.data.splits["train"],
        _options(run),
        max_length=run.config.data.max_length,
        batch_size=run.config.evaluate.batch_size,
    )


def _fingerprint(run: Run, inputs: Mapping[str, Any]) -> str:
    """Of all that the rows follow from: the inputs, and what stages before have made."""
    made = []
    if run.config.teacher.adapt_masked_lm is not None:
        made.append(weights_hash(str(model_folder(run))))
    if _options(run).filter is not None:
        made.append(weights_hash(run.task_teacher.source))
    return hashlib.sha256(json.dumps([inputs, made], sort_keys=True).encode()).hexdigest()


def _shards(run: Run) -> int:
    return max(1, -(-len(run.data.splits["train"]) * _options(run).copies // SHARD_ROWS))


def _advance(bar: Any, done: int) -> None:
    bar.update(min(done, bar.total) - bar.n)


def _options(run: Run) -> AugmentOptions:
    if run.config.augment is None:
        raise UserError("augment: the section is null; set it, for instance augment={copies: 20}.")
    return run.config.augment
