"""What `accelerate launch` leaves to its script on a CPU: starting the processes and choosing the threads.
On accelerators nothing here does anything.

`accelerate launch --cpu --num_processes N` (accelerate 1.15) sets a meeting point, then starts one process; it also
sets OMP_NUM_THREADS=1 unasked. Here the one process reads from its parent's command line what was asked for and
becomes torch's launcher for N.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

import psutil


def start_missing_processes(script: str, arguments: Sequence[str]) -> None:
    """Replace this process by a launcher of N where N were asked for and one was started; else return."""
    asked = _asked_for()
    if asked is None or "WORLD_SIZE" in os.environ:
        return
    processes, machines, rank = asked
    if processes <= 1:
        return
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes // machines)]
    if machines == 1:
        launcher += ["--standalone"]
    else:
        launcher += ["--nnodes", str(machines), "--node_rank", str(rank)]
        launcher += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, script, *arguments])


def cpu_threads() -> int:
    """Threads for a CPU process: torch's own choice, or its share of the cores where the launcher set 1 unasked."""
    import torch

    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1":
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _asked_for() -> tuple[int, int, int] | None:
    """(processes, machines, this machine's rank) of an `accelerate launch` on the CPU that started this process."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true" or "MASTER_ADDR" not in os.environ:
        return None
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parent = psutil.Process().parent()
    command = parent.cmdline() if parent is not None else []
    starts = [at for at, word in enumerate(command) if word in ("launch", "accelerate.commands.launch")]
    if not starts:
        return None
    options, _ = launch_command_parser().parse_known_args(command[starts[0] + 1 :])
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        options, _, _ = _validate_launch_command(options)  # lists its defaults, as the launcher already did
    if options.use_fsdp:  # which the launcher tells the processes on accelerators alone
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    return options.num_processes or 1, options.num_machines or 1, options.machine_rank or 0
