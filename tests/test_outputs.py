"""What comes back: the native fields in the native shapes, and the declared further ones."""

from dataclasses import replace

import pytest
import torch
from naive import kept_places, run_naive, top_k_sites
from tiny import (
    ALL,
    BASES,
    BERT,
    EXECUTIONS,
    HEADS,
    LAYERS,
    LEARNING_HEADS,
    Case,
    build,
    inputs_for,
    main_output,
    text_inputs,
)
from torch.testing import assert_close
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.utils import ModelOutput

from hf_tokenprune import PruningConfig, prune


SITES = [1, 2]
TOP_K = PruningConfig.preset("top_k", layers=SITES, keep_rate=0.6)
NAIVE_SITES = top_k_sites(SITES, "0.6")

CASE = pytest.mark.parametrize("case", ALL)
EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)
WISHES = {"output_hidden_states": True, "output_attentions": True, "output_token_trace": True}


def _length(case: Case) -> int:
    return inputs_for(case)["input_ids"].shape[1] if case.text else case.tokens


def _real(case: Case) -> torch.Tensor:  # bool [B, N]
    inputs = inputs_for(case)
    return inputs["attention_mask"].bool() if case.text else torch.ones(3, case.tokens, dtype=torch.bool)


def _doubled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


# The native fields


@CASE
def test_the_output_is_a_native_one(case):
    native, inputs = build(case), inputs_for(case)
    expected = native(**inputs)
    outputs = prune(native, TOP_K)(**inputs)
    assert isinstance(outputs, type(expected))
    assert list(outputs) == list(expected)
    assert {name: value.shape for name, value in outputs.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert outputs.token_trace is None


@CASE
@EXECUTION
def test_tuples_without_return_dict(case, execution):
    model, inputs = prune(build(case), replace(TOP_K, execution=execution)), inputs_for(case)
    named = model(**inputs, output_hidden_states=True, output_token_trace=True)
    plain = model(**inputs, output_hidden_states=True, output_token_trace=True, return_dict=False)
    assert type(plain) is tuple
    assert len(plain) == len(named)
    assert torch.equal(plain[0], main_output(named))
    assert len(plain[-2]) == LAYERS + 1
    assert torch.equal(plain[-1].counts, named.token_trace.counts)


@CASE
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@EXECUTION
def test_hidden_states_are_native_with_nothing_pruned(case, attention, execution):
    native, inputs, real = build(case, attention=attention), inputs_for(case), _real(case)
    expected = native(**inputs, output_hidden_states=True).hidden_states
    outputs = prune(native, PruningConfig(execution=execution))(**inputs, output_hidden_states=True)
    assert type(outputs.hidden_states) is tuple
    assert len(outputs.hidden_states) == len(expected) == LAYERS + 1
    for ours, theirs in zip(outputs.hidden_states, expected):
        assert ours.shape == theirs.shape
        _close(ours[real], theirs[real])


@pytest.mark.parametrize("case", BASES)
@EXECUTION
def test_the_last_hidden_state_of_all(case, execution):
    model = prune(build(case), replace(TOP_K, execution=execution))
    outputs = model(**inputs_for(case), output_hidden_states=True)
    last, sequence = outputs.hidden_states[-1], outputs.last_hidden_state
    if case.text:
        assert torch.equal(last, sequence)
    else:  # before the final norm, as natively
        assert not torch.allclose(last, sequence)
        _close(model.layernorm(last), sequence)


@CASE
@EXECUTION
def test_hidden_states_are_restored(case, execution):
    native, inputs, real = build(case).double(), _doubled(inputs_for(case)), _real(case)
    with torch.no_grad():
        samples = run_naive(native, inputs, NAIVE_SITES)
        outputs = prune(native, replace(TOP_K, execution=execution))(**inputs, output_hidden_states=True)
    for layer, states in enumerate(outputs.hidden_states):
        expected = torch.stack([sample.hidden_states[layer] for sample in samples])
        assert states.shape == expected.shape
        assert_close(states[real], expected[real], rtol=1e-9, atol=1e-9)
        assert (states[~real] == 0).all()


@CASE
@EXECUTION
def test_attention_maps_are_native_with_nothing_pruned(case, execution):
    native, inputs, real = build(case, attention="eager"), inputs_for(case), _real(case)
    expected = native(**inputs, output_attentions=True).attentions
    outputs = prune(native, PruningConfig(execution=execution))(**inputs, output_attentions=True)
    assert type(outputs.attentions) is tuple
    assert len(outputs.attentions) == len(expected) == LAYERS
    for ours, theirs in zip(outputs.attentions, expected):
        assert ours.shape == theirs.shape
        # [B, N, H, N]: the rows of padding natively attend; here they are not there
        _close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real])
        assert (ours.transpose(1, 2)[~real] == 0).all()


