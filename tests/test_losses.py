"""Claims about each loss term's value and gradient; the oracles are loops over single positions in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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

LENGTHS = (5, 3, 1)
B, T, D, H, C = 3, 5, 6, 2, 4
STUDENT_HEAD, TEACHER_HEAD = 3, 8
LAYERS = LayerMap(attention=((1, 2), (2, 4)), hidden=((1, 1), (2, 4)), student_layers=2, teacher_layers=4)
SHAPES = {
    Logits.CLASSES: (B, C),
    Logits.BINARIES: (B, C),
    Logits.VALUE: (B, 1),
    Logits.TOKEN_CLASSES: (B, T, C),
    Logits.SPAN: (B, T, 2),
}
NARROW, WIDE = range(3), range(5)  # student and teacher layers that the tests make, hidden 0 included


def make_batch(width: int = T) -> dict[str, Tensor]:
    return {"attention_mask": (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()}


def make_activations(layers: range, head: int, seed: int, logits: Logits = Logits.CLASSES) -> Activations:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Activations(
        hidden={m: random(B, T, D) for m in layers},
        attention={
            m: AttentionInputs(*(random(B, H, T, head) for _ in range(3)), scaling=head**-0.5) for m in layers if m
        },
        logits=2 * random(*SHAPES[logits]),
    )


def pair_of(logits: Logits = Logits.CLASSES) -> tuple[Activations, Activations]:
    return make_activations(NARROW, STUDENT_HEAD, 1, logits), make_activations(WIDE, TEACHER_HEAD, 2, logits)


def evaluate(term: LossTerm, logits: Logits = Logits.CLASSES, **more: Tensor) -> Tensor:
    student, teacher = pair_of(logits)
    return term(student, teacher, {**make_batch(), **more}, Match(LAYERS, logits))


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def assert_close(values: Tensor, expected: list[float], tolerance: float = 1e-5) -> None:
    assert values.dtype is torch.float32
    assert values.tolist() == pytest.approx(expected, rel=tolerance, abs=1e-7)


# Hidden states and embeddings


def hidden_oracle(student: Tensor, teacher: Tensor, positions: list[range]) -> list[float]:
    s, t = as_array(student), as_array(teacher)
    return [
        math.fsum((s[b, i, d] - t[b, i, d]) ** 2 for i in valid for d in range(D)) / (len(valid) * D)
        for b, valid in enumerate(positions)
    ]


POSITIONS = {"masked": [range(length) for length in LENGTHS], "included": [range(T)] * B}


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_embedding_loss_is_the_mean_squared_error_of_hidden_state_zero(padding: Any) -> None:
    student, teacher = pair_of()
    assert_close(
        evaluate(EmbeddingLoss(padding=padding)),
        hidden_oracle(student.hidden[0], teacher.hidden[0], POSITIONS[padding]),
    )


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_hidden_loss_sums_the_errors_of_the_mapped_pairs(padding: Any) -> None:
    student, teacher = pair_of()
    per_pair = [hidden_oracle(student.hidden[m], teacher.hidden[g], POSITIONS[padding]) for m, g in LAYERS.hidden]
    assert_close(evaluate(HiddenLoss(padding=padding)), np.sum(per_pair, axis=0).tolist())


def cosine_oracle(student: Tensor, teacher: Tensor, valid: list[range]) -> list[float]:
    s, t = as_array(student), as_array(teacher)
    angles = [
        [1 - s[b, i] @ t[b, i] / math.sqrt((s[b, i] @ s[b, i]) * (t[b, i] @ t[b, i])) for i in rows]
        for b, rows in enumerate(valid)
    ]
    return [math.fsum(row) / len(row) for row in angles]


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_cosine_distance_is_one_minus_the_cosine_of_each_position(padding: Any) -> None:
    student, teacher = pair_of()
    per_pair = [cosine_oracle(student.hidden[m], teacher.hidden[g], POSITIONS[padding]) for m, g in LAYERS.hidden]
    assert_close(evaluate(HiddenLoss(distance="cosine", padding=padding)), np.sum(per_pair, axis=0).tolist())
    assert_close(
        evaluate(EmbeddingLoss(distance="cosine", padding=padding)),
        cosine_oracle(student.hidden[0], teacher.hidden[0], POSITIONS[padding]),
    )


def test_cosine_distance_by_hand() -> None:
    """(3, 4) against (4, 3) is 1 - 24/25; against its own double, 0; against its opposite, 2."""
    student = Activations(hidden={0: torch.tensor([[[3.0, 4.0]]]).repeat(3, 1, 1)})
    teacher = Activations(hidden={0: torch.tensor([[[4.0, 3.0]], [[6.0, 8.0]], [[-3.0, -4.0]]])})
    term, batch = EmbeddingLoss(distance="cosine"), {"attention_mask": torch.ones(3, 1)}
    assert_close(term(student, teacher, batch, Match(LAYERS, Logits.CLASSES)), [1 / 25, 0, 2], tolerance=1e-6)


def test_a_difference_of_two_everywhere_costs_four() -> None:
    student = Activations(hidden={0: torch.full((B, T, D), 3.0)})
    teacher = Activations(hidden={0: torch.ones(B, T, D)})
    assert EmbeddingLoss()(student, teacher, make_batch(), Match(LAYERS, Logits.CLASSES)).tolist() == [4, 4, 4]


# Attention scores


def score(inputs: AttentionInputs, b: int, h: int, i: int, j: int) -> float:
    return math.fsum(as_array(inputs.query)[b, h, i] * as_array(inputs.key)[b, h, j]) / math.sqrt(
        inputs.query.shape[-1]
    )


def attention_oracle(padding: str) -> list[float]:
    """Masked keys score 0 on both sides; masked queries count only where padding is included."""
    student, teacher = pair_of()
    values = []
    for b, length in enumerate(LENGTHS):
        total = 0.0
        for m, g in LAYERS.attention:
            side = range(length) if padding == "masked" else range(T)
            errors = [
                (score(student.attention[m], b, h, i, j) - score(teacher.attention[g], b, h, i, j)) ** 2
                if j < length
                else 0.0
                for h in range(H)
                for i in side
                for j in side
            ]
            total += math.fsum(errors) / len(errors)
        values.append(total)
    return values


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_attention_loss_is_the_mean_squared_error_of_the_scores(padding: Any) -> None:
    assert_close(evaluate(AttentionLoss(padding=padding)), attention_oracle(padding))


def test_attention_loss_by_hand() -> None:
    """Scores [[1, 1], [2, 2]] / 2 against 0: (1 + 1 + 4 + 4) / 4 / 4."""
    query, key = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1), torch.ones(1, 1, 2, 1)
    student = Activations(attention={1: AttentionInputs(query, key, key, scaling=0.5)})
    teacher = Activations(attention={1: AttentionInputs(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4), key, 0.5)})
    match = Match(LayerMap(((1, 1),), ((1, 1),), 1, 1), Logits.CLASSES)
    assert AttentionLoss()(student, teacher, {"attention_mask": torch.ones(1, 2)}, match).tolist() == [0.625]


def plain_map_gradients(student: AttentionInputs, teacher: AttentionInputs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 autograd of the formula as the paper writes it: two T x T maps, their difference, a masked mean."""
    query, key = (tensor.detach().double().requires_grad_() for tensor in (student.query, student.key))
    student_map = torch.einsum("bhid,bhjd->bhij", query, key) / math.sqrt(query.shape[-1])
    teacher_map = torch.einsum("bhid,bhjd->bhij", teacher.query.double(), teacher.key.double())
    teacher_map /= math.sqrt(teacher.query.shape[-1])
    valid = (mask[:, None, :, None] * mask[:, None, None, :]).double()
    squares = (student_map - teacher_map) ** 2 * valid
    (squares.sum((1, 2, 3)) / (H * valid.sum((1, 2, 3)))).mean().backward()
    assert query.grad is not None
    assert key.grad is not None
    return query.grad, key.grad


