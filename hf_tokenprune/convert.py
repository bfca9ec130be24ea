"""`prune`: a native model becomes a pruned one that shares its parameters. And weights from elsewhere."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import native_to_pruned, supported_natives
from .modeling.pruning_config import PruningConfig
from .modeling.value_checks import quoted
from .twins import take_over


def prune(model: PreTrainedModel, pruning: PruningConfig | dict | str | None, copy: bool = False) -> PreTrainedModel:
    """The model with fewer tokens: same weights, same task, same outputs.

    The two share the memory of their weights and nothing else (and not of those under an adapter, into which merging
    it writes): what is trained or loaded in place in one is there in the other, while mode, dtype, device,
    `requires_grad`, gradients, hooks, buffers and quantisation are each model's own. So an optimizer wants the
    parameters of one of them. A module that holds both is saved with both; what `from_pretrained` fills has memory of
    its own.

    Args:
        model: a native model of a supported family, base or with a head. It stays usable, unpruned. What replaces its
            weights later (`resize_token_embeddings`, `.half()`, `.to(device)`) ends the sharing of these: the pruned
            model keeps those that it has, with its own config, and the other way round. One of our own models is taken
            too. LoRA or quantised layers inside it come along, as they are.
        pruning: a `PruningConfig`, a preset's name (sites at a quarter, half and three quarters of the depth), a dict,
            or None: nothing pruned.
        copy: True shares nothing: every trial of a loop starts from the model's weights.

    Raises:
        TypeError: a model of another family, listing the supported ones.
        ValueError: a decoder, a pruning that does not fit the model, or parts of it that were replaced.
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
    take_over(twin, model, copy_parameters=copy)
    twin.base_model.fit_pruner()
    return twin


def load_dynamicvit_predictors(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Loads the weights of the reference's `score_predictor` into the token predictors of a model.

    Args:
        model: one of our models, with sites that score by `"learned"` saliency, as preset `dynamicvit` has them.
        state_dict: `"{site}.in_conv.0.weight"` and so on, sites counted from 0 in the order of their layers; a prefix
            `score_predictor.` or `predictor.` is taken off. DynamicViT, NeurIPS 2021.

    Raises:
        ValueError: no such sites, weights for other sites, missing or unknown names, or other shapes.
    """
    pruning = getattr(model.config, "pruning", None)
    sites = [] if pruning is None else [i for i, site in sorted(pruning.sites.items()) if site.saliency == "learned"]
    if not sites:
        raise ValueError(f"pruning ({quoted(pruning)}) must have sites with saliency 'learned' to load predictors into")
    given: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state_dict.items():
        site, _, rest = name.removeprefix("score_predictor.").removeprefix("predictor.").partition(".")
        given.setdefault(site, {})[rest] = value
    if sorted(given) != sorted(str(site) for site in range(len(sites))):
        raise ValueError(f"the predictors' sites ({sorted(given)}) must be 0 to {len(sites) - 1}, for layers {sites}")
    layers = model.base_model.token_layers()
    for site, index in enumerate(sites):
        _load_exactly(layers[index].predictor, given[str(site)], f"predictor {site}, of layer {index}")


def _load_exactly(module: nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    if ours != theirs:
        differ = {
            name: (theirs.get(name), ours.get(name)) for name in ours | theirs if ours.get(name) != theirs.get(name)
        }
        raise ValueError(f"{what}: shapes (given, needed) must agree: {differ}")
    module.load_state_dict(weights)


def _unsupported(model: Any) -> str:
    name = type(model).__name__
    supported = f"supported: {', '.join(supported_natives())}"
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return (
            f"{name} wraps a model with adapters; call prune(model.get_base_model(), ...), which keeps the adapters in "
            f"place, or prune first and then get_peft_model(...) ({supported})"
        )
    inside = _prunable_parts(model)
    if inside:
        return f"{name} cannot be pruned as a whole, but what it holds can: {inside} ({supported})"
    natives = [native.__name__ for native in native_to_pruned() if isinstance(model, native)]
    if natives:
        return (
            f"{name} is a subclass of {natives[0]}, whose own forward would be lost: prune a {natives[0]} ({supported})"
        )
    return f"{name} cannot be pruned; {supported}"


def _prunable_parts(model: Any) -> str:
    """The lines that prune what a model of another class holds, in words."""
    known, found = {*native_to_pruned(), *native_to_pruned().values()}, []
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module) in known and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    names = [re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"model.{path}") for path in found]
    ways = [f"`{name} = prune({name}, ...)`" for name in names]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if any(key.startswith(f"{path}.") for path in found for pair in tied.items() for key in pair):
        ways.append("`model.tie_weights()`, because weights of it are tied")
    return ", then ".join(ways)
