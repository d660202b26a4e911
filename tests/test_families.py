"""Claims about teachers: which families show their attention, and what makes a checkpoint a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from distill import tiny
from distill.activations import Needs, capture
from distill.attention import show_attention
from distill.settings import UserError
from distill.tasks import TASKS
from distill.teachers import Checkpoint, freeze, load_encoder, load_teacher, open_checkpoint

SHOWN = (
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
EVERYTHING = Needs(hidden=frozenset(range(5)), attention=frozenset({1, 2, 3, 4}), logits=True)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every family takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("family", SHOWN)
@torch.no_grad()
def test_showing_attention_changes_no_bit_of_the_outputs(family: str, build_model, batch: dict[str, Tensor]) -> None:
    model = build_model(family)
    model.set_attn_implementation("sdpa")
    plain = model(**inputs_of(batch), output_hidden_states=True)
    show_attention(model)
    shown = capture(model, inputs_of(batch), EVERYTHING)
    assert torch.equal(shown.logits, plain.logits)
    assert all(torch.equal(shown.hidden[m], hidden) for m, hidden in enumerate(plain.hidden_states))
    assert "sdpa_shown" not in model.config.to_json_string()


@pytest.mark.parametrize("family", SHOWN)
@torch.no_grad()
def test_the_softmax_of_the_shown_scores_is_the_eager_probability(
    family: str, build_model, batch: dict[str, Tensor]
) -> None:
    """On the row without padding, where nothing is masked; in every layer, so that layers are counted right."""
    model = build_model(family)
    show_attention(model)
    shown = capture(model, inputs_of(batch), EVERYTHING).attention
    model.set_attn_implementation("eager")
    eager = model(**inputs_of(batch), output_attentions=True).attentions
    assert len(eager) == 4
    for m, probabilities in enumerate(eager, start=1):
        torch.testing.assert_close(shown[m].scores()[0].softmax(-1), probabilities[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["deberta-v2", "mpnet"])
def test_families_with_attention_of_their_own_are_refused_with_the_remedy(family: str, build_model) -> None:
    message = rf"{family} does not use transformers' attention interface.*task\.losses\.attention=null"
    with pytest.raises(UserError, match=message):
        show_attention(build_model(family))


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
