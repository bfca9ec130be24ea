"""What must always hold, as properties over random inputs and random prunings."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import kept_places
from random_cases import Batch, Inputs, batches, lay_out, layer_lists, prunings, seeds, sentences, top_k
from tiny import (
    ALL,
    BASES,
    BERT,
    EXECUTIONS,
    LAYERS,
    Case,
    build,
    image_inputs,
    inputs_for,
    main_output,
    text_inputs,
)
from torch import nn
from torch.testing import assert_close
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel, PreTrainedModel

from hf_tokenprune import PruningConfig, PruningStage, prune
from hf_tokenprune.modeling import token_layer
from hf_tokenprune.modeling.pruning_stage import keep_count, rate_ratio
from hf_tokenprune.modeling.saliency import first_token_scores, received_scores
from hf_tokenprune.modeling.token_layout import PackedRows, PaddedRows


CASE = pytest.mark.parametrize("case", ALL)
EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)
SALIENCY = pytest.mark.parametrize("saliency", ["cls_attention", "received_attention"])


def examples(count: int) -> Callable:
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


_NATIVES: dict[tuple, PreTrainedModel] = {}


def native_of(case: Case, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """One model for all examples of a case."""
    key = (str(case), attention, dtype)
    if key not in _NATIVES:
        _NATIVES[key] = build(case, attention=attention).to(dtype)
    return _NATIVES[key]


# What is compared


@torch.no_grad()
def run(native: PreTrainedModel, pruning: PruningConfig | None, inputs: Inputs) -> tuple[object, list]:
    """The output of a plain call, and what a call with a trace followed: by site, by sample, the row of each place."""
    model = prune(native, pruning)
    outputs, traced = model(**inputs), model(**inputs, output_token_trace=True)
    assert_close(main_output(traced), main_output(outputs), rtol=1e-5, atol=1e-5)
    source = traced.token_trace.source.tolist()
    assert traced.token_trace.counts.tolist() == [[len({*rows} - {-1}) for rows in site] for site in source]
    return outputs, source


def at_tokens(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A sequence at its real tokens; anything else as it is."""
    return value[batch.real] if value.dim() == 3 else value


def scale(value: torch.Tensor) -> float:
    return max(1.0, value.abs().max().item())


def at_own_places(source: list, batch: Batch) -> list:
    """The rows of each sample's own tokens, which no padding changes."""
    return [[[rows[place] for place in where] for rows, where in zip(site, batch.places)] for site in source]


def alone(batch: Batch, row: int) -> Batch:
    """One sample without its batch and without padding."""
    where = batch.places[row]
    if "input_ids" in batch.inputs:
        inputs = {"input_ids": batch.inputs["input_ids"][row : row + 1, where]}
        return Batch(inputs, [list(range(len(where)))])
    inputs = {name: value[row : row + 1] for name, value in batch.inputs.items()}
    return Batch(inputs, [where])


def unpruned_ways() -> list[PruningConfig | None]:
    top = PruningConfig.preset("top_k", layers=[0, 2, 3], keep_rate=1)
    every = PruningConfig.preset("adaptive", layers=[0, 1, 3], threshold=0, saliency="received_attention")
    return [None, PruningConfig(), top, replace(top, protected_token_ids=(3, 4)), every]


# The invariants


@CASE
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_pruned_nothing_changed(case, attention):
    native = native_of(case, attention)

    @examples(12)
    @given(st.sampled_from(unpruned_ways()), st.sampled_from(EXECUTIONS), batches(case, "holes_inside"))
    def check(pruning, execution, batch):
        if pruning is not None:
            ids = pruning.protected_token_ids if case.text else ()
            pruning = replace(pruning, execution=execution, protected_token_ids=ids)
        with torch.no_grad():
            expected = native(**batch.inputs)
        outputs, source = run(native, pruning, batch.inputs)
        own = [list(range(len(where))) for where in batch.places]
        assert all(site == own for site in at_own_places(source, batch))
        for name in ("logits", "last_hidden_state", "pooler_output"):
            if name in expected:
                ours, theirs = at_tokens(outputs[name], batch), at_tokens(expected[name], batch)
                assert_close(ours, theirs, rtol=0, atol=1e-5 * scale(theirs))

    check()


