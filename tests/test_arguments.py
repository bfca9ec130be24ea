"""Every argument that a native forward or its kernels act on acts, or is refused by name."""

import pytest
import tiny
import torch
from methods import METHODS
from tiny import build, cases, inputs_for, main_output, text_inputs
from torch.testing import assert_close
from transformers import (
    BertForSequenceClassification,
    BertModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_tokenprune import prune


DECODERS = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
# What kernels act on, what other encoders take, a name with a slip, and one that nobody knows.
UNKNOWN = ("softcap", "sliding_window", "position_bias", "s_aux", "head_mask", "attention_masks", "nonsense")


def native(cls: type):
    return build(next(case for case in cases(tiny.ALL) if case.native is cls))


@pytest.mark.parametrize("pruning", [None, METHODS["top_k"]], ids=["none", "top_k"])
@pytest.mark.parametrize("case", tiny.ALL)
def test_what_nobody_acts_on_is_refused_by_name(case, pruning):
    model, inputs = prune(build(case), pruning), inputs_for(case)
    for name in UNKNOWN:
        with pytest.raises(TypeError, match=f"arguments that it does not know: {name}"):
            model(**inputs, **{name: torch.ones(1)})
    for name in DECODERS:
        with pytest.raises(ValueError, match=f"{name} must be None"):
            model(**inputs, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match=r"is_causal \(True\) must be False"):
        model(**inputs, is_causal=True)
    if not case.text:
        for name in ("cu_seq_lens_q", "max_length_q", "seq_idx", "position_ids", "token_type_ids", "input_ids"):
            with pytest.raises(TypeError, match=f"arguments that it does not know: {name}"):
                model(**inputs, **{name: torch.ones(1)})


@torch.no_grad()
@pytest.mark.parametrize("case", tiny.ALL)
def test_what_natively_changes_nothing_changes_nothing(case):
    stock, inputs = build(case), inputs_for(case)
    model = prune(stock, None)
    harmless = dict.fromkeys((*DECODERS, *UNKNOWN), None) | {
        "is_causal": False,
        "use_cache": True,
        "num_items_in_batch": 3,
        "output_router_logits": False,
    }
    if not case.text:  # natively decoders' names go down to the kernels
        harmless = {name: value for name, value in harmless.items() if name not in DECODERS}
    wanted, seen = main_output(stock(**inputs, **harmless)), main_output(model(**inputs, **harmless))
    if case.text and wanted.shape[:2] == inputs["attention_mask"].shape:
        there = inputs["attention_mask"].bool()
        wanted, seen = wanted[there], seen[there]
    assert_close(seen, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cls", [BertModel, BertForSequenceClassification])
def test_masks(cls):
    """Of 0 and 1 in any type; others mean something else in other places, and natively nothing."""
    model = prune(native(cls), METHODS["top_k"])
    inputs = text_inputs([9, 5])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    wanted = main_output(model(input_ids=ids, attention_mask=mask))
    for dtype in (torch.bool, torch.int8, torch.uint8, torch.int32, torch.float16, torch.float64):
        assert_close(main_output(model(input_ids=ids, attention_mask=mask.to(dtype))), wanted)
    additive = (1.0 - mask) * torch.finfo(torch.float32).min
    by_text = torch.tensor([[1] * 5 + [2] * 4, [1] * 5 + [0] * 4])
    for strange, value in [(additive, "-3.40"), (mask * 0.5, "0.5"), (by_text, "2"), (-mask, "-1")]:
        with pytest.raises(ValueError, match=f"attention_mask holds {value}.*must hold 0 and 1 alone"):
            model(input_ids=ids, attention_mask=strange)
    square = mask[:, None, :].expand(2, 9, 9)
    for shaped in (square, square[:, None], mask[:, None, None], mask[:1], mask[:, :8], mask[0]):
        with pytest.raises(ValueError, match=r"attention_mask's shape \(.*\) must be \[batch, length\]"):
            model(input_ids=ids, attention_mask=shaped)


@torch.no_grad()
@pytest.mark.parametrize("cls", [ViTModel, ViTForImageClassification, Dinov2Model, Dinov2ForImageClassification])
def test_masked_patches_are_masked_as_natively(cls):
    case = next(case for case in cases(tiny.ALL) if case.native is cls) if cls in _known() else pytest.skip("too old")
    hidden = torch.arange(36).expand(3, -1) % 3 == 0
    if cls.__name__.startswith("ViT"):
        with pytest.raises(ValueError, match="bool_masked_pos needs a model with a mask token"):
            prune(build(case), None)(**inputs_for(case), bool_masked_pos=hidden)
        stock = ViTModel(ViTConfig(**tiny.VIT.to_dict()), use_mask_token=True).eval()
        if cls is ViTForImageClassification:
            head = build(case)
            head.vit.embeddings.mask_token = stock.embeddings.mask_token
            stock = head
    else:
        stock = build(case)
    for parameter in (p for name, p in stock.named_parameters() if name.endswith("mask_token")):
        parameter.normal_(std=2.0)
    inputs = inputs_for(case)
    wanted = main_output(stock(**inputs, bool_masked_pos=hidden))
    assert_close(main_output(prune(stock, None)(**inputs, bool_masked_pos=hidden)), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(main_output(stock(**inputs)), wanted, atol=1e-3)


def _known() -> set[type]:
    return {case.native for case in cases(tiny.ALL)}


@torch.no_grad()
def test_pictures_of_another_size_as_natively():
    pixels = torch.randn(2, 3, 32, 16)
    for cls in (ViTModel, ViTForImageClassification, Dinov2Model):
        if cls not in _known():
            continue
        stock = native(cls)
        given = {"pixel_values": pixels, "interpolate_pos_encoding": True}
        assert_close(main_output(prune(stock, None)(**given)), main_output(stock(**given)), rtol=1e-5, atol=1e-5)
        assert prune(stock, METHODS["top_k"])(**given) is not None


@torch.no_grad()
@pytest.mark.parametrize("case", tiny.ALL)
def test_chosen_hidden_states(case):
    """Since 5.20 they may be chosen by their indices; before, whatever is given asks for all."""
    stock, inputs = build(case), inputs_for(case)
    for pruning in (None, METHODS["top_k"]):
        model = prune(stock, pruning)
        everything = model(**inputs, output_hidden_states=True).hidden_states
        for asked in ([1, 3], [-1], 2, [0, -2, 99], []):
            theirs = stock(**inputs, output_hidden_states=asked).hidden_states
            ours = model(**inputs, output_hidden_states=asked).hidden_states
            assert (ours is None) == (theirs is None), asked
            if theirs is None:
                continue
            assert [x is None for x in ours] == [x is None for x in theirs], asked
            for one, other in zip(ours, everything[-len(ours) :]):
                assert one is None or torch.equal(one, other)
