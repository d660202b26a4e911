"""The speed of distillation against the published step written plainly, against TextBrewer, and against the processor.

    python -m benchmarks.speed --json benchmarks/results/speed.json       (make bench)

Teacher: all-MiniLM-L6-v2, 6 layers, 384 wide; student: 3 layers, 312 wide, 12 heads, 1200 inner. Ours is the real loop,
`distill.training.fit`, as the task stage calls it; it is stopped between two of its steps while the others take theirs
(benchmarks/literal.py, benchmarks/textbrewer.py), so that a load that comes or goes weighs on all. A block is some
steps of each; a ratio is the median over blocks of (their seconds an example) / (our seconds an example). Rows are
random pieces of given lengths, or a file's texts (--data). Work:

    intermediate-sst2   lengths of SST-2's training rows; the others pad to 64, as the published script does
    intermediate-128    full sequences of 128 pieces
    intermediate-512    full sequences of 512 pieces; peak memory in processes of their own
    ...-states          the same three with the teacher's states read from disk (runtime.states_cache_gb), its pass over
                        the rows spread over 3 epochs
    logits              3 epochs over 10,000 rows with SST-2's lengths, the whole phase with the teacher's pass; of the
                        others a part, as every step costs them the same
    processes           2 processes of one thread each against 1 of one thread, same batch (intermediate-128)
    lengths             our examples and tokens a second from 32 to 512 pieces and batches of 8 to 64

Keys of the JSON: machine; rows, each work, against, metric, ratio, and the medians behind it. `flops_of_peak` compares
matrix products that the step needs, counted by hand, with the processor's best rate measured in the same run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers.utils import logging

from benchmarks.speed_systems import (
    BATCH_SIZE,
    EPOCHS,
    FULL,
    LOGITS_ROWS,
    LONG,
    SST2_LENGTHS,
    WORKS,
    Ours,
    Work,
    device,
    make_others,
    make_rows,
    static_batches,
)
from distill.activations import Needs, capture
from distill.checkpoint import write_json
from distill.settings import UserError


def compare(work: Work, folder: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Ratios of examples a second, ours / theirs."""
    ours = Ours(work, folder, texts)
    others = make_others(work, ours.rows, batches=4 if work.logits else 1)
    for turn, _ in others.values():
        turn()
    if work.logits:
        steps = EPOCHS * -(-LOGITS_ROWS // work.batch_size)
        paced = ours.train(steps, {name: turn for name, (turn, _) in others.items()}, steps // work.blocks)
        total = paced.before + sum(paced.seconds)
        own = [total / (EPOCHS * LOGITS_ROWS)] * work.blocks
    else:
        # The first block warms up caches and the optimizer's state.
        paced = ours.train(work.block * (work.blocks + 1), {n: turn for n, (turn, _) in others.items()}, work.block)
        once = paced.before / (EPOCHS * len(ours.rows)) if work.states else 0.0
        own = [seconds / work.batch_size + once for seconds in paced.block_seconds()]
    rows = []
    for name, (_, examples) in others.items():
        theirs = [seconds / examples for seconds in paced.turns[name]]
        first = 0 if work.logits else 1
        ratios = [a / b for a, b in zip(theirs[first:], own[first:], strict=False)]
        rows.append(
            {
                "work": work.name,
                "against": name,
                "metric": "examples per second",
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "ours": 1 / statistics.median(own[first:]),
                "theirs": 1 / statistics.median(theirs[first:]),
                "precision": ours.precision,
                "waiting_for_data": sum(paced.waits) / sum(paced.seconds),
            }
        )
    return rows


def alone(work: Work, system: str, steps: int, folder: Path, threads: int | None = None) -> dict[str, float]:
    """One system in this process: median seconds of a step, bytes of memory at most and before training."""
    if threads:
        torch.set_num_threads(threads)
    if system == "ours":
        ours = Ours(work, folder)
        before = _peak_bytes()
        paced = ours.train(steps, {}, 1)
        seconds, rank = paced.seconds, ours.accelerator.process_index
    else:
        turn, _ = make_others(work, make_rows(work.lengths, 4 * work.batch_size, ()), 1)[system]
        before, seconds, rank = _peak_bytes(), [], 0
        for _ in range(steps):
            began = time.perf_counter()
            turn()
            seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:]), "before": before, "peak": _peak_bytes(), "rank": rank}


def _peak_bytes() -> int:
    """Of this process; getrusage would also count the one that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_process(work: Work, system: str, steps: int, processes: int = 1, threads: int | None = None) -> dict[str, float]:
    """`alone` in a process of its own, or in several that train together."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "benchmarks.speed"]
    command += ["--alone", work.name, system, str(steps), str(threads or 0)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} if threads else os.environ
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    return next(line for line in lines if line["rank"] == 0)


def memory(work: Work) -> list[dict[str, Any]]:
    """Peak memory of a process that trains, theirs / ours."""
    found = {system: in_process(work, system, 3) for system in ("ours", "literal", "textbrewer")}
    own = found["ours"]
    return [
        {
            "work": work.name,
            "against": system,
            "metric": "peak memory",
            "ratio": figures["peak"] / own["peak"],
            "ratio_above_models": (figures["peak"] - figures["before"]) / max(1, own["peak"] - own["before"]),
            "ours": own["peak"],
            "theirs": figures["peak"],
        }
        for system, figures in found.items()
        if system != "ours"
    ]


