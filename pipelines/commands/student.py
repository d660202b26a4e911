"""Commands on a finished run's student: export it, describe it, measure it, serve it, pack it.
Each is done in a file of pipelines/ or distill/ of its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import Overrides, RunArgument, load, require_student, settle, split_names, split_numbers
from pipelines.commands.distil import run_config


def export(
    folder: RunArgument,
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Formats beside the safetensors, comma-separated: onnx, int8, openvino. Without it what export.to of "
            "the run's config says."
        ),
    ] = None,
) -> None:
    """Write a run's student folder again and check it; with --to also ONNX and int8, in RUN/artefacts.

    Each artefact is read back and run over the validation split: float32 ONNX must agree with the student in every
    logit to 1e-4 and in every prediction; int8 is tried dynamically and statically, and the fastest way that loses at
    most export.max_int8_loss_points of the deciding figure is kept. Where one fails, none is written.

    Example: tinybert export runs/bbc_news --to onnx,int8,openvino
    """
    require_student(folder)
    asked = [] if to is None else [f"export.to={json.dumps(_formats(to))}"]
    run_config(folder / "config.yaml", [*(overrides or []), *asked], str(folder), ["export"], ["export"], False)


def card(
    folder: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[card.KEY=VALUE]...", help="name, license, language, kept in the run's config.yaml."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="[OWNER/]NAME", help="Put student and card on the hub, in one commit.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    artefacts: Annotated[
        bool | None, typer.Option(help="Push RUN/artefacts too; without it what card.artefacts says.")
    ] = None,
) -> None:
    """Write the model card of a run, RUN/student/README.md, with what is known now; with --push publish the student.

    Every run ends with it. A push needs a token with the right to write: `hf auth login`, or HF_TOKEN.

    Examples: tinybert card runs/bbc_news card.license=apache-2.0

    tinybert card runs/bbc_news --push me/bbc-tinybert --private --artefacts
    """
    require_student(folder)
    settle()
    from pipelines.card.command import make_card

    print(make_card(folder, overrides or [], push, private, artefacts))


def benchmark(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run folder; the figures go into RUN/benchmark.json.")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Instead of a run: checkpoints, or shapes with random weights, comma-separated: a folder, a hub name, "
            "bert-base, tinybert-4l-312, or LAYERSxWIDTHxINNERxHEADS."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of benchmark.json where --models are compared.")] = Path(
        "benchmark"
    ),
    lengths: Annotated[str, typer.Option(help="Word pieces of a row, comma-separated.")] = "16,64,128",
    batches: Annotated[str, typer.Option(help="Batches whose throughput is measured; empty for none.")] = "8,32",
    threads: Annotated[str, typer.Option(help="Threads of a forward, comma-separated numbers, or all.")] = "1,all",
    seconds: Annotated[
        float, typer.Option(min=0.01, help="For each model, shape of batch and number of threads.")
    ] = 5.0,
) -> None:
    """Measure latency, throughput, memory and bytes of a run's teacher and student, in every format there is.

    Each model works in a process of its own, in turn with the others, so that the machine's noise falls on all alike.
    A plot of accuracy against latency goes beside the figures of a run, RUN/benchmark.png.

    Examples: tinybert benchmark runs/bbc_news

    tinybert benchmark --models bert-base,tinybert-4l-312 --lengths 128 --batches "" --threads 1
    """
    from distill.export.options import PACKAGES, require_packages
    from distill.settings import UserError

    if (folder is None) == (models is None):
        raise UserError("benchmark: give a run folder, or --models.")
    require_packages("benchmark", [*PACKAGES, "matplotlib"])
    settle()

    from distill.export.timing import all_threads
    from pipelines import benchmark_display
    from pipelines.benchmark import Effort, benchmark_models, benchmark_run

    effort = Effort(
        split_numbers("--lengths", lengths),
        split_numbers("--batches", batches),
        tuple(dict.fromkeys(split_numbers("--threads", threads.replace("all", str(all_threads()))))),
        seconds,
    )
    if not effort.lengths or not effort.threads:
        raise UserError("benchmark: --lengths and --threads need a number each.")
    if folder is None:
        benchmark_display.show_benchmark(benchmark_models(split_names(models), effort, output))
        print(f"figures: {output / 'benchmark.json'}")
        return

    from pipelines.card import write_card
    from pipelines.run import close_run, open_run

    require_student(folder)
    run = open_run(load(folder / "config.yaml", [], str(folder)))
    figures = benchmark_run(run, effort)
    write_card(run.config, folder)
    benchmark_display.show_benchmark(figures)
    benchmark_display.plot_benchmark(figures, folder / "benchmark.png")
    print(f"figures: {folder / 'benchmark.json'}, plot: {folder / 'benchmark.png'}")
    close_run(run)


def report(
    folder: RunArgument,
    output: Annotated[Path | None, typer.Option(help="The HTML file; RUN/report.html where not given.")] = None,
    sentence: Annotated[
        list[str] | None,
        typer.Option(help="Show the attention on this text instead of on test rows. May be repeated."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What an hour of the machine costs; adds a column of costs.")
    ] = None,
) -> None:
    """Write one HTML file about a finished run, which opens without a network.

    Teacher, student and undistilled student; where they err, how far their probabilities can be trusted, the test rows
    on which they disagree, attention side by side, losses, recipe, time and cost. Predictions and attention are
    computed anew from the saved models.

    Example: tinybert report runs/bbc_news --price-per-hour 0.34
    """
    from distill.export.options import require_packages

    require_student(folder)
    file = _report_file(folder, output)
    require_packages("report", ["matplotlib"])
    config = load(folder / "config.yaml", [], str(folder))

    from pipelines.report import Wishes, write_report
    from pipelines.run import close_run, open_run

    run = open_run(config)
    write_report(run, Wishes(sentence or [], price_per_hour), file)
    print(f"report: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    close_run(run)


def serve(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder whose student was exported, or an artefact's folder.")
    ],
    artefact: Annotated[
        str | None, typer.Option(help="Which of RUN/artefacts: int8 or onnx; int8 where both are there.")
    ] = None,
    with_teacher: Annotated[
        bool, typer.Option("--with-teacher", help="Serve the run's teacher too, and show it on the page.")
    ] = False,
    host: Annotated[str, typer.Option(help="127.0.0.1: this machine alone; 0.0.0.0 or ::: whoever reaches it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Port to listen on.")] = 8080,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one forward.")] = 1,
    max_batch_rows: Annotated[int, typer.Option(min=1, help="Most rows of a batch; 1 turns batching off.")] = 32,
    batch_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long a batch waits for more rows while requests come faster than that.")
    ] = 2.0,
    max_rows: Annotated[int, typer.Option(min=1, help="Most rows of a request.")] = 64,
    max_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 1_000_000,
    max_characters: Annotated[int, typer.Option(min=1, help="Most characters of a text.")] = 20_000,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most requests under way; more get 503.")] = 512,
    timeout_seconds: Annotated[float, typer.Option(min=0.001, help="A request that waited longer gets 504.")] = 30.0,
    drain_seconds: Annotated[
        int, typer.Option(min=1, help="After SIGTERM, how long accepted requests have to be answered.")
    ] = 25,
) -> None:
    """Serve a run's exported student on ONNX Runtime: Open Inference Protocol v2, SageMaker's routes, and a page.

    GET / is a page to type a sentence; POST /v2/models/student/infer and POST /invocations answer programs; GET
    /v2/health/ready and /ping say whether it is up, /metrics counts for Prometheus. Rows of several requests are
    answered in one batch. On SIGTERM what was accepted is answered, then it exits with 143.

    Examples: tinybert serve runs/bbc_news --with-teacher

    curl -H 'content-type: application/json' -d '{"inputs": "shares fell"}' http://127.0.0.1:8080/invocations
    """
    from distill.export.options import require_packages
    from distill.settings import UserError

    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder. Give the folder a run was written to.")
    require_packages("serve", ["litserve", "onnxruntime", "prometheus_client"], "serve")

    from distill.serving.artefact import find_artefact, student_model
    from distill.serving.options import ServingOptions
    from distill.serving.server import serve as serve_models

    options = ServingOptions(
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        max_batch_rows=max_batch_rows,
        batch_wait_ms=batch_wait_ms,
        max_rows=max_rows,
        max_bytes=max_bytes,
        max_characters=max_characters,
        max_waiting=max_waiting,
        timeout_seconds=timeout_seconds,
        drain_seconds=drain_seconds,
    )
    models = [student_model(find_artefact(folder, artefact), threads)]
    if with_teacher:
        settle()
        from pipelines.serve import teacher_model

        require_student(folder)
        models.append(teacher_model(folder, models[0].served, threads))
    serve_models(models, options)


def package(
    folder: RunArgument,
    target: Annotated[str, typer.Option("--for", metavar="TARGET", help="sagemaker or kubernetes.")],
    output: Annotated[Path, typer.Option(help="A folder that is not there yet, or is empty.")],
    artefact: Annotated[
        str | None, typer.Option(help="Which of RUN/artefacts answers: int8 or onnx; int8 where both are there.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:TAG",
            help="kubernetes: the image's name, registry included; without it tinybert-student:HASH.",
        ),
    ] = None,
) -> None:
    """Pack a run's exported student for where it is to answer.

    sagemaker: OUTPUT/model.tar.gz for the Hugging Face inference containers: the student for transformers, the ONNX
    artefact that answers, and code/inference.py.

    kubernetes: OUTPUT is the context of `docker build` (Dockerfile, pinned packages, the server, the artefact), and
    OUTPUT/manifests has deployment, service, autoscaler and disruption budget.

    Nothing is built, uploaded or started; docs/deployment.md has the commands that do.

    Examples: tinybert package runs/bbc_news --for sagemaker --output packages/sagemaker

    tinybert package runs/bbc_news --for kubernetes --output packages/kubernetes --image registry.example.com/bbc-news:1
    """
    from distill.export.options import require_packages

    require_packages("package", ["litserve", "onnxruntime", "prometheus_client"], "serve")
    require_student(folder)
    from pipelines.package import make_package

    make_package(folder, target, output, artefact, image)
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{file} ({file.stat().st_size:,} bytes)")


def _formats(text: str) -> list[str]:
    from distill.export.options import FORMATS
    from distill.settings import UserError

    names = list(dict.fromkeys(split_names(text)))
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--to: {name!r} is no format; the formats are {', '.join(FORMATS)}.")
    return names


def _report_file(folder: Path, output: Path | None) -> Path:
    from distill.settings import UserError

    file = folder / "report.html" if output is None else output
    if file.suffix not in (".html", ".htm"):
        raise UserError(f"--output: {file} is no name of an HTML file. Give one that ends in .html.")
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--output: {file} cannot be written: its folder must exist, and it must not be a folder.")
    return file
