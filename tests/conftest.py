"""Tiny models, built from a config and a seed once and handed out as copies, and a padded batch.
What is claimed of them is left to the tests."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from tests.fault_runs import FIGURES, counted

torch.set_num_threads(1)  # threads only slow models of this size down
logging.set_verbosity_error()
logging.disable_progress_bar()

VOCABULARY = 60
LENGTHS = (12, 3, 7, 12, 5, 9, 1, 8, 11, 12, 6, 10, 4, 12, 9, 7)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 8},
    "distilbert": {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24},
    "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8},
    "deberta-v2": {  # as DeBERTa-v3
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    # Windows wider than the batch: within one, local attention is attention.
    "modernbert": {"local_attention": 64, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
}

BuildModel = Callable[..., PreTrainedModel]
MakeBatch = Callable[..., dict[str, Tensor]]


@cache
def _model(family: str, auto_class: Any, seed: int, changes: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILY_SHAPES.get(family, {}), **dict(changes)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at 0 and gains at 1, which would hide what is wrong with them
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def build_model() -> BuildModel:
    """build_model(family, auto_class, seed, **changes of the config): a model of random weights, in eval mode."""

    def build(
        family: str = "bert", auto_class: Any = AutoModelForSequenceClassification, seed: int = 0, **changes: Any
    ) -> PreTrainedModel:
        return copy.deepcopy(_model(family, auto_class, seed, tuple(sorted(changes.items()))))

    return build


@pytest.fixture
def teacher(build_model: BuildModel) -> PreTrainedModel:
    """BERT: 4 layers, 2 heads, width 16, 3 classes, frozen."""
    return build_model().requires_grad_(False)


@pytest.fixture
def make_batch() -> MakeBatch:
    """make_batch(lengths, seed): rows of those lengths, padded to the longest, weighing the same."""

    def make(lengths: Sequence[int] = (9, 5, 3, 7), seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        size = (len(lengths), max(lengths))
        mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
        return {
            "input_ids": torch.randint(5, VOCABULARY, size, generator=generator) * mask,
            "attention_mask": mask,
            "token_type_ids": torch.randint(2, size, generator=generator) * mask,
            "labels": torch.randint(3, size[:1], generator=generator),
            "example_weight": torch.full(size[:1], 1 / len(lengths)),
        }

    return make


@pytest.fixture
def batch(make_batch: MakeBatch) -> dict[str, Tensor]:
    return make_batch()


@pytest.fixture
def fresh(make_batch: MakeBatch) -> dict[str, Tensor]:
    """Rows that no student was cut on."""
    return make_batch(LENGTHS, seed=3)


def pytest_unconfigure(config: pytest.Config) -> None:
    """What the tests of faults counted, as the last line of all."""
    if counted:
        print(" ".join(f"{name} {counted[name]}" for name in FIGURES))
