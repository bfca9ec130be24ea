"""`TokenPruneTrainer`: the stock `Trainer` with distillation, schedules, and a log of what was pruned."""

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..checkpoints import problem_of
from ..convert import prune
from ..files import write_atomically
from ..images import sized
from ..labels import CLASSES, REGRESSION
from ..modeling.held_inside import address
from ..modeling.modeling_tokenprune import Prunable
from ..modeling.pruner_modules import PREDICTORS, VALUES
from ..modeling.pruning_config import PruningConfig
from ..modeling.token_macs import sample_macs
from ..modeling.token_outputs import EncoderCall, LinearMacs
from ..profiling.linear_macs import linear_macs
from .arguments import TokenPruneTrainingArguments
from .budget import MISSED, THRESHOLDS, check_reach, thresholds_for_budget, with_budgets
from .distillation import check_teacher, difference_to_teacher, kept_token_mse
from .publishing import WithoutPickles
from .resuming import last_whole_checkpoint
from .schedule import KeepRateWarmup, SoftToHard, pruned_model
from .token_prior import fit_token_prior, prior_is_empty
from .work_log import WorkLog


logger = logging.get_logger(__name__)

SAVED = "(with an adapter: name it in modules_to_save)"


class TokenPruneTrainer(WithoutPickles, Trainer):
    """The stock `Trainer`, for our models.

    Modifications:
        - The loss has the distillation terms, in place (the pruned model learns from itself unpruned) and in a sandwich
          (so does that of several budgets) too.
        - The pruner's parameters have a learning rate of their own, and no weight decay.
        - Callbacks follow from the arguments: keep-rate warm-up, soft to hard.
        - Evaluation is at the full pruning even during a warm-up, and reports the MAC ratio, and what an input costs in
          1e9 MACs. Checkpoints carry that pruning, and a run that breaks off leaves it to the model.
        - Logs carry the MAC ratio and the alive tokens of each site.
        - Predictions are in the data's order, grouped by length or not: padding costs nothing here.
        - With `target_macs` thresholds move together, before training and after it, until training inputs cost that.
        - After training with an objective, what was learned is in the config, and with `budgets` the values for them.
        - Beside an adapter the pruning is saved, as `pruning.json`.
        - A checkpoint's state is written when all processes have written their part, and `resume_from_checkpoint=True`
          goes on from the last one that was written to its end, whenever the run was killed.
        - The arguments beside a model are JSON, and what is published has no pickle.
        - Accumulated over several batches, the terms that are added to a loss of the user's own (`compute_loss_func`),
          which `Trainer` takes for divided, are divided too.
        - Labels out of range, and a loss or a gradient that is not finite, end the run with a sentence before weights
          change; checkpoints stay.

    Args:
        teacher: an unpruned model for the distillation terms, native or ours; it is put in evaluation mode.

    Raises:
        TypeError: a model that is not ours.
        ValueError: a teacher with other labels, vocabulary or (for its tokens) width, distillation without a teacher, a
            sandwich without budgets, several GPUs in one process, label smoothing of what is no choice of one class.
    """

    args: TokenPruneTrainingArguments

    def __init__(self, *args: Any, teacher: PreTrainedModel | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = None if teacher is None else self._prepared(teacher)
        self._check_arguments()
        self.work = WorkLog()
        self._evaluated: list[torch.Tensor] | None = None
        self.data_collator = _CheckedLabels(self.data_collator, self.label_names, self.pruned.config)
        self._add_schedules()

    @property
    def pruned(self) -> Prunable:
        """Our model inside `model`."""
        return pruned_model(self.model)

    def _prepared(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Unpruned and in evaluation mode; a copy where the student has the same parameters, as `prune` makes it."""
        check_teacher(self.pruned.config, teacher.config, bool(self.args.token_distillation_weight))
        trained = {address(parameter) for parameter in self.model.parameters()} - {None}
        shared = any(address(parameter) in trained for parameter in teacher.parameters())
        return prune(teacher, None, copy=shared).to(self.args.device).eval()

    def _check_arguments(self) -> None:
        args = self.args
        if args.n_gpu > 1:  # replicas would share what a call collects
            raise ValueError(f"n_gpu ({args.n_gpu}) must be at most 1: `accelerate launch` gives each GPU a process")
        if self.teacher is None and (args.distillation_weight or args.token_distillation_weight):
            raise ValueError(
                f"distillation_weight ({args.distillation_weight}) and token_distillation_weight "
                f"({args.token_distillation_weight}) must be 0 without a teacher"
            )
        pruning = self.pruned.config.pruning
        if args.budgets and pruning is None:
            raise ValueError(f"budgets ({args.budgets}) need a pruning, whose values the smallest of them may reach")
        if args.in_place_distillation and pruning is None:
            raise ValueError("in_place_distillation (True) needs a pruning, whose model learns from the unpruned one")
        if args.sandwich_samples and not args.budgets and (pruning is None or not pruning.budgets):
            raise ValueError(f"sandwich_samples ({args.sandwich_samples}) needs budgets, here or in the pruning")
        objective = None if pruning is None else pruning.objective
        target = None if objective is None else objective.target_macs
        if target is not None and min(args.budgets or [target]) < target:
            raise ValueError(
                f"a budget ({min(args.budgets)}) must be at least target_macs ({target}), whose values are the smallest"
            )
        for name in ("in_place_distillation", "sandwich_samples", "keep_rate_warmup_end"):
            if getattr(args, name) and objective is not None and objective.learns_values:
                raise ValueError(
                    f"{name} ({getattr(args, name)}) must not be set with objective {objective.name!r}: it learns the "
                    "values that this would set"
                )
        config = self.pruned.config
        if args.label_smoothing_factor and problem_of(config) != CLASSES:
            raise ValueError(
                f"label_smoothing_factor ({args.label_smoothing_factor}) must be 0 with problem_type "
                f"{problem_of(config)!r}: it is of one class an input"
            )
        if args.sandwich_samples and args.keep_rate_warmup_end:
            raise ValueError(
                f"keep_rate_warmup_end ({args.keep_rate_warmup_end}) must be 0 with sandwich_samples "
                f"({args.sandwich_samples}), whose budgets are pruned to from the first step on"
            )
        if args.target_macs is not None:
            self._check_target(pruning)

    def _check_target(self, pruning: PruningConfig | None) -> None:
        target = f"target_macs ({self.args.target_macs})"
        if pruning is None or pruning.objective is not None:
            raise ValueError(f"{target} needs a pruning without an objective, which has its own")
        rules = {stage.rule for stage in pruning.stages}
        if not rules or not rules <= THRESHOLDS:
            raise ValueError(f"{target} needs thresholds to move, rules {sorted(THRESHOLDS)}, not {sorted(rules)}")

    def _add_schedules(self) -> None:
        args, pruning = self.args, self.pruned.config.pruning
        self._warmup = None
        if args.keep_rate_warmup_end:
            self._warmup = KeepRateWarmup(args.keep_rate_warmup_start, args.keep_rate_warmup_end)
            self.add_callback(self._warmup)
        self._phases = None
        if pruning is not None and pruning.objective is not None:
            self._phases = SoftToHard(args.soft_share, args.budget_warmup, args.final_temperature)
            self.add_callback(self._phases)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        values = self.args.pruner_learning_rate
        predictors = self.args.predictor_learning_rate or values
        for rate, names in ((predictors, PREDICTORS), (values, VALUES)) if fresh else ():
            own = {
                id(parameter)
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and any(part in names for part in name.split("."))
            }
            if not own:
                continue
            moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group({"params": moved, "lr": rate or self.args.learning_rate, "weight_decay": 0.0})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            folder = self.args.output_dir
            resume_from_checkpoint = last_whole_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"output_dir ({folder}) must hold a checkpoint that was written to its end")
        pruning, budgets = self.pruned.config.pruning, self.args.budgets
        learned = None if pruning is None or pruning.objective is None else pruning.objective.target_macs
        target = self.args.target_macs if learned is None else learned
        wanted = self.args.budget_samples and (target is not None or budgets)
        self._check_start(wanted)
        self._fill_prior()
        inputs = self._some_inputs(self.args.budget_samples) if wanted else []
        measure = self._ratios(inputs[self.args.process_index :: self.args.world_size]) if wanted else None

        def meet(given: PruningConfig) -> PruningConfig:
            return thresholds_for_budget(replace(given, objective=None), target, measure)

        if measure is not None and target is not None:
            check_reach(pruning, target, measure)
            if learned is None:
                self.pruned.set_pruning(meet(pruning))
            else:
                unpruned = pruning.eased(0.0, self.pruned.base_model.longest_input)
                self._phases.start_macs = min(1.0, measure(replace(unpruned, objective=None)))
                self._phases.meet = meet
        if budgets and learned is None:  # the values that an objective's target asks for are still to be learned
            self._set_budgets(measure)
        aim = self.pruned.config.pruning
        try:
            result = super().train(resume_from_checkpoint, **kwargs)
        except BaseException:  # Ctrl-C, too: what a schedule had come to is nobody's wish
            self.pruned.set_pruning(aim)
            self.is_in_train = False
            raise
        self.pruned.settle_pruning()
        self._settle_adapters()
        if measure is not None and target is not None:
            self.pruned.set_pruning(meet(self.pruned.config.pruning))
            self._check_met(target, measure(self.pruned.config.pruning))
        if budgets:
            self._set_budgets(measure, trained=True)
        return result

    def _check_met(self, target: float, ratio: float) -> None:
        """Says what was missed; the trained model is not to be lost for it."""
        if abs(ratio - target) > MISSED:
            values = list(self.pruned.config.pruning.values)
            logger.warning(f"target_macs ({target}) is missed: {ratio:.3f} is as close as thresholds come ({values})")

    def _check_start(self, wanted: Any) -> None:
        pruning = self.pruned.config.pruning
        if self.model_init is not None and (wanted or prior_is_empty(self.pruned)):
            raise ValueError(
                f"model_init ({self.model_init!r}) must not be given where training starts by measuring the model "
                "(target_macs, budgets, a table to fill): make a trainer for each model"
            )
        own = {
            part: parameter.requires_grad
            for name, parameter in sorted(self.model.named_parameters(), key=lambda each: each[1].requires_grad)
            for part in name.split(".")
            if part in PREDICTORS + VALUES
        }
        if pruning is not None and pruning.objective is not None and own and not any(own.values()):
            raise ValueError(
                f"objective ({pruning.objective.name!r}) trains {sorted(own)}, which must not be frozen {SAVED}"
            )
        adapted = hasattr(self.model, "peft_config") and self.pruned.base_model.looks_ids_up
        if adapted and len(self.pruned.base_model.prior_tables()) == 1:
            raise ValueError(f"saliency ('token_prior') has a table that the adapter must hold {SAVED}")

    def _settle_adapters(self) -> None:
        """What was learned is in the config now: adapters have no part of it to save, and need none to be loaded."""
        pruning = self.pruned.config.pruning
        if pruning is None or pruning.objective is not None:
            return
        for adapter in getattr(self.model, "peft_config", {}).values():
            names = getattr(adapter, "modules_to_save", None)
            adapter.modules_to_save = [name for name in names or () if name not in VALUES] or None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self._at_the_aim():
            super()._save(output_dir, state_dict)
            pruning = self.pruned.config.pruning
            if self.args.should_save and self.pruned is not self.model and pruning is not None:
                path = Path(output_dir or self.args.output_dir) / "pruning.json"  # an adapter has no model's config
                write_atomically(path, json.dumps(pruning.to_dict(), indent=1).encode())

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _set_budgets(self, measure: Callable[[PruningConfig], float], trained: bool = False) -> None:
        longest, pruning = self.pruned.base_model.longest_input, self.pruned.config.pruning
        self.pruned.set_pruning(with_budgets(pruning, self.args.budgets, measure, longest, clamp=trained))

    def _linear_macs(self) -> list[LinearMacs] | None:
        """With adapters, what they and the layers around them cost a token; measured once."""
        if not hasattr(self, "_measured_linear_macs"):
            try:
                self._measured_linear_macs = linear_macs(self.pruned)
            except ValueError as error:  # it is for logs and targets, and training need not end for it
                logger.warning(f"adapters are in no MAC count: {error}")
                self._measured_linear_macs = None
        return self._measured_linear_macs

    def _fill_prior(self) -> None:
        """Every process fills the same table, from the same inputs."""
        if self.args.prior_samples and prior_is_empty(self.pruned):
            fit_token_prior(self.pruned, map(self._prepare_inputs, self._some_inputs(self.args.prior_samples)))

    def _some_inputs(self, count: int) -> list[dict[str, Any]]:
        """The same training inputs at every start, in batches."""
        data, size = self.train_dataset, self.args.per_device_eval_batch_size
        if has_length(data) and not isinstance(data, IterableDataset):
            rows = [data[i] for i in random.Random(self.args.seed).sample(range(len(data)), min(count, len(data)))]
        else:
            rows = list(islice(data, count))
        batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        collate = self._get_collator_with_removed_columns(self.data_collator, "budget")
        return [{k: v for k, v in collate(batch).items() if k not in self.label_names} for batch in batches]

    def _ratios(self, batches: list[dict[str, Any]]) -> Callable[[PruningConfig], float]:
        """Measures a pruning's MAC ratio on all processes' inputs; the model stays as it is."""

        @torch.no_grad()
        def measure(pruning: PruningConfig) -> float:
            twin, linear = prune(self.pruned, pruning).eval(), self._linear_macs()
            costs = torch.zeros(2, device=self.args.device)
            for batch in batches:
                call = EncoderCall(work=True, linear_macs=linear)
                twin(**self._prepare_inputs(batch), encoder_call=call)
                costs += torch.stack([part.float().sum() for part in sample_macs(call, twin.config)])
            macs, whole = self.accelerator.reduce(costs, "sum").tolist()
            return macs / whole

        return measure

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._whole_loss(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss ({loss.item()}) at step {self.state.global_step} must be finite: a lower learning rate, or "
                "other data; the checkpoints that were saved are as they were"
            )
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scaler = self.accelerator.scaler  # of float16: it leaves such a step out, and scales the next one less
        if norm is not None and (scaler is None or not scaler.is_enabled()) and not math.isfinite(norm):
            raise ValueError(
                f"the gradient's norm ({float(norm)}) at step {self.state.global_step} must be finite: a lower "
                "learning rate, or other data; the checkpoints that were saved are as they were"
            )
        return norm

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        call = EncoderCall(work=True, linear_macs=self._linear_macs())
        result = super().prediction_step(model, {**inputs, "encoder_call": call}, *args, **kwargs)
        if self._evaluated is not None:
            costs = torch.stack(sample_macs(call, self.pruned.config), dim=1)
            self._evaluated.append(self.accelerator.gather_for_metrics(costs).cpu())
        return result

    def _whole_loss(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> tuple[torch.Tensor, Any]:
        """The loss at the current pruning; with pupils that of the unpruned model, and the KL of each of them to it.

        Universally Slimmable Networks, ICCV 2019; in a sandwich Length-Adaptive Transformer, ACL 2021.
        """
        pruning, pupils = self.pruned.config.pruning, self._pupils()
        if not pupils:
            loss, outputs, call = self._student_loss(model, inputs, items)
            self.work.add(call, self.pruned.config)
            return loss, outputs
        unlabelled = {name: value for name, value in inputs.items() if name not in self.label_names}
        try:
            self.pruned.set_pruning(pruning.eased(0.0, self.pruned.base_model.longest_input))
            loss, whole, _ = self._student_loss(model, inputs, items)
            for pupil in pupils:
                self.pruned.set_pruning(pupil)
                call = EncoderCall(work=True, linear_macs=self._linear_macs())
                outputs = model(**unlabelled, encoder_call=call)
                logits, more = outputs["logits"], outputs.get("pruning_loss")
                loss = loss + self._share * self._difference(inputs, logits, whole["logits"])
                loss = loss if more is None else loss + self._share * more
                self.work.add(call, self.pruned.config)
        finally:
            self.pruned.set_pruning(pruning)
        return loss, whole

    def _pupils(self) -> list[PruningConfig]:
        """The prunings that learn from the unpruned model in this step; none: the model's own learns from labels."""
        pruning, samples = self.pruned.config.pruning, self.args.sandwich_samples
        if not samples:
            return [pruning] if self.args.in_place_distillation else []
        least, most = (pruning.budgets[end][0] for end in (0, -1))
        chance = random.Random(f"{self.args.seed}/{self.state.global_step}")
        drawn, longest = (chance.uniform(least, most) for _ in range(samples)), self.pruned.base_model.longest_input
        return [pruning.at_budget(macs, longest) for macs in (least, *drawn)]

    def _student_loss(
        self, model: nn.Module, inputs: dict[str, Any], items: Any
    ) -> tuple[torch.Tensor, Any, EncoderCall]:
        args, tokens = self.args, bool(self.args.token_distillation_weight)
        call = EncoderCall(work=True, trace=tokens, linear_macs=self._linear_macs())
        extra = {"encoder_call": call} | ({"output_hidden_states": True} if tokens else {})
        loss, outputs = super().compute_loss(model, {**inputs, **extra}, True, items)
        if outputs.get("loss") is None:  # a loss of the Trainer's own knows nothing of the pruning's
            more = outputs.get("pruning_loss")
            loss = loss if more is None else loss + self._share * more
        if not args.distillation_weight and not tokens:
            return loss, outputs, call
        unlabelled = {name: value for name, value in inputs.items() if name not in self.label_names}
        with torch.no_grad():
            taught = self.teacher(**sized(self.teacher, unlabelled), output_hidden_states=tokens)
        if args.distillation_weight:
            difference = self._difference(inputs, outputs["logits"], taught["logits"])
            loss = loss + self._share * args.distillation_weight * difference
        if tokens:
            mse = kept_token_mse(outputs["hidden_states"][-1], taught["hidden_states"][-1], call.end)
            loss = loss + self._share * args.token_distillation_weight * mse
        return loss, outputs, call

    @property
    def _share(self) -> float:
        """Of what is added to a batch's loss, where `Trainer` does not divide that by the accumulated batches."""
        batches = getattr(self, "current_gradient_accumulation_steps", 1)
        return 1.0 if self.compute_loss_func is None else 1.0 / batches

    def _difference(self, inputs: dict[str, Any], student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Of logits. What they are of is in the config once a loss was computed, and follows from one label."""
        problem = problem_of(self.pruned.config)
        temperature, counted = self.args.distillation_temperature, self._counted(inputs, student)
        return difference_to_teacher(student, teacher, temperature, counted, problem)

    def _counted(self, inputs: dict[str, Any], logits: torch.Tensor) -> torch.Tensor | None:
        """Which tokens have logits that count; None: logits are of samples."""
        if logits.dim() == 2:
            return None
        mask = inputs.get("attention_mask")
        return torch.ones_like(logits[..., 0], dtype=torch.bool) if mask is None else mask.bool()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.work.take()
        super().log(logs, start_time)

    @contextmanager
    def _at_the_aim(self) -> Iterator[None]:
        """The pruning that training leads to, wherever a schedule stands; with the values that are learned so far."""
        current = self.pruned.config.pruning
        aim = self._aim(current) if self.is_in_train else current
        if aim == current:
            yield
            return
        self.pruned.set_pruning(aim)
        try:
            yield
        finally:
            self.pruned.set_pruning(current)

    def _aim(self, current: PruningConfig | None) -> PruningConfig | None:
        aim = current if self._warmup is None or self._warmup.target is None else self._warmup.target
        if self._phases is None or self._phases.target is None or current.objective is None:
            return aim
        return replace(aim, objective=replace(self._phases.target, phase=current.objective.phase))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated = []
        try:
            with self._at_the_aim():
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            costs = self._evaluated
        finally:
            self._evaluated = None
        if costs:
            macs, whole = torch.cat(costs).sum(dim=0).tolist()
            output.metrics[f"{metric_key_prefix}_mac_ratio"] = macs / whole
            output.metrics[f"{metric_key_prefix}_gmacs"] = macs / sum(map(len, costs)) / 1e9
        return output


class _CheckedLabels:
    """A collator whose class labels are in range: on an accelerator the loss would fail without a word. Whatever else
    the collator has, it has, too."""

    def __init__(self, collate: Callable, names: list[str], config: Any):
        self.collate, self.names, self.config = collate, names, config

    def __getattr__(self, name: str) -> Any:
        if name == "collate":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collate, name)

    def __call__(self, rows: list) -> dict[str, Any]:
        batch = self.collate(rows)
        labels = batch.get("labels") if "labels" in self.names and problem_of(self.config) != REGRESSION else None
        if not isinstance(labels, torch.Tensor) or labels.dtype != torch.long or not (labels != -100).any():
            return batch
        low, high = labels[labels != -100].aminmax()
        if low < 0 or high >= self.config.num_labels:
            wrong = int(low if low < 0 else high)
            raise ValueError(f"label ({wrong}) must be in [0, {self.config.num_labels - 1}]: num_labels says so")
        return batch
