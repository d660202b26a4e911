"""Claims that hold for every loss term: padding, batches, precision, needs, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import BertConfig

from distill.activations import Activations
from distill.attention import AttentionInputs
from distill.layer_map import LayerMap
from distill.losses import (
    IGNORED,
    AttentionLoss,
    EmbeddingLoss,
    GeneralLosses,
    HiddenLoss,
    LabelLoss,
    Logits,
    LogitsLoss,
    LossTerm,
    Match,
    RelationLoss,
    TaskLosses,
    check_models,
)
from distill.settings import UserError
from tests.loss_cases import (
    LABELS,
    LAYERS,
    SHAPES,
    TEACHER_HEAD,
    WIDE,
    B,
    T,
    assert_close,
    evaluate,
    make_activations,
    make_batch,
    pair_of,
)

# All terms


MASKED_TERMS: list[tuple[LossTerm, Logits]] = [
    (EmbeddingLoss(), Logits.CLASSES),
    (HiddenLoss(), Logits.CLASSES),
    (AttentionLoss(), Logits.CLASSES),
    (HiddenLoss(distance="cosine"), Logits.CLASSES),
    (AttentionLoss(heads="averaged"), Logits.CLASSES),
    (AttentionLoss(compare="probabilities"), Logits.CLASSES),
    (RelationLoss(), Logits.CLASSES),
    *((LogitsLoss(form=form), logits) for form in ("kl", "published") for logits in Logits),
    *((LabelLoss(), logits) for logits in Logits),
]


def widened(activations: Activations, extra: int, logits: Logits) -> Activations:
    """`extra` more positions of padding, filled with large numbers."""

    def pad(tensor: Tensor, dimension: int) -> Tensor:
        shape = list(tensor.shape)
        shape[dimension] = extra
        return torch.cat((tensor, 1e3 * torch.randn(shape)), dimension)

    assert activations.logits is not None
    return Activations(
        {m: pad(hidden, 1) for m, hidden in activations.hidden.items()},
        {
            m: AttentionInputs(pad(a.query, 2), pad(a.key, 2), pad(a.value, 2), a.scaling)
            for m, a in activations.attention.items()
        },
        pad(activations.logits, 1) if len(SHAPES[logits]) == 3 else activations.logits,
    )


@pytest.mark.parametrize(("term", "logits"), MASKED_TERMS, ids=str)
def test_padding_does_not_change_a_masked_loss(term: LossTerm, logits: Logits) -> None:
    student, teacher = pair_of(logits)
    labels = torch.tensor(LABELS[logits])
    before = term(student, teacher, {**make_batch(), "labels": labels}, Match(LAYERS, logits))

    if logits is Logits.TOKEN_CLASSES:
        labels = torch.nn.functional.pad(labels, (0, 3), value=IGNORED)
    sides = widened(student, 3, logits), widened(teacher, 3, logits)
    after = term(*sides, {**make_batch(T + 3), "labels": labels}, Match(LAYERS, logits))
    assert_close(after, before.tolist(), tolerance=1e-6)


@pytest.mark.parametrize(("term", "logits"), MASKED_TERMS, ids=str)
def test_an_example_costs_the_same_in_every_batch(term: LossTerm, logits: Logits) -> None:
    """A batch's loss is a mean over examples, however they are spread over batches."""

    def only(activations: Activations, b: int) -> Activations:
        return Activations(
            {m: hidden[b : b + 1] for m, hidden in activations.hidden.items()},
            {
                m: AttentionInputs(*(t[b : b + 1] for t in (a.query, a.key, a.value)), a.scaling)
                for m, a in activations.attention.items()
            },
            None if activations.logits is None else activations.logits[b : b + 1],
        )

    student, teacher = pair_of(logits)
    batch = {**make_batch(), "labels": torch.tensor(LABELS[logits])}
    together = term(student, teacher, batch, Match(LAYERS, logits))
    alone = [
        term(
            only(student, b),
            only(teacher, b),
            {name: tensor[b : b + 1] for name, tensor in batch.items()},
            Match(LAYERS, logits),
        ).item()
        for b in range(B)
    ]
    assert_close(together, alone, tolerance=1e-6)


