"""What stages are handed besides results and settings: models, the SAE, examples, prompts, other seeds.

Each is one function of an open run; `RESOURCES` says what it brings into a key. An *input*, which is read from outside,
is known by a digest. What imports torch is imported where it is used: keys and records take a second.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sts.data import groups, load
from sts.data.prompts import question_text, render, solution_text
from sts.data.sources import SOURCES, Example
from sts.errors import MissingData, StsError
from sts.run.stage import RESOURCES, Resource

if TYPE_CHECKING:
    from sts.run.run import OpenRun
_MODEL = ("model", "model_revision")
_TRAINING = ("sft_data", "sft_examples", "sft_held_out", "seed")
_DOMAINS = ("domain_data", "domain_split", "domains", "domain_limit")
_VALIDATION = ("domain_data", "domains", "validation_limit")
_SET_ASIDE = ("domain_data", "demonstration_split", "domains")
_FINE_TUNING = (*(f"sft_{name}" for name in ("epochs", "lr", "batch", "micro_batch", "max_length")), "lora_rank",
                "lora_alpha", "seed")
_TEXTS = ("text_data", "text_examples", "seed")
_POOL = ("pool", "pool_tokens")
#: Inputs of which records keep the settings that decide them, as stages need not use them.
DRAWN = ("sft_train", "sft_held_out", "domain_data", "demonstrations")


def resource(uses: tuple[str, ...] = (), inputs: tuple[str, ...] = (), needs: tuple[str, ...] = (), name: str = ""):
    """Register a function of an open run under its name, with what it brings into a key: settings, inputs, stages."""
    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        RESOURCES[name or make.__name__] = Resource(make, uses, inputs, needs)
        return make
    return register


@resource((*_MODEL, "dtype"), ("model",))
def fresh_lm(run):
    """A function that loads a copy of the model, for stages that change it; it takes another `dtype`."""
    from sts.engine.models import load_model
    own = run.settings
    return partial(load_model, own.model, revision=own.model_revision, dtype=own.dtype, device=run.device,
                   cache=run.results / "models")


def described(run: OpenRun) -> tuple[Any, Any]:
    """The model's tokenizer and configuration."""
    from sts.engine.models import without_weights
    own = run.settings
    return run.once("tokenizer", _MODEL, lambda: without_weights(
        own.model, revision=own.model_revision, cache=run.results / "models"))


@resource((*_MODEL, "dtype"), ("model",))
def lm(run):
    """The run's model, loaded once and never changed."""
    return run.once("model", (*_MODEL, "dtype", "device"), fresh_lm(run))


@resource(_MODEL, ("model",))
def tokenizer(run):
    """The model's tokenizer; its weights are not read."""
    return described(run)[0]


def _after(stage: str, run):  # the model after a training, a copy of its own
    from sts.engine.finetune import load_tuned
    return load_tuned(fresh_lm(run)(), run.get(stage))


tuned, reinforced = (resource((*_MODEL, "dtype"), ("model",), (stage,), name)(partial(_after, stage))
                     for name, stage in (("tuned", "sft"), ("reinforced", "rl")))


@resource(("fold_norms", "sae_dtype"), ("sae",))
def reader(run):
    """The run's SAE, trained first where the run says so, and checked to fit the model and the layer."""
    from sts.engine.saes import check_fits, load_sae
    from sts.measure.score import check_top_n
    own = run.settings
    folder = run.get("sae") if own.sae == "train" else None
    if folder and not (folder / "cfg.json").is_file():
        raise MissingData(f"{folder.name} was recorded without its weights. Train it here: sts stage sae --again, with "
                       "the same run and parameters.")
    name = str(folder or own.sae)
    found = run.once("SAE", ("fold_norms", "sae_dtype", "device"), lambda: load_sae(
        name, device=run.device, dtype=own.sae_dtype, fold_norms=own.fold_norms), name)
    check_fits(found, lm(run), own.layer)
    check_top_n(own.top_n, found.cfg.d_sae)
    return found


@resource(("layer", "fold_norms", "sae_dtype", "sae_latents", "sae_k", "sweep_layers"), ("sae",),
          ("sweep_sae_training",))
