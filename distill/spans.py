"""Answers in a context: which spans of a window can be one, and what they score.
No torch in here: tasks/ evaluates with it, serving/ answers with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST_ANSWER_TOKENS = 30
BEST_POSITIONS = 20
"""How many first and last tokens are tried."""


def spans(window: np.ndarray, starts: Sequence[int]) -> list[tuple[float, int, int]]:
    """(start logit + end logit, first token, last token) of the spans that may be the answer.

    Args:
        window: logits (T, 2) of start and end.
        starts: where each token stands in the context; -1 for a token outside it.
    """
    inside = np.asarray(starts) >= 0
    scores = np.where(inside[:, None], window, -np.inf)
    first_tokens = np.argsort(-scores[:, 0])[:BEST_POSITIONS]
    last_tokens = np.argsort(-scores[:, 1])[:BEST_POSITIONS]
    return [
        (float(scores[first, 0] + scores[last, 1]), int(first), int(last))
        for first in first_tokens
        for last in last_tokens
        if inside[first] and inside[last] and first <= last < first + LONGEST_ANSWER_TOKENS
    ]