@CASE
@EXECUTION
def test_attention_maps_are_at_the_original_places(case, execution):
    native, inputs = build(case, attention="eager").double(), _doubled(inputs_for(case))
    with torch.no_grad():
        samples = run_naive(native, inputs, NAIVE_SITES)
        outputs = prune(native, replace(TOP_K, execution=execution))(**inputs, output_attentions=True)
    assert len(outputs.attentions) == LAYERS
    for layer, maps in enumerate(outputs.attentions):
        expected = torch.stack([sample.maps[layer] for sample in samples])
        assert_close(maps, expected, rtol=0, atol=1e-5)  # some native softmaxes are in float32
        assert torch.equal(maps == 0, expected == 0)


@CASE
def test_attention_maps_change_no_decision_and_no_result(case):
    inputs = inputs_for(case)
    model = prune(build(case, attention="eager"), TOP_K)
    plain, asked = model(**inputs, output_token_trace=True), model(**inputs, **WISHES)
    _close(main_output(asked), main_output(plain))
    assert torch.equal(asked.token_trace.source, plain.token_trace.source)


def test_the_attention_kernel_can_be_switched():
    model, inputs = prune(build(Case(BertModel, BERT)), TOP_K), text_inputs([9, 4])
    by_sdpa = model(**inputs)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True)
    assert outputs.attentions[0].shape == (2, 4, 9, 9)
    _close(outputs.last_hidden_state, by_sdpa.last_hidden_state)


@CASE
@pytest.mark.parametrize("before", [False, True])
def test_wishes_in_the_config_are_honoured(case, before):
    native, inputs = build(case, attention="eager"), inputs_for(case)
    model = prune(native, TOP_K)
    config = native.config if before else model.config
    config.output_hidden_states = config.output_attentions = True
    if before:
        model = prune(native, TOP_K)
    outputs = model(**inputs)
    assert len(outputs.hidden_states) == LAYERS + 1
    assert len(outputs.attentions) == LAYERS
    outputs = model(**inputs, output_hidden_states=False, output_attentions=False)
    assert outputs.hidden_states is None
    assert outputs.attentions is None


@pytest.mark.parametrize("case", HEADS)
@EXECUTION
def test_logits_do_not_depend_on_what_else_is_asked_for(case, execution):
    """A head that reads one token alone computes less in the last layer, unless more is asked for."""
    pruning = PruningConfig.preset("top_k", layers=[1, LAYERS - 1], keep_rate=0.6, execution=execution)
    model, inputs = prune(build(case, attention="eager"), pruning), inputs_for(case)
    expected = model(**inputs).logits
    for wish in WISHES:
        _close(model(**inputs, **{wish: True}).logits, expected)


@pytest.mark.parametrize("case", LEARNING_HEADS)
def test_the_loss_is_native_with_nothing_pruned(case):
    native, inputs = build(case), inputs_for(case)
    logits = native(**inputs).logits
    labels = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) % 3
    if logits.dim() == 3:
        labels = labels.masked_fill(~_real(case), -100)
    expected = native(**inputs, labels=labels)
    outputs = prune(native, None)(**inputs, labels=labels)
    _close(outputs.loss, expected.loss)


# The further fields


