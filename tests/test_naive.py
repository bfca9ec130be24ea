"""The engine against the reference that is spelled out in `naive.py`: outputs and gradients, in float64."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace

import methods as presets
import pytest
import torch
from naive import NaiveOutput, NaiveSite, run_naive, sites_of, top_k_sites
from tiny import ALL, BASES, BERT, EXECUTIONS, LAYERS, Case, build, inputs_for, main_output, text_inputs
from torch.testing import assert_close
from transformers import BertModel, PreTrainedModel

from hf_tokenprune import PruningConfig, PruningStage
from hf_tokenprune.modeling.presets import PRESETS


MARGIN = 2e-6  # scores less than a millionth apart may be ties


def _stage(saliency: str, rule: str, values: Sequence[float], **more: object) -> PruningConfig:
    """One stage at the first layers."""
    common = {name: more.pop(name) for name in ("proportional_attention",) if name in more}
    return PruningConfig(stages=(PruningStage(range(len(values)), saliency, rule, values, **more),), **common)


METHODS = {
    "nothing": PruningConfig(),
    **{name: pruning for name, pruning in presets.METHODS.items() if name != "top_k_random"},
    "top_k_every_layer": PruningConfig.preset("top_k", layers=[0, 1, 2, 3], keep_rate=0.85),
    "top_k_received": PruningConfig.preset("top_k", layers=[0, 2], keep_rate=0.55, saliency="received_attention"),
    "top_k_others": _stage("received_from_others", "site_keep_rate", [0.8, 0.7]),
    "evit_every_layer": PruningConfig.preset("evit", layers=[0, 1, 2, 3], keep_rate=[0.8, 0.9, 0.6, 0.75]),
    "tome_listed": PruningConfig.preset("tome", r=[3, 0, 5]),
    "tome_plain": PruningConfig.preset("tome", r=5, proportional_attention=False),
    "diffrate_uncut": PruningConfig.preset("diffrate", prune_kept=[99] * 4, merge_kept=[25, 18, 11, 6]),
    "ltp_listed": PruningConfig.preset("ltp", thresholds=[0.0, 0.02, 0.03]),
    "ltp_padded": PruningConfig.preset("ltp", thresholds=[0.01, 0.02, 0.026, 0.03], padded_scores=True),
    "adaptive_every_layer": PruningConfig.preset("adaptive", layers=[0, 1, 3], threshold=0.6),
    "adaptive_received": PruningConfig.preset(
        "adaptive", layers=[0, 2, 3], threshold=0.93, saliency="received_attention"
    ),
    "adaptive_fuse_received": PruningConfig.preset(
        "adaptive_fuse", layers=[0, 1, 3], threshold=[0.7, 0.9, 0.95], saliency="received_attention"
    ),
    "adaptive_median": PruningConfig.preset(
        "adaptive", layers=[0, 1, 3], threshold=[0.95, 0.98, 1.03], relative_to="median", saliency="received_attention"
    ),
    "adaptive_total": PruningConfig.preset(
        "adaptive", layers=[0, 1, 3], threshold=[0.03, 0.04, 0.05], relative_to="total", saliency="cls_value_norm"
    ),
    "top_p_listed": PruningConfig.preset("top_p", layers=[0, 1, 3], p=[1.0, 0.8, 0.6], saliency="key_norm"),
    "key_norm_removed": _stage("key_norm", "remove_count", [3, 0, 40]),
    "shift_fused": _stage("residual_shift", "keep_count", [20, 9], reduction="fuse", cut=[24, 12]),
    "value_norm_fused": _stage("cls_value_norm", "site_keep_rate", [0.7, 0.7, 0.7], reduction="fuse_normalized"),
    "keys_merged_plainly": _stage("key_similarity", "remove_count", [4, 3, 2, 1], reduction="merge_mean"),
    "merged_plainly_and_weighed": _stage(
        "received_attention",
        "relative_threshold",
        [0.9, 0.95, 1.0],
        reduction="merge_mean",
        proportional_attention=True,
    ),
    "learned_between": _stage("learned", "relative_threshold", [0.8, 0.9], reduction="fuse"),
    "learned_merged": _stage("learned", "top_p", [0.8, 0.9], reduction="merge"),
    "learned_cut": _stage("learned", "keep_count", [20, 9], reduction="merge", place="before", cut=[24, 12]),
    "fused_before": _stage("learned", "site_keep_rate", [0.8, 0.7, 0.9], reduction="fuse", place="before"),
    "merged_before": _stage(
        "learned", "remove_count", [6, 4, 3], reduction="merge", place="before", proportional_attention=True
    ),
    "mixed": PruningConfig(
        stages=(
            PruningStage([0, 2], "key_similarity", "remove_count", [5, 3], "merge"),
            PruningStage([1], "cls_attention", "keep_count", [15], "fuse"),
            PruningStage([3], "received_attention", "site_keep_rate", [0.7]),
        ),
        proportional_attention=True,
    ),
}
assert {pruning.preset_name for pruning in METHODS.values()} >= set(PRESETS)
METHOD = pytest.mark.parametrize("method", METHODS)
SOME = pytest.mark.parametrize(
    "method",
    [
        "top_k",
        "evit",
        "tome",
        "diffrate",
        "dynamicvit",
        "ltp",
        "ltp_padded",
        "adaptive",
        "adaptive_received",
        "adaptive_fuse",
        "value_merge",
        "top_p",
        "mixed",
    ],
)
# One of each way in which tokens go.
WAYS = ["top_k_every_layer", "adaptive_received", "evit_normalized", "tome", "diffrate", "fused_before", "mixed"]
EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)


def _holes(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes every fourth place away from the second sample on, never a structural one."""
    batch = len(next(iter(inputs.values())))
    mask = inputs.get("attention_mask", torch.ones(batch, case.tokens, dtype=torch.long)).clone()
    mask[1:, case.prefix + 2 :: 4] = 0
    return inputs | {"attention_mask": mask}


