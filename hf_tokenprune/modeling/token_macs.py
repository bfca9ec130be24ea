"""Multiply-accumulates of encoder layers on unpadded tokens, from how many tokens they computed what for.

Counts are integers where tokens were removed, and expectations with a gradient where masks stand for that.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .pruning_stage import MERGES
from .token_outputs import EncoderCall, LayerWork, LinearMacs


def call_macs(call: EncoderCall, config: Any) -> torch.Tensor:
    """What each layer of one call cost for each sample: [layers, B]."""
    return _macs(call.layer_work, call.linear_macs, config)


def unpruned_macs(call: EncoderCall, config: Any, *, lossless: bool = False) -> torch.Tensor:
    """The same for the stock encoder on the same tokens, or for our engine with nothing pruned (lossless)."""
    tokens = call.layer_work[0].arrived
    whole = LayerWork(tokens, keys=tokens, queries=tokens, contexts=tokens, feed_forward=tokens, site=None, prefix=0)
    last = whole
    if lossless and not call.whole_sequence:
        one = torch.ones_like(tokens)
        last = replace(whole, queries=one, contexts=one, feed_forward=one)
    return _macs([whole] * (len(call.layer_work) - 1) + [last], call.linear_macs, config)


def sample_macs(call: EncoderCall, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What each sample of one call cost, [B], and in the stock encoder, [B]."""
    return call_macs(call, config).sum(dim=0), unpruned_macs(call, config).sum(dim=0)


def stock_linear_macs(config: Any) -> LinearMacs:
    """What the linear parts of a layer cost that is as the config says."""
    one = config.hidden_size * config.attention_width
    return LinearMacs(key_value=2 * one, query=one, output=one, feed_forward=config.feed_forward_macs)


def _macs(layer_work: list[LayerWork], linear: list[LinearMacs] | None, config: Any) -> torch.Tensor:
    """long [layers, B]"""
    linear = [stock_linear_macs(config)] * len(layer_work) if linear is None else linear
    return torch.stack([_layer_macs(work, each, config) for work, each in zip(layer_work, linear)])


def _layer_macs(work: LayerWork, linear: LinearMacs, config: Any) -> torch.Tensor:  # [B]
    macs = work.keys * linear.key_value + work.queries * linear.query + work.contexts * linear.output
    macs = macs + 2 * work.contexts * work.keys * config.attention_width  # attention logits, and the mean of the values
    macs = macs + work.feed_forward * linear.feed_forward
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
    "token_prior": lambda n, config: 0 * n,
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
