"""Cutting a student of any shape out of its teacher's weights, so that training starts near the teacher.
Seeing what flows through the teacher is left to observe.py, narrow embeddings to narrow.py, the LayerNorms to norms.py,
the task head to head.py.

The student's hidden state stands for the teacher's in a subspace: h_s = P' h_t, P (D_t, D_s) the leading eigenvectors
of the second moment E[h h'] of the teacher's hidden states. Not centred: the mean is one of the directions, so biases
need no case of their own. Every matrix of the student is then the best rank-limited stand-in for the teacher's product
of matrices in that subspace, weighted by the covariance of what really flows through it:

    embeddings      E P
    queries, keys   per head, rank d_s of  C^1/2 [Q P, b_q]' [K P, b_k] C^1/2, C = E[x x'], x = (P' h, 1)
    values, output  per head, rank d_s of  P' O [V P, b_v] C^1/2
    heads           those whose replacement by a constant costs most; see head_importance
    feed-forward    the neurons whose replacement by a constant costs most: Var[a_n] |P' w_n|^2
    narrow ones     E P U and a matrix, fitted to P' h_0 by least squares; see narrow.py
    LayerNorms      gain and bias fitted coordinate by coordinate to P' h_t; inside a layer, where a fit shrinks what
                    the feed-forward block reads (a student skips layers, so it predicts badly there), the teacher's
    projections     P

What is left out goes on as the constant it is on average: heads and neurons leave their mean in the bias.

The idea of a principal subspace with per-head singular factors: this project's design notes; the weighting by C is the
closed-form best approximation under that second moment (Eckart-Young).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.initialization.factors import principal_directions, product_svd, roots
from distill.initialization.head import adopt_head
from distill.initialization.layout import LAYOUTS, Layer, alike, encoder_layers
from distill.initialization.narrow import fit_matrix, narrow_directions, piece_outputs
from distill.initialization.norms import fit_norms
from distill.initialization.observe import LayerView, Moments, View, observe
from distill.layer_map import LayerMap
from distill.settings import UserError
from distill.students import Student

NORM_PIECES = 4_096
"""Places, about, of the rows of the sample on which the norms are fitted, some of every batch. They go through the
student as one batch, padded to the longest, and two numbers for each coordinate need less text than a second moment."""
EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "task_type_embeddings")


def check_cut(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raises UserError where the families differ or their layers are laid out in another way."""
    if not alike(teacher.model_type, student.model_type):
        raise UserError(
            f"student.initialization: a student of the family {student.model_type} cannot be cut out of a teacher of "
            f"the family {teacher.model_type}; both must be of one family, of {', '.join(LAYOUTS)}, or a bert and an "
            "electra (which student.embedding_width makes the student). Set student.initialization=random, or give a "
            "checkpoint."
        )


