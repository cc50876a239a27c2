"""Costs: plans by hand."""

import math
from dataclasses import fields, replace

import pytest

from sts.data.prompts import Prompt, PromptGroup
from sts.errors import StsError
from sts.measure import cost

# --- a plan, by hand ---

#: Four layers, two of them read, so that costs can be worked out on paper.
TOY = cost.Architecture("toy", 4, 1000, sae_layer=1, sae_latents=7)
SMALL = cost.Settings(shift_tokens=100, shift_demonstrations=2, domains=3, score_tokens=40, demonstrations=5,
                      sft_examples=6, sft_epochs=2, sft_max_length=50, passes_per_trained_token=3,
                      evaluated_questions=30)
ASSUMED = cost.Assumptions(sft_question_tokens=10, sft_solution_tokens=30, question_tokens=20, demonstration_tokens=8,
                           generated_tokens=5, demonstration_sets=2, evaluation_prefix_cached=True)


def test_the_forecasts_passes_by_hand():
    # Training questions: 100 twice, and two sets of 2 x 40; each of 3 domains: 40 twice, and two sets of 5 x 8. Two of
    # four layers are run.
    assert cost.forecast_cost(TOY, SMALL, ASSUMED) == ((200 + 2 * 80) + 3 * (80 + 2 * 40)) / 2
    # Not shared: 10 training questions and 2 questions a domain each run their own.
    assert cost.forecast_cost(TOY, SMALL, ASSUMED, cached=False) == ((200 + 10 * 80) + 3 * (80 + 2 * 40)) / 2


def test_training_and_evaluation_by_hand():
    assert cost.training_cost(SMALL, ASSUMED) == 3 * 6 * 2 * 40
    assert cost.evaluation_cost(SMALL, ASSUMED) == 2 * (3 * 40 + 30 * 25)
    again = cost.evaluation_cost(SMALL, replace(ASSUMED, evaluation_prefix_cached=False))
    assert again == 2 * (30 * 40 + 30 * 25)
    assert cost.ratio(TOY, SMALL, ASSUMED) == (3 * 480 + 2 * 870) / (840 / 2)


def test_long_solutions_are_cut_to_the_training_length_and_demonstrations_to_the_context():
    long = replace(ASSUMED, sft_solution_tokens=900)
    assert cost.training_cost(SMALL, long) == 3 * 6 * 2 * 50
    narrow = replace(TOY, context=60)  # two demonstrations of 50 leave no room for 10; 50 fit
    assert cost.forecast_cost(narrow, SMALL, long) == ((200 + 2 * 50) + 3 * (80 + 2 * 40)) / 2


def test_sharing_demonstrations_never_costs_more():
    few = replace(ASSUMED, demonstration_sets=50)
    assert cost.forecast_cost(TOY, SMALL, few) == cost.forecast_cost(TOY, SMALL, few, cached=False)


@pytest.mark.parametrize("name", [field.name for field in fields(cost.Assumptions) if field.type == "int"])
@pytest.mark.parametrize("value", [0, -1, 10**10, math.nan])
def test_an_impossible_assumption_is_refused(name, value):
    with pytest.raises(StsError, match=f"'{name}' must be a number from 1 to 1,000,000,000; got {value}"):
        cost.Assumptions(**{name: value})


def test_the_largest_values_that_are_accepted_give_finite_numbers():
    largest = cost.Assumptions(*[cost.LARGEST] * 6)
    assert all(math.isfinite(cost.ratio(one, cost.Settings(), largest)) for one in cost.ARCHITECTURES.values())


def test_prompts_are_counted_whole():
    group = PromptGroup((Prompt((1, 2, 3), (1, 3)),), (Prompt((1, 9, 9, 2, 3), (3, 5)),))
    assert cost.prompt_tokens([group, group]) == {"prompts": 4, "tokens": 16}
