"""A pruned encoder, spelled out: one sample at a time, unpadded, plain matmul attention, Python lists of tokens.

It takes the weights of a native model, in whatever precision they have (the tests use float64), and shares no code with
the package.

Shapes: N places of the input, n alive tokens, D features, H heads, d features of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel


PREFIX = 1  # the class token


@dataclass(frozen=True)
class NaiveSite:
    """saliency: "cls_attention" or "received_attention". rule: "keep_rate" or "relative_threshold"."""

    saliency: str
    rule: str
    value: Fraction | float


def top_k_sites(layers: Sequence[int], rate: str, saliency: str = "cls_attention") -> dict[int, NaiveSite]:
    """rate: a decimal, as written."""
    return {layer: NaiveSite(saliency, "keep_rate", Fraction(rate) ** (site + 1)) for site, layer in enumerate(layers)}


def threshold_sites(layers: Sequence[int], threshold: float, saliency: str) -> dict[int, NaiveSite]:
    return {layer: NaiveSite(saliency, "relative_threshold", threshold) for layer in layers}


@dataclass
class NaiveOutput:
    """One sample.

    sequence: [N, D], restored and normalised; zeros before that at places without a token.
    kept: the places that are left after each site.
    hidden_states: [N, D] before each layer and after the last, restored.
    maps: [H, N, N] of each layer, zero where a token was gone.
    margin: how far the closest decision was from falling otherwise.
    """

    sequence: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    kept: list[list[int]] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    maps: list[torch.Tensor] = field(default_factory=list)
    margin: float = float("inf")


@dataclass(frozen=True)
class Anatomy:
    """One layer's halves. output: (context, residual) -> [n, D]."""

    heads: int
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_input: Callable[[torch.Tensor], torch.Tensor]
    output: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    feed_forward: Callable[[torch.Tensor], torch.Tensor]


def _bert_layer(layer: nn.Module) -> Anatomy:
    attention, after = layer.attention.self, layer.attention.output
    return Anatomy(
        heads=attention.num_attention_heads,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        attention_input=lambda x: x,
        output=lambda context, x: after.LayerNorm(after.dense(context) + x),
        feed_forward=lambda x: layer.output.LayerNorm(layer.output.dense(gelu(layer.intermediate.dense(x))) + x),
    )


def _vit_layer(layer: nn.Module) -> Anatomy:
    attention, mlp = layer.attention, layer.mlp
    return Anatomy(
        heads=attention.num_attention_heads,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        attention_input=layer.layernorm_before,
        output=lambda context, x: attention.o_proj(context) + x,
        feed_forward=lambda x: mlp.fc2(gelu(mlp.fc1(layer.layernorm_after(x)))) + x,
    )


def _dinov2_layer(layer: nn.Module) -> Anatomy:
    attention, mlp = layer.attention, layer.mlp
    scale1, scale2 = layer.layer_scale1.lambda1, layer.layer_scale2.lambda1
    return Anatomy(
        heads=attention.num_attention_heads,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        attention_input=layer.norm1,
        output=lambda context, x: attention.o_proj(context) * scale1 + x,
        feed_forward=lambda x: mlp.fc2(gelu(mlp.fc1(layer.norm2(x)))) * scale2 + x,
    )


def _layers(base: PreTrainedModel) -> list[Anatomy]:
    if base.config.model_type == "bert":
        return [_bert_layer(layer) for layer in base.encoder.layer]
    if base.config.model_type == "vit":
        return [_vit_layer(layer) for layer in base.layers]
    return [_dinov2_layer(layer) for layer in base.encoder.layer]


