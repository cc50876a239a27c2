"""The forecast: which latents worked examples shift, how much each domain uses them, and what training changes."""

from __future__ import annotations

import pandas
import torch

from sts.data.groups import token_pieces
from sts.data.prompts import make_prompt, question_text
from sts.engine import sae_quality as quality
from sts.engine.extract import model_paired_folds, paired_stats, row_paired_stats
from sts.engine.sae_training import collect_activations
from sts.engine.saes import SideBySide, identity_sae
from sts.measure.baselines import split_domains
from sts.measure.cost import prompt_tokens
from sts.measure.score import REVISION, chosen_by, score_domains
from sts.run.stage import stage, steps


@stage("tensors", version=3)
def shift(lm, reader, layer, shift_groups, masks, report, passes):
    """Paired statistics of the training domain's questions without and behind demonstrations."""
    return paired_stats(lm, reader, layer, shift_groups, masks, report=report, **passes).to_tensors()


@stage("tensors", version=2)
def shift_rows(lm, reader, layer, shift_groups, official_rows, passes):
    """The same, paired by row index as in the official code."""
    return row_paired_stats(lm, reader, layer, shift_groups, official_rows, **passes).to_tensors()


def _by_domain(domain_groups, read, report):
    """What `read` gives of each domain's groups, as domain/field."""
    return {f"{domain}/{name}": tensor for (domain, groups), told in steps(domain_groups.items(), report)
            for name, tensor in read(groups, told).items()}


@stage("tensors", version=2)
def domain_stats(lm, reader, layer, domain_groups, masks, report, passes):
    """Paired statistics of every domain's questions; tensors are named domain/field."""
    return _by_domain(domain_groups, lambda groups, told: paired_stats(
        lm, reader, layer, groups, masks, report=told, **passes).to_tensors(), report)


@stage("tensors")
def domain_rows(lm, reader, layer, domain_groups, official_rows, report, passes):
    """The same, paired by row index as in the official code."""
    return _by_domain(domain_groups, lambda groups, told: row_paired_stats(
        lm, reader, layer, groups, official_rows, **passes).to_tensors(), report)


@stage("tensors")
def domain_raw_stats(lm, layer, domain_groups, masks, report, passes):
    """Stage `domain_stats` on the residual stream's own dimensions, behind the first draw of demonstrations alone."""
    def read(groups, told):
        own = paired_stats(lm, identity_sae(lm), layer, groups[:1], masks, report=told, **passes).to_tensors()
        return {name: own[name] for name in ("tokens", "base_sum_L", "base_square_sum_L", "squared_difference_L")}
    return _by_domain(domain_groups, read, report)


@stage("tensors")
def domain_model_change(lm, tuned, reader, layer, domain_groups, masks, report, passes):
    """The same questions, without demonstrations, in the untuned and the tuned model; also all latents' change."""
    codes = SideBySide({"sae": reader, "raw": identity_sae(lm)})

    def read(groups, told):
        stats, = model_paired_folds(lm, tuned, codes, layer, groups[0].base, masks, report=told, **passes)
        own = codes.split(stats.to_tensors())
        return {"tokens": own["raw/tokens"], "base_sum_L": own["raw/base_sum_L"],
                "tuned_sum_L": own["raw/icl_sum_L"], "squared_difference_L": own["raw/squared_difference_L"],
                "latents_squared": own["sae/squared_difference_L"].sum()[None]}
    return _by_domain(domain_groups, read, report)


@stage("parquet", version=1 + REVISION)
def scores(shift, shift_rows, domain_stats, domain_rows, top_n):
    """STS_act and STS_ICL of every domain in both variants."""
    return pandas.DataFrame(score_domains("paper", shift, split_domains(domain_stats), top_n)
                            + score_domains("official_code", shift_rows, split_domains(domain_rows), top_n))


@stage("json", version=2)
def forecast_tokens(tokenizer, shift_groups, domain_groups):
    """Tokens of the forecast's prompts, each counted whole, beside which `shift` and `domain_stats` ran fewer."""
    return {"shift": prompt_tokens(shift_groups),
            "domain_stats": prompt_tokens([group for own in domain_groups.values() for group in own])}


@stage("parquet")
def question_sums(lm, reader, layer, shift, shift_groups, train, domain_groups, questions, masks, top_n, passes):
    """What `scores` adds up, a row a question behind a set of demonstrations (domain "": the training set's): domain,
    example_id, tokens, and over D_N the sums of the activation (act) and of the squared change (icl)."""
    rows, chosen = [], chosen_by(shift, top_n)
    for domain, own, groups in (("", train, shift_groups), *((d, questions[d], domain_groups[d]) for d in questions)):
        known = {make_prompt(lm.tokenizer, question_text(one)).ids: one.example_id for one in own}
        asked = {icl.ids: known[base.ids] for one in groups for base, icl in zip(one.base, one.icl, strict=True)}

        def add(ids, stats, domain=domain, asked=asked):
            rows.append((domain, asked[ids], stats.tokens, stats.base.sum_L[chosen].sum().item(),
                         stats.squared_difference_L[chosen].sum().item()))
        paired_stats(lm, reader, layer, groups, masks, each=add, **passes)
    return pandas.DataFrame(rows, columns=["domain", "example_id", "tokens", "act", "icl"])


@stage("json")
def difference_latents(lm, reader, layer, shift, domain_stats, train, questions, top_n, scratch, report, work):
    """Cards of ten latents of D_N that set the domain of the highest STS_act apart from that of the lowest: what each
    adds to every domain's (act), contexts in 5,000 tokens of each and of the training set, and tokens promoted."""
    chosen, domains = chosen_by(shift, top_n), split_domains(domain_stats)
    act_DN = torch.stack([own["base_sum_L"][chosen] / own["tokens"] for own in domains.values()])
    apart_N = act_DN[act_DN.sum(1).argmax()] - act_DN[act_DN.sum(1).argmin()]
    places = apart_N.abs().argsort(descending=True, stable=True)[:10].tolist()
    pieces = [(kind, ids) for kind, own in {"training set": train, **questions}.items()
              for ids in token_pieces(lm.tokenizer, own, 400, 5_000, whole=False)]
    collect_activations(lm, {layer: scratch}, [ids for _, ids in pieces], work=work, report=report)
    (kinds, found), latents = zip(*pieces, strict=True), chosen[places].tolist()
    cards = quality.top_contexts(quality.Firings(reader, scratch, found, lm.tokenizer, latents, kinds))
    return [card | tokens | {"act": dict(zip(domains, act_DN[:, place].tolist(), strict=True))} for place, card, tokens
            in zip(places, cards, quality.promoted_tokens(lm, reader, latents), strict=True)]