def attention_gradient_error(student: AttentionInputs, teacher: AttentionInputs) -> float:
    """Largest error of our gradients, relative to the largest entry of the exact ones."""
    batch, match = make_batch(), Match(LayerMap(((1, 1),), ((1, 1),), 1, 1), Logits.CLASSES)
    query, key = (tensor.clone().requires_grad_() for tensor in (student.query, student.key))
    ours = Activations(attention={1: AttentionInputs(query, key, student.value, student.scaling)})
    AttentionLoss()(ours, Activations(attention={1: teacher}), batch, match).mean().backward()
    exact = plain_map_gradients(student, teacher, batch["attention_mask"])
    return max(
        ((got.grad - want).abs().max() / want.abs().max()).item()
        for got, want in zip((query, key), exact, strict=True)
        if got.grad is not None
    )


def test_attention_gradient_is_that_of_the_plain_score_maps() -> None:
    student, teacher = pair_of()
    assert attention_gradient_error(student.attention[1], teacher.attention[2]) < 1e-6


def test_attention_gradient_stays_right_where_student_and_teacher_nearly_agree() -> None:
    """Differences of 1e-3 lose three of float32's seven digits, as they would in a difference of maps."""
    teacher = make_activations(WIDE, TEACHER_HEAD, 2).attention[1]
    noise = torch.randn(teacher.query.shape, generator=torch.Generator().manual_seed(3))
    student = AttentionInputs(teacher.query + 1e-3 * noise, teacher.key, teacher.value, teacher.scaling)
    assert attention_gradient_error(student, teacher) < 1e-3


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


