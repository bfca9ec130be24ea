"""Multiply-accumulates of an encoder on the unpadded tokens of one very input.

The counts come from the token states of a real call, so adaptive methods are counted as they decided.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert import prune
from ..families import native_to_pruned
from ..modeling.token_macs import call_macs, unpruned_macs
from ..modeling.token_outputs import EncoderCall
from .linear_macs import evaluating, linear_macs


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
    """Counts what one input costs in evaluation mode.

    Args:
        model: one of our models, or a native one of a supported family: its `total` is the stock encoder's. What
            adapters cost that are active now, and not merged, is in every count; peft's model around is taken, too.
        inputs: what the model is called with.

    Raises:
        TypeError: a model of an unsupported family, or one whose adapter is made of further tokens.
        ValueError: adapters that cannot be counted by token, such as those that make new weights on each call.
    """
    model = _inside(model)
    native = type(model) in native_to_pruned()
    ours = prune(model, None if native else getattr(getattr(model, "config", None), "pruning", None))
    call = EncoderCall(work=True, linear_macs=linear_macs(ours))
    with torch.no_grad(), evaluating(ours):
        ours(**inputs, encoder_call=call)
    count = count_call(call, ours.config)
    if not native:
        return count
    stock = unpruned_macs(call, ours.config)
    return replace(
        count, total=count.unpruned, per_layer=stock.sum(dim=1).tolist(), per_sample=stock.sum(dim=0).tolist()
    )


def _inside(model: Any) -> Any:
    """The model that peft's is around."""
    if not hasattr(model, "get_base_model") or not hasattr(model, "active_peft_config"):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = type(model.active_peft_config).__name__
        raise TypeError(f"{kind} adds tokens of its own to each input, which are in no count; count get_base_model()")
    return model.get_base_model()


def count_call(call: EncoderCall, config: Any) -> MacCount:
    """Counts what one call cost that was made with `encoder_call=EncoderCall(work=True)`.

    With `linear_macs=linear_macs(model)` besides, adapters are counted.

    Args:
        config: the called model's config.
    """
    macs, stock = call_macs(call, config), unpruned_macs(call, config)
    return MacCount(
        total=int(macs.sum()),
        lossless=int(unpruned_macs(call, config, lossless=True).sum()),
        unpruned=int(stock.sum()),
        per_layer=macs.sum(dim=1).tolist(),
        per_sample=macs.sum(dim=0).tolist(),
        unpruned_per_sample=stock.sum(dim=0).tolist(),
    )
