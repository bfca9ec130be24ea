"""`prune`: a native model becomes a pruned one that shares its parameters."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import native_to_pruned, supported_natives
from .modeling.modeling_tokenprune import TokenPruneLayer
from .modeling.pruning_config import PruningConfig


def prune(model: PreTrainedModel, pruning: PruningConfig | dict | str | None) -> PreTrainedModel:
    """The model with fewer tokens: same weights (shared, not copied), same task, same outputs.

    Args:
        model: a native model of a supported family, base or with a head. It stays usable, unpruned. One of our own
            models is taken too. LoRA or quantised layers inside it are called as they are.
        pruning: a `PruningConfig`, a preset's name (sites at a quarter, half and three quarters of the depth), a dict,
            or None: nothing pruned.

    Raises:
        TypeError: a model of another family, listing the supported ones.
        ValueError: a decoder, or a pruning that does not fit the model.
    """
    pairs = native_to_pruned()
    if type(model) in pairs.values():
        target = type(model)
    elif type(model) in pairs:
        target = pairs[type(model)]
    else:
        raise TypeError(_unsupported(model))
    config = target.config_class.from_native(model.config, pruning)
    with torch.device("meta"):
        twin = target(config)
    _share(twin, model)
    twin.name_or_path = model.name_or_path
    return twin


def _unsupported(model: Any) -> str:
    name = type(model).__name__
    supported = f"supported: {', '.join(supported_natives())}"
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return (
            f"{name} wraps a model with adapters; call prune(model.get_base_model(), ...), which keeps the adapters in "
            f"place, or prune first and then get_peft_model(...) ({supported})"
        )
    return f"{name} cannot be pruned; {supported}"


def _share(twin: nn.Module, native: nn.Module) -> None:
    """Gives `twin` the modules of `native`, as objects. Only what holds our layers stays a module of its own."""
    twin.training = native.training
    for store in ("_parameters", "_buffers"):
        getattr(twin, store).update(getattr(native, store))
    for flag in ("gradient_checkpointing", "_gradient_checkpointing_func"):
        if hasattr(native, flag):
            setattr(twin, flag, getattr(native, flag))
    for name, child in twin.named_children():
        theirs = native._modules.get(name)
        if theirs is not None and any(isinstance(module, TokenPruneLayer) for module in child.modules()):
            _share(child, theirs)
        else:
            twin._modules[name] = theirs
