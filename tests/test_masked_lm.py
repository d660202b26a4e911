"""Claims about distill/augmentation/masked_lm.py and masked_forward.py: the candidates are the published script's, the
packed forward is the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from distill import tiny
from distill.augmentation import AugmentOptions, MaskedLM
from distill.augmentation.masked_forward import MaskedForward, MaskedSequence, packs
from distill.augmentation.replacement import Candidates
from distill.augmentation.words import Passage, find_words
from tests.conftest import VOCABULARY, BuildModel

TEXTS = ["rain snow walk piano", "long morning walk near town", "guitar song", "people talk often walk long near town"]


@pytest.fixture(scope="module")
def masked_lm() -> MaskedLM:
    folder = tiny.teacher_folder()
    return AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _lists(masked_lm: MaskedLM, **options: Any) -> list[list[list[str]]]:
    passages = [Passage(text, tuple(find_words(text, ()))) for text in TEXTS]
    return Candidates(AugmentOptions(vectors=None, candidates=4, **options), masked_lm, None).lists(passages)


def _plain(masked_lm: MaskedLM, places: dict[int, list[int]]) -> dict[tuple[int, int], list[str]]:
    """As published: a text with a word masked, then the text itself as second segment, one forward, the order sorted.

    places: which words are asked for, by text.
    """
    model, tokenizer = masked_lm
    found = {}
    for number, asked in places.items():
        words = TEXTS[number].split()
        for place in asked:
            masked = [*words[:place], "[MASK]", *words[place + 1 :]]
            batch = tokenizer(" ".join(masked), TEXTS[number], return_tensors="pt")
            where = int((batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
            with torch.no_grad():
                logits = model(**batch).logits[0, where]
            best = tokenizer.convert_ids_to_tokens(logits.argsort(descending=True)[:4].tolist())
            found[number, place] = [piece for piece in best if not piece.startswith("##")]
    return found


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_candidates_are_those_of_one_plain_forward_a_word(batch_tokens: int, masked_lm: MaskedLM) -> None:
    lists = _lists(masked_lm, batch_tokens=batch_tokens)
    everywhere = {number: list(range(len(text.split()))) for number, text in enumerate(TEXTS)}
    expected = _plain(masked_lm, everywhere)
    found = {(row, word): pieces for row, words in enumerate(lists) for word, pieces in enumerate(words)}
    assert found == expected


def test_fast_mode_masks_words_together_that_are_far_enough_apart(masked_lm: MaskedLM) -> None:
    model, tokenizer = masked_lm
    # Words 0, 3 and 6 of the last text stand three pieces apart: they share a forward.
    batch = tokenizer("[MASK] talk often [MASK] long near [MASK]", return_tensors="pt")
    where = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    with torch.no_grad():
        logits = model(**batch).logits[0, where]
    best = [tokenizer.convert_ids_to_tokens(row[:4]) for row in logits.argsort(-1, descending=True).tolist()]
    expected = [[piece for piece in pieces if not piece.startswith("##")] for pieces in best]
    lists = _lists(masked_lm, mode="fast", separation_pieces=3, precision="fp32")
    assert [lists[3][place] for place in (0, 3, 6)] == expected


def test_a_text_that_does_not_fit_is_read_in_windows(masked_lm: MaskedLM) -> None:
    # 13 pieces leave room for the text twice, 5 pieces each, and the three special ones: a window ends after 5 words.
    lists = _lists(masked_lm, max_length=13)
    assert all(words for words in lists[3])
    assert lists[:3] == _lists(masked_lm)[:3]


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
        "distilbert",
        "albert",
        "mobilebert",
        "modernbert",
        "deberta-v2",
        "mpnet",
    ],
)
def test_many_sequences_together_get_the_model_s_own_logits(family: str, build_model: BuildModel) -> None:
    model = build_model(family, AutoModelForMaskedLM)
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for length in (4, 4, 7, 7, 7, 19):
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        types = [0] * (length // 2) + [int("roberta" not in family and family != "camembert")] * (length - length // 2)
        sequences.append(MaskedSequence(ids, types, [1, 3] if length > 4 else [2]))
    forward = MaskedForward(model)
    logits = forward.logits(torch.cat([forward.hidden(pack) for pack in packs(sequences, 20)]))
    with torch.no_grad():
        alone = [(model(**forward.inputs([one])).logits[0], one.places) for one in sequences]
    expected = torch.cat([all_places[places] for all_places, places in alone])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