def processes(repeats: int = 3) -> dict[str, Any]:
    """Two processes of one thread against one, the same step shared out; alternating."""
    ratios, times = [], []
    for _ in range(repeats):
        one, two = (in_process(FULL, "ours", 8, count, 1)["seconds"] for count in (1, 2))
        ratios.append(one / two)
        times.append((one, two))
    return {
        "work": "processes",
        "against": "1 process of 1 thread",
        "metric": "examples per second",
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "ours": BATCH_SIZE / statistics.median(two for _, two in times),
        "theirs": BATCH_SIZE / statistics.median(one for one, _ in times),
    }


def peak_flops(dtype: torch.dtype) -> float:
    """The best rate of a matrix product on this device with these threads, floating-point operations a second."""
    place = device()
    best = 0.0
    for rows, inner, columns in ((2048, 384, 1536), (2048, 1536, 384), (2048, 1024, 1024), (4096, 2048, 2048)):
        a = torch.randn(rows, inner, dtype=dtype, device=place)
        b = torch.randn(inner, columns, dtype=dtype, device=place)
        best = max(best, 2 * rows * inner * columns / _median_seconds(lambda a=a, b=b: a @ b, 7))  # type: ignore[misc]
    return best


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def encoder_flops(config: Any, examples: int, length: int) -> float:
    """Matrix products of a forward pass: per piece and layer 4 d^2 + 2 d f multiplications, 2 T d for attention."""
    width, inner = config.hidden_size, config.intermediate_size
    products = 4 * width * width + 2 * width * inner + 2 * length * width
    return 2.0 * config.num_hidden_layers * products * examples * length


def step_flops(student: Any, teacher: Any, examples: int, length: int) -> float:
    """Teacher forward once, student thrice (backward is two); projections of M + 1 states; differences of scores."""
    pieces = examples * length
    projections = 3 * 2.0 * (student.num_hidden_layers + 1) * student.hidden_size * teacher.hidden_size * pieces
    scores = 2.0 * student.num_hidden_layers * length * pieces * (3 * student.hidden_size + teacher.hidden_size)
    forward = encoder_flops(student, examples, length)
    return encoder_flops(teacher, examples, length) + 3 * forward + projections + scores


def limits(folder: Path) -> dict[str, Any]:
    """Our step and the teacher's forward at 128 pieces against the processor's matrix products."""
    peaks = {"bf16": peak_flops(torch.bfloat16), "fp32": peak_flops(torch.float32)}
    ours = Ours(FULL, folder)
    seconds = statistics.median(ours.train(9, {}, 1).seconds[1:])
    student, teacher = ours.student.model.config, ours.teacher.config
    batch = static_batches(ours.rows, FULL.batch_size, 128, 1)[0]
    needs = Needs(hidden=frozenset({0, 2, 4, 6}), attention=frozenset({2, 4, 6}))
    with torch.no_grad():
        forward = _median_seconds(lambda: capture(ours.teacher, batch, needs), 7)
    peak = peaks[ours.precision]
    return {
        "precision": ours.precision,
        "peak_flops": peaks,
        "step_seconds": seconds,
        "step_flops_of_peak": step_flops(student, teacher, FULL.batch_size, 128) / seconds / peak,
        "teacher_seconds": forward,
        "teacher_flops_of_peak": encoder_flops(teacher, FULL.batch_size, 128) / forward / peak,
    }


def lengths(folder: Path) -> list[dict[str, Any]]:
    """Examples and tokens a second by length and batch size."""
    rows = []
    for length, size in [(32, 32), (64, 32), (128, 8), (128, 32), (128, 64), (256, 16), (512, 8)]:
        work = Work(f"length-{length}-{size}", (length,), length, batch_size=size)
        seconds = statistics.median(Ours(work, folder).train(5, {}, 1).seconds[1:])
        rows.append({"length": length, "batch_size": size, "tokens_per_second": length * size / seconds})
    return rows


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "device": str(device()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_texts(file: Path) -> list[str]:
    """Texts of a JSON-lines file, column sentence or text, in its order."""
    if not file.is_file():
        raise UserError(f"--data: {file} does not exist. Name a .jsonl or .jsonl.gz file.")
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [row.get("sentence") or row["text"] for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/speed.json"), help="where figures go")
    parser.add_argument("--data", type=Path, help="JSON lines with sentence or text, in place of random pieces")
    parts = [*WORKS, "memory", "processes", "limits", "lengths"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to measure; others are kept")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
        folder = Path(temporary)
        if options.alone:
            work, system, steps, threads = options.alone
            print(json.dumps(alone(WORKS[work], system, int(steps), folder, int(threads) or None)), flush=True)
            return 0
        try:
            texts = read_texts(options.data) if options.data else []
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        result = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"rows": []}
        result["machine"] = machine() | {"rows_from": options.data.name if options.data else "SST-2's lengths"}
        for part in options.only:
            began = time.monotonic()
            if part in WORKS:
                own = texts if WORKS[part].lengths is SST2_LENGTHS else ()
                found = compare(WORKS[part], folder / part, own)
            elif part == "memory":
                found = memory(LONG)
            elif part == "processes":
                found = [processes()]
            else:
                result[part] = (limits if part == "limits" else lengths)(folder / part)
                found = []
            keys = {(row["work"], row["metric"]) for row in found}
            result["rows"] = [row for row in result["rows"] if (row["work"], row["metric"]) not in keys] + found
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.json, result)
            for row in found:
                print(
                    f"{row['work']:20} {row['metric']:20} against {row['against']:34} {row['ratio']:6.1f}x", flush=True
                )
            print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if "limits" in result:
        print(json.dumps(result["limits"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
