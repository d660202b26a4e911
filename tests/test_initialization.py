"""Claims about a student cut out of its teacher: exact where it can be, the best of its rank where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from distill.activations import Needs, capture
from distill.attention import show_attention
from distill.initialization import cut as cut_module
from distill.initialization import cut_student
from distill.initialization.cut import head_importance, share_heads
from distill.initialization.layout import LAYOUTS, encoder_layers
from distill.initialization.observe import observe
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.losses import Logits, Match, TaskLosses
from distill.objective import Objective
from distill.settings import UserError
from distill.students import Student
from distill.tasks import TASKS
from tests.conftest import LENGTHS
from tests.cut_students import build

EVERYTHING = Needs(hidden=frozenset(range(5)), logits=True)


@pytest.fixture
def sample(make_batch) -> list[dict[str, Tensor]]:
    """What the student is cut on."""
    return [make_batch(LENGTHS, seed) for seed in (1, 2)]


def cut(teacher: PreTrainedModel, sample: list[dict[str, Tensor]], **changes: object) -> Student:
    student = build(teacher, **changes)
    layers = build_layer_map(LayerMapOptions(), student.model.config.num_hidden_layers, 4)
    cut_student(student, teacher, layers, sample)
    return student


@torch.no_grad()
def assert_same(student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Hidden states of real tokens and logits, to float32's rounding over four layers."""
    own, expected = student(batch, EVERYTHING), capture(teacher, batch, EVERYTHING)
    valid = batch["attention_mask"].bool()
    for m in range(5):
        torch.testing.assert_close(own.hidden[m][valid], expected.hidden[m][valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.logits, expected.logits, rtol=1e-4, atol=1e-4)


# Exact where nothing has to be left out


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_a_student_of_the_teachers_shape_is_the_teacher(family: str, build_model, sample, fresh) -> None:
    teacher = build_model(family)
    assert_same(cut(teacher, sample), teacher, fresh)


def test_ernies_task_embeddings_come_along(build_model, sample, fresh) -> None:
    teacher = build_model("ernie", use_task_id=True)
    assert_same(cut(teacher, sample), teacher, fresh)


@pytest.mark.parametrize("projection", ["per_layer", "shared", "separate_embedding"])
def test_projections_of_equal_width_start_as_the_identity(projection: str, teacher, sample, fresh) -> None:
    student = cut(teacher, sample, projection=projection, projection_bias=True)
    for linear in student.projections.values():
        assert torch.equal(linear.weight, torch.eye(16))
        assert not linear.bias.any()
    assert_same(student, teacher, fresh)


def test_a_wider_feed_forward_block_adds_nothing_yet(teacher, sample, fresh) -> None:
    assert_same(cut(teacher, sample, intermediate_size=40), teacher, fresh)


def test_feed_forward_neurons_that_do_nothing_are_the_ones_left_out(teacher, sample, fresh) -> None:
    dead = [1, 2, 5, 8, 11, 12, 19, 23]
    for layer in teacher.bert.encoder.layer:
        layer.output.dense.weight[:, dead[:4]] = 0  # nobody hears them
        layer.intermediate.dense.bias[dead[4:]] = -100  # they never speak
    assert_same(cut(teacher, sample, intermediate_size=24 - len(dead)), teacher, fresh)


def test_wider_heads_add_nothing_yet_and_can_still_learn(teacher, sample, fresh) -> None:
    """One head of width 16 for two of width 8: where the second does nothing, the first is kept exactly."""
    for layer in teacher.bert.encoder.layer:
        layer.attention.output.dense.weight[:, 8:] = 0
    student = cut(teacher, sample, heads=1)
    assert_same(student, teacher, fresh)

    student(fresh, Needs(logits=True)).logits.square().sum().backward()
    attention = student.model.bert.encoder.layer[3].attention
    for weight in (attention.self.query.weight.grad[8:], attention.output.dense.weight.grad[:, 8:]):
        assert (weight != 0).any(dim=-1).all(), "a spare neuron is stuck at zero"


def test_several_heads_of_one_teacher_head_give_its_output_once(teacher, sample, fresh) -> None:
    """Four heads of width 4 for two of width 8, whose scores have rank 4: together they give both outputs in full."""
    for layer in teacher.bert.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.key):
            linear.weight.view(2, 8, 16)[:, 4:] = 0
            linear.bias.view(2, 8)[:, 4:] = 0
    assert_same(cut(teacher, sample, heads=4), teacher, fresh)