def _embed(base: PreTrainedModel, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, D], each place by itself."""
    if "pixel_values" in sample:
        return base.embeddings(sample["pixel_values"][None])[0]
    places = torch.arange(len(sample["input_ids"]))
    return base.embeddings(sample["input_ids"][None], position_ids=sample.get("position_ids", places)[None])[0]


def attention_weights(layer: Anatomy, source: torch.Tensor) -> torch.Tensor:
    """[H, n, n]"""
    query, key = layer.query(source), layer.key(source)
    width = query.shape[1] // layer.heads
    maps = []
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        exponentials = (query[:, part] @ key[:, part].T / width**0.5).exp()
        maps.append(exponentials / exponentials.sum(dim=1, keepdim=True))
    return torch.stack(maps)


def attend(layer: Anatomy, weights: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    value = layer.value(source)
    width = value.shape[1] // layer.heads
    parts = [weights[head] @ value[:, head * width : (head + 1) * width] for head in range(layer.heads)]
    return torch.cat(parts, dim=1)


def saliency_of(name: str, weights: torch.Tensor) -> list[float]:
    """weights: [H, n, n]"""
    per_token = weights[:, 0].mean(0) if name == "cls_attention" else weights.mean(0).sum(0) / weights.shape[1]
    return per_token.tolist()


def choose(
    site: NaiveSite, scores: list[float], initial: int, protected: list[bool], min_tokens: int
) -> tuple[list[int], float]:
    """The rows that stay, in their order, and the margin of the decision."""
    n = len(scores)
    best_first = sorted(range(n), key=lambda row: (not protected[row], -scores[row], row))
    if site.rule == "keep_rate":
        prefix = min(PREFIX, initial)
        budget = max(prefix + int(site.value * (initial - prefix)), min_tokens, sum(protected))
        kept, gone = best_first[:budget], best_first[budget:]
        margin = scores[kept[-1]] - scores[gone[0]] if gone and not protected[kept[-1]] else float("inf")
        return sorted(kept), margin
    above = [row for row in range(n) if n * scores[row] >= site.value]
    kept = {*above, *(row for row in range(n) if protected[row]), *best_first[:min_tokens]}
    return sorted(kept), min(abs(n * score - site.value) for score in scores)


def run_sample(
    native: PreTrainedModel,
    sample: dict[str, torch.Tensor],
    sites: dict[int, NaiveSite],
    protected_ids: Sequence[int] = (),
    min_tokens: int = 1,
) -> NaiveOutput:
    """sample: the native model's inputs without the batch dimension; `attention_mask`: which places hold a token."""
    base = native.base_model
    embeddings = _embed(base, sample)
    length = len(embeddings)
    alive = [place for place in range(length) if "attention_mask" not in sample or sample["attention_mask"][place]]
    hidden = embeddings[alive]
    ids = sample["input_ids"].tolist() if "input_ids" in sample else [None] * length
    initial, first = len(alive), alive[0]
    blank = hidden.new_zeros(hidden.shape[1])
    whole: dict[int, torch.Tensor] = dict(zip(alive, hidden))
    out = NaiveOutput(hidden_states=[_places(whole, length, blank)])
    for index, layer in enumerate(_layers(base)):
        source = layer.attention_input(hidden)
        weights = attention_weights(layer, source)
        out.maps.append(_map_at_places(weights, alive, length))
        hidden = layer.output(attend(layer, weights, source), hidden)
        if index in sites:
            protected = [place == first or ids[place] in protected_ids for place in alive]
            scores = saliency_of(sites[index].saliency, weights)
            rows, margin = choose(sites[index], scores, initial, protected, min_tokens)
            alive, hidden = [alive[row] for row in rows], hidden[rows]
            out.kept.append(alive)
            out.margin = min(out.margin, margin)
        hidden = layer.feed_forward(hidden)
        whole = whole | dict(zip(alive, hidden))  # the dropped ones stay as they entered this layer
        out.hidden_states.append(_places(whole, length, blank))
    norm = getattr(base, "layernorm", lambda x: x)
    out.sequence = norm(out.hidden_states[-1])
    out.pooled, out.logits = _heads(native, out.sequence, out.sequence[first])
    return out


def _places(whole: dict[int, torch.Tensor], length: int, blank: torch.Tensor) -> torch.Tensor:
    return torch.stack([whole.get(place, blank) for place in range(length)])


def _map_at_places(weights: torch.Tensor, alive: list[int], length: int) -> torch.Tensor:
    full = weights.new_zeros(len(weights), length, length)
    for row, place in enumerate(alive):
        full[:, place, alive] = weights[:, row]
    return full


def _heads(
    native: PreTrainedModel, sequence: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    base, task = native.base_model, type(native).__name__
    pooler = getattr(base, "pooler", None)
    pooled = first if pooler is None else pooler(first[None, None])[0]
    if task == "BertForSequenceClassification":
        return pooled, native.classifier(pooled)
    if task == "BertForTokenClassification":
        return None, native.classifier(sequence)
    if task == "ViTForImageClassification":
        return None, native.classifier(first)
    if task == "Dinov2ForImageClassification":
        return pooled, native.classifier(torch.cat([first, sequence[1:].mean(0)]))
    return pooled, None


def run_naive(
    native: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    sites: dict[int, NaiveSite],
    protected_ids: Sequence[int] = (),
    min_tokens: int = 1,
) -> list[NaiveOutput]:
    """Every sample of a batch by itself."""
    batch = len(next(iter(inputs.values())))
    samples = [{name: value[row] for name, value in inputs.items()} for row in range(batch)]
    return [run_sample(native, sample, sites, protected_ids, min_tokens) for sample in samples]


def kept_places(trace: object) -> list[list[list[int]]]:
    """A `token_trace` in the form of `NaiveOutput.kept`: for each site, for each sample, the places that are left."""
    return [[(row >= 0).nonzero().flatten().tolist() for row in site] for site in trace.source]
