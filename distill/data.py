"""From files to batches: loading and splitting, tokenising, length-aware batches, collation.
What a row means is left to tasks/, checking it to rows.py; the unlabelled corpus of the general stage to corpus.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from distill import bbc_news, tiny
from distill.rows import canonical_rows, check_forms
from distill.settings import UserError, settings
from distill.spelling import Spelling
from distill.tasks import Columns, TaskType

EMBEDDED = {"bbc_news": bbc_news, "tiny": tiny}
"""Sets that need no file: the packaged BBC News, and generated sentences."""
SPLITS = ("train", "validation", "test")
BATCH_COLUMNS = ("input_ids", "token_type_ids", "labels", "teacher_logits")
"""What training batches take of encoded rows."""


@settings
class SourceOptions:
    path: str = "bbc_news"
    """A `datasets.load_dataset` builder (json, csv, parquet, text), a hub name (glue, imdb), or one of the embedded
    sets bbc_news and tiny."""
    name: str | None = None
    """The hub set's configuration, for instance sst2."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files for a builder; a mapping from train, validation and test to files, or one file that becomes train."""
    text: str | None = None
    """Column with the text; a list of tokens for token classification; the question for question answering."""


@settings
class DataOptions(SourceOptions):
    splits: dict[str, str | None] | None = None
    """Names of the source's splits where they differ, for instance {validation: validation_matched}."""
    text_pair: str | None = None
    """Column with the second text of a pair; the context for question answering."""
    label: str | None = None
    """Column with the label; a list for multi-label and token classification; the answers for question answering."""
    labels: list[str] | None = None
    """Label names in the order of their numbers; found in the training split where not given."""
    validation_split: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows held out where the source lacks a split to choose checkpoints by."""
    max_length: int = Field(default=128, ge=16)
    """Word pieces a text (or pair) is cut to, special ones included."""
    padding: Literal["longest", "max_length"] = "longest"
    """What training batches are padded to: their longest row; or max_length, as in the published code, which changes
    figures only where a loss includes padding."""
    max_train_rows: PositiveInt | None = None
    """Use a random sample of the source's training rows."""

    def columns(self) -> Columns:
        return Columns(self.text, self.text_pair, self.label)


@dataclass(frozen=True)
class TaskData:
    """Canonical rows by split. Checkpoints are chosen on validation, figures are reported on test."""

    splits: DatasetDict
    names: tuple[str, ...]
    notes: tuple[str, ...]
    """What a reader of the figures must know, for instance where the test rows came from."""


