"""Claims about `tinybert report`: its figures are those of an independent computation, text from data stays text, and
what a run lacks is said. How the page looks in a browser is test_report_browser.py's."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import confusion_matrix
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill import tiny
from pipelines.report.record import read_trainings
from pipelines.report.trainings import duration, kept_step
from tests.builders import FEW_STEPS, TINY, Outcome, contents, run_tinybert, succeed, write_rows
from tests.test_export import copy_run

QUICK = (*FEW_STEPS[:2], *FEW_STEPS[4:], "general=null", "augment=null", "evaluate.undistilled=false")
MODELS = (("teacher", "teacher/model"), ("student", "task/student"))
HOSTILE = "<script>alert('text')</script> & &amp; \x1b[2J\x07 \u202e rain $\\frac{ </bdi></p>"
LABELS = ["<img src=x onerror=alert(1)>", "$\\sqrt{", 'a"b\x1b[31m']


class Page(HTMLParser):
    """A report as a reader sees it: its words, its tables by caption, its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._caption, self._rows, self._cell = "", [], None  # type: ignore[var-annotated]
        self._words: list[str] = []
        self.feed(html)
        self.words = " ".join("".join(self._words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("caption", "th", "td"):
            self._cell = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._caption, self._cell = self._cell or "", None
        elif tag in ("th", "td"):
            self._rows[-1].append(self._cell or "")
            self._cell = None
        elif tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self._words.append(data)
        if self._cell is not None:
            self._cell += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def report(folder: Path, *arguments: str | Path) -> Page:
    outcome = run_tinybert("report", folder, *arguments)
    assert outcome.status == 0, outcome.err[-3000:]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def refused(*arguments: str | Path) -> Outcome:
    outcome = run_tinybert("report", *arguments)
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    return outcome


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage whose student was made to answer otherwise than its teacher."""
    folder = copy_run(tmp_path_factory.mktemp("whole"))
    contradict(folder)
    return folder


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> Page:
    return report(whole_run, "--price-per-hour", "7.2")


def contradict(folder: Path) -> None:
    """Turn the signs of a student's classifier: it takes each of two classes for the other."""
    file = folder / "task" / "student" / "model.safetensors"
    weights = load_file(file)
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = -weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def answers(model_folder: Path, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, probability of each), a text at a time, by nothing but transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    with torch.inference_mode():
        found = [
            model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0].softmax(-1)
            for text in rows["text"]
        ]
    probability, predicted = torch.stack(found).max(-1)
    return predicted.numpy(), probability.numpy()


def test_confusion_matrices_and_metrics_are_those_of_the_saved_models(whole: Page, whole_run: Path) -> None:
    rows = tiny.load()["test"]
    for who, folder in MODELS:
        predicted, _ = answers(whole_run / folder, rows)
        expected = confusion_matrix(rows["label"], predicted, labels=[0, 1])
        head, *shown = whole.tables[f"Confusion matrix of the {who}"]
        assert head == ["gold", "weather", "music"]
        assert shown == [[name, *map(str, row)] for name, row in zip(("weather", "music"), expected, strict=True)]
        accuracy = f"{np.mean(predicted == rows['label']):.4f}"
        assert next(row for row in whole.tables["Models"] if row[0] == who)[1] == accuracy


def test_calibration_errors_are_those_of_the_saved_models(whole: Page, whole_run: Path) -> None:
    """The expected calibration error by its definition: a loop over bins."""
    rows = tiny.load()["test"]
    for who, folder in MODELS:
        predicted, probability = answers(whole_run / folder, rows)
        right, error = predicted == np.array(rows["label"]), 0.0
        for low in range(10):
            inside = (probability > low / 10) & (probability <= (low + 1) / 10)
            if inside.any():
                error += inside.mean() * abs(right[inside].mean() - probability[inside].mean())
        assert f"{who.capitalize()}: ECE {error:.4f}" in whole.words


def test_disagreements_have_gold_and_both_probabilities_the_surest_first(whole: Page, whole_run: Path) -> None:
    rows, names = tiny.load()["test"], ("weather", "music")
    found = {who: answers(whole_run / folder, rows) for who, folder in MODELS}
    assert "They differ on 48 of 48 test rows (100.0%)" in whole.words
    one = r"(weather|music) ([\d.]+)% (?:right|wrong)"
    shown = re.findall(rf"row (\d+) gold (weather|music) teacher {one} student {one}", whole.words)
    assert len(shown) == 40
    for number, gold, *said in shown:
        row = int(number)
        assert gold == names[rows["label"][row]]
        for who, answer, percent in (("teacher", *said[:2]), ("student", *said[2:])):
            predicted, probability = found[who]
            assert answer == names[predicted[row]]
            assert float(percent) == pytest.approx(probability[row] * 100, abs=0.0501)
        assert rows["text"][row] in whole.words
    certainties = [found["student"][1][int(number)] for number, *_ in shown]
    assert certainties == pytest.approx(sorted(found["student"][1], reverse=True)[:40], abs=1e-6)


def test_chance_is_told_from_the_rows_that_differ(whole: Page, whole_run: Path) -> None:
    """Every answer is turned round, so each row adds +1 or -1, and the interval is wide."""
    found = re.search(r"On 48 rows a difference of (\S+) points .*?: 95% interval (\S+) to (\S+) points", whole.words)
    assert found is not None
    difference, low, high = map(float, found.groups())
    right = np.mean(answers(whole_run / "teacher" / "model", tiny.load()["test"])[0] == tiny.load()["test"]["label"])
    assert difference == pytest.approx((1 - 2 * right) * 100, abs=0.051)
    error = 196 * np.sqrt((1 - (1 - 2 * right) ** 2) / 48)
    assert (low, high) == pytest.approx((difference - error, difference + error), abs=4.3)  # a row is 4.2 points


def test_weights_that_changed_since_the_evaluation_are_told_of(whole: Page, whole_run: Path) -> None:
    before = json.loads((whole_run / "summary.json").read_text())["student"]["metrics"]["accuracy"]
    assert f"the student's accuracy was {before:.4f}; computed anew it is {1 - before:.4f}" in whole.words
    assert "the teacher's accuracy was" not in whole.words


def test_cost_is_time_times_price(whole: Page, whole_run: Path) -> None:
    summary = json.loads((whole_run / "summary.json").read_text())
    rows = {row[0]: row for row in whole.tables["By stage"]}
    assert rows["stage"][-1] == "cost"
    for stage, seconds in summary["seconds"].items():
        assert rows[stage][-1] == f"{seconds * 7.2 / 3600:,.2f}"
        assert rows[stage][1] == duration(seconds)
    assert rows["all"][-1] == f"{sum(summary['seconds'].values()) * 7.2 / 3600:,.2f}"
    tokens = json.loads((whole_run / "task" / "result.json").read_text())["tokens"]
    assert rows["task"][3] == f"{tokens:,}"


def test_recipe_and_trainings_are_those_of_the_run(whole: Page) -> None:
    assert "student 1 2 <- teacher 2 4 (strategy uniform)" in whole.words
    assert ["general", "hidden", "1", "distance mse, padding masked"] in whole.tables["Losses"]
    assert ["task, logits", "6 steps", "16", "0.001", "linear"] in whole.tables["Trainings"]
    assert ["test rows", "48"] in whole.tables["Data"]
    for title in ("Teacher: fine-tuning", "Same student on the labels alone", "Loss and its parts"):
        assert title in whole.words
    # 2 confusions, 2 diagrams, 2 sentences or 3 with 2 pairs of maps, 5 trainings, map, time
    assert whole.count("svg") >= 2 + 2 + 2 * 4 + 5 + 2
    assert all(attributes["aria-label"] for tag, attributes in whole.elements if tag == "svg")


def test_the_page_holds_all_it_needs(whole: Page) -> None:
    tags = {tag for tag, _ in whole.elements}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed"}
    pointers = [
        value
        for _, attributes in whole.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data") and value
    ]
    assert pointers
    assert all(pointer.startswith(("#", "data:image/png;base64,")) for pointer in pointers)


def test_nothing_but_the_report_is_written(whole_run: Path, whole: Page, tmp_path: Path) -> None:
    before = contents(whole_run)
    outcome = run_tinybert("report", whole_run, "--output", tmp_path / "own.html", "--sentence", "rain near our town")
    assert outcome.status == 0, outcome.err
    assert contents(whole_run) == before
    page = Page((tmp_path / "own.html").read_text(encoding="utf-8"))
    assert "rain near our town" in page.words
    assert "Given with --sentence" in page.words
    assert "The sentences are test rows" not in page.words
    assert "Cost: give --price-per-hour" in page.words


# Text that would be something else than text


def run_on(folder: Path, make: Callable[[int], dict[str, Any]], *settings: str) -> Path:
    folder.mkdir(exist_ok=True)
    files = [
        f"data.data_files.{split}={write_rows(folder / f'{split}.jsonl', map(make, range(count)))}"
        for split, count in (("train", 48), ("validation", 24), ("test", 24))
    ]
    succeed(TINY, *QUICK, "data.path=json", *files, *settings, "--output", folder / "run")
    return folder / "run"


def test_text_from_data_is_shown_as_text(tmp_path: Path) -> None:
    folder = run_on(tmp_path, lambda i: {"text": HOSTILE if i % 2 else "snow", "label": LABELS[i % 3]})
    file = folder / "task" / "student" / "model.safetensors"
    weights = load_file(file)
    weights["classifier.bias"] = torch.tensor([0.0, 0.0, 50.0])  # the student always says the last class
    save_file(weights, file, metadata={"format": "pt"})
    source = folder / "report.html"
    page = report(folder, "--sentence", HOSTILE)
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    visible = " ".join(HOSTILE.replace("\x1b", "\\x1b").replace("\x07", "\\x07").split())
    assert page.words.count(visible) >= 2  # among the disagreements, and above the attention maps
    raw = source.read_text(encoding="utf-8")
    assert not [character for character in raw if ord(character) < 32 and character != "\n"]
    names = [name.replace("\x1b", "\\x1b") for name in LABELS]
    order = sorted(LABELS)
    assert page.tables["Confusion matrix of the student"][0] == ["gold", *(names[LABELS.index(n)] for n in order)]
    assert raw.count("alert(1)") == raw.count("alert(1)&gt;") > 0


# Other tasks, and runs that lack parts


def test_general_distillation_alone_says_what_it_lacks(tmp_path: Path) -> None:
    succeed(TINY, *FEW_STEPS[:1], FEW_STEPS[2], "task=null", "augment=null", "--output", tmp_path / "run")
    page = report(tmp_path / "run", "--sentence", "rain near our town")
    assert "A general student, without a task" in page.words
    assert "There was no task (task: null)" in page.words
    assert "student layer 2 ← teacher layer 4" in page.words
    assert "Confusion" not in page.words
    without = report(tmp_path / "run")
    assert "There is no sentence to show attention on: give one with --sentence." in without.words


def sentence(index: int) -> list[str]:
    words = [word for topic in tiny.TOPICS.values() for word in topic]
    return [words[(index * step) % len(words)] for step in (1, 3, 5, 7)]


def test_a_regression_is_compared_by_distance(tmp_path: Path) -> None:
    make = lambda i: {"a": " ".join(sentence(i)), "b": "rain <b>", "label": i % 5 / 2}  # noqa: E731
    settings = ("task.type=regression", "data.text=a", "data.text_pair=b", "data.labels=null")
    page = report(run_on(tmp_path, make, *settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "task" / "student")
    said = {}
    for who, folder in MODELS:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / folder).eval()
        with torch.inference_mode():
            pairs = [tokenizer(make(i)["a"], "rain <b>", return_tensors="pt") for i in range(24)]
            said[who] = np.array([float(model(**pair).logits) for pair in pairs])
    distance = np.abs(said["student"] - said["teacher"])
    assert f"Mean distance {distance.mean():.4g}; on the line" in page.words
    assert f"They differ on {(distance > distance.mean()).sum()} of 24 test rows" in page.words
    assert "A number comes without a probability" in page.words
    assert "There was no general distillation" in page.words
    assert "No student was trained on the labels alone" in page.words


def test_words_are_compared_one_by_one(tmp_path: Path) -> None:
    make = lambda i: {  # noqa: E731
        "tokens": sentence(i),
        "tags": ["B-MUS" if word in tiny.TOPICS["music"] else "O" for word in sentence(i)],
    }
    page = report(run_on(tmp_path, make, "task.type=token_classification", "task.logits.learning_rate=0.1"))
    gold = [tag for i in range(24) for tag in make(i)["tags"]]
    for who in ("teacher", "student"):
        head, *rows = page.tables[f"Confusion matrix of the {who}"]
        assert head == ["gold", "B-MUS", "O"]
        assert [sum(map(int, row[1:])) for row in rows] == [gold.count("B-MUS"), gold.count("O")]
    assert {row[0]: row[1] for row in page.tables["By class"]}["O"] == str(gold.count("O"))
    assert "Student: ECE" in page.words


def test_labels_on_their_own_are_compared_one_by_one(tmp_path: Path) -> None:
    make = lambda i: {"text": " ".join(sentence(i)), "label": [i % 3] if i % 4 else [0, 2]}  # noqa: E731
    page = report(run_on(tmp_path, make, "task.type=multi_label_classification"))
    gold = [set(make(i)["label"]) for i in range(24)]
    rows = {row[0]: row for row in page.tables["By label"][1:]}
    assert {name: row[1] for name, row in rows.items()} == {
        str(label): str(sum(label in labels for labels in gold)) for label in range(3)
    }
    head = page.tables["By label"][0]
    for row in rows.values():
        for who in ("teacher", "student"):
            missed, wrongly, f1 = (row[head.index(f"{who} {what}")] for what in ("missed", "wrongly", "F1"))
            hit = int(row[1]) - int(missed)
            expected = 2 * hit / (2 * hit + int(missed) + int(wrongly)) if hit else 0.0
            assert f1 == f"{expected:.4f}"


def test_answers_in_a_context_are_compared_by_exact_match(tmp_path: Path) -> None:
    def make(i: int) -> dict[str, Any]:
        words = sentence(i)
        context = " ".join(words)
        start = context.index(words[2])
        return {
            "id": str(i),
            "question": f"about {words[2]}",
            "context": context,
            "answers": {"text": [words[2]], "answer_start": [start]},
        }

    page = report(run_on(tmp_path, make, "task.type=question_answering", "data.labels=null"))
    head, *rows = page.tables["Who answers exactly"]
    assert head == ["exact match", "rows", "share"]
    count = {row[0]: int(row[1]) for row in rows}
    assert sum(count.values()) == 24
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())
    for who in ("teacher", "student"):
        exact = count["both"] + count[f"only the {who}"]
        assert exact / 24 == pytest.approx(metrics[who]["metrics"]["exact_match"])


