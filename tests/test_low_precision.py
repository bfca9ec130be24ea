"""Half precision keeps the tokens that float32 keeps: a real model on real texts."""

from functools import cache

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.packaged import load_dataset, model_path


pytestmark = pytest.mark.real

METHODS = {
    "top_k": PruningConfig.preset("top_k", layers=[1, 3, 4], keep_rate=0.7),
    "adaptive": PruningConfig.preset("adaptive", layers=[1, 2, 3], threshold=0.08),
    "received": PruningConfig.preset("adaptive", layers=[1, 3, 4], threshold=0.3, saliency="received_attention"),
}


@cache
def _texts() -> dict[str, torch.Tensor]:
    texts = load_dataset("20newsgroups-religion")["test"][::45]["text"][:16]
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm-l6"))
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt"))


def _kept(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool [S, B, N]"""
    with torch.no_grad():
        return model(**batch, output_token_trace=True).token_trace.source >= 0


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return _texts()


@cache
def _kept_in_float32(method: str) -> torch.Tensor:
    return _kept(prune(AutoModel.from_pretrained(model_path("minilm-l6")).float(), METHODS[method]), _texts())


def _agreement(method: str, batch: dict[str, torch.Tensor], dtype: torch.dtype, autocast: bool) -> list[float]:
    """For each site, which part of the tokens fares as in float32."""
    weights = torch.float32 if autocast else dtype
    model = prune(AutoModel.from_pretrained(model_path("minilm-l6"), dtype=weights), METHODS[method])
    expected = _kept_in_float32(method)
    with torch.autocast("cpu", dtype, enabled=autocast):
        same = _kept(model, batch) == expected
    tokens = batch["attention_mask"].bool()
    return [site[tokens].float().mean().item() for site in same]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("dtype, least", [(torch.float16, 0.998), (torch.bfloat16, 0.99)], ids=["fp16", "bf16"])
def test_keeps_the_same_tokens(method, dtype, least, autocast, batch):
    assert min(_agreement(method, batch, dtype, autocast)) >= least


def test_scores_are_float32(batch, monkeypatch):
    from hf_tokenprune.modeling import token_reducer

    seen, select = [], token_reducer.select
    monkeypatch.setattr(
        token_reducer, "select", lambda scores, *rest: seen.append(scores.saliency.dtype) or select(scores, *rest)
    )
    model = prune(AutoModel.from_pretrained(model_path("minilm-l6"), dtype=torch.bfloat16), METHODS["top_k"])
    _kept(model, {name: value[:2] for name, value in batch.items()})
    assert seen == [torch.float32] * 3
