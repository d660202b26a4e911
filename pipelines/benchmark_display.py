"""A benchmark's figures for people: tables, and a plot of accuracy against latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MARKERS = ("o", "s", "^", "D", "v", "P")


def show_benchmark(figures: Mapping[str, Any]) -> None:
    """One table for each number of threads; x is how often the first model's time at the greatest length it beats."""
    console = Console(soft_wrap=True)
    models: Sequence[Mapping[str, Any]] = figures["models"]
    console.print(f"{figures['machine']['cpu']}, {figures['machine']['cores']} cores; {figures['inputs']}")
    if any(model["random_weights"] for model in models):
        console.print("Some weights are random: time, memory and bytes are real, answers are not.")
    for threads in dict.fromkeys(entry["threads"] for entry in models[0]["latency"]):
        console.print(_table(models, threads, figures["metric"]))


def _table(models: Sequence[Mapping[str, Any]], threads: int, metric: str | None) -> Table:
    def of(model: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
        return [entry for entry in model[kind] if entry["threads"] == threads]

    table = Table(title=f"{threads} thread{'s' if threads > 1 else ''}", title_justify="left")
    table.add_column("model")
    heads = ["MB", "peak MB", *([f"test {metric}"] if metric else [])]
    heads += [f"ms at {entry['length']}: p50 p95 p99" for entry in of(models[0], "latency")]
    heads += ["x"]
    heads += [f"rows/s {entry['batch']}x{entry['length']}" for entry in of(models[0], "throughput")]
    for head in heads:
        table.add_column(head, justify="right")
    slowest = of(models[0], "latency")[-1]["p50_ms"]
    for model in models:
        cells = [f"{model['bytes'] / 1e6:.1f}", f"{model['peak_bytes'] / 1e6:.0f}"]
        cells += [f"{model['test'][metric]:.4f}"] if metric else []
        cells += [
            f"{entry['p50_ms']:.2f} {entry['p95_ms']:.2f} {entry['p99_ms']:.2f}" for entry in of(model, "latency")
        ]
        cells += [f"{slowest / of(model, 'latency')[-1]['p50_ms']:.1f}"]
        cells += [f"{entry['rows_per_second']:.0f}" for entry in of(model, "throughput")]
        table.add_row(model["name"], *cells)
    return table


def plot_benchmark(figures: Mapping[str, Any], file: Path) -> None:
    """The deciding metric on the test rows over p50 latency at batch 1, one thread, the greatest length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    entries = [[entry for entry in model["latency"] if entry["threads"] == 1][-1] for model in figures["models"]]
    for index, (model, entry) in enumerate(zip(figures["models"], entries, strict=True)):
        axes.plot(entry["p50_ms"], model["test"][figures["metric"]], MARKERS[index % len(MARKERS)], label=model["name"])
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds for one row of {entries[0]['length']} pieces, one thread (log scale)")
    axes.set_ylabel(f"test {figures['metric']}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file)
