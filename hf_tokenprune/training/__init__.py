"""Objectives and the trainer. `TokenPruneTrainer` is the stock `Trainer` and what pruned models learn with it."""

from .arguments import TokenPruneTrainingArguments
from .schedule import KeepRateWarmup, SoftToHard
from .trainer import TokenPruneTrainer


__all__ = ["KeepRateWarmup", "SoftToHard", "TokenPruneTrainer", "TokenPruneTrainingArguments"]
