"""The machine that figures of time were measured on, in words."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil

from distill.export.timing import all_threads


def machine() -> dict[str, Any]:
    """What latency depends on: processor, cores this process may use, memory, system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": all_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
