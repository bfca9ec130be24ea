"""Families with more than one structural token: registers and the distillation token stay, whole and first."""

from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch
from methods import IDLE, METHODS, pruned
from torch.testing import assert_close
from transformers import Dinov2WithRegistersModel, PreTrainedModel

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.families import native_to_pruned


# By name, and not by what our models say of themselves.
STRUCTURAL = {"deit": 2, "dinov2_with_registers": 1 + 4}
CASES = [param for param in tiny.ALL if param.values[0].config.model_type in STRUCTURAL]
LOW = PruningConfig.preset("top_k", layers=[0, 1, 2, 3], keep_rate=0.05)

BASES = ("DeiTModel", "Dinov2WithRegistersModel")

CASE = pytest.mark.parametrize("case", CASES)
BASE = pytest.mark.parametrize("case", [param for param in CASES if param.values[0].native.__name__ in BASES])
EXECUTION = pytest.mark.parametrize("execution", tiny.EXECUTIONS)


def build(case: tiny.Case, *, seed: int = 0) -> PreTrainedModel:
    """With one-dimensional parameters that say something, too: LayerScale, norms and biases are not their defaults."""
    native = tiny.build(case, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            if "lambda1" in name:
                parameter.uniform_(0.3, 1.7, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    return native


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def assert_same_output(model: PreTrainedModel, native: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """All that the native model returns, whether or not the whole sequence is asked for."""
    with torch.no_grad():
        expected = native(**inputs, output_hidden_states=True)
        whole, plain = model(**inputs, output_hidden_states=True), model(**inputs)
    assert whole.keys() == expected.keys()
    for ours, theirs in zip(whole.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            close(whole[name], value)
            close(plain[name], value)


def test_the_cases_are_there():
    assert {param.values[0].config.model_type for param in CASES} == set(STRUCTURAL)
    assert len(CASES) == 5


@CASE
def test_the_native_embeddings_begin_with_the_structural_tokens(case):
    native, count = tiny.build(case).base_model, STRUCTURAL[case.config.model_type]
    inputs = tiny.image_inputs(2)
    with torch.no_grad():
        embedded = native.embeddings(inputs["pixel_values"])
        other = native.embeddings(-inputs["pixel_values"])
    same = (embedded == other).all(dim=-1).all(dim=0)
    assert same.tolist() == [place < count for place in range(embedded.shape[1])]
    assert prune(tiny.build(case), None).base_model.structural_tokens == count


@pytest.mark.parametrize("registers", [0, 1, 7])
def test_the_number_of_registers_follows_from_the_config(registers):
    (param,) = [param for param in tiny.BASES if param.values[0].native is Dinov2WithRegistersModel]
    if param.marks[0].args[0]:
        pytest.skip("needs a later transformers")
    config = deepcopy(param.values[0].config)
    config.num_register_tokens = registers
    model = prune(Dinov2WithRegistersModel(config).eval(), LOW)
    assert model.structural_tokens == 1 + registers
    trace = model(**tiny.image_inputs(2), output_token_trace=True).token_trace
    assert trace.counts[-1].tolist() == [1 + registers] * 2
    assert (trace.source[-1, :, : 1 + registers] == torch.arange(1 + registers)).all()
    assert (trace.source[-1, :, 1 + registers :] == -1).all()


@CASE
def test_no_pruning_is_the_native_model(case):
    native = build(case)
    assert_same_output(prune(native, None), native, tiny.image_inputs(3))


@CASE
@EXECUTION
@pytest.mark.parametrize("method", ["top_k", "tome"])
def test_a_pruning_that_takes_nothing_is_the_native_model(case, execution, method):
    native = build(case)
    assert_same_output(pruned(native, replace(IDLE[method], execution=execution)), native, tiny.image_inputs(3))


@BASE
@EXECUTION
@pytest.mark.parametrize("method", [*METHODS, "low", "tome_all", "diffrate_all", "power_bert_all", "top_p_all"])
def test_structural_tokens_stay_whole_and_first(case, execution, method):
    count = STRUCTURAL[case.config.model_type]
    pruning = METHODS | {
        "low": LOW,
        "tome_all": PruningConfig.preset("tome", r=1000),
        "diffrate_all": PruningConfig.preset("diffrate", prune_kept=[20, 9, 3, 1], merge_kept=[12, 4, 1, 1]),
        "power_bert_all": PruningConfig.preset("power_bert", retention=[1, 1, 1, 1]),
        "top_p_all": PruningConfig.preset("top_p", layers=[0, 1, 2], p=0.01),
    }
    model = pruned(build(case), replace(pruning[method], execution=execution))
    with torch.no_grad():
        trace = model(**tiny.image_inputs(3), output_token_trace=True).token_trace
    assert len(trace.layers) > 1
    assert (trace.counts[-1] < count + 36).all(), "the method takes something away"
    assert (trace.counts >= count).all()
    for source, sizes in zip(trace.source, trace.sizes):
        for sample in range(3):
            assert source[sample, :count].tolist() == list(range(count))
            assert not set(source[sample, count:].tolist()) & set(range(count)), "nothing merged into them"
            assert sizes[sample, :count].tolist() == [1.0] * count


@CASE
@pytest.mark.parametrize("method", ["low", "evit", "tome", "diffrate", "dynamicvit"])
def test_executions_agree(case, method):
    inputs, found = tiny.image_inputs(3), []
    for execution in tiny.EXECUTIONS:
        model = pruned(build(case), replace(METHODS.get(method, LOW), execution=execution))
        with torch.no_grad():
            found.append((tiny.main_output(model(**inputs)), model(**inputs, output_token_trace=True).token_trace))
    for output, trace in found[1:]:
        close(output, found[0][0])
        assert torch.equal(trace.source, found[0][1].source)


@CASE
def test_a_rate_counts_the_patches_alone(case):
    count = STRUCTURAL[case.config.model_type]
    model = prune(build(case), PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5))
    trace = model(**tiny.image_inputs(2), output_token_trace=True).token_trace
    assert trace.counts.tolist() == [[count + 18] * 2, [count + 9] * 2]


@pytest.mark.parametrize("case", [param for param in CASES if param.values[0].native.__name__ not in BASES])
def test_what_a_head_reads_is_what_the_native_head_reads(case):
    """Over our own restored sequence: a last layer cut too short, or registers among the patches, would show."""
    model = prune(build(case), LOW)
    inputs = tiny.image_inputs(3)
    with torch.no_grad():
        sequence, out = model.base_model(**inputs).last_hidden_state, model(**inputs)
        if "WithTeacher" in str(case):
            close(out.cls_logits, model.cls_classifier(sequence[:, 0]))
            close(out.distillation_logits, model.distillation_classifier(sequence[:, 1]))
            close(out.logits, (out.cls_logits + out.distillation_logits) / 2)
        elif case.config.model_type == "deit":
            close(out.logits, model.classifier(sequence[:, 0]))
        else:
            patches = sequence[:, STRUCTURAL[case.config.model_type] :].mean(dim=1)
            close(out.logits, model.classifier(torch.cat([sequence[:, 0], patches], dim=1)))


@CASE
@pytest.mark.parametrize("old", [False, True])
def test_a_stock_checkpoint_loads_whole(case, old, tmp_path):
    native = build(case)
    native.save_pretrained(tmp_path, save_original_format=old)
    model, info = native_to_pruned()[case.native].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.pruning is None
    assert_same_output(model.eval(), native, tiny.image_inputs(2))


@CASE
def test_other_image_sizes(case):
    """Position embeddings are interpolated as the native model does it."""
    native = build(case)
    options = {"interpolate_pos_encoding": True} if case.config.model_type == "deit" else {}
    inputs = {"pixel_values": torch.randn(2, 3, 32, 16), **options}
    assert_same_output(prune(native, None), native, inputs)
    model = prune(native, PruningConfig.preset("top_k", layers=[1], keep_rate=0.5))
    trace = model(**inputs, output_token_trace=True).token_trace
    assert trace.counts.tolist() == [[STRUCTURAL[case.config.model_type] + 16] * 2]
