"""Modules of a model's own over the parameters of another: everything is copied but what the parameters hold.

`copy.deepcopy` copies; its memo, filled beforehand, says what stands for which object of the original.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .modeling.hooks import HOOKS, asks_for_gradients
from .modeling.pruner_modules import VALUES
from .modeling.token_layer import TokenPruneLayer


STORES = frozenset(vars(nn.Module()))
# Calls of hooks belong to whoever asked for them, unless a weight is made by them.
MAKERS = ("torch.nn.utils.", "torch.ao.", "torchao.", "bitsandbytes.", "peft.")
PLAIN = (bool, int, float, complex, str, bytes, type, type(None), torch.dtype, torch.device, torch.Size)
# What an offloading hook reads weights from.
OFFLOADED = ("weights_map", "tied_params_map")
# Said of the original alone: that others wrapped its forward, or hung hooks on it.
OF_THE_ORIGINAL = ("config", "_hf_hook", "_is_accelerate_prepared", "_output_capturing_hooks_installed")

Memo = dict[int, Any]


@torch.inference_mode(False)
def take_over(twin: nn.Module, original: nn.Module, *, copy_parameters: bool) -> None:
    """Gives `twin`, built of the same parts, modules like those of `original`, and what was set on them.

    What holds our layers stays the module that it is. Parameters are new ones over the same memory, or copies; buffers
    are copies, and so is what lies under an adapter, whose merging writes into it; hooks are left out, but for those
    that make weights.

    Raises:
        ValueError: the original has other parts than its native classes, which would not be called.
    """
    pairs = list(_pairs(twin, original))
    for ours, theirs in pairs:
        _check_stock(ours, theirs)
    memo: Memo = {id(theirs): ours for ours, theirs in pairs}
    memo |= {id(theirs.config): ours.config for ours, theirs in pairs if hasattr(theirs, "config")}
    modules = list(original.modules())
    _leave_behind(modules, memo)
    if not copy_parameters:
        _share_parameters(modules, memo)
        _share_offloaded(modules, memo)
    _copy_what_was_set(modules, memo)
    for ours, theirs in pairs:
        _fill(ours, theirs, memo)
    for ours, theirs in pairs:
        _attach_device_hook(ours, theirs, memo)


def _pairs(twin: nn.Module, original: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules that hold our layers, each with the one that it stands for."""
    yield twin, original
    for name, child in twin.named_children():
        theirs = original._modules.get(name)
        if theirs is not None and any(isinstance(module, TokenPruneLayer) for module in child.modules()):
            yield from _pairs(child, theirs)


def _check_stock(ours: nn.Module, theirs: nn.Module) -> None:
    """Raises a ValueError for parts that somebody replaced: what token pruning calls are those of the stock ones."""
    if isinstance(ours, nn.ModuleList) and len(ours) != len(theirs):
        raise ValueError(f"the model has {len(theirs)} layers, and num_hidden_layers ({len(ours)}) must be as many")
    if type(theirs) not in type(ours).__mro__ or _has_own_forward(theirs):
        raise ValueError(_replaced(theirs))
    if isinstance(ours, TokenPruneLayer):
        skipped = {id(module) for module in ours.uncalled_modules()}
        for name, part in [(name, part) for name, part in ours.named_modules() if id(part) in skipped]:
            found = theirs.get_submodule(name)
            if type(found) is not type(part) or _has_own_forward(found):
                raise ValueError(_replaced(found))


def _has_own_forward(module: nn.Module) -> bool:
    """Whether somebody put a function in place of the class's; accelerate's wrappers call that."""
    own = vars(module)
    return "forward" in own and not own.keys() & {"_hf_hook", "_original_forward"}


def _replaced(module: nn.Module) -> str:
    what = "has a forward that was replaced" if _has_own_forward(module) else "is not the native class"
    return f"a {type(module).__name__} in the model {what}: token pruning calls its parts and would not call it"


def _share_parameters(modules: list[nn.Module], memo: Memo) -> None:
    """Tied ones stay tied: one parameter has one twin."""
    tuned = [module.base_layer for module in modules if "base_layer" in module._modules]
    adapted = {id(each) for layer in tuned for each in layer.parameters()}
    parameters = [each for module in modules for each in module._parameters.values() if each is not None]
    parameters = [each for each in parameters if id(each) not in adapted]
    for parameter in parameters:
        if id(parameter) not in memo:
            memo[id(parameter)] = _over_the_same_memory(parameter)
    for parameter in parameters:  # when every one has a twin: attributes may lead to modules
        ours = memo[id(parameter)]
        if ours is not parameter and issubclass(type(parameter), nn.Parameter):
            for name, value in vars(parameter).items():
                setattr(ours, name, value.detach() if isinstance(value, torch.Tensor) else _copied(value, memo))