@CASE
def test_pruning_is_switched_at_run_time(case):
    native, inputs = native_of(case), inputs_for(case)
    pruning = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
    model = prune(native, pruning)
    with torch.no_grad():
        expected, pruned = main_output(native(**inputs)), main_output(model(**inputs))
        model.set_pruning(None)
        unpruned = main_output(model(**inputs))
        model.set_pruning(pruning.to_dict())
        pruned_again = main_output(model(**inputs))
    if expected.dim() == 3 and case.text:
        real = inputs["attention_mask"].bool()
        unpruned, expected, pruned = unpruned[real], expected[real], pruned[real]
        pruned_again = pruned_again[real]
    assert_close(unpruned, expected, rtol=0, atol=1e-5 * scale(expected))
    assert torch.equal(pruned_again, pruned)
    assert (pruned - unpruned).abs().max() > 1e-3


@CASE
def test_one_meaning_in_three_executions(case):
    @examples(25)
    @given(prunings(case.text), batches(case), st.sampled_from([torch.float32, torch.float64]))
    def check(pruning, batch, dtype):
        native = native_of(case, dtype=dtype)
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.inputs.items()}
        runs = [run(native, replace(pruning, execution=execution), inputs) for execution in EXECUTIONS]
        (first, kept), *others = runs
        assert main_output(first).dtype == dtype
        for outputs, other_kept in others:
            assert other_kept == kept
            for name in outputs.keys() & {"logits", "last_hidden_state", "pooler_output"}:
                assert_close(outputs[name], first[name], rtol=0, atol=1e-5 * scale(first[name]))

    check()


@CASE
def test_a_sample_does_not_see_its_batch(case):
    native = native_of(case)

    @examples(25)
    @given(prunings(case.text), st.sampled_from(EXECUTIONS), batches(case, min_size=2))
    def check(pruning, execution, batch):
        pruning = replace(pruning, execution=execution)
        outputs, kept = run(native, pruning, batch.inputs)
        kept = at_own_places(kept, batch)
        for row, where in enumerate(batch.places):
            single = alone(batch, row)
            expected, expected_kept = run(native, pruning, single.inputs)
            assert [site[row] for site in kept] == [site[0] for site in at_own_places(expected_kept, single)]
            ours, theirs = main_output(outputs)[row], at_tokens(main_output(expected), single)
            ours = ours[where] if ours.dim() == 2 else ours[None]
            assert_close(ours, theirs, rtol=0, atol=1e-5 * scale(theirs))

    check()


@pytest.mark.parametrize("native_class", [BertModel, BertForSequenceClassification, BertForTokenClassification])
def test_padding_changes_nothing(native_class):
    native = native_of(Case(native_class, BERT))

    @examples(25)
    @given(
        prunings(text=True),
        st.sampled_from(EXECUTIONS),
        st.lists(sentences, min_size=1, max_size=3),
        st.integers(0, 9),
        seeds,
    )
    def check(pruning, execution, samples, extra, seed):
        pruning = replace(pruning, execution=execution)
        layouts = [lay_out(samples, how, extra, seed + extra) for how in ("right", "left", "holes")]
        layouts.append(lay_out(samples, "right", 0, seed))
        runs = [run(native, pruning, layout.inputs) for layout in layouts]
        values = [at_tokens(main_output(outputs), layout) for (outputs, _), layout in zip(runs, layouts)]
        ranks = [at_own_places(kept, layout) for (_, kept), layout in zip(runs, layouts)]
        for value, rank in zip(values, ranks):
            assert rank == ranks[-1]
            assert_close(value, values[-1], rtol=0, atol=1e-5 * scale(values[-1]))

    check()


@CASE
def test_special_tokens_stay_and_dropped_ones_stay_dropped(case):
    native = native_of(case)

    @examples(25)
    @given(prunings(case.text, drop=True), st.sampled_from(EXECUTIONS), batches(case))
    def check(pruning, execution, batch):
        model = prune(native, replace(pruning, execution=execution))
        with torch.no_grad():
            trace = model(**batch.inputs, output_token_trace=True).token_trace
        assert trace.layers == sorted(pruning.sites)
        before = batch.places
        for site, kept in enumerate(kept_places(trace)):
            for row, places in enumerate(kept):
                where, source = batch.places[row], trace.source[site, row]
                assert set(places) <= set(before[row])
                assert source[where[0]] == 0
                assert len(places) >= min(pruning.min_tokens, len(where))
                # Each token that stays is its own row, in the order of the input.
                assert source[places].tolist() == list(range(len(places)))
                if case.text:
                    ids = batch.inputs["input_ids"][row]
                    assert {place for place in where if ids[place] in pruning.protected_token_ids} <= set(places)
            before = kept

    check()


