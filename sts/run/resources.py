"""What stages are handed besides results and settings: models, the SAE, examples, prompts, other seeds.

Each resource is one function of an open run, registered with what it brings into a key. What a run reads from outside
(an *input*) is known by a digest; `DECIDED_BY` names the settings that decide what it is. Libraries and models are
imported where they are used, so that keys and records can be worked with in a second.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sts.errors import StsError
from sts.run.stage import RESOURCES, Resource

_MODEL = ("model", "model_revision")
_DEVICE = (*_MODEL, "dtype", "device")
_TRAINING = ("sft_data", "sft_examples", "sft_held_out", "seed")
_DOMAINS = ("domain_data", "domain_split", "domains", "domain_limit")
_SET_ASIDE = ("domain_data", "demonstration_split", "domains")
_TEXT = ("text_data", "text_examples", "seed")
#: Input -> the settings that decide what it is.
DECIDED_BY: dict[str, tuple[str, ...]] = {
    "model": _MODEL, "sft_train": _TRAINING, "sft_held_out": _TRAINING, "domain_data": _DOMAINS,
    "demonstrations": _SET_ASIDE, "text_data": _TEXT, "sae_text": ("sae_text",),
    "trial_problems": (*_TRAINING, "sft_trial_examples"),
    "generation_data": (*_TRAINING, *_DOMAINS, "demonstration_split", "eval_generate", "eval_limit", "demonstrations")}
#: Added to the run's seed, so that the problems of trials are drawn apart from those of the runs reported.
TRIAL_SEED = 1_000
#: What is asked of every further seed, and of every training set, before its key is part of another.
EVERY_SEED = ("correlations", "extreme_correlations")
EVERY_SET = ("scores", "shift", "sft", "sft_shift", "domain_shift", "correlations", "text_baselines")


def resource(*, uses: tuple[str, ...] = (), inputs: tuple[str, ...] = (), needs: tuple[str, ...] = ()) -> Callable:
    """Register a function of an open run as a resource of its own name."""
    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        RESOURCES[make.__name__] = Resource(make, uses, inputs, needs)
        return make
    return register


# --- models -------------------------------------------------------------------------------------------------------

@resource(uses=_MODEL, inputs=("model",))
def tokenizer(run):
    return lm(run).tokenizer


@resource(uses=(*_MODEL, "dtype"), inputs=("model",))
def lm(run):
    """The run's model, loaded once and never changed."""
    return run.once("lm", _DEVICE, lambda: fresh_lm(run)())


@resource(uses=(*_MODEL, "dtype"), inputs=("model",))
def fresh_lm(run):
    """A function of a dtype ("" for the run's own) that loads a copy of the model, for stages that change it."""
    from sts.engine.models import check_layer, load_model

    def load(dtype: str = ""):
        settings = run.settings
        loaded = load_model(settings.model, revision=settings.model_revision, dtype=dtype or settings.dtype,
                            device=run.device, cache=run.results / "models")
        check_layer(loaded.model, settings.layer)
        return loaded
    return load


@resource(uses=(*_MODEL, "dtype"), inputs=("model",), needs=("sft",))
def tuned(run):
    """The fine-tuned model."""
    from sts.engine.finetune import load_tuned

    return load_tuned(fresh_lm(run)(), run.get("sft"))


@resource(uses=("fold_norms", "sae_dtype"), inputs=("sae",))
def reader(run):
    """The run's SAE, checked to fit the model and the layer."""
    from sts.engine.saes import check_fits, load_sae
    from sts.measure.shift import check_top_n

    settings = run.settings
    name = run.sae_name()
    found = run.once("reader", ("fold_norms", "sae_dtype", "device"), lambda: load_sae(
        name, device=run.device, dtype=settings.sae_dtype, fold_norms=settings.fold_norms), name)
    check_fits(found, lm(run), settings.layer)
    check_top_n(settings.top_n, found.cfg.d_sae)
    return found