def readers(run):
    """Layer -> its SAE: those that the sweep trained on the same text, or the run's own where it sweeps no layers."""
    from sts.engine.saes import SaeSpec, load_sae
    own = run.settings
    if len(layers := sorted({own.layer, *own.sweep_layers})) == 1:
        return {own.layer: reader(run)}
    trained = run.get("sweep_sae_training")
    folders = {layer: trained / SaeSpec(layer, own.sae_latents, own.sae_k).name for layer in layers}
    if missing := [layer for layer, folder in folders.items() if not folder.is_dir()]:
        raise StsError(f"The SAE of layer {missing[0]} was recorded without weights. Train it: sts stage "
                       "sweep_sae_training --again, with the same run and parameters.")
    return {layer: load_sae(str(folder), device=run.device, dtype=own.sae_dtype, fold_norms=own.fold_norms)
            for layer, folder in folders.items()}


@resource(("question_tokens_only", "drop_first_positions", "outlier_norm"))
def masks(run):
    from sts.engine.extract import Masks
    return Masks(run.settings.question_tokens_only, run.settings.drop_first_positions, run.settings.outlier_norm)


def _training_set(run) -> tuple[list, list]:
    own = run.settings
    return run.once("training data", _TRAINING, lambda: load.training_split(
        own.sft_data, own.sft_examples, own.sft_held_out, seed=own.seed))


@resource(inputs=("sft_train",))
def train(run):
    """Training examples."""
    return _training_set(run)[0]


@resource(_FINE_TUNING)
def fine_tuning(run):
    from sts.engine.finetune import FineTuning
    return FineTuning(*(getattr(run.settings, name) for name in _FINE_TUNING))


@resource(inputs=("sft_held_out",))
def held_out(run):
    """Examples of the training set that are never trained on."""
    return _training_set(run)[1]


def _by_domain(run, split: str, limit: int = 0) -> dict[str, list]:
    # Not by the run's seed: runs that differ in it answer the same questions, and are compared by item.
    found = load.by_domain(load.load_examples(run.settings.domain_data, split=split), tuple(run.settings.domains))
    return {domain: random.Random(0).sample(group, min(len(group), limit)) if limit else group
            for domain, group in found.items()}


@resource(inputs=("domain_data",))
def questions(run):
    """Domain -> its questions."""
    own = run.settings
    return run.once("evaluation data", _DOMAINS, partial(_by_domain, run, own.domain_split, own.domain_limit))


def _of_split(run, what: str, limit: int) -> dict[str, list]:
    name = run.settings.domain_data
    split = getattr(SOURCES[name], what) if name in SOURCES else ""
    return run.once(what, _VALIDATION, partial(_by_domain, run, split, limit)) if split else {}


@resource(inputs=("domain_data",))
def shots(run):
    """Domain -> examples put in front of a question that is evaluated; empty where the set names no split of them."""
    return _of_split(run, "shots", 0)


@resource(("validation_limit",), ("validation",))
def validation(run):
    """Domain -> questions that are never reported on, to choose by how a model is asked; and the examples in front."""
    return _of_split(run, "validation", run.settings.validation_limit), shots(run)


@resource(inputs=("demonstrations",))
def examples_set_aside(run):
    """Domain -> examples for demonstrations; empty if they come from the questions themselves."""
    split = run.settings.demonstration_split
    return run.once("demonstrations", _SET_ASIDE, partial(_by_domain, run, split)) if split else {}


@resource((*_TEXTS, "context"), ("text_data",))
def texts(run):
    """Questions and solutions that the first chapter reads the SAE on."""
    own = run.settings
    return run.once("texts", _TEXTS, lambda: [one for name in own.text_data for one in (
        load.load_examples(name, limit=own.text_examples, seed=own.seed + 7))])


def _pool_texts(run) -> dict[str, list[str]]:
    return run.once("pool", _POOL, lambda: groups.pool_texts(run.settings.pool, run.settings.pool_tokens))


@resource((*_MODEL, *_POOL), ("model", "pool_text"))
def pool_pieces(run):
    """(kind of text, token ids) of every document that latents are labelled by."""
    if len(run.settings.pool) < 2:
        raise MissingData("Setting pool names too few kinds of text; {mathematics: [gsm8k], code: [mbpp]} are enough.")
    return groups.pool_pieces(tokenizer(run), _pool_texts(run), run.settings.pool_tokens)


@resource(("sae_text", "context"), ("sae_text",))
def sae_texts(run):
    """The text that SAEs are trained on."""
    return groups.SaeTexts(run.settings.sae_text, lm(run).tokenizer, run.settings.context)


