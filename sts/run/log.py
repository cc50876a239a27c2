"""What a stage says while it runs, on the terminal and never in a notebook, and what its provenance says afterwards.

Inside a notebook the kernel appends progress to the file named by STS_PROGRESS, and the command that runs the notebook
shows it; elsewhere it goes straight to the terminal.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sts.engine.work import Work
from sts.errors import ROOT

PACKAGES = ("torch", "transformers", "sae-lens", "peft", "trl", "lm-eval", "math-verify", "reasoning-gym", "scipy",
            "scikit-learn")


class Reporter:
    """One stage's progress: call it with a fraction between 0 and 1. `work` counts what the stage runs.

    Args:
        shown: whether anyone is told; of several processes at one stage, one does.
    """

    def __init__(self, stage: str, *, shown: bool = True):
        self.stage, self.shown, self.work = stage, shown, Work()
        self.started, self.last = time.monotonic(), 0.0
        self._send("started", 0.0)

    def __call__(self, fraction: float) -> None:
        if time.monotonic() - self.last >= 1.0:
            self.last = time.monotonic()
            self._send("progress", fraction)

    def done(self) -> float:
        """Say that the stage is finished; returns its seconds."""
        self._send("done", 1.0)
        return time.monotonic() - self.started

    def _send(self, event: str, fraction: float) -> None:
        seconds, said = time.monotonic() - self.started, f"{self.stage}: {event}"
        if event == "done":
            said += f" in {duration(seconds)}"
        elif fraction > 0:
            said = f"{self.stage}: {fraction:.0%}, {duration(seconds * (1 - fraction) / fraction)} left"
        if self.shown and (target := os.environ.get("STS_PROGRESS", "")):
            with open(target, "a", encoding="utf-8") as stream:
                stream.write(json.dumps([event, said]) + "\n")
        elif self.shown:
            show(event, said)


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min 05 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


_shown = {"at": 0.0, "width": 0}


def show(event: str, said: str, stream=None) -> None:
    """Print a report: on a terminal one line that is rewritten, elsewhere one at start and end and each minute."""
    stream = stream or sys.__stderr__
    if stream is None:
        return
    if stream.isatty():
        end = "\n" if event == "done" else ""
        stream.write(f"\r  {said:<{_shown['width']}}{end}")
        _shown["width"] = 0 if end else len(said)
    elif event != "progress" or time.monotonic() - _shown["at"] > 60:
        _shown["at"] = time.monotonic()
        stream.write(f"  {said}\n")
    stream.flush()


class Follower:
    """Shows the reports that another process appends to a file, while the `with` block runs."""

    def __init__(self, path: Path):
        self.path, self.offset, self.finished = Path(path), 0, threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.finished.set()
        self.thread.join()

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self.finished.wait(0.3)
            whole = self.path.read_bytes()[self.offset:].rpartition(b"\n")[0]  # the last line may be half written
            self.offset += len(whole) + bool(whole)
            for text in whole.splitlines():
                show(*json.loads(text))


# --- provenance ---------------------------------------------------------------------------------------------------

def peak_memory_mb() -> int:
    """The process's largest resident memory so far; the unit that the system reports differs."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if sys.platform == "darwin" else 1024))


def environment(device: str) -> dict[str, Any]:
    """Device, Python, package versions and commit, as provenance records them."""
    import torch

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {"device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES}, "commit": commit()}


def commit() -> str:
    """The repository's commit, with "+changes" if the code differs from it; "" outside git."""
    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + "+changes" * bool(
            git("status", "--porcelain", "--", "sts", "runs", "notebooks"))
    except (OSError, subprocess.SubprocessError):
        return ""