def mean_map(inputs: AttentionInputs, b: int, n: int, compare: str) -> np.ndarray:
    """Scores or probabilities of an example's n valid positions, averaged over its heads."""
    maps = []
    for h in range(inputs.query.shape[1]):
        scores = np.array([[score(inputs, b, h, i, j) for j in range(n)] for i in range(n)])
        maps.append(scores if compare == "scores" else np.apply_along_axis(softmax, 1, scores))
    return np.mean(maps, axis=0)


def kl(teacher: np.ndarray, student: np.ndarray) -> float:
    """Mean over rows."""
    return float(np.mean([np.sum(t * np.log(t / s)) for t, s in zip(teacher, student, strict=True)]))


def test_probabilities_are_compared_by_their_divergence() -> None:
    student, teacher = pair_of()
    expected = []
    for b, n in enumerate(LENGTHS):
        total = 0.0
        for m, g in LAYERS.attention:
            for h in range(H):
                t, s = (
                    np.array([softmax(np.array([score(a, b, h, i, j) for j in range(n)])) for i in range(n)])
                    for a in (teacher.attention[g], student.attention[m])
                )
                total += kl(t, s) / H
        expected.append(total)
    assert_close(evaluate(AttentionLoss(compare="probabilities")), expected)


@pytest.mark.parametrize("compare", ["scores", "probabilities"])
def test_averaged_heads_compare_mean_maps_of_any_two_head_counts(compare: Any) -> None:
    teacher = make_activations(WIDE, TEACHER_HEAD, 2)
    generator = torch.Generator().manual_seed(4)
    student = Activations(
        attention={
            m: AttentionInputs(*(torch.randn(B, 3, T, 4, generator=generator) for _ in range(3)), scaling=0.5)
            for m in (1, 2)
        }
    )
    expected = []
    for b, n in enumerate(LENGTHS):
        pairs = [
            (mean_map(teacher.attention[g], b, n, compare), mean_map(student.attention[m], b, n, compare))
            for m, g in LAYERS.attention
        ]
        expected.append(sum(float(np.mean((t - s) ** 2)) if compare == "scores" else kl(t, s) for t, s in pairs))
    term = AttentionLoss(compare=compare, heads="averaged")
    assert_close(term(student, teacher, make_batch(), Match(LAYERS, Logits.CLASSES)), expected)


