"""A pruned encoder, spelled out: one sample at a time, unpadded, plain matmul attention, Python lists of tokens.

It takes the weights of a native model, in whatever precision they have (the tests use float64), and shares no code with
the package.

Shapes: N places of the input, n alive rows, P structural ones (class token, registers, distillation token), D features,
H heads, d features of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, floor, log

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel


INFINITY = float("inf")
# By rule, the value with which a site is none: no row goes, and none moves.
IDLE = dict.fromkeys(["keep_rate", "site_keep_rate", "top_p"], 1) | dict.fromkeys(
    ["remove_count", "threshold", "relative_threshold", "median_threshold", "padded_threshold"], 0
)


@dataclass(frozen=True)
class NaiveSite:
    """One reduction.

    saliency: see `score` and `match`. rule: see `how_many`. value: of a rate, the decimal that was written.
    reduction: see `reduce_rows`. cut: rows beyond so many of the best are dropped outright.
    """

    saliency: str
    rule: str
    value: Fraction | float
    reduction: str = "drop"
    place: str = "between"
    cut: int | None = None


def top_k_sites(layers: Sequence[int], rate: str, saliency: str = "cls_attention") -> dict[int, NaiveSite]:
    """rate: a decimal, as written."""
    return {layer: NaiveSite(saliency, "keep_rate", Fraction(rate) ** (site + 1)) for site, layer in enumerate(layers)}


def sites_of(pruning: object, num_layers: int) -> dict[int, NaiveSite]:
    """The stages of a `PruningConfig`, read as plain data."""
    sites = {}
    for stage in pruning.resolve(num_layers).stages:
        for index, (layer, value) in enumerate(zip(stage.layers, stage.values)):
            cut = None if stage.cut is None else stage.cut[index]
            sites[layer] = NaiveSite(
                stage.saliency, stage.rule, Fraction(str(value)), stage.reduction, stage.place, cut
            )
    return dict(sorted(sites.items()))


@dataclass
class NaiveOutput:
    """One sample.

    sequence: [N, D], restored and normalised; zeros before that at places without a token.
    kept: the places whose token is left, or part of one that is left, after each site.
    source: for each place the number of the row that carries it after each site, -1 where it is gone.
    sizes: of the rows after each site, as attention weighs them.
    hidden_states: [N, D] before each layer and after the last, restored.
    maps: [H, N, N] of each layer, zero where a token was gone.
    margin: how far the closest decision was from falling otherwise.
    """

    sequence: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    kept: list[list[int]] = field(default_factory=list)
    source: list[list[int]] = field(default_factory=list)
    sizes: list[list[float]] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    maps: list[torch.Tensor] = field(default_factory=list)
    margin: float = INFINITY


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
    if base.config.model_type in ("vit", "deit"):
        return [_vit_layer(layer) for layer in base.layers]
    return [_dinov2_layer(layer) for layer in base.encoder.layer]


def _embed(base: PreTrainedModel, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, D], each place by itself."""
    if "pixel_values" in sample:
        return base.embeddings(sample["pixel_values"][None])[0]
    places = torch.arange(len(sample["input_ids"]))
    return base.embeddings(sample["input_ids"][None], position_ids=sample.get("position_ids", places)[None])[0]


