"""Claims are records in book/claims.yaml; the rules by which they are judged are functions whose docstrings the pages show.

The rules were made harder after first results were seen, never easier: an overlap beyond chance, or more than random
latents alone, was once enough.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from sts.errors import ROOT, StsError, one_of

HELD, IN_PART, NOT_HELD = "held", "in part", "not held"
NOT_TESTABLE, NOT_DONE = "not testable here", "not done yet"
WORDS = (HELD, IN_PART, NOT_HELD, NOT_TESTABLE, NOT_DONE)
#: What the p of a test, or the share of random sets, may be.
ALPHA = 0.05
#: Costs within this factor of each other are alike: a time varies by that much from run to run.
MARGIN = 1.25


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval and p, as far as it has them."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def above(self) -> bool:
        """The whole interval lies above zero, and p, if there is one, is below 0.05."""
        return self.low is not None and self.low > 0 and (self.p is None or self.p < ALPHA)


@dataclass(frozen=True)
class Evidence(Estimate):
    """What a run has to say on a claim.

    Attributes:
        n: what the interval is over, counted in `of`.
        seeds: how many seeds it is averaged over.
        against: further numbers that the rule looks at, by name, in the rule's order.
        fair: whether the random sets that the claim is held against match what they are compared with.
        unable: why the claim cannot be tested in this run; "" if it can.
    """

    n: int | None = None
    of: str = "domains"
    seeds: int = 1
    against: Mapping[str, Estimate] = field(default_factory=dict)
    fair: bool = True
    unable: str = ""


class NotDone(StsError):
    """A result that a claim rests on is not there."""


# --- the rules ----------------------------------------------------------------------------------------------------

def positive(found: Evidence) -> str:
    """Held if the 95% interval of every number lies above zero with p below 0.05, otherwise not held."""
    return HELD if found.above and all(one.above for one in found.against.values()) else NOT_HELD


def difference(found: Evidence) -> str:
    """Held if the 95% interval of the difference, and of every further one, lies above zero (with p below 0.05 where
    there is a p); in part if only that of the first does; otherwise not held."""
    if not found.above:
        return NOT_HELD
    return HELD if all(one.above for one in found.against.values()) else IN_PART


def at_least(found: Evidence, bound: float) -> str:
    """Held if the whole 95% interval reaches the bound (the number itself, where it has no interval), otherwise not
    held."""
    lowest = found.value if found.low is None else found.low
    return HELD if lowest is not None and lowest >= bound else NOT_HELD


def apart(found: Evidence) -> str:
    """Held if the 95% interval lies above those of all that it is compared with, in part if above that of the first
    alone, otherwise not held. Codes are compared as they are: where activity is concentrated, so is its change."""
    if not found.against or found.low is None:
        return NOT_HELD
    above = [found.low > (one.value if one.high is None else one.high) for one in found.against.values()]
    return HELD if all(above) else IN_PART if above[0] else NOT_HELD


def all_above(found: Evidence) -> str:
    """Held if demonstrations name more than each list that needs none, every difference with its whole 95% interval
    above zero; in part if not, but the lists share more than random ones do among the latents that change at all (p below
    0.05); otherwise not held."""
    if found.against and all(one.above for one in found.against.values()):
        return HELD
    return IN_PART if found.p is not None and found.p < ALPHA else NOT_HELD


def rarer_than(found: Evidence) -> str:
    """Held if the correlation is above zero and at most 5% of the random sets of each kind reach it, and the sets match
    in firing rate and energy to a tenth without being nearly one and the same; otherwise not held."""
    rare = found.against and all(one.p is not None and one.p <= ALPHA for one in found.against.values())
    return HELD if found.fair and rare and found.value is not None and found.value > 0 else NOT_HELD


def no_more_than_chance(found: Evidence) -> str:
    """Held if more than 5% of shuffled targets give a correlation as high, for every probe; otherwise not held. That few
    domains cannot tell a small correlation from chance counts for this claim, so held is weak evidence."""
    tested = [found, *found.against.values()]
    return HELD if all(one.p is not None and one.p > ALPHA for one in tested) else NOT_HELD


def specific(found: Evidence) -> str:
    """Held if the mean rank correlation within domains has its 95% interval above zero, with p below 0.05 when training
    sets are shuffled in each domain and with one-sided p below 0.05 when whole sets are shuffled (which takes four); in
    part if all but the last holds; otherwise not held."""
    if not found.above:
        return NOT_HELD
    whole = found.against.get("whole sets shuffled")
    return HELD if whole and whole.p is not None and whole.p < ALPHA else IN_PART


def own_list(found: Evidence) -> str:
    """Held if lists share more with their own training set's change than with the others', and this lead is larger than
    that of lists by firing rate, each with p below 0.05 over orders of the sets; otherwise not held."""
    leads = [found, *found.against.values()]
    return HELD if len(leads) > 1 and all((one.value or 0) > 0 and one.p is not None and one.p < ALPHA
                                          for one in leads) else NOT_HELD


def cheaper(found: Evidence) -> str:
    """Held if finding out costs more than 1.25 times as much as the forecast in every unit, in part if in some,
    otherwise not held. Training the SAE is not counted."""
    above = [(one.value or 0) > MARGIN for one in (found, *found.against.values())]
    return HELD if all(above) else IN_PART if any(above) else NOT_HELD


RULES: dict[str, Callable[..., str]] = {rule.__name__: rule for rule in (
    positive, difference, at_least, apart, all_above, rarer_than, no_more_than_chance, specific, own_list, cheaper)}


# --- the records --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Claim:
    """One record of book/claims.yaml."""

    id: str
    chapter: str
    says: str
    evidence: str
    rule: str
    result: str = ""
    paper: str = ""
    label: str = ""
    form: str = ".2f"
    bound: float | None = None
    learned: str = "own"
    arguments: Mapping[str, object] = field(default_factory=dict)

    def judge(self, found: Evidence) -> str:
        """The verdict on evidence, one of `WORDS`."""
        if found.unable or found.value is None:
            return NOT_TESTABLE
        rule = RULES[self.rule]
        return rule(found) if self.bound is None else rule(found, self.bound)


@dataclass(frozen=True)
class Result:
    """One of the paper's results: its figure or table, what it claims, its number."""

    name: str
    says: str
    paper: str
    chapter: str = ""