def relation(x: Tensor, b: int, head: int, heads: int, n: int) -> np.ndarray:
    """One relation head of one example: columns [head r, (head + 1) r) of all heads side by side."""
    flat = np.concatenate([as_array(x)[b, h, :n] for h in range(x.shape[1])], axis=1)
    r = flat.shape[1] // heads
    part = flat[:, head * r : (head + 1) * r]
    return np.apply_along_axis(softmax, 1, part @ part.T / math.sqrt(r))


@pytest.mark.parametrize("relations", [("query", "key", "value"), ("value",)])
@pytest.mark.parametrize("heads", [None, 2, 1])
def test_relations_are_compared_by_their_divergence_whatever_the_heads(
    relations: tuple[Any, ...], heads: int | None
) -> None:
    """The teacher's 2 heads of 8 and the student's 2 of 3 are cut anew: by default into gcd(16, 6) = 2."""
    student, teacher = pair_of()
    count = heads or 2
    expected = [
        sum(
            kl(
                relation(getattr(teacher.attention[g], name), b, head, count, n),
                relation(getattr(student.attention[m], name), b, head, count, n),
            )
            / count
            for m, g in LAYERS.attention
            for name in relations
            for head in range(count)
        )
        for b, n in enumerate(LENGTHS)
    ]
    assert_close(evaluate(RelationLoss(relations=relations, relation_heads=heads)), expected)


def test_relation_by_hand() -> None:
    """Values (0, a) of one head of width 1: rows of X X' are (0, 0) and (0, a^2); the teacher's a is 0."""
    values = torch.tensor([[[[0.0], [math.sqrt(math.log(3))]]]])
    zeros = torch.zeros(1, 1, 2, 1)
    student = Activations(attention={1: AttentionInputs(zeros, zeros, values, 1.0)})
    teacher = Activations(attention={1: AttentionInputs(zeros, zeros, zeros, 1.0)})
    match = Match(LayerMap(((1, 1),), ((1, 1),), 1, 1), Logits.CLASSES)
    term, batch = RelationLoss(relations=("value",)), {"attention_mask": torch.ones(1, 2)}
    # Row 1 agrees; row 2 is (1/4, 3/4) against (1/2, 1/2).
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert_close(term(student, teacher, batch, match), [expected])


# Predictions


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def divergence(teacher: np.ndarray, student: np.ndarray, form: str, temperature: float) -> float:
    """Of two distributions over the last axis, as written in the papers."""
    if form == "published":
        return -float(np.sum(teacher * np.log(student))) / len(teacher)
    return temperature**2 * float(np.sum(teacher * np.log(teacher / student)))


def logits_oracle(logits: Logits, form: str, temperature: float) -> list[float]:
    student, teacher = (as_array(side.logits) for side in pair_of(logits) if side.logits is not None)
    values = []
    for s, t, n in zip(student / temperature, teacher / temperature, LENGTHS, strict=True):
        if logits is Logits.CLASSES:
            parts = [divergence(softmax(t), softmax(s), form, temperature)]
        elif logits is Logits.TOKEN_CLASSES:
            parts = [divergence(softmax(t[i]), softmax(s[i]), form, temperature) for i in range(n)]
        elif logits is Logits.SPAN:
            parts = [divergence(softmax(t[:n, e]), softmax(s[:n, e]), form, temperature) for e in (0, 1)]
        elif logits is Logits.BINARIES:
            # A yes-or-no label is a distribution over two classes; no second division is made by them.
            yes = np.stack((sigmoid(t), 1 - sigmoid(t))), np.stack((sigmoid(s), 1 - sigmoid(s)))
            twice = 2 if form == "published" else 1
            parts = [twice * divergence(yes[0][:, c], yes[1][:, c], form, temperature) for c in range(C)]
        else:
            parts = [float((s[0] - t[0]) ** 2) * temperature**2]  # the number itself, the temperature unused
        values.append(math.fsum(parts) / len(parts))
    return values


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("form", ["kl", "published"])
@pytest.mark.parametrize("logits", list(Logits))
def test_logits_loss_is_the_divergence_written_out(logits: Logits, form: Any, temperature: float) -> None:
    assert_close(
        evaluate(LogitsLoss(form=form, temperature=temperature), logits), logits_oracle(logits, form, temperature)
    )


