"""TextBrewer 0.2.1.post1's own loop with TinyBERT's losses: the peer that speed and quality are measured against.
Which rows it gets is left to its callers.

float32; attention and hidden states as transformers returns them when asked for (eager attention, every layer); its
attention_mse and hidden_mse on the mapped layers with the mask of the inputs, kd ce on the logits. Its checkpoints are
switched off, its tensorboard too. transformers returns probabilities where TinyBERT takes scores: the work is the same.
Sources: github.com/airaria/TextBrewer, its GeneralDistiller for layers, BasicDistiller for logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]


class TextBrewer:
    """Both models and the optimizer of one phase; `train` goes over batches with its loop.

    Args:
        pairs: (student layer, teacher layer) from 1 for the intermediate phase; None for the logits.
        kd_loss: its loss on logits, ce or mse.
        cached: ask the teacher for each row's logits once, which is not its default.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        pairs: Sequence[tuple[int, int]] | None,
        learning_rate: float,
        *,
        temperature: float = 1.0,
        kd_loss: str = "ce",
        cached: bool = False,
    ) -> None:
        import textbrewer

        self.folder = tempfile.TemporaryDirectory(prefix="textbrewer-")
        training = textbrewer.TrainingConfig(device=student.device, output_dir=self.folder.name)
        shown = pairs is not None
        matches = _matches(pairs, student.config.hidden_size, teacher.config.hidden_size) if pairs is not None else []
        for model in (student, teacher):
            model.set_attn_implementation("eager")
        adaptor = _show_layers if shown else _show_logits
        if shown:
            options = textbrewer.DistillationConfig(intermediate_matches=matches)
            self.distiller = textbrewer.GeneralDistiller(training, options, teacher, student, adaptor, adaptor)
        else:
            options = textbrewer.DistillationConfig(
                temperature=temperature, kd_loss_type=kd_loss, hard_label_weight=0, is_caching_logits=cached
            )
            self.distiller = textbrewer.BasicDistiller(training, options, teacher, student, adaptor, adaptor)
        self.distiller.save_and_callback = lambda *arguments: None
        self.asked = {"output_hidden_states": True, "output_attentions": True} if shown else {}
        optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
        self.optimizer, _, _ = self.distiller.initialize_training(optimizer, None, None, None)

    def train(self, batches: Sequence[Batch], epochs: int = 1) -> None:
        """Passes over batches of input_ids, attention_mask, token_type_ids; padded."""
        self.distiller.logits_cache = []
        with self.distiller:
            self.distiller.train_with_num_epochs(
                self.optimizer, None, True, [dict(batch) for batch in batches], 1.0, epochs, None, None, **self.asked
            )


def _matches(pairs: Sequence[tuple[int, int]], student_width: int, teacher_width: int) -> list[dict[str, Any]]:
    attention = [
        {"layer_S": m - 1, "layer_T": g - 1, "feature": "attention", "loss": "attention_mse", "weight": 1}
        for m, g in pairs
    ]
    hidden = [
        {
            "layer_S": m,
            "layer_T": g,
            "feature": "hidden",
            "loss": "hidden_mse",
            "weight": 1,
            "proj": ["linear", student_width, teacher_width],
        }
        for m, g in [(0, 0), *pairs]
    ]
    return attention + hidden


def _show_layers(batch: Batch, output: Any) -> dict[str, Any]:
    return {
        "attention": output.attentions,
        "hidden": output.hidden_states,
        "inputs_mask": batch["attention_mask"],
    }


def _show_logits(batch: Batch, output: Any) -> dict[str, Any]:
    return {"logits": output.logits}
