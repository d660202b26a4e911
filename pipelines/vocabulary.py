"""The student's vocabulary where student.vocabulary cuts it: what text is counted, and what is told of it.
Which pieces then stay, and the tokenizer, are left to distill/vocabulary.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.corpus import load_corpus, pack
from distill.initialization import BUILT_IN
from distill.settings import UserError
from distill.teachers import VOCABULARIES, resolve, vocabulary_hash
from distill.vocabulary import CutVocabulary, check_wordpiece, cut_vocabulary

if TYPE_CHECKING:
    from pipelines.run import Run


def cut_for(run: Run) -> CutVocabulary | None:
    """The vocabulary cut to the task's training rows and its rows without labels, as long as they are read, and the
    corpus of general distillation; None where student.vocabulary is not set. Rows that the stage augment makes are not
    counted.

    Raises:
        UserError: no WordPiece tokenizer; settings that cannot go together; a size that is too small.
    """
    options = run.config.student.vocabulary
    if options is None:
        return None
    _check(run)
    checkpoint = run.checkpoint
    embeddings = checkpoint.config.vocab_size
    counts = np.zeros(embeddings, dtype=np.int64)
    if run.config.task is not None:
        counts += _counts(run.teacher_encoded.features["train"], embeddings)
        if run.unlabelled is not None:
            counts += _counts(run.teacher_encoded.encode(run.unlabelled, "unlabelled rows"), embeddings)
    if run.config.general is not None:
        general = run.config.general
        with run.accelerator.main_process_first():
            documents = load_corpus(general.corpus, streaming=False)
            counts += _counts(pack(documents, checkpoint.tokenizer, general.max_length), embeddings)
    return cut_vocabulary(checkpoint.tokenizer, embeddings, counts, options)


def _check(run: Run) -> None:
    student, general = run.config.student, run.config.general
    if student.tokenizer is not None:
        raise UserError(
            "student.vocabulary: it cuts the teacher's vocabulary, and student.tokenizer names another. Set one of "
            "the two."
        )
    source = student.initialization
    other = None if source in BUILT_IN else own_tokenizer(source)
    if other is not None and vocabulary_hash(other) != vocabulary_hash(run.checkpoint.tokenizer):
        raise UserError(
            f"student.initialization: {source} has other pieces than the teacher, out of whose student.vocabulary "
            f"takes the student's. Give a checkpoint with the teacher's tokenizer, or one of {', '.join(BUILT_IN)}."
        )
    if general is not None and general.streaming:
        raise UserError(
            "student.vocabulary: the pieces of general.corpus are counted before training, which a stream does not "
            "allow. Set general.streaming=false, or student.vocabulary=null."
        )
    check_wordpiece(run.checkpoint.tokenizer)


def own_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """Of a checkpoint's folder or hub name, where it has one."""
    folder = Path(resolve(source))
    # transformers makes an empty tokenizer of a folder that has none.
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        return None
    try:
        return AutoTokenizer.from_pretrained(resolve(source))
    except (OSError, ValueError, TypeError):  # a hub checkpoint without one
        return None


def _counts(rows: Dataset, embeddings: int) -> np.ndarray:
    counts = np.zeros(embeddings, dtype=np.int64)
    for batch in rows.select_columns(["input_ids"]).iter(batch_size=1000):
        counts += np.bincount(np.concatenate([*batch["input_ids"], []]).astype(np.int64), minlength=embeddings)
    return counts


def describe(run: Run) -> dict[str, Any]:
    """Figures for result.json: pieces kept, and what of the validation rows they do not cover.

    validation.pieces and validation.cut are of the rows as the teacher reads them, its unknown pieces among those;
    validation.unknown is what the student's own tokenizer makes of them.
    """
    cut = run.cut
    assert cut is not None
    figures: dict[str, Any] = {
        "pieces": len(cut.kept),
        "teacher_pieces": len(run.checkpoint.tokenizer),
        "coverage": cut.coverage,
    }
    if run.config.task is None:
        return figures
    embeddings = run.checkpoint.config.vocab_size
    seen = _counts(run.teacher_encoded.features["validation"], embeddings)
    own = _counts(run.encoded.features["validation"], len(cut.kept))
    gone = np.ones(embeddings, dtype=bool)
    gone[cut.kept.numpy()] = False
    teacher_tokenizer = run.checkpoint.tokenizer
    figures["validation"] = {
        "pieces": int(seen.sum()),
        "cut": int(seen[gone].sum()),
        "unknown": int(own[cut.tokenizer.unk_token_id]),
        "teacher_unknown": int(seen[teacher_tokenizer.unk_token_id]),
    }
    return figures


def sentence(figures: dict[str, Any]) -> str:
    """What `describe` found, for people."""
    kept = (
        f"{figures['pieces']:,} of {figures['teacher_pieces']:,} pieces, {figures['coverage']:.2%} of those in the "
        "training text"
    )
    if "validation" not in figures:
        return kept
    seen = figures["validation"]
    return (
        f"{kept}; of {seen['pieces']:,} in the validation rows {seen['cut']:,} were cut, {seen['unknown']:,} are "
        f"unknown to the student ({seen['teacher_unknown']:,} to the teacher)"
    )
