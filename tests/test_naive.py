"""The engine against the reference that is spelled out in `naive.py`: outputs and gradients, in float64."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from naive import NaiveOutput, NaiveSite, kept_places, run_naive, threshold_sites, top_k_sites
from tiny import ALL, BASES, BERT, EXECUTIONS, Case, build, inputs_for, main_output, text_inputs
from torch.testing import assert_close
from transformers import BertModel, PreTrainedModel

from hf_tokenprune import PruningConfig, PruningStage, prune


def _top_k(layers: Sequence[int], rate: str, **common: object) -> tuple[PruningConfig, dict[int, NaiveSite]]:
    return PruningConfig.preset("top_k", layers=layers, keep_rate=float(rate), **common), top_k_sites(layers, rate)


def _received_top_k(layers: Sequence[int], rate: str) -> tuple[PruningConfig, dict[int, NaiveSite]]:
    sites = top_k_sites(layers, rate, "received_attention")
    values = [float(site.value) for site in sites.values()]
    return PruningConfig(stages=(PruningStage(layers, "received_attention", "keep_rate", values),)), sites


def _adaptive(layers: Sequence[int], threshold: float, saliency: str) -> tuple[PruningConfig, dict[int, NaiveSite]]:
    pruning = PruningConfig.preset("adaptive", layers=layers, threshold=threshold, saliency=saliency)
    return pruning, threshold_sites(layers, threshold, saliency)


METHODS = {
    "nothing": (PruningConfig(), {}),
    "top_k": _top_k([1, 2], "0.6"),
    "top_k_every_layer": _top_k([0, 1, 2, 3], "0.85"),
    "top_k_received": _received_top_k([0, 2], "0.55"),
    "adaptive": _adaptive([0, 1, 3], 0.6, "cls_attention"),
    "adaptive_received": _adaptive([0, 2, 3], 0.93, "received_attention"),
}
METHOD = pytest.mark.parametrize("method", METHODS)
EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)


def _holes(inputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Takes every fourth place away from the second sample on, never the first place."""
    batch = len(next(iter(inputs.values())))
    mask = inputs.get("attention_mask", torch.ones(batch, length, dtype=torch.long)).clone()
    mask[1:, 3::4] = 0
    return inputs | {"attention_mask": mask}


def _inputs(case: Case) -> dict[str, torch.Tensor]:
    inputs = inputs_for(case, seed=3)
    return inputs | {name: value.double() for name, value in inputs.items() if name == "pixel_values"}


def _real(inputs: dict[str, torch.Tensor], length: int) -> torch.Tensor:  # bool [B, N]
    batch = len(next(iter(inputs.values())))
    return inputs.get("attention_mask", torch.ones(batch, length)).bool()


def _expected(samples: list[NaiveOutput]) -> torch.Tensor:
    return torch.stack([sample.sequence if sample.logits is None else sample.logits for sample in samples])


def _compare(outputs: object, samples: list[NaiveOutput], real: torch.Tensor) -> None:
    expected, actual = _expected(samples), main_output(outputs)
    if expected.dim() == 3:
        expected, actual = expected[real], actual[real]
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    if "pooler_output" in outputs:
        assert_close(outputs.pooler_output, torch.stack([sample.pooled for sample in samples]), rtol=1e-9, atol=1e-9)


def _check(
    native: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, torch.Tensor], sites: dict[int, NaiveSite]
) -> None:
    pruning = model.config.pruning
    with torch.no_grad():
        samples = run_naive(native, inputs, sites, pruning.protected_token_ids, pruning.min_tokens)
        traced = model(**inputs, output_token_trace=True)
        plain = model(**inputs)
    assert min(sample.margin for sample in samples) > 1e-5, "choose another seed: a decision here is a near-tie"
    real = _real(inputs, len(samples[0].sequence))
    for outputs in (traced, plain):
        _compare(outputs, samples, real)
    trace = traced.token_trace
    assert trace.layers == list(sites)
    expected = [[sample.kept[site] for sample in samples] for site in range(len(sites))]
    assert kept_places(trace) == expected
    assert trace.counts.tolist() == [[len(kept) for kept in site] for site in expected]
    assert not sites or 1 < max(map(len, expected[-1])) < len(samples[0].sequence), "the method drops some, not all"


