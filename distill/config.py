"""Configuration: YAML and dotted overrides -> frozen objects -> YAML.
Each group of settings stands in the file that uses it; only the groups of whole stages stand here."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from pydantic import Field, NonNegativeFloat, PositiveInt, TypeAdapter, ValidationError

from distill.augmentation import AugmentOptions
from distill.augmentation.adaptation import MaskedLMTraining
from distill.data import DataOptions, SourceOptions
from distill.export.options import CardOptions, ExportOptions
from distill.layer_map import LayerMapOptions
from distill.losses import GeneralLosses, LossTerm, TaskLosses
from distill.presets import under_preset
from distill.settings import UserError, settings
from distill.students import StudentOptions
from distill.training import TrainingOptions
from distill.unlabelled import UnlabelledOptions


@settings
class TeacherTraining(TrainingOptions):
    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(default=5e-5, gt=0)


@settings
class IntermediateTraining(TrainingOptions):
    epochs: float = Field(default=20, gt=0)
    learning_rate: float = Field(default=5e-5, gt=0)


@settings
class LogitsTraining(TrainingOptions):
    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(default=3e-5, gt=0)


@settings
class GeneralTraining(TrainingOptions):
    batch_size: PositiveInt = 256
    learning_rate: float = Field(default=1e-4, gt=0)
    save_every_steps: PositiveInt = 500


@settings
class TeacherOptions:
    model: str = "all-minilm-l6-v2"
    """Checkpoint folder, hub name, or the packaged all-minilm-l6-v2."""
    training: TeacherTraining | None = None
    """Fine-tune it on the task first; null where it is fine-tuned already."""
    adapt_masked_lm: MaskedLMTraining | None = None
    """For augment, continue the masked-LM pre-training of the teacher as it is given on general.corpus, or on the
    training texts where general is null; for a teacher without a masked-LM head. null: not."""
    dropout: bool = False
    """Leave the teacher's dropout on while it teaches, as the published code does; it is noise in every target."""


@settings
class GeneralOptions:
    corpus: SourceOptions = dataclasses.field(default_factory=SourceOptions)
    """Unlabelled text; the keys of data."""
    streaming: bool = False
    """Read the corpus as it trains; needs training.max_steps."""
    max_length: int = Field(default=128, ge=16)
    """Word pieces of a sequence, special ones included."""
    losses: GeneralLosses = dataclasses.field(default_factory=GeneralLosses)
    """Loss terms; neither labels nor logits exist here."""
    training: GeneralTraining = dataclasses.field(default_factory=GeneralTraining)


@settings
class TaskOptions:
    type: Literal[
        "single_label_classification",
        "multi_label_classification",
        "regression",
        "token_classification",
        "question_answering",
    ] = "single_label_classification"
    metric: str | None = None
    """Figure by which checkpoints are chosen and retention is told; the task's usual one where not given."""
    losses: TaskLosses = dataclasses.field(default_factory=TaskLosses)
    """Loss terms: the intermediate phase takes embedding, attention and hidden, the logits phase logits and labels, a
    joint one all of them."""
    intermediate: IntermediateTraining | None = dataclasses.field(default_factory=IntermediateTraining)
    """The phase on intermediate layers; null skips it, as preset: default does where neither it nor joint is given."""
    logits: LogitsTraining | None = dataclasses.field(default_factory=LogitsTraining)
    """The phase on logits; null skips it."""
    joint: bool = False
    """The phase on logits keeps the terms of the intermediate phase; where intermediate is null, one joint phase, which
    preset: default has where neither is given."""
    unlabelled: UnlabelledOptions | None = None
    """Text without labels to train on beside the training rows, wherever augmented ones take part; the teacher says
    what it is. The keys of data that name a source and its texts; losses.labels must be off."""
    augmented_logits: bool = True
    """Whether the phase on logits trains on the augmented rows too (the paper: not for STS-B and SQuAD)."""

    def terms(self) -> dict[str, dict[str, LossTerm]]:
        """The loss terms of each phase that is on."""
        layers, phases = self.losses.intermediate(), {}
        if self.intermediate is not None:
            phases["intermediate"] = layers
        if self.logits is not None:
            phases["logits"] = {**(layers if self.joint else {}), **self.losses.prediction()}
        return phases

    @property
    def compares_layers(self) -> bool:
        """Whether a phase that is on compares what the models hold inside."""
        return self.intermediate is not None or (self.joint and self.logits is not None)


@settings
class EvaluateOptions:
    undistilled: bool = True
    """Also train the same student from random weights on the labels alone, for as many steps as distillation took
    on the task, and report it beside."""
    undistilled_training: LogitsTraining | None = None
    """How; where null, the logits phase's settings over the steps of both task phases."""
    batch_size: PositiveInt = 64
    """Rows a forward when predicting."""


