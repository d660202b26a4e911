"""Running an artefact on the CPU as a transformers model is run, so that one loop predicts with either.
What the graph is, is left to graph.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from distill.export.session import OPENVINO_FILE, compile_openvino, open_session


class OnnxModel(nn.Module):
    """An ONNX file, read whole by ONNX Runtime; called with (B, T) tensors, it gives logits by name.

    Args:
        config: of the model that was exported.
        threads: of one forward.
    """

    device = torch.device("cpu")

    def __init__(self, file: Path, config: PreTrainedConfig, threads: int = 1) -> None:
        super().__init__()
        self.config = config
        self.session = open_session(file, threads)
        self.takes = [given.name for given in self.session.get_inputs()]
        self.gives = [given.name for given in self.session.get_outputs()]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        feed = {name: tensor.numpy() for name, tensor in given.items() if tensor is not None and name in self.takes}
        return dict(zip(self.gives, map(torch.from_numpy, self._run(feed)), strict=True))

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found: list[np.ndarray] = self.session.run(None, feed)
        return found


class OpenVinoModel(OnnxModel):
    """The same of OpenVINO's files."""

    def __init__(self, file: Path, config: PreTrainedConfig, threads: int = 1) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.compiled = compile_openvino(file, threads)
        self.takes = [given.any_name for given in self.compiled.inputs]
        self.gives = [given.any_name for given in self.compiled.outputs]

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self.compiled(feed)
        return [found[output] for output in self.compiled.outputs]


def open_artefact(file: Path, config: PreTrainedConfig, threads: int = 1) -> OnnxModel:
    """By the file's name."""
    kind = OpenVinoModel if file.name == OPENVINO_FILE else OnnxModel
    return kind(file, config, threads)
