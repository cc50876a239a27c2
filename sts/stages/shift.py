"""Stages of the chapters on what fine-tuning shifts and what demonstrations foresee of it."""

from __future__ import annotations

import random

import torch

from sts.data.prompts import Prompt, make_group, solution_prompt, without_options
from sts.data.sources import Example
from sts.engine.evaluate import MEASURES
from sts.engine.extract import paired_stats
from sts.engine.finetune import load_tuned
from sts.engine.model_shift import folded, model_paired_folds
from sts.engine.models import LanguageModel
from sts.engine.saes import SideBySide, identity_sae, random_code
from sts.errors import StsError
from sts.measure.correlation import correlate
from sts.measure.paper import extremes, spread_ratio, with_selection
from sts.measure.score import VARIANTS
from sts.run.run import OpenRun, stage
from sts.stages.forecast import MASKS, SHIFT, masks, shift_groups
from sts.stages.sae import MODEL, SAE

#: Groups of questions; latents are chosen on some of them and measured on the others.
FOLDS = 8
#: Domains at either end that the paper's Figure 3 keeps.
EXTREMES = 4
#: The codes that a change is read in: SAE latents, a random code as sparse, raw dimensions.
KINDS = ("sae", "random", "raw")
#: What a training set's domain is called among MMLU-Pro's, where the name differs.
DOMAIN_OF = {"code": "computer science", "medicine": "health", "mental health": "psychology"}
#: Seed of the random code's directions: the same in every run.
CODE_SEED = 20_000


# --- what fine-tuning shifts --------------------------------------------------------------------------------------

def shift_questions(run: OpenRun) -> list[Prompt]:
    """The questions that stage `shift` reads behind demonstrations, without them."""
    return [prompt for group in shift_groups(run) for prompt in group.base]


def _tuned(run: OpenRun) -> LanguageModel:
    return load_tuned(run.load_model(), run.get("sft"))


def codes(run: OpenRun, *kinds: str) -> SideBySide:
    """The run's SAE ("sae"), a random code as sparse ("random") and the raw dimensions ("raw"), or some of them."""
    makers = {"sae": run.sae, "random": lambda: random_code(run.sae(), CODE_SEED), "raw": lambda: identity_sae(run.lm)}
    return SideBySide({kind: makers[kind]() for kind in kinds or makers})


def of_kind(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """One kind's part ("sae", "random" or "raw") of a stage's tensors."""
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}


def _model_shift(run: OpenRun, prompts: list[Prompt], report) -> dict[str, torch.Tensor]:
    sae = codes(run)
    parts = model_paired_folds(run.lm, _tuned(run), sae, run.settings.layer, prompts, masks(run),
                               min(FOLDS, len(prompts)), tokens_per_batch=run.settings.tokens_per_batch,
                               report=report, work=report.work)
    return sae.split(folded(parts))