@pytest.mark.parametrize("case", ALL)
def test_the_reference_itself_is_the_native_model(case):
    native, inputs = build(case).double(), _inputs(case)
    with torch.no_grad():
        samples, outputs = run_naive(native, inputs, {}), native(**inputs)
    _compare(outputs, samples, _real(inputs, len(samples[0].sequence)))


@pytest.mark.parametrize("case", ALL)
@METHOD
@EXECUTION
def test_forward(case, method, execution):
    pruning, sites = METHODS[method]
    native = build(case).double()
    _check(native, prune(native, replace(pruning, execution=execution)), _inputs(case), sites)


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("method", ["top_k", "adaptive", "adaptive_received"])
@EXECUTION
def test_forward_with_holes_in_the_mask(case, method, execution):
    pruning, sites = METHODS[method]
    native = build(case).double()
    inputs = _holes(_inputs(case), length=37)
    _check(native, prune(native, replace(pruning, execution=execution)), inputs, sites)


@pytest.mark.parametrize("method", ["top_k", "adaptive"])
@EXECUTION
def test_forward_with_protected_ids_and_a_minimum(method, execution):
    pruning, sites = _top_k([0, 1, 2], "0.4") if method == "top_k" else _adaptive([0, 1, 2], 0.9, "cls_attention")
    pruning = replace(pruning, execution=execution, protected_token_ids=[7, 9, 30], min_tokens=4)
    native = build(Case(BertModel, BERT)).double()
    inputs = text_inputs([17, 5, 30, 1, 3], seed=5, padding=2, pad_id=7)
    inputs["input_ids"][0, [3, 8, 16]] = torch.tensor([7, 9, 7])
    _check(native, prune(native, pruning), inputs, sites)


def _without_dropout(case: Case) -> Case:
    config = deepcopy(case.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return Case(case.native, config)


def _gradients(loss: torch.Tensor, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradients))


def _loss(value: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    value = value[real] if value.dim() == 3 else value
    return (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum()


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("method", ["top_k", "top_k_every_layer", "adaptive_received"])
@pytest.mark.parametrize("execution", ["auto", *EXECUTIONS])
def test_gradients_in_training(case, method, execution):
    pruning, sites = METHODS[method]
    native, inputs = build(_without_dropout(case)).double().train(), _inputs(case)
    model = prune(native, replace(pruning, execution=execution))
    assert model.training
    samples = run_naive(native, inputs, sites)
    real = _real(inputs, len(samples[0].sequence))
    expected = _gradients(_loss(_expected(samples), real), native)
    actual = _gradients(_loss(main_output(model(**inputs)), real), model)
    assert actual.keys() == expected.keys()
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 1
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@EXECUTION
def test_gradient_of_the_input_embeddings(execution):
    pruning, sites = METHODS["top_k"]
    native = build(Case(BertModel, BERT)).double()
    inputs = text_inputs([17, 5], seed=3)
    real = inputs["attention_mask"].bool()
    embeddings = native.embeddings.word_embeddings(inputs["input_ids"]).detach().requires_grad_()
    model = prune(native, replace(pruning, execution=execution))
    outputs = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    (actual,) = torch.autograd.grad(_loss(outputs.last_hidden_state, real), embeddings)
    # The same loss by the ids: the gradient of a row of the table is the sum over the tokens that read it.
    samples = run_naive(native, inputs, sites)
    table = native.embeddings.word_embeddings.weight
    (expected,) = torch.autograd.grad(_loss(_expected(samples), real), table)
    summed = torch.zeros_like(table).index_add(0, inputs["input_ids"][real], actual[real])
    assert_close(summed, expected, rtol=1e-8, atol=1e-8)
    assert (actual[~real] == 0).all()
