"""Passes that start above the lower layers give what whole passes give."""

import pytest
import torch
from helpers import topk_sae

from sts.data.sources import Example
from sts.engine.evaluate import evaluate
from sts.engine.zeroing import lower_layers_once
from sts.engine.models import decoder_layers
from sts.engine.work import Work
from sts.engine.zeroing import zeroed
from sts.errors import StsError

EXAMPLES = [Example(str(count), "math", f"A farmer has {count} sheep. How many legs?", (), -1, str(4 * count),
                    f"{count} times 4 is {4 * count}." * (1 + count // 7)) for count in range(3, 10)]
CHOICE = Example("c", "math", "How many legs does a sheep have? " * 9, ("four", "five"), 0, "four", "Count them.")


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_scores_with_latents_zeroed_are_the_same(lm_of, family, layer):
    lm, sae, sets = lm_of(family), topk_sae(64), ([], range(0, 96, 2), [3, 5], range(96))

    def scores() -> list[list[float]]:
        found = []
        for latents in sets:
            with zeroed(lm, sae, layer, latents):
                found.append(evaluate(lm, [*EXAMPLES, CHOICE], batch=3)["loglikelihood"].tolist())
        return found

    whole = scores()
    with lower_layers_once(lm, layer):
        assert scores() == whole
    assert len({tuple(row) for row in whole}) == 4
    assert scores() == whole and all("forward" not in vars(one) for one in decoder_layers(lm.model))


def test_lower_layers_run_once_and_what_did_not_run_is_not_counted(lm_of):
    lm, once, twice, ran = lm_of("llama"), Work(), Work(), []
    handles = [one.mlp.register_forward_pre_hook(lambda module, args, place=place: ran.append(place))
               for place, one in enumerate(decoder_layers(lm.model))]
    evaluate(lm, EXAMPLES, batch=3, work=once)
    passes = ran.count(0)
    assert passes == ran.count(1) == 3
    ran.clear()
    with lower_layers_once(lm, 0, twice):
        for _ in range(2):
            evaluate(lm, EXAMPLES, batch=3, work=twice)
    for handle in handles:
        handle.remove()
    assert (ran.count(0), ran.count(1)) == (passes, 2 * passes)
    # The second time, one of the two layers ran.
    assert twice.layer_tokens == once.layer_tokens * 1.5 and twice.tokens == 2 * once.tokens


def test_passes_that_depend_on_more_than_their_tokens_run_in_full(lm_of):
    lm = lm_of("llama")
    ids_BP = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    mask_BP = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def logits(**inputs):
        with torch.no_grad():
            return lm.model(input_ids=ids_BP, **inputs).logits

    ways = ({"use_cache": False}, {"use_cache": False, "attention_mask": mask_BP}, {"use_cache": True}, {},
            {"use_cache": False, "position_ids": torch.arange(5, 9)[None]})
    plain = [logits(**inputs) for inputs in ways]
    assert not torch.equal(plain[0], plain[1])
    with lower_layers_once(lm, 0):
        for _ in range(2):
            assert all(torch.equal(logits(**inputs), one) for inputs, one in zip(ways, plain, strict=True))


def test_the_model_is_itself_again_after_an_error(lm_of):
    lm = lm_of("llama")
    with pytest.raises(KeyboardInterrupt), lower_layers_once(lm, 1):
        raise KeyboardInterrupt
    assert all("forward" not in vars(one) for one in decoder_layers(lm.model))
    assert not lm.model._forward_pre_hooks
    with pytest.raises(StsError, match="Layer 9"), lower_layers_once(lm, 9):
        pass
