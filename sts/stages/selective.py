"""Training linear read-outs of chosen latents and nothing else (Figure 7, Table 11): of those that demonstrations
shift, and of others."""

from __future__ import annotations

import itertools

import pandas
import torch

from sts.data.prompts import PromptGroup, solution_prompt
from sts.engine.evaluate import evaluate
from sts.engine.extract import paired_stats
from sts.engine.finetune import FineTuning, fine_tune
from sts.engine.readouts import ReadOuts, attached
from sts.engine.residuals import Extractor
from sts.engine.zeroing import lower_layers_once
from sts.errors import StsError
from sts.measure.items import crossed_mean_interval, item_measures, of_weakest_seed
from sts.measure.sets import latent_activity, sets_to_zero
from sts.run.stage import stage, steps

#: Sets whose read-outs are trained: those that demonstrations shift most, and three kinds of others.
KINDS = ("most_shifted", "most_active", "like_rate", "random")


@stage("parquet", version=2)
def selective(readers, fresh_lm, tuned, shift, shift_groups, train, held_out, masks, selective_latents, selective_draws,
              selective_examples, selective_lr, sft_epochs, sft_batch, sft_micro_batch, sft_max_length, eval_batch,
              seed, report, work, passes, scratch):
    """Bits per character of held-out problems' solutions after training the read-outs of one set of latents alone.

    One row a set and problem: kind (of `KINDS`; none: before training, untrained: read-outs as they begin, sft: by
    stage `sft`), latents (of each layer), draw, rate (mean firing rate on the solutions that are trained on) and energy
    (sum, likewise), lr, on ("held out", or "validation": as many training problems that are not trained on),
    example_id, bits. Of several learning rates a set is held to the best on validation. A set that failed to match has
    one row.
    """
    half = min(sae.cfg.d_sae for sae in readers.values()) // 2
    if not selective_latents or max(selective_latents) > half:
        raise StsError(f"selective_latents is {selective_latents}: name numbers of latents to train read-outs of, of 1 "
                       f"to {half}, half of what an SAE has, so that there are as many others.")
    lm, used, rates, by_layer = fresh_lm(), train[:selective_examples or None], {}, {}
    asked = {"held out": held_out}
    if len(selective_lr) > 1:
        asked["validation"] = train[len(used):][:len(held_out)]
        if len(asked["validation"]) < len(held_out):
            raise StsError("Of several selective_lr the best is chosen on training problems that selective_examples "
                           f"leaves over, as many as are held out; of {len(train)} these are "
                           f"{len(asked['validation'])}. Lower it, or name one rate.")
    prompts = tuple(solution_prompt(lm.tokenizer, example) for example in used)
    limits = dict(zip(readers, Extractor(lm, tuple(readers), **passes).sink_norms(prompts, masks.outlier_norm),
                      strict=True))
    for layer, sae in readers.items():
        moved = shift if len(readers) == 1 else paired_stats(  # a single layer is what stage `shift` has read
            lm, sae, layer, shift_groups, masks, **passes).to_tensors()
        active = paired_stats(lm, sae, layer, [PromptGroup(prompts, prompts)], masks, **passes).to_tensors()
        rates[layer], energy_L = latent_activity(active, sae.W_dec.detach().double().norm(dim=1).cpu(), tuned=False)
        by_layer[layer] = [one for one in sets_to_zero(moved["squared_difference_L"], energy_L, selective_latents,
                                                       selective_draws, seed, rates[layer]) if one.kind in KINDS]
    sets = [dict(zip(by_layer, own, strict=True)) for own in zip(*by_layer.values(), strict=True)]

    def bits(model, on="held out"):
        found = item_measures(evaluate(model, asked[on], kinds=("solution",), batch=eval_batch, work=work))
        return found.reset_index()[["example_id", "bits"]].assign(on=on)

    def added(own):
        read_outs = ReadOuts(readers, {layer: part.latents for layer, part in own.items()})
        return read_outs, attached(lm, read_outs, limits, masks.drop_first_positions)

    frames = [bits(tuned).assign(kind="sft")]
    with lower_layers_once(lm, min(readers), work):  # what lies below all read-outs is the same for every set
        frames.append(bits(lm).assign(kind="none"))
        with added(sets[0])[1]:
            frames.append(bits(lm).assign(kind="untrained"))
        for (own, lr), told in steps([*itertools.product(sets, selective_lr)], report):
            path = _kept(scratch, own, lr)
            if not path.exists() and all(part.usable for part in own.values()):
                read_outs, context = added(own)
                with context:
                    fine_tune(lm, used, [], FineTuning(sft_epochs, lr, sft_batch, sft_micro_batch, sft_max_length, 0, 1,
                                                       seed), scratch, module=read_outs, report=told, work=work)
                    pandas.concat([bits(lm, on) for on in asked]).to_parquet(path.with_suffix(".new"), index=False)
                path.with_suffix(".new").replace(path)  # killed before this line, the training counts as not begun
    for own in sets:
        tried = {lr: pandas.read_parquet(path) for lr in selective_lr if (path := _kept(scratch, own, lr)).exists()}
        loss = {lr: found.loc[found["on"] == [*asked][-1], "bits"].mean() for lr, found in tried.items()}
        best = min(loss, key=loss.__getitem__, default=None)
        found = pandas.concat([found[(found["on"] == "validation") | (lr == best)].assign(lr=lr)
                               for lr, found in tried.items()] or [pandas.DataFrame(index=[0])])
        part, *_ = own.values()
        frames.append(found.assign(
            kind=part.kind, latents=part.count, draw=part.draw, energy=sum(part.energy for part in own.values()),
            rate=torch.cat([rates[layer][part.latents] for layer, part in own.items()]).mean().item()))
    return pandas.concat(frames, ignore_index=True)


def _kept(scratch, own, lr):
    part, *_ = own.values()
    return scratch / f"{part.kind}-{part.count}-{part.draw}-{lr:g}.parquet"


@stage("parquet", also=("selective", "selective_latents"))
def read_out_leads(each_seed, selective_seeds, seed):
    """Bits per character of held-out problems that training read-outs of the estimated latents takes off more than
    others do: a row a seed, kind ("untrained", and those of `KINDS` that were trained) and number of latents, with mean
    and interval over problems and draws; largest: of the largest number; weakest: see `items.of_weakest_seed`."""
    rows = []
    for own in (one for one in each_seed if one.settings.seed in (seed, *selective_seeds)):
        bits = own.get("selective").query("on == 'held out'").fillna({"latents": 0, "draw": 0}).pivot(
            index=["kind", "latents", "draw"], columns="example_id", values="bits")
        counts = sorted(own.settings.selective_latents)
        for count, kind in itertools.product(counts, ("untrained", *KINDS[1:])):
            if (place := (kind, 0 if kind == "untrained" else count)) in bits.index:
                lead = crossed_mean_interval(bits.loc[place] - bits.loc["most_shifted", count].iloc[0],
                                             against_one=True)
                rows.append(lead._asdict() | {"kind": kind, "latents": count, "seed": own.settings.seed,
                                              "largest": count == counts[-1]})
    found = pandas.DataFrame(rows)
    return found.assign(weakest=of_weakest_seed(found, "kind", "latents"))
