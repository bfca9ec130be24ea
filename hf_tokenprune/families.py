"""The family table: which modeling file holds which classes, and their registration with the Auto classes."""

import importlib
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType, ModuleType

import transformers

from .modeling.transformers_version import TransformersTooOld


@dataclass(frozen=True)
class Family:
    """One family of encoders.

    Args:
        module: its file in `modeling`.
        models: native class name -> our class name.
    """

    module: str
    models: dict[str, str]

    @property
    def config(self) -> str:
        return next(iter(self.models.values())).removesuffix("Model") + "Config"

    @property
    def available(self) -> bool:
        """Whether this transformers is new enough for it; its file says from when."""
        try:
            self.load()
        except TransformersTooOld:
            return False
        return True

    def load(self) -> ModuleType:
        """Its module. Raises `TransformersTooOld`, an ImportError, where transformers is too old for it."""
        return importlib.import_module(f".modeling.{self.module}", __package__)


def _family(name: str, *heads: str) -> Family:
    models = {f"{name}{suffix}": f"TokenPrune{name}{suffix}" for suffix in ("Model", *heads)}
    return Family(f"modeling_tokenprune_{name.lower()}", models)


FAMILIES = MappingProxyType(
    {
        "BERT": _family("Bert", "ForSequenceClassification", "ForTokenClassification"),
        "ViT": _family("ViT", "ForImageClassification"),
        "DeiT": _family("DeiT", "ForImageClassification", "ForImageClassificationWithTeacher"),
        "DINOv2": _family("Dinov2", "ForImageClassification"),
        "DINOv2 with registers": _family("Dinov2WithRegisters", "ForImageClassification"),
    }
)


def class_names(*, available: bool = False) -> dict[str, Family]:
    """Every public class name of every family, or of those that this transformers has."""
    return {
        name: family
        for family in FAMILIES.values()
        if family.available or not available
        for name in (family.config, *family.models.values())
    }


def supported_natives() -> list[str]:
    """The native classes that `prune` takes with this transformers."""
    return [name for family in FAMILIES.values() if family.available for name in family.models]


@cache
def native_to_pruned() -> dict[type, type]:
    """Native model class -> our model class, for the families that this transformers has."""
    return {
        getattr(transformers, native): getattr(family.load(), ours)
        for family in FAMILIES.values()
        if family.available
        for native, ours in family.models.items()
    }


def register_auto_classes() -> None:
    """Registers every available family with AutoConfig and its Auto model classes."""
    for family in FAMILIES.values():
        if not family.available:
            continue
        module = family.load()
        config = getattr(module, family.config)
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, references in config.family_auto_map.items():
            if auto != "AutoConfig":
                models = tuple(getattr(module, reference.rpartition(".")[2]) for reference in references)
                model = models if len(models) > 1 else models[0]
                getattr(transformers, auto).register(config, model, exist_ok=True)
