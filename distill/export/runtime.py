"""Running an artefact on the CPU as a transformers model is run, so that one loop predicts with either.
What the graph is, is left to graph.py; the runtimes to session.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from distill.export.session import open_runner


class ArtefactModel(nn.Module):
    """An artefact of any format; called with (B, T) tensors, it gives logits by name.

    Args:
        config: of the model that was exported.
        threads: of one forward.
    """

    device = torch.device("cpu")

    def __init__(self, file: Path, config: PreTrainedConfig, threads: int = 1) -> None:
        super().__init__()
        self.config = config
        self.runner = open_runner(file, threads)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        runner = self.runner
        feed = {name: tensor.numpy() for name, tensor in given.items() if tensor is not None and name in runner.takes}
        return dict(zip(runner.gives, map(torch.from_numpy, runner.run(feed)), strict=True))
