"""The settings of augmentation.
What they do is said where they are used."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from distill.settings import settings


@settings
class AugmentOptions:
    copies: PositiveInt = 20
    """Augmented copies of each row (N); as published 10 for MNLI and QQP, 30 for CoLA, MRPC, STS-B and RTE."""
    probability: float = Field(default=0.4, gt=0, le=1)
    """Each word that has candidates is replaced with this probability (p)."""
    candidates: PositiveInt = 15
    """Candidates of a word (K): the masked LM's likeliest, or the nearest word vectors."""
    mode: Literal["exact", "fast"] = "exact"
    """exact: one masked forward a word, as published; fast: well-separated words are masked together."""
    masked_lm: str | None = None
    """Checkpoint whose masked LM proposes candidates; null: the teacher's own head where it has one."""
    vectors: str | None = "glove-6b-50d"
    """Word vectors for words of several pieces, and for all words where there is no masked LM: the packaged
    glove-6b-50d, a GloVe or word2vec text file (gzip or plain), or a .npy with its words in a .txt or .parquet of the
    same name; null: only what the masked LM proposes."""
    vocabulary_limit: PositiveInt = 100_000
    """Vectors read, from the top of the file, where the frequent words stand."""
    second_segment: bool | None = None
    """Show the masked LM the original text as second segment; null: in exact mode only."""
    separation_pieces: PositiveInt = 4
    """Least distance, in word pieces, of two words masked in one forward; fast mode only."""
    max_length: PositiveInt = 512
    """Word pieces of a masked forward, special ones and second segment included; a longer text is cut in windows."""
    batch_tokens: PositiveInt | None = None
    """Word pieces of a batch of masked forwards; bounds the memory, not what comes out. null: 2048 on a CPU, whose
    cache then holds them, 4096 elsewhere."""
    filter: Literal["same_label", "confident"] | None = None
    """Keep only the copies that the fine-tuned teacher labels as it labels the source row (same_label), or labels with
    a probability of filter_confidence or more (confident). For tasks that put labels on texts. null: keep all."""
    filter_confidence: float = Field(default=0.9, gt=0, le=1)
    """Least probability of the teacher's label; of its least certain label where a row may have several."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the masked LM. auto: fp32 in exact mode; in fast mode bf16 where the processor has it and rounds alike in
    every batch. bf16: in any case, though candidates may then depend on batch_tokens."""
    stop_words: list[str] | None = None
    """Words left alone, in lower case; null: the English ones of the published script."""