@CASE
def test_budgets_are_exact(case):
    native = native_of(case)

    @examples(20)
    @given(st.integers(1, 99), layer_lists, st.integers(1, 5), st.sampled_from(EXECUTIONS), batches(case))
    def check(percent, layers, min_tokens, execution, batch):
        pruning = PruningConfig.preset(
            "top_k", layers=layers, keep_rate=percent / 100, min_tokens=min_tokens, execution=execution
        )
        with torch.no_grad():
            trace = prune(native, pruning)(**batch.inputs, output_token_trace=True).token_trace
        for site, counts in enumerate(trace.counts.tolist()):
            rate = Fraction(percent, 100) ** (site + 1)
            for count, where in zip(counts, batch.places):
                assert count == min(len(where), max(min_tokens, case.prefix + int(rate * (len(where) - case.prefix))))

    check()


@CASE
def test_bfloat16(case):
    """Half precision: the class of a near-tie is open, counts and shapes are not."""
    native = native_of(case, dtype=torch.bfloat16)

    @examples(8)
    @given(top_k(), batches(case), st.sampled_from(EXECUTIONS))
    def check(pruning, batch, execution):
        inputs = {
            name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.inputs.items()
        }
        with torch.no_grad():
            unpruned = prune(native, PruningConfig(execution=execution))(**inputs)
            expected = native_of(case)(**batch.inputs) if batch.real.all() else None
            pruned = prune(native, replace(pruning, execution=execution))(**inputs, output_token_trace=True)
            reference = prune(native_of(case), pruning)(**batch.inputs, output_token_trace=True)
        assert main_output(pruned).dtype == torch.bfloat16
        assert main_output(pruned).isfinite().all()
        assert torch.equal(pruned.token_trace.counts, reference.token_trace.counts)
        if expected is not None:
            theirs = main_output(expected)
            assert_close(main_output(unpruned).float(), theirs, rtol=0, atol=0.1 * scale(theirs))

    check()


