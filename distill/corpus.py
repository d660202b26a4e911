"""Unlabelled text for general distillation: documents cut into full-length sequences, map-style or streaming.
Labelled rows are left to data.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.data import EMBEDDED, Collator, Placement, SourceOptions, load_source, unreadable
from distill.settings import RunError, UserError


def load_corpus(options: SourceOptions, *, streaming: bool) -> Dataset | IterableDataset:
    """The training documents in one column `text`.

    Raises:
        UserError: unreadable, or no such column.
    """
    if streaming and options.path in EMBEDDED:
        raise UserError(f"general.streaming: {options.path} is in memory already; set it to false.")
    source = load_source(options, key="general.corpus", streaming=streaming)
    if "train" not in source:
        raise UserError(
            f"general.corpus.data_files: there is no train split, only {', '.join(source)}. Give the files as train."
        )
    rows = source["train"]
    try:
        columns = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # a stream is opened only now
        raise unreadable(options, "general.corpus", error) from error
    column = options.text or "text"
    if column not in columns:
        raise UserError(f"general.corpus.text: there is no column {column!r}; the corpus has {', '.join(columns)}.")
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def pack(rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
    """Sequences of `length` pieces: [CLS] piece ... [SEP].

    Documents follow each other through the sequences with a [SEP] at every border, so no piece is lost and no border
    is unmarked; only the last sequence of a thousand documents is shorter. Columns input_ids, length.

    Raises:
        UserError: a document that is not text.
    """
    first, border = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is None or border is None:
        raise UserError("teacher.model: general distillation needs a tokenizer with [CLS] and [SEP] tokens.")

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for text in batch["text"]:
            if text is not None and not isinstance(text, str):
                raise UserError(f"general.corpus.text: {text!r} is not a text. Name a column that holds documents.")
        documents = [text for text in batch["text"] if text and text.strip()]
        stream: list[int] = []
        encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False) if documents else {}
        for pieces in encoded.get("input_ids", []):
            stream += [*pieces, border]
        body = length - 2
        # The border after the last document is the closing [SEP] of its sequence.
        parts = [stream[start : start + body] for start in range(0, len(stream) - 1, body)]
        sequences = [[first, *(part[:-1] if part[-1] == border else part), border] for part in parts]
        sequences = [sequence for sequence in sequences if len(sequence) > 2]
        return {"input_ids": sequences, "length": [len(sequence) for sequence in sequences]}

    options: dict[str, Any] = {"batched": True, "batch_size": 1000, "remove_columns": ["text"]}
    if isinstance(rows, Dataset):
        options["desc"] = "cut corpus"
    return rows.map(cut, **options)


class StreamBatches:
    """Optimisation steps over a stream: every process reads the same stream and takes its share of each step.

    A resumed run reads past what it has seen. When the stream ends it starts again.
    """

    steps_per_epoch: int | None = None

    def __init__(
        self,
        stream: IterableDataset,
        collator: Collator,
        *,
        batch_size: int,
        accumulation: int,
        placement: Placement,
    ) -> None:
        self.stream, self.collator = stream, collator
        self.batch_size, self.accumulation, self.placement = batch_size, accumulation, placement

    def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        sequences = self._sequences()
        for _ in range(first * self.batch_size):
            next(sequences)
        shares = self.placement.processes * self.accumulation
        weight = self.placement.processes / self.batch_size
        for _ in range(first, last):
            rows = [next(sequences) for _ in range(self.batch_size)]
            micro_batches = []
            for part in range(self.accumulation):
                mine = rows[self.placement.rank * self.accumulation + part :: shares]
                weights = [weight] * len(mine) or [0.0]
                micro_batches.append(self.collator({"input_ids": mine or rows[:1]}, weights))
            yield micro_batches

    def rows(self, step: int) -> list[int]:
        """Numbers of a step's sequences, counted on where the stream starts again."""
        return list(range(step * self.batch_size, (step + 1) * self.batch_size))

    def _sequences(self) -> Iterator[list[int]]:
        epoch = 0
        while True:
            self.stream.set_epoch(epoch)
            empty, rows = True, iter(self.stream)
            while (row := self._next(rows)) is not None:
                empty = False
                yield row["input_ids"]
            if empty:
                raise UserError("general.corpus: the stream holds no text. Check general.corpus.data_files.")
            epoch += 1

    def _next(self, rows: Iterator[Any]) -> Any:
        try:
            return next(rows, None)
        except UserError:
            raise
        except Exception as error:  # datasets raises what the file, the network or a decoder does
            raise RunError(
                f"general.corpus: reading it failed in the midst of training: {error}. See that its files are there "
                "and whole, and start the same command again: it goes on from the last checkpoint."
            ) from error
