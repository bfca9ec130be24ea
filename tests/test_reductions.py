"""What becomes of tokens: gradients of every reduction, and the flaws of reference codes that must not be here."""

from dataclasses import replace

import pytest
import torch
from methods import METHODS, pruned
from tiny import BASES, BERT, EXECUTIONS, VIT, Case, build, image_inputs, inputs_for, main_output, text_inputs
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from transformers import BertModel, ViTModel

from hf_tokenprune import PruningConfig, PruningStage, prune
from hf_tokenprune.modeling.pruning_stage import FUSIONS, MERGES
from hf_tokenprune.modeling.reduction import fuse, merge
from hf_tokenprune.modeling.saliency import first_token_scores, received_scores
from hf_tokenprune.modeling.selection import Scores, select
from hf_tokenprune.modeling.token_layer import TokenPruneLayer
from hf_tokenprune.modeling.token_state import blended, start_state


TEXT = Case(BertModel, BERT)
EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)
OF_EMBEDDINGS = [name for name in METHODS if name != "adaptive_prior"]  # which looks ids up


# Gradients


def _state(lengths: list[int], execution: str) -> object:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return start_state(mask, *mask.shape, execution=execution, prefix=1, device=mask.device)


def _site(reduction: str, kept: int) -> object:
    return PruningStage([0], "cls_attention", "keep_count", [kept], reduction).sites()[0]


@EXECUTION
@pytest.mark.parametrize("reduction", [*FUSIONS, *MERGES])
def test_gradient_of_the_reduced_rows(execution, reduction):
    """In the old rows, and for fusions in the saliency, too."""
    generator = torch.Generator().manual_seed(3)
    state, site = _state([7, 4], execution), _site(reduction, kept=3)
    state = state._replace(size=torch.ones(2, 7))
    hidden = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    saliency = torch.rand(2, 7, generator=generator, dtype=torch.float64).masked_fill(~state.alive, 0.0)

    def reduced(padded: torch.Tensor, saliency: torch.Tensor) -> torch.Tensor:
        scores, hidden = Scores(saliency), state.layout.enter(padded)
        selection = select(scores, state, site, min_tokens=1)
        if reduction in FUSIONS:
            blend = fuse(scores, state, selection, reduction == "fuse_normalized")
        else:
            blend = merge(scores, state, selection, hidden, reduction == "merge_mean")
        after = state.after(selection, blend).layout
        return blended(hidden, state.layout, after, selection, blend)

    assert gradcheck(reduced, (hidden.requires_grad_(), saliency.requires_grad_(reduction in FUSIONS)))


@EXECUTION
def test_gradient_of_the_scores(execution):
    generator = torch.Generator().manual_seed(3)
    rows = _state([5, 3], execution).layout
    query, key, value = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = (rows.enter(x) for x in (query, key, value))
        first = rows.first(query)
        return (
            first_token_scores(first, key, rows, 0.7, 2),
            first_token_scores(first, key, rows, 0.7, 2, value=value),
            received_scores(query, key, rows, 0.7, 2),
            received_scores(query, key, rows, 0.7, 2, diagonal=False),
        )

    assert gradcheck(scores, tuple(x.requires_grad_() for x in (query, key, value)))


@pytest.mark.parametrize("method", OF_EMBEDDINGS)
def test_gradient_of_the_whole_model(method):
    """By finite differences in a random direction of the embeddings: no decision changes at such a step."""
    model = pruned(build(TEXT).double(), METHODS[method])
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 12, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(12) < torch.tensor([12, 7])[:, None]

    def output(embeddings: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state

    assert gradcheck(output, (embeddings,), fast_mode=True)


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_learns(case, method):
    """Through every reduction there is a gradient to the weights of the layers before it."""
    model = pruned(build(case), METHODS[method])
    main_output(model(**inputs_for(case))).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "token_predictor" in name or "pooler" in name or "mask_token" in name:
            continue  # a predictor only chooses; the others are not used here
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    first = next(module for module in model.modules() if isinstance(module, TokenPruneLayer))
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in first.named_parameters() if "weight" in name)


# Flaws of reference codes


def _silenced(part: str) -> nn.Module:
    """A BERT in which every key, or value, is zero."""
    native = build(TEXT)
    for layer in native.encoder.layer:
        nn.init.zeros_(getattr(layer.attention.self, part).weight)
        nn.init.zeros_(getattr(layer.attention.self, part).bias)
    return native


@EXECUTION
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("method", METHODS)
def test_zero_norms_give_numbers(execution, part, method):
    model = pruned(_silenced(part), replace(METHODS[method], execution=execution))
    with torch.no_grad():
        outputs = model(**text_inputs([17, 9]), output_token_trace=True)
    assert outputs.last_hidden_state.isfinite().all()
    assert (outputs.token_trace.source[..., 0] == 0).all()


