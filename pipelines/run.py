"""A run: its folder, its config, and what several stages share, each made once when first asked for.
The stages' own work is left to the files named after them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill.attention import show_attention
from distill.checkpoint import Checkpoints
from distill.config import Config, TaskOptions, load_config, to_plain
from distill.data import Batches, Collator, Placement, RowStates, TaskData, fingerprint, load_task_data
from distill.families import positions
from distill.interruption import Interruption
from distill.layer_map import LayerMap, build_layer_map
from distill.settings import UserError
from distill.spelling import Spelling
from distill.students import student_config
from distill.tasks import TASKS, TaskType
from distill.teachers import Checkpoint, load_teacher, open_checkpoint, open_tokenizer, vocabulary_hash, weights_hash
from distill.tracking import Tracker, check_trackers
from distill.training import Session, TrainingOptions
from distill.vocabulary import CutVocabulary
from pipelines.encoded import Encoded
from pipelines.launch import cpu_threads
from pipelines.lock import FolderLock
from pipelines.unlabelled import unlabelled_rows
from pipelines.vocabulary import cut_for
from pipelines.waiting import announce, group_timeout

REFUSED = ("DEEPSPEED", "MEGATRON_LM")
"""What accelerate can do with a model that does not fit on one device, and fit does not."""


@dataclass
class Run:
    """What a stage gets. `session` holds the accelerator, the tracker and the signals; `lock` keeps others out."""

    config: Config
    folder: Path
    session: Session
    lock: FolderLock

    @property
    def accelerator(self) -> Accelerator:
        return self.session.accelerator

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @cached_property
    def placement(self) -> Placement:
        return Placement(self.accelerator.num_processes, self.accelerator.process_index)

    @property
    def task_options(self) -> TaskOptions:
        assert self.config.task is not None, "a stage without a task asked for one"
        return self.config.task

    @cached_property
    def task(self) -> TaskType:
        return TASKS[self.task_options.type]

    @cached_property
    def metric(self) -> str:
        """The figure that chooses checkpoints."""
        metric = self.task_options.metric or self.task.primary
        known = self.task.deciding_figures(self.data.names)
        if metric not in known:
            raise UserError(
                f"task.metric: {metric!r} cannot decide a {self.task.name} of {len(self.data.names)} labels; use "
                f"{', '.join(known)}."
            )
        return metric

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The teacher as it was given, before the teacher stage."""
        return open_checkpoint(self.config.teacher.model)

    @cached_property
    def teacher_hash(self) -> str:
        return weights_hash(self.checkpoint.source)

    @cached_property
    def cut(self) -> CutVocabulary | None:
        """The student's part of the teacher's vocabulary; None where student.vocabulary is not set."""
        return cut_for(self)

    @cached_property
    def student_source(self) -> Checkpoint:
        """Whose pieces the student reads: the teacher's, a part of them (student.vocabulary), or those of
        student.tokenizer where it has another vocabulary."""
        if self.cut is not None:
            return Checkpoint(self.checkpoint.source, self.cut.config(self.checkpoint.config), self.cut.tokenizer)
        named = self.config.student.tokenizer
        if named is None:
            return self.checkpoint
        other = open_tokenizer(named)
        same = vocabulary_hash(other.tokenizer) == vocabulary_hash(self.checkpoint.tokenizer)
        return self.checkpoint if same else other

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        return self.student_source.tokenizer

    @property
    def tokenizers_differ(self) -> bool:
        return self.student_source is not self.checkpoint

    @property
    def pieces_correspond(self) -> bool:
        """Whether each piece of the student stands for one of the teacher's, so that layers can be compared."""
        return not self.tokenizers_differ or self.cut is not None

    @property
    def student_settings(self) -> dict[str, Any]:
        """The section student as stages depend on it: what is not set does not count, so that it may be new."""
        settings: dict[str, Any] = to_plain(self.config.student)
        if settings["embedding_width"] is None:
            del settings["embedding_width"]
        if settings["vocabulary"] is None:
            del settings["vocabulary"]
        else:
            settings["reads"] = "its own spelling"  # before, [UNK] for a piece that was cut
        return settings

    @cached_property
    def layer_map(self) -> LayerMap:
        return build_layer_map(
            self.config.layer_map, self.config.student.layers, self.checkpoint.config.num_hidden_layers
        )

    @cached_property
    def data(self) -> TaskData:
        with self.accelerator.main_process_first():
            return load_task_data(self.config.data, self.task, self.config.seed)

    @cached_property
    def unlabelled(self) -> Dataset | None:
        """The rows of task.unlabelled."""
        return unlabelled_rows(self)

    @cached_property
    def data_hash(self) -> str:
        return _digest([fingerprint(rows) for rows in self.data.splits.values()])

    @cached_property
    def encoded(self) -> Encoded:
        """The task's rows as the student reads them."""
        return Encoded(self, self.tokenizer)

    @cached_property
    def teacher_encoded(self) -> Encoded:
        """The task's rows as the teacher reads them; the same object where the student reads the same pieces."""
        alone = self.config.student.vocabulary is not None or self.tokenizers_differ
        return Encoded(self, self.checkpoint.tokenizer) if alone else self.encoded

    @cached_property
    def spelling(self) -> Spelling | None:
        """How a student of a cut vocabulary spells what is in the teacher's pieces."""
        if self.cut is None:
            return None
        return Spelling(self.cut, self.checkpoint.tokenizer, positions(self.student_source.config))

    @cached_property
    def paired_encoded(self) -> Encoded:
        """The task's rows as both read them, where pieces correspond: in the teacher's, with a student's own spelling
        of them where its vocabulary is cut; else as the student reads them."""
        if self.cut is None:
            return self.encoded
        return Encoded(self, self.checkpoint.tokenizer, self.spelling, like=self.teacher_encoded)

    def batches(
        self,
        features: Dataset,
        options: TrainingOptions,
        collator: Collator,
        placement: Placement | None = None,
        states: RowStates | None = None,
    ) -> Batches:
        """Training steps over encoded rows, this process's share of them where no other placement is given."""
        return Batches(
            features,
            collator,
            batch_size=options.batch_size,
            accumulation=options.gradient_accumulation_steps,
            seed=self.config.seed,
            placement=placement or self.placement,
            pin_memory=self.device.type == "cuda",
            states=states,
        )

    def checkpoints(self, *path: str) -> Checkpoints:
        """Training checkpoints under the run folder."""
        return Checkpoints(
            self.folder.joinpath(*path, "checkpoints"), self.accelerator, self.config.runtime.keep_checkpoints
        )

    @property
    def teacher_folder(self) -> Path:
        """Where the teacher stage puts its teacher."""
        return self.folder / "teacher" / "model"

    @cached_property
    def task_teacher(self) -> Checkpoint:
        """The teacher with a trained task head: what the teacher stage made, or the given one."""
        if self.config.teacher.training is None:
            return self.checkpoint
        return open_checkpoint(str(self.teacher_folder))

    def load_task_teacher(self) -> PreTrainedModel:
        """Float32, frozen, on the device."""
        teacher = load_teacher(self.task_teacher, self.task, self.data.names, fresh_head=False)
        return teacher.to(self.device)

    def student_config(self) -> PreTrainedConfig:
        config = student_config(self.student_source.config, self.config.student)
        if self.config.task is not None:
            names = self.data.names
            if names:
                config.id2label = dict(enumerate(names))
                config.label2id = {name: index for index, name in enumerate(names)}
            else:
                config.num_labels = self.task.num_labels(names)
            config.problem_type = self.task.problem_type
        return config

    def frozen_for_training(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """The teacher as a target: attention shown, in bf16 where training is, with dropout where that is asked for."""
        teacher.train(self.config.teacher.dropout)
        show_attention(teacher)
        return teacher.to(torch.bfloat16) if self.accelerator.mixed_precision == "bf16" else teacher

    def say(self, message: str) -> None:
        """A line for people, once."""
        if self.is_main:
            print(message, flush=True)


def open_run(config: Config) -> Run:
    """Settle threads, precision and seed, and join the other processes; writes nothing.

    Raises:
        UserError: an unknown tracker, or one that is not installed; a launcher that was told DeepSpeed or Megatron.
    """
    sharded = _told_to_shard()
    check_trackers(config.tracking)
    torch.set_num_threads(config.runtime.cpu_threads or cpu_threads())
    folder, seconds = Path(config.output), config.runtime.process_timeout_seconds
    config = replace(config, runtime=replace(config.runtime, precision=_precision(config, folder)))
    accelerator = Accelerator(
        mixed_precision="bf16" if config.runtime.precision == "bf16" else "no",
        log_with=list(config.tracking) or None,
        project_dir=str(folder),
        cpu=_on_cpu(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=group_timeout(seconds, on_cpu=_on_cpu()))],
    )
    announce()
    set_seed(config.seed)
    tracker = Tracker(accelerator, folder, config.tracking)
    session = Session(
        accelerator,
        tracker,
        Interruption(timedelta(seconds=seconds)),
        config.runtime.on_nonfinite,
        sharded and accelerator.num_processes > 1,
    )
    return Run(config, folder, session, FolderLock(folder, accelerator))


