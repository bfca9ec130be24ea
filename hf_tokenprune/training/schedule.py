"""What changes in a pruning while a model trains. Everything follows from the step, so that a resumed run goes on."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.modeling_tokenprune import Prunable
from ..modeling.pruning_config import PruningConfig
from ..modeling.soft_pruning import ThresholdMask


def pruned_model(model: nn.Module) -> Prunable:
    """Our model inside what wraps it (adapters, data parallelism, compilation).

    Raises:
        TypeError: there is none.
    """
    for module in model.modules():
        if isinstance(module, Prunable):
            return module
    raise TypeError(f"{type(model).__name__} is not a token pruning model; prune(model, ...) makes it one")


class KeepRateWarmup(TrainerCallback):
    """From nothing pruned to the model's own pruning between two points of training, along half a cosine.

    Args:
        start, end: shares of all optimiser steps, 0 <= start < end <= 1.
    """

    def __init__(self, start: float, end: float):
        if not 0.0 <= start < end <= 1.0:
            raise ValueError(f"start ({start!r}) and end ({end!r}) must be 0 <= start < end <= 1")
        self.start, self.end = start, end
        self.target = self._passing = None

    def progress(self, share: float) -> float:
        """How much is pruned, in [0, 1], after this share of training."""
        passed = min(max((share - self.start) / (self.end - self.start), 0.0), 1.0)
        return 0.5 * (1.0 - math.cos(math.pi * passed))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        pruning = pruned_model(model).config.pruning
        if pruning is None:
            raise ValueError("pruning (None) must be set to be warmed up to: model.set_pruning(...)")
        if pruning != self._passing:  # where training begins anew with smaller batches, it is what passed
            self.target = pruning

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        ours = pruned_model(model)
        longest = ours.base_model.longest_input
        self._passing = self.target.eased(self.progress(state.global_step / state.max_steps), longest)
        ours.set_pruning(self._passing)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        pruned_model(model).set_pruning(self.target)


class SoftToHard(TrainerCallback):
    """An objective's two phases in one run: masks first, then removal with what they learned.

    In the soft phase the temperature falls geometrically and a budget's target linearly. Masks do not cost what removal
    costs: at the switch thresholds move together until the budget is met, and the hard phase trains what will be used.

    Args:
        soft_share: of all optimiser steps.
        budget_warmup: of the soft phase.
        final_temperature: at its end; None: the temperature stays.

    Attributes:
        start_macs: the MAC ratio that a budget's target falls from: what the model costs with nothing pruned.
        meet: from a pruning to the same that meets its budget; None: there is none to meet.
    """

    def __init__(self, soft_share: float, budget_warmup: float, final_temperature: float | None):
        self.soft_share, self.budget_warmup, self.final_temperature = soft_share, budget_warmup, final_temperature
        self.target = self._passing = None
        self.start_macs = 1.0
        self.meet: Callable[[PruningConfig], PruningConfig] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        pruning = pruned_model(model).config.pruning
        objective = None if pruning is None else pruning.objective
        if objective is None or objective != self._passing:  # as in `KeepRateWarmup`
            self.target = objective

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        ours, target = pruned_model(model), self.target
        if target is None:
            return
        soft_steps = math.ceil(self.soft_share * state.max_steps)
        if state.global_step >= soft_steps:
            objective = replace(target, phase="hard")
            if state.global_step == soft_steps and self.meet is not None:
                _learn(ours, self.meet(ours.base_model.learned_pruning()))
        else:
            passed = state.global_step / (self.soft_share * state.max_steps)
            objective = replace(target, phase="soft")
            if target.temperature is not None and self.final_temperature is not None:
                fall = self.final_temperature / target.temperature
                objective = replace(objective, temperature=target.temperature * fall**passed)
            if target.target_macs is not None:
                warm = min(passed / self.budget_warmup, 1.0) if self.budget_warmup else 1.0
                start = max(self.start_macs, target.target_macs)
                objective = replace(objective, target_macs=start - (start - target.target_macs) * warm)
        self._passing = objective
        if objective != ours.config.pruning.objective:
            ours.set_pruning(replace(ours.config.pruning, objective=objective))


def _learn(model: Prunable, pruning: PruningConfig) -> None:
    """Puts a pruning's thresholds where the masks of the model learn them."""
    layers = model.base_model.token_layers()
    for layer, site in pruning.sites.items():
        for module in layers[layer].modules():  # it may be inside another: adapters wrap what they save whole
            if isinstance(module, ThresholdMask):
                with torch.no_grad():
                    module.log_threshold.fill_(math.log(site.value))
