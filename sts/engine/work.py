"""What a computation ran, counted in units that do not depend on the machine."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Work:
    """What was run, in units that do not depend on the machine.

    Attributes:
        tokens: tokens that went through the layers; a cached token counts once, not once for every question behind it.
        padded_tokens: the same with padding.
        layer_tokens: sum over `padded_tokens` of the decoder layers each went through.
        of_layers: decoder layers of the model.
        notes: lines worth a reader's attention, such as a fallback.
    """

    tokens: int = 0
    padded_tokens: int = 0
    layer_tokens: float = 0
    of_layers: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, tokens: int, padded_tokens: int, layers: float) -> None:
        """Count a pass; training counts its backward pass in `layers` as well."""
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        self.layer_tokens += padded_tokens * layers

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            logging.getLogger("sts").warning(text)

    @property
    def passes(self) -> float:
        """Token-forward-passes: tokens through all decoder layers that would cost as much."""
        return self.layer_tokens / self.of_layers if self.of_layers else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passes": self.passes}