def _by_head(x: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """[n, H d] -> H times [n, d]"""
    width = x.shape[1] // heads
    return [x[:, head * width : (head + 1) * width] for head in range(heads)]


def attention_weights(layer: Anatomy, source: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[H, n, n]. bias: [n], added to the logits of each key."""
    maps = []
    for query, key in zip(_by_head(layer.query(source), layer.heads), _by_head(layer.key(source), layer.heads)):
        logits = query @ key.T / query.shape[1] ** 0.5
        exponentials = (logits if bias is None else logits + bias).exp()
        maps.append(exponentials / exponentials.sum(dim=1, keepdim=True))
    return torch.stack(maps)


def attend(layer: Anatomy, weights: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return torch.cat([map_ @ value for map_, value in zip(weights, _by_head(layer.value(source), layer.heads))], dim=1)


@dataclass(frozen=True)
class Rows:
    """What is left of a sample, in its current order; the first P rows are structural.

    hidden: [n, D]. groups: the places that each row carries. sizes: as attention weighs them. protected: every method
    keeps it.
    """

    hidden: torch.Tensor
    groups: list[list[int]]
    sizes: list[float]
    protected: list[bool]


@dataclass(frozen=True)
class Seen:
    """What a site sees of its layer; weights and source are None before the layer.

    weights: [H, n, n]. source: [n, D], what keys and values are of. before, after: [n, D], around the attention half.
    """

    layer: Anatomy
    weights: torch.Tensor | None
    source: torch.Tensor | None
    before: torch.Tensor
    after: torch.Tensor
    predictor: nn.Module | None
    ids: list[int] | None = None


def score(name: str, seen: Seen, prefix: int) -> torch.Tensor:
    """[n], sums to 1."""
    if name == "cls_attention":
        scores = seen.weights[:, 0].mean(0)
    elif name == "cls_value_norm":
        norms = torch.stack([part.norm(dim=1) for part in _by_head(seen.layer.value(seen.source), seen.layer.heads)])
        scores = (seen.weights[:, 0] * norms).mean(0)
    elif name == "received_attention":
        scores = seen.weights.mean(0).sum(0)
    elif name == "received_from_others":
        received = seen.weights.mean(0)
        scores = received.sum(0) - received.diagonal()
    elif name == "key_norm":
        scores = torch.stack([k.norm(dim=1) for k in _by_head(seen.layer.key(seen.source), seen.layer.heads)]).mean(0)
    elif name == "residual_shift":
        scores = (seen.after - seen.before).norm(dim=1)
    elif name == "token_prior":
        scores = seen.predictor.worth[seen.ids]
    elif name == "learned":
        scores = torch.cat([seen.before.new_zeros(prefix), predicted(seen.predictor, seen.before[prefix:])])
    else:
        raise ValueError(name)
    total = scores.sum()
    return scores / total if total > 0 else torch.full_like(scores, 1 / len(scores))


def predicted(predictor: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The probability that each stays, from itself and the mean of all.  [n - P]"""
    features = predictor.in_conv(tokens)
    half = features.shape[1] // 2
    mean = features[:, half:].sum(0) / max(len(features), 1)
    return predictor.out_conv(torch.cat([features[:, :half], mean.expand(len(features), -1)], dim=1)).exp()[:, 0]


def _nearest(vectors: torch.Tensor, row: int, others: list[int], margins: list[float]) -> tuple[int, float]:
    """The most similar of the others by cosine, and that similarity."""
    similarities = torch.cosine_similarity(vectors[row : row + 1].detach(), vectors[others].detach()).tolist()
    ranked = sorted(range(len(others)), key=lambda other: (-similarities[other], other))
    margins += [similarities[ranked[0]] - similarities[other] for other in ranked[1:2]]
    return others[ranked[0]], similarities[ranked[0]]


def match(seen: Seen, rows: Rows, prefix: int, margins: list[float]) -> dict[int, tuple[int, float]]:
    """ToMe: unprotected rows take turns as sources and targets. Source -> its target, how similar they are."""
    keys = torch.stack(_by_head(seen.layer.key(seen.source), seen.layer.heads)).mean(0)
    free = [row for row, protected in enumerate(rows.protected) if not protected]
    sources = [row for count, row in enumerate(free) if (count + prefix) % 2 == 0]
    targets = [row for row in free if row not in sources]
    return {row: _nearest(keys, row, targets, margins) for row in sources if targets}


def how_many(
    site: NaiveSite, best: list[float], protected: int, prefix: int, initial: int, padded: int, margins: list[float]
) -> int:
    """How many of the best rows stay by the rule alone.

    Args:
        best: the scores of the rows, protected ones first, then falling.
        initial: rows at the model's input. padded: the length that the batch is padded to.
    """
    n, value = len(best), site.value
    if site.rule == "keep_rate":
        return prefix + floor(value * (initial - prefix))
    if site.rule == "site_keep_rate":
        return prefix + ceil(value * (n - prefix))
    if site.rule == "keep_count":
        return int(value)
    if site.rule == "remove_count":
        return n - min(int(value), (n - protected) // 2)
    if site.rule == "top_p":
        sums = [sum(best[: row + 1]) for row in range(n)]
        margins += [abs(total - value) for total in sums]
        return 1 + next(row for row in range(n) if sums[row] >= value)
    free = best[protected:]
    median = free[(len(free) - 1) // 2] if free else 1.0
    scale = {
        "threshold": 1,
        "relative_threshold": n,
        "median_threshold": 1 / median,
        "padded_threshold": n / padded,
    }[site.rule]
    free = [scale * score for score in free]
    margins += [abs(score - value) for score in free]
    return protected + sum(score >= value for score in free)


def reduce_rows(
    site: NaiveSite, seen: Seen, rows: Rows, prefix: int, initial: int, padded: int, min_tokens: int
) -> tuple[Rows, float]:
    """The rows that go on, in their order, and the margin of the closest decision."""
    if site.cut is None and site.value == IDLE.get(site.rule):
        return rows, INFINITY
    n, protected = len(rows.protected), sum(rows.protected)
    prefix = min(prefix, n)
    margins, similar = [], site.saliency == "key_similarity"
    matches = match(seen, rows, prefix, margins) if similar else {}
    scores = None if similar else score(site.saliency, seen, prefix)
    values = [-matches[row][1] if row in matches else INFINITY for row in range(n)] if similar else scores.tolist()
    free = sorted((row for row in range(n) if not rows.protected[row]), key=lambda row: (-values[row], row))
    best_first = [row for row in range(n) if rows.protected[row]] + free
    best = [values[row] for row in best_first]
    wanted = how_many(site, best, protected, prefix, initial, padded, margins)
    count, cut = (min(max(many, min_tokens, protected), n) for many in (wanted, site.cut or n))
    margins += [best[end - 1] - best[end] for end in (count, cut) if protected < end < n]
    staying, going = best_first[:count], best_first[count : max(count, cut)]
    if site.reduction == "drop":
        # A predictor's ranking is the order in which the reference goes on.
        order = staying if site.saliency == "learned" else sorted(staying)
        after = _made(rows, [[(row, 1.0)] for row in order])
    elif site.reduction in ("fuse", "fuse_normalized"):
        whole = scores[going].sum() if site.reduction == "fuse_normalized" else 1.0
        fused = [(row, scores[row] / whole) for row in going]
        after = _made(rows, [[(row, 1.0)] for row in staying] + [fused] * bool(fused))
    else:
        if similar:  # sources before targets
            staying.sort(key=lambda row: (not rows.protected[row], row not in matches, row))
        members = {row: [(row, 1.0)] for row in staying}
        candidates = [row for row in staying if not rows.protected[row]]
        for row in going if candidates else []:
            target, similarity = matches[row] if similar else _nearest(seen.after, row, candidates, margins)
            members[target].append((row, similarity))
        after = _merged(rows, list(members.values()), site.reduction)
    return after, float(min(margins, default=INFINITY))


def _made(rows: Rows, made: list[list[tuple[int, object]]]) -> Rows:
    """Each new row is a sum of old ones by the given weights."""
    return Rows(
        torch.stack([sum(weight * rows.hidden[row] for row, weight in one) for one in made]),
        [[place for row, _ in one for place in rows.groups[row]] for one in made],
        [sum(rows.sizes[row] for row, _ in one) for one in made],
        [rows.protected[one[0][0]] for one in made],
    )


def _merged(rows: Rows, merged: list[list[tuple[int, float]]], reduction: str) -> Rows:
    """Each new row is the mean of old ones, given with their similarity to the first."""
    made = []
    for members in merged:
        total = sum(rows.sizes[row] for row, _ in members)
        shares = [rows.sizes[row] / total if reduction == "merge" else 1 / len(members) for row, _ in members]
        made.append([(row, share) for (row, _), share in zip(members, shares)])
    after = _made(rows, made)
    if reduction == "merge":
        return after
    return replace(after, sizes=[sum(rows.sizes[row] * similarity for row, similarity in one) for one in merged])


def prefix_of(base: PreTrainedModel) -> int:
    """Structural tokens at the front: P."""
    if base.config.model_type == "dinov2_with_registers":
        return 1 + base.config.num_register_tokens
    return 2 if base.config.model_type == "deit" else 1


def run_sample(
    native: PreTrainedModel,
    sample: dict[str, torch.Tensor],
    sites: Mapping[int, NaiveSite],
    protected_ids: Sequence[int] = (),
    min_tokens: int = 1,
    *,
    proportional_attention: bool = False,
    predictors: Mapping[int, nn.Module] | None = None,
) -> NaiveOutput:
    """sample: the native model's inputs without the batch dimension; `attention_mask`: which places hold a token.

    predictors: by layer, for the learned saliency, and the table of a prior.
    """
    base = native.base_model
    embeddings, prefix = _embed(base, sample), prefix_of(base)
    length = len(embeddings)
    alive = [place for place in range(length) if "attention_mask" not in sample or sample["attention_mask"][place]]
    ids = sample["input_ids"].tolist() if "input_ids" in sample else [None] * length
    protected = [count < prefix or ids[place] in protected_ids for count, place in enumerate(alive)]
    rows = Rows(embeddings[alive], [[place] for place in alive], [1.0] * len(alive), protected)
    blank = embeddings.new_zeros(embeddings.shape[1])
    whole: dict[int, torch.Tensor] = dict(zip(alive, rows.hidden))
    out = NaiveOutput(hidden_states=[_places(whole, length, blank)])

    def reduced(index: int, seen: Seen) -> Rows:
        left, margin = reduce_rows(sites[index], seen, rows, prefix, len(alive), length, min_tokens)
        carrier = {place: number for number, group in enumerate(left.groups) for place in group}
        out.kept.append(sorted(carrier))
        out.source.append([carrier.get(place, -1) for place in range(length)])
        out.sizes.append(left.sizes)
        out.margin = min(out.margin, margin)
        return left

    for index, layer in enumerate(_layers(base)):
        predictor = (predictors or {}).get(index)
        if index in sites and sites[index].place == "before":
            known = [ids[group[0]] for group in rows.groups]
            rows = reduced(index, Seen(layer, None, None, rows.hidden, rows.hidden, predictor, known))
        source = layer.attention_input(rows.hidden)
        bias = source.new_tensor([log(size) for size in rows.sizes]) if proportional_attention else None
        weights = attention_weights(layer, source, bias)
        out.maps.append(_map_at_places(weights, [group[0] for group in rows.groups], length))
        before, after = rows.hidden, layer.output(attend(layer, weights, source), rows.hidden)
        rows = replace(rows, hidden=after)
        if index in sites and sites[index].place == "between":
            rows = reduced(index, Seen(layer, weights, source, before, after, predictor))
        rows = replace(rows, hidden=layer.feed_forward(rows.hidden))
        for group, state in zip(rows.groups, rows.hidden):
            whole |= dict.fromkeys(group, state)  # the dropped ones stay as they entered this layer
        out.hidden_states.append(_places(whole, length, blank))
    norm = getattr(base, "layernorm", lambda x: x)
    out.sequence = norm(out.hidden_states[-1])
    out.pooled, out.logits = _heads(native, out.sequence, out.sequence[alive[0]])
    return out


def _places(whole: dict[int, torch.Tensor], length: int, blank: torch.Tensor) -> torch.Tensor:
    return torch.stack([whole.get(place, blank) for place in range(length)])


def _map_at_places(weights: torch.Tensor, places: list[int], length: int) -> torch.Tensor:
    full = weights.new_zeros(len(weights), length, length)
    index = torch.tensor(places)
    full[:, index[:, None], index] = weights
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
    if task in ("ViTForImageClassification", "DeiTForImageClassification"):
        return None, native.classifier(first)
    if task == "DeiTForImageClassificationWithTeacher":
        return None, (native.cls_classifier(first) + native.distillation_classifier(sequence[1])) / 2
    if task in ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"):
        return pooled, native.classifier(torch.cat([first, sequence[prefix_of(base) :].mean(0)]))
    return pooled, None


def run_naive(
    native: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    sites: Mapping[int, NaiveSite],
    protected_ids: Sequence[int] = (),
    min_tokens: int = 1,
    **more: object,
) -> list[NaiveOutput]:
    """Every sample of a batch by itself."""
    batch = len(next(iter(inputs.values())))
    samples = [{name: value[row] for name, value in inputs.items()} for row in range(batch)]
    return [run_sample(native, sample, sites, protected_ids, min_tokens, **more) for sample in samples]


def kept_places(trace: object) -> list[list[list[int]]]:
    """A `token_trace` in the form of `NaiveOutput.kept`: for each site, for each sample, the places that are left."""
    return [[(row >= 0).nonzero().flatten().tolist() for row in site] for site in trace.source]
