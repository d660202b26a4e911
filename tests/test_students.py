"""Claims about a student's shape, its projections, and that it loads where this project is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from distill.activations import Needs
from distill.families import FAMILIES, positions
from distill.initialization import check_initialization
from distill.settings import UserError
from distill.students import (
    Student,
    StudentOptions,
    build_student,
    load_body,
    student_config,
)
from distill.tasks import TASKS, TaskType
from tests.doctor_cases import preflight

CLASSES = TASKS["single_label_classification"]
TEACHER_WIDTH = 16


def options_of(**changes: object) -> StudentOptions:
    return StudentOptions(**{"layers": 2, "width": 12, "heads": 2, "intermediate_size": 20, **changes})


def build(teacher: PreTrainedModel, task: TaskType | None = CLASSES, seed: int = 0, **changes: object) -> Student:
    options = options_of(**changes)
    return build_student(student_config(teacher.config, options), task, options, TEACHER_WIDTH, seed)


# Plain loading

LOADER = """
import json, sys
sys.modules["distill"] = sys.modules["pipelines"] = None  # importing them fails, wherever they are installed
try:
    import distill
except ImportError:
    pass
else:
    sys.exit("distill is importable: the test proves nothing")
import torch
import transformers
from transformers.utils import logging
logging.set_verbosity_error()
for folder, auto_class in json.loads(sys.argv[1]):
    model, report = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    inputs = torch.load(f"{folder}/inputs.pt")
    with torch.no_grad():
        output = model.eval()(**inputs)
    torch.save((output[0], type(model).__module__), f"{folder}/output.pt")
