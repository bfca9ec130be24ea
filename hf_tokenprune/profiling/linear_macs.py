"""What the linear parts of a model's layers really cost a token: adapters, and what stands in a stock part's place.

Nothing here knows kinds of adapters: the parts are called with one token and with two, and their products counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..modeling.pruner_modules import ASKED, VALUES
from ..modeling.token_layer import TokenPruneLayer
from ..modeling.token_macs import stock_linear_macs
from ..modeling.token_outputs import LinearMacs


STOCK = ("torch.nn.", "transformers.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def linear_macs(model: PreTrainedModel) -> list[LinearMacs] | None:
    """By layer, for `EncoderCall(work=True, linear_macs=...)`; None: all layers are as the config says.

    Args:
        model: one of ours, with the adapters that are active now.

    Raises:
        ValueError: a part whose cost does not go by its tokens alone.
    """
    layers, config = model.base_model.token_layers(), model.config
    stock = stock_linear_macs(config)
    if all(_is_stock(layer, sum(stock)) for layer in layers):
        return None
    with torch.no_grad(), evaluating(layers):
        return [_measured(layer, index, config, stock) for index, layer in enumerate(layers)]


def _is_stock(layer: TokenPruneLayer, macs: int) -> bool:
    parts = [child for name, child in layer.named_children() if name not in (*ASKED.values(), *VALUES)]
    modules = [module for part in parts for module in part.modules()]
    if not all(f"{type(module).__module__}.".startswith(STOCK) for module in modules):
        return False
    return sum(m.in_features * m.out_features for m in modules if isinstance(m, nn.Linear)) == macs


def _measured(layer: TokenPruneLayer, index: int, config: Any, stock: LinearMacs) -> LinearMacs:
    like = next((p for p in layer.parameters() if p.is_floating_point()), torch.zeros(0))

    def rows(tokens: int, width: int = config.hidden_size) -> torch.Tensor:
        return torch.ones(1, tokens, width, device=like.device, dtype=like.dtype)

    parts = {
        "key_value": lambda n: (layer.key(rows(n)), layer.value(rows(n))),
        "query": lambda n: layer.query(rows(n)),
        "output": lambda n: layer.attention_output(rows(n, config.attention_width), rows(n)),
        "feed_forward": lambda n: layer.feed_forward_block(rows(n)),
    }
    found = {}
    for name, part in parts.items():
        one, two = (_products(layer, part, tokens) for tokens in (1, 2))
        if two != 2 * one:
            raise ValueError(
                f"layer ({index}) multiplies its weights, too, for its {name} ({one} multiply-accumulates for one "
                f"token, {two} for two): what a token costs is not defined there; merge the adapter first"
            )
        # Kernels that nobody can look into compute what the stock ones do.
        found[name] = one or getattr(stock, name)
    return LinearMacs(**found)


def _products(layer: nn.Module, call: Callable[[int], Any], tokens: int) -> int:
    """Multiply-accumulates of matrices: as torch counts them, or as the modules that were called say."""
    said = []
    hooks = [
        module.register_forward_hook(lambda module, args, _: said.append(_said(module, args[0])))
        for module in layer.modules()
        if _says_its_size(module) and not any(map(_says_its_size, list(module.modules())[1:]))
    ]
    try:
        with FlopCounterMode(display=False) as counter:
            call(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return max(counter.get_total_flops() // 2, sum(said))


def _says_its_size(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _said(module: nn.Module, x: torch.Tensor) -> int:
    return x.numel() // module.in_features * module.in_features * module.out_features
