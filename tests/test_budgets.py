"""Budgets: values for other costs are found, and cost what they say."""

import pytest
from methods import METHODS
from tiny import BERT, Case, build, text_inputs
from transformers import BertForSequenceClassification

from hf_tokenprune import PruningConfig, PruningStage, count_macs, prune
from hf_tokenprune.training.budget import with_budgets


NATIVE = build(Case(BertForSequenceClassification, BERT))
INPUTS = text_inputs([60, 41])
DIFFRATE = METHODS["diffrate"]


def ratio(pruning: PruningConfig | None) -> float:
    return count_macs(prune(NATIVE, pruning), INPUTS).ratio


def test_a_cut_gives_way_to_values_beyond_it():
    shares = [ratio(DIFFRATE.eased(step / 10, 64)) for step in range(11)]
    assert shares == sorted(shares, reverse=True) and shares[-1] == ratio(DIFFRATE)
    found = with_budgets(DIFFRATE, [0.5, 0.65], ratio, 64)
    assert PruningConfig.from_dict(found.to_dict()) == found
    model = prune(NATIVE, found)
    model.set_budget(1.0)
    for macs in (0.65, 0.5):  # the cut is not lost on the way
        model.set_budget(macs)
        assert count_macs(model, INPUTS).ratio == pytest.approx(macs, abs=0.02)
    assert DIFFRATE.eased(1.0, 64) == DIFFRATE


@pytest.mark.parametrize("name", ["diffrate", "power_bert"])
def test_the_whole_budget_prunes_nothing_however_long_the_input(name):
    model = prune(NATIVE, with_budgets(METHODS[name], [0.6], ratio, 30))  # as if the longest input had 30 tokens
    model.set_pruning(model.config.pruning.at_budget(1.0, 30))
    count = count_macs(model, INPUTS)
    assert count.total == count.lossless  # no score either
    before = [count_macs(model, INPUTS).total]
    for macs in (0.9, 0.75, 0.6):
        model.set_pruning(model.config.pruning.at_budget(macs, 30))
        before.append(count_macs(model, INPUTS).total)
    assert before == sorted(before, reverse=True)


def test_values_fall_by_layer_and_not_by_stage():
    late, early = (
        PruningStage([layer], "received_attention", "keep_count", [value]) for layer, value in ((2, 5), (0, 20))
    )
    pruning = PruningConfig(stages=[late, early])
    assert pruning.with_learned([5, 20]).values == (5, 20)
    assert pruning.with_learned([20, 5]).values == (5, 5)  # layer 2 has what layer 0 has
    for values, what in (([9, 5], "a budget's keep_count"), ([5], "values")):
        with pytest.raises(ValueError, match=what):
            PruningConfig(stages=[late, early], budgets=[[0.4, values]])
    assert PruningConfig(stages=[late, early], budgets=[[0.4, [3, 9]]]).at_budget(0.4, 64).values == (3, 9)