@pytest.mark.parametrize(
    "layout", [PackedRows((7, 7), torch.device("cpu")), PaddedRows(torch.ones(2, 7).bool(), True, (7, 7))]
)
def test_scores_are_float32_whatever_the_precision_around_them(layout):
    generator = torch.Generator().manual_seed(0)
    rows = (1, 14, 32) if isinstance(layout, PackedRows) else (2, 7, 32)
    query, key = (torch.randn(rows, generator=generator).bfloat16() for _ in range(2))

    def scores(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        by_class = first_token_scores(layout.first(query), key, layout, 0.4, 4)
        return [by_class, received_scores(query, key, layout, 0.4, 4)]

    expected = scores(query.float(), key.float())
    in_half = scores(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = scores(query, key)
    for actual in (in_half, in_autocast):
        for ours, theirs in zip(actual, expected):
            assert ours.dtype == torch.float32
            assert_close(ours, theirs, rtol=0, atol=1e-6)


@CASE
def test_deterministic_in_eval(case):
    inputs = inputs_for(case)
    model = prune(native_of(case), PruningConfig.preset("adaptive", layers=[1, 2], threshold=0.8))
    with torch.no_grad():
        first = model(**inputs, output_token_trace=True)
        torch.manual_seed(99)
        second = model(**inputs, output_token_trace=True)
    assert torch.equal(main_output(first), main_output(second))
    assert torch.equal(first.token_trace.source, second.token_trace.source)


@CASE
@EXECUTION
def test_threads_do_not_meet(case, execution):
    model = prune(native_of(case), PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5, execution=execution))
    inputs = [inputs_for(case, seed=seed) for seed in range(6)]
    if case.text:
        inputs[1::2] = [text_inputs([9, 12], seed=seed) for seed in range(3)]

    def call(one: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            outputs = model(**one, output_token_trace=True, output_hidden_states=True)
        return main_output(outputs), outputs.token_trace.source

    expected = [call(one) for one in inputs]
    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(call, inputs * 3))
    for (value, source), (expected_value, expected_source) in zip(actual, expected * 3):
        assert torch.equal(source, expected_source)
        assert_close(value, expected_value, rtol=0, atol=1e-6)


def _snapshot(model: PreTrainedModel) -> tuple:
    def content(value: object) -> object:
        return {name: id(item) for name, item in value.items()} if isinstance(value, dict) else id(value)

    modules = {name: {key: content(value) for key, value in vars(m).items()} for name, m in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return modules, deepcopy(vars(model.config)), model.config.to_dict(), weights


@CASE
@EXECUTION
def test_a_call_leaves_nothing_behind(case, execution):
    native = build(case, attention="eager")
    model = prune(native, PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5, execution=execution))
    before = _snapshot(model), _snapshot(native)
    model(**inputs_for(case), output_token_trace=True, output_hidden_states=True, output_attentions=True)
    model(**inputs_for(case))
    for (modules, attributes, config, weights), now in zip(before, (_snapshot(model), _snapshot(native))):
        assert now[0] == modules
        assert now[1] == attributes
        assert now[2] == config
        assert all(torch.equal(now[3][name], weight) for name, weight in weights.items())


# Dropped means gone


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    base = model.base_model
    return list(base.layers if hasattr(base, "layers") else base.encoder.layer)


def _part(block: nn.Module, part: str) -> nn.Module:
    """part: "query", "key", "value", "output" or "feed_forward"."""
    if hasattr(block, "intermediate"):
        attention = block.attention.self
        bert = {"output": block.attention.output.dense, "feed_forward": block.intermediate.dense}
        return bert[part] if part in bert else getattr(attention, part)
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    return block.mlp.fc1 if part == "feed_forward" else getattr(block.attention, names[part])


def _rows_seen(model: PreTrainedModel, inputs: Inputs, part: str, **wishes: bool) -> tuple[list[int], object]:
    """How many tokens each layer computes a part for."""
    seen = [0] * LAYERS

    def count(layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen[layer] += output[..., 0].numel()

    hooks = [
        _part(block, part).register_forward_hook(partial(count, layer)) for layer, block in enumerate(_blocks(model))
    ]
    try:
        with torch.no_grad():
            outputs = model(**inputs, **wishes)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, outputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("execution", ["auto", *EXECUTIONS])
def test_what_each_execution_computes(execution, training):
    """Packed: the tokens. Padded: samples times the longest. Masked: everything. Auto: packed."""
    model = prune(build(Case(BertModel, BERT)), PruningConfig.preset("top_k", layers=[1], keep_rate=0.5))
    model.set_pruning(replace(model.config.pruning, execution=execution))
    model.train(training)
    rows, outputs = _rows_seen(model, text_inputs([17, 5, 9], padding=2), "feed_forward", output_token_trace=True)
    assert outputs.token_trace.counts.tolist() == [[9, 3, 5]]
    expected = {"packed": [31, 17], "padded": [3 * 19, 3 * 9], "masked": [3 * 19, 3 * 19]}
    expected["auto"] = expected["packed"]
    before, after = expected[execution]
    assert rows == [before, after, after, after]


@pytest.mark.parametrize("case", [param for param in BASES if param.id == "Dinov2Model"])
def test_stochastic_depth_trains_by_sample(case):
    """A packed batch is one row, and so one draw."""
    config = deepcopy(case.config)
    config.drop_path_rate = 0.5
    model = prune(build(Case(case.native, config)), PruningConfig.preset("top_k", layers=[1], keep_rate=0.5))
    assert _rows_seen(model, image_inputs(2), "output")[0] == [74, 38, 38, 38]
    rows = []
    _blocks(model)[0].drop_path.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[0]))
    model.train()
    model(**image_inputs(2))
    assert rows == [2, 2]
    model.set_pruning(replace(model.config.pruning, execution="packed"))
    with pytest.raises(ValueError, match=r"'packed'.*drop_path_rate \(0.5\)"):
        model(**image_inputs(2))