@resource(("sft_data", "sft_trial_examples", "sft_held_out", "seed"), ("trial_problems",))
def trial(run):
    """(train, held out, seed) for the comparison of learning rates, drawn apart from the run's own problems."""
    seed = run.settings.seed + 1_000
    return *_training_set(run.alone(seed=seed, sft_examples=run.settings.sft_trial_examples)), seed


@resource(("eval_generate",), ("generation_data",))
def benchmarks(run):
    """What is answered in words: name in `eval_generate` -> (benchmark, questions, worked examples)."""
    own = run.settings
    return groups.benchmark_questions(own.eval_generate, held_out(run), questions(run), examples_set_aside(run),
                                      own.demonstrations, own.eval_limit, own.seed)


@resource(("shift_tokens", "shift_demonstrations", "demonstration_draws", "seed"), ("sft_train",))
def shift_groups(run):
    """Questions of the training set behind each draw of demonstrations."""
    own = run.settings
    return groups.prompt_groups(tokenizer(run), {own.sft_data: train(run)}, {}, own.shift_demonstrations,
                                own.demonstration_draws, tokens=own.shift_tokens, seed=own.seed,
                                what="The training set", apart=True)[own.sft_data]


@resource(("score_tokens", "demonstrations", "demonstration_draws", "seed"), ("domain_data", "demonstrations"))
def domain_groups(run):
    """Domain -> its questions behind each draw of demonstrations from the same domain."""
    own = run.settings
    return groups.prompt_groups(tokenizer(run), questions(run), examples_set_aside(run), own.demonstrations,
                                own.demonstration_draws, tokens=own.score_tokens, seed=own.seed)


def _model_digest(run: OpenRun) -> str:
    from sts.engine.models import resolve_model
    return resolve_model(run.settings.model, run.settings.model_revision, run.results / "models", convert=False)[1]


def _sae_text_digest(run: OpenRun) -> str:
    own = groups.SaeTexts(run.settings.sae_text, None, run.settings.context)
    # Read before the tokenizer, which comes with the model: missing text is said at once.
    documents = [one for name, tokens in own.sources.items() for one in groups.documents_of(name, tokens)]
    chat: Any = None if all(isinstance(one, str) for one in documents) else tokenizer(run)
    return load.digest([one if isinstance(one, str) else render(  # as the model sees them, as recorded keys are
        chat, question_text(one), answer=solution_text(one)) for one in documents])


#: Input -> the settings that decide what it is, and a function of a run: its examples, or its digest.
INPUTS = {"model": (_MODEL, _model_digest), "sft_train": (_TRAINING, train), "sft_held_out": (_TRAINING, held_out),
          "domain_data": (_DOMAINS, lambda run: [questions(run), shots(run)]),
          "demonstrations": (_SET_ASIDE, examples_set_aside),
          "validation": (_VALIDATION, validation), "text_data": (_TEXTS, texts),
          "sae_text": ((*_MODEL, "sae_text"), _sae_text_digest),
          "pool_text": (_POOL, lambda run: load.digest([one for own in _pool_texts(run).values() for one in own])),
          "trial_problems": ((*_TRAINING, "sft_trial_examples"), trial),
          "generation_data": ((*_TRAINING, *_DOMAINS, *_SET_ASIDE, "eval_generate", "eval_limit", "demonstrations"),
                              benchmarks)}
#: Input made of other runs' keys -> those runs, and what is asked of each (run/others.py).
OTHERS: dict[str, tuple[Callable[[Any], list], tuple[str, ...]]] = {}


def identity(run: OpenRun, what: str) -> str:
    """A digest of something that a stage reads from outside, or of other stages' keys; `StsError` if it is not here."""
    if what in INPUTS:
        decided_by, make = INPUTS[what]
        return run.once(f"digest of {what}", decided_by, lambda: _digest(make(run)))
    if what == "sae":
        from sts.engine.saes import sae_identity

        return f"trained:{run.key('sae')}" if run.settings.sae == "train" else sae_identity(run.settings.sae)
    others, names = OTHERS[what]
    keys = [one.key(name) for one in others(run) for name in names]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def _digest(found: Any) -> str:
    return found if isinstance(found, str) else load.digest(_examples(found))


def _examples(value: Any) -> list[Example]:
    """All examples in nested lists, tuples and dicts, in order."""
    if isinstance(value, dict | list | tuple):
        return [one for part in (value.values() if isinstance(value, dict) else value) for one in _examples(part)]
    return [value] if isinstance(value, Example) else []