@pytest.mark.parametrize("logits", list(Logits))
def test_a_model_has_no_distance_from_itself(logits: Logits) -> None:
    model = make_activations(WIDE, TEACHER_HEAD, 1, logits)
    itself = LayerMap(((1, 1), (4, 4)), ((1, 1), (4, 4)), 4, 4)
    terms = (
        EmbeddingLoss(),
        HiddenLoss(),
        HiddenLoss(distance="cosine"),
        AttentionLoss(),
        AttentionLoss(heads="averaged"),
        AttentionLoss(compare="probabilities"),
        RelationLoss(),
        LogitsLoss(temperature=2.0),
    )
    for term in terms:
        assert term(model, model, make_batch(), Match(itself, logits)).abs().max() < 1e-6


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_a_row_of_padding_alone_costs_a_finite_amount(padding: Any) -> None:
    student, teacher = pair_of()
    batch = {"attention_mask": torch.zeros(B, T, dtype=torch.long)}
    for term in (EmbeddingLoss(padding=padding), HiddenLoss(padding=padding), AttentionLoss(padding=padding)):
        values = term(student, teacher, batch, Match(LAYERS, Logits.CLASSES))
        assert values.isfinite().all()
        assert padding == "included" or values.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "term", [EmbeddingLoss(), HiddenLoss(), AttentionLoss(), RelationLoss(), LogitsLoss(), LabelLoss()]
)
def test_a_term_asks_for_all_that_it_reads(term: LossTerm) -> None:
    student_needs, teacher_needs = term.needs(LAYERS)
    sides = [
        Activations(
            {m: side.hidden[m] for m in needs.hidden},
            {m: side.attention[m] for m in needs.attention},
            side.logits if needs.logits else None,
        )
        for side, needs in zip(pair_of(), (student_needs, teacher_needs), strict=True)
    ]
    batch = {**make_batch(), "labels": torch.tensor(LABELS[Logits.CLASSES])}
    values = term(*sides, batch, Match(LAYERS, Logits.CLASSES))
    assert values.shape == (B,)
    assert term.uses_teacher == (teacher_needs.logits or bool(teacher_needs.hidden | teacher_needs.attention))


@pytest.mark.parametrize(
    "term", [EmbeddingLoss(), HiddenLoss(), AttentionLoss(), AttentionLoss(compare="probabilities"), RelationLoss()]
)
def test_intermediate_losses_of_bf16_activations_are_float32(term: LossTerm) -> None:
    sides = []
    for activations in pair_of():
        hidden = {m: tensor.bfloat16() for m, tensor in activations.hidden.items()}
        attention = {
            m: AttentionInputs(a.query.bfloat16(), a.key.bfloat16(), a.value.bfloat16(), a.scaling)
            for m, a in activations.attention.items()
        }
        sides.append(Activations(hidden, attention))
    values = term(*sides, make_batch(), Match(LAYERS, Logits.CLASSES))
    assert_close(values, evaluate(term).tolist(), tolerance=0.05)


# Settings


def test_terms_stand_in_groups_by_name_and_null_switches_one_off() -> None:
    assert list(TaskLosses().intermediate()) == ["embedding", "attention", "hidden"]
    assert list(TaskLosses(relations=RelationLoss()).intermediate())[2] == "relations"
    assert list(TaskLosses().prediction()) == ["logits"]
    assert list(TaskLosses(attention=None, labels=LabelLoss()).intermediate()) == ["embedding", "hidden"]
    assert list(TaskLosses(logits=None, labels=LabelLoss()).prediction()) == ["labels"]


WRONG_SETTINGS = {
    "temperature 0": lambda: LogitsLoss(temperature=0),
    "unknown form": lambda: LogitsLoss(form="cross_entropy"),
    "negative weight": lambda: HiddenLoss(weight=-1),
    "unknown key": lambda: HiddenLoss(weigth=1),
    "general distillation has no logits": lambda: GeneralLosses(logits={}),
}


@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
def test_wrong_settings_are_refused(wrong: str) -> None:
    with pytest.raises(ValidationError):
        WRONG_SETTINGS[wrong]()


def shape(heads: int, width: int) -> BertConfig:
    return BertConfig(num_attention_heads=heads, hidden_size=width)


def test_an_attention_loss_between_different_head_counts_is_refused_with_the_remedies() -> None:
    six, twelve = shape(6, 48), shape(12, 48)
    with pytest.raises(
        UserError,
        match=r"^student\.heads: 6, .* 12 .*student\.heads=12.*general\.losses\.attention=null.*general\.losses\."
        r"relations=.*general\.losses\.attention\.heads=averaged",
    ):
        check_models(GeneralLosses(), "general.losses", six, twelve)
    check_models(TaskLosses(), "task.losses", twelve, twelve)
    for remedy in (
        TaskLosses(attention=None),
        TaskLosses(attention=None, relations=RelationLoss()),
        TaskLosses(attention=AttentionLoss(heads="averaged")),
    ):
        check_models(remedy, "task.losses", six, twelve)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            RelationLoss(relation_heads=5),
            r"relations\.relation_heads: 5 .* width 36 .*teacher's 48\. Set a divisor of 12",
        ),
        (RelationLoss(relations=()), r"relations\.relations: name query, key and value"),
        (RelationLoss(relations=("value", "value")), r"each at most once"),
    ],
)
def test_relations_that_cannot_be_compared_are_refused(term: RelationLoss, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_models(TaskLosses(relations=term), "task.losses", shape(12, 36), shape(12, 48))


def test_padding_cannot_be_included_in_probabilities() -> None:
    losses = TaskLosses(attention=AttentionLoss(compare="probabilities", padding="included"))
    with pytest.raises(UserError, match=r"task\.losses\.attention\.padding: included"):
        check_models(losses, "task.losses", shape(2, 12), shape(2, 12))
