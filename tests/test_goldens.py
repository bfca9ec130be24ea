"""What the reference implementations computed, case by case, through the ordinary `from_pretrained` and `prune`."""

import json
import os
from pathlib import Path

import pytest
import torch
from naive import kept_places
from safetensors.torch import load_file
from tiny import EXECUTIONS
from torch.testing import assert_close
from transformers import BertForSequenceClassification, PreTrainedModel, ViTForImageClassification

from hf_tokenprune import PruningConfig, load_dynamicvit_predictors, prune


GOLDENS = Path(os.environ.get("HF_TOKENPRUNE_GOLDENS", Path(__file__).with_name("goldens")))
NATIVES = {"bert": BertForSequenceClassification, "vit": ViTForImageClassification}
CASES = sorted(str(path.parent.relative_to(GOLDENS)) for path in GOLDENS.glob("*/*/case.json"))
PRESETS = {"topk": "top_k"}
ABOUT_THE_CASE = {"method", "reference", "note", "n_out", "inputs"}

EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def test_the_goldens_are_there():
    assert CASES, f"no cases at {GOLDENS}; set HF_TOKENPRUNE_GOLDENS to the folder that holds bert/ and vit/"


def _named(*methods: str) -> list[str]:
    return [name for name in CASES if _read(name)[0]["method"] in methods]


def _read(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Hyper-parameters, the model's inputs, what the reference returned."""
    folder = GOLDENS / name
    case = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder.parent / "inputs.safetensors")
    if folder.parent.name == "bert":
        ids, mask = case.get("inputs", "input_ids/attention_mask").split("/")
        inputs = {"input_ids": inputs[ids], "attention_mask": inputs[mask]}
    return case, inputs, load_file(folder / "expected.safetensors")


def _model(name: str, execution: str, attention: str = "sdpa") -> PreTrainedModel:
    family = name.partition("/")[0]
    case, _, expected = _read(name)
    native = NATIVES[family].from_pretrained(GOLDENS / family / "model", attn_implementation=attention).eval()
    if case["method"] == "none":
        return prune(native, PruningConfig(execution=execution))
    hyperparameters = {key: value for key, value in case.items() if key not in ABOUT_THE_CASE}
    method = PRESETS.get(case["method"], case["method"])
    model = prune(native, PruningConfig.preset(method, execution=execution, **hyperparameters))
    if method == "dynamicvit":
        weights = {key: value for key, value in expected.items() if key.startswith("predictor.")}
        load_dynamicvit_predictors(model, weights)
    return model


@torch.no_grad()
def _trace(name: str, execution: str) -> object:
    return _model(name, execution)(**_read(name)[1], output_token_trace=True).token_trace


@pytest.mark.parametrize("name", CASES)
@EXECUTION
@ATTENTION
def test_logits(name, execution, attention):
    _, inputs, expected = _read(name)
    model = _model(name, execution, attention)
    with torch.no_grad():
        plain, traced = model(**inputs).logits, model(**inputs, output_token_trace=True).logits
    for logits in (plain, traced):
        assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


@EXECUTION
@ATTENTION
def test_ragged_logits_of_the_unpruned_model(execution, attention):
    inputs, expected = load_file(GOLDENS / "bert/inputs.safetensors"), _read("bert/unpruned")[2]
    model = _model("bert/unpruned", execution, attention)
    with torch.no_grad():
        logits = model(inputs["ragged_input_ids"], attention_mask=inputs["ragged_attention_mask"]).logits
    assert_close(logits, expected["ragged_logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if "n_out" in _read(name)[0]])
@EXECUTION
def test_token_counts(name, execution):
    """The references list what leaves every layer; in a trace there is an entry for each site."""
    case, trace = _read(name)[0], _trace(name, execution)
    layers = case.get("layers", range(6)) if case["method"] != "dynamicvit" else range(3)
    assert [counts.unique().tolist() for counts in trace.counts] == [[case["n_out"][layer]] for layer in layers]


@pytest.mark.parametrize("name", _named("tome", "diffrate"))
@EXECUTION
def test_clusters_and_sizes(name, execution):
    expected, trace = _read(name)[2], _trace(name, execution)
    assert torch.equal(trace.source[-1], expected["cluster"])
    sizes = torch.zeros_like(trace.sizes[-1])
    sizes[:, : expected["size"].shape[1]] = expected["size"]
    assert_close(trace.sizes[-1], sizes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", _named("topk", "evit", "dynamicvit"))
@EXECUTION
def test_kept_patches(name, execution):
    """The references name patches by their place in their current sequence, best first, the fused token behind them."""
    case, _, expected = _read(name)
    trace = _trace(name, execution)
    patches = [[{1 + patch} for patch in range(196)] for _ in range(3)]  # the positions that each one carries
    for site, layer in enumerate(case["layers"]):
        kept = next(value for key, value in expected.items() if key in (f"kept_{layer}", f"keep_layer{layer}"))
        for sample, row in enumerate(kept.tolist()):
            gone = set().union(*(group for i, group in enumerate(patches[sample]) if i not in set(row)))
            patches[sample] = [patches[sample][i] for i in row] + ([gone] if case.get("fuse_token") else [])
            ours = trace.source[site, sample]
            groups = [{0}, *patches[sample]]
            assert sorted(map(sorted, groups)) == sorted(
                ours.eq(rank).nonzero().flatten().tolist() for rank in range(trace.counts[site, sample])
            )


@EXECUTION
def test_kept_words_of_power_bert(execution):
    case, _, expected = _read("bert/power_bert")
    kept = kept_places(_trace("bert/power_bert", execution))
    words = torch.arange(40).expand(3, -1)
    for layer in range(len(case["retention"])):
        words = words.gather(1, expected[f"kept_layer{layer}"])
        assert kept[layer] == words.tolist()


@pytest.mark.parametrize("name", _named("ltp"))
@EXECUTION
def test_alive_words_of_ltp(name, execution):
    expected, trace = _read(name)[2], _trace(name, execution)
    assert torch.equal(trace.source >= 0, expected["alive"].bool())


@EXECUTION
def test_restored_states_of_length_adaptive(execution):
    _, inputs, expected = _read("bert/length_adaptive")
    with torch.no_grad():
        outputs = _model("bert/length_adaptive", execution).bert(**inputs)
    assert_close(outputs.last_hidden_state, expected["restored_hidden_state"], rtol=0, atol=1e-4)
