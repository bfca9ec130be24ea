"""`count_macs` against what torch counts in a real call, and against closed formulas."""

import re

import methods
import pytest
import torch
from methods import pruned
from tiny import ALL, BASES, BERT, LAYERS, TYPICAL, VIT, Case, build, image_inputs, inputs_for, text_inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    ViTForImageClassification,
)

from hf_tokenprune import PruningConfig, PruningStage, count_macs, prune


WIDTH, INNER = 32, 64  # of every tiny model
A_LAYER = re.compile(r"\.layers?\.\d+$")

CASE = pytest.mark.parametrize("case", ALL)


def _flops_of_a_norm(shape: torch.Size, *_: object, **__: object) -> int:
    return 2 * shape.numel()


def _flops_of_added_rows(to: torch.Size, dim: int, index: torch.Size, rows: torch.Size, **_: object) -> int:
    """Rows that are weighed and added to others."""
    return 2 * rows.numel()


def _flops_of_a_product(left: object, right: object, out_shape: torch.Size, **_: object) -> int:
    """The class token's row is multiplied token by token and summed by head; scalings are not counted."""
    shapes = [shape for shape in (left, right) if isinstance(shape, torch.Size) and len(shape) > 2]
    tokens = len(shapes) == 2 and all(shape[-1:] == out_shape[-1:] for shape in shapes)
    return 2 * out_shape.numel() if tokens else 0


