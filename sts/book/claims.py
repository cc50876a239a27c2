"""Claims are records in book/claims.yaml, each judged by a rule: a function whose docstring is the text on the page."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from sts.book.figures import shown
from sts.errors import ROOT

HELD, IN_PART, NOT_HELD, NOT_TESTABLE, NOT_DONE = WORDS = (
    "held", "in part", "not held", "not testable here", "not done yet")
#: What the p of a test, or the share of random sets, may be.
ALPHA = 0.05


@dataclass(frozen=True)
class Evidence:
    """What a run has to say on a claim: a number with its 95% interval and p, as far as it has them, and what a rule
    compares it with."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int | None = None
    of: str = "domains"  # what n counts
    seeds: int | None = 1  # at how many it was measured, if known
    against: Mapping[str, Evidence] = field(default_factory=dict)  # further numbers, by name, in the rule's order
    fair: bool = True  # whether random sets match what they are compared with
    unable: str = ""  # why the claim cannot be tested in this run

    @property
    def above(self) -> bool:
        """The whole interval lies above zero, and p, if there is one, is below 0.05."""
        return self.low is not None and self.low > 0 and (self.p is None or self.p < ALPHA)


def positive(found: Evidence) -> str:
    """Held if the 95% interval of every number lies above zero with p below 0.05; otherwise not held."""
    return HELD if all(one.above for one in (found, *found.against.values())) else NOT_HELD


def difference(found: Evidence) -> str:
    """Held if the 95% interval of every difference lies above zero, with p below 0.05 where there is a p; in part if
    only that of the first does; otherwise not held."""
    return NOT_HELD if not found.above else HELD if all(one.above for one in found.against.values()) else IN_PART


def at_least(found: Evidence, bound: float) -> str:
    """Held if the whole 95% interval, or a number without one, reaches the bound; otherwise not held."""
    lowest = found.value if found.low is None else found.low
    return HELD if lowest is not None and lowest >= bound else NOT_HELD


def apart(found: Evidence) -> str:
    """Held if the 95% interval lies above all that it is compared with, in part if above the first alone; otherwise not
    held."""
    low = -math.inf if found.low is None else found.low
    first, *others = (low > (one.high or one.value or 0) for one in found.against.values())
    return NOT_HELD if not first else HELD if all(others) else IN_PART


def all_above(found: Evidence) -> str:
    """Held if demonstrations name more than each list that needs none, every difference with its whole 95% interval
    above zero; in part if not, but more than random lists share among the latents that change at all, with p below
    0.05; otherwise not held."""
    partly = IN_PART if found.p is not None and found.p < ALPHA else NOT_HELD
    return HELD if all(one.above for one in found.against.values()) else partly


def rarer_than(found: Evidence) -> str:
    """Held if the number is above zero and at most 5% of random sets of each kind reach it; otherwise not held. Not
    testable unless these match the chosen latents' firing rate and energy to a tenth and differ from one another."""
    rare = all(one.p is not None and one.p <= ALPHA for one in found.against.values())
    return HELD if rare and (found.value or 0) > 0 else NOT_HELD


def no_more_than_chance(found: Evidence) -> str:
    """Held if more than 5% of shuffled targets reach each number; otherwise not held. Few domains say little here."""
    return HELD if all(one.p is not None and one.p > ALPHA for one in (found, *found.against.values())) else NOT_HELD


def specific(found: Evidence) -> str:
    """Held if the mean rank correlation within domains has its 95% interval above zero, with p below 0.05 when whole
    training sets are shuffled, which takes four of them; otherwise not held."""
    return HELD if found.above and all(
        one.p is not None and one.p < ALPHA for one in found.against.values()) else NOT_HELD


def own_list(found: Evidence) -> str:
    """Held if lists share more with their own training set's change than with the others', and by more than lists by
    firing rate do, each with p below 0.05 over orders of the sets; otherwise not held."""
    leads = (found, *found.against.values())
    return HELD if all((one.value or 0) > 0 and one.p is not None and one.p < ALPHA for one in leads) else NOT_HELD


RULES: dict[str, Callable[..., str]] = {rule.__name__: rule for rule in (
    positive, difference, at_least, apart, all_above, rarer_than, no_more_than_chance, specific, own_list)}


@dataclass(frozen=True)
class Claim:
    """A record of book/claims.yaml: see the head of that file."""

    id: str
    chapter: str
    says: str
    evidence: str
    rule: str
    result: str = ""
    paper: str = ""
    label: str = ""
    note: str = ""
    form: str = ".2f"
    bound: float | None = None
    learned: str = "own"
    run: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def judge(self, found: Evidence, unable: str = "") -> str:
        """The verdict on evidence, one of `WORDS`."""
        if unable or found.unable or found.value is None:
            return NOT_TESTABLE
        return RULES[self.rule](found, *(() if self.bound is None else (self.bound,)))

    @property
    def rule_text(self) -> str:
        """The rule as its docstring says it, with the bound."""
        bound = "" if self.bound is None else f"The bound is {self.bound:{self.form}}."
        return " ".join(f"{RULES[self.rule].__doc__} {bound} {self.note}".split())

    def number(self, one: Evidence) -> str:
        """A number with its interval, as text."""
        value, *ends = (shown(f"{{end:{self.form}}}", end=end) for end in (one.value, one.low, one.high))
        return f"{value} ({ends[0]} to {ends[1]})" if all(ends) else value


@functools.cache
def read_claims() -> tuple[dict[str, dict[str, str]], dict[str, Claim]]:
    """The paper's results by name (name, says, paper, chapter), and all claims by id."""
    content = yaml.safe_load((ROOT / "book" / "claims.yaml").read_text(encoding="utf-8"))
    claims = [Claim(arguments=row.pop("with", {}), **row) for row in content["claims"]]
    return {row["name"]: row for row in content["results"]}, {claim.id: claim for claim in claims}


def together(words: Sequence[str]) -> str:
    """The verdict on a result from those of its claims: held if all are, in part if some are; a gap if none was."""
    tested = {*words} & {HELD, IN_PART, NOT_HELD}
    if not tested:
        return NOT_DONE if NOT_DONE in words or not words else NOT_TESTABLE
    return NOT_HELD if tested == {NOT_HELD} else HELD if {*words} == {HELD} else IN_PART