@resource(uses=("question_tokens_only", "drop_first_positions", "outlier_norm"))
def masks(run):
    from sts.engine.extract import Masks

    settings = run.settings
    return Masks(settings.question_tokens_only, settings.drop_first_positions, settings.outlier_norm)


# --- examples -----------------------------------------------------------------------------------------------------

def _training_set(run) -> tuple[list, list]:
    from sts.data.load import training_split

    settings = run.settings
    return run.once("training", _TRAINING, lambda: training_split(
        settings.sft_data, settings.sft_examples, settings.sft_held_out, seed=settings.seed))


@resource(inputs=("sft_train",))
def train(run):
    """Training examples."""
    return _training_set(run)[0]


@resource(inputs=("sft_held_out",))
def held_out(run):
    """Examples of the training set that are never trained on."""
    return _training_set(run)[1]


@resource(inputs=("domain_data",))
def questions(run):
    """Domain -> its questions."""
    from sts.data.load import by_domain, load_examples

    settings = run.settings

    def load() -> dict:
        groups = by_domain(load_examples(settings.domain_data, split=settings.domain_split), tuple(settings.domains))
        if not settings.domain_limit:
            return groups
        # Not by the run's seed: runs that differ in it answer the same questions, and are compared by item.
        return {domain: random.Random(0).sample(group, min(len(group), settings.domain_limit))
                for domain, group in groups.items()}
    return run.once("domains", _DOMAINS, load)


@resource(inputs=("demonstrations",))
def examples_set_aside(run):
    """Domain -> examples for demonstrations; empty if they come from the questions themselves."""
    from sts.data.load import by_domain, load_examples

    settings = run.settings
    return run.once("set aside", _SET_ASIDE, lambda: by_domain(
        load_examples(settings.domain_data, split=settings.demonstration_split), tuple(settings.domains))
        if settings.demonstration_split else {})


@resource(uses=("text_data", "text_examples", "context", "seed"), inputs=("text_data",))
def texts(run):
    """Questions and solutions that the first chapter reads the SAE on."""
    from sts.data.load import load_examples

    settings = run.settings
    return run.once("texts", _TEXT, lambda: [
        example for name in settings.text_data
        for example in load_examples(name, limit=settings.text_examples, seed=settings.seed + 7)])


@resource(uses=("sae_text", "context"), inputs=("sae_text",))
def sae_texts(run):
    """The text that SAEs are trained on: `.pieces(tokens, seed)` gives token ids, (train, held out)."""
    from sts.data.groups import SaeTexts

    return SaeTexts(run.settings.sae_text, lm(run).tokenizer, run.settings.context)


@resource(uses=("sft_data", "sft_trial_examples", "sft_held_out", "seed"), inputs=("trial_problems",))
def trial(run):
    """(train, held out, seed) for the comparison of learning rates, drawn apart from the run's own problems."""
    seed = run.settings.seed + TRIAL_SEED
    return (*_training_set(run.variant(seed=seed, seeds=[], sweep_seeds=None,
                                       sft_examples=run.settings.sft_trial_examples)), seed)


# --- prompts ------------------------------------------------------------------------------------------------------

@resource(uses=("shift_tokens", "shift_demonstrations", "demonstration_draws", "seed"), inputs=("sft_train",))
def shift_groups(run):
    """Questions of the training set behind each draw of demonstrations."""
    from sts.data.groups import training_groups

    settings, model = run.settings, lm(run)
    return training_groups(model.tokenizer, train(run), settings.shift_demonstrations, settings.demonstration_draws,
                           tokens=settings.shift_tokens, context_length=model.context_length, seed=settings.seed,
                           name=settings.sft_data)


@resource(uses=("score_tokens", "demonstrations", "demonstration_draws", "seed"),
          inputs=("domain_data", "demonstrations"))
def domain_groups(run):
    """Domain -> its questions behind each draw of demonstrations from the same domain."""
    from sts.data.groups import groups_of_domains

    settings, model = run.settings, lm(run)
    return groups_of_domains(model.tokenizer, questions(run), examples_set_aside(run), settings.demonstrations,
                             settings.demonstration_draws, tokens=settings.score_tokens,
                             context_length=model.context_length, seed=settings.seed)