@CASE
@pytest.mark.parametrize("method", ["top_k", "adaptive"])
def test_a_dropped_token_costs_nothing_more(case, method, monkeypatch):
    monkeypatch.setattr(token_layer, "FEW_TOKENS", 0)
    arguments = {"keep_rate": 0.6} if method == "top_k" else {"threshold": 0.7}
    sites = [0, 2]
    model = prune(native_of(case), PruningConfig.preset(method, layers=sites, execution="packed", **arguments))
    inputs = inputs_for(case)
    batch = len(next(iter(inputs.values())))
    start = int(inputs["attention_mask"].sum()) if case.text else batch * case.tokens
    seen = {}
    for part in ("query", "key", "value", "output", "feed_forward"):
        seen[part], outputs = _rows_seen(model, inputs, part, output_token_trace=True)
    after_first, after_second = outputs.token_trace.counts.sum(dim=1).tolist()
    assert start > after_first > after_second > batch
    entering = [start, after_first, after_first, after_second]
    leaving = [after_first, after_first, after_second, after_second]
    assert seen["key"] == seen["value"] == entering
    assert seen["output"] == seen["feed_forward"] == leaving
    # At a site the class tokens ask once for their scores, and once more with the others.
    assert seen["query"] == [rows + batch * (layer in sites) for layer, rows in enumerate(leaving)]


@CASE
def test_few_tokens_ask_all_at_once(case):
    """One projection of so few tokens takes as long as that of the class token alone; what is kept is the same."""
    model = prune(native_of(case), PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.6, execution="packed"))
    inputs = text_inputs([20, 9]) if case.text else image_inputs(1)
    tokens = 29 if case.text else case.tokens
    seen, outputs = _rows_seen(model, inputs, "query", output_token_trace=True)
    after_first, after_second = outputs.token_trace.counts.sum(dim=1).tolist()
    assert after_second < after_first <= token_layer.FEW_TOKENS
    assert seen[1:3] == ([tokens, after_first] if case.text else [after_first + 1, after_first])