"""


def test_a_student_of_every_family_and_task_loads_without_this_project(
    build_model, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    cases = [(family, "single_label_classification", None) for family in FAMILIES]
    cases += [("bert", name, None) for name in TASKS if name != "single_label_classification"]
    cases += [("electra", name, 8) for name in TASKS]
    expected, work = {}, []
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for family, name, narrow in cases:
        folder = tmp_path / f"{family}-{name}-{narrow}"
        teacher = build_model("bert" if narrow else family, num_labels=TASKS[name].num_labels("abc"))
        student = build(teacher, TASKS[name], embedding_width=narrow)
        model = student.model.eval()
        with torch.no_grad():
            expected[folder] = model(**inputs)[0]
        model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
        work.append((str(folder), TASKS[name].auto_class.__name__))

        saved = json.loads((folder / "config.json").read_text())
        assert saved["model_type"] == family
        assert AutoConfig.from_pretrained(folder).hidden_size == 12
        assert "auto_map" not in saved
        assert "sdpa_shown" not in str(saved)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert not any("projection" in name for name in file.keys())  # noqa: SIM118

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(work)], cwd=tmp_path, env=environment, check=True, timeout=120
    )
    for folder, logits in expected.items():
        output, module = torch.load(folder / "output.pt")
        torch.testing.assert_close(output, logits, rtol=1e-5, atol=1e-6, msg=folder.name)
        assert module.startswith("transformers.models."), module


# Shape


def test_a_student_has_the_given_shape_and_the_teachers_vocabulary_positions_and_labels(build_model) -> None:
    teacher = build_model()
    teacher.config.id2label = {0: "weather", 1: "music", 2: "sport"}
    before = teacher.config.to_dict()
    student = build(teacher, dropout=0.25).model
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 12, 2)
    assert config.intermediate_size == 20
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.25
    assert config.id2label == teacher.config.id2label
    assert student.bert.embeddings.word_embeddings.weight.shape == (60, 12)
    assert student.bert.embeddings.position_embeddings.weight.shape == (40, 12)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert teacher.config.to_dict() == before, "the teacher's own config changed"


def test_tinybert4_has_14_and_a_half_million_parameters() -> None:
    from transformers import BertConfig

    with torch.device("meta"):
        model = AutoModel.from_config(student_config(BertConfig(), StudentOptions()))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(14.5e6, rel=0.02)


def test_width_must_be_a_multiple_of_heads(teacher: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"student\.width: 12 is not a multiple of student\.heads=5"):
        build(teacher, heads=5)


@pytest.mark.parametrize("width", [12, 13])
def test_narrow_embeddings_are_narrower_than_the_layers(teacher: PreTrainedModel, width: int) -> None:
    with pytest.raises(UserError, match=rf"student\.embedding_width: {width} is not below student\.width=12"):
        build(teacher, embedding_width=width)


# Families


@pytest.mark.parametrize("family", [*FAMILIES, "mobilebert", "megatron-bert"])
def test_a_student_is_of_the_teachers_family_or_else_a_bert(family: str, build_model) -> None:
    expected = family if family in FAMILIES else "bert"
    assert student_config(build_model(family).config, options_of()).model_type == expected


@pytest.mark.parametrize(
    "family",
    ["modernbert", "deberta-v2", "mpnet", "nomic_bert", "mobilebert", "distilbert", "albert", "roberta", "xlm-roberta"],
)
@torch.no_grad()
def test_a_bert_student_reads_the_pieces_of_a_teacher_of_another_family(
    family: str, build_model, batch: dict[str, Tensor]
) -> None:
    teacher = build_model(family, pad_token_id=1)
    teacher.config.id2label = {0: "weather", 1: "music", 2: "sport"}
    student = build(teacher, family="bert")
    config, embeddings = student.model.config, student.model.bert.embeddings
    assert config.model_type == "bert"
    assert config.id2label == teacher.config.id2label
    assert config.pad_token_id == embeddings.word_embeddings.padding_idx == 1
    assert embeddings.word_embeddings.num_embeddings == 60
    # RoBERTa's and MPNet's 40 are 2 short, since theirs begin behind the number of the padding piece.
    readable = 38 if family in ("mpnet", "roberta", "xlm-roberta") else 40
    assert embeddings.position_embeddings.num_embeddings == readable
    ids = torch.full((2, readable), 7)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    assert student(whole, Needs(logits=True)).logits.isfinite().all()
    needs = Needs(hidden=frozenset({0, 2}), attention=frozenset({1, 2}))
    assert student(batch, needs).hidden[2].shape == (4, 9, TEACHER_WIDTH)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mpnet"}))
@torch.no_grad()
def test_a_student_of_any_family_reads_all_that_a_bert_teacher_reads(family: str, build_model) -> None:
    """But MPNet, which is refused for this teacher's padding, see below."""
    student = build(build_model(pad_token_id=0), family=family)
    assert positions(student.model.config) == 40
    ids = torch.full((2, 40), 7)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.ones_like(ids)}
    acts = student(whole, Needs(hidden=frozenset({0, 1, 2}), attention=frozenset({1, 2}), logits=True))
    assert acts.logits.isfinite().all()
    assert acts.hidden[0].shape == acts.hidden[2].shape == (2, 40, TEACHER_WIDTH)
    assert acts.attention[2].query.shape == (2, 2, 40, 6)


@pytest.mark.parametrize(
    ("teacher", "family", "message"),
    [
        ("bert", "gpt2", r"family 'gpt2' .* Give one of bert, roberta"),
        ("bert", "mobilebert", r"family 'mobilebert' .*bottleneck.* Give one of bert"),
        ("bert", "mpnet", r"mpnet counts positions .* which is 0 .*student\.family=bert"),
        ("modernbert", "roberta", r"roberta counts positions .* which is 57 .*student\.family=bert"),
    ],
)
def test_a_family_that_no_student_can_be_of_is_refused(teacher: str, family: str, message: str, build_model) -> None:
    model = build_model(teacher, pad_token_id=57 if teacher == "modernbert" else 0)
    with pytest.raises(UserError, match=rf"student\.family: .*{message}"):
        build(model, family=family)


