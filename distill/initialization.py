"""Cutting a student of any shape out of its teacher's weights, so that training starts near the teacher.
Copying a checkpoint is left to students.py.

The student's hidden state stands for the teacher's in a subspace: h_s = P' h_t, P (D_t, D_s) the leading eigenvectors
of the second moment E[h h'] of the teacher's hidden states. Not centred: the mean is one of the directions, so biases
need no case of their own. Every matrix of the student is then the best rank-limited stand-in for the teacher's product
of matrices in that subspace, weighted by the covariance of what really flows through it:

    embeddings      E P
    queries, keys   per head, rank d_s of  C^1/2 [Q P, b_q]' [K P, b_k] C^1/2, C = E[x x'], x = (P' h, 1)
    values, output  per head, rank d_s of  P' O [V P, b_v] C^1/2
    feed-forward    the neurons with the largest root mean square activation times output norm
    LayerNorms      gain and bias fitted coordinate by coordinate to P' h_t
    projections     P

The idea of a principal subspace with per-head singular factors: this project's design notes; the weighting by C is the
closed-form best approximation under that second moment (Eckart-Young).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.layer_map import LayerMap
from distill.settings import UserError
from distill.students import Student, can_be_cut


@dataclass
class _Layer:
    """The parts of one BERT-family encoder layer, as modules."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    inner: nn.Linear
    outer: nn.Linear
    output_norm: nn.LayerNorm


def _layers(model: PreTrainedModel) -> list[_Layer]:
    try:
        return [
            _Layer(
                layer.attention.self.query,
                layer.attention.self.key,
                layer.attention.self.value,
                layer.attention.output.dense,
                layer.attention.output.LayerNorm,
                layer.intermediate.dense,
                layer.output.dense,
                layer.output.LayerNorm,
            )
            for layer in model.base_model.encoder.layer
        ]
    except AttributeError:
        raise UserError(
            f"student.initialization: a student cannot be cut out of the family {model.config.model_type!r}; set "
            "student.initialization=random."
        ) from None