@functools.cache
def read_claims(path: Path = ROOT / "book" / "claims.yaml") -> tuple[dict[str, Result], dict[str, Claim]]:
    """The paper's results by name, and all claims by id.

    Raises:
        StsError: an unknown rule or result, or an id twice.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    results = {row["name"]: Result(**row) for row in content["results"]}
    names = {one.name for one in dataclasses.fields(Claim)} - {"arguments"}
    claims: dict[str, Claim] = {}
    for row in content["claims"]:
        claim = Claim(arguments=row.pop("with", {}), **{name: value for name, value in row.items() if name in names})
        if claim.id in claims or row.keys() - names:
            raise StsError(f"{path.name}: claim {claim.id!r} stands twice or has unknown fields {row.keys() - names}.")
        if claim.rule not in RULES:
            raise one_of("Rule", claim.rule, RULES)
        if claim.result and claim.result not in results:
            raise one_of("Result", claim.result, results)
        claims[claim.id] = claim
    return results, claims


def together(words: list[str]) -> str:
    """The verdict on a result from those of its claims: of those that could be tested, held if all are, in part if any is
    held or in part."""
    tested = [word for word in words if word in (HELD, IN_PART, NOT_HELD)]
    if not tested:
        return NOT_TESTABLE if NOT_TESTABLE in words else NOT_DONE
    if set(tested) == {HELD}:
        return HELD
    return IN_PART if set(tested) != {NOT_HELD} else NOT_HELD


def shown(one: Estimate, form: str) -> str:
    """The number with its interval, as text."""
    def text(value: float) -> str:
        return format(round(value, 12) + 0.0, form)

    if one.value is None:
        return ""
    return text(one.value) + ("" if one.low is None else f" ({text(one.low)} to {text(one.high)})")


def rule_text(claim: Claim) -> str:
    """The rule of a claim, as its docstring says it, with the bound."""
    text = " ".join((RULES[claim.rule].__doc__ or "").split())
    return text if claim.bound is None else f"{text} The bound is {format(claim.bound, claim.form)}."
