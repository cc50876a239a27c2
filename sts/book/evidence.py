"""What a run has to say on each claim: functions of an open run, named by the records in book/claims.yaml."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sts.book.claims import NOT_DONE, Claim, Evidence
from sts.errors import StsError

if TYPE_CHECKING:
    from sts.run.run import OpenRun

EVIDENCE: dict[str, Callable[..., Evidence]] = {}


def is_stored(run: OpenRun, stage: str) -> bool:
    """Whether the stage's result is there; nothing is computed."""
    try:
        return run.stored(stage)
    except StsError:  # neither recorded nor the model and the data at hand
        return False


def weigh(run: OpenRun, claim: Claim) -> tuple[Evidence | None, str, str]:
    """The evidence on a claim, the verdict, and why there is none."""
    try:
        found = EVIDENCE[claim.evidence](run, **claim.arguments)
    except StsError as error:
        return None, NOT_DONE, str(error)
    return found, claim.judge(found), found.unable
