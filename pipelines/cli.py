"""The commands. `tinybert run` and scripts/distill.py are the same; what they run is pipeline.py's."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.terminal import printable

REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What a disk answers that takes no more."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Distil a BERT-family teacher into a TinyBERT student that plain transformers loads.",
)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file, for instance configs/bbc_news.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's, for instance seed=1."),
]


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for instance runs/bbc_news.")]


@app.command()
def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Run folder; replaces the config's output.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Run only these, comma-separated: teacher, general, masked_lm, augment, task, evaluate, export."
        ),
    ] = None,
    redo: Annotated[
        list[str] | None, typer.Option(help="Do a finished stage, and what follows from it, again. May be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with its cost and what `doctor` finds; write nothing.")
    ] = False,
) -> None:
    """Run the stages of a distillation: teacher, general, augment, task, evaluate, export.

    Finished stages are skipped while their settings and inputs are unchanged; a stopped stage goes on from its last
    checkpoint. The student lies in OUTPUT/student, the figures in OUTPUT/summary.json.
    """
    _run(config, overrides or [], output, _names(stages), _names(",".join(redo or [])), dry_run)


@app.command()
def augment(
    config: ConfigArgument,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=1, help="How many augmented rows to show.")] = 20,
) -> None:
    """Show augmented training rows beside their sources, the replaced words marked; write nothing."""
    loaded = _load(config, overrides or [], None)

    from pipelines import display
    from pipelines.augment import samples
    from pipelines.run import close_run, open_run

    run = open_run(loaded)
    display.show_samples(samples(run, show))
    close_run(run)


@app.command()
def doctor(
    config: ConfigArgument,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Run folder; replaces the config's output.")] = None,
) -> None:
    """Check teacher, tokenizer, labels, data and losses before a run, each finding with a remedy; write nothing.

    The same as `run --dry-run`. Ends with 2 where a finding is an error.
    """
    _run(config, overrides or [], output, [], [], dry_run=True)


@app.command()
def evaluate(folder: RunArgument) -> None:
    """Evaluate a run's teacher and students again, on its config's test rows."""
    _run(folder / "config.yaml", [], str(folder), ["evaluate"], ["evaluate"], False)


@app.command()
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
    _require_student(folder)
    asked = [] if to is None else [f"export.to={json.dumps(_formats(to))}"]
    _run(folder / "config.yaml", [*(overrides or []), *asked], str(folder), ["export"], ["export"], False)


@app.command()
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
    _require_student(folder)
    _settle()
    from pipelines.card.command import make_card

    print(make_card(folder, overrides or [], push, private, artefacts))


@app.command()
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
    _settle()

    from distill.export.timing import all_threads
    from pipelines import benchmark_display
    from pipelines.benchmark import Effort, benchmark_models, benchmark_run

    effort = Effort(
        _numbers("--lengths", lengths),
        _numbers("--batches", batches),
        tuple(dict.fromkeys(_numbers("--threads", threads.replace("all", str(all_threads()))))),
        seconds,
    )
    if not effort.lengths or not effort.threads:
        raise UserError("benchmark: --lengths and --threads need a number each.")
    if folder is None:
        benchmark_display.show_benchmark(benchmark_models(_names(models), effort, output))
        print(f"figures: {output / 'benchmark.json'}")
        return

    from pipelines.card import write_card
    from pipelines.run import close_run, open_run

    _require_student(folder)
    run = open_run(_load(folder / "config.yaml", [], str(folder)))
    figures = benchmark_run(run, effort)
    write_card(run.config, folder)
    benchmark_display.show_benchmark(figures)
    benchmark_display.plot_benchmark(figures, folder / "benchmark.png")
    print(f"figures: {folder / 'benchmark.json'}, plot: {folder / 'benchmark.png'}")
    close_run(run)


@app.command()
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

    _require_student(folder)
    file = _report_file(folder, output)
    require_packages("report", ["matplotlib"])
    config = _load(folder / "config.yaml", [], str(folder))

    from pipelines.report import Wishes, write_report
    from pipelines.run import close_run, open_run

    run = open_run(config)
    write_report(run, Wishes(sentence or [], price_per_hour), file)
    print(f"report: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    close_run(run)


@app.command()
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
        _settle()
        from pipelines.serve import teacher_model

        _require_student(folder)
        models.append(teacher_model(folder, models[0].served, threads))
    serve_models(models, options)


@app.command()
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
    _require_student(folder)
    from pipelines.package import make_package

    make_package(folder, target, output, artefact, image)
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{file} ({file.stat().st_size:,} bytes)")


def main() -> None:
    """The `tinybert` command."""
    _exit_with(app)


def run_main() -> None:
    """scripts/distill.py: `tinybert run` without its name."""
    from pipelines.launch import start_missing_processes

    start_missing_processes(sys.argv[0], sys.argv[1:])
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command()(run)
    _exit_with(single)


def _exit_with(command: Callable[[], Any]) -> None:
    """0 done, 2 the user's input is wrong, 130 or 143 after a signal, 1 anything else."""
    from distill.interruption import Interrupted
    from distill.settings import RunError, UserError

    first = os.environ.get("LOCAL_RANK", "0") == "0"

    def tell(message: object, here: bool | None = None) -> None:
        if first if here is None else here:
            # A bar that was cut off, this process's or another's, stands on the line.
            print(("\n" if here else "") + printable(str(message)), file=sys.stderr)

    try:
        command()
    except UserError as error:
        tell(f"error: {error}")
        sys.exit(2)
    except Interrupted as stop:
        tell(stop)
        sys.exit(stop.status)
    except RunError as error:
        tell(f"error: {error}", error.told_here)
        sys.exit(1)
    except Exception as error:
        if (refused := _refused_write(error)) is not None:
            from distill.checkpoint import storage_error

            # Whoever was writing may be another process than the first.
            print(f"error: {storage_error(refused.filename or 'a file', refused)}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.exit(1)


def _refused_write(error: BaseException | None) -> OSError | None:
    """The disk's own error behind one that a library raised for it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSED_WRITES:
            return error
        error = error.__cause__ or error.__context__
    return None


def _formats(text: str) -> list[str]:
    from distill.export.options import FORMATS
    from distill.settings import UserError

    names = list(dict.fromkeys(_names(text)))
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--to: {name!r} is no format; the formats are {', '.join(FORMATS)}.")
    return names


def _require_student(folder: Path) -> None:
    """Raises UserError where a folder is no run's, or its student is not finished."""
    from distill.settings import UserError

    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: this is no run folder (no config.yaml in it). Give the folder a run was written to."
        )
    if not any((folder / stage / "result.json").is_file() for stage in ("task", "general")):
        raise UserError(
            f"{folder}: this run has no student yet. Finish it first: tinybert run {folder / 'config.yaml'}"
        )