def load_task_data(options: DataOptions, task: TaskType, seed: int) -> TaskData:
    """Load, split, check.

    Where a source has no labelled test split its validation split is reported instead, and the rows that choose
    checkpoints are held out of training, so that no figure is ever reported on rows that chose a checkpoint.

    Raises:
        UserError: an unreadable file, a missing column, a wrong row, an empty split.
    """
    source = load_source(options, options.splits)
    if "train" not in source:
        raise UserError(f"data.splits: there is no train split; the source has {', '.join(source)}. Name it there.")
    for split, rows in source.items():
        if not len(rows):
            raise UserError(f"data.data_files: the {split} split is empty. Give it rows, or leave the split out.")
    mapping = task.columns(options.columns(), source["train"].column_names)
    label = mapping.get("tags") or mapping.get("answers") or mapping["label"]
    try:
        labels = source["train"][label][:]
    except UnicodeDecodeError as error:
        raise UserError(f"data.label: column {label!r} of train: {error}. Save the file as UTF-8.") from None
    places = {split: _place(options, split) for split in source}
    if task.has_names:
        check_forms(labels, task, label, places["train"])
    names = list(options.labels or task.label_names(labels, source["train"].features[label]))
    if options.labels and not task.has_names:
        raise UserError(f"data.labels: a {task.name} has no label names. Leave data.labels out, or correct task.type.")
    if task.has_names and len(names) < 2:
        raise UserError(f"data.label: column {label!r} of train holds {len(names)} label(s); a task needs two or more.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"data.labels: {twice!r} stands twice. Give every label its own name.")
    checked = {
        split: canonical_rows(rows, task, options.columns(), names, places[split])
        for split, rows in source.items()
        if split in SPLITS
    }
    column = next(iter({"tags", "answers", "label"} & set(checked["train"].column_names)))
    notes: list[str] = []
    if "test" in checked and all(map(task.is_withheld, checked["test"][column][:])):
        del checked["test"]
        notes.append("the labels of the source's test split are withheld")
    if task.has_names:  # elsewhere -1 may be a true value
        for split, rows in checked.items():
            _refuse_withheld(rows[column][:], places[split], task)
    if options.max_train_rows is not None and options.max_train_rows < len(checked["train"]):
        checked["train"] = checked["train"].shuffle(seed=seed).select(range(options.max_train_rows))
        notes.append(f"{options.max_train_rows:,} training rows were sampled")
    checked = _complete(checked, options.validation_split, seed, notes)
    return TaskData(DatasetDict(checked), tuple(names), tuple(notes))


def load_source(
    options: SourceOptions,
    splits: Mapping[str, str | None] | None = None,
    *,
    key: str = "data",
    named_by: str = "data.splits",
    streaming: bool = False,
) -> Any:
    """The source's splits under this project's names, rows untouched: a DatasetDict, or streams.

    Args:
        key: where the options stand in a config.
        named_by: the setting that names the splits.
    """
    if options.path in EMBEDDED:
        if options.data_files is not None:
            raise UserError(
                f"{key}.path: the embedded set {options.path} reads no file, and {key}.data_files names some. Set "
                f"{key}.path to json, csv, parquet or text."
            )
        return EMBEDDED[options.path].load()
    if isinstance(options.data_files, dict):
        for name in options.data_files:
            if name not in SPLITS:
                raise UserError(f"{key}.data_files: {name!r} is not a split; use {', '.join(SPLITS)} as the keys.")
    for file in _files(options.data_files):
        if "://" not in file and "*" not in file and not Path(file).exists():
            raise UserError(f"{key}.data_files: {file} does not exist (relative paths start at {Path.cwd()}).")
    try:
        loaded = load_dataset(options.path, options.name, data_files=options.data_files, streaming=streaming)
    except Exception as error:  # datasets raises a dozen unrelated types for a file it cannot read
        raise unreadable(options, key, error) from error
    wanted = {split: split for split in SPLITS} | dict(splits or {})
    for split in wanted:
        if split not in SPLITS:
            raise UserError(f"data.splits: {split!r} is not a split; use {', '.join(SPLITS)} as the keys.")
    for split, own in wanted.items():
        if own and own not in loaded and (splits or {}).get(split):
            raise UserError(f"{named_by}: there is no split {own!r}; the source has {', '.join(loaded)}.")
        twice = [other for other in wanted if other < split and own and own in loaded and wanted[other] == own]
        if twice:
            raise UserError(
                f"data.splits: {own!r} would be both {split} and {twice[0]}, and figures would be reported on rows "
                f"that trained or chose a checkpoint. Set {twice[0]} to another split, or to null."
            )
    return type(loaded)({split: loaded[own] for split, own in wanted.items() if own and own in loaded})


def unreadable(options: SourceOptions, key: str, error: Exception) -> UserError:
    """The error for a source that `datasets` cannot read."""
    return UserError(
        f"{key}.path: {options.path}{'/' + options.name if options.name else ''} cannot be read: {_deepest(error)}. "
        f"Check {key}.path, {key}.name and {key}.data_files; a hub set needs the network or a local copy."
    )


def _place(options: DataOptions, split: str) -> str:
    """A split's name and, where it is of one file, that file: what rows are counted in."""
    given = options.data_files
    if isinstance(given, dict):
        files = list(_files({split: given.get((options.splits or {}).get(split) or split, [])}))
    else:
        files = list(_files(given)) if split == "train" else []
    return f"{split} ({files[0]})" if len(files) == 1 else split


def _refuse_withheld(labels: Sequence[Any], split: str, task: TaskType) -> None:
    for index, label in enumerate(labels):
        if task.is_withheld(label):
            raise UserError(f"data.label: row {index} of {split} has the label -1 (withheld). Remove such rows.")


def _complete(splits: dict[str, Dataset], share: float, seed: int, notes: list[str]) -> dict[str, Dataset]:
    splits = dict(splits)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("figures are on the source's validation split")
    for split in ("test", "validation"):
        if split not in splits:
            if len(splits["train"]) < 10:
                raise UserError(
                    f"data.validation_split: train has {len(splits['train'])} rows, too few to hold out a {split} "
                    "split. Give the source more rows or a split of its own."
                )
            parts = splits["train"].train_test_split(test_size=share, seed=seed)
            splits["train"], splits[split] = parts["train"], parts["test"]
            notes.append(f"{len(parts['test']):,} {split} rows were held out of training")
    return splits


def _files(data_files: str | list[str] | dict[str, str | list[str]] | None) -> Iterator[str]:
    if isinstance(data_files, str):
        yield data_files
    elif data_files:
        for value in data_files.values() if isinstance(data_files, dict) else data_files:
            yield from [value] if isinstance(value, str) else value


def _deepest(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def tokenize(rows: Dataset, task: TaskType, tokenizer: PreTrainedTokenizerBase, max_length: int, desc: str) -> Dataset:
    """Encoded rows, memory-mapped; see tasks/ for the columns."""

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return dict(task.encode(batch, indices[0], tokenizer, max_length))

    return rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names, desc=desc)


def fingerprint(rows: Dataset) -> str:
    """sha256 of the rows' content; the same on every machine, whatever the file they came from."""
    digest = hashlib.sha256(repr(sorted(rows.column_names)).encode())
    for batch in rows.select_columns(sorted(rows.column_names)).iter(batch_size=1000):
        digest.update(repr(batch).encode())
    return digest.hexdigest()


class Collator:
    """Pads encoded rows to their longest, rounded up to a multiple of 8 for the matrix units, or to `length`.
    With `spelling` a batch holds what a student of a cut vocabulary reads as well."""

    multiple = 8

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskType | None,
        *,
        length: int | None = None,
        spelling: Spelling | None = None,
    ) -> None:
        pad = tokenizer.pad_token_id
        if pad is None:
            raise UserError("teacher.model: its tokenizer has no padding token. Add one to the tokenizer's folder.")
        self.pad, self.task, self.length, self.spelling = pad, task, length, spelling

    def __call__(self, rows: Mapping[str, list[Any]], weights: Sequence[float]) -> dict[str, Tensor]:
        ids = rows["input_ids"]
        lengths = np.array([len(row) for row in ids])
        length = self.width(lengths)
        batch = {
            "input_ids": _padded(ids, length, self.pad),
            "attention_mask": torch.from_numpy((np.arange(length) < lengths[:, None]).astype(np.int64)),
            "example_weight": torch.tensor(weights, dtype=torch.float32),
        }
        if "token_type_ids" in rows:
            batch["token_type_ids"] = _padded(rows["token_type_ids"], length, 0)
        if self.spelling is not None:
            batch |= self.spelling.batch(ids, rows.get("token_type_ids"), length)
        if self.task is not None:
            batch["labels"] = torch.from_numpy(self.task.pad_labels(rows["labels"], length))
            if "teacher_logits" in rows:
                batch["teacher_logits"] = torch.from_numpy(
                    self.task.pad_logits(rows["teacher_logits"], lengths, length)
                )
        return batch

    def width(self, lengths: np.ndarray) -> int:
        """Pieces of each row of a batch of such lengths, padding included."""
        return self.length or -(-int(lengths.max()) // self.multiple) * self.multiple


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class Placement:
    """This process among all."""

    processes: int = 1
    rank: int = 0


class RowStates(Protocol):
    """Something kept of each row's tokens; see teacher_states.TeacherStates."""

    def padded(self, rows: Sequence[int], length: int) -> Tensor:
        """(B, length, width) of the rows numbered so."""
        ...


Item = tuple[int, float]
"""(row, weight): a row of weight 0 only fills a process's share of a last, smaller batch."""


class Batches:
    """Optimisation steps over an encoded dataset: each a list of micro-batches for this process.

    A step holds `batch_size` examples over all processes and accumulation steps. Rows of similar length come together:
    an epoch is shuffled, cut into windows of many batches, sorted by length inside a window, cut into batches, and the
    batches are shuffled. Everything follows from (seed, epoch), so a resumed run sees the same order, and the set of
    examples of a step does not depend on the number of processes.

    example_weight is processes / examples of the step: summed over micro-batches and averaged over processes (which
    DDP does to gradients) the weighted losses give the mean over the step's examples.

    With `states` a batch holds its rows' as teacher_states.
    """

    window = 50

    def __init__(
        self,
        dataset: Dataset,
        collator: Collator,
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int,
        placement: Placement = Placement(),
        pin_memory: bool = False,
        states: RowStates | None = None,
    ) -> None:
        self.dataset = dataset.select_columns([name for name in BATCH_COLUMNS if name in dataset.column_names])
        self.lengths = np.asarray(dataset["length"][:], dtype=np.int64)
        self.collator, self.batch_size, self.accumulation = collator, batch_size, accumulation
        self.seed, self.placement, self.pin_memory, self.states = seed, placement, pin_memory, states
        self.steps_per_epoch: int | None = -(-len(dataset) // batch_size)
        self.tokens_per_epoch = int(self.lengths.sum())
        self._order: tuple[int, list[np.ndarray]] = (-1, [])

    def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        """The steps first, ..., last - 1, counted from the beginning of the run."""
        loader = DataLoader(
            _Fetch(self.dataset, self.collator, self.states),
            sampler=_Plan(self, first, last),
            batch_size=None,
            pin_memory=self.pin_memory,
            # The loader draws a seed when it starts: from here, or a resumed run would draw other dropout masks.
            generator=torch.Generator(),
        )
        micro_batches: list[dict[str, Tensor]] = []
        for micro_batch in loader:
            micro_batches.append(micro_batch)
            if len(micro_batches) == self.accumulation:
                yield micro_batches
                micro_batches = []

    def rows(self, step: int) -> list[int]:
        """Numbers of a step's rows, over all processes."""
        assert self.steps_per_epoch is not None
        epoch, index = divmod(step, self.steps_per_epoch)
        return sorted(self._epoch(epoch)[index].tolist())

    def step_examples(self, step: int) -> int:
        """Examples of a step, over all processes."""
        return len(self.rows(step))

    def plan(self, first: int, last: int) -> Iterator[list[Item]]:
        """The rows and weights of this process's micro-batches."""
        assert self.steps_per_epoch is not None
        for step in range(first, last):
            epoch, index = divmod(step, self.steps_per_epoch)
            yield from self._share(self._epoch(epoch)[index])

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of each step of an epoch; kept until another epoch is asked for."""
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffle(epoch))
        return self._order[1]

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng((self.seed, epoch))
        rows = random.permutation(len(self.lengths))
        span = self.window * self.batch_size
        batches = []
        for start in range(0, len(rows), span):
            window = rows[start : start + span]
            # The last, smaller batch of a window takes rows of any length, so that no length is favoured by it.
            full = len(window) // self.batch_size * self.batch_size
            ordered = window[:full][np.argsort(self.lengths[window[:full]], kind="stable")]
            batches += [ordered[at : at + self.batch_size] for at in range(0, full, self.batch_size)]
            batches += [window[full:]] if full < len(window) else []
        return [batches[index] for index in random.permutation(len(batches))]

    def _share(self, step_rows: np.ndarray) -> Iterator[list[Item]]:
        shares = self.placement.processes * self.accumulation
        weight = self.placement.processes / len(step_rows)
        for part in range(self.accumulation):
            mine = step_rows[self.placement.rank * self.accumulation + part :: shares]
            # Every process must take part in every backward pass, even of a step with fewer rows than processes.
            yield [(int(row), weight) for row in mine] or [(int(step_rows[0]), 0.0)]


class _Plan(Sampler[list[Item]]):
    def __init__(self, batches: Batches, first: int, last: int) -> None:
        self.batches, self.first, self.last = batches, first, last

    def __iter__(self) -> Iterator[list[Item]]:
        return self.batches.plan(self.first, self.last)


class _Fetch(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, dataset: Dataset, collator: Collator, states: RowStates | None) -> None:
        self.dataset, self.collator, self.states = dataset, collator, states

    def __getitem__(self, items: list[Item]) -> dict[str, Tensor]:
        rows = [row for row, _ in items]
        batch = self.collator(self.dataset[rows], [weight for _, weight in items])
        if self.states is not None:
            batch["teacher_states"] = self.states.padded(rows, batch["input_ids"].shape[1])
        return batch
