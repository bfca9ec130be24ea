"""The invariants of every preset: families x presets x executions, one table."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from methods import IDLE, METHODS, pruned
from tiny import (
    BASES,
    BERT,
    EXECUTIONS,
    HEADS,
    TYPICAL,
    VIT,
    Case,
    build,
    image_inputs,
    inputs_for,
    main_output,
    text_inputs,
)
from torch import nn
from torch.testing import assert_close
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel, ViTForImageClassification

from hf_tokenprune import prune
from hf_tokenprune.hub import run_in_fresh_process
from hf_tokenprune.modeling.saliency import TokenPredictor
from hf_tokenprune.modeling.token_layer import TokenPruneLayer


CASE = pytest.mark.parametrize("case", TYPICAL)
METHOD = pytest.mark.parametrize("method", METHODS)
EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)
Inputs = dict[str, torch.Tensor]
BY_INPUT = ("ltp", "adaptive", "adaptive_fuse", "top_p")


def _real(value: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """A sequence at its real tokens; anything else as it is."""
    return value[inputs["attention_mask"].bool()] if value.dim() == 3 and "attention_mask" in inputs else value


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
def _run(model: PreTrainedModel, inputs: Inputs) -> tuple[torch.Tensor, object]:
    """The output of a plain call, which a call with a trace repeats, and the trace."""
    plain, traced = main_output(model(**inputs)), model(**inputs, output_token_trace=True)
    _close(main_output(traced), plain)
    return plain, traced.token_trace


def _one(inputs: Inputs, row: int) -> tuple[Inputs, torch.Tensor]:
    """A sample alone and without padding, and its places in the batch."""
    if "attention_mask" not in inputs:
        return {name: value[row : row + 1] for name, value in inputs.items()}, torch.arange(10**3)
    places = inputs["attention_mask"][row].nonzero().flatten()
    return {"input_ids": inputs["input_ids"][row : row + 1, places]}, places


@CASE
@METHOD
def test_nothing_pruned_nothing_changed(case, method):
    native, inputs = build(case), inputs_for(case)
    with torch.no_grad():
        expected = main_output(native(**inputs))
    for execution in EXECUTIONS:
        value, trace = _run(pruned(native, replace(IDLE[method], execution=execution)), inputs)
        _close(_real(value, inputs), _real(expected, inputs))
        real = inputs.get("attention_mask", torch.ones(trace.source.shape[1:])).bool()
        # Each token has a row of its own; in which order they lie is the method's business.
        rows = trace.source.masked_fill(~real, 10**6).sort(dim=-1).values
        rows = rows.masked_fill(~real.sort(descending=True).values, -1)
        assert torch.equal(rows, torch.where(rows >= 0, torch.arange(rows.shape[-1]), -1)), execution


@CASE
@METHOD
def test_one_meaning_and_no_sight_of_the_batch(case, method):
    """Alone and without padding in packed form, against the batch in each execution."""
    native, inputs = build(case), inputs_for(case)
    batches = [_run(pruned(native, replace(METHODS[method], execution=execution)), inputs) for execution in EXECUTIONS]
    alone = pruned(native, replace(METHODS[method], execution="packed"))
    for row in range(len(batches[0][0])):
        one, places = _one(inputs, row)
        expected, expected_trace = _run(alone, one)
        places = places[: expected_trace.source.shape[-1]]
        for value, trace in batches:
            assert trace.counts[-1].max() < trace.source.shape[-1], "the method takes something away"
            assert torch.equal(trace.source[:, row, places], expected_trace.source[:, 0])
            assert_close(trace.sizes[:, row, : len(places)], expected_trace.sizes[:, 0])
            _close(value[row, places] if value.dim() == 3 else value[row], expected[0])


@METHOD
@EXECUTION
def test_padding_changes_nothing(method, execution):
    native = build(Case(BertModel, BERT))
    model = pruned(native, replace(METHODS[method], execution=execution))
    inputs = text_inputs([21, 9, 2], seed=2)
    value, trace = _run(model, inputs)
    padded = text_inputs([21, 9, 2], seed=2, padding=7)
    padded["input_ids"][padded["attention_mask"] == 0] = 13
    padded_value, padded_trace = _run(model, padded)
    _close(_real(padded_value, padded), _real(value, inputs))
    assert torch.equal(padded_trace.source[..., :21], trace.source)
    assert (padded_trace.source[..., 21:] == -1).all()


@pytest.mark.parametrize("case", BASES)
@METHOD
def test_half_precision(case, method):
    """As many tokens as in float32 where counts are fixed, and numbers: by weights in bfloat16, and under autocast."""
    inputs = inputs_for(case)
    for execution in EXECUTIONS:
        pruning = replace(METHODS[method], execution=execution)
        exact = pruned(build(case), pruning)
        half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
        with torch.no_grad():
            expected = exact(**inputs, output_token_trace=True)
            by_weights = pruned(build(case).bfloat16(), pruning)(**half, output_token_trace=True)
            with torch.autocast("cpu", torch.bfloat16):
                by_autocast = exact(**inputs, output_token_trace=True)
        for outputs in (by_weights, by_autocast):
            assert outputs.last_hidden_state.isfinite().all()
            if method not in BY_INPUT:
                assert torch.equal(outputs.token_trace.counts, expected.token_trace.counts)


@CASE
@METHOD
def test_special_tokens_stay(case, method):
    ids = (3, 11, 30) if case.text else ()
    native, inputs = build(case), inputs_for(case, seed=4)
    model = pruned(native, replace(METHODS[method], protected_token_ids=ids, min_tokens=3))
    _, trace = _run(model, inputs)
    prefix = model.base_model.structural_tokens
    real = inputs.get("attention_mask", torch.ones(trace.source.shape[1:])).bool()
    special = real & (real.cumsum(dim=1) <= prefix)
    assert (trace.source[:, special] >= 0).all()
    for site, counts in zip(trace.source, trace.counts):
        for sample, source in enumerate(site):
            assert source[special[sample]].tolist() == list(range(min(prefix, int(real[sample].sum()))))
            held = special[sample]
            if ids:
                held = held | (real[sample] & torch.isin(inputs["input_ids"][sample], torch.tensor(ids)))
            rows = source[held].tolist()
            assert -1 not in rows
            assert [source.eq(row).sum() for row in rows] == [1] * len(rows), "nothing went into a special token"
            assert counts[sample] == len(source[source >= 0].unique()) >= min(3, int(real[sample].sum()))


@CASE
@METHOD
def test_tokens_go_for_good_and_groups_only_grow(case, method):
    _, trace = _run(pruned(build(case), METHODS[method]), inputs_for(case))
    for before, after in zip(trace.source, trace.source[1:]):
        assert (after[before < 0] == -1).all()
        for old, new in zip(before, after):
            for row in old[old >= 0].unique():
                assert len(new[old == row].unique()) == 1


@CASE
@METHOD
def test_deterministic_in_eval(case, method):
    model, inputs = pruned(build(case), METHODS[method]), inputs_for(case)
    value, trace = _run(model, inputs)
    torch.manual_seed(99)
    again, trace_again = _run(model, inputs)
    assert torch.equal(value, again)
    assert torch.equal(trace.source, trace_again.source)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, TokenPruneLayer)]


@pytest.mark.parametrize("case", BASES)
@METHOD
@pytest.mark.parametrize("execution", ["padded", "masked"])
def test_what_is_gone_has_no_say(case, method, execution):
    """Whatever later layers find in memory at the place of a token that is gone, or of padding: nothing else moves."""
    model, inputs = pruned(build(case), replace(METHODS[method], execution=execution)), inputs_for(case)
    expected, trace = _run(model, inputs)
    generator = torch.Generator().manual_seed(1)

    def disturb(module: nn.Module, args: tuple) -> tuple:
        hidden, state, *rest = args
        kept = state.layout.lay(state.alive.float()) > 0
        noise = 100 * torch.randn(hidden.shape, generator=generator)
        return torch.where(kept[..., None], hidden, noise), state, *rest

    hooks = [layer.register_forward_pre_hook(disturb) for layer in _layers(model)]
    try:
        value, trace_again = _run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(trace_again.source, trace.source)
    alive = trace.source[-1] >= 0
    _close(value[alive], expected[alive])


@pytest.mark.parametrize("case", BASES)
@METHOD
def test_what_is_gone_costs_nothing(case, method):
    """Packed: no later layer is given a row that is not alive, and no feed-forward either."""
    model, inputs = pruned(build(case), replace(METHODS[method], execution="packed")), inputs_for(case)
    seen: dict[int, int] = {}
    for index, layer in enumerate(_layers(model)):
        layer.feed_forward_block = partial(
            lambda block, index, hidden: seen.__setitem__(index, hidden.shape[1]) or block(hidden),
            layer.feed_forward_block,
            index,
        )
    with torch.no_grad():
        trace = model(**inputs, output_token_trace=True).token_trace
    for layer, counts in zip(trace.layers, trace.counts):
        assert seen[layer] == counts.sum()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", BASES)
@METHOD
def test_gradient_checkpointing_changes_nothing(case, method):
    def train(checkpointing: bool) -> tuple[torch.Tensor, object, list]:
        model = pruned(build(case), METHODS[method]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)  # dropout
        outputs = model(**inputs_for(case), output_token_trace=True)
        loss = main_output(outputs).square().mean()
        loss.backward()
        return loss.detach(), outputs.token_trace, [parameter.grad for parameter in model.parameters()]

    loss, trace, gradients = train(False)
    loss_again, trace_again, gradients_again = train(True)
    assert torch.equal(trace_again.source, trace.source)
    assert_close(loss_again, loss)
    for ours, theirs in zip(gradients_again, gradients):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", HEADS)
@METHOD
def test_saved_and_loaded(case, method, tmp_path):
    model, inputs = pruned(build(case), METHODS[method]), inputs_for(case)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.pruning == model.config.pruning
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_predictors_that_are_not_used_stay_behind_and_come_back(tmp_path):
    model = pruned(build(Case(BertForSequenceClassification, BERT)), METHODS["dynamicvit"])
    with_them, weights = model.config.pruning, copy.deepcopy(model.state_dict())
    model.set_pruning(None)
    model.save_pretrained(tmp_path)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.set_pruning(with_them)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "case, method",
    [
        (Case(BertForSequenceClassification, BERT), "tome"),
        (Case(ViTForImageClassification, VIT), "dynamicvit"),
        (Case(ViTForImageClassification, VIT), "diffrate"),
    ],
    ids=str,
)
def test_loaded_without_the_package(case, method, tmp_path):
    model, inputs = pruned(build(case), METHODS[method]), inputs_for(case)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs, output_token_trace=True)
    auto = f"AutoModelFor{type(model).__name__.partition('For')[2]}"
    given = {name: value.tolist() for name, value in inputs.items()}
    answer = run_in_fresh_process(tmp_path, given, [auto])[auto]
    _close(torch.tensor(answer["output"]), expected.logits)
    assert answer["counts"] == expected.token_trace.counts.tolist()


@pytest.mark.parametrize("method", ["tome", "diffrate", "dynamicvit", "evit"])
def test_images_alone(method):
    """One image is the same as three, whatever went before."""
    model = pruned(build(Case(ViTForImageClassification, VIT)), METHODS[method])
    inputs = image_inputs(3, seed=8)
    with torch.no_grad():
        whole = model(**inputs).logits
        _close(model(pixel_values=inputs["pixel_values"][1:2]).logits, whole[1:2])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_ties_of_a_predictor_do_not_see_the_padding(execution):
    """A predictor that likes all tokens alike: how torch sorts ties depends on how many there are."""
    case = Case(BertForSequenceClassification, BERT)
    pruning = {"preset": "dynamicvit", "layers": [1, 2], "base_rate": 0.5, "execution": execution}
    model = prune(build(case), pruning).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_predictor" in name:
                parameter.zero_()
        batch = text_inputs([60, 37, 23], padding=3)
        together = model(**batch, output_token_trace=True).token_trace.source
        for row, length in enumerate([60, 37, 23]):
            alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
            source = model(**alone, output_token_trace=True).token_trace.source[:, 0]
            assert torch.equal(source, together[:, row, :length])


def test_predictors_of_half_models_compute_in_float32():
    predictor = TokenPredictor(32).half()
    rows = torch.randn(2, 9, 32).half()
    expected = copy.deepcopy(predictor).float()(rows.float())
    assert torch.equal(predictor(rows), expected)
