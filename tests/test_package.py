"""Claims about `tinybert package`: what is packed answers as the student does, with nothing of this checkout, and what
is refused. The oracle of answers is transformers on the run's student."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import kubernetes_validate
import onnxruntime
import pytest
import torch
import yaml
from fastapi import FastAPI
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill import tiny
from distill.config import dump_config, load_config
from distill.export.graph import export_graph
from distill.export.metadata import write_metadata
from distill.serving.answers import Served
from distill.serving.options import ServingOptions
from distill.serving.server import Gateway, Model
from tests.builders import contents, finished_run, run_tinybert

TEXTS = ["rain and wind every morning", "people often talk about the piano", "snow"]


@cache
def exported_run() -> Path:
    """A finished run with a float32 artefact of its student; look at it, or work on a copy."""
    folder = shutil.copytree(finished_run(), Path(mkdtemp(prefix="tinybert-tests-")) / "run")
    config = folder / "config.yaml"
    config.write_text(dump_config(load_config(config, ["tracking=[]"])), encoding="utf-8")
    student, artefact = folder / "student", folder / "artefacts" / "onnx"
    artefact.mkdir(parents=True)
    model = AutoModelForSequenceClassification.from_pretrained(student).eval()
    tokenizer = AutoTokenizer.from_pretrained(student)
    export_graph(model, tokenizer(TEXTS[:2], padding=True, return_tensors="pt"), artefact / "model.onnx")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(student / name, artefact)
    labels = [model.config.id2label[index] for index in range(2)]
    about = {"format": "onnx", "task": "single_label_classification", "labels": labels, "max_length": 32}
    write_metadata(artefact, about)
    return folder


def package(target: str, output: Path, run: Path | None = None) -> Path:
    outcome = run_tinybert("package", run or exported_run(), "--for", target, "--output", output)
    assert outcome.status == 0, outcome.err[-3000:]
    return output


def expected() -> list[tuple[str, float]]:
    """Label and probability of each text, by transformers on the student."""
    student = exported_run() / "student"
    model = AutoModelForSequenceClassification.from_pretrained(student).eval()
    rows = AutoTokenizer.from_pretrained(student)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        probabilities = model(**rows).logits.softmax(-1)
    return [(model.config.id2label[int(row.argmax())], float(row.max())) for row in probabilities]


def run_alone(code: str, folder: Path) -> Any:
    """What `code` prints as JSON, in a process that has of this project only what lies in `folder`, and no torch."""
    begin = (
        f"import sys, json, importlib.abc; sys.path = [p for p in sys.path if p and {str(Path.cwd())!r} != p]\n"
        "class NoTorch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        assert name.split('.')[0] not in ('torch', 'transformers', 'pipelines'), name\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", begin + code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


HANDLER = """
import importlib.util, os
sys.path.insert(0, os.path.abspath("code"))  # as the toolkit does
spec = importlib.util.spec_from_file_location("inference", "code/inference.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import distill
assert distill.__file__ == os.path.abspath("code/distill/__init__.py"), distill.__file__
model = module.model_fn(".")
texts = json.loads(TEXTS)
def answer(body):
    return json.loads(module.output_fn(module.predict_fn(module.input_fn(body, "application/json"), model), "*/*"))
wrong = []
for body, kind in (('{"inputs": 3}', "application/json"), ('{"inputs"', "application/json"), ("rain", "text/csv")):
    try:
        module.predict_fn(module.input_fn(body, kind), model)
    except Exception as error:
        wrong.append(str(error))
one = [answer(json.dumps({"inputs": text})) for text in texts]
print(json.dumps({"one": one, "all": answer(json.dumps({"inputs": texts}).encode()), "wrong": wrong}))
"""


def test_the_sagemaker_handler_answers_as_the_student_does(tmp_path: Path) -> None:
    archive = package("sagemaker", tmp_path / "new" / "sagemaker") / "model.tar.gz"
    with tarfile.open(archive) as opened:
        # Python before 3.11.4 has no filters.
        opened.extractall(tmp_path / "model", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    found = run_alone(HANDLER.replace("TEXTS", repr(json.dumps(TEXTS))), tmp_path / "model")
    assert [len(row) for row in found["one"]] == [1] * len(TEXTS)
    for row, of_all, (label, score) in zip(found["one"], found["all"], expected(), strict=True):
        for said in (row[0], of_all):
            assert said["label"] == label
            assert said["score"] == pytest.approx(score, abs=1e-5)
    assert "inputs must be a text" in found["wrong"][0]
    assert "send application/json" in found["wrong"][2]
    # The root is a student for plain transformers.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    original = AutoModelForSequenceClassification.from_pretrained(exported_run() / "student")
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == len(tiny.tokenizer())


def test_the_archive_is_the_same_bytes_and_names_no_machine(tmp_path: Path) -> None:
    first, second = (package("sagemaker", tmp_path / name) / "model.tar.gz" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        members = archive.getmembers()
        requirements = archive.extractfile("code/requirements.txt").read().decode().splitlines()
    names = [member.name for member in members]
    assert names == sorted(names)
    assert {"config.json", "model.safetensors", "tokenizer.json", "artefacts/onnx/model.onnx"} <= set(names)
    for member in members:
        assert member.isfile()
        assert not member.name.startswith("/")
        assert ".." not in member.name.split("/")
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
    assert f"onnxruntime=={onnxruntime.__version__}" in requirements
    assert all("==" in line for line in requirements if not line.startswith("#"))


# What is refused


def refused(*arguments: str | Path) -> str:
    outcome = run_tinybert("package", *arguments)
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    return outcome.err


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    before = contents(tmp_path)
    assert "is not empty" in refused(exported_run(), "--for", "sagemaker", "--output", tmp_path)
    assert "is no folder" in refused(exported_run(), "--for", "sagemaker", "--output", tmp_path / "mine")
    assert contents(tmp_path) == before


def test_a_run_without_artefacts_is_told_how_to_make_them(tmp_path: Path) -> None:
    message = refused(finished_run(), "--for", "sagemaker", "--output", tmp_path / "out")
    assert f"tinybert export {finished_run()} --to onnx,int8" in message
    assert not (tmp_path / "out").exists()


def test_a_damaged_artefact_is_not_packed(tmp_path: Path) -> None:
    run = shutil.copytree(exported_run(), tmp_path / "run")
    (run / "artefacts" / "onnx" / "model.onnx").write_bytes(b"other")
    message = refused(run, "--for", "sagemaker", "--output", tmp_path / "out")
    assert "SHA-256 differs" in message


def test_an_unknown_target_names_the_known_ones(tmp_path: Path) -> None:
    message = refused(exported_run(), "--for", "lambda", "--output", tmp_path / "out")
    assert "--for: 'lambda' is none of sagemaker, kubernetes" in message


# Kubernetes


@cache
def kubernetes() -> Path:
    return package("kubernetes", Path(mkdtemp(prefix="tinybert-tests-")) / "kubernetes")


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((kubernetes() / "manifests" / f"{name}.yaml").read_text())
    return found


def container() -> dict[str, Any]:
    (only,) = manifest("deployment")["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("release", ["1.27", "1.37"])
@pytest.mark.parametrize("name", ["deployment", "service", "hpa", "pdb"])
def test_a_manifest_is_valid_by_the_published_schema(name: str, release: str) -> None:
    content = manifest(name)
    kubernetes_validate.validate(content, release, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**content, "spec": {**content["spec"], "selektor": 1}}, release, strict=True)


def test_the_manifests_are_about_the_same_pods() -> None:
    deployment, service = manifest("deployment"), manifest("service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    assert manifest("pdb")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    scaled = manifest("hpa")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"], "applying it again would undo what the autoscaler chose"
    assert manifest("hpa")["spec"]["minReplicas"] > manifest("pdb")["spec"]["minAvailable"], "a node can be emptied"
    (port,) = container()["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]


def test_the_probes_ask_routes_of_the_server_on_its_port() -> None:
    app = FastAPI()
    Gateway([Model("student", Served("regression", (), 8), lambda: None, "")], ServingOptions()).add_routes(app)
    routes = {route.path for route in app.routes if "GET" in route.methods}
    (port,) = container()["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container()[probe]["httpGet"]
        assert asked["path"] in routes
        assert asked["port"] == port["name"]
    annotations = manifest("deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in routes
    assert annotations["prometheus.io/port"] == str(port["containerPort"])


def dockerfile() -> list[tuple[str, str]]:
    text = (kubernetes() / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_is_of_two_stages_pinned_and_not_roots() -> None:
    steps = dockerfile()
    bases = [rest.split()[0] for word, rest in steps if word == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in bases)
    last = steps[max(index for index, (word, _) in enumerate(steps) if word == "FROM") :]
    user = dict(last)["USER"].split(":")[0]
    assert int(user) == manifest("deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"] > 0
    assert dict(last)["EXPOSE"] == str(container()["ports"][0]["containerPort"])
    assert not [rest for word, rest in last if word == "RUN"]
    for word, rest in steps:
        if word == "COPY" and not rest.startswith("--from"):
            assert (kubernetes() / rest.split()[0]).exists()
    lines = (kubernetes() / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    names = {line.partition("==")[0] for line in lines}
    assert {"litserve", "fastapi", "uvicorn", "onnxruntime", "tokenizers", "numpy", "pydantic-core"} <= names
    assert not names & {"torch", "transformers", "datasets"}


def test_the_command_is_read_by_the_server_which_drains_before_it_is_killed() -> None:
    command = json.loads(dict(dockerfile())["CMD"])
    assert command[1:4] == ["-m", "distill.serving", "model"]
    flags = dict(zip(command[4::2], command[5::2], strict=True))
    options = ServingOptions(**{name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()})
    assert options.host == "0.0.0.0"
    assert options.port == container()["ports"][0]["containerPort"]
    before = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = manifest("deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > before + options.drain_seconds


def test_the_images_files_answer_as_the_student_does() -> None:
    code = (
        "sys.path.insert(0, '.')\n"
        "import pathlib, distill.serving.__main__\n"
        "from distill.serving.artefact import student_model\n"
        "assert distill.__file__.startswith(str(pathlib.Path.cwd())), distill.__file__\n"
        f"found = student_model(pathlib.Path('model'), 1).make().answer([(text, None) for text in {TEXTS!r}])\n"
        "print(json.dumps([[one['label'], float(one['probabilities'].max())] for one in found]))\n"
    )
    for (label, score), (expected_label, expected_score) in zip(run_alone(code, kubernetes()), expected(), strict=True):
        assert label == expected_label
        assert score == pytest.approx(expected_score, abs=1e-5)


def test_the_image_has_the_name_that_was_given(tmp_path: Path) -> None:
    assert re.fullmatch(r"tinybert-student:[0-9a-f]{12}", container()["image"])
    given = ("--for", "kubernetes", "--output", tmp_path / "out", "--image")
    for name in ("bbc", "bbc:latest", "bbc:1\nx: y"):
        assert "--image" in refused(exported_run(), *given, name)
    assert run_tinybert("package", exported_run(), *given, "registry.example.com:5000/bbc:1").status == 0
    content = yaml.safe_load((tmp_path / "out" / "manifests" / "deployment.yaml").read_text())
    assert content["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example.com:5000/bbc:1"
