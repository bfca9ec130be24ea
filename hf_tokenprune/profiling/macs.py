"""Multiply-accumulates of an encoder on the unpadded tokens of one very input.

The counts come from the token states of a real call, so adaptive methods are counted as they decided.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert import prune
from ..families import native_to_pruned
from ..modeling.pruning_stage import MERGES
from ..modeling.token_outputs import EncoderCall, LayerWork


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of the encoder layers; FLOPs are twice as many.

    Args:
        total: what this input costs, the pruning's own work included.
        lossless: our engine with nothing pruned.
        unpruned: the stock encoder layers on the same unpadded tokens.
        per_layer: the layers' shares of `total`.
        per_sample: the samples' shares of `total`; unpruned_per_sample: of `unpruned`.
    """

    total: int
    lossless: int
    unpruned: int
    per_layer: list[int]
    per_sample: list[int]
    unpruned_per_sample: list[int]

    @property
    def ratio(self) -> float:
        """total / unpruned"""
        return self.total / self.unpruned


def count_macs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> MacCount:
    """Counts what one input costs.

    Args:
        model: one of our models, or a native one of a supported family: its `total` is the stock encoder's.
        inputs: what the model is called with.

    Raises:
        TypeError: a model of an unsupported family.
    """
    native = type(model) in native_to_pruned()
    ours = prune(model, getattr(getattr(model, "config", None), "pruning", None))
    call = EncoderCall(work=True)
    with torch.no_grad():
        ours(**inputs, encoder_call=call)
    count = count_call(call, ours.config)
    if not native:
        return count
    stock = _macs(_unpruned_work(call, lossless=False), ours.config)
    return replace(
        count, total=count.unpruned, per_layer=stock.sum(dim=1).tolist(), per_sample=stock.sum(dim=0).tolist()
    )


def count_call(call: EncoderCall, config: Any) -> MacCount:
    """Counts what one call cost that was made with `encoder_call=EncoderCall(work=True)`.

    Args:
        config: the called model's config.
    """
    macs = _macs(call.layer_work, config)
    stock = _macs(_unpruned_work(call, lossless=False), config)
    return MacCount(
        total=int(macs.sum()),
        lossless=int(_macs(_unpruned_work(call, lossless=True), config).sum()),
        unpruned=int(stock.sum()),
        per_layer=macs.sum(dim=1).tolist(),
        per_sample=macs.sum(dim=0).tolist(),
        unpruned_per_sample=stock.sum(dim=0).tolist(),
    )


def _unpruned_work(call: EncoderCall, *, lossless: bool) -> list[LayerWork]:
    """The layers' work on the same tokens with nothing pruned: by our engine (lossless) or by the stock encoder."""
    tokens = call.layer_work[0].arrived
    whole = LayerWork(tokens, keys=tokens, queries=tokens, contexts=tokens, feed_forward=tokens, site=None, prefix=0)
    last = whole
    if lossless and not call.whole_sequence:
        one = torch.ones_like(tokens)
        last = replace(whole, queries=one, contexts=one, feed_forward=one)
    return [whole] * (len(call.layer_work) - 1) + [last]


def _macs(layer_work: list[LayerWork], config: Any) -> torch.Tensor:
    """long [layers, B]"""
    return torch.stack([_layer_macs(work, config) for work in layer_work])


def _layer_macs(work: LayerWork, config: Any) -> torch.Tensor:  # [B]
    hidden, width = config.hidden_size, config.attention_width
    macs = 2 * work.keys * hidden * width  # key and value projections
    macs = macs + (work.queries + work.contexts) * hidden * width  # query and output projections
    macs = macs + 2 * work.contexts * work.keys * width  # attention logits, and the mean of the values
    macs = macs + work.feed_forward * config.feed_forward_macs
    return macs if work.site is None else macs + _site_macs(work, config)


def _site_macs(work: LayerWork, config: Any) -> torch.Tensor:  # [B]
    """What the pruning itself costs: its score, its matching, and the rows that it makes."""
    site, hidden = work.site, config.hidden_size
    arrived = work.keys if site.place == "between" else work.arrived
    scored = (arrived - work.prefix).clamp(min=0) if site.saliency == "learned" else arrived
    macs = _SCORES[site.saliency](scored, config)
    if site.reduction == "drop":
        return macs
    kept = work.feed_forward if site.place == "between" else work.keys
    going = arrived if site.cut is None else arrived.minimum(kept.clamp(min=site.cut))
    rest = going - kept
    if site.reduction in MERGES and site.saliency != "key_similarity":
        macs = macs + torch.where(rest > 0, (going + rest * kept) * hidden, 0)  # norms, and the map of similarities
    return macs + rest * hidden


# By tokens that are scored and the model's config.
_SCORES: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "cls_attention": lambda n, config: n * config.attention_width,  # one row of logits
    "cls_value_norm": lambda n, config: n * (2 * config.attention_width + config.num_attention_heads),  # and the norms
    "received_attention": lambda n, config: n * n * config.attention_width,  # the map
    "received_from_others": lambda n, config: n * n * config.attention_width,
    "key_norm": lambda n, config: n * config.attention_width,
    "residual_shift": lambda n, config: n * config.hidden_size,
    "learned": lambda n, config: n * _predictor_macs(config.hidden_size),
    "random": lambda n, config: 0 * n,
    "key_similarity": lambda n, config: _matching_macs(n, config.attention_width // config.num_attention_heads),
}


def _matching_macs(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Norms of all mean keys, and the products of one half with the other."""
    return (tokens + ((tokens + 1) // 2) ** 2) * width


def _predictor_macs(width: int) -> int:
    """Of one token: D to D, to D / 2, to D / 4, to 2."""
    half, quarter = width // 2, width // 4
    return width * width + width * half + half * quarter + quarter * 2
