"""What a computation ran, counted in units that do not depend on the machine; and the processes of one launch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass
class Work:
    """What was run; a cached token counts once, not once for every question behind it."""

    tokens: int = 0  # that went through the layers
    padded_tokens: int = 0  # the same with padding
    layer_tokens: float = 0  # sum over padded tokens of the decoder layers each went through
    of_layers: int = 0  # decoder layers of the model
    notes: list[str] = field(default_factory=list)  # lines worth a reader's attention, such as a fallback

    def add(self, tokens: int, padded_tokens: int, layers: float) -> None:
        """Count a pass; training counts its backward pass in `layers` as well."""
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        self.layer_tokens += padded_tokens * layers

    def include(self, counted: Mapping[Any, Any]) -> None:
        """Add what another computation counted, as `to_dict` gives it."""
        self.tokens += counted["tokens"]
        self.padded_tokens += counted["padded_tokens"]
        self.layer_tokens += counted["layer_tokens"]
        self.of_layers = counted["of_layers"]
        for text in counted["notes"]:
            self.note(text)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def passes(self) -> float:
        """Token-forward-passes: tokens through all decoder layers that would cost as much."""
        return self.layer_tokens / self.of_layers if self.of_layers else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passes": self.passes}


def count() -> int:
    """How many processes were launched together; 1 for a program started by itself."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def join(*, cpu: bool) -> PartialState | None:
    """Meet the other processes, if any, before a model is loaded: "cuda" then means the process's own GPU."""
    if count() == 1:
        return None
    from accelerate import PartialState

    # Writing a large model's weights takes longer than the usual limit on waiting. A process that fails ends them all.
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def leave() -> None:
    """Close the connections to the other processes, if there are any."""
    from torch import distributed

    if count() > 1 and distributed.is_initialized():
        distributed.destroy_process_group()
