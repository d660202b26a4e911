"""Claims about the model card: its metadata is the hub's, its figures are the run's, its code runs, and nothing in it
that came from data, settings or this machine is more than text. Putting it on the hub is test_card_push.py's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from distill import tiny
from distill.config import Config, load_config, parse_config
from distill.evaluation import METRICS as GROUPS
from distill.export.markdown import code, table, text
from distill.teachers import weights_hash
from pipelines.card import card, write_card
from pipelines.card.facts import Facts, kind_of, read_facts
from pipelines.card.metadata import METRICS
from pipelines.card.recipe import FILES, HIDDEN, LEFT_OUT, NAMES, recipe
from tests.builders import FEW_STEPS, TINY, finished_run, succeed, write_rows
from tests.test_export import copy_run

MARKUP = "<script>alert(1)</script> [a](http://x.io) | *b* `c` _d_ ~e~ &amp; www.x.io x@y.io \\ # ---"
HOSTILE = f"{MARKUP} \u202e\x1b[2J\n---\n# f"
SHOWN = f"{MARKUP} [2J --- # f"
"""What a reader should see of it: one line, without what is invisible or turns text around."""


def facts() -> Facts:
    folder = finished_run()
    found = read_facts(load_config(folder / "config.yaml"), folder)
    assert found is not None
    return found


def with_config(found: Facts, *overrides: str) -> Facts:
    return dataclasses.replace(found, config=load_config(finished_run() / "config.yaml", overrides))


def with_origins(found: Facts, **origins: Any) -> Facts:
    return dataclasses.replace(found, origins={**found.origins, **origins})


def summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished_run() / "summary.json").read_text())
    return found


def tokens(markdown: str) -> list[Any]:
    """All tokens, those inside of lines too, with raw HTML allowed as the hub's renderer allows it."""
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown):
        found += [token, *(token.children or [])]
    return found


# Metadata


def test_a_run_ends_with_a_card_that_the_hub_reads() -> None:
    content = (finished_run() / "student" / "README.md").read_text(encoding="utf-8")
    found = ModelCard(content).data
    said = {"library_name": "transformers", "pipeline_tag": "text-classification", "language": ["en"]}
    assert said.items() <= found.to_dict().items()
    assert "knowledge-distillation" in found.tags
    assert found.license is None
    assert found.base_model is None, "the toy is on no hub"
    assert "datasets" not in found.to_dict()
    own = summary()["student"]["metrics"]
    assert {result.metric_name: result.metric_value for result in found.eval_results} == {
        name: pytest.approx(value, abs=5e-5) for name, value in own.items()
    }
    assert {result.metric_type for result in found.eval_results} == set(found.metrics)
    assert {result.dataset_split for result in found.eval_results} == {None}, "a split of a set that is on no hub"


def test_a_teacher_and_data_of_the_hub_are_named() -> None:
    found = with_config(
        with_origins(facts(), names={"teacher.model": "hub", "data.path": "hub", "general.corpus.path": "hub"}),
        "teacher.model=textattack/bert-base-uncased-SST-2",
        "data={path: glue, name: sst2, text: sentence}",
        "general.corpus={path: wikitext, name: wikitext-103-raw-v1}",
        "card={license: apache-2.0, language: [en, de]}",
    )
    found = with_origins(found, notes=["figures are on the source's validation split"])
    data = card(found).data
    assert data.base_model == "textattack/bert-base-uncased-SST-2"
    assert data.datasets == ["glue", "wikitext"]
    assert (data.license, data.language) == ("apache-2.0", ["en", "de"])
    (first, *_) = data.eval_results
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == ("glue", "sst2", "validation")
    assert "https://huggingface.co/textattack/bert-base-uncased-SST-2" in card(found).text


def test_held_out_rows_are_no_split_of_the_source() -> None:
    found = with_origins(facts(), names={"data.path": "hub"}, notes=["48 test rows were held out of training"])
    assert {result.dataset_split for result in card(found).data.eval_results} == {None}
    assert "rows held out of the source's training split" in card(found).text


