"""Which words of a text may be replaced, and the casing a replacement takes over.
What replaces them is left to masked_lm.py and vectors.py."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass

STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for
    with about against between into through during before after above below to from up down in out on off over
    under again further then once here there all any both each few more most other some such no nor not only
    own same so than too very s t can will just don should now d ll m o re ve y ain aren couldn didn doesn
    hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn
    """.split()  # noqa: SIM905
)
"""The published script's list (NLTK's English one), apostrophes aside: a word ends at an apostrophe here."""

# What BERT's basic tokenizer splits at: white space and punctuation; digits and symbols stay inside a run.
_RUN = re.compile(
    r"[^\s!-/:-@\[-`{-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u2000-\u206f\u2e00-\u2e7f\u3000-\u303f]+"
)
_PLACEHOLDER = re.compile(
    r"""
      [a-z][a-z0-9+.-]*://\S+ | www\.\S+ | \S+\.\w+/\S*   # addresses
    | \S+@\S+                                             # electronic mail, accounts
    | (?<!\w)[@\#$%]\w[\w-]*%?                            # mentions, hashtags, cashtags, %name%
    | </?\w[^<>]*> | \[[A-Z_]+\] | \{[^{}\s]*\}           # <user>, [MASK], {name}
    | &\#?\w+;                                            # HTML entities
    | -[lr][crs]b-                                        # brackets in treebank text
    | \w*_\w*                                             # identifiers
    | \w+(?:\.\w+)+                                       # abbreviations, domains, file names
    """,
    re.VERBOSE | re.IGNORECASE,
)
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
)


@dataclass(frozen=True, slots=True)
class Word:
    """A word by its place in a text: text[start:end]."""

    start: int
    end: int


@dataclass(frozen=True)
class Passage:
    """A text and those of its words that may be replaced, in order."""

    text: str
    words: tuple[Word, ...]


def find_words(text: str, left_alone: Collection[str]) -> list[Word]:
    """Words of two letters or more, outside `left_alone` (lower case) and outside addresses, mentions, placeholders.

    A word is what BERT's basic tokenizer makes one and consists of letters; the published script asks for a to z. It
    also takes single letters, which are initials and the remains of contractions, and the parts of addresses.
    """
    placeholders = [match.span() for match in _PLACEHOLDER.finditer(text)]
    words = []
    for match in _RUN.finditer(text):
        start, end = match.span()
        if any(start < stop and end > begin for begin, stop in placeholders):
            continue
        run = match.group()
        if len(run) > 1 and is_word(run) and run.lower() not in left_alone:
            words.append(Word(start, end))
    return words


def is_word(text: str) -> bool:
    """Letters with their marks, of a script that has spaces between words."""
    if text.isascii():
        return text.isalpha()
    return (
        text[:1].isalpha()
        and all(unicodedata.category(letter)[0] in "LM" for letter in text)
        and not _UNSPACED.search(text)
    )


def usable(word: str, candidates: Iterable[str]) -> list[str]:
    """Candidates that can stand for `word`: words themselves, hyphens and apostrophes inside allowed, and another word.

    The published script draws from all of them, so that a word may be replaced by itself or by a comma; here the share
    of words that change is p.
    """
    own = word.casefold()
    return [
        candidate
        for candidate in candidates
        if candidate.casefold() != own and all(map(is_word, re.split("[-'\u2019]", candidate)))
    ]


def with_casing(candidate: str, word: str) -> str:
    """`candidate` in lower case, Title or UPPER as `word` is; unchanged where that is mixed."""
    if word.islower():
        return candidate.lower()
    if word.isupper():
        return candidate.upper()
    if word.istitle():
        return candidate[:1].upper() + candidate[1:].lower()
    return candidate


def share_without_spaces(texts: Iterable[str]) -> float:
    """Share of letters that belong to scripts written without spaces: Han, Kana, Thai, Lao, Khmer, Burmese."""
    letters = unspaced = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        unspaced += len(_UNSPACED.findall(text))
    return unspaced / max(letters, unspaced, 1)
