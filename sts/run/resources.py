"""What stages are handed besides results and settings: models, the SAE, examples, prompts, other seeds.

Each is one function of an open run, registered with what it brings into a key. What a run reads from outside (an
*input*) is known by a digest. Libraries are imported where they are used, so that keys and records take a second.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sts.errors import ROOT, StsError
from sts.run.settings import Run
from sts.run.stage import RESOURCES, Resource, View

if TYPE_CHECKING:
    from sts.run.run import OpenRun

_MODEL = ("model", "model_revision")
_TRAINING = ("sft_data", "sft_examples", "sft_held_out", "seed")
_DOMAINS = ("domain_data", "domain_split", "domains", "domain_limit")
_SET_ASIDE = ("domain_data", "demonstration_split", "domains")
#: Input -> the settings that decide what it is. Records keep those of `DRAWN`, which their stages need not use.
DECIDED_BY = {"model": _MODEL, "sft_train": _TRAINING, "sft_held_out": _TRAINING, "domain_data": _DOMAINS,
              "demonstrations": _SET_ASIDE, "text_data": ("text_data", "text_examples", "seed"),
              "sae_text": (*_MODEL, "sae_text"), "trial_problems": (*_TRAINING, "sft_trial_examples"),
              "generation_data": (*_TRAINING, *_DOMAINS, *_SET_ASIDE, "eval_generate", "eval_limit", "demonstrations")}
DRAWN = ("sft_train", "sft_held_out", "domain_data", "demonstrations")
#: Inputs that are other stages' keys: these are known wherever the stages are, so records have to agree in them.
MADE_OF_KEYS = ("sae", "seeds", "training_sets")
#: Added to the run's seed, so that the problems of trials are drawn apart from those of the runs reported.
TRIAL_SEED = 1_000
#: What is asked of every further seed, and of every training set, before its key is part of another.
EVERY_SEED = ("correlations", "extreme_correlations")
EVERY_SET = ("scores", "shift", "sft", "sft_shift", "domain_shift", "correlations", "text_baselines")


def drawn(settings: Run, inputs: Iterable[str]) -> dict[str, Any]:
    """The settings that decide what these inputs are and that a record keeps: name and value."""
    return {name: getattr(settings, name) for what in inputs if what in DRAWN for name in DECIDED_BY[what]}


def resource(*, uses: tuple[str, ...] = (), inputs: tuple[str, ...] = (), needs: tuple[str, ...] = ()) -> Callable:
    """Register a function of an open run as a resource of its own name."""
    def register(make: Callable[[OpenRun], Any]) -> Callable[[OpenRun], Any]:
        RESOURCES[make.__name__] = Resource(make, uses, inputs, needs)
        return make
    return register


# --- models

@resource(uses=_MODEL, inputs=("model",))
def tokenizer(run):
    return lm(run).tokenizer


@resource(uses=(*_MODEL, "dtype"), inputs=("model",))
def lm(run):
    """The run's model, loaded once and never changed."""
    return run.once("model", (*_MODEL, "dtype", "device"), fresh_lm(run))


@resource(uses=(*_MODEL, "dtype"), inputs=("model",))
def fresh_lm(run):
    """A function of a dtype ("" for the run's own) that loads a copy of the model, for stages that change it."""
    def load(dtype: str = ""):
        from sts.engine.models import check_layer, load_model

        own = run.settings
        loaded = load_model(own.model, revision=own.model_revision, dtype=dtype or own.dtype, device=run.device,
                            cache=run.results / "models")
        check_layer(loaded.model, own.layer)
        return loaded
    return load


@resource(uses=(*_MODEL, "dtype"), inputs=("model",), needs=("sft",))
def tuned(run):
    """The fine-tuned model, a copy of its own."""
    from sts.engine.finetune import load_tuned

    return load_tuned(fresh_lm(run)(), run.get("sft"))


@resource(uses=("fold_norms", "sae_dtype"), inputs=("sae",))
def reader(run):
    """The run's SAE, checked to fit the model and the layer."""
    from sts.engine.saes import check_fits, load_sae
    from sts.measure.score import check_top_n

    name, own = sae_name(run), run.settings
    found = run.once("SAE", ("fold_norms", "sae_dtype", "device"), lambda: load_sae(
        name, device=run.device, dtype=own.sae_dtype, fold_norms=own.fold_norms), name)
    check_fits(found, lm(run), own.layer)
    check_top_n(own.top_n, found.cfg.d_sae)
    return found