def _counted_macs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[int]:
    """What torch counts inside each encoder layer; embeddings, poolers and classifiers lie outside."""
    products = {
        torch.ops.aten.mul: _flops_of_a_product,
        torch.ops.aten.linalg_vector_norm: _flops_of_a_norm,
        torch.ops.aten.index_add: _flops_of_added_rows,
    }
    with FlopCounterMode(display=False, custom_mapping=products) as counter, torch.no_grad():
        model(**inputs)
    layers = {name: flops for name, flops in counter.get_flop_counts().items() if A_LAYER.search(name)}
    assert len(layers) == LAYERS
    return [sum(layers[name].values()) // 2 for name in sorted(layers)]


def _stock(tokens: int, queries: int | None = None) -> int:
    """One stock layer on one sample: key and value, query and output, two products with the map, feed-forward."""
    queries = tokens if queries is None else queries
    projections = 2 * tokens * WIDTH**2 + 2 * queries * WIDTH**2
    return projections + 2 * queries * tokens * WIDTH + 2 * queries * WIDTH * INNER


def _lengths(case: Case, inputs: dict[str, torch.Tensor]) -> list[int]:
    return inputs["attention_mask"].sum(dim=1).tolist() if case.text else [case.tokens] * 3


METHODS = {
    "nothing": PruningConfig(),
    "top_k": PruningConfig.preset("top_k", layers=[0, 2], keep_rate=0.6),
    "top_k_last": PruningConfig.preset("top_k", layers=[1, LAYERS - 1], keep_rate=0.5),
    "adaptive": PruningConfig.preset("adaptive", layers=[1, 2], threshold=0.7),
    "received": PruningConfig.preset("adaptive", layers=[1, 3], threshold=0.9, saliency="received_attention"),
    "sites_that_drop_nothing": PruningConfig.preset("top_k", layers=[0, 1, 2, 3], keep_rate=1.0),
}
OWN = tuple(METHODS)
METHODS |= {name: pruning for name, pruning in methods.METHODS.items() if name not in METHODS}


def _pairs() -> list:
    """Some methods with every anatomy, and all of them with a text and an image model."""
    two = [param for param in TYPICAL if param.id in ("BertModel", "DeiTModel")]
    return [
        pytest.param(*param.values, name, marks=param.marks, id=f"{param.id}-{name}")
        for name in METHODS
        for param in (TYPICAL if name in OWN else two)
    ]


@pytest.mark.parametrize("case, method", _pairs())
def test_total_is_what_torch_counts(case, method):
    """Sample by sample: a score over a full map of a ragged batch may be padded, and MACs are of unpadded tokens."""
    model = pruned(build(case, attention="eager"), METHODS[method])
    inputs = inputs_for(case)
    for row, length in enumerate(_lengths(case, inputs)):
        one = {
            name: value[row : row + 1, :length] if case.text else value[row : row + 1] for name, value in inputs.items()
        }
        macs = count_macs(model, one)
        counted = _counted_macs(model, one)
        assert macs.per_layer == counted
        assert macs.total == sum(counted)


@CASE
@pytest.mark.parametrize("method", ["nothing", "top_k", "adaptive"])
def test_total_of_a_batch_is_what_torch_counts(case, method):
    model, inputs = prune(build(case, attention="eager"), METHODS[method]), inputs_for(case)
    assert count_macs(model, inputs).per_layer == _counted_macs(model, inputs)


@CASE
@pytest.mark.parametrize("method", ["top_k_last", "received"])
@pytest.mark.parametrize("wish", ["output_attentions", "output_hidden_states"])
def test_what_else_is_asked_for_is_counted(case, method, wish):
    """Complete maps need every token's query, even of those that are dropped there."""
    model = prune(build(case, attention="eager"), METHODS[method])
    inputs = text_inputs([17]) if case.text else image_inputs(1)
    more = inputs | {wish: True}
    assert count_macs(model, more).per_layer == _counted_macs(model, more)
    if wish == "output_attentions":
        assert count_macs(model, more).total > count_macs(model, inputs).total


@CASE
def test_unpruned_is_what_torch_counts_in_the_stock_model(case):
    native, inputs = build(case, attention="eager"), inputs_for(case)
    length = _lengths(case, inputs)[0]
    one = {name: value[:1, :length] if case.text else value[:1] for name, value in inputs.items()}
    counted = _counted_macs(native, one)
    macs = count_macs(native, one)
    assert macs.per_layer == counted
    assert macs.total == macs.unpruned == sum(counted)
    assert macs.ratio == 1


@CASE
def test_unpruned_is_the_closed_formula(case):
    native, inputs = build(case), inputs_for(case)
    expected = [LAYERS * _stock(length) for length in _lengths(case, inputs)]
    for model in (native, prune(native, None), prune(native, METHODS["top_k"])):
        assert count_macs(model, inputs).unpruned == sum(expected)
    assert count_macs(native, inputs).per_sample == expected


@pytest.mark.parametrize("case", BASES)
def test_nothing_pruned_costs_what_the_stock_layers_cost(case):
    macs = count_macs(prune(build(case), None), inputs_for(case))
    assert macs.total == macs.lossless == macs.unpruned
    assert macs.ratio == 1


@pytest.mark.parametrize(
    "case", [Case(BertForSequenceClassification, BERT), Case(ViTForImageClassification, VIT)], ids=str
)
def test_lossless_is_credited_with_the_last_layer(case):
    inputs = inputs_for(case)
    expected = sum((LAYERS - 1) * _stock(length) + _stock(length, queries=1) for length in _lengths(case, inputs))
    for pruning in (None, METHODS["top_k"]):
        macs = count_macs(prune(build(case), pruning), inputs)
        assert macs.lossless == expected < macs.unpruned
    assert count_macs(prune(build(case), None), inputs).total == expected


@pytest.mark.parametrize("case, method", _pairs())
def test_the_shares_sum_to_the_total(case, method):
    model, inputs = pruned(build(case), METHODS[method]), inputs_for(case)
    macs = count_macs(model, inputs)
    assert type(macs.total) is int
    assert len(macs.per_layer) == LAYERS
    assert sum(macs.per_layer) == sum(macs.per_sample) == macs.total
    assert macs.ratio == macs.total / macs.unpruned


@pytest.mark.parametrize("execution", ["auto", "packed", "padded", "masked"])
def test_padding_and_execution_do_not_count(execution):
    pruning = PruningConfig.preset("adaptive", layers=[0, 2], threshold=0.8, execution=execution)
    model = prune(build(Case(BertModel, BERT)), pruning)
    whole = count_macs(model, text_inputs([17, 5, 30], padding=9))
    model.set_pruning(PruningConfig.preset("adaptive", layers=[0, 2], threshold=0.8))
    assert count_macs(model, text_inputs([17, 5, 30])) == whole


@pytest.mark.parametrize("length", [20, 50], ids=["all_queries_at_once", "survivors_alone"])
def test_adaptive_counts_are_of_this_very_input(length):
    """So few tokens all ask at once; of more, the class token asks first and the survivors after it."""
    case = Case(BertModel, BERT)
    pruning = PruningConfig.preset("adaptive", layers=[0], threshold=1.0)
    model = prune(build(case), pruning)
    totals = set()
    for seed in range(4):
        inputs = text_inputs([length], seed=seed)
        with torch.no_grad():
            kept = model(**inputs, output_token_trace=True).token_trace.counts.item()
        queries = length if length == 20 else 1 + kept
        site = (2 * length + queries + kept) * WIDTH**2 + 2 * kept * (length * WIDTH + WIDTH * INNER)
        score = length * WIDTH  # the class token's row of products
        macs = count_macs(model, inputs)
        assert macs.per_layer == [site + score] + [_stock(kept)] * (LAYERS - 1)
        totals.add(macs.total)
    assert len(totals) > 1


def test_a_full_map_is_paid_for():
    stage = PruningStage([1], "received_attention", "keep_rate", [0.5])
    macs = count_macs(prune(build(Case(BertModel, BERT)), PruningConfig(stages=(stage,))), text_inputs([21]))
    kept = 11
    site = 3 * 21 * WIDTH**2 + kept * WIDTH**2 + 2 * kept * (21 * WIDTH + WIDTH * INNER)
    assert macs.per_layer == [_stock(21), site + 21 * 21 * WIDTH, _stock(kept), _stock(kept)]


def test_counting_changes_nothing():
    model = prune(build(Case(BertModel, BERT)), METHODS["top_k"])
    before = model.config.to_dict()
    count_macs(model, text_inputs([9, 4]))
    assert model.config.to_dict() == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("native", [DistilBertModel, nn.Linear])
def test_an_unsupported_model_is_refused(native):
    model = (
        native(2, 2) if native is nn.Linear else native(DistilBertConfig(dim=8, n_heads=2, n_layers=1, vocab_size=9))
    )
    with pytest.raises(TypeError, match=rf"{native.__name__}.*BertModel"):
        count_macs(model, image_inputs(1))