def _report_file(folder: Path, output: Path | None) -> Path:
    from distill.settings import UserError

    file = folder / "report.html" if output is None else output
    if file.suffix not in (".html", ".htm"):
        raise UserError(f"--output: {file} is no name of an HTML file. Give one that ends in .html.")
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--output: {file} cannot be written: its folder must exist, and it must not be a folder.")
    return file


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    from distill.settings import UserError

    names = _names(text)
    if not all(name.isdecimal() and int(name) for name in names):
        raise UserError(f"{flag}: {text!r} is not a list of positive numbers, such as 16,64,128.")
    return tuple(int(name) for name in names)


def _run(
    path: Path, overrides: list[str], output: str | None, stages: list[str], redo: list[str], dry_run: bool
) -> None:
    config = _load(path, overrides, output)

    from pipelines import display
    from pipelines.doctor import Level, examine
    from pipelines.pipeline import is_run, plan, prepare, run_stages
    from pipelines.run import close_run, open_run
    from pipelines.waiting import waiting

    run = open_run(config)
    findings = []
    patience = waiting("the run", config.runtime.process_timeout_seconds)  # a stage names itself
    with run.session.interruption.watched(), run.lock, patience:
        if not dry_run and is_run(run.folder):
            run.lock.take()  # before it is read what is done there; a new folder is made and locked when all is checked
        due = prepare(run, stages, redo)
        works = plan(run, due)
        if run.is_main:
            display.show_plan(run, due, works)
        if dry_run:
            for finding in examine(run, due):
                findings.append(finding)
                if run.is_main:
                    display.show_finding(finding)
            if run.is_main:
                display.show_verdict(findings)
        else:
            summary = run_stages(run, due)
            if run.is_main:
                display.show_summary(run, summary)
    close_run(run)
    if any(finding.level is Level.ERROR for finding in findings):
        raise typer.Exit(2)


def _load(path: Path, overrides: list[str], output: str | None) -> Any:
    _settle()
    # Imported here, so that --help answers at once.
    from distill.config import load_config

    config = load_config(path, overrides)
    return config if output is None else replace(config, output=output)


def _settle() -> None:
    """Threads and messages of the libraries, before they are used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make a step several times slower when anything else uses a core (GNU OpenMP's
    # default); read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    main()
