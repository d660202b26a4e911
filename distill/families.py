"""What model families name or count differently: positions, and the shape of a student.
How attention is seen in a family is left to attention.py, cutting a student out of its teacher to initialization/.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedConfig

from distill.settings import UserError

COUNT_BEHIND_PADDING = frozenset(
    {"roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text"}
)
"""Families whose first position has the number behind the padding piece's."""

BERT_LAYERS = frozenset({"bert", "electra"})
"""Families whose layers, positions and types of token are the same, so that one's student can be cut out of another."""


def positions(config: PreTrainedConfig) -> int | None:
    """Word pieces that the model has positions for (rotary ones: was made for); None where it sets no limit."""
    count: int | None = getattr(config, "max_position_embeddings", None)
    return None if count is None else count - _first_position(config)


def _first_position(config: PreTrainedConfig) -> int:
    if config.model_type == "mpnet":
        return 2  # it takes 1 for the padding piece's number, whatever the config says
    return config.pad_token_id + 1 if config.model_type in COUNT_BEHIND_PADDING else 0


def inner_width(config: PreTrainedConfig) -> int | None:
    """Width of the feed-forward blocks between their two matrices."""
    width: int | None = getattr(
        config, "hidden_dim" if config.model_type == "distilbert" else "intermediate_size", None
    )
    return width


@dataclass(frozen=True)
class Shape:
    """A student's shape."""

    layers: int
    width: int
    heads: int
    intermediate_size: int
    dropout: float
    embedding_width: int | None = None
    """Of the embeddings, where they are narrower than the layers."""


Follow = Callable[[Any, Shape], None]
"""Sets, in a config whose common fields are set, what else has to follow from them."""


def _nothing(config: Any, shape: Shape) -> None:
    pass


def _electra(config: Any, shape: Shape) -> None:
    config.embedding_size = shape.embedding_width or shape.width


def _albert(config: Any, shape: Shape) -> None:
    config.num_hidden_groups = min(config.num_hidden_groups, shape.layers)
    config.inner_group_num = 1
    config.embedding_size = shape.embedding_width or config.embedding_size


