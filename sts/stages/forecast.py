"""The forecast: which latents worked examples shift, and how much each domain uses them. Nothing here is tuned."""

from __future__ import annotations

import pandas

from sts.engine.extract import paired_stats, row_paired_stats
from sts.errors import StsError
from sts.measure.baselines import split_domains
from sts.measure.cost import prompt_tokens
from sts.measure.score import REVISION, VARIANTS, overlap, score_domains, shifted_dimensions
from sts.run.stage import stage


@stage("tensors", version=3)
def shift(lm, reader, layer, shift_groups, masks, tokens_per_batch, report, work):
    """Paired statistics of the training domain's questions without and behind demonstrations."""
    return paired_stats(lm, reader, layer, shift_groups, masks, tokens_per_batch=tokens_per_batch, report=report,
                        work=work).to_tensors()


@stage("tensors", version=2)
def shift_rows(lm, reader, layer, shift_groups, official_rows, tokens_per_batch, work):
    """The same, paired by row index as in the official code."""
    return row_paired_stats(lm, reader, layer, shift_groups, official_rows, tokens_per_batch=tokens_per_batch,
                            work=work).to_tensors()


def _by_domain(domain_groups, read, report):
    flat = {}
    for done, (domain, groups) in enumerate(domain_groups.items()):
        stats = read(groups, lambda f, done=done: report((done + f) / len(domain_groups)))
        flat |= {f"{domain}/{name}": tensor for name, tensor in stats.to_tensors().items()}
    return flat


@stage("tensors", version=2)
def domain_stats(lm, reader, layer, domain_groups, masks, tokens_per_batch, report, work):
    """Paired statistics of every domain's questions; tensors are named domain/field."""
    return _by_domain(domain_groups, lambda groups, told: paired_stats(
        lm, reader, layer, groups, masks, tokens_per_batch=tokens_per_batch, report=told, work=work), report)


@stage("tensors")
def domain_rows(lm, reader, layer, domain_groups, official_rows, tokens_per_batch, report, work):
    """The same, paired by row index as in the official code."""
    return _by_domain(domain_groups, lambda groups, told: row_paired_stats(
        lm, reader, layer, groups, official_rows, tokens_per_batch=tokens_per_batch, work=work), report)


@stage("parquet", version=1 + REVISION)
def scores(shift, shift_rows, domain_stats, domain_rows, top_n):
    """STS_act and STS_ICL of every domain in both variants."""
    sums = {"paper": (shift, domain_stats), "official_code": (shift_rows, domain_rows)}
    return pandas.DataFrame([row for variant in VARIANTS for row in score_domains(
        variant, sums[variant][0], split_domains(sums[variant][1]), top_n)])


@stage("json")
def variant_overlap(shift, shift_rows, top_n):
    """How many shifted latents the two variants agree on."""
    sets = [shifted_dimensions(own["squared_difference_L"], top_n) for own in (shift, shift_rows)]
    return {"overlap": overlap(*sets), "top_n": top_n, "latents": len(shift["squared_difference_L"])}


@stage("json", version=2)
def forecast_tokens(tokenizer, shift_groups, domain_groups):
    """Tokens of the forecast's prompts, each counted whole, beside which `shift` and `domain_stats` ran fewer."""
    return {"shift": prompt_tokens(shift_groups),
            "domain_stats": prompt_tokens([group for own in domain_groups.values() for group in own])}


@stage("json")
def forecast_sums(shift, domain_stats):
    """Of `shift` and `domain_stats` the numbers of counted tokens and latents, and the bytes of the sums kept.

    Raises:
        StsError: only a part of these sums is recorded.
    """
    found = {}
    for name, tensors in (("shift", shift), ("domain_stats", domain_stats)):
        if missing := set(shift) - {field.rpartition("/")[2] for field in tensors}:
            raise StsError(f"Stage {name!r} was recorded without {', '.join(sorted(missing))}, so the bytes of its "
                           f"sums are not known. To compute it here: sts stage {name} --again, with the same run and "
                           "parameters.")
        found[name] = {
            "tokens": sum(tensor.item() for field, tensor in tensors.items() if field.rpartition("/")[2] == "tokens"),
            "latents": next(len(tensor) for field, tensor in tensors.items() if field.endswith("squared_difference_L")),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())}
    return found