@pytest.mark.parametrize(
    ("teacher", "family", "own"),
    [("bert", None, "electra"), ("roberta", None, "electra"), ("albert", None, "albert"), ("bert", "albert", "albert")],
)
def test_narrow_embeddings_are_of_a_family_that_has_such(
    teacher: str, family: str | None, own: str, build_model
) -> None:
    model = build(build_model(teacher), family=family, embedding_width=7).model
    assert model.config.model_type == own
    assert model.get_input_embeddings().weight.shape == (60, 7)


def test_narrow_embeddings_of_a_family_that_has_none_are_refused(build_model) -> None:
    with pytest.raises(
        UserError, match=r"student\.embedding_width: .*family bert .*student\.family to electra or albert"
    ):
        build(build_model(), family="bert", embedding_width=7)


def test_an_electra_computes_as_its_bert_teacher_does(build_model) -> None:
    config = student_config(
        build_model(hidden_act="relu", layer_norm_eps=1e-5).config, options_of(family="electra", embedding_width=7)
    )
    assert (config.hidden_act, config.layer_norm_eps) == ("relu", 1e-5)


def test_a_decoder_is_no_teacher() -> None:
    with pytest.raises(UserError, match=r"teacher\.model: gpt2 is no encoder of BERT's kind"):
        student_config(AutoConfig.for_model("gpt2"), options_of())


def test_rotary_heads_have_an_even_width(build_model) -> None:
    with pytest.raises(UserError, match=r"student\.width: 10 over student\.heads=2 .* multiple of 4"):
        build(build_model("modernbert"), width=10)


def test_a_family_without_a_head_for_the_task_is_refused(build_model) -> None:
    with pytest.raises(UserError, match=r"no AutoModelForQuestionAnswering .*'nomic_bert'.*student\.family=bert"):
        build(build_model("nomic_bert"), TASKS["question_answering"])


@pytest.mark.parametrize(("teacher", "family"), [("modernbert", "bert"), ("bert", "distilbert"), ("mpnet", "mpnet")])
def test_a_student_that_cannot_be_cut_out_of_its_teacher_starts_otherwise(
    teacher: str, family: str, build_model
) -> None:
    given = build_model(teacher).config
    options = options_of(family=family, initialization="teacher")
    with pytest.raises(UserError, match=rf"family {family} .* family {teacher};.*student\.initialization=random"):
        check_initialization(options, given, student_config(given, options))
    check_initialization(options_of(family=family, initialization="random"), given, student_config(given, options))


def test_a_seed_decides_the_weights_and_leaves_other_randomness_alone(teacher: PreTrainedModel) -> None:
    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build(teacher, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), undisturbed)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not torch.equal(first["projections.layer_0.weight"], other["projections.layer_0.weight"])


# Projections


@pytest.mark.parametrize(
    ("kind", "width", "used"),
    [
        ("auto", 12, ["layer_0", "layer_1", "layer_2"]),
        ("auto", 16, [None, None, None]),
        ("identity", 16, [None, None, None]),
        ("per_layer", 16, ["layer_0", "layer_1", "layer_2"]),
        ("shared", 12, ["shared", "shared", "shared"]),
        ("separate_embedding", 12, ["embedding", "layers", "layers"]),
    ],
)
def test_hidden_states_reach_the_teachers_width_through_the_projection_asked_for(
    teacher: PreTrainedModel, batch: dict[str, Tensor], kind: str, width: int, used: list[str | None]
) -> None:
    student = build(teacher, projection=kind, width=width).eval()
    assert set(student.projections) == set(used) - {None}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    raw = student.model(**inputs, output_hidden_states=True).hidden_states
    hidden = student(batch, Needs(hidden=frozenset({0, 1, 2}))).hidden
    for index, name in enumerate(used):
        expected = raw[index] if name is None else raw[index] @ student.projections[name].weight.T
        assert expected.shape == (4, 9, TEACHER_WIDTH)
        torch.testing.assert_close(hidden[index], expected)