@torch.no_grad()
def cut_student(
    student: Student, teacher: PreTrainedModel, layer_map: LayerMap, sample: Iterable[Mapping[str, Tensor]]
) -> None:
    """Fill `student` in place from `teacher`; the task head takes the teacher's, seen through the subspace.

    The teacher runs over the sample once, the student over a part of it.

    Args:
        student: moved to the sample's device, and to eval mode.
        teacher: float32, eval mode, on the sample's device; with or without a task head.
        layer_map: which teacher layer each student layer is cut from; see LayerMap.source.
        sample: a few hundred sequences of real text: input_ids, attention_mask, token_type_ids (B, T).

    Raises:
        UserError: see check_cut.
    """
    check_cut(teacher.config, student.model.config)
    batches = list(sample)
    student.to(teacher.device).eval()
    body, small = teacher.base_model, student.model.base_model
    sources = [layer_map.source(m) for m in range(1, layer_map.student_layers + 1)]
    source_layers, target_layers = encoder_layers(teacher), encoder_layers(student.model)

    view = observe(body, source_layers, sources, batches)
    subspace = _subspace(view.moments, small.config.hidden_size)
    _cut_embeddings(student, body, subspace, view, batches)
    for target, g in zip(target_layers, sources, strict=True):
        seen = view.layers[g]
        heads = share_heads(head_importance(source_layers[g - 1], seen, subspace), small.config.num_attention_heads)
        _cut_attention(target, source_layers[g - 1], subspace, _with_one(subspace, view.moments[g - 1]), seen, heads)
        _copy_norm(target.attention_norm, source_layers[g - 1].attention_norm, subspace)
        _cut_feed_forward(target, source_layers[g - 1], subspace, seen)
    norms = [target.output_norm for target in target_layers]
    every = max(1, sum(batch["input_ids"].numel() for batch in batches) // NORM_PIECES)
    goals = [_of_rows(view.states[g], batches, every) for g in sources]
    if not hasattr(small, "embeddings_project"):
        norms.insert(0, small.embeddings.LayerNorm)
        goals.insert(0, _of_rows(view.states[0], batches, every))
    few = [{name: values[::every] for name, values in student.by_position(batch).items()} for batch in batches]
    fit_norms(small, norms, goals, subspace, few)
    for projection in student.projections.values():
        assert isinstance(projection, nn.Linear)
        projection.weight.copy_(subspace)
        if projection.bias is not None:
            projection.bias.zero_()
    adopt_head(student, teacher)


def _of_rows(states: Sequence[Tensor], batches: Sequence[Mapping[str, Tensor]], every: int) -> list[Tensor]:
    """Of the states (N, D) of each batch's real tokens those of the rows 0, `every`, 2 `every`, ..."""
    rows = [batch["attention_mask"].cpu().bool().nonzero()[:, 0] for batch in batches]
    return [kept[row % every == 0] for kept, row in zip(states, rows, strict=True)]


def _subspace(states: Sequence[Moments], width: int) -> Tensor:
    """P, (D_t, D_s): each hidden state weighs the same, whatever its scale."""
    seconds = [moments.second[0] for moments in states]
    pooled = torch.stack([second / second.trace() for second in seconds]).sum(0)
    # What the student will hold is the float32 of it.
    return principal_directions(pooled, width).float().double()


def _with_one(subspace: Tensor, moments: Moments) -> Tensor:
    """E[x x'], x = (P' h, 1), (D_s + 1, D_s + 1)."""
    mean = moments.mean @ subspace
    top = torch.cat((subspace.T @ moments.second[0] @ subspace, mean.T), dim=1)
    return torch.cat((top, torch.cat((mean, torch.ones(1, 1, dtype=mean.dtype)), dim=1)))


def head_importance(source: Layer, seen: LayerView, subspace: Tensor) -> Tensor:
    """What each head tells, (H_t,): E|P' O_i (c_i - E[c_i])|^2, c_i the head's attention-weighted values (d,).

    That is the mean squared error which replacing the head's part of the layer's sum by a constant makes in the
    subspace; the constant itself costs nothing, since a bias can say it.
    """
    outputs = _by_head(subspace.T @ _double(source.attention_output.weight), len(seen.context.mean))
    return torch.einsum("hod,hde,hoe->h", outputs, seen.context.covariance, outputs)


def share_heads(importance: Tensor, count: int) -> list[tuple[int, int]]:
    """(teacher head, turn) for each of `count` student heads, in the order of the teacher's heads.

    Fewer than the teacher's: the most important ones, each once (turn 0). More: every head as often as goes, and the
    most important ones once more; turn 0, 1, ... tells the student heads of one teacher head apart. Of equally
    important heads the first comes first.
    """
    each, extra = divmod(count, len(importance))
    favoured = set(importance.argsort(descending=True, stable=True)[:extra].tolist())
    return [(i, turn) for i in range(len(importance)) for turn in range(each + (i in favoured))]


def _cut_embeddings(
    student: Student, body: PreTrainedModel, subspace: Tensor, view: View, batches: Sequence[Mapping[str, Tensor]]
) -> None:
    source, small = body.embeddings, student.model.base_model
    directions, pieces = subspace, None
    if hasattr(small, "embeddings_project"):
        pieces = piece_outputs(body, student.own_rows(source.word_embeddings.weight))
        width = small.embeddings.word_embeddings.embedding_dim
        directions = subspace @ narrow_directions(pieces, view.moments[0], subspace, width)
    if hasattr(body, "embeddings_project"):  # ELECTRA: W (gain * norm(E)); what else the norm does is fitted later
        directions = _double(body.embeddings_project.weight * source.LayerNorm.weight).T @ directions
    for name in EMBEDDINGS:
        if hasattr(source, name):
            weight = getattr(source, name).weight.cpu()
            rows = student.own_rows(weight) if name == "word_embeddings" else weight
            getattr(small.embeddings, name).weight.copy_(rows @ directions.float())
    if pieces is not None:
        fit_matrix(student, pieces, view.states[0], subspace, batches)


def _cut_attention(
    target: Layer, source: Layer, subspace: Tensor, moment: Tensor, seen: LayerView, heads: list[tuple[int, int]]
) -> None:
    """Per head, the weighted best approximation of the score and of the value-output product at the new head width."""
    teacher_heads = len(seen.context.mean)
    root, inverse = roots(moment)
    queries, keys, values = (
        root @ _augmented(linear, subspace).view(teacher_heads, -1, len(root)).mT
        for linear in (source.query, source.key, source.value)
    )
    outputs = _by_head(subspace.T @ _double(source.attention_output.weight), teacher_heads)
    old, new = queries.shape[-1], target.query.out_features // len(heads)
    # Scores are divided by sqrt(d): the student's larger factor 1/sqrt(d_s) is taken back here, half on either side.
    scale = (new / old) ** 0.25
    scores, summands = product_svd(queries, keys), product_svd(outputs, values)
    for j, (i, turn) in enumerate(heads):
        left, singular, right = (part[i] for part in scores)
        rank = min(new, old)
        factor = singular[:rank].sqrt() * scale
        _set(target.query, j * new, (inverse @ left[:, :rank] * factor).T)
        _set(target.key, j * new, right[:rank] @ inverse * factor[:, None])
        # A wider head's spare neurons give nothing yet, and can still learn: one factor of each product is 0.
        _set(target.query, j * new + rank, torch.zeros(new - rank, len(root)))

        # Student heads of one teacher head share its output's directions out; each has all of its scores.
        left, singular, right = (part[i] for part in summands)
        taken = slice(turn * rank, (turn + 1) * rank)
        factor = singular[taken].sqrt()
        _set(target.value, j * new, right[taken] @ inverse * factor[:, None])
        columns = torch.zeros(len(left), new, dtype=left.dtype)
        columns[:, : len(factor)] = left[:, taken] * factor
        target.attention_output.weight[:, j * new : (j + 1) * new] = columns.to(target.attention_output.weight)
    constant = _double(source.attention_output.bias) @ subspace
    for i in set(range(teacher_heads)) - {i for i, _ in heads}:
        constant += outputs[i] @ seen.context.mean[i]
    target.attention_output.bias.copy_(constant)


def _copy_norm(target: nn.LayerNorm, source: nn.LayerNorm, subspace: Tensor) -> None:
    """diag(P' g P) and P' b: the gain of each direction, the cross terms dropped."""
    target.weight.copy_(_double(source.weight) @ subspace.square())
    target.bias.copy_(_double(source.bias) @ subspace)


def _cut_feed_forward(target: Layer, source: Layer, subspace: Tensor, seen: LayerView) -> None:
    output = subspace.T @ _double(source.outer.weight)
    mean, variance = seen.inner.mean[:, 0], seen.inner.covariance[:, 0, 0]
    ranked = (variance * output.square().sum(0)).argsort(descending=True, stable=True)
    count = min(target.inner.out_features, source.inner.out_features)
    kept, left_out = ranked[:count].sort().values, ranked[count:]
    target.inner.weight[:count] = (_double(source.inner.weight) @ subspace)[kept].to(target.inner.weight)
    target.inner.bias[:count] = source.inner.bias[kept.to(source.inner.bias.device)]
    target.outer.weight[:, :count] = output[:, kept].to(target.outer.weight)
    target.outer.weight[:, count:] = 0  # neurons that the teacher does not have
    target.outer.bias.copy_(_double(source.outer.bias) @ subspace + output[:, left_out] @ mean[left_out])


def _augmented(linear: nn.Linear, subspace: Tensor) -> Tensor:
    """[W P, b], (out, D_s + 1): acts on (P' h, 1)."""
    return torch.cat((_double(linear.weight) @ subspace, _double(linear.bias)[:, None]), dim=1)


def _by_head(matrix: Tensor, heads: int) -> Tensor:
    """(out, H d) -> (H, out, d)."""
    return matrix.view(len(matrix), heads, -1).transpose(0, 1)


def _double(parameter: Tensor) -> Tensor:
    return parameter.cpu().double()


def _set(linear: nn.Linear, first: int, augmented: Tensor) -> None:
    rows = slice(first, first + len(augmented))
    linear.weight[rows] = augmented[:, :-1].to(linear.weight)
    linear.bias[rows] = augmented[:, -1].to(linear.bias)