@pytest.mark.parametrize("case", BASES)
@EXECUTION
def test_restore_false_gives_the_kept_tokens_alone(case, execution):
    model, inputs = prune(build(case), replace(TOP_K, execution=execution)), inputs_for(case)
    full = model(**inputs, output_token_trace=True)
    outputs = model(**inputs, restore=False, output_hidden_states=True, output_token_trace=True)
    kept = kept_places(full.token_trace)[-1]
    batch, rows = len(kept), max(map(len, kept))
    assert rows < _length(case)
    assert outputs.last_hidden_state.shape == (batch, rows, 32)
    assert outputs.attention_mask.shape == outputs.positions.shape == (batch, rows)
    assert outputs.attention_mask.dtype == outputs.positions.dtype == torch.long
    for row, places in enumerate(kept):
        padding = rows - len(places)
        assert outputs.attention_mask[row].tolist() == [1] * len(places) + [0] * padding
        assert outputs.positions[row].tolist() == places + [-1] * padding
        _close(outputs.last_hidden_state[row, : len(places)], full.last_hidden_state[row, places])
        assert (outputs.last_hidden_state[row, len(places) :] == 0).all()
    _close(outputs.pooler_output, full.pooler_output)
    assert kept_places(outputs.token_trace)[-1] == kept
    assert all(states.shape == (batch, _length(case), 32) for states in outputs.hidden_states)
    assert full.attention_mask is None and full.positions is None


@EXECUTION
def test_restore_false_under_left_padding(execution):
    model = prune(build(Case(BertModel, BERT)), replace(TOP_K, execution=execution))
    inputs = {name: value.flip(1) for name, value in text_inputs([17, 5], padding=2).items()}
    full = model(**inputs, output_token_trace=True)
    outputs = model(**inputs, restore=False)
    for row, places in enumerate(kept_places(full.token_trace)[-1]):
        there = outputs.attention_mask[row].bool()
        assert outputs.positions[row, there].tolist() == places
        _close(outputs.last_hidden_state[row, there], full.last_hidden_state[row, places])


@CASE
@EXECUTION
def test_the_trace(case, execution):
    native, inputs, real = build(case).double(), _doubled(inputs_for(case)), _real(case)
    with torch.no_grad():
        samples = run_naive(native, inputs, NAIVE_SITES)
        trace = prune(native, replace(TOP_K, execution=execution))(**inputs, output_token_trace=True).token_trace
    assert isinstance(trace, ModelOutput)
    assert trace.layers == SITES
    assert trace.counts.dtype == trace.source.dtype == torch.long
    expected = torch.full((len(SITES), *real.shape), -1)
    for row, sample in enumerate(samples):
        for site, places in enumerate(sample.kept):
            expected[site, row, places] = torch.arange(len(places))
    assert torch.equal(trace.source, expected)
    assert (trace.source[:, ~real] == -1).all()
    assert torch.equal(trace.counts, (expected >= 0).sum(dim=2))


@EXECUTION
def test_a_trace_of_nothing(execution):
    case = Case(BertModel, BERT)
    model = prune(build(case), PruningConfig(execution=execution))
    trace = model(**text_inputs([9, 4]), output_token_trace=True).token_trace
    assert trace.layers == []
    assert trace.counts.shape == (0, 2)
    assert trace.source.shape == (0, 2, 9)


def test_a_trace_is_asked_for_or_not_given():
    model, inputs = prune(build(Case(BertForSequenceClassification, BERT)), TOP_K), text_inputs([9, 4])
    assert model(**inputs).token_trace is None
    assert model(**inputs, output_token_trace=False).token_trace is None
    assert model(**inputs, output_token_trace=True).token_trace is not None


# Inputs at the edge


@pytest.mark.parametrize("case", [param for param in ALL if "Bert" in param.id])
@EXECUTION
def test_a_row_of_nothing_but_padding(case, execution):
    model = prune(build(case), replace(TOP_K, execution=execution))
    inputs = text_inputs([9, 4, 6], padding=1)
    expected = model(**{name: value[[0, 2]] for name, value in inputs.items()}, output_token_trace=True)
    inputs["attention_mask"][1] = 0
    outputs = model(**inputs, output_token_trace=True, output_hidden_states=True)
    assert main_output(outputs).isfinite().all()
    assert all(states.isfinite().all() for states in outputs.hidden_states)
    _close(main_output(outputs)[[0, 2]], main_output(expected))
    assert torch.equal(outputs.token_trace.source[:, [0, 2]], expected.token_trace.source)
    assert main_output(model(**{name: value[1:2] for name, value in inputs.items()})).isfinite().all()


@pytest.mark.parametrize("case", [param for param in ALL if "Bert" in param.id])
@pytest.mark.parametrize("padding", [0, 3])
@EXECUTION
def test_inputs_of_one_token(case, padding, execution):
    native = build(case)
    inputs = text_inputs([1, 1], padding=padding)
    real = inputs["attention_mask"].bool()
    outputs = prune(native, replace(TOP_K, execution=execution))(**inputs, output_token_trace=True)
    ours, theirs = main_output(outputs), main_output(native(**inputs))
    _close(*((ours[real], theirs[real]) if ours.dim() == 3 else (ours, theirs)))
    assert outputs.token_trace.counts.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("case", [param for param in ALL if "Bert" in param.id])
