"""What is made of benchmarks/results/quality.json: the section of docs/results.md between its markers, and the plot.
Measuring is left to quality.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_systems import SYSTEMS, budget_of, fits
from benchmarks.quality_tasks import SIZES, TASKS
from distill.checkpoint import write_text
from distill.settings import UserError

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- quality: from here on written by benchmarks.quality --report -->", "<!-- quality: to here -->"
TEACHER = "teacher"
OURS, RIVALS = "default", ("undistilled", "textbrewer", "textbrewer-cut", "paper", "reference")

Row = dict[str, Any]


def write_report(results: Path, rows: Sequence[Row], *, write: bool) -> None:
    """Print the tables; with `write` put them and the plot into docs/.

    Raises:
        UserError: nothing was measured yet; docs/results.md has lost its markers.
    """
    if not rows:
        raise UserError(f"--output: {results} holds no runs yet. Give --data, and measure some.")
    text = "\n".join(section(rows))
    print(text)
    if not write:
        return
    page = DOCS / "results.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page}: the lines {BEGIN!r} and {END!r} are not both there. Put them where the tables go.")
    picture = ""
    if students := [row for row in rows if row["system"] != TEACHER and row["retention"] is not None]:
        plot(students, DOCS / "quality.svg")
        picture = "![What students keep, against their parameters and the minutes of training](quality.svg)\n\n"
    write_text(page, f"{before}{BEGIN}\n\n{text}\n{picture}{END}{after}")


def section(rows: Sequence[Row]) -> list[str]:
    """Tables of figures and retention, each with what is missing in it, as Markdown lines."""
    lines: list[str] = []
    for title, own, whole in _tables(rows):
        tasks = [name for name in TASKS if any(row["task"] == name for row in own)]
        kinds = [(TEACHER, TEACHER), *((system, size) for size in SIZES for system in SYSTEMS)]
        kinds = [kind for kind in kinds if any((row["system"], row["student"]) == kind for row in own)]
        lines += [
            *([title, ""] if title else []),
            "| student | parameters | " + " | ".join(f"{task} ({_metric(own, task)})" for task in tasks) + " | kept |",
            "|---|---|" + "---|" * (len(tasks) + 1),
        ]
        for system, size in kinds:
            cells = {row["task"]: row for row in own if (row["system"], row["student"]) == (system, size)}
            parameters = statistics.fmean(row["parameters"] for row in cells.values()) / 1e6
            name = TEACHER if system == TEACHER else f"{size}, {system}"
            figures = " | ".join(_figure(cells.get(task)) for task in tasks)
            lines.append(f"| {name} | {parameters:.2f} M | {figures} | {_kept(list(cells.values()), system)} |")
        verdicts = [text for size in SIZES for other in RIVALS if (text := _verdict(own, size, other))]
        missing = [*(_missing(own, kinds) if whole else []), *_old(own)]
        lines += ["", *verdicts, *([""] if verdicts else []), *missing, *([""] if missing else [])]
    return lines


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[Row], bool]]:
    """Title and rows of a table, and whether what it lacks is to be told: one for each budget of the comparison, one
    for the systems with budgets of their own, then one for each other budget that these were run with."""
    teachers = [row for row in rows if row["system"] == TEACHER]
    students = [row for row in rows if row["system"] != TEACHER]
    if not students:
        return [("", teachers, True)]
    compared = [row for row in students if not _own_budget(row["system"])]
    meant = [row for row in students if row["budget_seconds"] == budget_of(row["system"], TASKS[row["task"]])]
    others = [row for row in students if row not in compared and row not in meant]
    tables = [(title, [*teachers, *own], True) for title, own in _by_budget(compared)]
    if meant:
        tables.append((_own_title(meant), [*teachers, *meant], True))
    for title, own in _by_budget(others):
        tasks = {row["task"] for row in own}
        tables.append((title, [*(row for row in teachers if row["task"] in tasks), *own], False))
    return tables


def _by_budget(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Title and rows, for each budget."""
    return [
        (
            f"Training of {budget:g} seconds each, on one thread:",
            [row for row in rows if row["budget_seconds"] == budget],
        )
        for budget in sorted({row["budget_seconds"] for row in rows})
    ]


