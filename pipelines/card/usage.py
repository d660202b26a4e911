"""How a student is used, as code that runs: with transformers, and its artefacts with ONNX Runtime.
The words around it are body.py's."""

from __future__ import annotations

import json

from pipelines.card.facts import Facts

PIPELINES = {
    "single_label_classification": "text-classification",
    "multi_label_classification": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
}
"""The hub's name of each task; an encoder alone gives features."""

_CLASSIFY = """\
from transformers import pipeline

ask = pipeline("text-classification", model={model}, truncation=True, max_length={length}{more})
print(ask({text}))
"""
_TOKENS = """\
from transformers import pipeline

ask = pipeline("token-classification", model={model}{more})
print(ask({text}))
"""
_ANSWER = """\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model})
model = AutoModelForQuestionAnswering.from_pretrained({model}).eval()
question, context = "Who spoke?", "The mayor spoke in the evening."
rows = tokenizer(question, context, truncation="only_second", max_length={length}, return_tensors="pt")
with torch.inference_mode():
    output = model(**rows)
first = int(output.start_logits[0].argmax())
last = first + int(output.end_logits[0, first:].argmax())
print(tokenizer.decode(rows["input_ids"][0, first : last + 1]))
"""
_FEATURES = """\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model})
model = AutoModel.from_pretrained({model}).eval()
rows = tokenizer(["One text.", "Another one."], padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.inference_mode():
    print(model(**rows).last_hidden_state.shape)
"""
_ONNX = """\
import onnxruntime
from transformers import AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
rows = tokenizer({text}, padding=True, truncation=True, max_length={length}, return_tensors="np")
print(session.run(None, {{one.name: rows[one.name] for one in session.get_inputs()}}))
"""


def pipeline_tag(facts: Facts) -> str:
    """The hub's name of what the student does."""
    return "feature-extraction" if facts.config.task is None else PIPELINES[facts.config.task.type]


def on_hub(facts: Facts) -> bool:
    """Whether the student has a name there: OWNER/NAME."""
    return "/" in (facts.config.card.name or "")


def transformers_code(facts: Facts) -> str:
    """Loads the student by its name on the hub, or from the folder `student`."""
    model = json.dumps(facts.config.card.name if on_hub(facts) else "student")
    if facts.config.task is None:
        assert facts.config.general is not None
        return _FEATURES.format(model=model, length=facts.config.general.max_length)
    task, length = facts.config.task.type, facts.config.data.max_length
    if task == "question_answering":
        return _ANSWER.format(model=model, length=length)
    if task == "token_classification":
        joined = any(name.startswith("B-") for name in facts.origins["labels"])
        more = ', aggregation_strategy="simple"' if joined else ""
        return _TOKENS.format(model=model, more=more, text='"The mayor spoke in the evening."')
    more = {"multi_label_classification": ", top_k=None", "regression": ', function_to_apply="none"'}.get(task, "")
    pair = '{"text": "The first text.", "text_pair": "The second one."}'
    text = pair if facts.origins["pairs"] else '"The text to judge."'
    return _CLASSIFY.format(model=model, length=length, more=more, text=text)


def onnx_code(facts: Facts) -> str | None:
    """Runs the smallest artefact; None where there is none, or none is published beside a student of the hub."""
    if not facts.artefacts or (on_hub(facts) and not facts.config.card.artefacts):
        return None
    name = min(facts.artefacts, key=lambda name: facts.artefacts[name]["bytes"])
    first, folder = "", f'"artefacts/{name}"'
    if on_hub(facts):
        first = "from huggingface_hub import snapshot_download\n"
        folder = (
            f'snapshot_download("{facts.config.card.name}", allow_patterns="artefacts/{name}/*") + "/artefacts/{name}"'
        )
    text = '"The first text.", "The second one."' if facts.origins["pairs"] else '["The text to judge."]'
    return first + _ONNX.format(folder=folder, text=text, length=facts.config.data.max_length)
