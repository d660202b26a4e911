"""A benchmark's figures for people: tables, and a plot of accuracy against latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MARKERS = ("o", "s", "^", "D", "v", "P")


def show_benchmark(figures: Mapping[str, Any]) -> None:
    """Sizes, then a table of times for each number of threads."""
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    models: Sequence[Mapping[str, Any]] = figures["models"]
    console.print(
        f"{figures['machine']['cpu']}, {figures['machine']['cores']} cores; {figures['inputs']}", highlight=False
    )
    if any(model["random_weights"] for model in models):
        console.print("Some weights are random: time, memory and bytes are real, answers are not.")
    console.print(_sizes(models, figures["metric"]))
    for threads in dict.fromkeys(entry["threads"] for entry in models[0]["latency"]):
        console.print(_times(models, threads))


def _sizes(models: Sequence[Mapping[str, Any]], metric: str | None) -> Table:
    """The file, the most memory of a process that answers alone, and what the answers are worth."""
    table = _table("sizes", ["MB", "peak MB", *([f"test {metric}"] if metric else [])])
    for model in models:
        cells = [f"{model['bytes'] / 1e6:.1f}", f"{model['peak_bytes'] / 1e6:.0f}"]
        table.add_row(model["name"], *cells, *([f"{model['test'][metric]:.4f}"] if metric else []))
    return table


def _times(models: Sequence[Mapping[str, Any]], threads: int) -> Table:
    """Latency at batch 1; how often the first model's p50 it goes into; throughput at greater batches."""

    def of(model: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
        return [entry for entry in model[kind] if entry["threads"] == threads]

    batches = list(dict.fromkeys(entry["batch"] for entry in of(models[0], "throughput")))
    heads = ["pieces", "p50 ms", "p95 ms", "p99 ms", "x", *(f"rows/s at {batch}" for batch in batches)]
    table = _table(_threads(threads), heads)
    for model in models:
        for slowest, entry in zip(of(models[0], "latency"), of(model, "latency"), strict=True):
            cells = [f"{entry['length']}", *(f"{entry[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms"))]
            cells += [f"{slowest['p50_ms'] / entry['p50_ms']:.1f}"]
            cells += [
                f"{one['rows_per_second']:.0f}" for one in of(model, "throughput") if one["length"] == entry["length"]
            ]
            table.add_row(model["name"], *cells)
    return table


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def plot_benchmark(figures: Mapping[str, Any], file: Path) -> None:
    """The deciding metric on the test rows over p50 latency at batch 1, the fewest threads, the greatest length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    entries = [
        min(model["latency"], key=lambda entry: (entry["threads"], -entry["length"])) for model in figures["models"]
    ]
    for index, (model, entry) in enumerate(zip(figures["models"], entries, strict=True)):
        axes.plot(entry["p50_ms"], model["test"][figures["metric"]], MARKERS[index % len(MARKERS)], label=model["name"])
    axes.set_xscale("log")
    length, threads = entries[0]["length"], entries[0]["threads"]
    axes.set_xlabel(f"milliseconds for one row of {length} pieces, {_threads(threads)} (log scale)")
    axes.set_ylabel(f"test {figures['metric']}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file)