def _own_title(rows: Sequence[Row]) -> str:
    tasks: dict[float, list[str]] = {}
    for name in TASKS:
        for budget in {row["budget_seconds"] for row in rows if row["task"] == name}:
            tasks.setdefault(budget, []).append(name)
    told = "; ".join(f"{budget:g} seconds each on {', '.join(names)}" for budget, names in sorted(tasks.items()))
    return f"Training for longer, {told}, on one thread:"


def _own_budget(system: str) -> bool:
    return any(budget_of(system, task) for task in TASKS.values())


def _verdict(rows: Sequence[Row], size: str, other: str) -> str:
    """On how many tasks `default` is ahead of another system; empty where they share none."""
    by_key = {(row["system"], row["task"]): row for row in rows if row["student"] == size}
    pairs = [
        (by_key[OURS, task], by_key[other, task]) for task in TASKS if {(OURS, task), (other, task)} <= by_key.keys()
    ]
    if not pairs:
        return ""
    ahead = [(ours, theirs) for ours, theirs in pairs if ours["mean"] > theirs["mean"]]
    text = f"- {size}: `{OURS}` is ahead of `{other}` on {len(ahead)} of {len(pairs)} tasks"
    spread = [(ours, theirs) for ours, theirs in pairs if None not in (ours["deviation"], theirs["deviation"])]
    clear = [
        ours["task"]
        for ours, theirs in spread
        if ours["mean"] - theirs["mean"] > 2 * max(ours["deviation"], theirs["deviation"])
    ]
    if spread:
        text += f", by more than two standard deviations (the larger of the two) on {len(clear)} of {len(spread)}"
    return text + "."


def _metric(rows: Sequence[Row], task: str) -> str:
    return next(row["metric"] for row in rows if row["task"] == task)


def _figure(row: Row | None) -> str:
    if row is None:
        return "not run"
    if row["deviation"] is None:
        return f"{row['mean']:.4f}" if row["system"] == TEACHER else f"{row['mean']:.4f} (1 seed)"
    return f"{row['mean']:.4f} ± {row['deviation']:.4f} ({row['seeds']} seeds)"


def _kept(rows: Sequence[Row], system: str) -> str:
    """Mean retention over the tasks measured."""
    known = [row["retention"] for row in rows if row["retention"] is not None]
    if system == TEACHER or not known:
        return ""
    return f"{statistics.fmean(known):.1%} of {len(known)} tasks"


def _missing(rows: Sequence[Row], kinds: Sequence[tuple[str, str]]) -> list[str]:
    """What of the grid such a table is about was not run, in words."""
    lines = []
    absent = [name for name in TASKS if not any(row["task"] == name for row in rows)]
    if absent:
        lines.append(f"Tasks of which nothing was run: {', '.join(absent)}.")
    longer = {_own_budget(row["system"]) for row in rows if row["system"] != TEACHER}
    unseen = [
        f"{size} {system}"
        for size in SIZES
        for system in SYSTEMS
        if (system, size) not in kinds and fits(system, size) and _own_budget(system) in longer
    ]
    if unseen:
        lines.append(f"Systems of which nothing was run: {', '.join(unseen)}.")
    return lines


def _old(rows: Sequence[Row]) -> list[str]:
    old = [f"{row['student']} {row['system']} on {row['task']}" for row in rows if row["old_recipe"]]
    return [f"Of a recipe that the system no longer has: {', '.join(old)}."] if old else []


def plot(rows: Sequence[Row], file: Path) -> None:
    """Retention against parameters and against minutes of training, a point for each row, which are of students."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "quality"  # the same figures give the same file
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for number, system in enumerate(SYSTEMS):
        for size, marker in zip(SIZES, "os", strict=True):
            points = [row for row in rows if (row["system"], row["student"]) == (system, size)]
            label = f"{size}, {system}" if points else None
            for axis, xs in (
                (axes[0], [row["parameters"] / 1e6 for row in points]),
                (axes[1], [row["seconds"] / 60 for row in points]),
            ):
                kept = [100 * row["retention"] for row in points]
                axis.scatter(xs, kept, marker=marker, color=f"C{number}", label=label, alpha=0.8)
    axes[0].set(xlabel="parameters (millions)", ylabel="% of the teacher's metric")
    axes[1].set(xlabel="minutes of training")
    for axis in axes:
        axis.axhline(100, color="grey", linewidth=0.8)
    axes[1].legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
