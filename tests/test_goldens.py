"""What the reference implementations computed, case by case."""

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

from hf_tokenprune import PruningConfig, prune


GOLDENS = Path(os.environ.get("HF_TOKENPRUNE_GOLDENS", Path(__file__).with_name("goldens")))
NATIVES = {"bert": BertForSequenceClassification, "vit": ViTForImageClassification}

EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@pytest.fixture(scope="module", autouse=True)
def _goldens_are_there() -> None:
    if not GOLDENS.is_dir():
        pytest.fail(f"no golden cases at {GOLDENS}; set HF_TOKENPRUNE_GOLDENS to the folder that holds bert/ and vit/")


def _native(family: str, attention: str = "sdpa") -> PreTrainedModel:
    return NATIVES[family].from_pretrained(GOLDENS / family / "model", attn_implementation=attention).eval()


def _case(family: str, name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Hyper-parameters, inputs, what the reference returned."""
    folder = GOLDENS / family / name
    case = json.loads((folder / "case.json").read_text())
    return case, load_file(GOLDENS / family / "inputs.safetensors"), load_file(folder / "expected.safetensors")


@torch.no_grad()
def _logits(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**inputs).logits


@EXECUTION
@ATTENTION
@pytest.mark.parametrize("prefix", ["", "ragged_"])
def test_bert_unpruned(execution, attention, prefix):
    _, inputs, expected = _case("bert", "unpruned")
    model = prune(_native("bert", attention), PruningConfig(execution=execution))
    logits = _logits(model, input_ids=inputs[f"{prefix}input_ids"], attention_mask=inputs[f"{prefix}attention_mask"])
    assert_close(logits, expected[f"{prefix}logits"], rtol=0, atol=1e-4)


@EXECUTION
@ATTENTION
def test_vit_unpruned(execution, attention):
    _, inputs, expected = _case("vit", "unpruned")
    logits = _logits(prune(_native("vit", attention), PruningConfig(execution=execution)), **inputs)
    assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


@EXECUTION
@ATTENTION
def test_vit_top_k(execution, attention):
    case, inputs, expected = _case("vit", "tokenreduction_topk")
    pruning = PruningConfig.preset("top_k", layers=case["layers"], keep_rate=case["keep_rate"], execution=execution)
    model = prune(_native("vit", attention), pruning)
    assert_close(_logits(model, **inputs), expected["logits"], rtol=0, atol=1e-4)
    with torch.no_grad():
        trace = model(**inputs, output_token_trace=True).token_trace
    kept = kept_places(trace)
    # The reference names patches by their place in its current sequence, which is ordered by falling score.
    patches = torch.arange(196).expand(3, -1)
    for site, layer in enumerate(case["layers"]):
        patches = patches.gather(1, expected[f"kept_{layer}"])
        assert kept[site] == [[0, *sorted(1 + patch for patch in row)] for row in patches.tolist()]
