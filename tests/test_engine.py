"""The engine's economy: what it asks of the host, what it holds in memory, what it shows in a profile."""

import pytest
import torch
from methods import METHODS, pruned
from tiny import BERT, HEADS, VIT, Case, build, image_inputs, inputs_for, text_inputs
from torch.profiler import ProfilerActivity, profile
from transformers import BertForSequenceClassification, ViTForImageClassification

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.modeling import token_layer
from hf_tokenprune.profiling import Timing, peak_memory, speedup, speedup_bound, time_interleaved


TEXT = Case(BertForSequenceClassification, BERT)
SITES = [0, 1, 2]
FIXED = PruningConfig.preset("top_k", layers=SITES, keep_rate=0.7)
ADAPTIVE = PruningConfig.preset("adaptive", layers=SITES, threshold=0.7)


@pytest.fixture
def synchronisations(monkeypatch) -> list[str]:
    """Every question that an accelerator would have to be waited for. The engine asks the host alone for `nonzero`."""
    asked: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, _name=name, _original=original: asked.append(_name) or _original(self)
        )
    return asked


@pytest.mark.parametrize(
    "pruning, lengths, expected",
    [
        (None, [17, 5, 30], 1),
        (FIXED, [17, 5, 30], 1),
        (FIXED, [20, 20], 1),
        (ADAPTIVE, [17, 5, 30], 1 + len(SITES)),
        (METHODS["adaptive_prior"], [17, 5, 30], 1 + 3),
    ],
    ids=["nothing", "fixed", "fixed_uniform", "adaptive", "table"],
)
def test_one_question_for_the_lengths_and_one_per_adaptive_site(pruning, lengths, expected, synchronisations):
    model, inputs = pruned(build(TEXT), pruning), text_inputs(lengths)
    with torch.no_grad():
        model(**inputs)  # whether a table is filled is asked once
        synchronisations.clear()
        model(**inputs)
    assert synchronisations == ["tolist"] * expected


def test_images_of_a_fixed_rate_ask_nothing(synchronisations):
    model, inputs = prune(build(Case(ViTForImageClassification, VIT)), FIXED), image_inputs(3)
    synchronisations.clear()
    with torch.no_grad():
        model(**inputs)
    assert synchronisations == []


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("pruning", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_feed_forward_in_parts_changes_nothing(case, pruning, monkeypatch):
    model, inputs = prune(build(case), pruning), inputs_for(case)
    with torch.no_grad():
        whole = model(**inputs).logits
        monkeypatch.setattr(token_layer, "FEED_FORWARD_ROWS", 7)
        rows = []
        for layer in model.modules():
            if isinstance(layer, token_layer.TokenPruneLayer):
                block = layer.feed_forward_block
                monkeypatch.setattr(
                    layer, "feed_forward_block", lambda part, block=block: rows.append(len(part)) or block(part)
                )
        torch.testing.assert_close(model(**inputs).logits, whole, atol=1e-5, rtol=1e-5)
    assert max(rows) < 2 * 7


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("pruning", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_peak_memory_is_below_the_stock_models(batch, pruning):
    native = build(TEXT)
    model, inputs = prune(native, pruning), text_inputs([32] * batch)
    with torch.inference_mode():
        ours, stock = (peak_memory(lambda run=run: run(**inputs)) for run in (model, native))
    assert 0 < ours < stock


STEPPED = {
    "drop": FIXED,
    "before": {"preset": "dynamicvit", "layers": SITES, "base_rate": 0.5},
    "merge": {"preset": "tome", "r": 4},
    "shift": PruningConfig.preset("top_k", layers=SITES, keep_rate=0.5, saliency="residual_shift"),
}


@pytest.mark.parametrize("method", STEPPED)
def test_the_profile_names_what_pruning_adds_step_by_step(method):
    model, inputs = prune(build(TEXT), STEPPED[method]), text_inputs([20, 20])
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(**inputs)
    steps = ["", ": score", ": select", ": reduce"]
    names = {event.key for event in profiler.key_averages()}
    assert {f"tokenprune: layer {layer}{step}" for layer in SITES for step in steps} <= names


def test_the_profile_names_how_ragged_rows_attend():
    model, inputs = prune(build(TEXT), FIXED), text_inputs([20, 20, 9])
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(**inputs)
    assert "tokenprune: attention in 2 runs of equal lengths" in {event.key for event in profiler.key_averages()}


def test_peak_memory_counts_what_lives_at_once():
    def call() -> None:
        torch.ones(1000)  # gone at once
        first = torch.ones(2000)
        first + first

    assert peak_memory(call) == 4 * (2000 + 2000)


def test_the_bound_of_a_speedup():
    fast = Timing(tuple(1.0 for _ in range(31)))
    slow = Timing(tuple(2.0 + 0.01 * (i % 5) for i in range(31)))
    assert 2.0 <= speedup_bound(slow, fast) <= speedup(slow, fast)
    assert speedup_bound(fast, fast) == 1.0


@pytest.mark.parametrize("rounds", [1, 3, 4, 5])
def test_a_bound_takes_five_rounds(rounds):
    slow, fast = (Timing((seconds,) * rounds) for seconds in (2.0, 1.0))
    assert speedup_bound(slow, fast) == (2.0 if rounds == 5 else 0.0)


def test_quartiles_lie_within_what_was_measured():
    assert Timing((1.0, 2.0)).spread == (1.25, 1.75)
    assert Timing((10.0, 1.0, 2.0)).spread == (1.5, 6.0)
    assert Timing((3.0,)).spread == (3.0, 3.0)


def test_no_round_is_begun_after_the_time_is_up():
    timings = time_interleaved({"a": lambda: None}, rounds=50, seconds=0.0)
    assert len(timings["a"].seconds) == 3
