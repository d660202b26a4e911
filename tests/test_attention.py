"""Claims about seeing queries, keys and values while attention stays SDPA; every family has them in test_families."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForQuestionAnswering, PreTrainedModel

from distill.activations import Needs, capture
from distill.attention import IMPLEMENTATION, record_attention, show_attention


def heads_of(projected: Tensor, heads: int) -> Tensor:
    """(B, T, H d) -> (B, H, T, d)."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_layer_m_attends_to_hidden_state_m_minus_one(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """The two index spaces fit: attention counts from 1, hidden state 0 is the output of the embeddings."""
    show_attention(teacher)
    acts = capture(teacher, batch, Needs(hidden=frozenset(range(5)), attention=frozenset({1, 2, 3, 4})))
    for m in (1, 2, 3, 4):
        own = teacher.bert.encoder.layer[m - 1].attention.self
        for name in ("query", "key", "value"):
            expected = heads_of(getattr(own, name)(acts.hidden[m - 1]), heads=2)
            torch.testing.assert_close(getattr(acts.attention[m], name), expected, msg=f"{name} of layer {m}")


def test_hidden_state_zero_is_the_output_of_the_embeddings(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    acts = capture(teacher, batch, Needs(hidden=frozenset({0})))
    expected = teacher.bert.embeddings(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"])
    assert torch.equal(acts.hidden[0], expected)


def test_scores_are_scaled_products_of_queries_and_keys(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    show_attention(teacher)
    seen = capture(teacher, batch, Needs(attention=frozenset({3}))).attention[3]
    expected = torch.einsum("bhid,bhjd->bhij", seen.query.double(), seen.key.double()) / math.sqrt(8)
    torch.testing.assert_close(seen.scores().double(), expected, rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_for_is_kept(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    show_attention(teacher)
    acts = capture(teacher, batch, Needs(hidden=frozenset({2}), attention=frozenset({4})))
    assert list(acts.hidden) == [2]
    assert list(acts.attention) == [4]
    assert acts.logits is None
    nothing = capture(teacher, batch, Needs(logits=True))
    assert not nothing.hidden
    assert not nothing.attention


def test_recordings_of_two_models_do_not_mix(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    show_attention(teacher)
    needs = Needs(attention=frozenset({1}))
    first = capture(teacher, batch, needs)
    other = {**batch, "input_ids": batch["input_ids"].flip(0)}
    second = capture(teacher, other, needs)
    assert not torch.equal(first.attention[1].query, second.attention[1].query)
    assert torch.equal(first.attention[1].query, capture(teacher, batch, needs).attention[1].query)


def test_gradients_flow_through_what_is_recorded(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    show_attention(teacher.requires_grad_(True))
    capture(teacher, batch, Needs(attention=frozenset({2}))).attention[2].scores().square().mean().backward()
    layers = teacher.bert.encoder.layer
    assert layers[1].attention.self.query.weight.grad.abs().max() > 0
    assert layers[0].output.dense.weight.grad.abs().max() > 0
    assert layers[1].attention.self.value.weight.grad is None


def test_dropout_draws_what_it_would_draw_in_plain_sdpa(build_model, batch: dict[str, Tensor]) -> None:
    model = build_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = []
    for switch in (lambda: model.set_attn_implementation("sdpa"), lambda: show_attention(model)):
        switch()
        torch.manual_seed(0)
        outputs.append(model(**inputs).logits)
    assert torch.equal(*outputs)


def test_a_model_whose_attention_is_not_shown_is_told_so(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"layers \[1, 2\] were not seen: call show_attention"):
        capture(teacher, batch, Needs(attention=frozenset({1, 2})))


def test_an_error_in_the_forward_pass_is_not_hidden_by_the_recorder(teacher: PreTrainedModel) -> None:
    with pytest.raises(ZeroDivisionError), record_attention(teacher, {1}):
        _ = 1 / 0


def test_nothing_of_it_is_saved(teacher: PreTrainedModel, tmp_path: Path) -> None:
    show_attention(teacher)
    teacher.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert IMPLEMENTATION not in text
    assert "auto_map" not in json.loads(text)
    assert type(teacher).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_span_logits_are_start_and_end(build_model, batch: dict[str, Tensor]) -> None:
    model = build_model(auto_class=AutoModelForQuestionAnswering, num_labels=2)
    logits = capture(model, batch, Needs(logits=True)).logits
    plain = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    assert logits is not None
    assert torch.equal(logits[..., 0], plain.start_logits)
    assert torch.equal(logits[..., 1], plain.end_logits)


def test_the_scale_is_one_over_the_root_of_the_head_width_where_a_family_names_none(teacher: PreTrainedModel) -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    with record_attention(teacher, {1}) as seen:
        output, _ = AttentionInterface()[IMPLEMENTATION](torch.nn.Identity(), query, key, value, None, is_causal=False)
    expected = (seen[1].scores().softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(output, expected)


def test_where_bf16_is_trained_on_a_cpu_attention_is_computed_in_float32() -> None:
    """Its gradients are float32's of the same inputs, rounded once; SDPA's own bf16 ones are further away."""
    shape, generator = (3, 2, 2, 40, 8), torch.Generator().manual_seed(0)
    inputs = [tensor.bfloat16().requires_grad_(True) for tensor in torch.randn(shape, generator=generator)]
    exact = [tensor.detach().double().requires_grad_(True) for tensor in inputs]
    visible = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    visible[1, ..., 30:] = False
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -math.inf)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = AttentionInterface()[IMPLEMENTATION](torch.nn.Identity(), *inputs, visible, is_causal=False)
    assert output.dtype == torch.bfloat16
    query, key, value = exact
    expected = ((query @ key.transpose(-1, -2) / math.sqrt(8) + mask).softmax(-1) @ value).transpose(1, 2)
    slope = torch.randn(expected.shape, generator=generator).bfloat16()
    output.backward(slope)
    expected.backward(slope.double())
    rounding = 2**-8
    torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=1e-6)
    for own, true in zip(inputs, exact, strict=True):
        assert own.grad is not None
        torch.testing.assert_close(own.grad.double(), true.grad, rtol=rounding, atol=1e-5)
