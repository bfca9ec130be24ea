"""Objectives and the trainer. `TokenPruneTrainer` is the stock `Trainer` and what pruned models learn with it."""

from .arguments import TokenPruneTrainingArguments
from .schedule import KeepRateWarmup, SoftToHard
from .token_prior import fit_token_prior
from .trainer import TokenPruneTrainer


__all__ = ["KeepRateWarmup", "SoftToHard", "TokenPruneTrainer", "TokenPruneTrainingArguments", "fit_token_prior"]
