"""The processes of one `accelerate launch`: how many there are, which is the main one, and waiting for each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def count() -> int:
    """How many processes were launched together; 1 for a program started by itself."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def join(*, cpu: bool) -> PartialState | None:
    """Meet the other processes, each on a GPU of its own unless `cpu`; None for a program started by itself.

    Called before a model is loaded, as "cuda" then means the process's own GPU.
    """
    if count() == 1:
        return None
    from accelerate import PartialState

    # Writing a large model's weights takes longer than the usual limit on waiting. A process that fails ends them all.
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def leave() -> None:
    """Close the connections to the other processes, if there are any."""
    if count() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