@EXECUTION
@pytest.mark.parametrize("lengths", [[1], [2], [3, 1], [2, 2], [4, 30]], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_few_tokens_are_no_special_case(execution, lengths, method):
    """Counts that do not change, nothing to merge, nothing to fuse."""
    model = pruned(build(TEXT), replace(METHODS[method], execution=execution))
    with torch.no_grad():
        outputs = model(**text_inputs(lengths), output_token_trace=True)
    assert outputs.last_hidden_state.isfinite().all()
    assert (outputs.token_trace.counts >= 1).all()


@EXECUTION
def test_a_rate_at_which_nothing_goes_fuses_nothing(execution):
    pruning = PruningConfig.preset("evit", layers=[1, 2], keep_rate=0.95, execution=execution)
    native, inputs = build(TEXT), text_inputs([11, 30])
    with torch.no_grad():
        outputs = prune(native, pruning)(**inputs, output_token_trace=True)
        expected = native(input_ids=inputs["input_ids"][:1, :11]).last_hidden_state
    # ceil(0.95 x 10) = 10 of the first text stay, and no row of zeros comes to them; ceil(0.95 x 29) = 28 of the other.
    assert outputs.token_trace.counts.tolist() == [[11, 30], [11, 30]]
    assert outputs.token_trace.sizes[0, 1].tolist() == [1.0] * 30
    assert_close(outputs.last_hidden_state[:1, :11], expected, rtol=0, atol=1e-5)


@EXECUTION
@pytest.mark.parametrize("method", OF_EMBEDDINGS)
def test_what_is_no_number_stays_in_its_sample(execution, method):
    model = pruned(build(TEXT), replace(METHODS[method], execution=execution))
    embeddings = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1))
    embeddings[1] = torch.nan
    mask = torch.arange(20) < torch.tensor([7, 20, 12])[:, None]
    with torch.no_grad():
        outputs = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    assert outputs[[0, 2]].isfinite().all()


@pytest.mark.parametrize("method", ["top_k", "evit", "diffrate", "tome"])
def test_protected_tokens_stay_in_a_compiled_model(method):
    model = pruned(build(TEXT), replace(METHODS[method], protected_token_ids=tuple(range(1, 30))))
    inputs = text_inputs([20, 20, 11])
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, backend="eager")
    with torch.no_grad():
        ours, theirs = model(**inputs).pooler_output, compiled(**inputs).pooler_output
    assert_close(theirs, ours, rtol=0, atol=1e-5)


@EXECUTION
def test_more_merges_than_tokens(execution):
    model = prune(build(Case(ViTModel, VIT)), PruningConfig.preset("tome", r=1000, execution=execution))
    with torch.no_grad():
        trace = model(**image_inputs(2), output_token_trace=True).token_trace
    assert trace.counts[:, 0].tolist() == [19, 10, 6, 4]  # 37 less half of the 36 patches, and so on
    assert trace.sizes.sum(dim=-1).eq(37).all()


@EXECUTION
def test_sizes_of_unlike_tokens_stay_positive(execution):
    """Similarities below zero are no reason for the logarithm of a negative size."""
    state = _state([5], execution)._replace(size=torch.ones(1, 5))
    hidden = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]]])
    scores = Scores(torch.tensor([[0.3, 0.3, 0.2, 0.1, 0.1]]))
    selection = select(scores, state, _site("merge_mean", kept=2), min_tokens=1)
    blend = merge(scores, state, selection, state.layout.enter(hidden), mean=True)
    assert blend.target.tolist() == [[1, 1, 1]]
    assert blend.size.log().isfinite().all()


@EXECUTION
def test_scores_that_change_with_padding_are_a_switch(execution):
    """LTP divides by the padded length: kept as `padded_scores`, and not what you get without it."""
    native = build(TEXT)

    def kept(padded_scores: bool, padding: int) -> list:
        pruning = PruningConfig.preset("ltp", thresholds=[0.0, 0.045], padded_scores=padded_scores, execution=execution)
        with torch.no_grad():
            outputs = prune(native, pruning)(**text_inputs([20], padding=padding), output_token_trace=True)
        return outputs.token_trace.counts.tolist()

    assert kept(False, 0) == kept(False, 30) == kept(True, 0)
    assert kept(True, 30) != kept(True, 0)


@EXECUTION
def test_merging_stays_within_a_sample(execution):
    """The same images in another company: nothing of it shows."""
    model = prune(build(Case(ViTModel, VIT)), PruningConfig.preset("tome", r=6, execution=execution))
    images = image_inputs(4, seed=5)["pixel_values"]
    with torch.no_grad():
        whole = model(pixel_values=images).last_hidden_state
        mixed = model(pixel_values=torch.cat([images[2:3], 50 * images[:1], images[1:2]])).last_hidden_state
    assert_close(mixed[[0, 2]], whole[[2, 1]], rtol=0, atol=1e-5)


def test_an_earlier_fused_token_is_an_ordinary_candidate():
    """It may be kept, and it may be fused once more."""
    fused_again = kept = 0
    for seed in range(6):
        model = prune(build(TEXT, seed=seed), PruningConfig.preset("evit", layers=[0, 1, 2], keep_rate=0.6))
        with torch.no_grad():
            trace = model(**text_inputs([30], seed=seed), output_token_trace=True).token_trace
        for before, after, count in zip(trace.source[:-1, 0], trace.source[1:, 0], trace.counts[1:, 0]):
            group = before == before.max()  # the fused token lies last
            alone = (after == after[group][0]).sum() == group.sum()
            last = after[group][0] == count - 1
            fused_again += int(last and not alone)
            kept += int(alone and not last)
    assert fused_again and kept


def test_random_scores_are_spread_evenly_and_follow_the_seed():
    from hf_tokenprune.modeling.saliency import random_scores

    state = _state([1000, 640], "packed")
    scores = torch.stack([random_scores(state, layer, seed) for layer in range(4) for seed in range(4)])[:, 0]
    relative = scores / scores.max(dim=1, keepdim=True).values
    shares = torch.stack([((relative >= k / 10) & (relative < (k + 1) / 10)).float().mean(dim=1) for k in range(10)])
    assert (shares - 0.1).abs().max() < 0.05
    correlation = torch.corrcoef(scores)
    assert (correlation - torch.eye(16)).abs().max() < 0.15
    lag = torch.corrcoef(torch.stack([scores[0, :-1], scores[0, 1:]]))[0, 1]
    assert lag.abs() < 0.1
