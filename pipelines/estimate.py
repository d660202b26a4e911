"""Estimates for a plan: steps, tokens, seconds and disk of a training, from speeds measured on this machine.
The training itself is left to the stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from transformers import AutoModel, PreTrainedConfig

from distill.families import positions
from distill.training import TrainingOptions, total_steps
from pipelines.run import Run
from pipelines.stage import Work

PROBE_ROWS, PROBE_LENGTH = 8, 64


def training_work(
    run: Run,
    name: str,
    options: TrainingOptions,
    rows: int,
    *,
    length: int | None = None,
    trains: Literal["student", "teacher"] = "student",
    distils: bool = True,
) -> Work:
    """The plan of one call of fit. The time is that of the matrix work; it grows with the tokens.

    Args:
        rows: of an epoch; 0 for a stream.
        length: tokens of a row; the training split's mean where not given.
        distils: whether the teacher runs beside.
    """
    steps = total_steps(options, -(-rows // options.batch_size) if rows else None)
    if length is None:
        lengths = run.encoded.features["train"]["length"][:]
        length = round(sum(lengths) / len(lengths))
    tokens = steps * options.batch_size * length
    teacher, student = run.checkpoint.config, run.student_config()
    trained = teacher if trains == "teacher" else student
    seconds_per_token = _seconds_per_token(run, trained, backward=True)
    if distils:
        seconds_per_token += _seconds_per_token(run, teacher, backward=False)
    # AdamW keeps two values a parameter beside the weight; the best weights are a fourth copy.
    megabytes = 4 * 4 * parameters(trained) / 1e6
    return Work(
        name,
        f"{rows:,} sequences" if rows else "a stream",
        steps,
        tokens,
        tokens * seconds_per_token / run.accelerator.num_processes,
        megabytes,
    )


def _seconds_per_token(run: Run, config: PreTrainedConfig, *, backward: bool) -> float:
    key = (config.model_type, config.num_hidden_layers, config.hidden_size, backward)
    known: dict[tuple[str, int, int, bool], float] = run.__dict__.setdefault("_speeds", {})
    if key not in known:
        length = min(PROBE_LENGTH, positions(config) or PROBE_LENGTH)
        known[key] = _measure(run, config, length, backward) / (PROBE_ROWS * length)
    return known[key]


def _measure(run: Run, config: PreTrainedConfig, length: int, backward: bool) -> float:
    model = AutoModel.from_config(config).to(run.device)
    ids = torch.ones(PROBE_ROWS, length, dtype=torch.long, device=run.device)
    mask = torch.ones_like(ids)

    def step() -> None:
        with torch.set_grad_enabled(backward), run.accelerator.autocast():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        if backward:
            hidden.float().square().mean().backward()

    return _median_seconds(step, run.device)


def _median_seconds(step: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(4):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[1]


def parameters(config: PreTrainedConfig) -> int:
    """Of the encoder, counted without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
