"""One exception for everything a user can put right: its text says what was asked, what is wrong with it and what would
work. The command line prints it as one line without a traceback; anything else that escapes is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

#: The repository's root.
ROOT = Path(__file__).resolve().parent.parent


class StsError(Exception):
    """A request that cannot be met, with the way to mend it."""


def one_of(what: str, asked: object, valid: Iterable[object]) -> StsError:
    """The error for a name that is not in a list: `what` was asked for, these are the valid ones."""
    names = sorted(str(name) for name in valid)
    near = "".join(f" Did you mean {name!r}?" for name in difflib.get_close_matches(str(asked), names, n=1))
    return StsError(f"{what} {asked!r} is not known. Valid: {', '.join(names)}.{near}")


class NotRecorded(StsError):
    """A result that a run which is shown from its records does not have, and that needs model or data."""


class MissingData(StsError):
    """A data set or model that was asked for is neither here nor, if it could be there, on the hub."""
