"""What a run has to say on claims about other trainings, of read-outs alone and with mixed data; see `evidence`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas

from sts.book.claims import Evidence
from sts.errors import StsError
from sts.measure.items import MeanInterval, crossed_mean_interval, paired_mean_interval

if TYPE_CHECKING:
    from sts.run.run import OpenRun

UNHARMED = "not both domains were harmed"
#: Sets of latents whose read-outs are trained beside the estimated ones.
OTHERS = {"random": "random latents", "like_rate": "others that fire as often", "most_active": "the most active"}


def _asked(run: OpenRun, setting: str) -> None:
    if not getattr(run.settings, setting):
        raise StsError(f"Setting {setting} of this run is empty, so nothing of the kind is trained.")


def _of(what: str, found: MeanInterval) -> Evidence:
    return Evidence(found.mean, found.low, found.high, n=found.n, of=what)


def read_out_leads(run: OpenRun) -> Iterator[tuple[str, int, Evidence]]:
    """(kind, number of latents, bits per character of held-out problems that training read-outs of the estimated
    latents takes off more than those of this kind): "untrained", and `OTHERS` where there are such sets."""
    _asked(run, "selective_latents")
    bits = run.get("selective").dropna(subset="bits").fillna({"latents": 0, "draw": 0}).pivot(
        index=["kind", "latents", "draw"], columns="example_id", values="bits")
    for count in sorted(run.settings.selective_latents):
        own = bits.loc["most_shifted", count].iloc[0]
        for place in (("untrained", 0), *((kind, count) for kind in OTHERS)):
            if place in bits.index:
                yield place[0], count, _of("problems", crossed_mean_interval(bits.loc[place] - own, against_one=True))


def read_outs(run: OpenRun, than: str = "untrained") -> Evidence:
    """That at the largest number of latents: of "untrained" ones, or of "others", the random ones first (Figure 7)."""
    found = {kind: one for kind, _, one in read_out_leads(run)}  # the last number is the largest
    return found[than] if than in found else replace(found["random"], against={
        f"more than {name}": found[kind] for kind, name in OTHERS.items() if kind in found and kind != "random"})


def _mixed(run: OpenRun, than: str = "none") -> tuple[list[str], pandas.DataFrame]:
    """The two domains; and bits by domain and question, of the columns untuned, none, own (the largest mixture in
    proportion to the score) and other (the mixture that it is compared with)."""
    _asked(run, "mixture_steps")
    bits = run.get("mixture").pivot(index=["domain", "example_id"], columns="mixture", values="bits")
    names = {kind: kind if kind == "none" else f"{kind} {max(run.settings.mixture_steps):g}" for kind in ("sts", than)}
    if bits.isna().to_numpy().any() or not {*names.values()} <= {*bits.columns}:
        raise StsError(f"Not among the mixtures of this run, or without bits: {', '.join(names.values())}.")
    domains = [row["domain"] for row in run.get("mixture_plan")["domains"]]
    return domains, bits.assign(own=bits[names["sts"]], other=bits[names[than]])


def kept_up(run: OpenRun, than: str = "none") -> Evidence:
    """Bits per character that the mixture takes off both domains' test halves more than training without it ("none"),
    or than as many examples divided in another way (Figure 5)."""
    domains, bits = _mixed(run, than)
    first, second = (_of("questions", paired_mean_interval(
        (bits["other"] - bits["own"]).loc[domain], resamples=run.settings.bootstrap)) for domain in domains)
    harmed = than != "none" or all((bits["none"] - bits["untuned"]).loc[domain].mean() > 0 for domain in domains)
    return replace(first, against={f"in {domains[1]}": second}, unable=UNHARMED * (not harmed))


def gain_kept(run: OpenRun) -> Evidence:
    """Share of what training takes off the bits of its held-out problems that training with the mixture takes off as
    well (Table 10), with the interval of the ratio's linear part."""
    bits = _mixed(run)[1].loc["training set"]
    plain, mixed = bits["untuned"] - bits["none"], bits["untuned"] - bits["own"]
    parts = (share := mixed.mean() / plain.mean()) + (mixed - share * plain) / plain.mean()
    return _of("problems", paired_mean_interval(parts, resamples=run.settings.bootstrap))
