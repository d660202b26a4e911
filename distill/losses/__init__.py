"""Loss terms between a teacher and a student, a class each; their weighted sum is left to objective.py."""

from distill.losses.attention import AttentionLoss, RelationLoss
from distill.losses.groups import GeneralLosses, TaskLosses, check_models
from distill.losses.hidden import EmbeddingLoss, HiddenLoss
from distill.losses.predictions import LabelLoss, LogitsLoss
from distill.losses.term import IGNORED, Batch, Logits, LossTerm, Match

__all__ = [
    "IGNORED",
    "AttentionLoss",
    "Batch",
    "EmbeddingLoss",
    "GeneralLosses",
    "HiddenLoss",
    "LabelLoss",
    "Logits",
    "LogitsLoss",
    "LossTerm",
    "Match",
    "RelationLoss",
    "TaskLosses",
    "check_models",
]