def _told_to_shard() -> bool:
    """Whether accelerate's launcher was told FSDP. Its word is taken out of the environment: accelerators would wrap
    what they prepare, and transformers would load weights on one process alone; fit shards by itself."""
    # By what the launcher tells its scripts, before anything is started with it: an accelerator would ask for packages.
    for kind in REFUSED:
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise UserError(
                f"accelerate launch: {kind} cuts the student into shards, which capture of its layers and the "
                "checkpoints do not know. Use distributed_type FSDP, MULTI_GPU or MULTI_CPU, as in configs/accelerate."
            )
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    return sharded


def close_run(run: Run) -> None:
    """Leave the other processes in order."""
    if run.accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def _on_cpu() -> bool:
    """Told to the accelerator: without it, processes on a machine without one would not find each other."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _precision(config: Config, folder: Path) -> Literal["fp32", "bf16"]:
    """What the config says; for auto what this run used before, what the launcher was told, or what is measured."""
    if config.runtime.precision != "auto":
        return config.runtime.precision
    if (folder / "config.yaml").is_file():
        before = load_config(folder / "config.yaml").runtime.precision
        if before != "auto":
            return before
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        return "bf16"
    timeout = group_timeout(config.runtime.process_timeout_seconds, on_cpu=_on_cpu())
    state = PartialState(cpu=_on_cpu(), timeout=timeout)
    measured = [measured_precision(state.device) if state.is_main_process else "fp32"]
    return broadcast_object_list(measured)[0] if state.num_processes > 1 else measured[0]


def measured_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """bf16 where a bf16 matrix product takes less than two thirds of a float32 one's time on this device, else fp32."""

    def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(2048, 512, dtype=dtype, device=device), torch.ones(512, 1024, dtype=dtype, device=device)

    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    factors = {dtype: operands(dtype) for dtype in seconds}
    for _ in range(15):  # in turn, and the least of each: what else the machine does can only lengthen a product
        for dtype, (a, b) in factors.items():
            _wait(device)
            began = time.perf_counter()
            a @ b
            _wait(device)
            seconds[dtype].append(time.perf_counter() - began)
    return "bf16" if min(seconds[torch.bfloat16]) < min(seconds[torch.float32]) * 2 / 3 else "fp32"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
