"""What latents fire on, and that text from data sets cannot break a page."""

import pytest
import torch
from safetensors.torch import save_file

from sts.engine.extract import LatentStats
from sts.engine.latent_examples import cards_html, latent_statistics, spread_by_rate, top_contexts
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
    card, other = top_contexts(Sae, activations, PIECES, Tokenizer, [0, 1], top=2, before=2, after=1)
    assert card["rate"] == pytest.approx(5 / 7)
    assert [context["value"] for context in card["contexts"]] == [5.0, 3.0]  # 4.0 stands in the same text as 5.0
    best = card["contexts"][0]
    assert best["tokens"] == ["tok1", "tok2", "<script>alert(1)</script>", "a & b\n"]
    assert best["values"] == [1.0, 0.0, 5.0, 4.0]
    assert best["tokens"][best["peak"]] == "<script>alert(1)</script>"
    assert [context["value"] for context in other["contexts"]] == [7.0, 2.0]


def test_text_is_escaped(activations):
    page = cards_html(top_contexts(Sae, activations, PIECES, Tokenizer, [0]))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "a &amp; b" in page


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