@torch.no_grad()
def initialize_from_teacher(
    student: Student, teacher: PreTrainedModel, layer_map: LayerMap, batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Fill `student` in place from `teacher`; the task head takes the teacher's, seen through the subspace.

    Args:
        teacher: float32, eval mode, on the batches' device; a BERT-family encoder with or without a task head.
        layer_map: which teacher layer each student layer is cut from (hidden pairs; unmapped layers take the
            nearest teacher layer in proportion).
        batches: a few hundred sequences of real text: input_ids, attention_mask, token_type_ids (B, T).
    """
    batches = list(batches)
    sources = dict(layer_map.hidden)
    count, depth = layer_map.student_layers, layer_map.teacher_layers
    chosen = [sources.get(m, max(1, round(m * depth / count))) for m in range(1, count + 1)]
    teacher_layers, student_layers = _layers(teacher), _layers(student.model)
    body, small = teacher.base_model, student.model.base_model
    width = small.config.hidden_size

    subspace, moments = _subspace(body, batches, width)
    _cut_embeddings(small, body, subspace)
    inner_rms = _inner_rms(body, [teacher_layers[g - 1].inner for g in chosen], batches)
    for m, (target, g) in enumerate(zip(student_layers, chosen, strict=True)):
        source = teacher_layers[g - 1]
        heads = (teacher.config.num_attention_heads, student.model.config.num_attention_heads)
        moment = _with_one(subspace, moments[g - 1])
        _cut_attention(target, source, subspace, moment, heads)
        _cut_feed_forward(target, source, subspace, inner_rms[m])
    _fit_norms(small, body, student_layers, chosen, subspace, batches)
    for projection in student.projections.values():
        assert isinstance(projection, nn.Linear)
        projection.weight.copy_(subspace)
        if projection.bias is not None:
            projection.bias.zero_()
    adopt_head(student, teacher)


@torch.no_grad()
def adopt_head(student: Student, teacher: PreTrainedModel) -> None:
    """Give the student the teacher's task head, read through the projection of the last layer.

    With W h_s + c ~ h_t, a linear head C on hidden states becomes C W. A head C f(A h + b) of two layers (a pooler and
    a classifier, or RoBERTa's and ELECTRA's own) keeps the D_s of its D_t neurons whose outgoing weights are largest:
    rows of A W and columns of C, exact for those it keeps. Heads of other forms stay as they are, and those of students
    that cannot be cut out of the teacher.
    """
    if not can_be_cut(teacher.config, student.model.config):
        return
    source, target = _head(teacher), _head(student.model)
    if source is None or target is None:
        return
    weight, bias = _last_projection(student)
    linear, own = source[-1], target[-1]
    if len(source) == 1:
        own.weight.copy_(linear.weight.float() @ weight)
        own.bias.copy_(linear.bias + linear.weight.float() @ bias)
        return
    inner, own_inner = source[0], target[0]
    count = min(own_inner.out_features, inner.out_features)
    kept = linear.weight.float().norm(dim=0).topk(count).indices.sort().values
    own_inner.weight[:count] = (inner.weight.float() @ weight)[kept]
    own_inner.bias[:count] = (inner.bias + inner.weight.float() @ bias)[kept]
    own.weight[:, :count] = linear.weight[:, kept].to(own.weight.dtype)
    own.weight[:, count:] = 0
    own.bias.copy_(linear.bias)


def _head(model: PreTrainedModel) -> list[nn.Linear] | None:
    """The one or two linear layers of a task head, from the hidden states up."""
    head = getattr(model, "classifier", getattr(model, "qa_outputs", None))
    pooler = getattr(model.base_model, "pooler", None)
    if isinstance(head, nn.Linear):
        return [head] if pooler is None else [pooler.dense, head]
    if head is not None and hasattr(head, "dense") and hasattr(head, "out_proj"):
        return [head.dense, head.out_proj]
    return None


def _last_projection(student: Student) -> tuple[Tensor, Tensor]:
    """W (D_t, D_s) and c (D_t,); the identity and zero where there is no projection."""
    size = student.model.config.hidden_size
    eye = torch.eye(size, device=student.model.device)
    last = student.model.config.num_hidden_layers
    bias = student.project(last, torch.zeros_like(eye[0]))
    return (student.project(last, eye) - bias).T, bias


@dataclass
class _Moment:
    """Second moment and mean of one layer's input, float64: E[h h'] (D, D), E[h] (D,)."""

    second: Tensor
    mean: Tensor


def _subspace(body: PreTrainedModel, batches: list[Mapping[str, Tensor]], width: int) -> tuple[Tensor, list[_Moment]]:
    count = body.config.num_hidden_layers + 1
    size = body.config.hidden_size
    device = body.device
    seconds = torch.zeros(count, size, size, dtype=torch.float64, device=device)
    means = torch.zeros(count, size, dtype=torch.float64, device=device)
    tokens = 0
    for batch in batches:
        hidden_states = _run(body, batch).hidden_states
        valid = batch["attention_mask"].bool()
        tokens += int(valid.sum())
        for index, hidden in enumerate(hidden_states):
            rows = hidden[valid].double()
            seconds[index] += rows.T @ rows
            means[index] += rows.sum(0)
    seconds, means = seconds / tokens, means / tokens
    # Each layer weighs the same, whatever its scale.
    pooled = (seconds / seconds.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]).sum(0)
    if width >= size:
        basis = torch.eye(size, width, dtype=torch.float64, device=device)
    else:
        basis = torch.linalg.eigh(pooled).eigenvectors[:, -width:].flip(1)
    return basis.float(), [_Moment(second, mean) for second, mean in zip(seconds, means, strict=True)]


def _run(body: PreTrainedModel, batch: Mapping[str, Tensor]):  # type: ignore[no-untyped-def]
    names = ("input_ids", "attention_mask", "token_type_ids")
    return body(**{name: batch[name] for name in names if name in batch}, output_hidden_states=True)


def _with_one(subspace: Tensor, moment: _Moment) -> Tensor:
    """E[x x'], x = (P' h, 1), (D_s + 1, D_s + 1) float64."""
    basis = subspace.double()
    width = basis.shape[1]
    full = torch.empty(width + 1, width + 1, dtype=torch.float64, device=basis.device)
    full[:width, :width] = basis.T @ moment.second @ basis
    full[:width, width] = full[width, :width] = basis.T @ moment.mean
    full[width, width] = 1
    return full


def _cut_embeddings(small: PreTrainedModel, body: PreTrainedModel, subspace: Tensor) -> None:
    source, target = body.embeddings, small.embeddings
    if hasattr(body, "embeddings_project"):  # ELECTRA: W (gain * norm(E)); what else the norm does is fitted later
        subspace = (body.embeddings_project.weight * source.LayerNorm.weight).T @ subspace
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "task_type_embeddings"):
        if hasattr(source, name):
            getattr(target, name).weight.copy_(getattr(source, name).weight @ subspace)


def _cut_attention(target: _Layer, source: _Layer, subspace: Tensor, moment: Tensor, heads: tuple[int, int]) -> None:
    """Per head, the weighted best approximation of the score and of the value-output products at the new head width.

    Student head j stands for teacher head floor(j H_t / H_s).
    """
    teacher_heads, student_heads = heads
    root, inverse = _roots(moment)
    queries, keys, values = (_augmented(linear, subspace) for linear in (source.query, source.key, source.value))
    output = subspace.double().T @ source.attention_output.weight.double()
    teacher_width = source.query.out_features // teacher_heads
    student_width = target.query.out_features // student_heads
    # Scores are divided by sqrt(d): the student's larger factor 1/sqrt(d_s) is taken back here, half on either side.
    scale = (student_width / teacher_width) ** 0.25
    for j in range(student_heads):
        i = j * teacher_heads // student_heads
        turn = j - -(-i * student_heads // teacher_heads)  # how many student heads stand for i already
        old, new = _slice(i, teacher_width), _slice(j, student_width)
        rank = min(student_width, teacher_width)
        rows, spare = slice(new.start, new.start + rank), slice(new.start + rank, new.stop)
        left, singular, right = torch.linalg.svd(root @ queries[old].T @ keys[old] @ root)
        factor = singular[:rank].sqrt() * scale
        _set(target.query, rows, (inverse @ left[:, :rank] * factor).T)
        _set(target.key, rows, right[:rank] @ inverse * factor[:, None])
        left, singular, right = torch.linalg.svd(output[:, old] @ values[old] @ root, full_matrices=False)
        # Student heads of one teacher head share its output's directions out; each has all of its scores.
        taken = _slice(turn, rank)
        factor = singular[taken].sqrt()
        _set(target.value, rows, right[taken] @ inverse * factor[:, None])
        target.attention_output.weight[:, rows] = (left[:, taken] * factor).float()
        # A wider head's spare neurons give nothing yet, and can still learn: one factor of each product is 0.
        target.query.weight[spare], target.query.bias[spare] = 0, 0
        target.attention_output.weight[:, spare] = 0
    target.attention_output.bias.copy_(subspace.T @ source.attention_output.bias)


def _cut_feed_forward(target: _Layer, source: _Layer, subspace: Tensor, inner_rms: Tensor) -> None:
    output = subspace.T @ source.outer.weight
    importance = inner_rms * output.norm(dim=0)
    count = min(target.inner.out_features, source.inner.out_features)
    chosen = importance.topk(count).indices.sort().values
    target.inner.weight[:count] = (source.inner.weight @ subspace)[chosen]
    target.inner.bias[:count] = source.inner.bias[chosen]
    target.outer.weight[:, :count] = output[:, chosen]
    target.outer.weight[:, count:] = 0  # neurons that the teacher does not have
    target.outer.bias.copy_(subspace.T @ source.outer.bias)


def _inner_rms(body: PreTrainedModel, inner: list[nn.Linear], batches: list[Mapping[str, Tensor]]) -> list[Tensor]:
    """Root mean square of each feed-forward neuron after the activation, by chosen layer."""
    activation = body.encoder.layer[0].intermediate.intermediate_act_fn
    sums = [torch.zeros(linear.out_features, device=body.device) for linear in inner]
    valid = torch.empty(0)

    def hook(index: int):  # type: ignore[no-untyped-def]
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sums[index] += activation(output[valid]).square().sum(0)

        return add

    handles = [linear.register_forward_hook(hook(index)) for index, linear in enumerate(inner)]
    tokens = 0
    try:
        for batch in batches:
            valid = batch["attention_mask"].bool()
            tokens += int(valid.sum())
            _run(body, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [(total / tokens).sqrt() for total in sums]


def _fit_norms(
    small: PreTrainedModel,
    body: PreTrainedModel,
    student_layers: list[_Layer],
    chosen: list[int],
    subspace: Tensor,
    batches: list[Mapping[str, Tensor]],
) -> None:
    """Give each output LayerNorm the gain and bias that bring it closest to P' h_t, from the first layer up.

    Coordinate by coordinate least squares of the target on the normalised input; a layer is fitted on what the
    already fitted layers below give it. The inner (attention) norms take the mean gain of the teacher's, since no
    hidden state of the teacher is shown there.
    """
    small.eval()
    norms = [small.embeddings.LayerNorm] + [layer.output_norm for layer in student_layers]
    for index, norm in enumerate(norms):
        if index:
            _copy_norm(
                student_layers[index - 1].attention_norm, _layers(body)[chosen[index - 1] - 1].attention_norm, subspace
            )
        sums = torch.zeros(5, norm.normalized_shape[0], dtype=torch.float64, device=body.device)
        count = 0
        seen: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        try:
            for batch in batches:
                seen.clear()
                _run(small, batch)
                valid = batch["attention_mask"].bool()
                x = nn.functional.layer_norm(seen[0][valid], norm.normalized_shape, eps=norm.eps).double()
                y = (_run(body, batch).hidden_states[0 if not index else chosen[index - 1]][valid] @ subspace).double()
                sums += torch.stack((x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0), (y * y).sum(0)))
                count += len(x)
        finally:
            handle.remove()
        mean_x, mean_y, xx, xy, _ = sums / count
        gain = (xy - mean_x * mean_y) / (xx - mean_x.square()).clamp(min=1e-6)
        norm.weight.copy_(gain)
        norm.bias.copy_(mean_y - gain * mean_x)


def _copy_norm(target: nn.LayerNorm, source: nn.LayerNorm, subspace: Tensor) -> None:
    """diag(P' g P) and P' b: the gain of each direction, the cross terms dropped."""
    target.weight.copy_((subspace.square() * source.weight[:, None]).sum(0))
    target.bias.copy_(subspace.T @ source.bias)


def _augmented(linear: nn.Linear, subspace: Tensor) -> Tensor:
    """[W P, b], (out, D_s + 1) float64: acts on (P' h, 1)."""
    return torch.cat((linear.weight @ subspace, linear.bias[:, None]), dim=1).double()


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and its pseudo-inverse, symmetric."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=values[-1] * 1e-9)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def _slice(index: int, width: int) -> slice:
    return slice(index * width, (index + 1) * width)


def _set(linear: nn.Linear, rows: slice, augmented: Tensor) -> None:
    linear.weight[rows] = augmented[:, :-1].float()
    linear.bias[rows] = augmented[:, -1].float()
