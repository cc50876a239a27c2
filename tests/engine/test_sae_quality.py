"""What latents fire on, how strongly, and what they promote."""

import pytest
import torch
from helpers import topk_sae
from safetensors.torch import save_file

from sts.engine.latents import LatentStats
from sts.engine.sae_quality import Firings, latent_statistics, promoted_tokens, spread_by_rate, strengths, top_contexts
from sts.errors import StsError


class Sae:
    """Three latents that read the three coordinates of the residual stream."""

    dtype, device, activation_fn = torch.float32, "cpu", torch.relu

    class cfg:
        d_sae = 3

    @staticmethod
    def encode(x_TD):
        return torch.relu(x_TD)


class Tokenizer:
    @staticmethod
    def decode(ids):
        return {3: "<script>alert(1)</script>", 4: "a & b\n"}.get(ids[0], f"tok{ids[0]}")


PIECES = [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]


@pytest.fixture
def activations(tmp_path):
    rows = [(0, 1, [1, 0, 0]), (0, 3, [5, 0, 0]), (0, 4, [4, -1, 0]), (1, 1, [0, 2, 0]), (1, 2, [2, 0, 0]),
            (2, 1, [3, 0, 0]), (2, 3, [0, 7, 0])]
    save_file({"activations_TD": torch.tensor([row[2] for row in rows], dtype=torch.bfloat16),
               "piece_T": torch.tensor([row[0] for row in rows]),
               "position_T": torch.tensor([row[1] for row in rows])}, tmp_path / "shard-00000.safetensors")
    return tmp_path


def test_top_contexts_are_the_largest_activations_one_a_text(activations):
    firings = Firings(Sae, activations, PIECES, Tokenizer, [0, 1])
    assert [(card["latent"], card["rate"]) for card in top_contexts(firings)] == [(0, 5 / 7), (1, 2 / 7)]
    contexts = firings.contexts(0, top=2, before=2, after=1)
    assert [context["value"] for context in contexts] == [5.0, 3.0]  # 4.0 stands in the same text as 5.0
    assert contexts[0]["tokens"] == ["tok1", "tok2", "<script>alert(1)</script>", "a & b\n"]
    assert contexts[0]["values"] == [1.0, 0.0, 5.0, 4.0]
    assert contexts[0]["peak"] == 2
    assert [context["value"] for context in firings.contexts(1)] == [7.0, 2.0]
    # Of the three texts with 5, 3 and 2, the nearest to 2.5 are the last two.
    assert {context["value"] for context in firings.contexts(0, 2.4, top=2)} == {3.0, 2.0}
    assert [context["value"] for context in firings.contexts(0, 2.4, shown=2)] == [2.0]


def test_strengths_count_every_firing_and_show_middling_texts(activations):
    row, silent = strengths(Firings(Sae, activations, PIECES, Tokenizer, [0, 2]))
    assert sum(row["histogram"]) == 5 and row["histogram"][-1] == 1  # of 1 to 5, one token is at the largest value
    assert row["middling"] == []  # all three texts are shown as the strongest
    assert silent["middling"] == []


def test_middling_texts_are_others_than_the_strongest(tmp_path):
    values = [8.0, 7.0, 6.0, 5.0, 4.5, 4.0, 1.0]  # one a text; four are shown as the strongest
    save_file({"activations_TD": torch.tensor([[value, 0, 0] for value in values], dtype=torch.bfloat16),
               "piece_T": torch.arange(7), "position_T": torch.ones(7, dtype=torch.long)},
              tmp_path / "shard-00000.safetensors")
    row, = strengths(Firings(Sae, tmp_path, [[0, 1, 2]] * 7, Tokenizer, [0]))
    assert [context["value"] for context in row["middling"]] == [4.0, 4.5]


def test_promoted_tokens_are_those_that_a_step_along_the_decoder_direction_raises(lm_of):
    lm, sae = lm_of("gemma3"), topk_sae(64)
    row, = promoted_tokens(lm, sae, [5], top=3)
    weight_D = 1 + lm.model.model.norm.weight.detach()  # Gemma's norms multiply by one plus their weight
    logits_V = lm.model.lm_head.weight @ (weight_D * sae.W_dec[5])
    order = logits_V.argsort(descending=True).tolist()
    assert row["promoted"] == [lm.tokenizer.decode([token]) for token in order[:3]]
    assert row["demoted"] == [lm.tokenizer.decode([token]) for token in order[:-4:-1]]


def test_statistics_match_a_hand_count(activations):
    stats = latent_statistics(Sae, activations)
    assert stats.tokens == 7
    assert stats.fired_L.tolist() == [5, 2, 0]
    assert stats.max_L.tolist() == [5, 7, 0]


def test_latents_are_chosen_at_even_steps_of_firing_rate():
    stats = LatentStats(1000, tokens=100_000)
    stats.fired_L = torch.arange(1000, dtype=torch.float64).flip(0) * 10  # latent 0 fires most
    chosen = spread_by_rate(stats, 5)
    rates = [stats.fired_L[index].item() / 100_000 for index in chosen]
    assert rates == sorted(rates) and rates[0] >= 0.0005 and rates[-1] <= 0.05
    steps = [b - a for a, b in zip(rates, rates[1:], strict=False)]
    assert max(steps) - min(steps) < 0.0005
    with pytest.raises(StsError, match="only 0 fire"):
        spread_by_rate(LatentStats(10, tokens=5), 3)
