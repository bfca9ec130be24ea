"""Token pruning as an ordinary property of Hugging Face Transformers models."""

from typing import Any

from .convert import load_dynamicvit_predictors, prune
from .families import class_names, register_auto_classes
from .modeling.pruning_config import PruningConfig
from .modeling.pruning_stage import PruningStage
from .planning import Calibration, Plan, Search, calibrate, plan, search_schedule
from .profiling.macs import count_macs
from .training import TokenPruneTrainer, TokenPruneTrainingArguments, fit_token_prior


__version__ = "0.1.0"

register_auto_classes()

_CLASS_NAMES = class_names()

__all__ = [
    "Calibration",
    "Plan",
    "PruningConfig",
    "PruningStage",
    "Search",
    "TokenPruneTrainer",
    "TokenPruneTrainingArguments",
    "calibrate",
    "count_macs",
    "fit_token_prior",
    "load_dynamicvit_predictors",
    "plan",
    "prune",
    "search_schedule",
    *class_names(available=True),
]


def __getattr__(name: str) -> Any:
    """The classes of the families; one that needs a later transformers says so when it is asked for."""
    if name in _CLASS_NAMES:
        return getattr(_CLASS_NAMES[name].load(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
