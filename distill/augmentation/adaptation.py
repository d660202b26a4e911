"""Continued masked-LM pre-training, for a teacher that carries no masked-LM head: masking, learner, accuracy.
The loop is training.fit; which text is read and where the model goes is left to pipelines/masked_lm.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from datasets import Dataset, concatenate_datasets
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from distill.activations import Activations, Needs, model_inputs
from distill.augmentation.masked_forward import logits_at
from distill.data import Collator, Placement
from distill.losses import IGNORED
from distill.settings import UserError, settings
from distill.students import Student
from distill.training import TrainingOptions

MASKINGS = 10
"""Ways in which a sequence is masked, at most: a pass over the corpus sees the next one (RoBERTa, sec. 4.1)."""


@settings
class MaskedLMTraining(TrainingOptions):
    max_steps: PositiveInt = 300
    """Optimisation steps."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak rate of AdamW; a head of random weights bears more than fine-tuning does."""
    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the word pieces that are masked and predicted."""
    max_length: int = Field(default=128, ge=16)
    """Word pieces of a sequence, special ones included."""


def new_masked_lm(checkpoint: str, seed: int) -> PreTrainedModel:
    """The checkpoint under a masked-LM head tied to its word embeddings, float32; what it lacks of the head is drawn
    from `seed`.

    Raises:
        UserError: transformers knows no masked LM of this family.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForMaskedLM.from_pretrained(checkpoint, dtype=torch.float32)
        except ValueError as error:
            raise UserError(
                f"teacher.adapt_masked_lm: transformers has no masked LM of the family of {checkpoint}. Set it to null "
                "and name a masked LM in augment.masked_lm, or use augment.vectors alone."
            ) from error


def mask_sequences(sequences: Dataset, tokenizer: PreTrainedTokenizerBase, share: float, seed: int) -> Dataset:
    """Mask `share` of each sequence's pieces, one at least, never special ones; which follows from (seed, row).

    Columns input_ids, labels (the piece that stood there, IGNORED elsewhere) and length. All of them are replaced by
    the mask: BERT's random and unchanged tenths prepare for inputs without masks, and here candidates are only ever
    asked for at a mask.
    """
    special, mask = set(tokenizer.all_special_ids), tokenizer.mask_token_id

    def mask_batch(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        masked: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for ids, number in zip(batch["input_ids"], numbers, strict=True):
            places = [place for place, piece in enumerate(ids) if piece not in special]
            count = min(len(places), max(1, round(share * len(places))))
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
            chosen = set(random.choice(places, size=count, replace=False).tolist()) if places else set()
            masked["input_ids"].append([mask if at in chosen else piece for at, piece in enumerate(ids)])
            masked["labels"].append([piece if at in chosen else IGNORED for at, piece in enumerate(ids)])
        return masked

    return sequences.map(mask_batch, batched=True, with_indices=True, desc="mask corpus")


def repeat(sequences: Dataset, count: int) -> Dataset:
    """The sequences as often as `count` of them need, MASKINGS times at most; each repetition is masked anew."""
    return concatenate_datasets([sequences] * min(MASKINGS, -(-count // len(sequences))))


class MaskedCollator(Collator):
    """Pads masked sequences; masked_positions (B, k) says where each one's k masks are, labels (B, k) what was there.

    k is the largest number of masks in the batch; a sequence with fewer has position 0 and the label IGNORED for the
    rest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, None)

    def __call__(self, rows: Mapping[str, list[Any]], weights: Sequence[float]) -> dict[str, Tensor]:
        batch = super().__call__(rows, weights)
        places = [[at for at, label in enumerate(labels) if label != IGNORED] for labels in rows["labels"]]
        size = (len(places), max(1, *map(len, places)))
        batch["masked_positions"] = torch.zeros(size, dtype=torch.long)
        batch["labels"] = torch.full(size, IGNORED)
        for row, (own, labels) in enumerate(zip(places, rows["labels"], strict=True)):
            batch["masked_positions"][row, : len(own)] = torch.tensor(own, dtype=torch.long)
            batch["labels"][row, : len(own)] = torch.tensor([labels[at] for at in own], dtype=torch.long)
        return batch


class MaskedLearner(Student):
    """A masked LM as fit() trains it: logits (B, k, vocabulary) at the masked positions alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, nn.ModuleDict())

    def forward(self, batch: Mapping[str, Tensor], needs: Needs) -> Activations:
        places = batch["masked_positions"]
        rows = torch.arange(len(places), device=places.device).unsqueeze(1).expand_as(places)
        logits = logits_at(self.model, model_inputs(self.model, batch), rows.flatten(), places.flatten())
        return Activations(logits=logits.view(*places.shape, -1))


def masked_accuracy(
    learner: MaskedLearner, sequences: Dataset, collator: MaskedCollator, accelerator: Accelerator, batch_size: int
) -> float:
    """Share of the masked pieces that are predicted, over all sequences; every process does a share."""
    placement = Placement(accelerator.num_processes, accelerator.process_index)
    counts = torch.zeros(2, dtype=torch.float64)
    learner.eval()
    with torch.inference_mode():
        for start in range(placement.rank * batch_size, len(sequences), batch_size * placement.processes):
            rows = sequences[start : start + batch_size]
            batch = collator(rows, [0.0] * len(rows["input_ids"]))
            logits = learner({name: tensor.to(learner.model.device) for name, tensor in batch.items()}, Needs()).logits
            assert logits is not None
            right = logits.argmax(-1).cpu() == batch["labels"]  # no piece has the number IGNORED
            counts += torch.tensor([right.sum(), (batch["labels"] != IGNORED).sum()])
    hits, masked = reduce(counts.to(accelerator.device, torch.float32), reduction="sum").tolist()
    return hits / masked
