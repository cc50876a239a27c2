"""What a result's provenance says about the machine and the software that computed it."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from sts.run.settings import ROOT

PACKAGES = ("torch", "transformers", "sae-lens", "peft", "trl", "lm-eval", "math-verify", "reasoning-gym", "scipy",
            "scikit-learn")


def peak_memory_mb() -> int:
    """The process's largest resident memory so far; the unit that the system reports differs."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if sys.platform == "darwin" else 1024))


def environment(device: str) -> Mapping[str, Any]:
    """Device, Python, package versions and commit, as provenance records them."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": hardware, "python": platform.python_version(), "versions": versions, "commit": _commit()}


def _commit() -> str:
    """The repository's commit, with "+changes" if the code differs from it; "" outside git."""
    try:
        head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True,
                              text=True, timeout=10)
        changes = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "--", "sts", "runs", "notebooks"],
                                 capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if head.returncode:
        return ""
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
