"""What seldom meets: batches that are cut in parts, odd shapes, masks of images, learned scores in half precision."""

import copy

import pytest
import torch
from tiny import BERT, DEIT, DINOV2, REGISTERS, VIT, VOCABULARY, Case, build, cases, image_inputs, text_inputs
from transformers import (
    BertForSequenceClassification,
    BertModel,
    DeiTModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    ViTForImageClassification,
    ViTModel,
)

from hf_tokenprune import PruningConfig, PruningStage, prune
from hf_tokenprune.modeling.token_layer import FEED_FORWARD_ROWS


TEXT, TEXT_HEAD = Case(BertModel, BERT), Case(BertForSequenceClassification, BERT)
IMAGES = cases([Case(ViTModel, VIT), Case(DeiTModel, DEIT), Case(Dinov2Model, DINOV2)])
POOLING = cases(
    [Case(Dinov2ForImageClassification, DINOV2), Case(Dinov2WithRegistersForImageClassification, REGISTERS)]
)


@pytest.fixture
def deep_case() -> Case:
    """With stochastic depth, of which a batch is drawn sample by sample."""
    found = cases([Case(Dinov2Model, copy.deepcopy(DINOV2))])
    if not found:
        pytest.skip("no DINOv2 in this transformers")
    found[0].config.drop_path_rate = 0.5
    return found[0]


# Beyond what goes through a feed-forward at once where nothing is trained.
MANY = 2 * FEED_FORWARD_ROWS // 37 + 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_draw_what_they_drew(deep_case, reentrant):
    native = build(deep_case)

    def gradients(checkpointed: bool) -> torch.Tensor:
        model = prune(copy.deepcopy(native), None).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        states = model(**image_inputs(MANY)).last_hidden_state
        (states * torch.linspace(-1, 1, 32)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-5, atol=1e-7)


def test_stochastic_depth_is_drawn_for_whole_samples(deep_case):
    model = prune(build(deep_case), None).train()
    shapes = []
    for layer in model.token_layers():
        layer.drop_path.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    with torch.no_grad():
        model(**image_inputs(MANY))
    assert len(shapes) == 8 and all(shape == (MANY, 37, 32) for shape in shapes)


def test_a_table_may_cut_before_it_merges():
    stage = PruningStage([0], "token_prior", "keep_count", [5], "merge", place="before", cut=[9])
    model = prune(build(TEXT), PruningConfig(stages=[stage]))
    model.set_token_prior(torch.rand(VOCABULARY) + 0.5)
    trace = model(**text_inputs([20, 7]), output_token_trace=True).token_trace
    assert trace.counts.tolist() == [[5, 5]]
    assert (trace.source[0] >= 0).sum(dim=1).tolist() == [9, 7]  # 11 dropped, 4 merged; 2 merged


