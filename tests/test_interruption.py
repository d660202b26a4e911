"""Claims about distill/interruption.py: the first signal is noted, a second one ends the process at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

WAITS = """
import sys, time
from distill.interruption import Interruption
interruption = Interruption()
interruption.moment_seconds = float(sys.argv[1])
with interruption.watched():
    print("ready", flush=True)
    while not interruption.requested():
        time.sleep(0.01)
    print(f"noted {interruption.requested()}", flush=True)
    time.sleep(60)  # a step that takes long
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(signum: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS, "0.2"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    assert process.stdout.readline() == f"noted {int(signum)}\n"
    time.sleep(0.3)
    process.send_signal(signum)
    assert process.wait(timeout=30) == -signum


def test_the_same_signal_within_a_moment_is_one() -> None:
    """Batch systems and launchers both send it."""
    process = subprocess.Popen([sys.executable, "-c", WAITS, "30"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted 15\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.wait()
