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

from sts.errors import ROOT

PACKAGES = ("torch", "transformers", "sae-lens", "peft", "trl", "lm-eval", "math-verify", "reasoning-gym", "scipy",
            "scikit-learn")


class Reporter:
    """One stage's progress: call it with a fraction between 0 and 1. `work` counts what the stage runs.

    Args:
        shown: whether anyone is told; of several processes at one stage, one does.
    """

    def __init__(self, stage: str, *, shown: bool = True):
        from sts.engine.work import Work

        self.stage, self.shown, self.work = stage, shown, Work()
        self.started, self.last = time.monotonic(), 0.0
        self._send("start", 0.0)

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self.last >= 1.0:
            self.last = now
            self._send("progress", fraction)

    def done(self) -> float:
        """Say that the stage is finished; returns its seconds."""
        self._send("done", 1.0)
        return time.monotonic() - self.started

    def _send(self, event: str, fraction: float) -> None:
        if not self.shown:
            return
        report = {"event": event, "stage": self.stage, "fraction": fraction, "seconds": time.monotonic() - self.started}
        if target := os.environ.get("STS_PROGRESS", ""):
            with open(target, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(report) + "\n")
        else:
            show(report)


def line(report: dict) -> str:
    """One report as a line of text, with the time left."""
    seconds, fraction = report["seconds"], report["fraction"]
    if report["event"] == "done":
        return f"{report['stage']}: done in {duration(seconds)}"
    if fraction <= 0:
        return f"{report['stage']}: started"
    return f"{report['stage']}: {fraction:.0%}, {duration(seconds * (1 - fraction) / fraction)} left"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


_shown = {"at": 0.0, "width": 0}


def show(report: dict, stream=None) -> None:
    """Print a report: on a terminal one line that is rewritten, elsewhere one at start and end and each minute."""
    stream = stream or sys.__stderr__
    if stream is None:
        return
    text = line(report)
    if stream.isatty():
        end = "\n" if report["event"] == "done" else ""
        stream.write(f"\r  {text}{' ' * max(0, _shown['width'] - len(text))}{end}")
        _shown["width"] = 0 if end else len(text)
    elif report["event"] != "progress" or time.monotonic() - _shown["at"] > 60:
        _shown["at"] = time.monotonic()
        stream.write(f"  {text}\n")
    stream.flush()


class Follower:
    """Shows the reports that another process appends to a file, while the `with` block runs."""

    def __init__(self, path: Path):
        self.path, self.offset = Path(path), 0
        self.finished = threading.Event()
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
        while True:
            ended = self.finished.wait(0.3)
            with open(self.path, encoding="utf-8") as stream:
                stream.seek(self.offset)
                for text in stream:
                    if not text.endswith("\n"):
                        break
                    self.offset += len(text.encode())
                    show(json.loads(text))
            if ended:
                return


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

    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": hardware, "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES}, "commit": commit()}


def commit() -> str:
    """The repository's commit, with "+changes" if the code differs from it; "" outside git."""
    def git(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=10)

    try:
        head, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", "sts", "runs",
                                                                   "notebooks")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if head.returncode == 0 else ""
