"""The embedded toy: generated sentences and a teacher of random weights, so that every stage runs in seconds.
Real text and weights are bbc_news.py's and teachers.py's."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

TOPICS = {
    "weather": ["rain", "snow", "wind", "storm", "cloud", "sunny", "frost", "thunder"],
    "music": ["song", "guitar", "piano", "drum", "concert", "melody", "violin", "choir"],
}
COMMON = [
    *("people", "often", "talk", "about", "their", "new", "year", "before"),
    *("every", "long", "morning", "walk", "near", "our", "town"),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROWS = {"train": 192, "validation": 48, "test": 48}


def load() -> DatasetDict:
    """Sentences of common words with two words of a topic; the topic is the label. The same on every machine."""
    random = np.random.default_rng(0)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(TOPICS))})
    splits = {}
    for split, count in ROWS.items():
        labels = random.integers(len(TOPICS), size=count).tolist()
        texts = [_sentence(random, list(TOPICS.values())[label]) for label in labels]
        splits[split] = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    return DatasetDict(splits)


def _sentence(random: np.random.Generator, topic: list[str]) -> str:
    words = random.choice(COMMON, size=random.integers(4, 14)).tolist() + random.choice(topic, size=2).tolist()
    return " ".join(random.permutation(words).tolist())


def tokenizer() -> PreTrainedTokenizerFast:
    """BERT's special tokens, the generated words, and single letters for everything else."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [word for topic in TOPICS.values() for word in topic] + COMMON
    vocabulary = [*SPECIAL, *dict.fromkeys(words), *letters, *(f"##{letter}" for letter in letters), *".,?!0123456789"]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )


def teacher_folder() -> Path:
    """A BERT of 4 layers, 32 wide, with a masked-LM head of random weights; made once in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tinybert-distill"
    folder = cache / "tiny-random-bert-1"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        pieces = tokenizer()
        config = BertConfig(
            vocab_size=len(pieces),
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            BertForMaskedLM(config).save_pretrained(temporary)
        pieces.save_pretrained(temporary)
        with suppress(OSError):  # another process was faster
            temporary.rename(folder)
    return folder