def _over_the_same_memory(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of its own; the same one where its kind allows none."""
    kind = type(parameter)
    try:
        if kind is not nn.Parameter and issubclass(kind, nn.Parameter):
            return torch.Tensor._make_subclass(kind, parameter.detach(), parameter.requires_grad)
        return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return parameter


def _share_offloaded(modules: list[nn.Module], memo: Memo) -> None:
    for module in modules:
        hook = vars(module).get("_hf_hook")
        for each in getattr(hook, "hooks", () if hook is None else (hook,)):
            maps = [vars(each).get(name) for name in OFFLOADED]
            memo |= {id(held): held for held in maps if held is not None}


def _leave_behind(modules: list[nn.Module], memo: Memo) -> None:
    """Other people's hooks, and the graph of what was computed: tensors of one cannot be copied with it."""
    for module in modules:
        for name in HOOKS:
            hooks = vars(module)[name]
            memo[id(hooks)] = type(hooks)((key, hook) for key, hook in hooks.items() if _goes_along(hook))
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())


def _copy_what_was_set(modules: list[nn.Module], memo: Memo) -> None:
    """One by one, so that what cannot be copied is no hindrance to the module that has it."""
    for module in modules:
        for name in HOOKS:
            kept = memo[id(vars(module)[name])]
            kept.update({key: _copied(hook, memo) for key, hook in kept.items()})
        for name, value in vars(module).items():
            if name not in STORES and not isinstance(value, PLAIN) and id(value) not in memo:
                _copied(value, memo)


def _goes_along(hook: Callable) -> bool:
    function = hook.func if isinstance(hook, partial) else getattr(hook, "__func__", hook)
    home = getattr(function, "__module__", None) or type(function).__module__
    # transformers' own, for adapters under gradient checkpointing; it goes with the switch on the model.
    return f"{home}.".startswith(MAKERS) or asks_for_gradients(hook)


def _copied(value: Any, memo: Memo) -> Any:
    """A copy, or the same object where there can be none (a lock, an open file)."""
    trial = dict(memo)
    try:
        ours = copy.deepcopy(value, trial)
    except Exception:
        memo[id(value)] = value
        return value
    # What deepcopy keeps alive, because ids of it are in the memo, lies under the memo's own id.
    memo.setdefault(id(memo), []).extend(trial.pop(id(trial), []))
    memo.update(trial)
    return ours


def _fill(ours: nn.Module, theirs: nn.Module, memo: Memo) -> None:
    for store in ("_parameters", "_buffers"):
        getattr(ours, store).update(copy.deepcopy(getattr(theirs, store), memo))
    # Masks of an objective that ours has none for are left.
    names = [*ours._modules, *(name for name in theirs._modules if name not in VALUES)]
    for name in dict.fromkeys(names):
        ours._modules[name] = copy.deepcopy(theirs._modules.get(name), memo)
    for name, value in vars(theirs).items():
        if _was_set(name, value, ours) and (name != "peft_config" or _has_own_adapters(theirs)):
            setattr(ours, name, _copied(value, memo))


def _was_set(name: str, value: Any, ours: nn.Module) -> bool:
    """Whether it is more than what torch keeps, what our own class sets, or a method in place of a class's own."""
    if name == "training":
        return True
    if name in STORES or name in OF_THE_ORIGINAL:
        return False
    if callable(value) and (hasattr(type(ours), name) or hasattr(value, "__self__")):
        return False
    return not (name.startswith("_") and name in vars(ours))


def _has_own_adapters(model: nn.Module) -> bool:
    """Whether transformers added them; peft leaves its config on the model inside of its own, too."""
    return getattr(model, "_hf_peft_config_loaded", False)


def _attach_device_hook(ours: nn.Module, theirs: nn.Module, memo: Memo) -> None:
    """The hook that places weights and inputs wraps the forward that it finds, so it is not copied but put on."""
    hook = vars(theirs).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(ours, copy.deepcopy(hook, memo))
