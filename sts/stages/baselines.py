"""Stages of the chapter on baselines: other forecasts of the same domains, one seed each.

Two stages run the model, `domain_raw_stats` and `domain_model_change`; all others work from stored sums.
"""

from __future__ import annotations

import numpy as np
import pandas
import torch

from sts.data.prompts import question_text
from sts.engine.evaluate import MEASURES
from sts.engine.extract import paired_stats
from sts.engine.finetune import load_tuned
from sts.engine.model_shift import model_paired_stats
from sts.engine.saes import identity_sae
from sts.errors import StsError
from sts.measure import baselines
from sts.measure.resampling import correlation_rows
from sts.measure.shift_stats import same_fraction
from sts.run.run import OpenRun, stage
from sts.stages.forecast import DOMAIN, MASKS, domain_groups, masks, split_domains
from sts.stages.sae import SAE
from sts.stages.shift import codes, of_kind

#: What of raw dimensions is kept: sums that some baseline uses.
RAW_FIELDS = ("tokens", "base_sum_L", "base_square_sum_L", "squared_difference_L")
SCORES = ("sts_act", "sts_icl")
RAW_DOMAIN = tuple(name for name in (*DOMAIN, *MASKS) if name not in SAE)


# --- passes through the model -------------------------------------------------------------------------------------