# What is read, and what is refused


def test_the_later_of_two_rows_counts_and_a_cut_off_one_does_not(tmp_path: Path) -> None:
    row = {"stage": "general", "total_step": 1, "time": 0.0}
    lines = [
        {**row, "step": 10, "train/loss": 2.0, "train/hidden": 1.0, "train/learning_rate": 0.1},
        {**row, "step": 10, "train/loss": 1.0, "train/hidden": None, "train/tokens_per_second": 5.0},
        {**row, "step": 20, "validation/loss": 0.5, "train/gradient_share/hidden": 1.0},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "gen')
    found = read_trainings(file)["general"]
    assert found.losses == {"loss": {10: 1.0}, "hidden": {10: 1.0}}
    assert found.validation == {"loss": {20: 0.5}}
    assert found.tokens_per_second == 5.0


def test_the_step_that_was_kept_is_the_last_of_the_best() -> None:
    assert kept_step({10: 0.5, 20: 0.9, 30: 0.9, 40: 0.1}, higher_is_better=True) == 30
    assert kept_step({10: 0.5, 20: 0.1, 30: 0.1, 40: 0.9}, higher_is_better=False) == 30


def test_damage_is_named(tmp_path: Path) -> None:
    folder = copy_run(tmp_path)
    file = folder / "metrics.jsonl"
    whole = file.read_text()
    file.write_text("no figures\n" + whole)
    assert "metrics.jsonl: damaged: line 1 is no row of figures" in refused(folder).err
    file.write_text(whole)
    (folder / "summary.json").write_text("{")
    assert "summary.json: damaged: it is not JSON" in refused(folder).err
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--output", "report.pdf"), "--output: report.pdf is no name of an HTML file"),
        (("--output", "nowhere/report.html"), "--output: nowhere/report.html cannot be written"),
        (("--sentence", "  "), "--sentence: it is empty"),
        (("--sentence", "caf\udce9"), "is not UTF-8"),
        (("--price-per-hour", "-1"), "price-per-hour"),
    ],
)
def test_what_cannot_be_reported_is_refused(arguments: tuple[str, ...], told: str, whole_run: Path) -> None:
    before = contents(whole_run)
    assert told in refused(whole_run, *arguments).err
    assert contents(whole_run) == before


def test_a_folder_that_is_no_run_and_one_without_a_student_are_refused(tmp_path: Path) -> None:
    assert "no run folder (no config.yaml in it)" in refused(tmp_path).err
    folder = copy_run(tmp_path)
    shutil.rmtree(folder / "task")
    shutil.rmtree(folder / "general")
    assert "has no student yet" in refused(folder).err


def test_a_missing_package_is_named_with_the_extra(whole_run: Path) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else find(name, *rest)

    with mock.patch("importlib.util.find_spec", without):
        assert "pip install 'tinybert-distill[export]'" in refused(whole_run).err
