"""Claims about teachers: which families show their attention, and what makes a checkpoint a teacher."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from distill import attention, tiny
from distill.activations import Needs, capture, model_inputs
from distill.attention import AttentionInputs, show_attention
from distill.families import positions
from distill.losses import AttentionLoss, LossTerm, RelationLoss
from distill.settings import UserError
from distill.tasks import TASKS
from distill.teachers import Checkpoint, freeze, load_encoder, load_teacher, open_checkpoint

INTERFACE = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "distilbert",
    "albert",
    "ernie",
    "mobilebert",
    "nomic_bert",
    "modernbert",
)
RULES = ("mpnet", "deberta-v2")
SHOWN = INTERFACE + RULES
EVERYTHING = Needs(hidden=frozenset(range(5)), attention=frozenset({1, 2, 3, 4}), logits=True)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without token types, which not every family takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def hooks_of(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# What is seen


def mpnet_bias(model: PreTrainedModel, shown: AttentionInputs, layer: int) -> Tensor:
    """One learned number a head and distance, distances after the query counted from 16; exact ones up to 8."""
    places = torch.arange(shown.query.shape[-2])
    distance = places[:, None] - places
    weight = model.base_model.encoder.relative_attention_bias.weight
    return weight[distance.abs() + 16 * (distance < 0)].permute(2, 0, 1)


def deberta_bias(model: PreTrainedModel, shown: AttentionInputs, layer: int) -> Tensor:
    """(q_i . K(i - j) + k_j . Q(i - j)) / sqrt(3 d), K and Q the relative positions seen as keys and queries."""
    encoder = model.base_model.encoder
    own = encoder.layer[layer - 1].attention.self
    table = encoder.get_rel_embedding()
    keys, queries = (proj(table).unflatten(-1, (2, -1)).transpose(0, 1) for proj in (own.key_proj, own.query_proj))
    places = torch.arange(shown.query.shape[-2])
    index = places[:, None] - places + len(table) // 2
    content_to_position = torch.einsum("bhid,hijd->bhij", shown.query, keys[:, index])
    position_to_content = torch.einsum("bhjd,hijd->bhij", shown.key, queries[:, index])
    return (content_to_position + position_to_content) / (3 * shown.query.shape[-1]) ** 0.5


BIASES = {"mpnet": mpnet_bias, "deberta-v2": deberta_bias}


@pytest.mark.parametrize("family", SHOWN)
@torch.no_grad()
def test_the_softmax_of_the_shown_scores_is_the_models_own_probability(
    family: str, build_model, batch: dict[str, Tensor]
) -> None:
    """With what the family adds before its softmax: the mask, and terms of position where it has a rule here."""
    model = build_model(family)
    show_attention(model)
    shown = capture(model, inputs_of(batch), EVERYTHING).attention
    if family in INTERFACE:
        model.set_attn_implementation("eager")
    eager = model(**inputs_of(batch), output_attentions=True).attentions
    assert len(shown) == len(eager) == 4
    for m, probabilities in enumerate(eager, start=1):
        scores = shown[m].scores()
        if family in BIASES:
            bias = BIASES[family](model, shown[m], m)
            assert bias.abs().max() > 0.1, "the test would pass without the bias"
            scores = scores + bias
        lengths = batch["attention_mask"].sum(-1).tolist()
        assert lengths[0] == 9, "a row without padding"
        assert min(lengths) == 3, "a row with padding"
        for row, n in enumerate(lengths):
            own = scores[row, :, :n, :n].softmax(-1)
            torch.testing.assert_close(own, probabilities[row, :, :n, :n], rtol=1e-4, atol=1e-6, msg=f"layer {m}")
        assert probabilities[2, :, :3, 3:].max() == 0, "padding gets nothing"


@torch.no_grad()
def test_a_window_narrower_than_the_text_is_shown_with_the_scores(build_model, batch: dict[str, Tensor]) -> None:
    model = build_model("modernbert", local_attention=4)
    show_attention(model)
    shown = capture(model, inputs_of(batch), EVERYTHING).attention
    model.set_attn_implementation("eager")
    eager = model(**inputs_of(batch), output_attentions=True).attentions
    assert [shown[m].window for m in (1, 2, 3, 4)] == [None, 2, 2, None], "every third layer is global"
    for m, probabilities in enumerate(eager, start=1):
        visible = shown[m].visible()
        if visible is None:
            visible = torch.ones(9, 9, dtype=torch.bool)
        else:
            assert visible.sum(-1).tolist() == [3, 4, 5, 5, 5, 5, 5, 4, 3]
        for row, n in enumerate(batch["attention_mask"].sum(-1).tolist()):
            scores = shown[m].scores()[row].masked_fill(~visible, float("-inf"))[:, :n, :n]
            torch.testing.assert_close(scores.softmax(-1), probabilities[row, :, :n, :n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("window", "narrows"), [(None, False), (8, False), (7, True)])
def test_a_window_that_holds_the_whole_text_hides_nothing(window: int | None, narrows: bool) -> None:
    inputs = AttentionInputs(*torch.ones(3, 1, 1, 9, 2), scaling=1.0, window=window)
    assert (inputs.visible() is not None) == narrows


@pytest.mark.parametrize("family", RULES)
@torch.no_grad()
def test_values_are_what_the_probabilities_weigh(family: str, build_model, batch: dict[str, Tensor]) -> None:
    model = build_model(family)
    attended: list[Tensor] = []
    layer = model.base_model.encoder.layer[1]
    output = layer.attention.attn.o if family == "mpnet" else layer.attention.output.dense
    output.register_forward_pre_hook(lambda module, inputs: attended.append(inputs[0]))
    shown = capture(model, inputs_of(batch), Needs(attention=frozenset({2}))).attention[2]
    own = model(**inputs_of(batch), output_attentions=True).attentions[1]
    torch.testing.assert_close((own @ shown.value).transpose(1, 2).flatten(2), attended[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", RULES)
def test_gradients_flow_through_content_scores_to_the_projections(
    family: str, build_model, batch: dict[str, Tensor]
) -> None:
    model = build_model(family)
    capture(model, inputs_of(batch), Needs(attention=frozenset({2}))).attention[2].scores().square().mean().backward()
    trained = {
        name.split("layer.")[1].split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and ".layer." in name
    }
    assert trained == {"0", "1"}


@pytest.mark.parametrize("family", SHOWN)
@torch.no_grad()
def test_scores_are_seen_under_autocast(family: str, build_model, batch: dict[str, Tensor]) -> None:
    model = build_model(family)
    show_attention(model)
    needs = Needs(attention=frozenset({1}))
    exact = capture(model, inputs_of(batch), needs).attention[1]
    with torch.autocast("cpu", torch.bfloat16):
        rough = capture(model, inputs_of(batch), needs).attention[1]
    assert rough.value.dtype == torch.bfloat16
    assert (rough.scores() - exact.scores()).abs().max() < 0.03 * exact.scores().abs().max()


# What it costs


@pytest.mark.parametrize("family", SHOWN)
@torch.no_grad()
def test_showing_attention_changes_no_bit_of_the_outputs(family: str, build_model, batch: dict[str, Tensor]) -> None:
    """Of the model that transformers makes, which is SDPA's where the family has it."""
    model = build_model(family)
    plain = model(**inputs_of(batch), output_hidden_states=True)
    show_attention(model)
    shown = capture(model, inputs_of(batch), EVERYTHING)
    assert torch.equal(shown.logits, plain.logits)
    assert all(torch.equal(shown.hidden[i], plain.hidden_states[i]) for i in range(5))
    assert "sdpa_shown" not in model.config.to_json_string()


