"""What a stage says while it runs, on the terminal and never in a notebook, and what its provenance says afterwards."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from sts.engine.work import Work
from sts.errors import ROOT

PACKAGES = ("torch", "transformers", "sae-lens", "peft", "trl", "lm-eval", "math-verify", "reasoning-gym", "scipy",
            "scikit-learn")


class Reporter:
    """One stage's progress: call it with a fraction between 0 and 1; `work` counts what it runs. A terminal shows one
    line that is rewritten, a file gets one a minute and one at the end; nobody is told unless `shown`."""

    def __init__(self, stage: str, *, shown: bool = True):
        self.stage, self.work, self.started, self.stream = stage, Work(), time.monotonic(), -1
        with suppress(OSError):  # a notebook's kernel gives the stream that it was started with, not the page's
            self.stream = sys.stderr.fileno() if shown else -1
        self.terminal, self.told = os.isatty(self.stream), self.started
        if self.terminal:
            self._tell("started")

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if fraction > 0 and now - self.told > (1 if self.terminal else 60):
            left = (now - self.started) * (1 - fraction) / fraction
            self._tell(f"{fraction:.0%}, {timedelta(seconds=round(left))} left")

    def done(self) -> float:
        """Say that the stage is finished, and what was noted; returns its seconds."""
        seconds = time.monotonic() - self.started
        self._tell("; ".join([f"done in {seconds:.1f} s", *self.work.notes]), "\n")
        return seconds

    def _tell(self, said: str, end: str = "") -> None:
        self.told = time.monotonic()
        start, end = ("\r\x1b[K", end) if self.terminal else ("", "\n")
        with suppress(OSError):
            os.write(self.stream, f"{start}  {self.stage}: {said}{end}".encode())


def environment(device: str) -> dict[str, Any]:
    """Device, Python, package versions, commit and largest memory so far, as provenance records them."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
            "python": platform.python_version(), "versions": {package: version(package) for package in PACKAGES},
            "commit": _commit(), "process_peak_memory_mb": round(peak / 1024**2)}


def _commit() -> str:
    """The repository's commit, with "+changes" if files differ from it; "" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