def test_projections_have_a_bias_only_where_asked(teacher: PreTrainedModel) -> None:
    assert build(teacher).projections["layer_1"].bias is None
    assert build(teacher, projection_bias=True).projections["layer_1"].bias.shape == (TEACHER_WIDTH,)


def test_identity_between_different_widths_is_refused(teacher: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"student\.projection: identity .* 12 wide and the teacher 16.*auto"):
        build(teacher, projection="identity")


def test_every_used_projection_gets_a_gradient_from_the_students_own_forward(
    teacher: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    """DDP reduces only what its module's forward used."""
    student = build(teacher)
    hidden = student(batch, Needs(hidden=frozenset({0, 2}))).hidden
    torch.stack([state.square().mean() for state in hidden.values()]).sum().backward()
    with_gradient = [name for name, linear in student.projections.items() if linear.weight.grad is not None]
    assert with_gradient == ["layer_0", "layer_2"]


# Starting from a checkpoint


def test_a_body_comes_from_a_checkpoint_and_the_head_stays(teacher: PreTrainedModel, tmp_path: Path) -> None:
    source = build(teacher, None, seed=7)
    source.model.save_pretrained(tmp_path)
    student = build(teacher)
    head = student.model.classifier.weight.clone()
    load_body(student, tmp_path)
    own = student.model.bert.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in source.model.state_dict().items())
    assert torch.equal(student.model.classifier.weight, head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "num_hidden_layers=3, the student 2"),
        ({"layers": 1}, "num_hidden_layers=1, the student 2"),
        ({"width": 16}, "hidden_size=16, the student 12"),
        ({"heads": 3}, "num_attention_heads=3, the student 2"),
        ({"intermediate_size": 24}, "intermediate_size=24, the student 20"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(
    teacher: PreTrainedModel, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    build(teacher, None, **changes).model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"student\.initialization: .*{message}"):
        load_body(build(teacher), tmp_path)


@pytest.mark.parametrize(
    ("given", "wanted", "setting"), [(8, 10, "8"), (8, None, "8"), (None, 8, "null")], ids=["other", "narrow", "wide"]
)
def test_a_checkpoint_of_another_embedding_width_is_refused(
    teacher: PreTrainedModel, tmp_path: Path, given: int | None, wanted: int | None, setting: str
) -> None:
    build(teacher, None, embedding_width=given).model.save_pretrained(tmp_path)
    message = rf"embeddings {given or 12} wide, the student {wanted or 12}\. Set student\.embedding_width={setting}\."
    with pytest.raises(UserError, match=message):
        load_body(build(teacher, embedding_width=wanted), tmp_path)


def test_a_checkpoint_with_another_vocabulary_is_refused(build_model, tmp_path: Path) -> None:
    build(build_model(vocab_size=61), None).model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="other embeddings than the student"):
        load_body(build(build_model()), tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(teacher: PreTrainedModel, tmp_path: Path) -> None:
    source = build(teacher, None).model
    kept = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("encoder.layer.1.")}
    source.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(UserError, match=r"lacks the weights encoder\.layer\.1\."):
        load_body(build(teacher), tmp_path)


def test_a_checkpoint_that_is_not_there_is_named(teacher: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student\.initialization: .*nothing cannot be read"):
        load_body(build(teacher), tmp_path / "nothing")


# What a finished stage depends on


@pytest.mark.parametrize("name", ["embedding_width", "vocabulary"])
def test_what_is_not_set_leaves_stages_finished_that_were_made_before_it_was_there(name: str, tmp_path: Path) -> None:
    given = {"embedding_width": "8", "vocabulary": "{size: 90}"}[name]
    assert name not in preflight(tmp_path / "without", ready=True).run.student_settings
    assert name in preflight(tmp_path / "with", f"student.{name}={given}", ready=True).run.student_settings
