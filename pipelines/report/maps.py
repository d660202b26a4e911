"""Attention of teacher and student on a few sentences, side by side, by the pairs of the layer map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.activations import model_inputs
from pipelines.report import plots
from pipelines.report.answers import Test
from pipelines.report.blocks import Block, Figure, Group, Missing, Quote
from pipelines.report.comparison import Comparison
from pipelines.run import Run

MOST_PIECES = 24
"""Word pieces of a map: more could not be read at a phone's width."""


@dataclass(frozen=True)
class Sentence:
    text: str
    pair: str | None
    why: str


def chosen_sentences(test: Test, found: Comparison) -> list[Sentence]:
    """The first two disagreements as the report orders them, and the first row on which the models agree."""
    chosen = [(index, "the models differ") for index in found.differing[:2]]
    chosen += [(index, "the first row on which the models agree") for index in found.agreed[:1]]
    return [_of_row(test, index, why) for index, why in chosen]


def _of_row(test: Test, index: int, why: str) -> Sentence:
    row = test.rows[index]
    if "tokens" in row:
        return Sentence(" ".join(row["tokens"]), None, f"Test row {index}: {why}")
    text, pair = (row["question"], row["context"]) if "question" in row else (row["text"], row.get("text_pair"))
    return Sentence(text, pair, f"Test row {index}: {why}")


@dataclass(frozen=True)
class Seen:
    """Attention of one model on one sentence."""

    pieces: list[str]
    layers: np.ndarray
    """(L, T, T), the mean over heads; layers[m - 1] is layer m."""
    was_cut: bool


def attention_maps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: Sentence) -> Seen:
    """What each piece looks at, by transformers' own eager attention; the text is cut to MOST_PIECES."""
    texts = (sentence.text,) if sentence.pair is None else (sentence.text, sentence.pair)
    encoded = tokenizer(*texts, truncation=True, max_length=MOST_PIECES, return_tensors="pt")
    whole = len(tokenizer(*texts)["input_ids"])
    body = model.base_model
    inputs = {name: tensor.to(body.device) for name, tensor in model_inputs(body, encoded).items()}
    body.set_attn_implementation("eager")  # the others do not give the probabilities out
    with torch.inference_mode():
        output = body.eval()(**inputs, output_attentions=True, return_dict=True)
    layers = np.stack([layer[0].float().mean(0).cpu().numpy() for layer in output.attentions])
    # One by one, so that pieces of bytes are readable too.
    pieces = [tokenizer.decode([piece]).strip() for piece in encoded["input_ids"][0].tolist()]
    return Seen(pieces, layers, whole > len(pieces))


def overlap(teacher: np.ndarray, student: np.ndarray) -> float:
    """Mean over pieces of sum_k min(p_teacher, p_student): 1 where both look at the same, 0 where at nothing alike."""
    return float(np.minimum(teacher, student).sum(-1).mean())


def maps(run: Run, teacher: PreTrainedModel, student: PreTrainedModel, sentences: Sequence[Sentence]) -> list[Block]:
    """For each sentence a pair of maps for each pair of layers; the last pair is open, the others are folded away."""
    if not sentences:
        return [Missing("There is no sentence to show attention on: give one with --sentence.")]
    blocks: list[Block] = []
    bar = tqdm(sentences, desc="attention maps", unit="sentence", dynamic_ncols=True)
    for number, sentence in enumerate(bar, start=1):
        both = (
            attention_maps(teacher, run.checkpoint.tokenizer, sentence),
            attention_maps(student, run.tokenizer, sentence),
        )
        cut = f" Cut to its first {MOST_PIECES} word pieces." if any(one.was_cut for one in both) else ""
        text = sentence.text if sentence.pair is None else f"{sentence.text} | {sentence.pair}"
        shown = text if len(text) <= 240 else f"{text[:240]}…"
        blocks += [Quote(shown, f"{sentence.why}.{cut}"), *_pairs(run, number, both)]
    return blocks


def _pairs(run: Run, number: int, both: tuple[Seen, Seen]) -> Iterator[Group]:
    teacher, student = both
    pairs = run.layer_map.attention
    for own, source in pairs:
        summary = f"student layer {own} ← teacher layer {source}"
        if not run.tokenizers_differ:
            alike = overlap(teacher.layers[source - 1], student.layers[own - 1])
            summary += f": {alike:.0%} of the attention is on the same pieces"
        figures = [
            Figure(
                f"{who.capitalize()}, layer {layer}",
                plots.attention(
                    f"attention-{number}-{own}-{who}",
                    f"Attention of {who} layer {layer} over {len(seen.pieces)} word pieces.",
                    seen.layers[layer - 1],
                    seen.pieces,
                    who,
                ),
            )
            for who, layer, seen in (("teacher", source, teacher), ("student", own, student))
        ]
        yield Group(figures, summary, open=(own, source) == pairs[-1])
