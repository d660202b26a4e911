"""Stage masked_lm: continue the masked-LM pre-training of the teacher as it was given; augment reads what it makes.
Masking, the learner and its accuracy are distill.augmentation's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from distill.augmentation import TextColumns
from distill.augmentation.adaptation import (
    MaskedCollator,
    MaskedLearner,
    MaskedLMTraining,
    mask_sequences,
    masked_accuracy,
    new_masked_lm,
    repeat,
)
from distill.checkpoint import write_folder
from distill.config import Config, to_plain
from distill.corpus import load_corpus, pack
from distill.data import fingerprint
from distill.losses import LabelLoss, Logits, Match
from distill.objective import Objective
from distill.settings import UserError
from distill.teachers import check_length
from distill.training import Validation, fit
from pipelines.estimate import training_work
from pipelines.run import Run
from pipelines.stage import Stage, Work

HELD_OUT_SHARE, HELD_OUT_SEQUENCES = 0.1, 512
"""Of the sequences, kept from training for the masked accuracy; at most."""


class MaskedLMStage(Stage):
    name = "masked_lm"

    def is_on(self, config: Config) -> bool:
        return config.teacher.adapt_masked_lm is not None

    def check(self, run: Run) -> None:
        options, augment = _options(run), run.config.augment
        if augment is None or run.config.task is None:
            raise UserError(
                "teacher.adapt_masked_lm: the masked LM it makes proposes words to augment, which is off. Set "
                "augment={copies: 20} beside a task, or teacher.adapt_masked_lm to null."
            )
        if augment.masked_lm is not None:
            raise UserError(
                f"teacher.adapt_masked_lm: augment.masked_lm names {augment.masked_lm}, so that what it makes would "
                "not be read. Set one of the two to null."
            )
        if run.checkpoint.tokenizer.mask_token_id is None:
            raise UserError(
                "teacher.adapt_masked_lm: the teacher's tokenizer has no mask token. Set it to null and name a masked "
                "LM in augment.masked_lm, or use augment.vectors alone."
            )
        check_length(run.checkpoint, options.max_length, "teacher.adapt_masked_lm.max_length")
        new_masked_lm(run.checkpoint.source, run.config.seed)
        if run.config.general is None or not run.config.general.streaming:
            _splits(run)

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        general = run.config.general
        streamed = general is not None and general.streaming
        return {
            "teacher.adapt_masked_lm": to_plain(_options(run)),
            "teacher.model": run.config.teacher.model,
            "corpus": to_plain(general.corpus if general is not None else run.config.data),
            "corpus content": "streamed" if streamed else fingerprint(_documents(run)),
            "seed": run.config.seed,
            "teacher weights": run.teacher_hash,
        }

    def plan(self, run: Run) -> list[Work]:
        options, general = _options(run), run.config.general
        rows = 0 if general is not None and general.streaming else len(_splits(run)[0])
        length = options.max_length
        return [training_work(run, self.name, options, rows, length=length, trains="teacher", distils=False)]

    def run(self, run: Run) -> dict[str, Any]:
        options, seed = _options(run), run.config.seed
        train, held_out = _splits(run)
        with run.accelerator.main_process_first():
            train = repeat(train, options.max_steps * options.batch_size)
            train = mask_sequences(train, run.checkpoint.tokenizer, options.mask_share, seed)
            held_out = mask_sequences(held_out, run.checkpoint.tokenizer, options.mask_share, seed)
        model = new_masked_lm(run.checkpoint.source, seed).to(run.device)
        learner, collator = MaskedLearner(model), MaskedCollator(run.checkpoint.tokenizer)

        def accuracy() -> float:
            return masked_accuracy(learner, held_out, collator, run.accelerator, run.config.evaluate.batch_size)

        before = accuracy()
        checkpoints = run.checkpoints(self.name)
        result = fit(
            learner,
            None,
            # At each mask the pieces are the classes.
            Objective({"masked_lm": LabelLoss()}, Match(run.layer_map, Logits.TOKEN_CLASSES)),
            run.batches(train, options, collator),
            options,
            run.session,
            name=self.name,
            checkpoints=checkpoints,
            validation=Validation(lambda: {"masked_accuracy": accuracy()}, "masked_accuracy", higher_is_better=True),
        )
        after = result.best["masked_accuracy"]
        if run.is_main:

            def save(folder: Path) -> None:
                model.save_pretrained(folder)
                run.checkpoint.tokenizer.save_pretrained(folder)

            write_folder(model_folder(run), save)
        checkpoints.clear()
        run.say(
            f"masked_lm: {before:.1%} of the masked pieces were predicted before, {after:.1%} after, in "
            f"{len(held_out):,} held-out sequences"
        )
        return {
            **result.figures(),
            "masked_accuracy": {"before": before, "after": after},
            "held_out_sequences": len(held_out),
        }


def model_folder(run: Run) -> Path:
    """The adapted masked LM, a plain checkpoint with the teacher's tokenizer."""
    return run.folder / "masked_lm" / "model"


def _splits(run: Run) -> tuple[Dataset, Dataset]:
    """Sequences to train on, and others to measure on."""
    options = _options(run)
    with run.accelerator.main_process_first():
        sequences: Dataset = pack(_documents(run), run.checkpoint.tokenizer, options.max_length)
    if len(sequences) < 2:
        raise UserError(
            f"teacher.adapt_masked_lm: the text fills {len(sequences)} sequence of {options.max_length} word pieces; "
            "one must be left to measure on. Give more text as general.corpus, or set a smaller max_length there."
        )
    count = min(HELD_OUT_SEQUENCES, max(1, round(HELD_OUT_SHARE * len(sequences))))
    parts = sequences.train_test_split(test_size=count, seed=run.config.seed)
    return parts["train"], parts["test"]


def _documents(run: Run) -> Dataset:
    """general.corpus where there is one, of a stream as much as the steps read; else the training texts."""
    options, general = _options(run), run.config.general
    if general is None:
        rows = run.data.splits["train"]
        columns = TextColumns.of(rows.column_names)
        return Dataset.from_dict({"text": [text for row in rows for text in columns.texts_of(row)]})
    with run.accelerator.main_process_first():
        corpus = load_corpus(general.corpus, streaming=general.streaming)
        if isinstance(corpus, Dataset):
            return corpus
        # A document for each sequence: where documents are shorter, sequences are read again, masked anew.
        return Dataset.from_list(list(corpus.take(options.max_steps * options.batch_size + HELD_OUT_SEQUENCES)))


def _options(run: Run) -> MaskedLMTraining:
    assert run.config.teacher.adapt_masked_lm is not None
    return run.config.teacher.adapt_masked_lm
