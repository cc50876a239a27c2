"""Wall-clock time and peak memory of a call, beyond what is resident before it."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """One route on one workload. `tokens` are the real tokens of the workload, the same for each of its routes."""

    workload: str
    route: str
    label: str
    tokens: int
    latents: int
    seconds: list[float] = field(default_factory=list)
    peak_memory_mb: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        speed = self.tokens / statistics.median(self.seconds) if self.seconds else None
        return asdict(self) | {"tokens_per_second": speed}


@dataclass(frozen=True)
class Ratio:
    """A requirement on two routes of one run: the median over repetitions, with the smallest and largest."""

    what: str
    values: list[float]
    bound: str
    required: float

    def to_dict(self) -> dict[str, Any]:
        value = statistics.median(self.values)
        held = value <= self.required if self.bound == "at most" else value >= self.required
        return {"what": self.what, "value": value, "low": min(self.values), "high": max(self.values),
                "bound": self.bound, "required": self.required, "held": held}


def _status(name: str) -> float | None:
    """A line of /proc/self/status in MB; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")), None)


def measured(call: Callable[[], Any], device: str = "cpu") -> tuple[float, float | None, Any]:
    """Run a call once.

    Returns:
        (seconds, peak memory in MB beyond what was in use before, the call's result). On a CPU the memory is the
        process's resident set, None where the system does not tell its peak (anything but Linux); on a GPU it is what
        PyTorch allocated there.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20, result
    before = _reset_peak()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    peak = _status("VmHWM")
    return seconds, peak - before if before is not None and peak is not None else None, result


def _reset_peak() -> float | None:
    """Give freed memory back and start the peak anew; returns the resident memory in MB, None if impossible."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")