# --- other seeds and training sets --------------------------------------------------------------------------------

def seeds_of(run) -> list:
    """The run with each of its seeds, its own first."""
    own = run.settings.seed
    return [run.variant(seed=seed, seeds=[], sweep_seeds=None) if seed != own else run
            for seed in dict.fromkeys((own, *run.settings.seeds))]


def trainings_of(run) -> list:
    """The run with every training set, its own first, and of each all `training_seeds`."""
    settings = run.settings
    names = dict.fromkeys((settings.sft_data, *settings.training_sets))
    seeds = dict.fromkeys((settings.seed, *settings.training_seeds))
    own = (settings.sft_data, settings.seed)
    return [run if (name, seed) == own else run.variant(sft_data=name, seed=seed, seeds=[], sweep_seeds=None)
            for name in names for seed in seeds]


@resource(uses=("seeds", "seed"), inputs=("seeds",))
def each_seed(run):
    return [View(one) for one in seeds_of(run)]


@resource(uses=("training_sets", "training_seeds", "sft_data", "seed"), inputs=("training_sets",))
def each_training(run):
    return [View(one) for one in trainings_of(run)]


class View:
    """A run as stages over several seeds or training sets see it."""

    def __init__(self, run):
        self.get, self.seed, self.training_set = run.get, run.settings.seed, run.settings.sft_data
        self._run = run

    @property
    def trained_domain(self) -> str:
        """The evaluation domain that the training set is of; "several" if there is more than one."""
        from sts.data.groups import trained_domains

        own = trained_domains(train(self._run))
        return own.pop() if len(own) == 1 else "several"


# --- what is read, by digest --------------------------------------------------------------------------------------

def identity(run, what: str) -> str:
    """A digest of something that a stage reads from outside.

    Raises:
        StsError: it is not here.
    """
    from sts.data.load import digest

    if what == "sae":
        from sts.engine.saes import sae_identity

        return f"trained:{run.key('sae')}" if run.settings.sae == "train" else sae_identity(run.sae_name())
    if what in ("seeds", "training_sets"):
        others, names = (seeds_of(run)[1:], EVERY_SEED) if what == "seeds" else (trainings_of(run), EVERY_SET)
        keys = [one.key(name) for one in others for name in names]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
    if what == "model":
        from sts.engine.models import resolve_model

        return resolve_model(run.settings.model, run.settings.model_revision, run.results / "models")[1]
    if what == "sae_text":
        from sts.data.prompts import question_text, render, solution_text

        own = sae_texts(run)  # by their texts as the model sees them, as recorded keys are
        return digest([one if isinstance(one, str) else
                       render(own.tokenizer, question_text(one), answer=solution_text(one))
                       for name in own.sources for one in own.documents(name)])
    made: dict[str, Callable] = {
        "sft_train": train, "sft_held_out": held_out, "text_data": texts,
        "domain_data": lambda one: [example for group in questions(one).values() for example in group],
        "demonstrations": lambda one: [example for group in examples_set_aside(one).values() for example in group],
        "trial_problems": lambda one: [example for part in trial(one)[:2] for example in part]}
    if what not in made:
        raise StsError(f"Input {what!r} is not known.")
    return digest(made[what](run))


def stage_values(run, spec, report) -> dict[str, Any]:
    """The values of a stage's parameters."""
    never = SimpleNamespace(report=report, work=report.work, device=run.device, variant=run.results_of,
                            tokens_per_batch=run.settings.tokens_per_batch)
    found = {}
    for name in spec.parameters:
        if name == "scratch":
            found[name] = run.scratch(spec.name)
        elif hasattr(never, name):
            found[name] = getattr(never, name)
        elif name in RESOURCES:
            found[name] = RESOURCES[name].make(run)
        else:
            found[name] = getattr(run.settings, name) if name in spec.uses else run.get(name)
    return found