# Heads and neurons that are left out


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(1, 0)]),
        (2, [(1, 0), (3, 0)]),
        (3, [(1, 0), (2, 0), (3, 0)]),
        (4, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        (6, [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1)]),
        (9, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0), (3, 1)]),
    ],
)
def test_the_most_important_heads_are_kept_first_and_doubled_first(count: int, expected: list[tuple[int, int]]) -> None:
    """By hand, of four heads of importance 1, 5, 3, 5: of equals the first comes first."""
    assert share_heads(torch.tensor([1.0, 5.0, 3.0, 5.0]), count) == expected


@torch.no_grad()
def test_a_heads_importance_is_the_error_of_saying_its_mean(teacher, sample) -> None:
    """Measured by changing the teacher: the mean squared change, in the subspace, of the attention's output when the
    head's values are replaced by their mean over the real tokens."""
    layer = encoder_layers(teacher)[1]
    subspace = torch.linalg.qr(torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double()).Q
    view = observe(teacher.base_model, encoder_layers(teacher), [2], sample).layers[2]
    contexts: list[Tensor] = []
    handle = layer.attention_output.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0]))
    for batch in sample:
        capture(teacher, batch, Needs(hidden=frozenset({4})))
    handle.remove()
    rows = torch.cat([c[b["attention_mask"].bool()] for c, b in zip(contexts, sample, strict=True)])
    for head, importance in enumerate(head_importance(layer, view, subspace).tolist()):
        silent = rows.clone()
        columns = slice(8 * head, 8 * head + 8)
        silent[:, columns] = rows[:, columns].mean(0)
        change = (layer.attention_output(silent) - layer.attention_output(rows)).double() @ subspace
        assert importance == pytest.approx(change.square().sum(1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("constant", [0, 1])
def test_a_head_that_always_says_the_same_goes_on_as_a_constant(constant: int, teacher, sample, fresh) -> None:
    """However loud: its values are a bias alone, so the student of one head keeps the other and loses nothing."""
    rows = slice(8 * constant, 8 * constant + 8)
    for layer in teacher.bert.encoder.layer:
        layer.attention.self.value.weight[rows] = 0
        layer.attention.self.value.bias[rows] = 3
    assert_same(cut(teacher, sample, heads=1), teacher, fresh)


def test_neurons_that_always_say_the_same_go_on_as_a_constant(teacher, sample, fresh) -> None:
    constant = [0, 3, 4, 10, 17, 22]
    for layer in teacher.bert.encoder.layer:
        layer.intermediate.dense.weight[constant] = 0
        layer.intermediate.dense.bias[constant] = 2
    assert_same(cut(teacher, sample, intermediate_size=24 - len(constant)), teacher, fresh)


def test_a_shallower_student_takes_the_mapped_layers(teacher, sample) -> None:
    """Explicit pairs choose the layers; an unmapped student layer takes the one in proportion."""
    student = build(teacher, layers=2)
    layers = build_layer_map(LayerMapOptions(pairs=[(1, 3)]), 2, 4)
    cut_student(student, teacher, layers, sample)
    for own, g in zip(student.model.bert.encoder.layer, (3, 4), strict=True):
        source = teacher.bert.encoder.layer[g - 1]
        torch.testing.assert_close(own.intermediate.dense.weight, source.intermediate.dense.weight)
        torch.testing.assert_close(own.output.dense.weight, source.output.dense.weight)
        torch.testing.assert_close(own.attention.output.LayerNorm.weight, source.attention.output.LayerNorm.weight)


# The best of its rank


@torch.no_grad()
def hidden_rows(teacher: PreTrainedModel, sample: list[dict[str, Tensor]], m: int) -> Tensor:
    """Every real token's hidden state, (N, D) float64, from the model run in float64."""
    double = type(teacher)(teacher.config).double().eval()
    double.load_state_dict(teacher.state_dict())
    acts = [capture(double, batch, Needs(hidden=frozenset({m}))) for batch in sample]
    return torch.cat([a.hidden[m][b["attention_mask"].bool()] for a, b in zip(acts, sample, strict=True)])


def test_the_subspace_holds_the_principal_directions_of_all_layers(teacher, sample) -> None:
    """Right singular vectors of the rows of all layers, each layer scaled to the same energy."""
    student = cut(teacher, sample, width=6)
    basis = student.projections["layer_0"].weight.double()
    layers = [hidden_rows(teacher, sample, m) for m in range(5)]
    stacked = torch.cat([rows / rows.norm() for rows in layers])
    principal = torch.linalg.svd(stacked, full_matrices=False).Vh[:6]
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis @ basis.T, principal.T @ principal, rtol=0, atol=1e-5)


def augmented(linear: nn.Linear, rows: slice, basis: Tensor | None = None) -> Tensor:
    """(h, 1) -> the rows' output, as one matrix (rows, D + 1) float64."""
    weight = linear.weight[rows].double() if basis is None else linear.weight[rows].double() @ basis
    return torch.cat((weight, linear.bias[rows].double()[:, None]), dim=1)


@pytest.mark.parametrize(("width", "heads"), [(6, 2), (8, 2), (12, 2), (16, 8)])
@pytest.mark.parametrize("m", [1, 2])
def test_scores_are_the_best_of_their_rank_over_the_tokens_seen(
    teacher, sample, width: int, heads: int, m: int
) -> None:
    """The mean squared error of scores over all pairs of tokens seen is the optimum's: the sum of the squared
    singular values left out of L' M L, where C = L L' (Cholesky) is the tokens' second moment (Eckart-Young)."""
    student = cut(teacher, sample, layers=2, width=width, heads=heads, projection="per_layer")
    basis = student.projections["layer_0"].weight.double()
    own, source = student.model.bert.encoder.layer[m - 1].attention.self, teacher.bert.encoder.layer[2 * m - 1]
    rows = hidden_rows(teacher, sample, 2 * m - 1) @ basis
    seen = torch.cat((rows, torch.ones(len(rows), 1, dtype=torch.float64)), dim=1)
    cholesky = torch.linalg.cholesky(seen.T @ seen / len(seen))
    rank = width // heads
    for j in range(heads):
        mine, theirs = slice(j * rank, (j + 1) * rank), slice(8 * (j * 2 // heads), 8 * (j * 2 // heads) + 8)
        product = augmented(own.query, mine).T @ augmented(own.key, mine) / rank**0.5
        exact = augmented(source.attention.self.query, theirs, basis).T
        exact = exact @ augmented(source.attention.self.key, theirs, basis) / 8**0.5
        error = (seen @ (product - exact) @ seen.T).square().mean()
        left_out = torch.linalg.svdvals(cholesky.T @ exact @ cholesky)[rank:]
        assert left_out[0] > 1e-3, "nothing had to be left out: the test proves nothing"
        assert error.item() == pytest.approx(left_out.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize(("width", "heads"), [(6, 2), (12, 2), (8, 4)])
def test_attention_outputs_are_the_best_of_their_rank_over_the_tokens_seen(
    teacher, sample, width: int, heads: int
) -> None:
    """As for scores; the student heads of one teacher head share the rank."""
    student = cut(teacher, sample, layers=2, width=width, heads=heads, projection="per_layer")
    basis = student.projections["layer_0"].weight.double()
    own, source = student.model.bert.encoder.layer[0].attention, teacher.bert.encoder.layer[1].attention
    rows = hidden_rows(teacher, sample, 1) @ basis
    seen = torch.cat((rows, torch.ones(len(rows), 1, dtype=torch.float64)), dim=1)
    cholesky = torch.linalg.cholesky(seen.T @ seen / len(seen))
    rank = width // 2
    for i in (0, 1):
        mine, theirs = slice(i * rank, (i + 1) * rank), slice(8 * i, 8 * i + 8)
        product = own.output.dense.weight[:, mine].double() @ augmented(own.self.value, mine)
        exact = basis.T @ source.output.dense.weight[:, theirs].double()
        exact = exact @ augmented(source.self.value, theirs, basis)
        error = (seen @ (product - exact).T).square().sum(1).mean()
        left_out = torch.linalg.svdvals(exact @ cholesky)[rank:].square().sum()
        assert error.item() == pytest.approx(left_out.item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("family", list(LAYOUTS))
@torch.no_grad()
def test_a_cut_student_starts_far_nearer_to_the_teacher_than_a_random_one(
    family: str, build_model, sample, fresh
) -> None:
    changes = {"embedding_size": 12} if family == "electra" else {}  # narrower than the hidden states, as in small ones
    teacher = build_model(family, **changes)
    show_attention(teacher)
    layers = build_layer_map(LayerMapOptions(), 2, 4)
    objective = Objective(TaskLosses().intermediate(), Match(layers, Logits.CLASSES))
    losses = [
        objective(student(fresh, objective.student_needs), capture(teacher, fresh, objective.teacher_needs), fresh)
        for student in (
            cut(teacher, sample, layers=2, width=12, intermediate_size=16),
            build(teacher, layers=2, width=12, intermediate_size=16),
        )
    ]
    for name in ("embedding", "hidden"):
        assert losses[0].parts[name] < 0.3 * losses[1].parts[name], name
    assert losses[0].total < 0.4 * losses[1].total


@torch.no_grad()
def test_an_electra_of_its_bert_teachers_shape_is_the_teacher(build_model, sample, fresh) -> None:
    """Their layers are the same; a tagger's head is too."""
    teacher = build_model(auto_class=AutoModelForTokenClassification)
    options = {"family": "electra", "task": TASKS["token_classification"]}
    assert_same(cut(teacher, sample, **options), teacher, fresh)


def embedded(body: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Of each of the 60 pieces at a position that is the mean of all, and of the batch's real tokens."""
    positions = body.embeddings.position_embeddings.weight
    pieces = body.get_input_embeddings().weight[:, None] + positions.mean(0) - positions[0]
    text = {name: batch[name] for name in ("input_ids", "token_type_ids")}
    found = body.embeddings(inputs_embeds=pieces)[:, 0], body.embeddings(**text)[batch["attention_mask"].bool()]
    rows = torch.cat(found)
    return body.embeddings_project(rows) if hasattr(body, "embeddings_project") else rows


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_no_matrix_behind_narrow_embeddings_is_nearer_to_the_teacher(family: str, build_model, sample) -> None:
    """Where it lies the error is flat, half that of the sample's tokens and half that of all pieces. It falls with the
    width."""
    teacher = build_model(family, **({"embedding_size": 12} if family == "electra" else {}))
    batch = {name: torch.cat([part[name] for part in sample]) for name in sample[0]}
    errors = []
    for width in (4, 8, 11):
        student = cut(teacher, sample, embedding_width=width)
        body = student.model.base_model
        assert student.model.config.model_type == "electra"
        assert body.embeddings.word_embeddings.embedding_dim == width
        missed = (embedded(body, batch) - embedded(teacher.base_model, batch).detach()).square().sum(1)
        error = (missed[:60].mean() + missed[60:].mean()) / 2
        matrix = body.embeddings_project
        for weight in (matrix.weight, matrix.bias):
            (slope,) = torch.autograd.grad(error, weight, retain_graph=True)
            assert slope.norm() < 1e-3 * error / weight.norm()
        # Rounding has made nothing of the direction that normalised rows lack.
        assert matrix.weight.abs().max() < 20
        errors.append(error.item())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


@torch.no_grad()
def test_narrow_embeddings_lie_where_they_lose_least(teacher, sample) -> None:
    """Of what text and pieces give, each scaled to 1, the kept part is that of the largest eigenvalues."""
    student = cut(teacher, sample, embedding_width=5)
    states = [capture(teacher, batch, EVERYTHING).hidden[0][batch["attention_mask"].bool()] for batch in sample]
    frame = teacher.bert.embeddings
    at_the_mean = frame.position_embeddings.weight.mean(0) + frame.token_type_embeddings.weight[0]
    pieces = frame.LayerNorm(frame.word_embeddings.weight + at_the_mean)
    moments = [rows.double().T @ rows.double() for rows in (torch.cat(states), pieces)]
    pooled = sum(moment / moment.trace() for moment in moments)
    # The student's vectors are the teacher's, turned: what turns them is the solution of a linear system.
    words = student.model.get_input_embeddings().weight.double()
    turn = torch.linalg.lstsq(frame.word_embeddings.weight.double(), words).solution
    torch.testing.assert_close(turn.T @ turn, torch.eye(5).double(), atol=1e-5, rtol=0)
    kept = (turn.T @ pooled @ turn).trace()
    assert kept.item() == pytest.approx(torch.linalg.eigvalsh(pooled)[-5:].sum().item(), rel=1e-5)


@torch.no_grad()
def test_a_student_wider_than_its_teacher_can_be_cut_too(teacher, sample, fresh) -> None:
    student = cut(teacher, sample, width=24)
    own, expected = student(fresh, EVERYTHING), capture(teacher, fresh, EVERYTHING)
    valid = fresh["attention_mask"].bool()
    error = (own.hidden[4] - expected.hidden[4])[valid].square().mean()
    assert error < 0.05 * expected.hidden[4][valid].square().mean()


@pytest.mark.parametrize("family", ["distilbert", "albert", "modernbert"])
def test_a_teacher_of_another_family_is_refused(family: str, build_model, teacher, sample) -> None:
    student = build(teacher)
    layers = build_layer_map(LayerMapOptions(), 4, 4)
    message = (
        rf"^student\.initialization: a student of the family bert cannot be cut out of .* {family}; .*one family, of "
    )
    with pytest.raises(UserError, match=message + r"bert, .*Set student\.initialization=random, or give a checkpoint"):
        cut_student(student, build_model(family), layers, sample)


def test_a_family_laid_out_otherwise_is_refused(build_model, sample) -> None:
    albert = build(build_model("albert"))
    with pytest.raises(UserError, match="the family albert cannot be cut out of a teacher of the family albert"):
        cut_student(albert, build_model("albert"), build_layer_map(LayerMapOptions(), 4, 4), sample)


def test_the_sample_goes_once_through_the_teacher_and_once_through_the_student(teacher, sample) -> None:
    seen: list[int] = []
    student = build(teacher, layers=2, width=12)
    for body in (teacher.bert, student.model.bert):
        body.register_forward_hook(lambda module, inputs, output: seen.append(module.config.hidden_size))
    cut_student(student, teacher, build_layer_map(LayerMapOptions(), 2, 4), iter(sample))
    assert seen == [16] * len(sample) + [12]


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2])
def test_norms_are_fitted_on_every_token_of_batches_of_different_lengths(
    every: int, teacher, make_batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the fit no other gain and bias of the last norm comes closer to the teacher on the sample: the residual is
    uncorrelated with what goes in, and zero on average. Of a larger sample it is a part of the rows of every batch."""
    sample = [make_batch((4, 9, 7, 2, 8)), make_batch((12, 5, 3, 11, 6), seed=1), make_batch((6, 6, 5), seed=2)]
    places = sum(batch["input_ids"].numel() for batch in sample)
    monkeypatch.setattr(cut_module, "NORM_PIECES", places // every)
    student = cut(teacher, sample, layers=2, width=12)
    norm = student.model.bert.encoder.layer[1].output.LayerNorm
    entered: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    residuals, inputs = [], []
    for whole in sample:
        batch = {name: values[::every] for name, values in whole.items()}
        valid = batch["attention_mask"].bool()
        own = capture(student.model, batch, Needs(hidden=frozenset({2}))).hidden[2]
        goal = capture(teacher, batch, Needs(hidden=frozenset({4}))).hidden[4]
        residuals.append((goal @ student.projections["layer_2"].weight - own)[valid])
        inputs.append(nn.functional.layer_norm(entered[-1], (12,), eps=norm.eps)[valid])
    residual, x = torch.cat(residuals), torch.cat(inputs)
    torch.testing.assert_close(residual.mean(0), torch.zeros(12), rtol=0, atol=1e-5)
    torch.testing.assert_close((residual * x).mean(0), torch.zeros(12), rtol=0, atol=1e-5)


def test_a_student_is_cut_alike_twice(teacher, sample) -> None:
    one, other = (cut(teacher, sample, layers=2, width=12).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_teacher_is_not_changed(teacher, sample) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    cut(teacher, sample, layers=2, width=12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training