@pytest.mark.parametrize("family", SHOWN)
@torch.no_grad()
def test_attention_that_is_not_asked_for_is_neither_kept_nor_computed_otherwise(
    family: str, build_model, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(family)
    show_attention(model)
    kept, fused = mock.Mock(wraps=AttentionInputs), mock.Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(attention, "AttentionInputs", kept)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    hooks: list[int] = []
    if family in RULES:
        model.base_model.encoder.register_forward_pre_hook(lambda module, inputs: hooks.append(hooks_of(model)))
    capture(model, inputs_of(batch), Needs(hidden=frozenset({4}), logits=True))
    assert kept.call_count == 0
    assert fused.call_count == (4 if family in INTERFACE else 0)
    capture(model, inputs_of(batch), Needs(attention=frozenset({2, 3}), logits=True))
    assert kept.call_count == 2, "two layers were asked for"
    assert fused.call_count == (8 if family in INTERFACE else 0)
    assert hooks == ([1, 1 + 2 * 3] if family in RULES else []), "this test's own, and three a recorded layer"


@pytest.mark.parametrize("family", RULES)
def test_hooks_are_gone_when_the_forward_pass_fails(family: str, build_model) -> None:
    model = build_model(family)
    ids = torch.full((1, 3), 10**6)  # no such piece
    with pytest.raises(IndexError):
        capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Needs(attention=frozenset({2})))
    assert hooks_of(model) == 0


