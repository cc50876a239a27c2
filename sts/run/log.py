"""What a stage says while it runs, on the terminal and never in a notebook, and what its provenance says afterwards."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from importlib.metadata import version
from typing import Any

from sts.engine.work import Work
from sts.errors import ROOT

PACKAGES = ("torch", "transformers", "sae-lens", "peft", "trl", "lm-eval", "math-verify", "reasoning-gym", "scipy",
            "scikit-learn")


class Reporter:
    """One stage's progress: call it with a fraction between 0 and 1. `work` counts what the stage runs.

    A terminal shows one line that is rewritten; a file gets one at start and end and each minute. STS_PROGRESS names
    the terminal or file for a notebook's kernel, whose own output belongs to the page.

    Args:
        shown: whether anyone is told; of several processes at one stage, one does.
    """

    def __init__(self, stage: str, *, shown: bool = True):
        self.stage, self.shown, self.work = stage, shown, Work()
        self.started = self.last = time.monotonic()
        self._say("started")

    def __call__(self, fraction: float) -> None:
        if fraction > 0:
            left = (time.monotonic() - self.started) * (1 - fraction) / fraction
            self._say(f"{fraction:.0%}, {duration(left)} left", every=60)

    def done(self) -> float:
        """Say that the stage is finished; returns its seconds."""
        seconds = time.monotonic() - self.started
        self._say(f"done in {duration(seconds)}", end="\n")
        return seconds

    def _say(self, said: str, *, every: int = 0, end: str = "") -> None:
        """Tell it, to a terminal once a second at most, elsewhere `every` so many seconds."""
        waited, target = time.monotonic() - self.last, os.environ.get("STS_PROGRESS")
        if not self.shown or waited < min(every, 1):
            return
        with suppress(OSError), open(target, "a") if target else nullcontext(sys.__stderr__) as stream:
            if stream and (stream.isatty() or waited >= every):
                self.last = time.monotonic()
                stream.write(f"\r\x1b[K  {self.stage}: {said}{end}" if stream.isatty() else f"  {self.stage}: {said}\n")
                stream.flush()


def terminal() -> str:
    """The path under which a child process finds this one's terminal; the null device without one."""
    return os.ttyname(2) if os.isatty(2) else os.devnull


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min 05 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


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
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
