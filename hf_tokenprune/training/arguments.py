"""Arguments of `TokenPruneTrainer`, beside those of the stock `Trainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..metrics import LOWER_IS_BETTER


@dataclass
class TokenPruneTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how a pruning is trained. Shares are of all optimiser steps, in [0, 1].

    Raises:
        ValueError: a value out of range.
    """

    pruner_learning_rate: float | None = field(
        default=None, metadata={"help": "Of token predictors, masks and multipliers; the learning rate if not given."}
    )
    predictor_learning_rate: float | None = field(
        default=None, metadata={"help": "Of token predictors; that of the pruner if not given."}
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Of KL(teacher || student) on logits, times the squared temperature."}
    )
    distillation_temperature: float = field(default=2.0, metadata={"help": "Of both logits in the KL."})
    token_distillation_weight: float = field(
        default=0.0, metadata={"help": "Of the mean squared error of kept tokens' last states to the teacher's."}
    )
    in_place_distillation: bool = field(
        default=False,
        metadata={"help": "The labels teach the unpruned model, and its logits the pruned one, in the same step."},
    )
    keep_rate_warmup_start: float = field(default=0.0, metadata={"help": "Until here nothing is pruned."})
    keep_rate_warmup_end: float = field(
        default=0.0, metadata={"help": "From here on all is, half a cosine in between; 0: no warm-up."}
    )
    soft_share: float = field(default=0.5, metadata={"help": "Share of training in an objective's soft phase."})
    budget_warmup: float = field(
        default=0.4, metadata={"help": "Share of the soft phase in which the target falls to target_macs."}
    )
    target_macs: float | None = field(
        default=None,
        metadata={"help": "MAC ratio that thresholds move to, before training and after; an objective has its own."},
    )
    budget_samples: int = field(
        default=256, metadata={"help": "Training inputs on which thresholds are found that meet a MAC ratio."}
    )
    prior_samples: int = field(
        default=1000,
        metadata={
            "help": "Training inputs that an unfilled table of saliency token_prior is filled from at the start."
        },
    )
    final_temperature: float | None = field(
        default=None, metadata={"help": "Of the masks at the end of the soft phase; as at its start if not given."}
    )
    sandwich_samples: int = field(
        default=0,
        metadata={"help": "Random budgets a step, beside nothing pruned and the smallest budget; 0: no sandwich."},
    )
    budgets: list[float] | None = field(
        default=None,
        metadata={"help": "MAC ratios for set_budget: values that cost them are found before training and after."},
    )

    def __post_init__(self) -> None:
        best = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and best in LOWER_IS_BETTER:
            self.greater_is_better = False  # stock arguments know that of losses alone
        super().__post_init__()
        if self.ddp_find_unused_parameters is None and not (self.gradient_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            # The hard phase leaves masks unused. `Trainer` would not look for them when layers are recomputed, which
            # is a bar to reentrant checkpointing alone.
            self.ddp_find_unused_parameters = True
        for name in ("keep_rate_warmup_start", "keep_rate_warmup_end", "soft_share", "budget_warmup"):
            _check(name, getattr(self, name), 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")
        samples = ("sandwich_samples", "budget_samples", "prior_samples")
        for name in ("distillation_weight", "token_distillation_weight", *samples):
            _check(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        rates = ("pruner_learning_rate", "predictor_learning_rate")
        for name in (*rates, "distillation_temperature", "final_temperature"):
            _check(name, getattr(self, name), getattr(self, name) is None or getattr(self, name) > 0, "> 0")
        for budget in self.budgets or ():
            _check("budgets", budget, 0.0 < budget <= 1.0, "in (0, 1]")
        _check("target_macs", self.target_macs, self.target_macs is None or 0.0 < self.target_macs <= 1.0, "in (0, 1]")
        wanted = self.budgets or self.target_macs is not None
        _check("budget_samples", self.budget_samples, self.budget_samples or not wanted, "> 0 with a MAC ratio to meet")
        start, end = self.keep_rate_warmup_start, self.keep_rate_warmup_end
        _check(
            "keep_rate_warmup_start", start, start < end or not (start or end), f"below keep_rate_warmup_end ({end})"
        )


def _check(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} ({value!r}) must be {rule}")