def test_logits_loss_by_hand() -> None:
    """p_t = (3/4, 1/4) against (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)."""
    student = Activations(logits=torch.zeros(1, 2))
    teacher = Activations(logits=torch.tensor([[math.log(3), 0.0]]))
    batch, match = {"attention_mask": torch.ones(1, 1)}, Match(LAYERS, Logits.CLASSES)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert_close(LogitsLoss()(student, teacher, batch, match), [expected])
    assert_close(LogitsLoss(form="published")(student, teacher, batch, match), [math.log(2) / 2])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 50.0])
def test_the_gradient_on_logits_is_t_times_the_difference_of_probabilities(temperature: float) -> None:
    """dL/dz_s = T (p_s - p_t); for large T that tends to (z_s - z_t) / C, centred, and does not vanish."""
    student, teacher = pair_of()
    assert student.logits is not None
    assert teacher.logits is not None
    student.logits.requires_grad_()
    LogitsLoss(temperature=temperature)(student, teacher, make_batch(), Match(LAYERS, Logits.CLASSES)).sum().backward()
    assert student.logits.grad is not None

    pairs = zip(as_array(student.logits) / temperature, as_array(teacher.logits) / temperature, strict=True)
    expected = np.stack([temperature * (softmax(s) - softmax(t)) for s, t in pairs])
    np.testing.assert_allclose(student.logits.grad.numpy(), expected, rtol=1e-4, atol=1e-6)


def labels_oracle(logits: Logits, labels: np.ndarray) -> list[float]:
    student = pair_of(logits)[0].logits
    assert student is not None
    values = []
    for z, label, n in zip(as_array(student), labels, LENGTHS, strict=True):
        if logits is Logits.CLASSES:
            parts = [-math.log(softmax(z)[label])]
        elif logits is Logits.BINARIES:
            parts = [-math.log(sigmoid(z)[c] if label[c] else 1 - sigmoid(z)[c]) for c in range(C)]
        elif logits is Logits.VALUE:
            parts = [float((z[0] - label) ** 2)]
        elif logits is Logits.TOKEN_CLASSES:
            parts = [-math.log(softmax(z[i])[label[i]]) for i in range(T) if label[i] != IGNORED]
        else:
            parts = [-math.log(softmax(z[:n, e])[label[e]]) for e in (0, 1)]
        values.append(math.fsum(parts) / max(1, len(parts)))
    return values


LABELS = {
    Logits.CLASSES: [3, 0, 1],
    Logits.BINARIES: [[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0] * 4],
    Logits.VALUE: [0.5, -1.0, 3.0],
    # The third row carries no label at all.
    Logits.TOKEN_CLASSES: [[IGNORED, 2, IGNORED, 0, IGNORED], [1, 3, IGNORED, IGNORED, IGNORED], [IGNORED] * 5],
    Logits.SPAN: [[1, 4], [0, 2], [0, 0]],
}


@pytest.mark.parametrize("logits", list(Logits))
def test_label_loss_is_the_tasks_own(logits: Logits) -> None:
    labels = torch.tensor(LABELS[logits])
    assert_close(evaluate(LabelLoss(), logits, labels=labels), labels_oracle(logits, labels.numpy()))
    assert not LabelLoss.uses_teacher


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