@stage("tensors", version=2, uses=(*SHIFT, *MASKS), needs=("sft",), inputs=("model", "sae", "sft_train"))
def sft_shift(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """Actual shift: stage `shift`'s questions in the untuned and the tuned model, in folds; every code."""
    return _model_shift(run, shift_questions(run), report)


@stage("tensors", version=2, uses=(*MODEL, *SAE, *MASKS), needs=("sft",), inputs=("model", "sae", "sft_held_out"))
def sft_shift_solutions(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """The same on the worked solutions of held-out problems."""
    return _model_shift(run, solution_prompts(run), report)


def solution_prompts(run: OpenRun) -> list[Prompt]:
    """Held-out training-domain questions with their worked solutions, whose tokens count."""
    return [solution_prompt(run.lm.tokenizer, example, context_length=run.lm.context_length)
            for example in run.sft_examples("held_out")]


# --- what demonstrations foresee ----------------------------------------------------------------------------------

@stage("tensors", uses=(*SHIFT, *MASKS), inputs=("model", "sae", "sft_train"))
def shift_controls(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """Stage `shift` on a random code as sparse as the SAE, and on the residual stream's own dimensions."""
    sae = codes(run, "random", "raw")
    return sae.split(paired_stats(run.lm, sae, run.settings.layer, shift_groups(run), masks(run), work=report.work,
                                  tokens_per_batch=run.settings.tokens_per_batch, report=report).to_tensors())


def draws_of(examples: list[Example], count: int, draws: int, seed: int) -> tuple[list[list[Example]], list[Example]]:
    """`draws` disjoint sets of `count` demonstrations, and the questions, which stand in none of them.

    Raises:
        StsError: no question is left.
    """
    if len(examples) <= count * draws:
        raise StsError(f"{draws} sets of {count} demonstrations were asked of {len(examples)} training examples, which "
                       "leaves no question. Use fewer overlap_draws or overlap_demonstrations, or more sft_examples.")
    shuffled = random.Random(seed).sample(examples, len(examples))
    return [shuffled[draw * count:(draw + 1) * count] for draw in range(draws)], shuffled[count * draws:]


def _shift_behind(run: OpenRun, demonstrations: list[Example], questions: list[Example],
                  report) -> dict[str, torch.Tensor]:
    group, sae = make_group(run.lm.tokenizer, questions, tuple(demonstrations), context_length=run.lm.context_length,
                            tokens=run.settings.overlap_tokens), codes(run)
    stats = paired_stats(run.lm, sae, run.settings.layer, [group], masks(run), work=report.work,
                         tokens_per_batch=run.settings.tokens_per_batch).to_tensors()
    return sae.split({name: stats[name] for name in ("squared_difference_L", "base_fired_L", "base_square_sum_L")})


OVERLAP = (*MODEL, *SAE, *MASKS, "overlap_tokens", "seed")


def _shifts_behind(run: OpenRun, sets: list[list[Example]], questions: list[Example],
                   report) -> dict[str, torch.Tensor]:
    """The same questions behind each set of demonstrations: kind/squared_difference_RL, one row a set; and the
    questions' own kind/base_fired_L and kind/base_square_sum_L, which are the same behind all."""
    rows = []
    for done, demonstrations in enumerate(sets, 1):
        rows.append(_shift_behind(run, demonstrations, questions, report))
        report(done / len(sets))
    return {name.replace("difference_L", "difference_RL"):
            torch.stack([row[name] for row in rows]) if name.endswith("difference_L") else rows[0][name]
            for name in rows[0]}


def overlap_draws(run: OpenRun) -> tuple[list[list[Example]], list[Example]]:
    """The single sets of training-domain demonstrations, and the questions behind each of them."""
    settings = run.settings
    return draws_of(run.sft_examples("train"), settings.shift_demonstrations, settings.overlap_draws, settings.seed)


@stage("tensors", version=2, uses=(*OVERLAP, "overlap_draws", "shift_demonstrations"),
       inputs=("model", "sae", "sft_train"))
def shift_by_draw(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """Squared change behind single sets of demonstrations, the same questions behind each; all codes."""
    return _shifts_behind(run, *overlap_draws(run), report)


def other_domain_sets(run: OpenRun) -> list[list[Example]]:
    """As many sets as `overlap_draws`, each from one domain other than the training set's own, as a control.

    They are put as the training set's examples are: without options where those have none.

    Raises:
        StsError: no other domain has enough examples.
    """
    settings = run.settings
    pool = run.demonstration_pool() or run.domain_examples()
    own = {DOMAIN_OF.get(example.domain, example.domain) for example in run.sft_examples("train")}
    large = [domain for domain in sorted(set(pool) - own) if len(pool[domain]) >= settings.shift_demonstrations]
    if not large:
        raise StsError(f"The control takes {settings.shift_demonstrations} demonstrations from a domain of "
                       f"{settings.domain_data!r} other than {', '.join(sorted(own))}; no domain has so many. Use "
                       "fewer shift_demonstrations, or more domains.")
    generator = random.Random(settings.seed)
    order = generator.sample(large, len(large))
    sets = [generator.sample(pool[order[draw % len(order)]], settings.shift_demonstrations)
            for draw in range(settings.overlap_draws)]
    if any(example.options for example in run.sft_examples("train")):
        return sets
    return [[without_options(example) for example in chosen] for chosen in sets]


@stage("tensors", version=2, uses=(*OVERLAP, "overlap_draws", "shift_demonstrations"),
       inputs=("model", "sae", "sft_train", "domain_data", "demonstrations"))
def shift_by_other_domain(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """Stage `shift_by_draw` with demonstrations from other domains before the same questions: a control."""
    return _shifts_behind(run, other_domain_sets(run), overlap_draws(run)[1], report)


@stage("tensors", version=3, uses=(*OVERLAP, "overlap_demonstrations", "overlap_draws"),
       inputs=("model", "sae", "sft_train"))
def shift_by_demonstrations(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """Squared change behind 1, 2, ... demonstrations, each set holding the smaller ones; kind/number -> draws x L."""
    settings = run.settings
    numbers = settings.overlap_demonstrations
    draws, questions = draws_of(run.sft_examples("train"), max(numbers), settings.overlap_draws, settings.seed)
    rows: dict[str, list] = {}
    for done, demonstrations in enumerate(draws, 1):
        for number in numbers:
            found = _shift_behind(run, demonstrations[:number], questions, report)
            for kind in KINDS:
                rows.setdefault(f"{kind}/{number}", []).append(found[f"{kind}/squared_difference_L"])
        report(done / len(draws))
    return {name: torch.stack(own) for name, own in rows.items()}


# --- the paper's selection of domains, and other seeds ------------------------------------------------------------

@stage("json", version=2, uses=("bootstrap", "permutations", "seed"), needs=("scores", "domain_shift"))
def extreme_correlations(run: OpenRun, report) -> list[dict]:
    """Stage `correlations` on the four domains of largest and the four of smallest absolute shift, as in Figure 3.

    Each row also has `domains`, `spread_ratio` (of the absolute shift, extremes over all) and `all_domains`, what
    Thorndike's formula makes of the correlation without the selection.
    """
    settings, rows = run.settings, []
    scored, shifts = run.get("scores"), run.get("domain_shift")
    for measure in MEASURES:
        own = shifts[shifts["measure"] == measure]
        if own.empty:  # not evaluated
            continue
        own = own.assign(abs_shift_pct=own["shift"].abs())
        for variant in VARIANTS:
            by_domain = scored[scored["variant"] == variant].set_index("domain")
            for score in ("sts_act", "sts_icl"):
                base = {"measure": measure, "variant": variant, "score": score}
                try:
                    kept = extremes(own, EXTREMES).set_index("domain")["abs_shift_pct"]
                    result = correlate(by_domain.loc[kept.index, score], kept, list(kept.index), seed=settings.seed,
                                       permutations=settings.permutations, resamples=settings.bootstrap)
                except StsError as error:
                    rows.append(base | {"undefined": str(error)})
                    continue
                ratio = spread_ratio(own["abs_shift_pct"], EXTREMES)
                rows.append(base | result.to_dict() | {
                    "domains": list(kept.index), "spread_ratio": ratio,
                    "all_domains": with_selection(result.pearson, 1 / ratio)})
    return rows


@stage("json", uses=("seeds", "seed"), needs=("correlations", "extreme_correlations"), inputs=("seeds",))
def correlations_by_seed(run: OpenRun, report) -> list[dict]:
    """Correlations of this seed and of the others in `seeds`, over all domains and over the extremes."""
    rows = []
    for done, seed in enumerate((run.settings.seed, *run.other_seeds), 1):
        own = run.with_seed(seed)
        for which, name in (("all", "correlations"), ("extremes", "extreme_correlations")):
            rows += [{"seed": seed, "domains": which, **{key: result.get(key) for key in (
                "measure", "variant", "score", "n", "pearson", "p", "r_squared", "undefined")}}
                for result in own.get(name)]
        report(done / (1 + len(run.other_seeds)))
    return rows
