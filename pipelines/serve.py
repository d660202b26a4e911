"""What `tinybert serve` serves: the artefact of a run and, on demand, the run's teacher beside it.
The server itself is distill/serving/'s."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from distill.activations import model_inputs, read_logits
from distill.config import load_config
from distill.serving.answers import Answerer, Served
from distill.serving.server import Model
from distill.settings import UserError
from distill.tasks import TASKS
from distill.teachers import open_checkpoint


def teacher_model(folder: Path, served: Served, threads: int) -> Model:
    """The teacher that a run's student learned from, in PyTorch, under the name `teacher`.

    Args:
        served: what the student answers; the teacher answers the same.

    Raises:
        UserError: the run's teacher is not there.
    """
    config = load_config(folder / "config.yaml", [])
    trained = folder / "teacher" / "model"
    if config.teacher.training is not None and not (trained / "config.json").is_file():
        raise UserError(f"--with-teacher: {trained} is not there. Finish the run's stage teacher, or leave it out.")
    source = str(trained) if config.teacher.training is not None else config.teacher.model
    checkpoint = open_checkpoint(source)
    make = partial(_teacher, checkpoint.source, served, threads)
    return Model("teacher", served, make, "PyTorch, float32", "pytorch")


def _teacher(source: str, served: Served, threads: int) -> Answerer:
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    model = TASKS[served.task].auto_class.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    probe = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), torch.zeros(1, 1, dtype=torch.long))

    def forward(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            output = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        logits: np.ndarray = read_logits(output).numpy()
        return logits

    return Answerer(
        served, tokenizer.backend_tokenizer, tokenizer.pad_token_id, list(model_inputs(model, probe)), forward
    )