# What cannot be seen


UNSEEN = {
    "megatron-bert": ({}, r"megatron-bert does not call its attention through"),
    "deberta": ({}, r"deberta does not call its attention through"),
    "albert": ({"inner_group_num": 2}, r"inner_group_num=2 attends several times a layer"),
}


@pytest.mark.parametrize("family", UNSEEN)
@pytest.mark.parametrize("term", [AttentionLoss(), RelationLoss()], ids=["scores", "relations"])
def test_terms_on_attention_that_cannot_be_seen_are_refused_with_the_remedy(
    family: str, term: LossTerm, build_model, batch: dict[str, Tensor]
) -> None:
    changes, reason = UNSEEN[family]
    model, student = build_model(family, **changes), build_model()
    with pytest.raises(UserError, match=rf"task\.losses\.one: .*{reason}.* Set task\.losses\.one=null"):
        term.check("task.losses.one", student.config, model.config)
    show_attention(model)
    with pytest.raises(ValueError, match=reason):
        capture(model, inputs_of(batch), Needs(attention=frozenset({1})))
    assert capture(model, inputs_of(batch), Needs(hidden=frozenset({4}), logits=True)).logits is not None, "it helps"


@pytest.mark.parametrize("family", SHOWN)
def test_terms_on_attention_take_every_family_that_is_seen(family: str, build_model) -> None:
    AttentionLoss().check("task.losses.attention", build_model().config, build_model(family).config)


# Inputs


@pytest.mark.parametrize(
    ("family", "changes", "taken"),
    [
        ("bert", {}, True),
        ("electra", {}, True),
        ("nomic_bert", {}, True),
        ("deberta-v2", {"type_vocab_size": 2}, True),
        ("deberta-v2", {}, False),
        ("roberta", {"type_vocab_size": 1}, False),
        ("distilbert", {}, False),
        ("modernbert", {}, False),
        ("mpnet", {}, False),
    ],
)
@torch.no_grad()
def test_token_types_are_given_to_families_that_tell_them_apart(
    family: str, changes: dict[str, int], taken: bool, build_model, batch: dict[str, Tensor]
) -> None:
    model = build_model(family, **changes)
    assert set(model_inputs(model, batch)) == {"input_ids", "attention_mask"} | ({"token_type_ids"} if taken else set())
    other = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}
    logits = [capture(model, each, Needs(logits=True)).logits for each in (batch, other)]
    assert torch.equal(*logits) != taken


# Positions

OFFSET = {"roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text"}


@pytest.mark.parametrize("family", sorted(OFFSET.union(SHOWN)))
@torch.no_grad()
def test_every_family_reads_as_many_pieces_as_it_says(family: str, build_model) -> None:
    model = build_model(family, pad_token_id=1)
    most = positions(model.config)
    ids = torch.full((1, most + 1), 7)
    assert model(input_ids=ids[:, :-1], attention_mask=torch.ones(1, most)).logits.isfinite().all()
    if family in OFFSET:
        assert most == 38
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones(1, most + 1))
    else:
        assert most == 40


# Loading

NAMES = ["weather", "music", "sport"]
CLASSES = TASKS["single_label_classification"]


