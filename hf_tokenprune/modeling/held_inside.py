"""A pruned model inside another: what is written of it when the outer one is saved, and what would not come back.

An outer model writes its own config and the weights of all. So it is here, where its weights are collected, that ours
can tell what it would lose.
"""

import sys
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .pruning_config import PruningConfig


Address = tuple[torch.device, int, torch.Size]


class HeldInside:
    """Goes before the native model class.

    Attributes:
        _told: in which outer class with which pruning it was last found out whether that comes back.

    Modifications:
        - Weights that the outer model holds a second time, in a model over the same memory, are written twice.
        - An outer model that would come back unpruned is not saved, and an adapter says what it is loaded on.
    """

    _told: tuple[type, PruningConfig | None] | None = None

    def state_dict(
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """As natively.

        Raises:
            ValueError: an outer model is being saved that loading would build without this pruning.
        """
        weights = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        holders, saved = _holders(self)
        if holders and not any(isinstance(holder, HeldInside) for holder in holders):
            if not keep_vars:
                _separate(weights, prefix, self, holders[-1])
            self._tell_what_is_lost(holders[-1], saved)
        return weights

    def _tell_what_is_lost(self, outermost: nn.Module, saved: nn.Module | None) -> None:
        """saved: the model whose `save_pretrained` asks; None: whoever collected the weights may hand them to it."""
        if _saves_adapters(saved):
            tell_base(self, saved)
        elif isinstance(saved, PreTrainedModel):
            lost = _lost_in_round_trip(saved, self)
            if lost:
                raise ValueError(lost)
        elif saved is None and self._told != (type(outermost), self.config.pruning):
            self._told = type(outermost), self.config.pruning
            if _saves_adapters(outermost):
                tell_base(self, outermost)
            elif isinstance(outermost, PreTrainedModel) and (lost := _lost_in_round_trip(outermost, self)):
                warnings.warn(lost, stacklevel=4)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if _saves_adapters(self):
            tell_base(self, self)
        elif any(name.endswith(".base_layer") for name, _ in self.named_modules()):
            warnings.warn(
                f"{type(self).__name__} is saved with adapters inside, which from_pretrained does not build: merge "
                "them first (merge_and_unload), or save the PeftModel around it",
                stacklevel=2,
            )
        super().save_pretrained(*args, **kwargs)


def address(tensor: torch.Tensor) -> Address | None:
    """Where a tensor lies, equal for all over the same memory; None where that cannot be told."""
    try:
        pointer = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # made of others
        return None
    return (tensor.device, pointer, tensor.shape) if pointer else None


def _holders(module: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """The models around it whose weights are being collected, the outermost last; and the one that is being saved."""
    frame, holders, saved = sys._getframe(2), [], None
    while frame is not None:
        call, owner = frame.f_code.co_name, frame.f_locals.get("self")
        if call in ("state_dict", "save_pretrained") and isinstance(owner, nn.Module):
            inside = owner is not module and any(each is module for each in owner.modules())
            if inside and call == "state_dict" and owner not in holders:
                holders.append(owner)
            if (inside or owner is module) and call == "save_pretrained" and saved is None:
                saved = owner
        frame = frame.f_back
    return holders, saved


def _saves_adapters(model: nn.Module | None) -> bool:
    """Whether it is peft's own model, or transformers' with adapters; peft leaves its config on models inside, too."""
    if isinstance(model, PreTrainedModel):
        return getattr(model, "_hf_peft_config_loaded", False)
    return hasattr(model, "peft_config")


def _separate(weights: dict[str, Any], prefix: str, module: nn.Module, outermost: nn.Module) -> None:
    """Copies what another parameter of the outer model has the memory of: neither is the other's tied weight, which
    loading would restore from it."""
    own = {id(parameter) for parameter in module.parameters()}
    others = {address(parameter) for parameter in outermost.parameters() if id(parameter) not in own} - {None}
    for name, tensor in weights.items():
        if others and name.startswith(prefix) and isinstance(tensor, torch.Tensor) and address(tensor) in others:
            weights[name] = tensor.clone()


def _lost_in_round_trip(outer: PreTrainedModel, module: Any) -> str | None:
    """What to say if loading the outer model would build something else than this pruning."""
    if module.config.pruning is None:
        return None
    path, found = _path_in(outer, module), None
    try:
        found = _built_by_loading(outer, path)
    except Exception as error:
        warnings.warn(
            f"whether {type(outer).__name__} comes back with the pruning of its {path!r} was not checked: its class "
            f"cannot be built from its config alone ({type(error).__name__}: {str(error)[:300]})",
            stacklevel=4,
        )
        return None
    return None if _has_pruning_of(module, found) else _would_be_lost(outer, path, found)


def _path_in(outer: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in outer.named_modules() if each is module)


def _has_pruning_of(module: Any, found: nn.Module | None) -> bool:
    return isinstance(found, HeldInside) and found.config.pruning == module.config.pruning


def _would_be_lost(outer: PreTrainedModel, path: str, found: nn.Module | None) -> str:
    name, there = type(outer).__name__, "nothing" if found is None else type(found).__name__
    way = f"let {name}.__init__ build `self.{path} = prune(<the native model>, config.pruning)` and set "
    if isinstance(found, HeldInside):
        there, way = f"{there} with another pruning", "set "
    whole = "prune the whole model (`prune(model, pruning)`), or " if _stands_for_ours(outer) else ""
    return (
        f"{name} would come back without the pruning of its {path!r}: {name}(config), which loading builds, has "
        f"{there} there. To keep it, {whole}{way}"
        f"`model.config.pruning = model.{path}.config.pruning.to_dict()`. To save without it, call "
        f"`model.{path}.set_pruning(None)`; `torch.save(model.state_dict(), file)` writes the weights as they are"
    )


def _stands_for_ours(model: PreTrainedModel) -> bool:
    """Whether it is a native model that one of our classes takes the place of."""
    kinds = list(HeldInside.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
    return any(type(model) in kind.__bases__ for kind in kinds)


def _built_by_loading(model: PreTrainedModel, path: str) -> nn.Module | None:
    """What lies at that path in the model that loading builds, before it reads any weights."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return dict(type(model)(config).named_modules()).get(path)


def tell_base(module: Any, adapted: Any) -> None:
    """Warns if what an adapter names as its base has not the pruning that the adapter belongs to."""
    if module.config.pruning is None:
        return
    base = adapted if isinstance(adapted, PreTrainedModel) else adapted.get_base_model()
    for adapter in adapted.peft_config.values():
        name = adapter.base_model_name_or_path or base.name_or_path
        if not _base_comes_back(module, base, name):
            warnings.warn(
                f"this adapter names {name!r} as its base, where no such pruning is: AutoPeftModel and AutoModel "
                "load it on an unpruned model. Load it with PeftModel.from_pretrained(prune(base, pruning), folder), "
                "with model.config.pruning.to_dict() kept as JSON; or save the pruned model itself, load that and "
                "adapt it: then every way of loading comes back pruned",
                stacklevel=4,
            )


def _base_comes_back(module: Any, base: PreTrainedModel, name: str) -> bool:
    if base is module:
        return _pruning_at(name, module.config) == module.config.pruning
    try:
        return _has_pruning_of(module, _built_by_loading(base, _path_in(base, module)))
    except Exception:
        return False


def _pruning_at(name: str, config: Any) -> PruningConfig | None:
    """The pruning of the config that lies there, on this machine."""
    try:
        given, _ = type(config).get_config_dict(name, local_files_only=True)
        return PruningConfig.coerce(given.get("pruning"), config.num_hidden_layers)
    except (OSError, ValueError, TypeError):
        return None