def sae_name(run: OpenRun) -> str:
    """What `engine.saes.load_sae` takes, trained first where the run says so; `StsError` without recorded weights."""
    if run.settings.sae != "train":
        own = ROOT / run.settings.sae  # a profile of the repository may be run from any folder
        return str(own) if (own / "cfg.json").is_file() else run.settings.sae
    folder = run.get("sae")
    if not (folder / "cfg.json").is_file():
        raise StsError(f"{folder.name} was recorded without its weights. To train it here: sts stage sae --again, with "
                       "the same run and parameters.")
    return str(folder)


def check_sae(settings: Run) -> None:
    """Raise `StsError` for an SAE that is not known, or fewer latents than top_n where its width is known."""
    width = settings.sae_latents
    if settings.sae != "train":
        from sts.engine.saes import known_width, sae_identity

        if not (ROOT / settings.sae / "cfg.json").is_file():
            sae_identity(settings.sae)
        width = known_width(settings.sae)
    if width and settings.top_n > width:
        raise StsError(f"The {settings.top_n} most shifted latents were asked for; the SAE has {width}. "
                       f"Set top_n between 1 and {width}.")


@resource(uses=("question_tokens_only", "drop_first_positions", "outlier_norm"))
def masks(run):
    from sts.engine.extract import Masks

    return Masks(run.settings.question_tokens_only, run.settings.drop_first_positions, run.settings.outlier_norm)


# --- examples and prompts

def _training_set(run) -> tuple[list, list]:
    from sts.data.load import training_split

    own = run.settings
    return run.once("training data", _TRAINING, lambda: training_split(own.sft_data, own.sft_examples, own.sft_held_out,
                                                                       seed=own.seed))


@resource(inputs=("sft_train",))
def train(run):
    """Training examples."""
    return _training_set(run)[0]


@resource(inputs=("sft_held_out",))
def held_out(run):
    """Examples of the training set that are never trained on."""
    return _training_set(run)[1]


def _by_domain(run, split: str) -> dict[str, list]:
    from sts.data.load import by_domain, load_examples

    return by_domain(load_examples(run.settings.domain_data, split=split), tuple(run.settings.domains))


@resource(inputs=("domain_data",))
def questions(run):
    """Domain -> its questions."""
    def load() -> dict[str, list]:
        groups, limit = _by_domain(run, run.settings.domain_split), run.settings.domain_limit
        # Not by the run's seed: runs that differ in it answer the same questions, and are compared by item.
        return {domain: random.Random(0).sample(group, min(len(group), limit)) if limit else group
                for domain, group in groups.items()}
    return run.once("evaluation data", _DOMAINS, load)


@resource(inputs=("demonstrations",))
def examples_set_aside(run):
    """Domain -> examples for demonstrations; empty if they come from the questions themselves."""
    split = run.settings.demonstration_split
    return run.once("demonstrations", _SET_ASIDE, lambda: _by_domain(run, split)) if split else {}


@resource(uses=("text_data", "text_examples", "context", "seed"), inputs=("text_data",))
def texts(run):
    """Questions and solutions that the first chapter reads the SAE on."""
    from sts.data.load import load_examples

    own = run.settings
    return run.once("texts", DECIDED_BY["text_data"], lambda: [
        one for name in own.text_data for one in load_examples(name, limit=own.text_examples, seed=own.seed + 7)])


@resource(uses=("sae_text", "context"), inputs=("sae_text",))
def sae_texts(run):
    """The text that SAEs are trained on: `.pieces(tokens, seed)` gives token ids, (train, held out)."""
    from sts.data.groups import SaeTexts

    return SaeTexts(run.settings.sae_text, lm(run).tokenizer, run.settings.context)


@resource(uses=("sft_data", "sft_trial_examples", "sft_held_out", "seed"), inputs=("trial_problems",))
def trial(run):
    """(train, held out, seed) for the comparison of learning rates, drawn apart from the run's own problems."""
    seed = run.settings.seed + TRIAL_SEED
    return *_training_set(_other(run, seed=seed, sft_examples=run.settings.sft_trial_examples)), seed