@pytest.fixture
def save(build_model, tmp_path: Path):
    """save(auto_class, names, **changes): a checkpoint with a tokenizer, opened."""

    def save(auto_class=AutoModelForSequenceClassification, names=(), **changes) -> Checkpoint:
        tokenizer = tiny.tokenizer()
        model = build_model(auto_class=auto_class, vocab_size=len(tokenizer), **changes)
        if names:
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: index for index, name in enumerate(names)}
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return open_checkpoint(str(tmp_path))

    return save


def is_frozen(model: PreTrainedModel) -> bool:
    quiet = not any(module.training for module in model.modules())
    return quiet and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_is_in_eval_mode_without_gradients_in_float32(save) -> None:
    checkpoint = save(names=NAMES)
    for model in (load_teacher(checkpoint, CLASSES, NAMES, fresh_head=False), load_encoder(checkpoint)):
        assert is_frozen(model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_freezing_ends_training_mode_for_every_module(build_model) -> None:
    assert is_frozen(freeze(build_model().train()))


def test_a_teacher_predicts_what_its_checkpoint_did(save, build_model, batch: dict[str, Tensor]) -> None:
    checkpoint = save(names=NAMES)
    model = load_teacher(checkpoint, CLASSES, NAMES, fresh_head=False)
    original = build_model(vocab_size=len(checkpoint.tokenizer))
    inputs = inputs_of(batch)
    assert torch.equal(model(**inputs).logits, original(**inputs).logits)


def test_a_freshly_initialised_head_is_refused(save) -> None:
    checkpoint = save(AutoModelForMaskedLM)
    with pytest.raises(UserError, match=r"classifier\.bias.* freshly initialised.*teacher\.training"):
        load_teacher(checkpoint, CLASSES, NAMES, fresh_head=False)


def test_the_teacher_stage_gets_a_fresh_head_for_the_data(save) -> None:
    model = load_teacher(save(AutoModelForMaskedLM), CLASSES, NAMES[:2], fresh_head=True)
    assert model.config.id2label == {0: "weather", 1: "music"}
    assert model.classifier.out_features == 2


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["music", "weather", "sport"], r"music, weather, sport in this order, the data's weather, music, sport"),
        (["weather", "music", "news"], r"labels are weather, music, news"),
    ],
)
def test_labels_in_another_order_or_of_another_name_are_refused(save, own: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"{message}.*data\.labels"):
        load_teacher(save(names=own), CLASSES, NAMES, fresh_head=False)


def test_another_number_of_labels_is_refused(save) -> None:
    with pytest.raises(UserError, match=r"predicts 3 labels .* the data has 2 \(weather, music\)"):
        load_teacher(save(names=NAMES), CLASSES, NAMES[:2], fresh_head=False)


@pytest.mark.parametrize("own", [["Weather", "MUSIC", "sport"], []], ids=["other case", "LABEL_i"])
def test_labels_that_differ_in_case_or_have_no_names_become_the_datas(save, own: list[str]) -> None:
    model = load_teacher(save(names=own), CLASSES, NAMES, fresh_head=False)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}


def test_numbered_data_fit_a_teacher_with_names(save) -> None:
    load_teacher(save(names=NAMES), CLASSES, ["0", "1", "2"], fresh_head=False)


def test_a_classifier_cannot_teach_a_regression(save) -> None:
    with pytest.raises(UserError, match=r"its head gives 3 values, the task regression needs 1"):
        load_teacher(save(names=NAMES), TASKS["regression"], [], fresh_head=False)


def test_a_tagger_is_loaded_under_its_own_head(save) -> None:
    model = load_teacher(
        save(AutoModelForTokenClassification, NAMES), TASKS["token_classification"], NAMES, fresh_head=False
    )
    assert type(model).__name__ == "BertForTokenClassification"


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.model: .* is no checkpoint folder"):
        open_checkpoint(str(tmp_path / "nothing"))


def test_a_tokenizer_of_another_model_is_refused(build_model, tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pieces, the model 60 embeddings"):
        open_checkpoint(str(tmp_path))