@stage("tensors", uses=RAW_DOMAIN, inputs=("model", "domain_data", "demonstrations"))
def domain_raw_stats(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """Stage `domain_stats` on the residual stream's own dimensions, behind the first draw of demonstrations alone."""
    groups, flat = domain_groups(run), {}
    for index, (domain, own) in enumerate(groups.items()):
        stats = paired_stats(run.lm, identity_sae(run.lm), run.settings.layer, own[:1], masks(run),
                             tokens_per_batch=run.settings.tokens_per_batch, work=report.work,
                             report=lambda f, index=index: report((index + f) / len(groups))).to_tensors()
        flat |= {f"{domain}/{name}": stats[name] for name in RAW_FIELDS}
    return flat


@stage("tensors", uses=(*DOMAIN, *MASKS), needs=("sft",), inputs=("model", "sae", "domain_data", "demonstrations"))
def domain_model_change(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """The same questions, without demonstrations, in the untuned and the tuned model: what `model_change` takes."""
    tuned, sae = load_tuned(run.load_model(), run.get("sft")), codes(run, "sae", "raw")
    groups, flat = domain_groups(run), {}
    for index, (domain, own) in enumerate(groups.items()):
        stats = sae.split(model_paired_stats(
            run.lm, tuned, sae, run.settings.layer, list(own[0].base), masks(run), work=report.work,
            tokens_per_batch=run.settings.tokens_per_batch,
            report=lambda f, index=index: report((index + f) / len(groups))).to_tensors())
        raw = of_kind(stats, "raw")
        flat |= {f"{domain}/tokens": raw["tokens"], f"{domain}/base_sum_L": raw["base_sum_L"],
                 f"{domain}/tuned_sum_L": raw["icl_sum_L"],
                 f"{domain}/squared_difference_L": raw["squared_difference_L"],
                 f"{domain}/latents_squared": stats["sae/squared_difference_L"].sum()[None]}
    return flat


# --- one value a domain -------------------------------------------------------------------------------------------

@stage("parquet", uses=("model", "model_revision"), inputs=("model", "sft_train", "domain_data"))
def text_baselines(run: OpenRun, report) -> pandas.DataFrame:
    """What the texts alone say: columns domain, questions, question_tokens (mean), tfidf (to the training set)."""
    texts = {domain: [question_text(example) for example in examples]
             for domain, examples in run.domain_examples().items()}
    similar = baselines.tfidf_similarity(texts, [question_text(example) for example in run.sft_examples("train")])
    lengths = {domain: np.mean([len(ids) for ids in run.lm.tokenizer(own, add_special_tokens=False)["input_ids"]])
               for domain, own in texts.items()}
    return pandas.DataFrame([{"domain": domain, "questions": len(own), "question_tokens": lengths[domain],
                              "tfidf": similar[domain]} for domain, own in texts.items()])


def answer_shortness(evaluation: pandas.DataFrame) -> pandas.Series:
    """Mean of 1 / characters of the scored solutions, by domain: what bits per character multiply a whole answer by.

    Args:
        evaluation: rows of `evaluate.evaluate`.
    """
    answers = evaluation[evaluation["kind"] == "solution"]
    return (1 / answers["characters"]).groupby(answers["domain"]).mean()


@stage("parquet", version=2, uses=("top_n",),
       needs=("scores", "shift", "shift_controls", "sft_shift", "domain_stats", "domain_raw_stats",
              "domain_model_change", "text_baselines", "domain_shift", "evaluation_before"))
def baseline_values(run: OpenRun, report) -> pandas.DataFrame:
    """Every baseline that is the same for all measures, for this seed: column domain, and one column a predictor."""
    domains, raw = split_domains(run.get("domain_stats")), split_domains(run.get("domain_raw_stats"))
    shift, raw_shift = run.get("shift"), of_kind(run.get("shift_controls"), "raw")
    count = run.settings.top_n
    width = len(shift["squared_difference_L"])
    raw_count = same_fraction(count, width, len(raw_shift["squared_difference_L"]))
    scores = run.get("scores").query("variant == 'paper'").set_index("domain")
    frame = pandas.DataFrame({score: scores[score] for score in SCORES}, index=list(domains))
    for name, table in (("all", baselines.dimension_scores(shift, domains, width)),
                        ("raw", baselines.dimension_scores(raw_shift, raw, raw_count)),
                        ("actual", baselines.dimension_scores(of_kind(run.get("sft_shift"), "sae"), domains, count))):
        frame = frame.join(table.add_prefix(f"{name}_"))
    frame["raw_square"] = baselines.mean_square(raw_shift, raw, raw_count)
    frame["cosine_raw"] = baselines.training_cosine(raw, raw_shift)
    frame["cosine_raw_centred"] = baselines.training_cosine(raw, raw_shift, centred=True)
    frame["cosine_sae"] = baselines.training_cosine(domains, shift)
    frame = frame.join(run.get("text_baselines").set_index("domain")[["tfidf", "question_tokens"]])
    shifts = run.get("domain_shift")
    for name, measure in (("base_bits", "bits"), ("base_bits_answer", "bits_answer")):
        before = shifts[shifts["measure"] == measure].set_index("domain")["before"]
        frame[name] = before.reindex(frame.index).astype(float)  # NaN where no solutions were evaluated
    frame["answer_shortness"] = answer_shortness(run.get("evaluation_before")).reindex(frame.index).astype(float)
    frame = frame.join(baselines.model_change(split_domains(run.get("domain_model_change"))))
    return frame.rename_axis("domain").reset_index()


@stage("tensors", version=2, uses=("top_n", "baseline_draws", "seed"), needs=("shift", "domain_stats"))
def random_latent_scores(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """`baselines.random_set_scores` with `baseline_draws` sets of latents of each kind, named kind/act_RD and so on."""
    settings, flat = run.settings, {}
    for done, kind in enumerate(baselines.RANDOM, 1):
        own = baselines.random_set_scores(kind, run.get("shift"), split_domains(run.get("domain_stats")),
                                          settings.top_n, settings.baseline_draws, settings.seed)
        flat |= {f"{kind}/{name}": tensor.float() for name, tensor in own.items()}
        report(done / len(baselines.RANDOM))
    return flat


# --- probes -------------------------------------------------------------------------------------------------------

def _shuffled(count: int, draws: int) -> np.ndarray:
    """Orders of domains; the same for every seed of a run, so that seeds can be averaged order by order."""
    return np.random.default_rng(0).permuted(np.tile(np.arange(count), (draws, 1)), axis=1)


@stage("json", uses=("baseline_draws",), needs=("domain_stats", "domain_raw_stats", "domain_shift"))
def probe_predictions(run: OpenRun, report) -> list[dict]:
    """Held-out predictions of ridge probes on mean activations, for every measure, and what shuffled targets give.

    One row a measure and kind of features (raw, sae): domains, actual, predicted, r_squared (out of sample),
    shuffled (Pearson's r of held-out predictions with the target, for targets shuffled over domains); or `undefined`.
    """
    features = {"raw": split_domains(run.get("domain_raw_stats")), "sae": split_domains(run.get("domain_stats"))}
    shifts, rows = run.get("domain_shift"), []
    measures = [measure for measure in MEASURES if (shifts["measure"] == measure).any()]
    for done, measure in enumerate(measures, 1):
        actual = shifts[shifts["measure"] == measure].set_index("domain")["shift"].abs().sort_index()
        targets_DP = np.column_stack([actual, actual.to_numpy()[_shuffled(len(actual), run.settings.baseline_draws)].T])
        for kind, stats in features.items():
            own = baselines.mean_vectors({domain: stats[domain] for domain in actual.index}).numpy()
            row = {"measure": measure, "features": kind, "domains": list(actual.index), "actual": actual.tolist()}
            try:
                predicted_DP = baselines.held_out_predictions(own, targets_DP)
                row["r_squared"] = baselines.out_of_sample_r_squared(actual.to_numpy(), predicted_DP[:, 0])
            except StsError as error:
                rows.append(row | {"undefined": str(error)})
                continue
            shuffled = correlation_rows(predicted_DP.T[1:], targets_DP.T[1:])
            rows.append(row | {"predicted": predicted_DP[:, 0].tolist(), "shuffled": shuffled.tolist()})
        report(done / len(measures))
    return rows