def test_every_figure_has_a_name_of_the_hubs() -> None:
    rows: dict[str, tuple[Any, Any]] = {
        "classification": ([0, 1, 1], [0, 1, 0]),
        "multi_label": ([[0, 1], [1, 1]], [[0, 1], [1, 0]]),
        "regression": ([0.1, 0.4, 0.9], [0.0, 0.5, 1.0]),
        "entities": ([["B-a", "O"]], [["B-a", "O"]]),
        "spans": (["a"], [["a", "b"]]),
    }
    assert rows.keys() == GROUPS.keys()
    for name, (predictions, references) in rows.items():
        figures = GROUPS[name]().compute(predictions=predictions, references=references)
        assert figures
        assert figures.keys() <= METRICS.keys()


def test_the_name_is_the_one_given_or_says_shape_and_data() -> None:
    assert card(facts()).data.model_name == "tinybert-2l-24-tiny"
    assert card(with_config(facts(), "card.name=me/x")).data.model_name == "x"
    assert card(with_origins(facts(), names={})).data.model_name == "tinybert-2l-24", "rows of one's own have no name"


# Figures


def cells(markdown: str) -> list[list[str]]:
    """Rows of all tables as they read."""
    rows: list[list[str]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "tr_open":
            rows.append([])
        inside = (inside or token.type in ("td_open", "th_open")) and token.type not in ("td_close", "th_close")
        if inside and token.type == "inline":
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows


def test_the_table_is_the_summary() -> None:
    for who, words in (
        ("teacher", "teacher"),
        ("student", "this student"),
        ("undistilled_student", "same student, labels alone"),
    ):
        figures = summary()[who]
        metrics = [f"{figures['metrics'][name]:.4f}" for name in (facts().origins["metric"], "f1_macro")]
        row = next(row for row in cells(card(facts()).text) if row[0] == words)
        assert row[1:3] == metrics
        assert row[-1] == f"{figures['parameters'] / 1e6:.2f} M"


def test_how_it_was_distilled_is_what_was_done() -> None:
    found = card(facts()).text
    shown = {row[0]: row[1:] for row in cells(found)}
    assert shown["teacher, on labels"][:3] == ["8", "16", "0.003"]
    assert shown["general"][:2] == ["3", "16"]
    assert shown["task, intermediate"][:3] == shown["task, logits"][:3] == ["6", "16", "0.001"]
    kept = json.loads((finished_run() / "augment" / "result.json").read_text())["kept"]
    for part in (
        "192 training, 48 validation and 48 test rows",
        f"{kept:,} copies were kept",
        "attention (weight 1, compare scores",
        "logits (weight 1, temperature 1.0, form kl)",
        "student 1 2 &lt;- teacher 2 4",
        "cut out of the teacher's",
        "One run, seed 42",
        "calibration) was not measured",
        f"{summary()['retention']:.1%} of its teacher's accuracy",
    ):
        assert part in found, part


def test_figures_of_an_older_students_benchmark_are_not_shown(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    latency = [{"threads": 1, "length": 16, "p50_ms": 1.25, "p95_ms": 2.5}]
    figures = {
        "measured": {"student": weights_hash(str(run / "student"))},
        "inputs": "random token ids",
        "machine": {"cpu": "A Processor", "cores": 3, "memory_gb": 8.0, "system": "Linux"},
        "models": [{"name": "student pytorch", "bytes": 52_800_000, "latency": latency}],
    }
    (run / "benchmark.json").write_text(json.dumps(figures))
    config = load_config(run / "config.yaml")
    found = read_facts(config, run)
    assert found is not None
    shown = card(found).text
    assert ["student pytorch", "1.25 (2.50)", "52.8"] in cells(shown)
    assert "A Processor, 3 cores, 8 GB" in shown
    (run / "artefacts" / "int8").mkdir(parents=True)
    (run / "artefacts" / "int8" / "model.onnx").write_bytes(b"made since")
    stale = read_facts(config, run)
    assert stale is not None
    assert "A Processor" not in card(stale).text
    shutil.rmtree(run / "artefacts")
    (run / "benchmark.json").write_text(json.dumps({**figures, "measured": {"student": "another"}}))
    stale = read_facts(config, run)
    assert stale is not None
    assert "A Processor" not in card(stale).text


def test_a_damaged_file_beside_costs_its_figures_alone(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    (run / "benchmark.json").write_text('{"models": [')
    assert write_card(load_config(run / "config.yaml"), run) is not None


def test_a_student_without_a_task_has_a_card_without_figures(tmp_path: Path) -> None:
    output = tmp_path / "run"
    succeed(TINY, *FEW_STEPS, "task=null", "augment=null", "teacher.training=null", "--output", output)
    content = (output / "student" / "README.md").read_text(encoding="utf-8")
    found = ModelCard(content)
    assert found.data.pipeline_tag == "feature-extraction"
    assert found.data.eval_results is None
    assert "not tested on a task" in found.text


# What is not markup, and what is not shown


def test_text_from_data_stays_text() -> None:
    shown = text(HOSTILE)
    assert "\n" not in shown
    for markdown in (f"Labels: {shown}.", table(("a", "b"), [(shown, "1")])):
        inline = next(t for t in tokens(markdown) if t.type == "inline" and "script" in t.content)
        assert {child.type for child in inline.children} <= {"text"}
        assert SHOWN in "".join(child.content for child in inline.children)


def test_hostile_names_change_nothing_but_themselves() -> None:
    plain_card, hostile = card(facts()), with_origins(facts(), labels=[HOSTILE, "b"], notes=[HOSTILE])
    hostile = dataclasses.replace(
        hostile,
        config=dataclasses.replace(
            hostile.config, data=dataclasses.replace(hostile.config.data, labels=[HOSTILE, "b"])
        ),
    )
    found = card(hostile)
    before, after = (
        [t.type for t in tokens(c.text) if t.type not in ("text", "softbreak")] for c in (plain_card, found)
    )
    assert after == before, "no heading, link, cell, code or HTML more"
    block = str(found).split("---\n")[1]
    assert yaml.safe_load(block) == yaml.safe_load(str(plain_card).split("---\n")[1])
    for character in ("\u202e", "\x1b"):
        assert character not in str(found)


def test_hostile_names_of_data_reach_the_metadata_as_one_line() -> None:
    found = with_origins(facts(), names={"data.path": "hub"})
    data = dataclasses.replace(found.config.data, path="glue", name=HOSTILE, splits={"test": HOSTILE})
    found = dataclasses.replace(found, config=dataclasses.replace(found.config, data=data))
    content = str(card(found))
    (first, *_) = ModelCard(content).data.eval_results
    assert first.dataset_config == first.dataset_split == SHOWN
    assert ModelCard(content).text.lstrip().startswith("# "), "the block ends where it should"


@pytest.mark.parametrize("content", ["a", "```\n# b", "x ```` y\n```"])
def test_code_ends_where_it_should(content: str) -> None:
    (fence,) = [token for token in MarkdownIt("commonmark").parse(code(content, "yaml")) if token.type == "fence"]
    assert fence.content == content + "\n"


def test_no_path_and_no_secret_of_the_machine_is_in_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_thatnobodymaysee"
    monkeypatch.setenv("HF_TOKEN", secret)
    home = tmp_path / "a-private-place"
    home.mkdir()
    shutil.copytree(tiny.teacher_folder(), home / "teacher")
    rows = [
        {"text": f"{word} in the {time}", "label": label}
        for label, words in (("<b>wet</b>", ("rain", "snow")), ("`loud`", ("song", "drum")))
        for word in words
        for time in ("morning", "long year", "town", "walk", "new morning", "long walk")
    ]
    file = write_rows(home / "rows.jsonl", rows)
    succeed(
        TINY,
        *FEW_STEPS,
        f"teacher.model={home / 'teacher'}",
        f"data={{path: json, max_length: 32, data_files: {{train: {file}}}}}",
        "general=null",
        "augment=null",
        f"runtime.logits_cache={home / 'cache'}",
        "project=a-private-project",
        "--output",
        tmp_path / "run",
    )
    content = (tmp_path / "run" / "student" / "README.md").read_text(encoding="utf-8")
    for private in (secret, "a-private", str(tmp_path), "rows.jsonl", str(Path.home())):
        assert private not in content, private
    assert content.count(HIDDEN) == 3, "teacher and file, and the sentence about them"
    data = ModelCard(content).data
    assert (data.base_model, data.datasets, data.language) == (None, None, None)
    assert "&lt;b&gt;wet&lt;/b&gt;, \\`loud\\`" in content
    assert "a bert that is not published (4 layers, 32 wide)" in content
    for file_name in ("config.json", "tokenizer_config.json"):
        assert "a-private" not in (tmp_path / "run" / "student" / file_name).read_text(), "they are pushed too"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("all-minilm-l6-v2", "packaged"),
        ("bbc_news", "packaged"),
        ("glove-6b-50d", "packaged"),
        ("layers", "packaged"),
        ("json", "builder"),
        ("google-bert/bert-base-uncased", "hub"),
        ("imdb", "hub"),
        ("/home/me/model", None),
        ("./model", None),
        ("../model", None),
        ("~/model", None),
        ("runs/sst2/student", None),
        ("https://me:password@host/x.csv", None),
        ("there/is", None),
    ],
)
def test_what_is_public(name: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "is").mkdir(parents=True)
    assert kind_of(name) == kind


def test_every_free_text_setting_is_shown_hidden_or_left_out_on_purpose() -> None:
    """A new one fails here until somebody has said which."""

    def free(group: Any, prefix: str = "") -> set[str]:
        found = set()
        for name, kind in typing.get_type_hints(group).items():
            key = f"{prefix}{name}"
            groups = [one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)]
            if groups:
                found |= free(groups[0], f"{key}.")
            elif "str" in str(kind).replace("typing.Literal", "Literal").split("Literal[")[0] or kind is str:
                found.add(key)
        return found

    data = {"name", "text", "text_pair", "label", "labels", "splits"}
    shown = {f"data.{key}" for key in data} | {"general.corpus.name", "general.corpus.text", "task.metric"}
    shown |= {"student.family", "augment.stop_words"}
    shown |= {f"task.unlabelled.{key}" for key in ("name", "split", "text", "text_pair")}
    found = {key for key in free(Config) if not any(key == out or key.startswith(f"{out}.") for out in LEFT_OUT)}
    assert found == shown | NAMES | FILES


@pytest.mark.parametrize("name", ["bbc_news", "sst2", "stsb", "tiny", "general_wikipedia"])
def test_the_settings_shown_repeat_the_run(name: str) -> None:
    config = load_config(Path(TINY).with_name(f"{name}.yaml"), ["preset=paper"] if name == "sst2" else [])
    shown = parse_config(yaml.safe_load(recipe(config, dict.fromkeys(NAMES, "hub"))))
    back = dataclasses.replace(shown, output=config.output, tracking=config.tracking, preset=config.preset)
    assert back == config


@pytest.mark.parametrize("task", [{}, {"joint": False}, {"intermediate": None}, {"logits": {"epochs": 10}}])
def test_the_phases_shown_are_those_that_the_run_had(task: dict[str, Any]) -> None:
    config = parse_config({"task": task})
    back = parse_config(yaml.safe_load(recipe(config, dict.fromkeys(NAMES, "hub"))))
    assert back.task == config.task
