"""Real weights and real texts: nothing pruned is nothing changed, and a pruned answer stays near."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

import hf_tokenprune
from hf_tokenprune import PruningConfig, TokenPruneBertModel, prune
from hf_tokenprune.families import FAMILIES
from hf_tokenprune.packaged import load_dataset, model_path


pytestmark = pytest.mark.real

NOTHING = {
    "none": None,
    "rate": PruningConfig.preset("top_k", layers=[1, 3, 4], keep_rate=1.0),
    "threshold": PruningConfig.preset("adaptive", layers=[1, 3, 4], threshold=0.0),
    "padded": PruningConfig.preset("top_k", layers=[1, 3, 4], keep_rate=1.0, execution="padded"),
    "masked": PruningConfig.preset("top_k", layers=[1, 3, 4], keep_rate=1.0, execution="masked"),
}
nothing = pytest.mark.parametrize("pruning", NOTHING.values(), ids=NOTHING)


def top_k(rate: float) -> PruningConfig:
    return PruningConfig.preset("top_k", layers=[3], keep_rate=rate)


def assert_near(ours: torch.Tensor, native: torch.Tensor) -> None:
    torch.testing.assert_close(ours, native, rtol=0, atol=1e-5 * max(1.0, native.abs().max().item()))


def mean_pooled(sequence: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sentence embeddings as this model's users compute them."""
    weights = mask[..., None].float()
    return nn.functional.normalize((sequence * weights).sum(1) / weights.sum(1), dim=-1)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Ten posts of 93 tokens and more."""
    return load_dataset("20newsgroups-religion")["test"][::70]["text"][:10]


@pytest.fixture(scope="module")
def batch(texts) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm-l6"))
    batch = tokenizer(texts, padding=True, truncation=True, max_length=192, return_tensors="pt")
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 3
    return dict(batch)


@pytest.fixture(scope="module")
def minilm() -> PreTrainedModel:
    return AutoModel.from_pretrained(model_path("minilm-l6")).eval()


@pytest.fixture(scope="module")
def expected(minilm, batch) -> Any:
    with torch.no_grad():
        return minilm(**batch)


@nothing
@torch.no_grad()
def test_minilm_unpruned_is_the_native_model(pruning, batch, expected):
    out = TokenPruneBertModel.from_pretrained(model_path("minilm-l6"), pruning=pruning)(**batch)
    there = batch["attention_mask"].bool()

    assert_near(out.last_hidden_state[there], expected.last_hidden_state[there])
    assert_near(out.pooler_output, expected.pooler_output)
    embeddings = [mean_pooled(o.last_hidden_state, batch["attention_mask"]) for o in (out, expected)]
    torch.testing.assert_close(*embeddings, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loader", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@nothing
@torch.no_grad()
def test_minilm_heads_unpruned_are_the_native_ones(pruning, loader, batch):
    torch.manual_seed(0)
    native = loader.from_pretrained(model_path("minilm-l6"), num_labels=5).eval()
    nn.init.normal_(native.classifier.weight, std=0.3)
    there = batch["attention_mask"].bool() if loader is AutoModelForTokenClassification else ...
    theirs = native(**batch).logits[there]
    assert theirs.std() > 0.1
    assert_near(prune(native, pruning)(**batch).logits[there], theirs)


# Class token, pooler, mean of the tokens; measured, least of these ten texts: 0.993, 0.993, 0.979 at rate 0.7 and
# 0.977, 0.973, 0.960 at rate 0.5. The tokens that stay are averaged: a dropped token's state is an earlier layer's.
@pytest.mark.parametrize("rate, bounds", [(0.7, (0.98, 0.98, 0.95)), (0.5, (0.96, 0.96, 0.92))])
@torch.no_grad()
def test_minilm_pruned_stays_near(rate, bounds, minilm, batch, expected):
    pruned = prune(minilm, top_k(rate))
    kept = pruned(**batch, restore=False)
    lengths = batch["attention_mask"].sum(1)
    # The class token, and that share of the others.
    assert kept.attention_mask.sum(1).tolist() == (1 + ((lengths - 1) * int(rate * 10)) // 10).tolist()
    cosines = (
        torch.cosine_similarity(kept.last_hidden_state[:, 0], expected.last_hidden_state[:, 0]),
        torch.cosine_similarity(kept.pooler_output, expected.pooler_output),
        torch.cosine_similarity(
            mean_pooled(kept.last_hidden_state, kept.attention_mask),
            mean_pooled(expected.last_hidden_state, batch["attention_mask"]),
        ),
    )
    for cosine, bound in zip(cosines, bounds):
        assert bound < cosine.min() < 0.9999


@pytest.mark.parametrize(
    "pruning",
    [
        top_k(0.5),
        PruningConfig.preset("top_k", layers=[1, 2, 4], keep_rate=0.7),
        PruningConfig.preset("adaptive", layers=[2, 4], threshold=0.1),
        PruningConfig.preset("adaptive", layers=[2, 4], threshold=0.5, saliency="received_attention"),
    ],
    ids=["once", "thrice", "class token", "received"],
)
@torch.no_grad()
def test_a_text_does_not_see_its_batch(pruning, minilm, batch):
    pruned = prune(minilm, pruning)
    together = pruned(**batch, output_token_trace=True)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        one = {name: value[row : row + 1, :length] for name, value in batch.items()}
        alone = pruned(**one, output_token_trace=True)
        assert torch.equal(alone.token_trace.counts[:, 0], together.token_trace.counts[:, row])
        assert torch.equal(alone.token_trace.source[:, 0], together.token_trace.source[:, row, :length])
        assert_near(together.last_hidden_state[row, :length], alone.last_hidden_state[0])
        assert_near(together.pooler_output[row], alone.pooler_output[0])
    assert (together.token_trace.counts[-1] < batch["attention_mask"].sum(1)).all()


@pytest.mark.skipif(not FAMILIES["DINOv2"].available, reason="needs a later transformers")
@pytest.mark.parametrize("size", [(112, 112), (112, 84)], ids=["square", "wide"])
@torch.no_grad()
def test_dinov2_unpruned_is_the_native_model(size):
    """Far from the 518 pixels that its position embeddings are for."""
    native = AutoModel.from_pretrained(model_path("dinov2-small")).eval()
    pruned = hf_tokenprune.TokenPruneDinov2Model.from_pretrained(model_path("dinov2-small"))
    coarse = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    pixels = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    theirs = native(pixels)
    assert theirs.last_hidden_state.shape[1] == 1 + size[0] * size[1] // 14**2
    for pruning in NOTHING.values():
        pruned.set_pruning(pruning)
        ours = pruned(pixels)
        assert_near(ours.last_hidden_state, theirs.last_hidden_state)
        assert_near(ours.pooler_output, theirs.pooler_output)
