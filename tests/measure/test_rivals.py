"""Rivals' formulas against loops, numbers worked out by hand, scipy and simulation."""

import numpy as np
import pytest
import torch

from sts.measure import rivals


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# --- projection difference ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("chosen", [None, [4, 0, 2]])
def test_projection_difference_is_a_loop_over_examples_and_domains(chosen):
    training, own, answers = random(5, 6), random(5, 6, seed=1), random(3, 6, seed=2)
    found = rivals.projection_difference(training, own, answers, *([] if chosen is None else [torch.tensor(chosen)]))
    kept = range(6) if chosen is None else chosen
    for example in range(5):
        for domain in range(3):
            toward = [answers[domain, j].item() - np.mean([answers[other, j].item() for other in range(3)])
                      for j in kept]
            length = sum(part**2 for part in toward) ** 0.5
            moved = [training[example, j].item() - own[example, j].item() for j in kept]
            assert found[example, domain].item() == pytest.approx(
                sum(one * other for one, other in zip(toward, moved, strict=True)) / length)


def test_a_training_set_that_says_what_the_model_says_moves_nothing_and_two_domains_move_oppositely():
    own, answers = random(4, 6), random(2, 6, seed=1)
    assert not rivals.projection_difference(own, own, answers).any()
    first, second = rivals.projection_difference(own + answers[0] - answers[1], own, answers).mean(0).tolist()
    assert first > 0 and second == pytest.approx(-first)