@pytest.mark.parametrize(
    "case", [param for param in ALL if param.id in ("BertForSequenceClassification", "ViTForImageClassification")]
)
def test_the_last_layer_computes_only_what_the_head_reads(case):
    # Packed is asked for: hooks, as this test has them, otherwise see what natively goes through.
    model = prune(native_of(case), PruningConfig.preset("top_k", layers=[1], keep_rate=1.0, execution="packed"))
    inputs = inputs_for(case)
    batch = len(next(iter(inputs.values())))
    start = int(inputs["attention_mask"].sum()) if case.text else batch * case.tokens
    for part in ("query", "output", "feed_forward"):
        assert _rows_seen(model, inputs, part)[0] == [start] * (LAYERS - 1) + [batch]
        assert _rows_seen(model, inputs, part, output_hidden_states=True)[0] == [start] * LAYERS
    assert _rows_seen(model, inputs, "key")[0] == [start] * LAYERS


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("execution", ["padded", "masked"])
@SALIENCY
def test_a_dropped_token_has_no_say_later(case, execution, saliency):
    """Whatever later layers find at the place of a dropped token or of padding: nothing else moves."""
    pruning = PruningConfig.preset("adaptive", layers=[0, 2], threshold=0.8, saliency=saliency, execution=execution)
    model = prune(native_of(case), pruning)
    inputs = inputs_for(case)
    with torch.no_grad():
        expected = model(**inputs, output_token_trace=True)
    trace = expected.token_trace
    generator = torch.Generator().manual_seed(1)

    def disturb(layer: int, module: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args
        site = 0 if layer <= 2 else 1
        if execution == "masked":
            gone = trace.source[site] < 0
        else:
            gone = torch.arange(hidden.shape[1]) >= trace.counts[site][:, None]
        assert gone.any()
        noise = 100 * torch.randn(hidden.shape, generator=generator)
        return torch.where(gone[..., None], noise, hidden), *rest

    hooks = [
        block.register_forward_pre_hook(partial(disturb, layer)) for layer, block in enumerate(_blocks(model)) if layer
    ]
    try:
        with torch.no_grad():
            outputs = model(**inputs, output_token_trace=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(outputs.token_trace.source, trace.source)
    alive = trace.source[-1] >= 0
    ours, theirs = outputs.last_hidden_state[alive], expected.last_hidden_state[alive]
    assert_close(ours, theirs, rtol=0, atol=1e-5 * scale(theirs))


# Gradient checkpointing


@pytest.mark.filterwarnings("ignore::FutureWarning")
@CASE
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("execution", ["auto", "packed"])
def test_gradient_checkpointing_changes_nothing(case, use_reentrant, execution):
    pruning = PruningConfig.preset("adaptive", layers=[1, 2], threshold=0.8, execution=execution)
    inputs = inputs_for(case)

    def train(checkpointing: bool) -> tuple[torch.Tensor, object, dict, int]:
        model = prune(build(case), pruning).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls = []
        _part(_blocks(model)[1], "key").register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(5)  # dropout
        outputs = model(**inputs, output_token_trace=True)
        loss = main_output(outputs).square().mean()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return loss.detach(), outputs.token_trace, gradients, len(calls)

    loss, trace, gradients, calls = train(False)
    loss_again, trace_again, gradients_again, calls_again = train(True)
    assert (calls, calls_again) == (1, 2)
    assert trace_again.layers == [1, 2]
    assert torch.equal(trace_again.source, trace.source)
    assert torch.equal(trace_again.counts, trace.counts)
    assert_close(loss_again, loss)
    for name, gradient in gradients.items():
        assert (gradient is None) == (gradients_again[name] is None), name
        if gradient is not None:
            assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_of_the_native_model_goes_on():
    native = build(Case(BertModel, BERT)).train()
    native.gradient_checkpointing_enable()
    model = prune(native, "top_k")
    assert model.is_gradient_checkpointing
    calls = []
    _part(_blocks(model)[1], "key").register_forward_hook(lambda *_: calls.append(1))
    model(**text_inputs([9, 4])).last_hidden_state.sum().backward()
    assert len(calls) == 2


# Integers and ties


def test_seven_tenths_of_ninety_are_sixty_three():
    assert keep_count(90, rate_ratio(0.7)) == 63
    assert int(0.7 * 90) == 62


def test_counts_are_exact_for_every_rate_and_length():
    lengths = torch.arange(1001)
    for percent in range(1, 101):
        rate = Fraction(percent, 100)
        expected = [length * percent // 100 for length in range(1001)]
        assert keep_count(lengths, rate_ratio(percent / 100)).tolist() == expected
        assert [keep_count(length, rate_ratio(percent / 100)) for length in range(1001)] == expected
        assert expected[1000] == int(rate * 1000)
    assert type(keep_count(17, rate_ratio(0.3))) is int
    assert keep_count(lengths, rate_ratio(0.3)).dtype == torch.long


@pytest.mark.parametrize("tenths", range(1, 11))
def test_compounded_rates_are_exact(tenths):
    pruning = PruningConfig.preset("top_k", layers=range(12), keep_rate=tenths / 10)
    for site, value in enumerate(pruning.stages[0].values):
        exact = Fraction(tenths, 10) ** (site + 1)
        assert [keep_count(n, rate_ratio(value)) for n in range(1001)] == [int(exact * n) for n in range(1001)]


def _indifferent(case: Case) -> PreTrainedModel:
    """Attention is uniform: all scores are equal."""
    native = build(case)
    for block in _blocks(native):
        query = _part(block, "query")
        nn.init.zeros_(query.weight)
        nn.init.zeros_(query.bias)
    return native


@SALIENCY
@EXECUTION
def test_ties_go_to_the_earlier_token(saliency, execution):
    native = _indifferent(Case(BertModel, BERT))
    stage = PruningStage([1, 2], saliency, "keep_rate", [0.5, 0.2])
    model = prune(native, PruningConfig(stages=(stage,), execution=execution))
    for length in range(1, 61, 3):
        inputs = text_inputs([length, max(length - 5, 1)], padding=2)
        with torch.no_grad():
            kept = kept_places(model(**inputs, output_token_trace=True).token_trace)
        lengths = (length, max(length - 5, 1))
        assert kept[0] == [list(range(1 + (n - 1) // 2)) for n in lengths], length
        assert kept[1] == [list(range(1 + (n - 1) // 5)) for n in lengths], length


@SALIENCY
@EXECUTION
def test_a_threshold_means_the_same_at_every_length(saliency, execution):
    """Uniform attention scores 1 whatever the length: a threshold of 1 keeps all, one above keeps the class token."""
    native = _indifferent(Case(BertModel, BERT))
    for threshold, keeps_all in ((1.0, True), (1.01, False)):
        pruning = PruningConfig.preset(
            "adaptive", layers=[1], threshold=threshold, saliency=saliency, execution=execution
        )
        model = prune(native, pruning)
        for length in range(1, 61, 4):
            with torch.no_grad():
                trace = model(**text_inputs([length], padding=1), output_token_trace=True).token_trace
            assert trace.counts.tolist() == [[length if keeps_all else 1]], length
