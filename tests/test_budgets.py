"""Budgets: values for other costs are found, and cost what they say."""

import pytest
from tiny import BERT, Case, build, text_inputs
from transformers import BertForSequenceClassification

from hf_tokenprune import PruningConfig, count_macs, prune
from hf_tokenprune.training.budget import with_budgets


NATIVE = build(Case(BertForSequenceClassification, BERT))
INPUTS = text_inputs([60, 41])
DIFFRATE = PruningConfig.preset("diffrate", prune_kept=[30, 20, 14, 9], merge_kept=[22, 16, 10, 7])


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
