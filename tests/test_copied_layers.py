"""Claims about student.initialization: whole layers copied from the teacher, a checkpoint, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.activations import Needs, capture
from distill.families import FAMILIES
from distill.initialization import choice, copy_layers, initialize, sample_batches
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.settings import UserError
from distill.students import Student, StudentOptions, build_student, student_config
from distill.tasks import TASKS
from tests.builders import FEW_STEPS, TINY, run_cli, succeed

EVERYTHING = Needs(hidden=frozenset(range(5)), logits=True)


def build(teacher: PreTrainedModel, layers: int = 4, **changes: object) -> Student:
    """Of the teacher's width, heads and intermediate size where nothing else is said."""
    shape = {"width": 16, "heads": 2, "intermediate_size": 24, "dropout": 0}
    options = StudentOptions(layers=layers, **{**shape, **changes})
    config = student_config(teacher.config, options)
    return build_student(config, TASKS["single_label_classification"], options, 16, seed=5).eval()


def copied(teacher: PreTrainedModel, layers: int, **options: object) -> Student:
    student = build(teacher, layers)
    copy_layers(student, teacher, build_layer_map(LayerMapOptions(**options), layers, 4))
    return student


@torch.no_grad()
def assert_same_bits(student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    own, expected = student(batch, EVERYTHING), capture(teacher, batch, EVERYTHING)
    assert all(torch.equal(own.hidden[m], expected.hidden[m]) for m in range(5))
    assert torch.equal(own.logits, expected.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_copied_are_the_teacher_to_the_bit(family: str, build_model, batch) -> None:
    teacher = build_model(family)
    assert_same_bits(copied(teacher, 4), teacher, batch)


@torch.no_grad()
@pytest.mark.parametrize("family", ["distilbert", "mpnet", "deberta-v2", "nomic_bert"])
def test_other_names_of_layers_are_known(family: str, build_model, batch) -> None:
    """Half of the teacher's layers, the other half taken out of the teacher itself."""
    teacher = build_model(family)
    student = copied(teacher, 2)
    layers = next(module for module in teacher.base_model.modules() if isinstance(module, nn.ModuleList))
    del layers[2], layers[0]
    assert torch.equal(student(batch, Needs(logits=True)).logits, capture(teacher, batch, Needs(logits=True)).logits)


@pytest.mark.parametrize(
    ("layers", "options", "expected"),
    [
        (2, {}, [2, 4]),
        (3, {}, [1, 3, 4]),  # 1.33, 2.67, 4
        (2, {"strategy": "bottom"}, [1, 2]),  # Patient-KD
        (2, {"strategy": "last"}, [2, 4]),  # the first is not mapped: it takes the nearest
        (2, {"pairs": [(2, 1)]}, [2, 1]),
        (2, {"hidden_pairs": [(1, 3)], "attention_pairs": [(1, 1), (2, 1)]}, [3, 1]),  # hidden states come first
    ],
)
def test_each_layer_holds_the_weights_of_the_teacher_layer_it_is_mapped_to(
    teacher, layers: int, options: dict[str, object], expected: list[int]
) -> None:
    student = copied(teacher, layers, **options)
    own, source = student.model.bert, teacher.bert
    for m, g in enumerate(expected):
        theirs = source.encoder.layer[g - 1].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.encoder.layer[m].state_dict().items())
    for mine, theirs in ((own.embeddings, source.embeddings), (own.pooler, source.pooler)):
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in mine.state_dict().items())
    assert torch.equal(student.model.classifier.weight, teacher.classifier.weight)


@pytest.mark.parametrize("projection", ["auto", "shared", "separate_embedding", "per_layer"])
def test_projections_of_a_copy_are_the_identity_or_none(projection: str, teacher, batch) -> None:
    student = build(teacher, projection=projection, projection_bias=True)
    initialize(student, "layers", teacher, build_layer_map(LayerMapOptions(), 4, 4), sample=[])
    assert bool(student.projections) == (projection != "auto")
    assert_same_bits(student, teacher, batch)


def test_a_copy_shares_nothing_with_its_teacher(teacher) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = copied(teacher, 2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


# Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 12}, r"student\.width is 12 and the teacher has 16\. Set student\.width=16, or"),
        ({"heads": 4}, r"student\.heads is 4 and the teacher has 2\. Set student\.heads=2, or"),
        ({"intermediate_size": 20}, r"student\.intermediate_size is 20 and the teacher has 24\. Set "),
        ({"width": 24, "heads": 3}, r"width is 24 .*heads is 3 .* Set student\.width=16, student\.heads=2, or"),
    ],
)
def test_layers_of_another_shape_are_refused_with_what_would_do(teacher, changes, message: str) -> None:
    student = build(teacher, **changes)
    remedy = r".*student\.initialization=teacher, which cuts a student of any shape"
    with pytest.raises(UserError, match=rf"^student\.initialization: layers are copied whole.*{message}{remedy}"):
        copy_layers(student, teacher, build_layer_map(LayerMapOptions(), 4, 4))


def test_layers_of_another_family_are_refused(build_model, teacher) -> None:
    with pytest.raises(
        UserError, match=r"layers of the family roberta .* family bert\. Instead set student\.initialization=random"
    ):
        copy_layers(build(teacher), build_model("roberta"), build_layer_map(LayerMapOptions(), 4, 4))