def _inputs(case: Case) -> dict[str, torch.Tensor]:
    inputs = inputs_for(case, seed=3)
    return inputs | {name: value.double() for name, value in inputs.items() if name == "pixel_values"}


def _real(inputs: dict[str, torch.Tensor], length: int) -> torch.Tensor:  # bool [B, N]
    batch = len(next(iter(inputs.values())))
    return inputs.get("attention_mask", torch.ones(batch, length)).bool()


def _expected(samples: list[NaiveOutput]) -> torch.Tensor:
    return torch.stack([sample.sequence if sample.logits is None else sample.logits for sample in samples])


def _close(model: PreTrainedModel, actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    pruning = getattr(model.config, "pruning", None) or PruningConfig()
    where = f"{what}, {pruning.execution}"
    assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")


def _compare(model: PreTrainedModel, outputs: object, samples: list[NaiveOutput], real: torch.Tensor) -> None:
    expected, actual = _expected(samples), main_output(outputs)
    if expected.dim() == 3:
        expected, actual = expected[real], actual[real]
    _close(model, actual, expected, 1e-9, "output")
    if "pooler_output" in outputs:
        _close(model, outputs.pooler_output, torch.stack([sample.pooled for sample in samples]), 1e-9, "pooler")


def _expect(
    native: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[dict[int, NaiveSite], list[NaiveOutput]]:
    pruning = model.config.pruning
    sites = sites_of(pruning, LAYERS)
    learned = [module for name, module in model.named_modules() if name.endswith(("token_predictor", "token_prior"))]
    asked = [layer for layer, site in sites.items() if site.saliency in ("learned", "token_prior")]
    predictors = dict(zip(asked, learned))
    more = {"proportional_attention": pruning.proportional_attention, "predictors": predictors}
    samples = run_naive(native, inputs, sites, pruning.protected_token_ids, pruning.min_tokens, **more)
    assert min(sample.margin for sample in samples) > MARGIN, "choose another seed: a decision here is a near-tie"
    return sites, samples


def _executions(model: PreTrainedModel, names: Sequence[str] = EXECUTIONS) -> Iterator[str]:
    """Sets the model to one after the other."""
    pruning = model.config.pruning
    for execution in names:
        model.set_pruning(replace(pruning, execution=execution))
        yield execution


def _check(native: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        sites, samples = _expect(native, model, inputs)
    real = _real(inputs, len(samples[0].sequence))
    source = [[sample.source[site] for sample in samples] for site in range(len(sites))]
    sizes = [[sample.sizes[site] for sample in samples] for site in range(len(sites))]
    padded = [[row + [0.0] * (real.shape[1] - len(row)) for row in site] for site in sizes]
    for execution in _executions(model):
        with torch.no_grad():
            traced = model(**inputs, output_token_trace=True)
            plain = model(**inputs)
        trace = traced.token_trace
        assert trace.layers == list(sites)
        assert trace.source.tolist() == source, execution
        assert trace.counts.tolist() == [[len(row) for row in site] for site in sizes], execution
        if sites:
            assert_close(trace.sizes, torch.tensor(padded), rtol=1e-6, atol=1e-6)
            assert 1 < trace.counts[-1].max() < real.shape[1], "the method takes some away, not all"
        for outputs in (traced, plain):
            _compare(model, outputs, samples, real)


@pytest.mark.parametrize("case", ALL)
def test_the_reference_itself_is_the_native_model(case):
    native, inputs = build(case).double(), _inputs(case)
    with torch.no_grad():
        samples, outputs = run_naive(native, inputs, {}), native(**inputs)
    _compare(native, outputs, samples, _real(inputs, len(samples[0].sequence)))


def test_top_k_sites_of_a_preset():
    pruning = PruningConfig.preset("top_k", layers=[0, 1, 3], keep_rate=0.85)
    assert sites_of(pruning, LAYERS) == top_k_sites([0, 1, 3], "0.85")


@pytest.mark.parametrize("case", ALL)
@METHOD
def test_forward(case, method):
    native = build(case).double()
    _check(native, presets.pruned(native, METHODS[method]), _inputs(case))


@pytest.mark.parametrize("case", BASES)
@SOME
def test_forward_with_holes_in_the_mask(case, method):
    native = build(case).double()
    _check(native, presets.pruned(native, METHODS[method]), _holes(case, _inputs(case)))


@SOME
def test_forward_with_protected_ids_and_a_minimum(method):
    native = build(Case(BertModel, BERT)).double()
    pruning = replace(METHODS[method], protected_token_ids=[7, 9, 30], min_tokens=4)
    inputs = text_inputs([17, 5, 30, 1, 3], seed=5, padding=2, pad_id=7)
    inputs["input_ids"][0, [3, 8, 16]] = torch.tensor([7, 9, 7])
    _check(native, presets.pruned(native, pruning), inputs)


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("method", WAYS)
def test_states_and_maps_of_every_layer(case, method):
    native, inputs = build(case, attention="eager").double(), _inputs(case)
    model = presets.pruned(native, METHODS[method])
    with torch.no_grad():
        _, samples = _expect(native, model, inputs)
    real = _real(inputs, len(samples[0].sequence))
    for _ in _executions(model):
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        for layer in range(LAYERS):
            states = torch.stack([sample.hidden_states[layer] for sample in samples])
            maps = torch.stack([sample.maps[layer] for sample in samples])
            # Some native models have the softmax of eager attention in float32.
            assert_close(outputs.hidden_states[layer][real], states[real], rtol=1e-6, atol=1e-6)
            assert_close(outputs.attentions[layer], maps, rtol=1e-6, atol=1e-6)


def _without_dropout(case: Case) -> Case:
    config = deepcopy(case.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return Case(case.native, config)


def _gradients(loss: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradients))


def _loss(value: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    value = value[real] if value.dim() == 3 else value
    return (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum()


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("method", WAYS)
def test_gradients_in_training(case, method):
    native, inputs = build(_without_dropout(case)).double().train(), _inputs(case)
    model = presets.pruned(native, METHODS[method])
    assert model.training
    _, samples = _expect(native, model, inputs)
    real = _real(inputs, len(samples[0].sequence))
    # A predictor is the model's own; all else is computed by the native modules.
    theirs = dict(model.named_parameters()) | dict(native.named_parameters())
    expected = _gradients(_loss(_expected(samples), real), {name: theirs[name] for name, _ in model.named_parameters()})
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 1
    for _ in _executions(model, ["auto", *EXECUTIONS]):
        actual = _gradients(_loss(main_output(model(**inputs)), real), dict(model.named_parameters()))
        for name, gradient in expected.items():
            _close(model, actual[name], gradient, 1e-8, name)


@EXECUTION
def test_gradient_of_the_input_embeddings(execution):
    native = build(Case(BertModel, BERT)).double()
    inputs = text_inputs([17, 5], seed=3)
    real = inputs["attention_mask"].bool()
    embeddings = native.embeddings.word_embeddings(inputs["input_ids"]).detach().requires_grad_()
    model = presets.pruned(native, replace(METHODS["top_k"], execution=execution))
    outputs = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    (actual,) = torch.autograd.grad(_loss(outputs.last_hidden_state, real), embeddings)
    # The same loss by the ids: the gradient of a row of the table is the sum over the tokens that read it.
    _, samples = _expect(native, model, inputs)
    table = native.embeddings.word_embeddings.weight
    (expected,) = torch.autograd.grad(_loss(_expected(samples), real), table)
    summed = torch.zeros_like(table).index_add(0, inputs["input_ids"][real], actual[real])
    assert_close(summed, expected, rtol=1e-8, atol=1e-8)
    assert (actual[~real] == 0).all()