def test_ids_of_one_sample_hold_for_all():
    inputs = text_inputs([9, 5, 7])
    kinds = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0]])
    native = build(TEXT_HEAD)
    ours = prune(native, None)
    for name in ("token_type_ids", "position_ids"):
        expected = native(**inputs, **{name: kinds})[0]
        for given in (kinds, kinds.expand(3, 9), kinds[0]):
            torch.testing.assert_close(ours(**inputs, **{name: given})[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_ids_of_another_length_are_refused(name):
    model = prune(build(TEXT), None)
    for shape in ((3, 12), (2, 9), (3, 1)):
        with pytest.raises(ValueError, match=rf"{name}'s shape \(\[{shape[0]}, {shape[1]}\]\) must be .* \[3, 9\]"):
            model(**text_inputs([9, 5, 7]), **{name: torch.zeros(shape, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"input_ids's shape \(\[9\]\) must be \[batch, length\]"):
        model(input_ids=torch.ones(9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"inputs_embeds's shape \(\[9, 32\]\) must be \[batch, length, hidden\]"):
        model(inputs_embeds=torch.ones(9, 32))


@pytest.mark.parametrize("case", IMAGES, ids=str)
@pytest.mark.parametrize("execution", ["packed", "padded", "masked"])
def test_hidden_patches_hold_zeros(case, execution):
    mask = torch.ones(2, case.tokens, dtype=torch.long)
    mask[0, -9:] = 0
    for pruning in (None, {"preset": "top_k", "layers": [1], "keep_rate": 0.5, "execution": execution}):
        model = prune(build(case), pruning)
        torch.nn.init.normal_(model.layernorm.bias)
        output = model(**image_inputs(2), attention_mask=mask, output_hidden_states=True)
        for states in (output.last_hidden_state, *output.hidden_states):
            assert not states[0, -9:].any() and states[1].abs().sum(dim=-1).all()


def test_an_image_keeps_its_class_token():
    for case in [*IMAGES, Case(ViTForImageClassification, VIT)]:
        mask = torch.ones(2, case.tokens, dtype=torch.long)
        mask[1, 0] = 0
        with pytest.raises(ValueError, match=rf"attention_mask .* must be 1 for the first {case.prefix} tokens"):
            prune(build(case), None)(**image_inputs(2), attention_mask=mask)


@pytest.mark.parametrize("case", POOLING, ids=str)
def test_a_head_that_pools_patches_takes_no_mask(case):
    model, inputs = prune(build(case), None), image_inputs(2)
    mask = torch.ones(2, case.tokens, dtype=torch.long)
    torch.testing.assert_close(model(**inputs, attention_mask=mask).logits, model(**inputs).logits)
    mask[0, -3:] = 0
    with pytest.raises(
        ValueError, match=rf"attention_mask \(with 3 zeros\) must be 1 everywhere: {type(model).__name__}"
    ):
        model(**inputs, attention_mask=mask)


def learning(**objective: object) -> torch.nn.Module:
    pruning = {"preset": "adaptive", "layers": [1], "threshold": 0.5, "saliency": "learned", "place": "before"}
    return prune(build(TEXT), pruning | {"objective": {"name": "budget", "target_macs": 0.5, **objective}})


def test_learned_scores_are_as_wide_in_the_soft_phase():
    model, seen = learning(), []
    predictor = model.encoder.layer[1].token_predictor
    predictor.in_conv[1].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    for mode in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.train(mode)(**text_inputs([9, 5, 7]))
    assert seen and set(seen) == {torch.float32}


def test_a_trace_counts_what_is_there_while_masks_stand_for_removal():
    inputs = text_inputs([9, 5, 7])
    trace = learning().train()(**inputs, output_token_trace=True).token_trace
    assert trace.counts.dtype == torch.long and trace.counts.tolist() == [[9, 5, 7]]
    assert (trace.source >= 0).sum(dim=2).tolist() == trace.counts.tolist()


def test_a_predictor_goes_along_to_a_pruning_that_does_not_ask_it():
    first = prune(build(TEXT), {"preset": "dynamicvit", "layers": [1]})
    without = prune(first, None)
    again = prune(without, {"preset": "dynamicvit", "layers": [1]})
    weights = [model.encoder.layer[1].token_predictor.out_conv[0].weight for model in (first, without, again)]
    assert len({weight.data_ptr() for weight in weights}) == 1
    inputs = text_inputs([9, 5, 7])
    assert torch.equal(again(**inputs)[0], first(**inputs)[0])


def test_protected_ids_need_no_ids_where_nothing_is_pruned():
    given = {"inputs_embeds": torch.randn(2, 9, 32)}
    idle = PruningConfig.preset("top_k", layers=[1], keep_rate=1.0, protected_token_ids=[3])
    model = prune(build(TEXT), idle)
    assert torch.equal(model(**given)[0], prune(model, None)(**given)[0])


def test_a_table_that_was_emptied_is_noticed():
    model = prune(build(TEXT), {"preset": "adaptive", "layers": [1], "prior_threshold": 0.9})
    empty = model.state_dict() | {"encoder.layer.0.token_prior.worth": torch.full((VOCABULARY,), torch.nan)}
    model.set_token_prior([1.0] * VOCABULARY)
    model(**text_inputs([9, 5]))
    model.load_state_dict(empty)
    with pytest.raises(ValueError, match="has an empty table"):
        model(**text_inputs([9, 5]))
    for worth, words in (
        ([1.0] * 3, r"worth's shape \(\[3\]\) must be \[50\]"),
        ([-2.0] * VOCABULARY, r"worth \(-2.0\)"),
    ):
        with pytest.raises(ValueError, match=words):
            model.set_token_prior(worth)


def test_weights_may_be_given_by_place(tmp_path):
    model = prune(build(TEXT), {"preset": "dynamicvit", "layers": [1]})
    model.set_pruning(None)
    model.save_pretrained(tmp_path, True, model.state_dict())
    assert torch.equal(type(model).from_pretrained(tmp_path)(**text_inputs([5]))[0], model(**text_inputs([5]))[0])