def _deberta(config: Any, shape: Shape) -> None:
    config.pooler_hidden_size = shape.width
    for name, width in (("embedding_size", shape.width), ("attention_head_size", shape.width // shape.heads)):
        if hasattr(config, name):
            setattr(config, name, width)


def _nomic_bert(config: Any, shape: Shape) -> None:
    config.head_dim = _rotary_width(shape)


def _modernbert(config: Any, shape: Shape) -> None:
    _rotary_width(shape)
    pattern = config.layer_types
    config.layer_types = [pattern[index % len(pattern)] for index in range(shape.layers)]
    config.embedding_dropout = config.mlp_dropout = shape.dropout


def _rotary_width(shape: Shape) -> int:
    """Width of a head, an even number: rotary embeddings turn its coordinates in pairs."""
    width = shape.width // shape.heads
    if width % 2:
        raise UserError(
            f"student.width: {shape.width} over student.heads={shape.heads} gives heads {width} wide, but rotary "
            f"embeddings need an even width. Set student.width to a multiple of {2 * shape.heads}."
        )
    return width


@dataclass(frozen=True)
class _Family:
    dropouts: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    follow: Follow = _nothing
    narrow_embeddings: bool = False
    """Whether its embeddings can be narrower than its layers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For a student of a teacher of another family, where the family's default is not what its models use."""


FAMILIES: Mapping[str, _Family] = {
    "bert": _Family(),
    "roberta": _Family(),
    "xlm-roberta": _Family(),
    "camembert": _Family(),
    "ernie": _Family(),
    "electra": _Family(follow=_electra, narrow_embeddings=True),
    "distilbert": _Family(dropouts=("dropout", "attention_dropout")),
    "albert": _Family(follow=_albert, narrow_embeddings=True),
    "nomic_bert": _Family(follow=_nomic_bert),
    "modernbert": _Family(dropouts=("attention_dropout",), follow=_modernbert),
    "mpnet": _Family(),
    "deberta-v2": _Family(
        follow=_deberta,
        settings={  # DeBERTa-v3's
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "position_buckets": 256,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
}
"""Families of which a student of any shape can be built."""

_NO_STUDENTS = {
    "mobilebert": "the width of its attention is its bottleneck's, which student.width and student.heads do not name"
}


def shaped_config(teacher: PreTrainedConfig, family: str | None, shape: Shape) -> PreTrainedConfig:
    """A config of `shape` that reads the teacher's pieces and predicts its labels.

    Within the teacher's family everything else stays the teacher's; in another it is that family's default.

    Args:
        family: a key of FAMILIES; None for the teacher's own, or bert where there are no students of that.

    Raises:
        UserError: no student of that family can be built, or not of this shape or for this teacher's pieces; the
            teacher is no encoder.
    """
    if teacher.is_encoder_decoder or type(teacher) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(
            f"teacher.model: {teacher.model_type} is no encoder of BERT's kind (one trained as a masked language "
            "model), so no student can be built for it. Give a teacher that is."
        )
    if family is None:
        family = teacher.model_type if teacher.model_type in FAMILIES else "bert"
        if shape.embedding_width and not FAMILIES[family].narrow_embeddings:
            family = "electra"  # BERT's layers over such embeddings
    if family not in FAMILIES:
        reason = f" ({_NO_STUDENTS[family]})" if family in _NO_STUDENTS else ""
        raise UserError(
            f"student.family: no student of the family {family!r} can be built{reason}. Give one of "
            f"{', '.join(FAMILIES)}, or leave it out."
        )
    rule = FAMILIES[family]
    if shape.embedding_width and not rule.narrow_embeddings:
        able = " or ".join(name for name, other in FAMILIES.items() if other.narrow_embeddings)
        raise UserError(
            f"student.embedding_width: embeddings of the family {family} are as wide as its layers. Set student.family "
            f"to {able}, or leave student.embedding_width out."
        )
    config: Any = copy.deepcopy(teacher) if family == teacher.model_type else _translated(teacher, family, rule)
    config.num_hidden_layers = shape.layers
    config.hidden_size = shape.width
    config.num_attention_heads = shape.heads
    setattr(config, "hidden_dim" if family == "distilbert" else "intermediate_size", shape.intermediate_size)
    if {family, teacher.model_type} <= BERT_LAYERS:
        config.hidden_act, config.layer_norm_eps = teacher.hidden_act, teacher.layer_norm_eps
    for name in rule.dropouts:
        setattr(config, name, shape.dropout)
    rule.follow(config, shape)
    return config


def _translated(teacher: PreTrainedConfig, family: str, rule: _Family) -> PreTrainedConfig:
    """The default config of `family` with the teacher's pieces, positions and labels."""
    pad = teacher.pad_token_id
    if family in COUNT_BEHIND_PADDING and pad not in ((1,) if family == "mpnet" else (0, 1)):
        raise UserError(
            f"student.family: {family} counts positions from behind the number of the padding piece, which is {pad} in "
            "this teacher's vocabulary: positions would be wrong or wasted. Set student.family=bert."
        )
    special = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    config = AutoConfig.for_model(
        family,
        vocab_size=teacher.vocab_size,
        pad_token_id=pad,
        id2label=dict(teacher.id2label),
        label2id=dict(teacher.label2id),
        problem_type=teacher.problem_type,
        **{name: getattr(teacher, name, None) for name in special},
        **rule.settings,
    )
    # A tokenizer that tells types apart has two; a teacher that ignores them may still have such a tokenizer.
    if hasattr(config, "type_vocab_size"):
        config.type_vocab_size = max(2, getattr(teacher, "type_vocab_size", None) or 0)
    count = positions(teacher)
    if count is not None:
        config.max_position_embeddings = count + _first_position(config)
    return config
