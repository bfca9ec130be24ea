"""Inside sentence-transformers: padding-free batches, as it sends them by itself under flash attention."""

from collections.abc import Callable

import pytest
import torch
from methods import METHODS, pruned
from tiny import BERT, save_text_model
from torch.testing import assert_close
from transformers import BertModel, modeling_flash_attention_utils


pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer


WORDS = [f"w{number}" for number in range(4, 50)]
TEXTS = [" ".join(WORDS[start : start + length]) for start, length in [(0, 17), (3, 5), (7, 30), (2, 1), (9, 9)]]


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given) -> torch.Tensor:
    """What `flash_attn_varlen_func` computes, q, k, v [T, H, d]."""
    context = torch.empty_like(query)
    ends_q, ends_k = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    for start, end, first, last in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        weights = torch.einsum("qhd,khd->hqk", query[start:end], key[first:last]) * given["softmax_scale"]
        context[start:end] = torch.einsum("hqk,khd->qhd", weights.softmax(dim=-1), value[first:last])
    return context


def never(*args, **given) -> None:
    raise AssertionError("a padding-free batch goes by its lengths")


@pytest.fixture
def flash_attention(monkeypatch):
    """A kernel behind the name `flash_attention_2`, on the CPU; transformers' own way to it is not touched."""
    library = modeling_flash_attention_utils
    monkeypatch.setattr(library, "_lazy_imports", lambda *args, **given: (never, flash, None, never, never))
    for name in [name for name in vars(library) if name.startswith(("_flash", "_pad_fn", "_unpad_fn", "_process"))]:
        monkeypatch.setattr(library, name, getattr(library, name))
    monkeypatch.setattr(library, "_loaded_implementation", None)


def embedder(folder, pooling: str = "mean"):
    save_text_model(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(BERT.hidden_size, pooling)], device="cpu")


def watched(forward: Callable, calls: list[set]) -> Callable:
    """A forward that tells the names of its arguments."""

    def call(**given):
        calls.append(set(given))
        return forward(**given)

    return call


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_flattened_batches_give_the_padded_vectors(tmp_path, pooling, flash_attention):
    encoder = embedder(tmp_path, pooling)
    native = encoder[0].model
    assert type(native) is BertModel
    calls = []
    for name, pruning in [("none", None), *METHODS.items()]:
        model = pruned(native, pruning)
        encoder[0].model = model
        wanted = encoder.encode(TEXTS, convert_to_tensor=True)
        model.config._attn_implementation = "flash_attention_2"
        model.forward = watched(model.forward, calls)
        encoder[0].unpad_inputs = None
        seen = encoder.encode(TEXTS, convert_to_tensor=True)
        assert_close(torch.cosine_similarity(seen, wanted), torch.ones(len(TEXTS)), rtol=0, atol=1e-5, msg=name)
        model.config._attn_implementation = "sdpa"
        encoder[0].unpad_inputs = None
    assert all("cu_seq_lens_q" in call and "attention_mask" not in call for call in calls) and calls
