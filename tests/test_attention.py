"""Attention of packed rows on the ways that an accelerator takes, against the runs that the CPU takes."""

import inspect

import pytest
import torch
from tiny import BERT
from torch.nn.attention import varlen
from transformers.models.bert.modeling_bert import BertSelfAttention, eager_attention_forward

from hf_tokenprune.modeling import token_attention
from hf_tokenprune.modeling.token_attention import AttentionKernel, attend, attend_by_padding
from hf_tokenprune.modeling.token_layout import PackedRows


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