@EXECUTION
def test_embeddings_as_inputs(case, execution):
    native = build(case)
    model, inputs = prune(native, replace(TOP_K, execution=execution)), text_inputs([9, 4])
    embeddings = native.get_input_embeddings()(inputs["input_ids"])
    expected = model(**inputs, output_token_trace=True)
    outputs = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], output_token_trace=True)
    _close(main_output(outputs), main_output(expected))
    assert torch.equal(outputs.token_trace.source, expected.token_trace.source)


@EXECUTION
def test_token_types_and_positions_travel_with_their_tokens(execution):
    native = build(Case(BertModel, BERT))
    inputs = text_inputs([9, 4], padding=2)
    real = inputs["attention_mask"].bool()
    generator = torch.Generator().manual_seed(2)
    inputs["token_type_ids"] = torch.randint(0, 2, real.shape, generator=generator)
    inputs["position_ids"] = torch.randint(0, 64, real.shape, generator=generator)
    ours = prune(native, PruningConfig(execution=execution))(**inputs).last_hidden_state
    _close(ours[real], native(**inputs).last_hidden_state[real])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
@EXECUTION
def test_masks_of_any_type(dtype, execution):
    model, inputs = prune(build(Case(BertModel, BERT)), replace(TOP_K, execution=execution)), text_inputs([9, 4])
    other = inputs | {"attention_mask": inputs["attention_mask"].to(dtype)}
    assert torch.equal(model(**other).last_hidden_state, model(**inputs).last_hidden_state)


@EXECUTION
def test_a_mask_of_ones_is_no_mask(execution):
    model, inputs = prune(build(Case(BertModel, BERT)), replace(TOP_K, execution=execution)), text_inputs([9, 9])
    without = model(input_ids=inputs["input_ids"])
    assert torch.equal(model(**inputs).last_hidden_state, without.last_hidden_state)


@EXECUTION
def test_every_token_of_a_ragged_batch_is_labelled(execution):
    native = build(Case(BertForTokenClassification, BERT)).double()
    inputs = text_inputs([17, 5, 30, 1], padding=2)
    real = inputs["attention_mask"].bool()
    labels = (inputs["input_ids"] % 3).masked_fill(~real, -100)
    with torch.no_grad():
        samples = run_naive(native, inputs, NAIVE_SITES)
        outputs = prune(native, replace(TOP_K, execution=execution))(**inputs, labels=labels)
    logits = torch.stack([sample.logits for sample in samples])
    assert outputs.logits.shape == (4, 32, 3)
    assert_close(outputs.logits[real], logits[real], rtol=1e-9, atol=1e-9)
    assert_close(outputs.loss, torch.nn.functional.cross_entropy(logits[real], labels[real]), rtol=1e-9, atol=1e-9)


IDS = torch.ones(2, 5, dtype=torch.long)
REFUSED = {
    "no input": ({}, "exactly one of input_ids or inputs_embeds"),
    "both inputs": (
        {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 32)},
        "exactly one of input_ids or inputs_embeds",
    ),
    "mask of maps": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 5, 5)}, r"\[2, 1, 5, 5\].*\[2, 5\]"),
    "mask too short": ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"\[2, 4\].*\[2, 5\]"),
    "too long": ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, r"65.*64"),
    "no samples": ({"input_ids": IDS[:0]}, r"\[0, 5\]"),
    "no tokens": ({"input_ids": IDS[:, :0]}, r"\[2, 0\]"),
    "cross-attention": ({"input_ids": IDS, "encoder_hidden_states": torch.zeros(2, 5, 32)}, "encoder_hidden_states"),
    "protected ids without ids": ({"inputs_embeds": torch.zeros(2, 5, 32)}, r"protected_token_ids \(\[3\]\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_impossible_inputs_are_refused(what):
    inputs, message = REFUSED[what]
    model = prune(build(Case(BertModel, BERT)), replace(TOP_K, protected_token_ids=(3,)))
    with pytest.raises(ValueError, match=message):
        model(**inputs)