@pytest.mark.parametrize(
    ("own", "given", "remedy"),
    [(12, None, r"set student\.embedding_width=12"), (16, 12, r"leave student\.embedding_width out")],
)
def test_embeddings_of_another_width_are_refused(own: int, given: int | None, remedy: str, build_model) -> None:
    teacher = build_model("electra", embedding_size=own)
    message = rf"embeddings are {own} wide and not {given or 16}, .* Instead {remedy}, or .*initialization=teacher"
    with pytest.raises(UserError, match=message):
        copy_layers(build(teacher, embedding_width=given), teacher, build_layer_map(LayerMapOptions(), 4, 4))


def test_narrow_embeddings_of_the_teachers_width_are_copied(build_model) -> None:
    teacher = build_model("electra", embedding_size=12)
    student = build(teacher, embedding_width=12)
    copy_layers(student, teacher, build_layer_map(LayerMapOptions(), 4, 4))
    for name in ("embeddings.word_embeddings.weight", "embeddings_project.weight"):
        assert torch.equal(student.model.electra.state_dict()[name], teacher.electra.state_dict()[name])


def test_a_narrow_student_of_a_bert_is_cut_and_not_copied(teacher) -> None:
    with pytest.raises(UserError, match=r"family bert cannot be copied .* Instead set student\.initialization=teacher"):
        copy_layers(build(teacher, embedding_width=12), teacher, build_layer_map(LayerMapOptions(), 4, 4))


def test_layers_that_are_built_otherwise_are_refused(build_model) -> None:
    """ModernBERT's first layer has no norm before its attention."""
    teacher = build_model("modernbert")
    student = build(teacher, layers=2)
    message = r"built otherwise; only one side has the weights layers\.1\.attn_norm\.weight.*layer_map\.pairs"
    with pytest.raises(UserError, match=message):
        copy_layers(student, teacher, build_layer_map(LayerMapOptions(), 2, 4))
    copy_layers(student, teacher, build_layer_map(LayerMapOptions(pairs=[(1, 1), (2, 3)]), 2, 4))


def test_a_run_refuses_what_cannot_be_copied_before_any_work(tmp_path: Path) -> None:
    outcome = run_cli(TINY, *FEW_STEPS, "student.initialization=layers", "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "student.initialization" in outcome.err
    assert "Set student.width=32, student.intermediate_size=64, or" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_copied_layers(tmp_path: Path) -> None:
    shape = ("student.width=32", "student.heads=4", "student.intermediate_size=64")
    less = ("general=null", "augment=null", "evaluate.undistilled=false", "student.initialization=layers")
    succeed(TINY, *FEW_STEPS, *shape, *less, "--output", tmp_path / "run")


# A checkpoint


@pytest.mark.parametrize("projection", ["per_layer", "shared"])
def test_a_checkpoint_brings_the_projections_beside_it_and_the_head_read_through_them_where_they_are_the_students(
    projection: str, teacher, tmp_path: Path
) -> None:
    source, student = build(teacher, 2, width=12), build(teacher, 2, width=12, projection=projection)
    source.model.base_model.save_pretrained(tmp_path)
    save_file(
        {name: torch.full_like(tensor, 7) for name, tensor in source.projections.state_dict().items()},
        tmp_path / "projections.safetensors",
    )
    before = copy.deepcopy(student.state_dict())
    initialize(student, str(tmp_path), teacher, build_layer_map(LayerMapOptions(), 2, 4), sample=[])
    brought = projection == "per_layer"
    for name, tensor in student.projections.state_dict().items():
        assert torch.equal(tensor, torch.full_like(tensor, 7) if brought else before[f"projections.{name}"])
    # The teacher's head is read through them; through random ones it would be noise.
    head, kept = student.model.classifier.weight, teacher.classifier.weight
    assert torch.equal(head, before["model.classifier.weight"]) != brought
    if brought:
        largest = kept.norm(dim=0).topk(12).indices.sort().values
        assert torch.equal(head, kept[:, largest])


def test_random_leaves_everything_as_it_is(teacher) -> None:
    student = build(teacher, 2, width=12)
    before = copy.deepcopy(student.state_dict())
    initialize(student, "random", teacher, build_layer_map(LayerMapOptions(), 2, 4), sample=[])
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


# The sample


class Endless:
    """A stream of batches of 4 rows of 8 places, which counts what is read of it."""

    steps_per_epoch = None
    read = 0

    def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        for _ in range(first, last):
            self.read += 1
            yield [{"input_ids": torch.ones(4, 8)}]


def test_a_sample_ends_when_it_is_large_enough_and_is_read_only_where_it_is_used(
    teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "SAMPLE_PIECES", 100)
    source = Endless()
    sample = sample_batches(source, torch.device("cpu"))
    initialize(build(teacher), "layers", teacher, build_layer_map(LayerMapOptions(), 4, 4), sample)
    assert source.read == 0
    assert len(list(sample)) == 4  # 3 batches of 32 places are 96
    assert source.read == 4


def test_a_sample_of_few_rows_is_all_of_them() -> None:
    source = Endless()
    source.steps_per_epoch = 3
    assert len(list(sample_batches(source, torch.device("cpu")))) == 3