@resource(uses=("eval_generate",), inputs=("generation_data",))
def benchmarks(run):
    """What is answered in words: name in `eval_generate` -> (benchmark, questions, worked examples)."""
    from sts.data.groups import benchmark_questions

    own = run.settings
    return benchmark_questions(own.eval_generate, held_out(run), questions(run), examples_set_aside(run),
                               own.demonstrations, own.eval_limit, own.seed)


@resource(uses=("shift_tokens", "shift_demonstrations", "demonstration_draws", "seed"), inputs=("sft_train",))
def shift_groups(run):
    """Questions of the training set behind each draw of demonstrations."""
    from sts.data.groups import training_groups

    own, model = run.settings, lm(run)
    return training_groups(
        model.tokenizer, train(run), own.shift_demonstrations, own.demonstration_draws, tokens=own.shift_tokens,
        context_length=model.context_length, seed=own.seed, name=own.sft_data)


@resource(uses=("score_tokens", "demonstrations", "demonstration_draws", "seed"),
          inputs=("domain_data", "demonstrations"))
def domain_groups(run):
    """Domain -> its questions behind each draw of demonstrations from the same domain."""
    from sts.data.groups import groups_of_domains

    own, model = run.settings, lm(run)
    return groups_of_domains(
        model.tokenizer, questions(run), examples_set_aside(run), own.demonstrations, own.demonstration_draws,
        tokens=own.score_tokens, context_length=model.context_length, seed=own.seed)


# --- other seeds and training sets

def _other(run: OpenRun, **changes: Any) -> OpenRun:
    """The run with another seed or training set, which has no others of its own."""
    same = all(getattr(run.settings, name) == value for name, value in changes.items())
    return run if same else run.variant(**changes, seeds=[], sweep_seeds=None)


def seeds_of(run: OpenRun) -> list[OpenRun]:
    """The run with each of its seeds, its own first."""
    return [_other(run, seed=seed) for seed in dict.fromkeys((run.settings.seed, *run.settings.seeds))]


def trainings_of(run: OpenRun) -> list[OpenRun]:
    """The run with every training set, its own first, and of each all `training_seeds`."""
    own = run.settings
    return [_other(run, sft_data=name, seed=seed) for name in dict.fromkeys((own.sft_data, *own.training_sets))
            for seed in dict.fromkeys((own.seed, *own.training_seeds))]


@resource(uses=("seeds", "seed"), inputs=("seeds",))
def each_seed(run):
    return [View(one) for one in seeds_of(run)]


@resource(uses=("training_sets", "training_seeds", "sft_data", "seed"), inputs=("training_sets",))
def each_training(run):
    return [View(one) for one in trainings_of(run)]


# --- what is read, by digest

def identity(run: OpenRun, what: str) -> str:
    """A digest of something that a stage reads from outside; `StsError` if it is not here."""
    if what == "sae":
        from sts.engine.saes import sae_identity

        return f"trained:{run.key('sae')}" if run.settings.sae == "train" else sae_identity(sae_name(run))
    if what in MADE_OF_KEYS:
        others, names = (seeds_of(run)[1:], EVERY_SEED) if what == "seeds" else (trainings_of(run), EVERY_SET)
        keys = [one.key(name) for one in others for name in names]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
    if what == "model":
        from sts.engine.models import resolve_model

        return resolve_model(run.settings.model, run.settings.model_revision, run.results / "models", convert=False)[1]
    from sts.data.load import digest

    if what == "sae_text":
        from sts.data.groups import SaeTexts
        from sts.data.prompts import question_text, render, solution_text
        own = SaeTexts(run.settings.sae_text, None, run.settings.context)  # pyright: ignore[reportArgumentType]
        documents = [one for name in own.sources for one in own.documents(name)]  # before a model is loaded in vain
        return digest([one if isinstance(one, str) else  # as the model sees them, as recorded keys are
                       render(tokenizer(run), question_text(one), answer=solution_text(one)) for one in documents])
    made: dict[str, Callable[[], Any]] = {
        "sft_train": lambda: [train(run)], "sft_held_out": lambda: [held_out(run)], "text_data": lambda: [texts(run)],
        "domain_data": lambda: questions(run).values(), "demonstrations": lambda: examples_set_aside(run).values(),
        "trial_problems": lambda: trial(run)[:2],
        "generation_data": lambda: [part for _, *parts in benchmarks(run).values() for part in parts]}
    return digest([example for group in made[what]() for example in group])