@settings
class RuntimeOptions:
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of training and the frozen teacher; auto: bf16 where a matrix product in it is measured faster."""
    keep_checkpoints: PositiveInt = 2
    """Training checkpoints kept while a stage runs; with two there is one before, should the last be damaged."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite is never taken, and its rows are written to
    skipped_steps.jsonl. stop: the run ends; skip: it goes on, unless 20 such steps follow each other."""
    logits_cache: str | None = None
    """Folder in which runs keep and find a teacher's logits and states; null: the run folder. Every process must see
    it."""
    states_cache_gb: NonNegativeFloat = 0
    """Disk that the teacher's states (hidden states, queries, keys of mapped layers) may take in a phase that compares
    layers, so that it runs once over the rows and not in every epoch; where they take more, or at 0, it runs in every
    step. See docs/speed.md for what it gains and how much it takes."""
    process_timeout_seconds: PositiveInt = 1800
    """So long the processes of a run wait for one of them before they end with a message. Longer than what the first
    does alone while the others wait: reading and cutting a corpus, making artefacts."""
    cpu_threads: PositiveInt | None = None
    """Threads of a process on the CPU; torch's own choice where not given."""


@settings
class Config:
    preset: Literal["default", "paper", "reference"] = "default"
    """Recipe under the settings given here: default, paper, or reference for what the published code computes; see
    docs/presets.md."""
    output: str = "runs/default"
    """The run folder; --output replaces it."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Of everything random."""
    teacher: TeacherOptions = dataclasses.field(default_factory=TeacherOptions)
    student: StudentOptions = dataclasses.field(default_factory=StudentOptions)
    layer_map: LayerMapOptions = dataclasses.field(default_factory=LayerMapOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    general: GeneralOptions | None = None
    """General distillation; null leaves the stage out."""
    augment: AugmentOptions | None = None
    """Data augmentation of the training split; null leaves the stage out."""
    task: TaskOptions | None = dataclasses.field(default_factory=TaskOptions)
    """Task distillation; null for general distillation alone."""
    evaluate: EvaluateOptions = dataclasses.field(default_factory=EvaluateOptions)
    export: ExportOptions = dataclasses.field(default_factory=ExportOptions)
    card: CardOptions = dataclasses.field(default_factory=CardOptions)
    """The model card, README.md in the student's folder."""
    runtime: RuntimeOptions = dataclasses.field(default_factory=RuntimeOptions)
    tracking: list[str] = dataclasses.field(default_factory=list)
    """Trackers beside metrics.jsonl: wandb, tensorboard, ..."""
    project: str = "tinybert-distill"
    """Project name at the trackers."""


_ADAPTER = TypeAdapter(Config)


class _Loader(yaml.SafeLoader):
    """YAML in which no key may stand twice, and 5e-5 is a number: YAML 1.1 wants 5.0e-5 and reads a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would take for a number, and one with a NEL, which YAML takes for a line break."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)

for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides, the value read as YAML.

    Raises:
        UserError: the file cannot be read, an override has no "=", a key is unknown or a value out of range.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the config cannot be read: {error}. Give the path of a YAML file.") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of sections, for instance `seed: 42`.")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is no override: write section.key=value, for instance seed=1.")
        _set(values, key.split("."), _parse(value, override), override)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Put the preset's values under the given ones and validate.

    Raises:
        UserError: naming the first wrong key, and the nearest known one where it is unknown.
    """
    try:
        return _ADAPTER.validate_python(under_preset(values))
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0])) from None


def dump_config(config: Config) -> str:
    """YAML that load_config reads back to an equal config."""
    return dump_values(to_plain(config))


def dump_values(values: Mapping[str, Any], *, ascii_only: bool = False) -> str:
    """Plain settings as YAML that load_config understands as it is meant; other characters escaped where asked for."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=not ascii_only)


def to_plain(value: Any) -> Any:
    """Any group of settings as mappings, lists and scalars."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{place}: not YAML: {problem}.") from None


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise UserError(f"{override!r}: {'.'.join(keys[:depth])} is a value, not a section.")
    last = keys[-1]
    # An override of one key of a section keeps the others; a whole section or null replaces it.
    values[last] = value


def _explain(error: Any) -> str:
    unknown = error["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    # Of a union pydantic names the member it tried as well; a key that is unknown comes last, whatever it looks like.
    parts = [str(part) for part in error["loc"]]
    named = parts[-1:] if unknown else []
    place = [part for part in parts[: len(parts) - len(named)] if part != "str" and "[" not in part] + named
    key = ".".join(place)
    if unknown:
        known = _known_keys(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {'.'.join([*place[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}."
        return f"{key}: there is no such setting; {hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key}: {message[:1].lower()}{message[1:]}, not {error['input']!r}. Correct the value."


def _known_keys(section: list[str]) -> list[str]:
    """The settings of a section, found by walking the classes."""
    current: Any = Config
    for part in section:
        kind = get_type_hints(current).get(part)
        groups = [group for group in (kind, *get_args(kind)) if dataclasses.is_dataclass(group)]
        if not groups:
            return []
        current = groups[0]
    return [field.name for field in dataclasses.fields(current)]
