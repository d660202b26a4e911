"""Claims about benchmarks/speed.py and speed_systems.py: what it counts and times is what it says.
Nothing here measures speed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from benchmarks.speed import encoder_flops
from benchmarks.speed_systems import SST2_LENGTHS, Paced, make_rows, static_batches


@pytest.mark.parametrize("length", [5, 16])
def test_the_counted_products_are_those_that_torch_counts(length: int) -> None:
    config = BertConfig(vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    model = BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(3, length, dtype=torch.long))
    assert encoder_flops(config, 3, length) == counter.get_total_flops()


class _Batches:
    """Four steps, each a second's wait."""

    steps_per_epoch = 4

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        for _ in range(first, last):
            self.clock[0] += 1
            yield [{"attention_mask": torch.ones(2, 3)}]


def test_a_step_s_time_is_its_own_and_its_batch_s_and_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.speed_systems.time.perf_counter", lambda: clock[0])

    def other() -> None:
        clock[0] += 50

    paced = Paced(_Batches(clock), 2, {"other": other}, before=0.0)  # type: ignore[arg-type]
    for step, _ in enumerate(paced.steps(0, 4)):
        clock[0] += 2 + step
    assert paced.seconds == [3, 4, 5, 6]
    assert paced.waits == [1, 1, 1, 1]
    assert paced.turns == {"other": [50, 50]}
    assert paced.block_seconds() == [3.5, 5.5]
    assert paced.tokens == 24


def test_rows_have_the_lengths_asked_for_and_the_others_pad_them_to_one() -> None:
    rows = make_rows(SST2_LENGTHS, 128, ())
    assert sorted(rows["length"]) == sorted(2 * SST2_LENGTHS)
    batch = static_batches(rows, 32, 64, 2)[1]
    assert batch["input_ids"].shape == (32, 64)
    assert batch["attention_mask"].sum(1).tolist() == rows["length"][32:64]
