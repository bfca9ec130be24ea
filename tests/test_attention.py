"""Attention of packed rows on the ways that an accelerator takes, against the runs that the CPU takes."""

import inspect
from dataclasses import replace

import pytest
import torch
from methods import METHODS, pruned
from test_objectives import PRUNINGS as OBJECTIVES
from test_objectives import TEXT, soft_model
from tiny import BASES, BERT, EXECUTIONS, VIT, Case, build, cases, image_inputs, text_inputs
from torch.nn.attention import varlen
from transformers import ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertSelfAttention, eager_attention_forward

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.modeling import saliency, selection, token_attention, token_layer
from hf_tokenprune.modeling.saliency import first_token_scores
from hf_tokenprune.modeling.token_attention import AttentionKernel, attend, attend_by_padding
from hf_tokenprune.modeling.token_layout import PackedRows, on_device


HEADS, WIDTH = 4, 8
SHAPES = pytest.mark.parametrize(
    "query_lengths, key_lengths",
    [([5, 3, 3, 1], [5, 3, 3, 1]), ([2, 1, 3, 1], [5, 3, 3, 1]), ([1, 1, 1, 1], [5, 3, 3, 1]), ([4, 4], [4, 4])],
    ids=["whole", "survivors", "first", "full"],
)


def packed(query_lengths: list[int], key_lengths: list[int]) -> tuple:
    rows = [PackedRows(lengths, torch.device("cpu")) for lengths in (query_lengths, key_lengths)]
    totals = (sum(query_lengths), sum(key_lengths), sum(key_lengths))
    return *(torch.randn(1, total, HEADS, WIDTH) for total in totals), *rows


def kernel(scaling: float = WIDTH**-0.5) -> AttentionKernel:
    BERT._attn_implementation = "sdpa"
    return AttentionKernel("sdpa", BERT, BertSelfAttention(BERT).eval(), eager_attention_forward, scaling, 0.0)


@SHAPES
def test_padding_for_the_attention_alone(query_lengths, key_lengths):
    case = packed(query_lengths, key_lengths)
    torch.testing.assert_close(attend_by_padding(kernel(), *case), attend(kernel(), *case)[0])


def naive_varlen(query, key, value, query_ends, key_ends, longest_query, longest_key):
    """What `varlen_attn` computes, a sample at a time; its arguments must fit the installed signature."""
    inspect.signature(varlen.varlen_attn).bind(query, key, value, query_ends, key_ends, longest_query, longest_key)
    assert query_ends.dtype == key_ends.dtype == torch.int32
    out = torch.empty_like(query)
    for sample in range(len(query_ends) - 1):
        rows = slice(query_ends[sample], query_ends[sample + 1])
        seen = slice(key_ends[sample], key_ends[sample + 1])
        assert rows.stop - rows.start <= longest_query and seen.stop - seen.start <= longest_key
        parts = (x.transpose(0, 1) for x in (query[rows], key[seen], value[seen]))
        out[rows] = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1)
    return out


@SHAPES
@pytest.mark.parametrize("scaling", [WIDTH**-0.5, 0.1])
def test_the_varlen_call(query_lengths, key_lengths, scaling, monkeypatch):
    """The kernel itself needs CUDA; what it is given is checked here."""
    monkeypatch.setattr(varlen, "varlen_attn", naive_varlen)
    case = packed(query_lengths, key_lengths)
    torch.testing.assert_close(token_attention._varlen(kernel(scaling), *case), attend(kernel(scaling), *case)[0])


@pytest.fixture
def like_an_accelerator(monkeypatch):
    """Lets the CPU go those ways from the call on."""

    def switch() -> None:
        for module in (saliency, selection, token_attention, token_layer):
            monkeypatch.setattr(module, "on_cpu", lambda x: False)

    return switch


@pytest.fixture
def full_products():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("lengths", [(20, 20, 11), (20, 20)], ids=["ragged", "equal"])
def test_scores_are_not_rounded_where_products_may_be(lengths, like_an_accelerator, full_products):
    torch.manual_seed(0)
    query, key = torch.randn(len(lengths), 128), torch.randn(1, sum(lengths), 128)
    rows = PackedRows(lengths, torch.device("cpu"))
    expected = first_token_scores(query.double(), key.double(), rows, 0.2, 2)
    like_an_accelerator()
    torch.set_float32_matmul_precision("medium")
    found = first_token_scores(query, key, rows, 0.2, 2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_share_of_what_is_no_number_is_the_same_on_all_ways(execution, like_an_accelerator):
    stage = {"layers": [1, 2], "saliency": "received_attention", "rule": "top_p", "values": [0.7, 0.7]}
    pruning = {"format_version": 1, "stages": [stage]}
    images = image_inputs(2)
    images["pixel_values"][0, :, :4, :4] = torch.nan
    counts = []
    for each in ("packed", execution):
        model = pruned(build(Case(ViTForImageClassification, VIT)), {**pruning, "execution": each})
        with torch.no_grad():
            counts.append(model(**images, output_token_trace=True).token_trace.counts)
        like_an_accelerator()
    assert torch.equal(*counts)


def test_numbers_go_to_a_device_whatever_the_default_is():
    with torch.device("meta"):
        assert on_device((3, 1), torch.device("cpu")).tolist() == [3, 1]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_an_accelerators_ways(method, execution, like_an_accelerator):
    """Ragged, of equal lengths, alone."""
    model = pruned(build(TEXT), replace(METHODS[method], execution=execution))
    batches = [text_inputs(lengths, padding=2) for lengths in ([17, 5, 30, 1], [20, 20], [9])]
    runs = []
    for _ in range(2):
        with torch.no_grad():
            runs.append([model(**inputs, output_token_trace=True) for inputs in batches])
        like_an_accelerator()
    for expected, found in zip(*runs):
        assert torch.equal(found.token_trace.source, expected.token_trace.source)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ragged_batches_under_an_objective(name, like_an_accelerator):
    model, inputs = soft_model(TEXT, OBJECTIVES[name]), text_inputs([17, 9, 23], padding=2)
    parameters, runs = list(model.parameters()), []
    for _ in range(2):
        torch.manual_seed(0)  # of drawn masks
        loss = model(**inputs, labels=torch.tensor([0, 2, 1])).loss
        runs.append((loss, torch.autograd.grad(loss, parameters, allow_unused=True)))
        like_an_accelerator()
    (expected, gradients), (found, others) = runs
    torch.testing.assert_close(found, expected)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 20
    for ours, theirs in zip(gradients, others):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-7)


def test_a_kernel_of_ones_own_without_masks(monkeypatch):
    """Natively it gets none and attends to padding without a word."""

    def own(module, query, key, value, attention_mask, scaling=None, **given):
        weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "own", own)
    inputs = text_inputs([9, 4])
    model = prune(build(cases(BASES)[0]), None)
    wanted = model(**inputs).last_hidden_state
    model.config._attn_implementation = "own"
    torch.testing.assert_close(model(**inputs).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
    for execution in ("padded", "masked"):
        model.set_pruning(PruningConfig.preset("top_k", layers=[1], keep_rate=0.5, execution=execution))
        with pytest.raises(ValueError, match="attention 'own' has no mask function"):
            model(**inputs)
